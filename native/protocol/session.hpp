// One live session with a peer: matching, scheduling, transfers, messages. Bytes and events in, frames and
// orders out.
//
// Theory of operation. A session owns the records of all transfers of both directions. Frames of the control
// stream come through receive(); movers ask next_chunk() for what to send and chunk_begin() where to store.
// What must happen outside comes back as output: bytes for the control stream, transfers whose loads and
// stores the engine must stop (quiescing), transfers and messages that have ended (finished). The caller
// holds one lock around every call, passes the time, and acts on the output after it; nothing here blocks,
// sleeps, or knows a socket.
//
// A destination sends WANT when posted; at most `peer_unmatched` WANTs and OFFERs are outstanding without a
// partner, more wait here. A source sends OFFER when it is posted first or has meta. A source that finds a
// WANT for its key starts at once: with chunks, or, where the destination can copy by itself, with the word
// where (session_copies.cpp).
//
// A key may be used again at once, so the two sides must agree which WANT an OFFER is for while both are
// under way. The source's reading decides: its OFFER is for the first WANT of its key that it had not read
// when it wrote the OFFER, and the OFFER says which it had read. A destination therefore keeps a WANT that it
// has ended until the source has answered for it. An OFFER is a hint that may be withdrawn; what the source
// says after the match (chunks, GATED, LOCATED) is not.
//
// Invariant: see transfer.hpp; and whatever a peer can make us keep is bounded by SessionConfig.
#pragma once

#include <cstdint>
#include <deque>
#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "protocol/charges.hpp"
#include "protocol/frames.hpp"
#include "protocol/transfer.hpp"

