// A mover: an event loop with the memory that it lends its lanes. Payload moves on these threads.
#pragma once

#include <memory>

#include "base/event_loop.hpp"
#include "protocol/lane.hpp"

namespace kvt::backends {

class Mover final : public EventLoop {
  public:
    explicit Mover(int cpu) : EventLoop("kvt-mover", cpu) {}

    /// On this loop's thread only. Made at first use: an endpoint that moves nothing holds none. 256 KiB stay
    /// in the second-level cache between the copy and the system call.
    protocol::Staging staging() {
        constexpr std::size_t kNbytes = 256u << 10;
        if (!scratch_) {
            scratch_ = std::make_unique_for_overwrite<std::byte[]>(kNbytes);
            ring_ = std::make_unique_for_overwrite<std::byte[]>(kNbytes);
        }
        return {scratch_.get(), kNbytes, ring_.get(), kNbytes};
    }

  private:
    std::unique_ptr<std::byte[]> scratch_, ring_;
};

}  // namespace kvt::backends
