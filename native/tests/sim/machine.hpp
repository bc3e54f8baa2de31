// One simulated process: a session, its lanes and control stream, its movers, its memory.
//
// Theory of operation. What the real engine does under locks happens here in one event, what it does between
// two locks in two events with anything in between: a mover has written and hasn't noted it, has stored and
// hasn't said so, quiescing has been asked for and takes its time. Lives here: that engine. Does not live
// here: what the users do (world.hpp), what must hold (checker.hpp). Invariant: a machine touches the other
// one only through pipes and, as a memory backend, by lend() and shown().
#pragma once

#include <array>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>

#include "checker.hpp"
#include "pipe.hpp"
#include "protocol/frame_stream.hpp"
#include "protocol/grant_book.hpp"
#include "protocol/lane.hpp"

namespace kvt::sim {

struct MachineSetup {
    protocol::SessionConfig config;
    std::vector<std::size_t> pieces;
    protocol::PoolTerms pool;
    bool staging = false;          // lanes have a ring
    bool dials = false;            // has a second session, which another side's takes the place of
    unsigned corrupt_percent = 0;  // of writes and stores with digests
    bool finds = false;            // reads what the other side shows without asking
    Time slow = 0;                 // of what happens between two locks
};

class Machine {
  public:
    Machine(unsigned index, Clock& clock, Random& random, Checker& checker, MachineSetup setup);
    ~Machine();
    void connect(Machine& peer, Pipe& control_in, Pipe& control_out,
                 const std::vector<std::pair<Pipe*, Pipe*>>& lanes);

    // The users.
    RecordPtr make(protocol::Role role, std::vector<Row> rows);
    void post(const RecordPtr& record);
    void cancel(const RecordPtr& record);
    void adopt();       // what waits on the session that won't open goes over to the one that is
    void close_pool();  // if no transfer uses it; the next post takes another
    void refuse(const std::string& key);
    void send_message(std::size_t nbytes);
    void take_messages();
    void kick_gates();
    void fail_gates();
    void break_way();  // to the peer's memory
    void become_rogue();
    void catch_rogue();
    std::function<void(const RecordPtr&)> on_over;

    // Grants (machine_grants.cpp): their owner, and a user of the other side's.
    void own_grants();
    void grant(std::uint8_t n, protocol::GrantMode mode, unsigned readers, Time ttl,
               std::vector<std::vector<std::uint32_t>> blocks, bool named);
    void revoke(std::uint8_t n, bool by_reuse);
    void refuse_grant(std::uint8_t n);
    void hold(std::uint8_t n, std::uint32_t wait_ms, Time keep);
    bool grants_left() const;
    std::uint64_t taken() const noexcept { return taken_; }

    // Fate.
    void lose();
    void crash();
    void stall(Time until);
    void later(Time delay, std::function<void()> what);

    unsigned index() const noexcept { return index_; }
    bool closed() const noexcept { return closed_; }
    bool crashed() const noexcept { return crashed_; }
    bool live() const noexcept { return !closed_ && !crashed_; }
    std::size_t group_of(std::uint32_t layer) const noexcept { return setup_.pool.layers[layer].group; }
    Memory& memory() noexcept { return memory_; }
    protocol::Session& session() noexcept { return session_; }
    bool idle() const;
    std::size_t unfinished() const noexcept { return unfinished_; }
    const std::vector<std::shared_ptr<protocol::Message>>& messages() const noexcept { return messages_; }
    const std::vector<protocol::Bytes>& received() const noexcept { return received_; }

  private:
    struct Lane;
    struct Copy;
    struct Taking;
    struct Shown {
        RecordPtr source;  // the blocks that are asked for, as they are now
        bool counted = false;
    };
    struct Granted;
    class Owner;

