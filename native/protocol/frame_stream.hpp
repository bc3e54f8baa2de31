// The control stream: bytes in as they come, whole frames out.
//
// Lives here: where the next bytes go, when a frame is whole, how much is held for it. Does not live here:
// the socket (backends/tcp), what a frame does (session). Invariants: a header is checked the moment that it
// is whole, before its body is waited for and before its length decides anything; what is held is bounded by
// the longest frame; a frame comes out the same however its bytes were cut, and no frame comes out behind
// bytes that broke the rules.
#pragma once

#include <cstddef>
#include <optional>
#include <span>

#include "protocol/frames.hpp"

namespace kvt::protocol {

/// A whole frame of the control stream; the body lies in the reader that gave it.
struct ControlFrame {
    Header header;
    std::span<const std::byte> body;
    std::optional<Trailer> trailer;  // of a CHUNK, and of nothing else
};

class FrameReader {
  public:
    /// What room() has to offer at least.
    static constexpr std::size_t kRoomNbytes = 32u << 10;
    /// What is held at most.
    static constexpr std::size_t kMostNbytes = kHeaderNbytes + kMaxControlBodyNbytes + kRoomNbytes;

    /// Where the next bytes of the stream go: kRoomNbytes or more, if next() has been asked until it had
    /// nothing.
    std::span<std::byte> room();
    /// `n` bytes were stored there.
    void got(std::size_t n) noexcept { end_ += n; }
    /// The next frame, if it is whole; it is good until the next call of room() or next(). Throws Violation,
    /// then and whenever it is asked again.
    std::optional<ControlFrame> next();
    /// Whether the stream stands between two frames.
    bool empty() const noexcept { return begin_ == end_; }

  private:
    Bytes buffer_;
    std::size_t begin_ = 0, end_ = 0;           // what has come and isn't handed out
    std::size_t front_nbytes_ = kHeaderNbytes;  // of the frame at begin_, as far as is known
};

}  // namespace kvt::protocol
