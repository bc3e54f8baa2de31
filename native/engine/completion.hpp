// How an ended operation reaches whoever waits: threads, completion queues, event loops.
//
// Lives here: Handle (done once, tells its sinks), Waiter (one blocked thread), Queue (an eventfd and the
// tags that came). Does not live here: what ended and why (handle.hpp). Invariant: a handle becomes done
// exactly once; each subscription is told exactly once or withdrawn; nothing here calls Python.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "base/fd.hpp"

namespace kvt::engine {

class Sink {
  public:
    virtual ~Sink() = default;
    virtual void signal(std::uint64_t tag) noexcept = 0;
};

/// One blocked thread. Its eventfd is the thread's own and outlives it; a thread that completes what it waits
/// for itself (while it drives a connection) isn't woken by a system call.
class Waiter final : public Sink {
  public:
    Waiter();
    ~Waiter() override;
    Waiter(const Waiter&) = delete;
    Waiter& operator=(const Waiter&) = delete;
    void signal(std::uint64_t tag) noexcept override;
    bool signalled() const noexcept { return signalled_.load(std::memory_order_acquire); }
    void rearm() noexcept;
    int fd() const noexcept { return fd_; }
    /// Blocks until signalled, `until` (monotonic ns), or a signal handler ran in this thread; false for the
    /// last two.
    bool wait(std::int64_t until) noexcept;

  private:
    int fd_;
    std::atomic<bool> signalled_{false};
    std::atomic<bool> written_{false};
};

class Queue final : public Sink {
  public:
    Queue();
    void signal(std::uint64_t tag) noexcept override;
    int fd() const noexcept { return event_.get(); }
    /// All tags that came, each once; the descriptor is no longer readable.
    std::vector<std::uint64_t> poll();

  private:
    Fd event_;
    std::mutex mutex_;
    std::vector<std::uint64_t> tags_;
};

class Handle {
  public:
    virtual ~Handle() = default;
    bool done() const noexcept { return done_.load(std::memory_order_acquire); }
    /// False: it is done already, and the sink won't be told.
    bool subscribe(std::shared_ptr<Sink> sink, std::uint64_t tag);
    bool subscribe(Sink* sink);
    void unsubscribe(Sink* sink) noexcept;
    void complete() noexcept;

  private:
    struct Subscription {
        Sink* sink;
        std::shared_ptr<Sink> keep;
        std::uint64_t tag;
    };
    std::atomic<bool> done_{false};
    std::mutex mutex_;
    std::vector<Subscription> sinks_;
};

}  // namespace kvt::engine