namespace kvt::protocol {

/// The caller asked what the state forbids: LocalProtocolError.
struct LocalViolation : std::logic_error {
    using std::logic_error::logic_error;
};

/// A piece of a source's stream for a mover to send.
struct ChunkJob {
    TransferPtr transfer;
    Range range;
    Header header;
};

/// Where a chunk that arrives belongs.
struct ChunkTarget {
    TransferPtr transfer;
    Range range;
    bool store = false;  // else it is drained into scratch
};

/// A message and its handle's record. The engine derives from it.
class Message {
  public:
    virtual ~Message() = default;
    Bytes data;
    std::uint64_t number = 0;
    Outcome outcome;
    bool finished = false;
    Time posted_at = 0, over_at = 0;
};
using MessagePtr = std::shared_ptr<Message>;

/// What a session asks of the grants of its own side; under its lock.
class GrantHost {
  public:
    virtual ~GrantHost() = default;
    enum class Answer {
        served,    // the transfer is in the answer, and the peer's from here on
        not_here,  // unknown, ended, another's, out of its bounds; it may come
        mismatch,  // granted, and its layout isn't the peer's
        busy,      // granted, and others write there
    };
    struct Service {
        Answer answer = Answer::not_here;
        TransferPtr transfer;
        Mismatch mismatch;
    };
    virtual Service serve_read(const ReadBody& read, const PoolTerms& theirs) = 0;
    virtual Service serve_write(const WriteBody& write, const PoolTerms& theirs) = 0;
    /// Not null: it is held for the peer, until release() or the end of the session. Which grant that is,
    /// says the pointer (a token may name another by then), and whether it has ended, what it points to.
    /// `mapped`: the peer reads the blocks where they lie meanwhile.
    using Holding = std::shared_ptr<const std::atomic<bool>>;
    virtual Holding hold(const Token& token, bool mapped) = 0;
    virtual void release(const Token& token, const Holding& holding, bool mapped) = 0;
    /// The peer has read by what it was shown, under this mark, without asking.
    virtual void took(const TookBody& what) = 0;
    /// Somebody waits for this grant: grant_came() whenever one of this name is made. True: one is here, made
    /// perhaps since it was asked for.
    virtual bool await(const Token& token) = 0;
    /// Nobody does any more.
    virtual void await_no_more(const Token& token) = 0;
};

/// A lease on a grant of the peer's, and its handle's record. The engine derives from it.
class Hold {
  public:
    virtual ~Hold() = default;
    enum class State { asked, held, over };
    /// The peer has answered, or it is over without; under the session's lock.
    virtual void answered() noexcept {}
    Token token{};
    std::uint32_t wait_ms = 0;
    bool mapped = false;
    std::uint64_t number = 0;
    State state = State::asked;
    Outcome outcome;
};
using HoldPtr = std::shared_ptr<Hold>;

struct SessionConfig {
    std::uint64_t capabilities = 0;  // that both sides have: kCan...
    bool pulls = false;              // this side can copy from the peer's memory, from the beginning
    DigestKind digest = DigestKind::none;
    std::uint64_t chunk_nbytes = 0;
    std::uint32_t unmatched = 1024;  // the peer is held to this; we are held to the next
    std::uint32_t peer_unmatched = 1024;
    std::uint32_t regions = 1024;
    std::uint32_t peer_regions = 1024;
    std::uint64_t message_window_nbytes = 32u << 20;  // sent and not yet taken by the peer's user
    std::uint64_t message_queue_nbytes = 64u << 20;   // of the peer's, kept for our user
    std::size_t outbox_nbytes = 1u << 20;             // beyond half of it, what our own user posts waits
    std::size_t answers_nbytes = 2u << 20;            // of the outbox, to frames of the peer
    std::size_t peer_state_nbytes = 64u << 20;  // charges of pools, unmatched WANTs and OFFERs: each side's
};

/// A source that has told the destination of its end waits so long for the verdict before it reports
/// "unknown". The peer answers natively, so a round trip suffices; the deadline of a transfer may be passed
/// by 100 ms in all.
inline constexpr Time kVerdictGrace = 80'000'000;

/// What a peer gets to show itself after our own pause, where only a wait's start is known.
inline constexpr Time kPauseGrace = 50'000'000;

/// What a pool counts against the limit of regions: one without layers takes room too.
inline std::size_t regions_of(const PoolTerms& pool) noexcept {
    return pool.layers.empty() ? 1 : pool.layers.size();
}

/// What a message counts against the windows: an empty one takes room too.
inline constexpr std::uint64_t message_charge(std::uint64_t nbytes) noexcept { return nbytes + 64; }

class Session {
  public:
    /// A session whose handshake isn't over: what is posted waits for open().
    Session() = default;
    explicit Session(SessionConfig config) : config_(config), opened_(true), pulls_(config.pulls) {}
    void open(SessionConfig config, Time now);
    /// Before open(): gives up what was posted, for another session with the same peer to take over.
    std::vector<TransferPtr> give_up_posts();
    std::deque<HoldPtr> give_up_holds() { return std::exchange(untold_holds_, {}); }
    std::deque<MessagePtr> give_up_messages() { return std::exchange(messages_, {}); }
    /// A post that another session gave up; it keeps its clock. Throws as post() does.
    void take_over(TransferPtr transfer, Time now);
    /// What was refused on a session that gives up its posts.
    void take_over_refusals(Session& before, Time now);

    // What the local user asks. post() throws LocalViolation when the key is in use, Excess when the pool's
    // layers go beyond what the peer allows.
    void post(TransferPtr transfer, std::uint64_t pool_id, Time now);
    void stop(const TransferPtr& transfer, Outcome why, Time now);
    void refuse(const std::string& key, const std::string& reason, Time until, Time now);
    /// For who waits by this token, or will.
    void refuse(const Token& token, const std::string& reason, Time until, Time now);
    void post_hold(HoldPtr hold);
    void let_go(const HoldPtr& hold);
    /// Whether a grant of the peer's that stands in the open may be read by this side itself. `counted`: one
    /// read, without a lease, is all that there is.
    bool may_take(const Token& token, bool counted);
    /// So many bytes were read so, all that were asked for.
    void took(const TookBody& what, std::uint64_t nbytes, bool counted);
    /// Whose grants the peer may use; none before.
    void set_grants(GrantHost* grants) noexcept { grants_ = grants; }
    void grant_came(const Token& token, Time now);
    /// A grant of this name that the peer may hold has ended; another may have been made meanwhile.
    void hold_ended(const Token& token);
    void post_message(MessagePtr message, Time now);
    void forget_pool(std::uint64_t pool_id);
    /// So many of those that take_messages() gave are where the user finds them: only now are they told of.
    void messages_queued(std::size_t count);
    void messages_taken(std::uint64_t nbytes);

