// The control stream: many small frames, read and written by whichever thread is there first.
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <new>
#include <system_error>

#include "backends/tcp.hpp"
#include "base/clock.hpp"

namespace kvt::backends {

using protocol::Cause;

namespace {

std::string reset_reason(int error) {
    return std::string("reset: ") + (error == 0 ? "the peer's end was closed" : std::strerror(error));
}

}  // namespace

TcpControl::TcpControl(PathHost& host, std::shared_ptr<void> keep_host, EventLoop& reactor, Fd fd)
    : host_(host), keep_host_(std::move(keep_host)), reactor_(reactor), fd_(std::move(fd)) {}

// A socket that is registered after close() would stay so, and readable for ever.
void TcpControl::start() {
    std::error_code refused;
    {
        const std::lock_guard lock(interest_mutex_);
        if (!closed_) {
            refused = reactor_.add(fd_.get(), EPOLLIN, shared_from_this());
        }
    }
    if (refused) {
        host_.give_up(std::system_error(refused, "the control stream can't be watched"));
    }
}

void TcpControl::set_interest() {
    const std::lock_guard lock(interest_mutex_);
    if (!closed_) {
        reactor_.modify(fd_.get(), (driven_ ? 0u : static_cast<unsigned>(EPOLLIN)) |
                                       (blocked_ ? static_cast<unsigned>(EPOLLOUT) : 0u));
    }
}

void TcpControl::on_events(std::uint32_t events) {
    const auto host = keep_host_.lock();
    if (!host) {
        return;
    }
    if ((events & EPOLLOUT) != 0) {
        {
            const std::lock_guard lock(interest_mutex_);
            blocked_ = false;
        }
        set_interest();
        flush();
        host_.settle();  // what waited for room in the outbox has some now
    }
    if ((events & (EPOLLIN | EPOLLHUP | EPOLLERR)) == 0 || !rx_mutex_.try_lock()) {
        return;  // another thread reads, and looks again before it leaves
    }
    const std::lock_guard lock(rx_mutex_, std::adopt_lock);
    if (read_frames() == Read::progress) {
        host_.settle();
    }
}

// ---- reading, under rx_mutex_

// One read, and every frame that is whole after it.
TcpControl::Read TcpControl::read_frames() {
    const std::span<std::byte> room = frames_.room();
    const auto n = ::recv(fd_.get(), room.data(), room.size(), MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        return Read::nothing;
    }
    if (n <= 0) {
        host_.lose(Cause::peer_lost, reset_reason(n == 0 ? 0 : errno));
        return Read::dead;
    }
    frames_.got(static_cast<std::size_t>(n));
    host_.heard();
    try {
        while (!host_.is_lost() && receive_next()) {
        }
    } catch (const protocol::Excess& excess) {
        host_.lose(Cause::resource_limit, excess.what());
        return Read::dead;
    } catch (const protocol::Violation& violation) {
        host_.lose(Cause::protocol_error, violation.what());
        return Read::dead;
    }
    return host_.is_lost() ? Read::dead : Read::progress;
}

bool TcpControl::receive_next() {
    const auto frame = frames_.next();
    if (!frame) {
        return false;
    }
    if (frame->trailer) {
        host_.receive_inline(frame->header, frame->body, *frame->trailer);
    } else {
        host_.receive(frame->header, frame->body);
    }
    return true;
}

// On a user's thread: what it throws must not leave the stream without a reader.
bool TcpControl::read_here() {
    try {
        if (read_frames() == Read::dead) {
            return false;
        }
        host_.settle();
        return true;
    } catch (const std::exception& why) {
        host_.give_up(why);
        return false;
    }
}

bool TcpControl::drive(const Path::StopCondition& stop, int wake_fd, std::int64_t until) {
    const auto host = keep_host_.lock();
    if (!host || !rx_mutex_.try_lock()) {
        return false;
    }
    const std::lock_guard lock(rx_mutex_, std::adopt_lock);
    {
        const std::lock_guard interest(interest_mutex_);
        if (closed_) {
            return false;
        }
        driven_ = true;
    }
    set_interest();
    bool ended = false;
    while (!ended && !stop()) {
        pollfd fds[2] = {{fd_.get(), POLLIN, 0}, {wake_fd, POLLIN, 0}};
        timespec timeout{};
        timespec* bound = nullptr;
        if (until != INT64_MAX) {
            const std::int64_t left = std::max<std::int64_t>(until - monotonic_ns(), 0);
            timeout = {left / 1'000'000'000, left % 1'000'000'000};
            bound = &timeout;
        }
        if (::ppoll(fds, 2, bound, nullptr) <= 0 || fds[1].revents != 0) {
            break;
        }
        ended = !read_here();
    }
    {
        const std::lock_guard interest(interest_mutex_);
        driven_ = false;
    }
    set_interest();
    return !ended;  // whoever ends the connection may still be at it, and completes what is waited for
}

void TcpControl::read_last_words() {
    if (!rx_mutex_.try_lock()) {
        return;  // who reads now reads to the end
    }
    const std::lock_guard lock(rx_mutex_, std::adopt_lock);
    while (!host_.is_lost() && read_frames() == Read::progress) {
        host_.settle();
    }
}

// ---- writing

void TcpControl::flush() {
    tx_again_.store(true);
    while (tx_again_.load() && tx_mutex_.try_lock()) {
        const std::lock_guard lock(tx_mutex_, std::adopt_lock);
        tx_again_.store(false);
        write_out();
    }
}

void TcpControl::write_out() {
    {
        const std::lock_guard lock(interest_mutex_);
        if (blocked_ || closed_) {
            return;  // EPOLLOUT brings us back
        }
    }
    for (;;) {
        if (tx_at_ == tx_.size()) {
            tx_.clear();
            tx_at_ = 0;
            if (tx_.capacity() > (256u << 10)) {
                tx_ = protocol::Bytes();
            }
            if (!host_.take_control(tx_)) {
                return;
            }
        }
        const auto n = ::send(fd_.get(), tx_.data() + tx_at_, tx_.size() - tx_at_,
                              MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n > 0) {
            tx_at_ += static_cast<std::size_t>(n);
            host_.spoke();
        } else if (errno == EAGAIN) {
            {
                const std::lock_guard lock(interest_mutex_);
                blocked_ = true;
            }
            set_interest();
            return;
        } else if (errno != EINTR) {
            return;  // the reading side finds out why, and says so
        }
    }
}

void TcpControl::close() {
    {
        const std::lock_guard lock(interest_mutex_);
        if (closed_) {
            return;
        }
        closed_ = true;
    }
    reactor_.remove(fd_.get());
    ::shutdown(fd_.get(), SHUT_RDWR);
}

}  // namespace kvt::backends
