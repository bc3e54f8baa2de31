// Clocks, CPU time and thread placement.
#pragma once

#include <cstdint>
#include <vector>

namespace kvt_limits {

double now_s();       // CLOCK_MONOTONIC
double cpu_used_s();  // user + system time of this whole process

enum class Placement : uint32_t {
    kNone,   // wherever the scheduler likes
    kSame,   // both ends of stream i on core i
    kCross,  // the ends of stream i on different cores
};

// Pins the calling thread. Sender i goes to core i; receiver i to core i (same) or i + 1 (cross).
void pin(Placement placement, bool receiver, unsigned stream);

}  // namespace kvt_limits
