#include "wire.hpp"

#include <arpa/inet.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace kvt_limits {
namespace {

constexpr int kTimeoutSeconds = 60;  // no wait of a bench is endless

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

sockaddr_in loopback(uint16_t port) {
    sockaddr_in addr{};
    addr.sin_family = AF_INET;
    addr.sin_port = htons(port);
    addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return addr;
}

void set_common(int fd) {
    const int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    const timeval limit{kTimeoutSeconds, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

size_t checked(ssize_t n, const char* what) {
    if (n < 0) fail(what);
    if (n == 0) throw std::runtime_error("the other end closed its socket");
    return static_cast<size_t>(n);
}

}  // namespace

Fd::Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

Fd& Fd::operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
}

Fd::~Fd() {
    if (fd_ >= 0) close(fd_);
}

Cursor::Cursor(std::byte* arena, const std::vector<Run>& runs) : arena_(arena), runs_(runs) {}

int Cursor::window(iovec* out, int capacity) const {
    int count = 0;
    size_t total = 0;
    uint64_t skip = within_;
    for (size_t i = run_; i < runs_.size() && count < capacity && total < kBatchBytes; ++i) {
        const uint64_t len = std::min<uint64_t>(runs_[i].len - skip, kBatchBytes - total);
        out[count++] = {arena_ + runs_[i].off + skip, len};
        total += len;
        skip = 0;
    }
    return count;
}

void Cursor::advance(size_t nbytes) {
    while (nbytes > 0) {
        const uint64_t left = runs_[run_].len - within_;
        if (nbytes < left) {
            within_ += nbytes;
            return;
        }
        nbytes -= left;
        within_ = 0;
        ++run_;
    }
}

Fd listen_loopback(uint16_t* port) {
    Fd fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in addr = loopback(0);
    if (bind(fd.get(), reinterpret_cast<sockaddr*>(&addr), sizeof addr) != 0) fail("bind");
    if (listen(fd.get(), 16) != 0) fail("listen");
    socklen_t size = sizeof addr;
    if (getsockname(fd.get(), reinterpret_cast<sockaddr*>(&addr), &size) != 0) fail("getsockname");
    *port = ntohs(addr.sin_port);
    set_common(fd.get());
    return fd;
}

void tune(int fd, const Tuning& tuning) {
    if (tuning.congestion[0] != 0) {
        const auto size = static_cast<socklen_t>(std::strlen(tuning.congestion));
        if (setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, tuning.congestion, size) != 0) fail("TCP_CONGESTION");
    }
    if (tuning.buffer_nbytes == 0) return;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &tuning.buffer_nbytes, sizeof tuning.buffer_nbytes);
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &tuning.buffer_nbytes, sizeof tuning.buffer_nbytes);
}

Fd accept_one(int listener) {
    Fd fd(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
    if (fd.get() < 0) fail("accept");
    set_common(fd.get());
    return fd;
}

Fd connect_loopback(uint16_t port, const Tuning& tuning) {
    Fd fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    set_common(fd.get());
    tune(fd.get(), tuning);
    sockaddr_in addr = loopback(port);
    if (connect(fd.get(), reinterpret_cast<sockaddr*>(&addr), sizeof addr) != 0) fail("connect");
    return fd;
}

void send_runs(int fd, std::byte* arena, const std::vector<Run>& runs) {
    iovec batch[IOV_MAX];
    for (Cursor cursor(arena, runs); !cursor.at_end();) {
        const int count = cursor.window(batch, IOV_MAX);
        cursor.advance(checked(writev(fd, batch, count), "writev"));
    }
}

void recv_runs(int fd, std::byte* arena, const std::vector<Run>& runs) {
    iovec batch[IOV_MAX];
    for (Cursor cursor(arena, runs); !cursor.at_end();) {
        const int count = cursor.window(batch, IOV_MAX);
        cursor.advance(checked(readv(fd, batch, count), "readv"));
    }
}

void send_all(int fd, const void* data, size_t nbytes) {
    const auto* at = static_cast<const std::byte*>(data);
    for (size_t done = 0; done < nbytes;) {
        done += checked(send(fd, at + done, nbytes - done, MSG_NOSIGNAL), "send");
    }
}

void recv_all(int fd, void* data, size_t nbytes) {
    auto* at = static_cast<std::byte*>(data);
    for (size_t done = 0; done < nbytes;) done += checked(recv(fd, at + done, nbytes - done, 0), "recv");
}

}  // namespace kvt_limits
