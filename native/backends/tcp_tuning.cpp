#include "backends/tcp_tuning.hpp"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <fstream>

namespace kvt::backends {

namespace {

// The kernel doubles what is set. A send buffer that holds a chunk lets each side work for a chunk's time
// before it must make room for the other: 1.08 times the bandwidth of 4 KiB pieces over the system's sizing.
// A receive buffer that needn't grow first spares a new connection stalls of a delayed ACK (35 ms each) in
// its first dozens of MiB.
constexpr int kLoopbackSendNbytes = 1 << 20;
constexpr int kLoopbackReceiveNbytes = 2 << 20;

bool on_loopback(int fd) {
    sockaddr_storage peer{};
    socklen_t length = sizeof peer;
    if (::getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &length) != 0) {
        return false;
    }
    if (peer.ss_family == AF_INET) {
        const auto& v4 = reinterpret_cast<const sockaddr_in&>(peer);
        return (ntohl(v4.sin_addr.s_addr) >> 24) == 127;
    }
    return peer.ss_family == AF_INET6 &&
           IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6&>(peer).sin6_addr) != 0;
}

// A larger buffer than this would be cut to it, and the kernel would no longer size the buffer itself: worse
// than not to ask. 0 where it can't be read.
int limit_of(const char* path) {
    int limit = 0;
    std::ifstream(path) >> limit;
    return limit;
}

void set_buffer(int fd, int option, int nbytes) {
    ::setsockopt(fd, SOL_SOCKET, option, &nbytes, sizeof nbytes);
}

void set_loopback_buffers(int fd) {
    static const int send_limit = limit_of("/proc/sys/net/core/wmem_max");
    static const int receive_limit = limit_of("/proc/sys/net/core/rmem_max");
    if (send_limit >= kLoopbackSendNbytes) {
        set_buffer(fd, SO_SNDBUF, kLoopbackSendNbytes);
    }
    if (receive_limit >= kLoopbackReceiveNbytes) {
        set_buffer(fd, SO_RCVBUF, kLoopbackReceiveNbytes);
    }
}

}  // namespace

void tune_control(int fd) {
    const int one = 1;
    // Fails on unix sockets, which have no such delay.
    ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (on_loopback(fd)) {
        // Where BBR is the system's choice it paces even loopback: 0.27 to 0.70 of the raw limit, and CPU per
        // GB from 1.75 to 1.08 of it. Any user may choose reno; between hosts the system's choice stands.
        ::setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
    }
}

void tune_lane(int fd, int buffer_nbytes) {
    tune_control(fd);
    // Joining was a conversation, and the kernel delays the ACKs of conversations: up to 40 ms each in the
    // first transfers. From here on a lane is a stream.
    const int one = 1;
    ::setsockopt(fd, IPPROTO_TCP, TCP_QUICKACK, &one, sizeof one);
    if (buffer_nbytes > 0) {
        set_buffer(fd, SO_SNDBUF, buffer_nbytes);
        set_buffer(fd, SO_RCVBUF, buffer_nbytes);
    } else if (on_loopback(fd)) {
        set_loopback_buffers(fd);
    }
}

}  // namespace kvt::backends