    // What the peer says. Throws Violation or Excess; the caller then ends the session with lost().
    void receive(const Header& header, std::span<const std::byte> body, Time now);
    ChunkTarget chunk_begin(const Header& header, Time now);
    void chunk_end(const ChunkTarget& target, const Trailer& trailer, bool verified, Time now);

    // What movers take.
    std::optional<ChunkJob> next_chunk(Time now);
    std::optional<ChunkJob> next_inline(Time now);
    /// `whole`: all its bytes were read from the source. `begun`: its header was written, so the peer will
    /// see it.
    void chunk_left(const ChunkJob& job, bool whole, bool begun, Time now);
    std::optional<ChunkTarget> next_copy(Time now);
    /// In the place of chunk_end(): the way to the source's memory is broken, and with it this copy.
    void copy_broke(const ChunkTarget& target, Time now);
    /// Whether what is posted from now on may be copied. False: what is being copied comes by chunks, too.
    void set_pulls(bool pulls, Time now);
    bool has_chunks() const noexcept { return !short_.empty() || !long_.empty(); }
    bool has_copies() const noexcept { return !copies_.empty(); }

    // What the engine answers and the clock says.
    void quiesced(const TransferPtr& transfer, Time now);
    void on_time(Time now);
    Time next_deadline() const noexcept { return next_deadline_; }
    void resumed(Time now);     // our own process stood still: stall clocks start anew
    void fail_gates(Time now);  // ends every source whose gate has failed, matched or not
    bool poll_gates(Time now);  // true while a gated transfer waits
    bool gates_wait() const noexcept { return !gated_.empty(); }
    /// In one process: the destination's mover holds the source's record while it copies; null when the
    /// source has ended. Each one lent is returned().
    TransferPtr lend(std::uint64_t want, Time now);
    void returned(const TransferPtr& transfer, Time now);
    void lost(Cause cause, const std::string& reason, Time now);
    bool is_lost() const noexcept { return lost_; }
    void ping();
    void say_close(CloseCode code);

    // Output, taken by the caller under the same lock.
    Bytes& outbox() noexcept { return outbox_; }
    void pump(Time now);  // moves what waited for room into the outbox
    std::vector<TransferPtr> take_quiescing() { return std::exchange(quiescing_, {}); }
    std::vector<TransferPtr> take_finished() { return std::exchange(finished_, {}); }
    std::vector<MessagePtr> take_finished_messages() { return std::exchange(finished_messages_, {}); }
    std::vector<HoldPtr> take_finished_holds() { return std::exchange(finished_holds_, {}); }
    std::vector<Bytes> take_messages() { return std::exchange(inbox_, {}); }
    bool has_messages() const noexcept { return !inbox_.empty(); }
    bool has_output() const noexcept {
        return !outbox_.empty() || !quiescing_.empty() || !finished_.empty() || !finished_messages_.empty() ||
               !finished_holds_.empty() || !inbox_.empty();
    }
    std::optional<CloseCode> peer_closed() const noexcept { return peer_closed_; }

