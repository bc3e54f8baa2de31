// Owned file descriptors that a forked child closes.
//
// Lives here: ownership and the registry behind pthread_atfork. Invariant: every descriptor of an engine is
// held by an Fd, so that a child of fork() holds none of them: its sockets would keep a dead parent's
// connections alive.
#pragma once

#include <cstdint>
#include <utility>

namespace kvt {

class Fd {
  public:
    Fd() noexcept = default;
    /// Closes it where it can't be kept.
    explicit Fd(int fd);
    Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Fd& operator=(Fd&& other) noexcept {
        if (this != &other) {
            reset();
            fd_ = std::exchange(other.fd_, -1);
        }
        return *this;
    }
    ~Fd() { reset(); }

    int get() const noexcept { return fd_; }
    explicit operator bool() const noexcept { return fd_ >= 0; }
    void reset() noexcept;
    /// Gives the descriptor away: the caller closes it.
    int release() noexcept;

  private:
    int fd_ = -1;
};

/// A non-blocking one. Throws system_error.
Fd make_eventfd();

/// Counts the forks that this process is a child of; an engine made under another number is not ours to
/// touch.
std::uint64_t fork_generation() noexcept;

}  // namespace kvt
