#include "clock.hpp"

#include <sched.h>
#include <sys/resource.h>
#include <ctime>

namespace kvt_limits {
namespace {

// The cores this program may use, read before any thread is pinned.
const std::vector<int>& cores() {
    static const std::vector<int> all = [] {
        cpu_set_t set;
        CPU_ZERO(&set);
        sched_getaffinity(0, sizeof set, &set);
        std::vector<int> found;
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (CPU_ISSET(cpu, &set)) found.push_back(cpu);
        }
        return found;
    }();
    return all;
}

double seconds(const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
}

}  // namespace

double now_s() {
    timespec t{};
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

double cpu_used_s() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

void pin(Placement placement, bool receiver, unsigned stream) {
    const auto& all = cores();  // read now, also when there is nothing to pin
    if (placement == Placement::kNone) return;
    const unsigned shift = receiver && placement == Placement::kCross ? 1 : 0;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(all[(stream + shift) % all.size()], &set);
    sched_setaffinity(0, sizeof set, &set);
}

}  // namespace kvt_limits