    struct Counters {
        std::uint64_t chunks_out = 0, chunks_in = 0, bytes_out = 0, bytes_in = 0, drained_chunks = 0,
                      drained_bytes = 0;
        std::uint64_t sends_ok = 0, sends_failed = 0, receives_ok = 0, receives_failed = 0,
                      corrupt_chunks = 0;
        std::uint64_t messages_out = 0, messages_in = 0;
    };
    const Counters& counters() const noexcept { return counters_; }
    Counters& counters() noexcept { return counters_; }
    std::size_t unfinished() const noexcept {
        return source_keys_.size() + destination_keys_.size() + one_sided_.size();
    }
    std::size_t tombstones() const noexcept { return tombstones_.size(); }
    /// What is kept on the peer's behalf without a transfer of ours: unmatched WANTs and OFFERs, verdicts
    /// still to come.
    std::size_t kept_for_peer() const noexcept {
        return unmatched_wants_.size() + unmatched_offers_.size() + late_.size() + waiting_reads_.size() +
               waiting_writes_.size() + waiting_holds_.size();
    }
    std::size_t outstanding() const noexcept { return outstanding_; }

  private:
    template <class Body>
    struct Unmatched {
        std::uint64_t id = 0, total = 0;
        std::size_t charge = 0;  // of peer_state_nbytes
        bool pulls = false;      // a WANT's
        Body body;
    };
    using UnmatchedWant = Unmatched<WantBody>;
    using UnmatchedOffer = Unmatched<OfferBody>;
    struct PeerPool {
        PoolTerms terms;
        std::size_t charge = 0;
    };
    template <class Body>
    struct Waiting {  // for a grant of ours
        std::uint64_t id = 0, total = 0;
        std::size_t charge = 0;
        bool pulls = false;
        Time until = 0;
        Body body;
    };
    using WaitingRead = Waiting<ReadBody>;
    using WaitingWrite = Waiting<WriteBody>;
    struct WaitingHold {
        Token token{};
        Time until = 0;
        bool mapped = false;
    };
    struct Held {
        Token token{};
        GrantHost::Holding holding;
        bool mapped = false;
    };
    struct OwnPool {
        std::size_t regions = 0, charge = 0;
    };
    struct Refusal {
        std::string reason;
        Time until = 0;
    };

    // session.cpp: posting, telling, the machines
    void admit(const TransferPtr& transfer, const char* key_in_use);
    void withdraw(const TransferPtr& transfer);
    void take_regions(const Transfer& transfer);
    void enter(const TransferPtr& transfer, Time now);
    void enter_one_sided(const TransferPtr& transfer);
    std::vector<TransferPtr> all_unfinished() const;
    std::vector<TransferPtr> waiting_posts() const;
    bool room_to_end_receives() const noexcept;
    bool room_to_tell(const Transfer& transfer) const noexcept;
    bool room_to_answer(const Transfer& transfer) const noexcept;
    void answer_what_waited(Time now);
    void tell(const TransferPtr& transfer);
    void send_offer(const TransferPtr& transfer);
    void send_want(const TransferPtr& transfer);
    void send_read(const TransferPtr& transfer);
    void send_write(const TransferPtr& transfer);
    void tell_or_queue(const TransferPtr& transfer);
    void count_outstanding(Transfer& transfer, bool counts) noexcept;
    void count_served(Transfer& transfer, bool counts) noexcept;
    void pump_messages();
    void acknowledge_messages();
    void apply(const TransferPtr& transfer, Event event, Time now);
    void act(const TransferPtr& transfer, Action action, Time now);
    void begin_quiesce(const TransferPtr& transfer);
    void finish(const TransferPtr& transfer, Time now);
    void forget(const TransferPtr& transfer);
    void check_early_done(Transfer& transfer);
    void answer_after_quiesce(const TransferPtr& transfer);
    void announce(std::uint64_t pool_id, const PoolTerms& pool);
    void send_abort(const Transfer& transfer);
    void send(FrameType type, std::uint8_t flags, std::uint64_t transfer, std::uint64_t total,
              std::uint64_t arg);
    void send(Header header, const Bytes& body);

