// Reading memory of another process that isn't shared: process_vm_readv.
//
// Lives here: the calls, and the process that they name. Not here: whose process it is (shm_channel.hpp), and
// whether what was read is good: a pid may by now be another process's, so alive() is asked after a copy, and
// a nonce proves the address space before the first. Invariant: nothing is said to be read unless every byte
// of it was.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <system_error>

#include "base/fd.hpp"

namespace kvt::backends {

/// A process of this host, by a descriptor that never means another one.
class PeerProcess {
  public:
    /// Of the one at the other end of a unix socket, which runs as our user. Throws protocol::Violation
    /// (another user), std::system_error (it has gone, or the kernel has no pidfds, or none of processes in
    /// other pid namespaces).
    static PeerProcess at_other_end(int socket);

    pid_t pid() const noexcept { return pid_; }  // 0: it is in another pid namespace, and has none here
    int pidfd() const noexcept { return pidfd_.get(); }  // readable when it has ended
    bool alive() const noexcept;

  private:
    PeerProcess(pid_t pid, Fd pidfd) noexcept : pid_(pid), pidfd_(std::move(pidfd)) {}
    pid_t pid_;
    Fd pidfd_;
};

inline constexpr std::size_t kPiecesPerRead = 1024;  // UIO_MAXIOV

/// What a call reads at most: it can't be stopped in the middle, nor read more than 2 GiB.
inline constexpr std::uint64_t kReadAtOnce = std::uint64_t{64} << 20;

/// One call. `nbytes` in all, on each side. EPERM: the kernel forbids it; ESRCH: it has gone, or `pid` is 0;
/// EFAULT: not all of it could be read.
std::error_code read_pieces(pid_t pid, const iovec* to, std::size_t to_count, const iovec* from,
                            std::size_t from_count, std::uint64_t nbytes) noexcept;

/// Reads [begin, end) of the stream: `source` has addresses of process `pid`, `destination` ours; both have
/// runs() as memory::StreamPlan has it. The first error, as read_pieces() says it.
template <class Source, class Destination>
std::error_code read_runs(pid_t pid, const Source& source, const Destination& destination,
                          std::uint64_t begin, std::uint64_t end) {
    iovec from[kPiecesPerRead], to[kPiecesPerRead];
    while (begin < end) {
        std::size_t from_count = 0, to_count = 0;
        const std::uint64_t most = std::min(end, begin + kReadAtOnce);
        std::uint64_t stop = source.runs(begin, most, from, kPiecesPerRead, from_count);
        const std::uint64_t room = destination.runs(begin, stop, to, kPiecesPerRead, to_count);
        if (room < stop) {
            stop = source.runs(begin, room, from, kPiecesPerRead, from_count);
        }
        if (stop == begin) {
            throw std::out_of_range("a range beyond the stream's end");
        }
        if (const auto error = read_pieces(pid, to, to_count, from, from_count, stop - begin)) {
            return error;
        }
        begin = stop;
    }
    return {};
}

}  // namespace kvt::backends
