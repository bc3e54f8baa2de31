// A lane's byte stream: CHUNK frames, one behind the other, straight between socket and blocks.
//
// Lives here: where the next bytes of a lane come from and go to, sans I/O. Does not live here: the socket
// (backends/tcp), which chunk is next (session). Invariants: the reader stores payload only for a header that
// has verified and a session that said so; after retarget() or abandon() no byte of the transfer's memory is
// stored to or read from again, while the stream stays in step (the rest goes to scratch, or comes as padding
// under a trailer that says ABORTED).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include <sys/uio.h>

#include "protocol/frames.hpp"
#include "protocol/session.hpp"

namespace kvt::protocol {

/// What a lane asks of the session; the engine's implementation takes the session's lock.
class LaneHost {
  public:
    virtual ~LaneHost() = default;
    virtual ChunkTarget chunk_begin(const Header& header) = 0;
    virtual void chunk_end(const ChunkTarget& target, const Trailer& trailer, bool verified) = 0;
    virtual void chunk_left(const ChunkJob& job, bool whole, bool begun) = 0;
};

/// Memory that a mover lends its lanes: drained bytes go there; small runs are gathered and scattered through
/// it.
struct Staging {
    std::byte* scratch = nullptr;
    std::size_t scratch_nbytes = 0;
    std::byte* ring = nullptr;  // of ring_nbytes; used only between two calls of one lane's turn
    std::size_t ring_nbytes = 0;
};

class LaneWriter {
  public:
    LaneWriter(LaneHost& host, DigestKind digest) : host_(host), digest_kind_(digest) {}

    bool idle() const noexcept { return !job_; }
    void start(ChunkJob job);
    /// The next bytes to write, at most `most_nbytes` of payload. Digests are made here, just before the
    /// bytes leave.
    std::size_t gather(iovec* out, std::size_t most, std::size_t most_nbytes, const Staging& staging);
    /// `n` bytes of the last gather() have been written. True when the chunk is complete (the host has been
    /// told).
    bool wrote(std::size_t n);
    /// Whether the chunk being written reads this transfer's memory.
    bool uses(const Transfer* transfer) const noexcept {
        return job_ && !abandoned_ && job_->transfer.get() == transfer;
    }
    void abandon();

  private:
    std::size_t payload(iovec* out, std::size_t most, std::size_t most_nbytes, const Staging& staging);
    void digest(const iovec* runs, std::size_t count, std::uint64_t offset);
    std::uint64_t body_nbytes() const noexcept { return job_->header.body_nbytes; }

    LaneHost& host_;
    DigestKind digest_kind_;
    std::optional<ChunkJob> job_;
    bool abandoned_ = false;
    bool stale_ = false;  // its grant had ended when the last byte was read
    std::array<std::byte, kHeaderNbytes> header_{};
    std::array<std::byte, kTrailerNbytes> trailer_{};
    std::uint64_t out_ = 0;       // bytes of header, body and trailer that have been written
    std::uint64_t digested_ = 0;  // bytes of the body that are in digest_
    std::uint32_t digest_ = 0;
};

class LaneReader {
  public:
    LaneReader(LaneHost& host, DigestKind digest) : host_(host), digest_kind_(digest) {}

    /// Where the next bytes of the lane go. `out` must be handed to got() unchanged.
    std::size_t want(iovec* out, std::size_t most, std::size_t most_nbytes, const Staging& staging);
    /// `n` bytes were stored there. Throws Violation.
    void got(const iovec* stored, std::size_t count, std::size_t n);
    bool uses(const Transfer* transfer) const noexcept {
        return in_chunk_ && target_.store && target_.transfer.get() == transfer;
    }
    void retarget() noexcept { target_.store = false; }
    bool in_chunk() const noexcept { return in_chunk_; }
    Transfer* transfer() const noexcept { return in_chunk_ ? target_.transfer.get() : nullptr; }

  private:
    void finish_header();
    void finish_trailer();
    std::uint32_t digest_in_place() const;
    void land(const iovec& run, std::size_t n);

    LaneHost& host_;
    DigestKind digest_kind_;
    bool in_chunk_ = false;
    ChunkTarget target_;
    Header chunk_{};
    std::array<std::byte, kHeaderNbytes> header_{};
    std::array<std::byte, kTrailerNbytes> trailer_{};
    std::size_t header_have_ = 0, trailer_have_ = 0;
    std::uint64_t body_have_ = 0;
    bool staged_ = false;  // the last want() pointed into the ring
};

}  // namespace kvt::protocol
