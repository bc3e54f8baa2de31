// Simulated time: what happens next, and the trace of what happened.
#pragma once

#include <cstdint>
#include <cstdio>
#include <functional>
#include <queue>
#include <stdexcept>
#include <string>
#include <vector>

#include "record.hpp"

namespace kvt::sim {

/// What the checker found.
struct Broken : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class Clock {
  public:
    explicit Clock(bool verbose) : verbose_(verbose) {}

    Time now() const noexcept { return now_; }
    void at(Time when, std::function<void()> what) {
        events_.push({std::max(when, now_), ++serial_, std::move(what)});
    }
    void after(Time delay, std::function<void()> what) { at(now_ + delay, std::move(what)); }
    bool step() {
        if (events_.empty()) {
            return false;
        }
        auto what = std::move(const_cast<Event&>(events_.top()).what);
        now_ = events_.top().when;
        events_.pop();
        ++steps_;
        what();
        return true;
    }
    std::uint64_t steps() const noexcept { return steps_; }

    template <class... Parts>
    void trace(const char* format, Parts... parts) const {
        if (verbose_) {
            std::printf("%12.3f ms  ", static_cast<double>(now_) / kMs);
            std::printf(format, parts...);
            std::printf("\n");
        }
    }
    bool verbose() const noexcept { return verbose_; }

  private:
    struct Event {
        Time when;
        std::uint64_t serial;
        std::function<void()> what;
        bool operator<(const Event& other) const noexcept {
            return when != other.when ? when > other.when : serial > other.serial;
        }
    };
    std::priority_queue<Event> events_;
    Time now_ = 0;
    std::uint64_t serial_ = 0, steps_ = 0;
    bool verbose_;
};

}  // namespace kvt::sim