    // session_time.cpp: deadlines and loss
    void watch(Time deadline) noexcept { next_deadline_ = std::min(next_deadline_, deadline); }
    void watch(const Transfer& transfer) noexcept;
    Time deadline_of(const Transfer& transfer, Cause& cause) const noexcept;
    void leave_without_verdict(const TransferPtr& transfer, Time now);
    bool may_be_sealed(const Transfer& source) const noexcept;
    void drop_everything_kept();
    void lose_transfer(const TransferPtr& transfer, Cause cause, const std::string& reason, Time now);

    // session_peer.cpp: what the peer says that isn't one role's, and what is kept of it
    void on_abort(const Header& header, std::span<const std::byte> body, Time now);
    void on_pool(const Header& header, std::span<const std::byte> body);
    const PoolTerms& peer_pool(const Terms& terms) const;
    const PoolTerms* open_pool(const Terms& terms, std::uint64_t total) const;
    void check_bounds(std::size_t answered_nbytes);
    void charge_peer(std::size_t nbytes);
    void keep(UnmatchedWant want, bool answers_offer);
    void keep(UnmatchedOffer offer);
    std::optional<UnmatchedWant> take_want(const std::string& key);
    std::optional<UnmatchedOffer> take_offer(const std::string& key);
    std::optional<std::string> take_refusal(const std::string& key, Time now);
    void refuse_want(std::uint64_t want, AbortCode code, const std::string& reason, const Mismatch& mismatch);
    void refuse_offer(std::uint64_t offer, AbortCode code, const std::string& reason,
                      const Mismatch& mismatch);
    void send_refusal(const Header& header, const AbortBody& body);
    /// Refuses what costs our own user nothing: an answer to the peer, and counted as one.
    template <class Refuse>
    void answering(Refuse refuse) {
        const std::size_t own = own_nbytes_;
        refuse();
        own_nbytes_ = own;
    }
    void on_message(const Header& header, std::span<const std::byte> body);
    void on_message_ack(const Header& header, Time now);

    // session_source.cpp
    void on_want(const Header& header, std::span<const std::byte> body, Time now);
    void match_source(const TransferPtr& transfer, UnmatchedWant want, Time now);
    void start_source(const TransferPtr& transfer, const UnmatchedWant& want, Time now);
    void release_layers(const TransferPtr& transfer, Time now);
    bool take_released(Transfer& transfer, std::vector<std::uint32_t>& fresh) const;
    void make_ready(const TransferPtr& transfer);
    void set_gate(const TransferPtr& transfer, bool shut, Time now);
    void on_done(const Header& header, Time now);
    TransferPtr find_source(const Header& header);
    void on_abort_for_source(const Header& header, const AbortBody& body, Time now);
    void on_aborted_for_source(const Header& header, Time now);
    std::optional<ChunkJob> cut(std::deque<TransferPtr>& queue, std::uint64_t most, Time now);

    // session_destination.cpp
    void on_offer(const Header& header, std::span<const std::byte> body, Time now);
    TransferPtr partner_of(const std::string& key, std::uint64_t floor) const;
    void match_destination(const TransferPtr& transfer, UnmatchedOffer offer, Time now);
    void note_offer(Transfer& transfer, std::uint64_t offer) const;
    void claim_chunk(const TransferPtr& transfer, const Header& header, Range range, Time now);
    void on_abort_for_destination(const Header& header, const AbortBody& body, Time now);
    void on_aborted_for_destination(const Header& header, Time now);
    void on_withdrawn(std::uint64_t offer, const AbortBody& body, Time now);
    void end_by_peer(const TransferPtr& transfer, const AbortBody& body, Time now);
    Outcome outcome_by(const AbortBody& body, const Transfer& transfer) const;
    void on_gated(const Header& header, Time now);
    void on_released(const Header& header, std::span<const std::byte> body, Time now);
    void seal_if_whole(const TransferPtr& transfer, Time now);
    void check_drained(const TransferPtr& transfer, Time now);
    TransferPtr destination(std::uint64_t want) const;

