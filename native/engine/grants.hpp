// The endpoint's grants in use: the book under a lock, the transfers that are served, who waits.
//
// Lives here: making and ending grants, what follows from an end (handles, served transfers, leases of
// peers). Does not live here: the rules (protocol/grant_book.hpp), planning a served transfer
// (connection_grants.cpp). Invariants: an end is complete for whoever rewrites when the call returns: `ended`
// is set and fenced, and of a write grant no byte lands any more. The lock is a leaf: nothing else is taken
// under it.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/event_loop.hpp"
#include "engine/handle.hpp"
#include "protocol/grant_book.hpp"

namespace kvt::engine {

class Engine;
class Connection;

/// The owner's handle of a grant: done when it has ended.
class GrantHandle final : public protocol::Grant, public Handle {
  public:
    explicit GrantHandle(std::shared_ptr<Pool> pool) : block_pool_(std::move(pool)) {
        pool_id = block_pool_->id();
    }
    const std::shared_ptr<Pool>& block_pool() const noexcept { return block_pool_; }

    bool every_block = false;  // of the pool, in order

    // Under the lock of Grants; `result` is read after done().
    std::vector<std::weak_ptr<TransferHandle>> served;
    std::vector<std::weak_ptr<protocol::Loan>> loans;
    struct Shown {
        std::string reader;
        std::weak_ptr<Connection> to;
        std::shared_ptr<backends::Publication> as;
    };
    std::vector<Shown> shown;
    std::unordered_map<std::string, std::weak_ptr<Connection>> holders;  // by reader
    Result result;  // of the last write, with the bytes of all; its outcome is the grant's

  private:
    std::shared_ptr<Pool> block_pool_;
};
using GrantHandlePtr = std::shared_ptr<GrantHandle>;

class Grants final : public Runnable, public std::enable_shared_from_this<Grants> {
  public:
    explicit Grants(Engine& engine) : engine_(engine) {}

    // For the user. add() throws LocalViolation where the token names an open grant.
    void add(const GrantHandlePtr& grant);
    /// Ends it, unless peers have it mapped and `force` isn't said: then by how many leases, and it goes on.
    unsigned revoke(const GrantHandlePtr& grant, bool force = false);
    using Blocks = std::vector<std::shared_ptr<const memory::Ids>>;
    void reuse(std::uint64_t pool, const Blocks& by_group);
    void end_pool(std::uint64_t pool);
    /// With the endpoint: ends all, and add() throws NotUsable from here on.
    void close();
    protocol::GrantState state_of(const GrantHandle& grant) const;

    // For connections.
    GrantHandlePtr admit(const protocol::Token& token, const std::string& reader, protocol::GrantMode mode);
    /// The grant that is held; null: no.
    GrantHandlePtr hold(const protocol::Token& token, const std::shared_ptr<Connection>& holder,
                        const std::string& reader, bool mapped);
    void release(const protocol::Token& token, const protocol::GrantHost::Holding& holding,
                 const std::string& reader, bool mapped);
    /// True: there is one, made perhaps since the waiter looked.
    bool await(const protocol::Token& token, const std::shared_ptr<Connection>& waiter);
    void await_no_more(const protocol::Token& token, const Connection& waiter);
    std::size_t awaited() const;
    /// False: it has ended meanwhile.
    bool serving(const GrantHandlePtr& grant, const std::shared_ptr<TransferHandle>& transfer);
    /// What was opened to the peer for a transfer by it; false: it has ended, and nothing may be.
    bool lend(const GrantHandlePtr& grant, const std::shared_ptr<protocol::Loan>& loan);
    void served(const TransferHandle& transfer, const std::string& reader);
    /// The reader has read by itself what it was shown.
    void took(const protocol::TookBody& what, const std::string& reader);
    /// Whether the reader may find the grant by itself, and isn't shown it yet.
    bool may_show(const GrantHandle& grant, const std::string& reader, const Connection& to) const;
    /// Said before it is. False: it has ended.
    bool shows(const GrantHandlePtr& grant, GrantHandle::Shown shown);
    std::vector<GrantHandlePtr> all_for(const std::string& reader) const;
    void reader_gone(const std::string& reader, bool dead);
    /// Whether something is for this reader alone whose connection is lost; true once, for the watch that
    /// stays.
    bool outlives(const std::string& reader);

    // For the reactor.
    protocol::Time on_time(protocol::Time now);
    bool run() override;
    void failed(const std::exception&) override {}

    struct Counters {
        std::uint64_t made = 0, finished = 0, expired = 0, revoked = 0;
    };
    Counters counters() const;
    std::size_t open() const;

  private:
    using Ended = std::vector<protocol::GrantPtr>;
    enum class By { user, others };
    void finish(const Ended& ended, const protocol::Outcome& outcome, By by);
    void retire(const GrantHandlePtr& grant);
    void count(protocol::GrantState state);
    void end_loans(GrantHandle& grant);
    using Loans = std::vector<std::shared_ptr<backends::Publication>>;
    static Loans hidden_from(GrantHandle& grant, const std::string& reader);
    static void end_all(const Loans& loans) noexcept;
    void stop_served(const GrantHandlePtr& grant);
    void note_ended(const Ended& ended);
    void stop_landing(std::uint64_t pool);
    void tell_holders(GrantHandle& grant);

    Engine& engine_;
    mutable std::mutex mutex_;
    protocol::GrantBook book_;
    bool closed_ = false;
    std::set<std::string> watched_;  // readers without a connection, whose processes are watched
    std::unordered_map<std::string, std::vector<std::weak_ptr<Connection>>> awaited_;  // by token
    std::vector<GrantHandlePtr> retiring_;  // ended, and their transfers still to be stopped
    std::vector<GrantHandlePtr> landing_;   // for write, and ended: bytes may still land there
    Counters counters_;
};

}  // namespace kvt::engine
