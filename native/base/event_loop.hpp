// A thread over epoll: the reactor and each mover is one.
//
// Lives here: waiting, waking, dispatch, the lifetime of what is dispatched to. Does not live here: what the
// events mean. Invariant: no Pollable is called after remove() and its last shared_ptr are gone; wake() from
// any thread is never lost and costs a system call only when the loop sleeps; what one of them throws is its
// own end, never the loop's.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/fd.hpp"

namespace kvt {

class Pollable {
  public:
    virtual ~Pollable() = default;
    virtual void on_events(std::uint32_t events) = 0;
    /// It has thrown: memory is short, say. It ends what it stands for.
    virtual void failed(const std::exception& why) = 0;
};

/// Work that wants turns without an event: a lane with bytes to move. run() returns true to get another turn.
class Runnable {
  public:
    virtual ~Runnable() = default;
    virtual bool run() = 0;
    virtual void failed(const std::exception& why) = 0;  // as a Pollable's
    std::atomic<bool> queued{false};
};

class EventLoop {
  public:
    /// `name` is the thread's, at most 15 characters; `cpu` < 0: not pinned.
    EventLoop(const char* name, int cpu);
    virtual ~EventLoop();

    void start();
    /// Ends the thread; what is registered is let go, and its descriptors are closed. Idempotent.
    void stop();

    /// Nothing when the loop has ended: what would be called is let go. The error, where the system refuses.
    [[nodiscard]] std::error_code add(int fd, std::uint32_t events, std::shared_ptr<Pollable> pollable);
    void modify(int fd, std::uint32_t events);
    void remove(int fd);
    void wake() noexcept;
    /// Gives `work` a turn soon, on this loop's thread.
    void enqueue(std::shared_ptr<Runnable> work);
    bool on_this_thread() const noexcept;
    /// How often it has looked for events: of a loop that spins this grows without bound.
    std::uint64_t rounds() const noexcept { return rounds_.load(std::memory_order_relaxed); }

  protected:
    /// After each round of events: does what is due and returns when it wants to be called next (monotonic
    /// ns; INT64_MAX never). Where it throws it is called again a little later.
    virtual std::int64_t on_turn() { return INT64_MAX; }

  private:
    struct Registration {
        std::uint64_t token;
        std::shared_ptr<Pollable> pollable;
    };
    void main();
    void dispatch(std::uint64_t token, std::uint32_t events);
    bool run_queue();
    void round(std::int64_t& next, bool& busy);
    int wait(void* events, int most, std::int64_t until) noexcept;

    const char* name_;
    int cpu_;
    Fd epoll_, wake_;
    std::thread thread_;
    std::atomic<bool> stopping_{false}, sleeping_{false}, pending_{false};
    std::atomic<std::uint64_t> rounds_{0};
    std::mutex mutex_;
    std::uint64_t next_token_ = 1;
    std::unordered_map<int, Registration> by_fd_;
    std::unordered_map<std::uint64_t, std::shared_ptr<Pollable>> by_token_;
    std::vector<std::shared_ptr<Runnable>> queue_;
};

}  // namespace kvt