    template <class What>
    void guarded(What what);
    void settle();
    void collect(protocol::Session& session);
    protocol::Session& home_of(const protocol::TransferPtr& transfer) {
        return dialled_posts_.contains(transfer.get()) ? *dialled_ : session_;
    }
    void put_inline();
    void flush_control();
    void read_control();
    bool receive_next();
    void receive_inline(const protocol::Header& header, const std::byte* body,
                        const protocol::Trailer& trailer);
    bool start_chunk(Lane& lane);
    void write_lane(Lane& lane);
    void replay(Lane& lane);
    void wrote(Lane& lane, std::size_t n);
    void read_lane(Lane& lane);
    void got(Lane& lane, std::size_t n);
    void quiesce(const protocol::TransferPtr& transfer);
    bool movers_hold(const protocol::TransferPtr& transfer) const;
    void start_copies();
    void lend(const std::shared_ptr<Copy>& copy);
    void finish_copy(const std::shared_ptr<Copy>& copy);
    void copy_bytes(const protocol::Transfer& source, protocol::Transfer& target, std::uint64_t begin,
                    std::uint64_t end);
    void set_timer();
    protocol::GrantHost::Service serve(const protocol::GrantUse& use, const protocol::Terms& terms,
                                       const protocol::PoolTerms& theirs, protocol::Role role);
    std::optional<std::vector<Row>> rows_of(const Granted& grant, const protocol::GrantUse& use,
                                            const protocol::Terms& terms) const;
    std::optional<Shown> shown(const protocol::GrantUse& use, const protocol::Terms& terms);
    void show(Granted& grant);
    void check_took(const protocol::Bytes& body);
    static bool overlap(const std::vector<Row>& one, const std::vector<Row>& other);
    template <class What>
    void each_block(const protocol::Grant& grant, What what);
    void ended(const protocol::GrantPtr& grant);
    void give_back(Granted& grant);
    void served_is_over(const RecordPtr& record);
    void watch_grants();
    void grants_lost();
    void collect_leases();
    Time while_copying();
    bool take(const RecordPtr& record);
    void take_bytes(const std::shared_ptr<Taking>& taking, std::uint64_t begin);
    void look_again(const std::shared_ptr<Taking>& taking);
    void over(const protocol::TransferPtr& transfer);
    Time while_unlocked() {
        return setup_.slow == 0 || random_.chance(70) ? 0 : random_.between(0, setup_.slow);
    }

    unsigned index_;
    Clock& clock_;
    Random& random_;
    Checker& checker_;
    MachineSetup setup_;
    Memory memory_;
    protocol::Session session_;
    std::unique_ptr<protocol::Session> dialled_;  // never opens
    std::unordered_set<const protocol::Transfer*> dialled_posts_;
    std::uint64_t pool_id_ = 1;
    std::size_t unfinished_ = 0;  // over all sessions
    Machine* peer_ = nullptr;
    Pipe *control_in_ = nullptr, *control_out_ = nullptr;
    std::vector<std::unique_ptr<Lane>> lanes_;
    protocol::FrameReader frames_;
    protocol::Bytes tx_;
    std::size_t tx_at_ = 0;
    bool way_broke_ = false, rogue_ = false, closed_ = false, crashed_ = false, polling_ = false,
         reading_control_ = false, settling_ = false, adopted_ = false;
    unsigned copiers_ = 0;
    Time stalled_until_ = 0, timer_at_ = protocol::kNever;
    std::vector<std::shared_ptr<protocol::Message>> messages_;
    std::vector<protocol::Bytes> received_;
    std::uint64_t untaken_ = 0;
    protocol::GrantBook book_;
    std::shared_ptr<protocol::GrantHost> owner_;
    std::vector<std::shared_ptr<Granted>> grants_;
    std::vector<std::shared_ptr<Granted>> ended_;  // and what they serve still to be stopped
    std::set<protocol::Token> awaited_;
    std::vector<protocol::HoldPtr> leases_;
    std::size_t served_ = 0;
    std::unordered_set<const protocol::Transfer*> taking_;  // whose post hasn't returned yet
    std::uint64_t taken_ = 0;
};

template <class What>
void Machine::guarded(What what) {
    try {
        what();
    } catch (const protocol::Violation& violation) {
        if (closed_) {
            return;  // what came before the loss names what is gone by now: no connection is lost twice
        }
        if (checker_.rogue()) {
            catch_rogue();
            return;
        }
        checker_.broken(std::string("an honest peer is accused: ") + violation.what());
    } catch (const protocol::Excess& excess) {
        checker_.broken(std::string("an honest peer exceeds: ") + excess.what());
    } catch (const std::logic_error& bug) {
        checker_.broken(std::string("a bug: ") + bug.what());
    }
}

}  // namespace kvt::sim
