// A lane: scatter/gather I/O between one socket and the blocks, on its mover's thread.
#include <sys/epoll.h>
#include <sys/socket.h>

#include <cerrno>
#include <climits>
#include <cstring>
#include <new>
#include <system_error>
#include <utility>

#include "backends/tcp.hpp"
#include "base/clock.hpp"

namespace kvt::backends {

using protocol::Cause;

namespace {

constexpr std::size_t kIov = 1024;  // IOV_MAX
// What a turn may move before the lane's neighbours and the other direction get theirs.
constexpr std::size_t kTurnNbytes = 1u << 20;

// With digests a piece of I/O must still be in the second-level cache when it is sent or digested.
std::size_t io_nbytes_for(protocol::DigestKind digest) {
    return digest == protocol::DigestKind::none ? 1u << 20 : 512u << 10;
}

}  // namespace

TcpLane::TcpLane(PathHost& host, std::shared_ptr<void> keep_host, Mover& mover, Fd fd,
                 protocol::DigestKind digest)
    : host_(host),
      keep_host_(std::move(keep_host)),
      mover_(mover),
      fd_(std::move(fd)),
      io_nbytes_(io_nbytes_for(digest)),
      reader_(*this, digest),
      writer_(*this, digest) {}

void TcpLane::start() {
    if (const auto refused = mover_.add(fd_.get(), EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
                                        shared_from_this())) {
        failed(std::system_error(refused, "a lane can't be watched"));
        return;
    }
    if (closed_.load()) {
        mover_.remove(fd_.get());  // close() may have looked before
    }
}

void TcpLane::kick() { mover_.enqueue(shared_from_this()); }

void TcpLane::on_events(std::uint32_t events) {
    if ((events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) {
        ended_.store(true);  // no edge comes behind this one
    }
    if ((events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) {
        readable_.store(true);
    }
    if ((events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) != 0) {
        writable_.store(true);
    }
    if (run()) {
        kick();
    }
}

bool TcpLane::run() {
    const auto host = keep_host_.lock();
    if (!host || closed_.load()) {
        return false;
    }
    const Turn read = read_turn();  // first: two sides that send at once would wait for each other
    if (read == Turn::dead) {
        return false;
    }
    const Turn write = write_turn(mover_.staging(), kTurnNbytes, false);
    if (dirty_.exchange(false)) {
        host_.settle();
    }
    return read == Turn::more || write == Turn::more;
}

void TcpLane::chunk_end(const protocol::ChunkTarget& target, const protocol::Trailer& trailer,
                        bool verified) {
    dirty_.store(true, std::memory_order_relaxed);
    host_.chunk_end(target, trailer, verified);
}

void TcpLane::chunk_left(const protocol::ChunkJob& job, bool whole, bool begun) {
    dirty_.store(true, std::memory_order_relaxed);
    host_.chunk_left(job, whole, begun);
}

// One system call.
std::size_t TcpLane::read_once(iovec* iov, std::optional<Broken>& broken) {
    const std::lock_guard lock(rx_mutex_);
    msghdr message{};
    message.msg_iov = iov;
    message.msg_iovlen = reader_.want(iov, kIov, io_nbytes_, mover_.staging());
    std::size_t asked = 0;
    for (std::size_t i = 0; i < message.msg_iovlen; ++i) {
        asked += iov[i].iov_len;
    }
    const auto n = ::recvmsg(fd_.get(), &message, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        readable_.store(errno == EINTR);
        return 0;
    }
    if (n <= 0) {
        const char* const why = n == 0 ? "a lane's other end was closed" : std::strerror(errno);
        broken = {Cause::peer_lost, std::string("reset: ") + why};
        return 0;
    }
    host_.heard();
    if (static_cast<std::size_t>(n) < asked && !ended_.load()) {
        readable_.store(false);  // edge-triggered: whatever comes later is a new edge
    }
    if (protocol::Transfer* transfer = reader_.transfer()) {
        transfer->moved_at.store(monotonic_ns(), std::memory_order_relaxed);
    }
    take(iov, message.msg_iovlen, static_cast<std::size_t>(n), broken);
    return static_cast<std::size_t>(n);
}

void TcpLane::take(const iovec* iov, std::size_t count, std::size_t nbytes, std::optional<Broken>& broken) {
    try {
        reader_.got(iov, count, nbytes);
    } catch (const protocol::Violation& violation) {
        broken = {Cause::protocol_error, violation.what()};
    } catch (const protocol::Excess& excess) {
        broken = {Cause::resource_limit, excess.what()};
    }
}

TcpLane::Turn TcpLane::read_turn() {
    std::size_t moved = 0;
    iovec iov[kIov];
    while (readable_.load() && moved < kTurnNbytes) {
        std::optional<Broken> broken;
        moved += read_once(iov, broken);
        if (broken) {
            broke(*broken);
            return Turn::dead;
        }
        if (dirty_.exchange(false)) {
            host_.settle();
        }
    }
    return readable_.load() ? Turn::more : Turn::idle;
}

// Under tx_mutex_. False when there is nothing to write.
bool TcpLane::start_next() {
    auto job = host_.next_chunk();
    if (!job) {
        return false;
    }
    job->transfer->moved_at.store(monotonic_ns(), std::memory_order_relaxed);
    writer_.start(std::move(*job));
    return true;
}

// The socket is full, or broken: then the reading side says so. The mover's thread takes the edge that ends
// it, so there it can't come between the call and this store; elsewhere it can: look once more before waiting
// for it.
bool TcpLane::wait_for_room(bool& full) {
    if (!mover_.on_this_thread() && std::exchange(full, true)) {
        return true;
    }
    writable_.store(false);
    return mover_.on_this_thread();
}

TcpLane::Turn TcpLane::write_turn(const protocol::Staging& staging, std::size_t budget, bool one_chunk) {
    const std::lock_guard lock(tx_mutex_);
    iovec iov[kIov];
    std::size_t moved = 0;
    bool full = false;
    while ((full || writable_.load()) && moved < budget) {
        if (writer_.idle() && ((one_chunk && moved > 0) || !start_next())) {
            return Turn::idle;
        }
        msghdr message{};
        message.msg_iov = iov;
        message.msg_iovlen = writer_.gather(iov, kIov, io_nbytes_, staging);
        const auto n = ::sendmsg(fd_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            if (wait_for_room(full)) {
                return Turn::idle;
            }
            continue;
        }
        if (std::exchange(full, false)) {
            writable_.store(true);
        }
        moved += static_cast<std::size_t>(n);
        host_.spoke();
        writer_.wrote(static_cast<std::size_t>(n));
    }
    return writable_.load() ? Turn::more : Turn::idle;
}

bool TcpLane::write_from_here() {
    if (!tx_mutex_.try_lock()) {
        return false;
    }
    const bool free = writer_.idle() && writable_.load();
    tx_mutex_.unlock();
    if (!free) {
        return false;
    }
    try {
        write_turn({}, kTurnNbytes, true);
    } catch (const std::exception& why) {
        failed(why);  // the connection ends, and with it the transfer; the post was made
        return true;
    }
    const std::lock_guard lock(tx_mutex_);
    if (!writer_.idle()) {
        kick();  // the socket was full: the mover goes on
    }
    return true;
}

void TcpLane::broke(const Broken& how) {
    closed_.store(true);
    mover_.remove(fd_.get());
    if (how.cause == Cause::peer_lost) {
        host_.lane_broke(how.reason);
    } else {
        host_.lose(how.cause, how.reason);
    }
}

void TcpLane::failed(const std::exception& why) {
    closed_.store(true);
    mover_.remove(fd_.get());
    if (const auto host = keep_host_.lock()) {
        host_.give_up(why);
    }
}

void TcpLane::quiesce(const protocol::Transfer* transfer) {
    {
        const std::lock_guard lock(rx_mutex_);
        if (reader_.uses(transfer)) {
            reader_.retarget();
        }
    }
    bool padding = false;
    {
        const std::lock_guard lock(tx_mutex_);
        if (writer_.uses(transfer)) {
            writer_.abandon();
            padding = true;
        }
    }
    if (padding && !closed_.load()) {
        kick();
    }
}

void TcpLane::close() {
    if (!closed_.exchange(true)) {
        mover_.remove(fd_.get());
    }
    ::shutdown(fd_.get(), SHUT_RDWR);
}

}  // namespace kvt::backends
