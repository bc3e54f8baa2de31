// Blocking scatter/gather I/O between runs of memory and a socket: what a best-effort implementation with no
// protocol does. What lives here: sockets and loops over them. What doesn't: threads, timing, the choice of
// bytes.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "work.hpp"

namespace kvt_limits {

inline constexpr size_t kAckBytes = 64;
inline constexpr size_t kBatchBytes = 1 << 20;

// What a bare implementation may choose without privileges.
struct Tuning {
    int32_t buffer_nbytes = 0;  // 0: the kernel's default
    char congestion[16] = {};   // empty: the kernel's default. BBR paces, which costs a third on loopback
};

// A file descriptor, closed when it goes.
class Fd {
  public:
    explicit Fd(int fd = -1) : fd_(fd) {}
    Fd(Fd&& other) noexcept;
    Fd& operator=(Fd&& other) noexcept;
    ~Fd();
    int get() const { return fd_; }

  private:
    int fd_;
};

// Walks runs of one arena, handing out iovecs of at most kBatchBytes and IOV_MAX entries.
class Cursor {
  public:
    Cursor(std::byte* arena, const std::vector<Run>& runs);
    bool at_end() const { return run_ == runs_.size(); }
    // The next batch; stays the same until advance().
    int window(iovec* out, int capacity) const;
    void advance(size_t nbytes);

  private:
    std::byte* arena_;
    const std::vector<Run>& runs_;
    size_t run_ = 0;
    uint64_t within_ = 0;
};

Fd listen_loopback(uint16_t* port);
// Set before connect, so that the window scale fits; a listener hands it on to what it accepts.
void tune(int fd, const Tuning& tuning);
Fd accept_one(int listener);
Fd connect_loopback(uint16_t port, const Tuning& tuning);

void send_runs(int fd, std::byte* arena, const std::vector<Run>& runs);
void recv_runs(int fd, std::byte* arena, const std::vector<Run>& runs);
void send_all(int fd, const void* data, size_t nbytes);
void recv_all(int fd, void* data, size_t nbytes);

}  // namespace kvt_limits