    // session_copies.cpp: the destination copies, or can't any more
    void locate(const TransferPtr& transfer);
    void on_again(const Header& header, std::span<const std::byte> body, Time now);
    void on_copied(const Header& header, Time now);
    void on_located(const Header& header, std::span<const std::byte> body, Time now);
    void report_copies(Transfer& transfer, Time now);
    void ask_again(const TransferPtr& transfer, Time now);
    TransferPtr source_of(std::uint64_t want) const;

    // session_grants.cpp: one-sided
    void on_read(const Header& header, std::span<const std::byte> body, Time now);
    void on_write(const Header& header, std::span<const std::byte> body, Time now);
    void on_hold(const Header& header, std::span<const std::byte> body, Time now);
    void on_held(const Header& header);
    void on_took(std::span<const std::byte> body);
    void on_want_of_write(const Header& header, WantBody body, Time now);
    bool serve(const WaitingRead& read, Time now);
    bool serve(const WaitingWrite& write, Time now);
    void begin_serving(const TransferPtr& transfer, std::size_t charge, Time now);
    void wait_for_grant(const Token& token, Time now);
    void wait_no_more(const Token& token);
    template <class Body>
    void wait_or_deny(std::map<std::uint64_t, Waiting<Body>>& waiting, Waiting<Body> use, Time now);
    template <class Body>
    bool stop_waiting(std::map<std::uint64_t, Waiting<Body>>& waiting, std::uint64_t id);
    void stop_waiting(std::map<std::uint64_t, WaitingHold>::iterator hold);
    template <class Body>
    void end_waiting(std::map<std::uint64_t, Waiting<Body>>& waiting,
                     typename std::map<std::uint64_t, Waiting<Body>>::iterator use, AbortCode code,
                     const std::string& reason);
    void deny(const WaitingRead& read, AbortCode code, const std::string& reason, const Mismatch& mismatch);
    void deny(const WaitingWrite& write, AbortCode code, const std::string& reason, const Mismatch& mismatch);
    void stop_waiting_for_grants(Time now);
    void admitted_to(const Token& token);
    void taken(const Token& token);
    void no_longer_leased(const Hold& hold);
    bool is_refused(const Token& token, Time now) const;
    std::optional<std::string> take_refusal(const Token& token, Time now);
    void pump_holds();
    bool try_hold(std::uint64_t number, const Token& token, bool mapped);
    void say_held(std::uint64_t number, bool held);
    void pump_held();
    void finish_hold(const HoldPtr& hold, Outcome outcome);

    SessionConfig config_;
    bool opened_ = false;
    bool pulls_ = false;
    bool lost_ = false;
    Cause lost_cause_ = Cause::peer_lost;
    std::string lost_reason_;
    std::string lie_;  // a DONE that turned out untrue: the next call that may throws it
    Time next_deadline_ = kNever;
    std::optional<CloseCode> peer_closed_;
    Counters counters_;

