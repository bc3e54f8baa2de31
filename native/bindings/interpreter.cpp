#include "bindings/interpreter.hpp"

#include <unistd.h>

#include <chrono>

#include "base/clock.hpp"

namespace kvt::bindings {

namespace {

bool is_ending() noexcept {
#if PY_VERSION_HEX >= 0x030d0000
    return Py_IsFinalizing() != 0;
#else
    return _Py_IsFinalizing() != 0;
#endif
}

}  // namespace

void stop_for_ever() noexcept {
    for (;;) {
        ::pause();
    }
}

void check_signals() {
    if (in_python([] { return PyErr_CheckSignals(); }) != 0) {
        throw nb::python_error();
    }
}

Unlocked::Unlocked() noexcept : ending_(is_ending()), state_(PyEval_SaveThread()) {}

Unlocked::~Unlocked() {
    if (!ending_ && is_ending()) {
        stop_for_ever();
    }
    in_python([this] { PyEval_RestoreThread(state_); });  // it may begin to end while this waits for it
}

void Callers::come() noexcept {
    const std::lock_guard lock(mutex_);
    ++count_;
}

// Told under the lock: the engine may be gone as soon as it is free.
void Callers::leave() noexcept {
    const std::lock_guard lock(mutex_);
    if (--count_ == 0) {
        gone_.notify_all();
    }
}

bool Callers::wait_until_gone(std::int64_t until) {
    std::unique_lock lock(mutex_);
    while (count_ != 0) {
        const std::int64_t left = until - monotonic_ns();
        if (left <= 0) {
            return false;
        }
        gone_.wait_for(lock, std::chrono::nanoseconds(left));
    }
    return true;
}

}  // namespace kvt::bindings
