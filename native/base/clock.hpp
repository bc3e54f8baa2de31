// The one clock: CLOCK_MONOTONIC in nanoseconds. Wall-clock jumps don't reach us.
#pragma once

#include <ctime>

#include <cstdint>

namespace kvt {

inline std::int64_t monotonic_ns() noexcept {
    timespec at{};
    clock_gettime(CLOCK_MONOTONIC, &at);
    return static_cast<std::int64_t>(at.tv_sec) * 1'000'000'000 + at.tv_nsec;
}

}  // namespace kvt
