// The transfer: its states, its complete transition table, and the record that a session keeps of it.
//
// Theory of operation. A transfer has two sides and each has one machine. The destination decides: it names
// what it wants, knows from its own WANT which bytes must come, and says DONE when every byte is in place and
// verified. The source succeeds only by that DONE. A side that must end early first stops its own loads or
// stores (`stopping`, `ending`: the engine answers with the event `quiesced`), then tells the other. The
// source's verdict is the destination's to give: after its own ABORT it waits in `verdict` for DONE, ABORT or
// ABORTED, so that "source succeeded, destination failed" can't happen and "source failed, destination
// sealed" is always reported as unknown. A destination that ended early keeps a tombstone
// (`draining`) until the source has said that it knows, and every chunk that it had begun has been drained
// into scratch; a chunk for anything else is the peer's error.
//
// Where the destination can reach the source's memory, the source may say LOCATED in the place of chunks: the
// destination then copies by itself, and may ask for what is missing AGAIN, by chunks, when that way breaks.
//
// Lives here: the table and the record. Does not live here: frames (frames.hpp), matching and scheduling
// (session.hpp). Invariant: a machine moves only by step(), and step() knows a row for every state and event.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <sys/uio.h>

#include "protocol/frames.hpp"
#include "protocol/gate.hpp"
#include "protocol/ranges.hpp"
#include "protocol/terms.hpp"

namespace kvt::protocol {

/// Nanoseconds of a monotonic clock; the caller's.
using Time = std::int64_t;
inline constexpr Time kNever = INT64_MAX;

enum class Role : std::uint8_t { source, destination };

enum class State : std::uint8_t {
    posted,    // waits for the other side
    matched,   // both are here; no byte moves yet
    moving,    // bytes move
    sent,      // source: every chunk has left; waits for DONE
    stopping,  // ended by this side; loads or stores still to be stopped, then the peer is told
    ending,    // ended by the peer, by loss, or before anybody knew; loads or stores still to be stopped
    verdict,   // source: told the destination; waits for what it says
    draining,  // destination: over for the user; late chunks go to scratch
    over,
};

enum class Event : std::uint8_t {
    match,        // source: a WANT fits. destination: an OFFER, GATED or chunk shows the source
    first_bytes,  // the first chunk begins
    all_bytes,    // source: the last chunk has left; the destination may copy all
    sealed,       // destination: all pieces verified
    done,         // source: DONE arrived
    stop,         // this side ends it: cancel, deadline, failed gate, mismatch, failed digest
    peer_ended,   // ABORT (or the ABORTED that answers ours) arrived
    quiesced,     // no load or store of this side will touch the transfer's memory any more
    drained,      // destination: every late chunk has been seen
    silent,       // source: the verdict didn't come in time
    lost,         // the session ended
    again,        // source: the destination can't copy what is left by itself: it comes by chunks
};

enum class Action : std::uint8_t {
    none,
    refuse_bug,    // the caller broke the machine's contract
    violation,     // the peer did
    quiesce,       // have the engine stop loads and stores
    finish_ok,     // one outcome: success
    finish,        // one outcome: what was noted when it began to end
    send_abort,    // quiesced: tell the peer; a destination that had sent WANT is also over for its user
    send_done,     // destination: success, and the source is told
    finish_drain,  // quiesced after the peer ended it: over for the user, answer ABORTED, keep the tombstone
};

struct Transition {
    Role role;
    State from;
    Event event;
    State to;
    Action action;
};

/// Every row, for the documents' diagrams and for the test that the table is complete.
std::span<const Transition> transition_table() noexcept;
const Transition& step(Role role, State from, Event event) noexcept;
const char* name_of(Role role) noexcept;
const char* name_of(State state) noexcept;
const char* name_of(Event event) noexcept;
const char* name_of(Action action) noexcept;

/// Which error the user sees; `ok` is success.
enum class Cause : std::uint8_t {
    ok,
    cancelled,          // TransferCancelled
    timeout_match,      // TransferTimeout, waiting_for match
    timeout_gate,       // ... gate
    timeout_bytes,      // ... bytes
    timeout_total,      // ... total
    peer_aborted,       // PeerAborted
    integrity,          // IntegrityError
    layout_mismatch,    // LayoutMismatch
    peer_lost,          // PeerLost
    connection_closed,  // ConnectionClosed
    protocol_error,     // RemoteProtocolError
    resource_limit,     // ResourceLimit
    grant_denied,       // PermissionDenied
    grant_stale,        // StaleGrant
};

enum class Delivered : std::uint8_t { no, unknown, yes };

struct Outcome {
    Cause cause = Cause::ok;
    Delivered delivered = Delivered::no;
    std::string reason;
    Mismatch mismatch;
};

/// One layer's part of the stream, and the pool's index of the layer.
struct LayerSpan {
    Range range;
    std::uint32_t layer = 0;
};

struct Limits {
    Time match = 0, stall = 0;
    Time total = kNever;  // durations
};

/// Memory of a source that is open to the peer for one transfer.
class Loan {
  public:
    virtual ~Loan() = default;
    /// Nothing that is read of it after this returns can be sealed. Any thread, any number of times.
    virtual void end() noexcept = 0;
};

/// A session's record of one side of a transfer. The engine derives its handle from it; all fields belong to
/// the session's lock.
class Transfer {
  public:
    virtual ~Transfer() = default;
    /// Memory of the stream from `begin`: fills `out`, returns the offset reached (at most `end`), `count` is
    /// the runs written.
    virtual std::uint64_t runs(std::uint64_t begin, std::uint64_t end, iovec* out, std::size_t most,
                               std::size_t& count) const = 0;
    /// The peer's stream has the layers in this order of ours; called once, before the first chunk.
    virtual void reorder(const std::vector<std::uint32_t>& positions) = 0;
    /// A source that has matched a destination which can copy: where it finds this stream, in the words of
    /// the path that both have. Nothing: by chunks.
    virtual std::optional<Bytes> locate() { return std::nullopt; }

