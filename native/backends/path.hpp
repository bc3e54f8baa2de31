// The seam: what a backend does for one connection, and what it may ask of it.
//
// A Path moves the bytes between two memories: control frames as a byte stream, payload by lanes (the source
// writes chunks) or by copies (the destination fetches). It knows nothing of KV, layouts or messages.
// Promised to the engine: nothing here blocks except drive(); after quiesce(t) returns, no store to and no
// load from t's memory is made for t; close() shuts the sockets, and who is inside leaves at its next call.
// Not promised: any order between lanes, or between lanes and control.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <string>

#include "base/fd.hpp"
#include "memory/plan.hpp"
#include "memory/segments.hpp"
#include "protocol/lane.hpp"
#include "protocol/session.hpp"

namespace kvt::backends {

/// A pool's memory, for a path that tells the peer where it lies.
struct PoolMemory {
    const std::shared_ptr<const memory::PoolShape>& shape;
    std::uint64_t pool;
    const std::vector<memory::SharedSegment>& segments;  // that the pool's memory may lie in
    bool mapped;                                         // all of it does
};

struct SourceMemory {
    const memory::StreamPlan& plan;
    PoolMemory pool;
};

struct Located {
    protocol::Bytes location;
    std::shared_ptr<protocol::Loan> loan;
};

/// What a grant opens, for a path that shows it to the peer.
struct OpenGrant {
    const protocol::Token& token;
    PoolMemory pool;
    const std::vector<memory::Ids>* blocks;  // by group; null: every block
    bool counted;                            // it counts its readers
};

/// A grant that the peer may find by itself, until end().
class Publication : public protocol::Loan {
  public:
    /// Nothing where it has ended before, or finds no room: then the peer asks.
    virtual void publish(const OpenGrant& grant) = 0;
    /// By which the peer knows what it was shown from what else had or will have its token; 0: it wasn't
    /// shown.
    virtual std::uint64_t mark() const = 0;
};

enum class Copied {
    good,
    stale,  // what was read may not be what was offered or granted
    broke,  // there is no way to that memory any more
};

/// How a grant stands that was found.
enum class Standing {
    good,
    ended,       // its blocks may have been rewritten
    owner_gone,  // the process has ended
};

/// A grant of the peer's that was found so. Its owner may be lying: of what it says only `shape` is checked.
struct FoundGrant {
    virtual ~FoundGrant() = default;
    std::shared_ptr<const memory::PoolShape> shape;  // of its pool, at addresses that copy() knows
    std::shared_ptr<const protocol::PoolTerms> terms;
    bool every_block = false;  // then `blocks` is empty
    bool counted = false;
    std::uint64_t mark = 0;            // see Publication
    bool mapped = false;               // the shape's addresses can be read here, for as long as this lives
    std::vector<memory::Ids> blocks;   // by group
    std::uint64_t at_once_nbytes = 0;  // that a thread which waits for nothing else may copy by itself
    /// Copies `from`, a stream of the grant's, to `to`, in the calling thread; while its path lives.
    virtual Copied copy(const memory::StreamPlan& from, const memory::StreamPlan& to) const = 0;
    /// Of what this thread has read of the blocks until now; at any time.
    virtual Standing standing() const = 0;
};

/// The engine's side of the seam. Every member takes the session's lock itself; none may be called with a
/// path's lock held that quiesce() takes, except those of LaneHost.
class PathHost : public protocol::LaneHost {
  public:
    /// Acts on the session's output: writes control, quiesces, completes, kicks. Call it after anything
    /// changed.
    virtual void settle() = 0;
    /// Moves the session's outgoing control bytes to the end of `out`; false if there were none.
    virtual bool take_control(protocol::Bytes& out) = 0;
    /// One verified control frame. Throws protocol::Violation or Excess.
    virtual void receive(const protocol::Header& header, std::span<const std::byte> body) = 0;
    /// A chunk that came inline: header, payload and trailer.
    virtual void receive_inline(const protocol::Header& header, std::span<const std::byte> payload,
                                const protocol::Trailer& trailer) = 0;
    virtual std::optional<protocol::ChunkJob> next_chunk() = 0;
    virtual std::optional<protocol::ChunkTarget> next_copy() = 0;
    virtual bool has_payload() = 0;
    virtual bool has_copies() = 0;
    virtual void heard() noexcept = 0;
    virtual void spoke() noexcept = 0;
    virtual void lose(protocol::Cause cause, const std::string& reason) = 0;
    /// Something here can't go on, for want of memory or of what the system gives: so ends the connection.
    void give_up(const std::exception& why) {
        lose(protocol::Cause::resource_limit, std::string("here: ") + why.what());
    }
    /// A lane's socket ended. The peer's last words on control say why, if it had any.
    virtual void lane_broke(const std::string& reason) = 0;
    virtual bool is_lost() const noexcept = 0;
    /// Whether next_copy() is for this path: its way to the peer's memory has come up, or broken.
    virtual void can_copy(bool can) = 0;
    /// In the place of chunk_end(), for a copy: the way to the peer's memory is broken.
    virtual void copy_broke(const protocol::ChunkTarget& target) = 0;

