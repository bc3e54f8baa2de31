#include "engine/completion.hpp"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <ctime>
#include <utility>

#include "base/clock.hpp"

namespace kvt::engine {

namespace {

// The waiter that this thread stands in, so that its own completions need no system call.
thread_local Waiter* current_waiter = nullptr;

// One per thread that ever waited, closed with the thread.
int thread_eventfd() {
    static thread_local Fd fd;
    static thread_local std::uint64_t generation = 0;
    if (!fd || generation != fork_generation()) {
        fd = make_eventfd();
        generation = fork_generation();
    }
    return fd.get();
}

void drain(int fd) noexcept {
    std::uint64_t count = 0;
    [[maybe_unused]] const auto n = ::read(fd, &count, sizeof count);
}

}  // namespace

Waiter::Waiter() : fd_(thread_eventfd()) { current_waiter = this; }

Waiter::~Waiter() {
    current_waiter = nullptr;
    if (written_) {
        drain(fd_);
    }
}

void Waiter::signal(std::uint64_t) noexcept {
    if (signalled_.exchange(true, std::memory_order_acq_rel) || current_waiter == this) {
        return;
    }
    written_ = true;
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto n = ::write(fd_, &one, sizeof one);
}

void Waiter::rearm() noexcept {
    if (written_) {
        drain(fd_);
        written_ = false;
    }
    signalled_.store(false, std::memory_order_release);
}

bool Waiter::wait(std::int64_t until) noexcept {
    while (!signalled()) {
        pollfd one{fd_, POLLIN, 0};
        timespec timeout{};
        timespec* bound = nullptr;
        if (until != INT64_MAX) {
            const std::int64_t left = until - monotonic_ns();
            if (left <= 0) {
                return false;
            }
            timeout = {left / 1'000'000'000, left % 1'000'000'000};
            bound = &timeout;
        }
        if (::ppoll(&one, 1, bound, nullptr) < 0) {
            return signalled();  // EINTR: the caller lets the interpreter look at its signals
        }
    }
    return true;
}

Queue::Queue() : event_(make_eventfd()) {}

void Queue::signal(std::uint64_t tag) noexcept {
    const std::lock_guard lock(mutex_);  // also around the write: else poll() could take the tag before it
    tags_.push_back(tag);
    if (tags_.size() == 1) {
        const std::uint64_t one = 1;
        [[maybe_unused]] const auto n = ::write(event_.get(), &one, sizeof one);
    }
}

std::vector<std::uint64_t> Queue::poll() {
    const std::lock_guard lock(mutex_);
    if (!tags_.empty()) {
        drain(event_.get());
    }
    return std::exchange(tags_, {});
}

bool Handle::subscribe(std::shared_ptr<Sink> sink, std::uint64_t tag) {
    const std::lock_guard lock(mutex_);
    if (done_.load(std::memory_order_relaxed)) {
        return false;
    }
    Sink* const raw = sink.get();
    sinks_.push_back({raw, std::move(sink), tag});
    return true;
}

bool Handle::subscribe(Sink* sink) {
    const std::lock_guard lock(mutex_);
    if (done_.load(std::memory_order_relaxed)) {
        return false;
    }
    sinks_.push_back({sink, nullptr, 0});
    return true;
}

void Handle::unsubscribe(Sink* sink) noexcept {
    const std::lock_guard lock(mutex_);
    std::erase_if(sinks_, [&](const Subscription& s) { return s.sink == sink; });
}

// Sinks are told under the lock, so that unsubscribe() returns only when its sink is not being told.
void Handle::complete() noexcept {
    const std::lock_guard lock(mutex_);
    if (done_.exchange(true, std::memory_order_acq_rel)) {
        return;
    }
    for (const Subscription& s : sinks_) {
        s.sink->signal(s.tag);
    }
    sinks_.clear();
}

}  // namespace kvt::engine