    // What was posted.
    Role role{};
    std::string key, meta;
    PoolTerms const* pool = nullptr;  // outlives the transfer: the engine's handle owns it
    Terms terms;
    std::uint64_t nbytes = 0;
    std::size_t charge = 0;  // while it is outstanding, of the memory that we may take at the peer
    std::vector<LayerSpan> spans;
    std::shared_ptr<const Gate> gate;
    Limits limits;
    std::shared_ptr<const GrantUse> use;  // one-sided: the peer's grant that it goes by
    std::uint64_t one_sided = 0;          // its place among the session's one-sided ones
    /// Served by a grant of ours: turns true before the owner may rewrite what is read, or read what is
    /// written. Nothing that was read before this was looked at may be sealed.
    std::shared_ptr<const std::atomic<bool>> ended;

    // Where it stands.
    State state = State::posted;
    Outcome outcome;
    std::uint64_t id = 0;    // ours, from the time it is told: an offer's or a want's, ascending on the wire
    std::uint64_t want = 0;  // the id on the wire once matched: the destination's want id
    std::uint64_t partner = 0;    // destination: the offer that met it
    std::uint64_t offer_due = 0;  // destination: the offer that the source's chunks name; 0: none
    // Told, and the peer may keep it: a two-sided one until it has a partner, a one-sided one until it is
    // over. Counts against the peer's limit; of what is served here, against ours.
    bool outstanding = false;
    bool told = false;         // an OFFER (source) or WANT (destination) has gone out
    bool offer_seen = false;   // destination: an OFFER for it was read
    bool offer_known = false;  // destination: offer_due has been said
    bool pulls = false;        // the WANT said that the destination can copy
    bool located = false;      // the destination copies
    bool again_due = false;    // destination: can't go on copying; asks for chunks when the last copy is over
    bool gate_shut = false;    // source: nothing released is unsent. destination: the peer's GATED
    bool queued = false;       // source: stands in a ready queue
    bool peer_count_known = false;  // destination: the source has said how many chunks it began
    std::uint16_t attempt = 1;
    std::string peer_meta;
    Bytes location;                    // destination: what LOCATED said
    std::size_t location_charge = 0;   // of that, until the end
    std::shared_ptr<void> found;       // destination: what the path made of that
    std::shared_ptr<Loan> loan;        // source: what was opened for it
    RangeSet pending;                  // source: to be sent. destination: to be copied
    RangeSet asked;                    // source: what the WANT named and is behind a gate or pending
    RangeSet claimed;                  // destination: chunks begun
    RangeSet verified;                 // destination: chunks that verified
    RangeSet corrupt;                  // destination: chunks whose digest failed
    std::vector<bool> released;        // source: spans already moved from the gate to pending
    std::uint32_t active = 0;          // chunks that a mover holds
    std::uint64_t chunks = 0;          // frames, begun
    std::uint64_t copies = 0;          // begun by the destination; a source learns it from DONE
    std::uint64_t resumed_nbytes = 0;  // what had verified before the way was changed
    Time stall_reports = 0;            // destination: how often the source wants to hear of copies
    Time reported_at = 0;
    std::uint64_t asked_nbytes = 0;  // source: what the WANT named, in all
    std::uint64_t taken_nbytes = 0;  // source: in chunks that a mover has begun
    std::uint64_t sent_nbytes = 0;   // source: in chunks that have wholly left
    bool all_released = false;       // source: the gate, if any, holds nothing back any more
    std::uint64_t peer_chunks = 0;
    Time posted_at = 0, matched_at = 0, first_byte_at = 0, over_at = 0;
    Time waits_since = 0;           // for the peer or the gate
    std::atomic<Time> moved_at{0};  // last byte, for the stall clock; movers store it without the lock
    Time verdict_until = kNever;
    bool peer_ended = false;  // the peer's ABORT or ABORTED was read
    bool finished = false;    // the user has its outcome

    /// By a key both sides post; else by a grant of one of them.
    bool two_sided() const noexcept { return use == nullptr && ended == nullptr; }
    /// After the last byte of a chunk was read from a source: may it be sealed?
    bool still_granted() const noexcept {
        if (ended == nullptr) {
            return true;
        }
        std::atomic_thread_fence(std::memory_order_seq_cst);
        return !ended->load(std::memory_order_acquire);
    }
    bool moves_nothing() const noexcept { return nbytes == 0; }
    /// Source: every byte that was asked for is with the movers or beyond.
    bool all_taken() const noexcept { return taken_nbytes == asked_nbytes; }
    bool undecided() const noexcept {
        return state == State::posted || state == State::matched || state == State::moving ||
               state == State::sent;
    }
};

using TransferPtr = std::shared_ptr<Transfer>;

}  // namespace kvt::protocol
