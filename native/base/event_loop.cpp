#include "base/event_loop.hpp"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "base/clock.hpp"

namespace kvt {

namespace {

constexpr std::uint64_t kWakeToken = 0;
constexpr int kMaxEvents = 64;
constexpr std::int64_t kTryAgainNs = 100'000'000;  // after a turn that failed

// Not the id in std::thread: stop() changes that while others ask.
thread_local const EventLoop* loop_here = nullptr;

[[noreturn]] void raise_errno(const char* what) {
    throw std::system_error(errno, std::generic_category(), what);
}

// An end may need memory, too, which may still be short: then the peer's silence is what ends it.
template <class Failed>
void end(Failed& failed, const std::exception& why) noexcept {
    try {
        failed.failed(why);
    } catch (const std::exception&) {
    }
}

}  // namespace

EventLoop::EventLoop(const char* name, int cpu)
    : name_(name),
      cpu_(cpu),
      epoll_(::epoll_create1(EPOLL_CLOEXEC)),
      wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (!epoll_ || !wake_) {
        raise_errno("epoll or eventfd");
    }
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = kWakeToken;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, wake_.get(), &event) != 0) {
        raise_errno("epoll_ctl");
    }
}

EventLoop::~EventLoop() { stop(); }

void EventLoop::start() {
    // Signals belong to the interpreter's threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        thread_ = std::thread([this] { main(); });
    } catch (const std::system_error& error) {
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        throw std::system_error(error.code(), "a thread can't be started; raise ulimit -u, or ulimit -v");
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void EventLoop::stop() {
    if (!thread_.joinable()) {
        return;
    }
    stopping_.store(true);
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto n = ::write(wake_.get(), &one, sizeof one);
    thread_.join();
    const std::lock_guard lock(mutex_);
    by_fd_.clear();
    by_token_.clear();
    queue_.clear();
    epoll_.reset();
    wake_.reset();
}

std::error_code EventLoop::add(int fd, std::uint32_t events, std::shared_ptr<Pollable> pollable) {
    const std::lock_guard lock(mutex_);
    if (!epoll_) {
        return {};
    }
    const std::uint64_t token = next_token_++;
    epoll_event event{};
    event.events = events;
    event.data.u64 = token;
    by_fd_[fd] = {token, pollable};
    try {
        by_token_[token] = std::move(pollable);
    } catch (...) {
        by_fd_.erase(fd);
        throw;
    }
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
        const std::error_code refused(errno, std::generic_category());
        by_token_.erase(token);
        by_fd_.erase(fd);
        return refused;
    }
    return {};
}

void EventLoop::modify(int fd, std::uint32_t events) {
    const std::lock_guard lock(mutex_);
    const auto known = by_fd_.find(fd);
    if (known == by_fd_.end()) {
        return;
    }
    epoll_event event{};
    event.events = events;
    event.data.u64 = known->second.token;
    ::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event);
}

void EventLoop::remove(int fd) {
    std::shared_ptr<Pollable> last;  // destroyed outside of the lock
    const std::lock_guard lock(mutex_);
    const auto known = by_fd_.find(fd);
    if (known == by_fd_.end()) {
        return;
    }
    ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
    last = std::move(known->second.pollable);
    by_token_.erase(known->second.token);
    by_fd_.erase(known);
}

void EventLoop::wake() noexcept {
    pending_.store(true);
    if (sleeping_.exchange(false)) {
        const std::lock_guard lock(mutex_);  // stop() closes it, and the number may be another's then
        const std::uint64_t one = 1;
        [[maybe_unused]] const auto n = ::write(wake_.get(), &one, sizeof one);
    }
}

void EventLoop::enqueue(std::shared_ptr<Runnable> work) {
    if (work->queued.exchange(true)) {
        return;
    }
    try {
        const std::lock_guard lock(mutex_);
        queue_.push_back(work);
    } catch (...) {
        work->queued.store(false);
        throw;
    }
    wake();
}

// Milliseconds are too coarse for the 200 us look at a progress word, hence epoll_pwait2 (Linux 5.11) where
// it is.
int EventLoop::wait(void* events, int most, std::int64_t until) noexcept {
    auto* out = static_cast<epoll_event*>(events);
    if (until == INT64_MAX) {
        return ::epoll_wait(epoll_.get(), out, most, -1);
    }
    const std::int64_t left = std::max<std::int64_t>(until - monotonic_ns(), 0);
#ifdef SYS_epoll_pwait2
    static std::atomic<bool> have{true};
    if (have.load(std::memory_order_relaxed)) {
        timespec timeout{};
        timeout.tv_sec = left / 1'000'000'000;
        timeout.tv_nsec = left % 1'000'000'000;
        const long n = ::syscall(SYS_epoll_pwait2, epoll_.get(), out, most, &timeout, nullptr, 0);
        if (n >= 0 || errno != ENOSYS) {
            return static_cast<int>(n);
        }
        have.store(false, std::memory_order_relaxed);
    }
#endif
    return ::epoll_wait(epoll_.get(), out, most, static_cast<int>((left + 999'999) / 1'000'000));
}

void EventLoop::dispatch(std::uint64_t token, std::uint32_t events) {
    if (token == kWakeToken) {
        std::uint64_t count = 0;
        [[maybe_unused]] const auto n = ::read(wake_.get(), &count, sizeof count);
        return;
    }
    std::shared_ptr<Pollable> pollable;
    {
        const std::lock_guard lock(mutex_);
        if (const auto known = by_token_.find(token); known != by_token_.end()) {
            pollable = known->second;
        }
    }
    if (!pollable) {
        return;
    }
    try {
        pollable->on_events(events);
    } catch (const std::exception& why) {
        end(*pollable, why);
    }
}

// Each gets one turn; true if any wants another.
bool EventLoop::run_queue() {
    std::vector<std::shared_ptr<Runnable>> turn;
    {
        const std::lock_guard lock(mutex_);
        turn.swap(queue_);
    }
    bool again = false;
    for (auto& work : turn) {
        work->queued.store(false);
        try {
            if (work->run() && !work->queued.exchange(true)) {
                const std::lock_guard lock(mutex_);
                queue_.push_back(work);
                again = true;
            }
        } catch (const std::exception& why) {
            work->queued.store(false);
            end(*work, why);
        }
    }
    return again;
}

bool EventLoop::on_this_thread() const noexcept { return loop_here == this; }

void EventLoop::main() {
    loop_here = this;
    pthread_setname_np(pthread_self(), name_);
    if (cpu_ >= 0) {
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(cpu_, &one);
        pthread_setaffinity_np(pthread_self(), sizeof one, &one);  // a core that isn't ours: stay unpinned
    }
    std::int64_t next = 0;
    bool busy = false;
    while (!stopping_.load(std::memory_order_relaxed)) {
        try {
            round(next, busy);
        } catch (const std::exception&) {
            next = monotonic_ns() + kTryAgainNs;
        }
    }
}

void EventLoop::round(std::int64_t& next, bool& busy) {
    epoll_event events[kMaxEvents];
    rounds_.store(rounds_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    sleeping_.store(true);
    if (pending_.exchange(false) || busy) {
        sleeping_.store(false);
        next = 0;
    }
    const int n = wait(events, kMaxEvents, next);
    sleeping_.store(false);
    for (int i = 0; i < n; ++i) {
        dispatch(events[i].data.u64, events[i].events);
    }
    busy = run_queue();
    next = on_turn();
}

}  // namespace kvt
