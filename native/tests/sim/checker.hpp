// What must hold, checked from outside over the history of a schedule.
//
// Lives here: the promises, in the words of their user: outcomes, bytes, times. Does not live here: how the
// protocol keeps them. Invariant: of the protocol's own bookkeeping only what its user is shown is read: the
// outcome, the verified ranges.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "clock.hpp"

namespace kvt::sim {

class Checker {
  public:
    explicit Checker(Clock& clock) : clock_(clock) {}

    [[noreturn]] void broken(const std::string& what) const { throw Broken(what); }

    void posted(Record& record, Memory& memory);
    void stores(const Record& record) {
        record.history->moved_at = clock_.now();
        if (record.history->outcomes != 0) {
            broken("a store after over: " + name(*record.history));
        }
        if (record.role != protocol::Role::destination) {
            broken("a store into a source");
        }
    }
    void reads(const Record& record, const Memory& memory, const void* address) const {
        record.history->moved_at = clock_.now();
        const bool stale = record.ended != nullptr && record.ended->load();  // read, and not to be sealed
        if (!stale && !memory.may_be_read(address)) {
            broken("a read of a source that is over: " + name(*record.history));
        }
    }
    /// The network is fast enough for every verdict to come in time.
    bool rogue() const noexcept { return rogue_; }
    void set_rogue() noexcept { rogue_ = true; }
    void set_calm(bool calm) { calm_ = calm; }
    void over(Record& record, Memory& memory);
    void corrupted() { ++corruptions_; }
    void stalled(Time from, Time until) { stalled_ += until - from; }
    void link_cut() { cut_at_ = cut_at_ < 0 ? clock_.now() : cut_at_; }
    void crashed(unsigned machine) { crashed_[machine] = true; }
    void gate_failed(const std::string& key) { failed_gates_.push_back(key); }
    void message_posted(unsigned machine, const protocol::Message& message) {
        sent_[machine].push_back(message.data);
    }
    /// A read by a grant that counts its readers asked nobody.
    void counted(unsigned reader, const protocol::Token& token) { counted_[reader].push_back(token); }
    /// Its owner has been told.
    void told(unsigned owner, const protocol::Token& token) { told_[owner].push_back(token); }
    void check_told(unsigned owner, bool all) const;
    void message_over(const protocol::Message& message) const;
    /// At the end of a schedule.
    void finish() const;
    void check_messages(unsigned machine, const std::vector<protocol::Bytes>& received, bool all) const;

    std::size_t transfers() const noexcept { return all_.size(); }
    std::size_t ok() const noexcept { return ok_; }

  private:
    struct Entry {
        std::shared_ptr<History> history;
        std::weak_ptr<Record> record;
        std::vector<const History*> candidates;  // destination: sources whose bytes it can have sealed
    };
    static std::string name(const History& history);
    void check_cause(const History& history) const;
    void check_times(const History& history) const;
    bool same_bytes(const History& destination, const History& source,
                    const std::vector<protocol::Range>& ranges, Memory& memory) const;
    void check_taken(const History& history) const;
    void check_destination(Record& record, Entry& entry, Memory& memory);
    void check_source(const History& source) const;
    bool could_meet(const History& one, const History& other) const;
    // After a pause of our own the last words are waited for anew.
    Time late() const noexcept { return stalled_ == 0 ? 100 * kMs : stalled_ + 200 * kMs; }

    Time bytes_limit(const History& h) const noexcept {
        return stalled_ == 0 ? h.limits.stall : 2 * h.limits.stall;
    }

    Clock& clock_;
    std::deque<Entry> all_;
    std::size_t corruptions_ = 0, ok_ = 0;
    bool calm_ = false, rogue_ = false;
    Time stalled_ = 0, cut_at_ = -1;
    bool crashed_[2] = {false, false};
    std::vector<std::string> failed_gates_;
    std::vector<protocol::Bytes> sent_[2];
    std::vector<protocol::Token> counted_[2], told_[2];
};

}  // namespace kvt::sim