    std::uint64_t next_offer_ = 1, next_want_ = 1, next_message_ = 1;
    std::unordered_map<std::string, TransferPtr> source_keys_, destination_keys_;  // unfinished, by key
    std::map<std::uint64_t, TransferPtr> one_sided_;  // unfinished, by a grant of either side, in order
    std::uint64_t next_one_sided_ = 1;
    std::unordered_map<std::uint64_t, TransferPtr> offers_;   // sources by our id, once told
    std::unordered_map<std::uint64_t, TransferPtr> matched_;  // sources by the peer's want id
    std::unordered_map<std::uint64_t, TransferPtr>
        wants_;  // destinations and their tombstones by our id, once told
    std::unordered_multimap<std::string, TransferPtr> tombstones_;  // of wants_, by key
    std::unordered_map<std::uint64_t, TransferPtr> partners_;       // of wants_, by the peer's offer
    std::unordered_map<std::string, UnmatchedWant> unmatched_wants_;
    std::unordered_map<std::uint64_t, std::string> unmatched_want_keys_;
    std::unordered_map<std::string, UnmatchedOffer> unmatched_offers_;
    std::unordered_map<std::uint64_t, std::string> unmatched_offer_keys_;
    std::unordered_map<std::string, Refusal> refusals_;
    std::map<Token, Refusal> token_refusals_;
    GrantHost* grants_ = nullptr;
    std::map<std::uint64_t, WaitingRead> waiting_reads_;    // by want
    std::map<std::uint64_t, WaitingWrite> waiting_writes_;  // by offer
    std::map<std::uint64_t, WaitingHold> waiting_holds_;    // the peer's, by its number
    std::map<Token, std::size_t> awaited_;                  // by how many of these three
    std::map<std::uint64_t, Held> held_;                    // as waiting_holds_
    std::map<std::uint64_t, std::uint8_t> held_due_;        // words on them that wait for room, as bits
    std::size_t served_reads_ = 0, served_writes_ = 0;      // the peer's, that go on
    std::size_t served_tombstones_ = 0;                     // of tombstones_
    std::map<std::uint64_t, HoldPtr> holds_;                // ours, once told
    std::deque<HoldPtr> untold_holds_;
    std::uint64_t next_hold_ = 1, last_hold_seen_ = 0;
    std::set<Token> admitted_;  // grants of the peer's that we were let in to
    std::deque<Token> admitted_in_order_;
    std::map<Token, std::size_t> leased_;  // by how many of holds_ it is held
    std::set<Token> taken_;                // by ourselves, as often as may be
    std::deque<Token> taken_in_order_;
    std::unordered_set<std::uint64_t> late_;  // the peer's wants that we left; a word on each is to come
    std::uint64_t last_want_seen_ = 0, last_offer_seen_ = 0;
    std::size_t peer_charge_ = 0, answered_nbytes_ = 0;
    std::size_t own_nbytes_ = 0;     // ever put into the outbox because our own user posted or refused
    std::uint32_t outstanding_ = 0;  // told, and maybe unmatched at the peer
    std::size_t outstanding_charge_ = 0;
    std::deque<TransferPtr> untold_;      // wait for room to be told
    std::deque<TransferPtr> unanswered_;  // receives whose OFFER is here wait for room for the answer
    std::deque<TransferPtr> short_, long_, inline_, copies_;
    std::map<std::uint64_t, TransferPtr> gated_;  // sources whose gate may hold something back, by want
    unsigned short_in_a_row_ = 0;
    std::unordered_map<std::uint64_t, PeerPool> peer_pools_;
    std::size_t peer_regions_ = 0;
    std::unordered_set<std::uint64_t> announced_;
    std::unordered_map<std::uint64_t, OwnPool> used_pools_;
    std::size_t used_regions_ = 0, used_charge_ = 0;

    std::deque<MessagePtr> messages_, unacknowledged_;
    std::uint64_t message_bytes_sent_ = 0,
                  message_bytes_taken_ = 0;  // charges of ours: sent, and taken by the peer's user
    std::uint64_t inbox_bytes_ = 0, taken_bytes_ = 0, received_messages_ = 0;  // charges of the peer's
    std::deque<std::uint64_t> untaken_;                                        // their sizes, in order
    std::uint64_t taken_ahead_ = 0;  // bytes of the first of them that are taken
    std::vector<Bytes> inbox_;
    std::uint64_t queued_messages_ = 0;
    bool ack_due_ = false;

    Bytes outbox_;
    std::vector<TransferPtr> quiescing_, finished_;
    std::vector<MessagePtr> finished_messages_;
    std::vector<HoldPtr> finished_holds_;
};

}  // namespace kvt::protocol
