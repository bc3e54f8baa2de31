// The GIL given up and taken back, also while the interpreter is ending; and which threads wait in an engine.
//
// A thread that wants the GIL back when the interpreter is ending gets pthread_exit() from CPython before
// 3.14, which unwinds the stack: through destructors of ours, which must not be left so, and without the GIL
// that they need. Here such a thread stops for ever instead, as in 3.14; the process ends without it.
#pragma once

#include <nanobind/nanobind.h>

#include <cxxabi.h>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <utility>

namespace kvt::bindings {

namespace nb = nanobind;

/// Never returns; the end of the process doesn't wait for it.
[[noreturn]] void stop_for_ever() noexcept;

/// Runs what may execute Python code, in which the GIL changes hands. Not through C++ frames that own Python
/// objects: CPython's call itself belongs here.
template <class Work>
auto in_python(Work&& work) {
    try {
        return std::forward<Work>(work)();
    } catch (const abi::__forced_unwind&) {
        stop_for_ever();
    }
}

/// Lets a signal's handler run; throws what it raises.
void check_signals();

/// Without the GIL as long as it lives.
class Unlocked {
  public:
    Unlocked() noexcept;
    ~Unlocked();
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;

  private:
    bool ending_;  // who has the GIL while the interpreter is ending is who ends it
    PyThreadState* state_;
};

/// The threads that wait in an engine for something.
class Callers {
  public:
    void come() noexcept;
    void leave() noexcept;
    /// Waits until there are none; false at `until` (monotonic ns).
    bool wait_until_gone(std::int64_t until);

  private:
    std::mutex mutex_;
    std::condition_variable gone_;
    unsigned count_ = 0;
};

/// One of them, until it has the GIL again; not while a signal's handler runs, which may close the engine.
class Calling {
  public:
    explicit Calling(Callers& callers) noexcept : callers_(&callers) { callers_->come(); }
    Calling(Calling&& other) noexcept : callers_(std::exchange(other.callers_, nullptr)) {}
    Calling& operator=(Calling&&) = delete;
    ~Calling() {
        if (callers_ != nullptr) {
            callers_->leave();
        }
    }

  private:
    Callers* callers_;
};

}  // namespace kvt::bindings
