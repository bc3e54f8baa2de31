// Watches a peer's process on this host: a killed process's sockets may live on in a child of it, its pidfd
// doesn't.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>

#include "base/event_loop.hpp"
#include "base/fd.hpp"

namespace kvt::engine {

class Connection;
class Engine;

/// The reason that a connection is lost for, where the watch says so.
inline constexpr const char* kProcessEnded = "reset: the peer's process has ended";

class ProcessWatch final : public Pollable {
  public:
    /// Null where the kernel has no pidfd or the process is gone or not visible.
    static std::shared_ptr<ProcessWatch> open(pid_t pid, const std::shared_ptr<Connection>& connection);
    ProcessWatch(Fd fd, const std::shared_ptr<Connection>& connection);
    void on_events(std::uint32_t events) override;
    void failed(const std::exception& why) override;
    int fd() const noexcept { return fd_.get(); }

  private:
    Fd fd_;
    Engine& engine_;  // whose reactor calls this
    std::string reader_;
    std::weak_ptr<Connection> connection_;
};

}  // namespace kvt::engine
