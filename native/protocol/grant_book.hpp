// The grants of one endpoint: who may use which blocks, how often, until when.
//
// Theory of operation. A grant is open until one of four ends: its readers have finished (`read`), its time
// is over (`expired`), its blocks are about to be rewritten or it was revoked (`revoked`), each final. A
// reader is let in by the token, and, where the grant names nobody, counted against `readers`. It has
// finished when a transfer of it succeeded and it holds no lease, or when it gives its last lease back. While
// a lease is held the grant's time stands still; when the last one goes it has a whole ttl again. A lease may
// say that its reader has the blocks mapped, which is counted for whoever asks before they end the grant.
// Ended grants are forgotten: who names one is told what a stranger is told.
//
// Lives here: the rules and the index by block. Does not live here: memory, sessions, locks, the clock (the
// caller has one lock around every call, and passes the time). Invariant: `ended` turns true in end() and
// nowhere else; what end() is called for the caller fences before anything is rewritten.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "protocol/transfer.hpp"

namespace kvt::protocol {

enum class GrantMode : std::uint8_t { read, write };
enum class GrantState : std::uint8_t { open, read, expired, revoked };

class Grant {
  public:
    virtual ~Grant() = default;

    Token token{};
    GrantMode mode = GrantMode::read;
    std::string to;        // whom it is for; empty: the first to show the token
    unsigned readers = 1;  // 0: any number, and they never finish it
    Time ttl = kNever;
    std::uint64_t pool_id = 0;
    std::vector<std::vector<std::uint32_t>> blocks;  // ids by group

    // The book's.
    GrantState state = GrantState::open;
    Time deadline = kNever;
    std::set<std::string> admitted, finished;
    std::map<std::string, unsigned> leases;  // by reader
    std::map<std::string, unsigned> mapped;  // of those, who has the blocks mapped
    const std::shared_ptr<std::atomic<bool>> ended = std::make_shared<std::atomic<bool>>(false);
};
using GrantPtr = std::shared_ptr<Grant>;

class GrantBook {
  public:
    /// False: the token names another one that is open.
    bool add(const GrantPtr& grant, Time now);
    /// The grant, and the reader is counted; null: it isn't for them, or not here.
    GrantPtr admit(const Token& token, const std::string& reader, GrantMode mode);
    GrantPtr find(const Token& token) const;
    /// Whether the reader, who was let in or will be, may come again without being counted.
    static bool open_to(const Grant& grant, const std::string& reader);
    /// The grant; null: it can't be held.
    GrantPtr hold(const Token& token, const std::string& reader, bool mapped = false);
    /// These return the grant where it has ended by this. `ended`: of the grant that was held; the token may
    /// name another now.
    GrantPtr release(const Token& token, const std::shared_ptr<const std::atomic<bool>>& ended,
                     const std::string& reader, Time now, bool mapped = false);
    GrantPtr over(const GrantPtr& grant, const std::string& reader, bool succeeded);
    /// By how many leases an open grant is mapped.
    static unsigned times_mapped(const Grant& grant);
    /// False: it had ended before.
    bool end(const GrantPtr& grant, GrantState state);
    /// Ends all grants on one of these blocks of a pool's group.
    std::vector<GrantPtr> end_blocks(std::uint64_t pool, std::size_t group,
                                     const std::vector<std::uint32_t>& ids);
    std::vector<GrantPtr> end_pool(std::uint64_t pool);
    std::vector<GrantPtr> end_all();
    std::vector<GrantPtr> expire(Time now);
    /// Its leases are gone. `dead`: it won't come back, so that what was for it alone has ended.
    std::vector<GrantPtr> reader_gone(const std::string& reader, bool dead, Time now);
    /// Whether one is for this reader alone.
    bool has_for(const std::string& reader) const;
    /// Those that are for this reader alone.
    std::vector<GrantPtr> all_for(const std::string& reader) const;
    /// When expire() has something to do at the earliest.
    Time next_deadline() const noexcept { return next_deadline_; }
    std::size_t size() const noexcept { return grants_.size(); }

  private:
    struct TokenHash {
        std::size_t operator()(const Token& token) const noexcept {
            return static_cast<std::size_t>(load_le<std::uint64_t>(token.data()));  // random bits already
        }
    };
    using ByBlock = std::unordered_map<std::uint32_t, std::vector<Grant*>>;

    GrantPtr end_if_finished(const GrantPtr& grant);
    void let_time_run(Grant& grant, Time now);
    void index(Grant& grant, bool in);

    std::unordered_map<Token, GrantPtr, TokenHash> grants_;
    std::unordered_map<std::uint64_t, std::vector<ByBlock>> pools_;  // by group
    Time next_deadline_ = kNever;
};

}  // namespace kvt::protocol