    /// For threads of others (the peer's in this process, one that marks a gate): while one is in, this
    /// side's engine stays. False when the connection has ended, and the engine may be gone.
    virtual bool enter() noexcept = 0;
    virtual void leave() noexcept = 0;
    class Visit {
      public:
        explicit Visit(PathHost& host) : host_(host), in_(host.enter()) {}
        ~Visit() {
            if (in_) {
                host_.leave();
            }
        }
        Visit(const Visit&) = delete;
        Visit& operator=(const Visit&) = delete;
        explicit operator bool() const noexcept { return in_; }

      private:
        PathHost& host_;
        const bool in_;
    };

    // For backends where the destination copies within this process: the source's record, held while its
    // memory is read.
    /// Null when the source has ended.
    virtual protocol::TransferPtr lend(std::uint64_t want) = 0;
    virtual void returned(const protocol::TransferPtr& transfer) = 0;
    /// Blocks until no copy of this transfer runs (each lasts a chunk).
    virtual void wait_inactive(const protocol::TransferPtr& transfer) = 0;
};

class Path {
  public:
    virtual ~Path() = default;
    virtual const char* name() const noexcept = 0;
    /// As results show it, where the destination copied.
    virtual const char* name_of_copies() const noexcept { return name(); }
    /// Where the peer finds a source's stream, if it can copy it by itself; see protocol::Transfer::locate().
    /// Under the session's lock: it takes no lock of a host's and doesn't block.
    virtual std::optional<Located> locate(const SourceMemory&) { return std::nullopt; }
    /// For a grant that is to be shown to the peer. Null: the peer asks. Takes no lock of a host's.
    virtual std::shared_ptr<Publication> publication() { return nullptr; }
    /// A grant that the peer shows to us; null: ask it. Throws protocol::Violation.
    virtual std::shared_ptr<const FoundGrant> find_grant(const protocol::Token&) { return nullptr; }
    /// The pool is closed: nothing of it is told any more.
    virtual void forget_pool(std::uint64_t) {}

    /// Sockets that join later. Lanes: takes the number for one that is about to join; false if it isn't one
    /// of ours or was used.
    virtual bool reserve_lane(std::uint32_t) { return false; }
    /// The lane has not come about: its number may be taken again.
    virtual void give_back_lane(std::uint32_t) {}
    virtual void add_lane(Fd, std::uint32_t) {}
    virtual unsigned lanes_up() const { return 0; }
    /// The channel by which memory is shared.
    enum class Channel { none, awaited, up };
    virtual bool wants_channel() const { return false; }
    virtual void add_channel(Fd) {}
    virtual Channel channel() const { return Channel::none; }
    virtual std::string channel_refusal() const { return {}; }
    /// It won't come.
    virtual void refuse_channel(const std::string&) {}

    /// Writes what take_control() gives, as far as it goes without blocking.
    virtual void flush_control() = 0;
    /// Payload may be ready. `small_nbytes` > 0: the caller has just posted a transfer of that many bytes and
    /// nothing else is queued, so that it may as well write it itself.
    virtual void kick(std::uint64_t small_nbytes) = 0;
    virtual void quiesce(const protocol::TransferPtr& transfer) = 0;
    /// The calling thread does the control stream's work until `stop` says so, `until`, or `wake_fd` is
    /// readable. False at once when another thread does it already, and when the stream has ended.
    class StopCondition {
      public:
        virtual ~StopCondition() = default;
        virtual bool operator()() const noexcept = 0;
    };
    virtual bool drive(const StopCondition& stop, int wake_fd, std::int64_t until) = 0;
    /// Reads what has arrived on control, for a last word of a peer that went.
    virtual void read_last_words() = 0;
    virtual void close() = 0;
};

}  // namespace kvt::backends
