#include "backends/shm_copy.hpp"

#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include "backends/shm_channel.hpp"

#ifndef SO_PEERPIDFD  // since Linux 6.5
#define SO_PEERPIDFD 77
#endif

namespace kvt::backends {

namespace {

// Who connected, in whatever pid namespace. Older kernels give only its number, which may be another's by
// now: the nonce finds that out.
Fd pidfd_of(int socket, pid_t pid) {
    int fd = -1;
    socklen_t nbytes = sizeof fd;
    if (::getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &fd, &nbytes) == 0 && fd >= 0) {
        return Fd(fd);
    }
    if (pid == 0) {
        throw std::system_error(ESRCH, std::generic_category(),
                                "the peer is in a pid namespace of its own, before Linux 6.5");
    }
    fd = static_cast<int>(::syscall(SYS_pidfd_open, pid, 0));
    if (fd < 0) {
        throw std::system_error(errno, std::generic_category(), "pidfd_open");
    }
    return Fd(fd);
}

}  // namespace

PeerProcess PeerProcess::at_other_end(int socket) {
    const pid_t pid = same_user_pid(socket);
    return {pid, pidfd_of(socket, pid)};
}

bool PeerProcess::alive() const noexcept {
    pollfd ended{pidfd_.get(), POLLIN, 0};
    int n = 0;
    do {
        n = ::poll(&ended, 1, 0);
    } while (n < 0 && errno == EINTR);
    return n == 0;
}

std::error_code read_pieces(pid_t pid, const iovec* to, std::size_t to_count, const iovec* from,
                            std::size_t from_count, std::uint64_t nbytes) noexcept {
    if (pid == 0) {
        return std::make_error_code(std::errc::no_such_process);
    }
    const ssize_t n = ::process_vm_readv(pid, to, to_count, from, from_count, 0);
    if (n < 0) {
        return {errno, std::generic_category()};
    }
    if (static_cast<std::uint64_t>(n) != nbytes) {
        return {EFAULT, std::generic_category()};
    }
    return {};
}

}  // namespace kvt::backends
