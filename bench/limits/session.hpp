// What the two processes of kvt_limits say to each other, and what one command measures.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "clock.hpp"
#include "memory.hpp"
#include "wire.hpp"
#include "work.hpp"

namespace kvt_limits {

enum class Mode : uint32_t { kTcp, kCopy, kMemfd, kVmread, kFree };

// One line of stdin. Sent to the receiver as it is: both processes are one program.
struct Command {
    Mode mode = Mode::kTcp;
    char work[32] = {};
    uint32_t streams = 1;  // connections, or copying threads
    Tuning tuning;
    Placement placement = Placement::kCross;
    uint32_t reps = 1;  // above 1: latency of each repetition
    uint64_t seed = 1;
    uint64_t source_address = 0;  // in the sender: for process_vm_readv
    int32_t source_pid = 0;
};

// What the receiver says once it is prepared, at each start, and at the end. One that is not ok ends the
// command.
struct Outcome {
    uint32_t ok = 1;
    uint32_t port = 0;
    uint32_t verified = 0;
    double seconds = 0;
    double cpu_s = 0;
    uint64_t nbytes = 0;  // of one repetition
    uint64_t runs = 0;
    uint64_t samples = 0;  // doubles that follow it
    char error[120] = {};
};

// Seeds of the repetitions of a latency command: a few dozen different works, taken in turn.
inline constexpr uint32_t kVariants = 32;
inline constexpr uint32_t kWarmups = 16;

// The receiver could not do a command; both processes are ready for the next one.
class CommandFailed : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Arenas {
    Mapping source;       // the sender's; the receiver makes one too for memcpy in one process
    Mapping destination;  // the receiver's
    Mapping peer_memfd;   // the receiver's map of the sender's memfd
    int memfd = -1;
};

// The works of a command: one for a bulk command, kVariants for a latency command.
std::vector<Work> works_of(const Command& command);

// Sender's and receiver's half of a TCP command; `control` is the socket between the two processes.
Outcome send_over_tcp(const Command& command, const Arenas& arenas, int control,
                      std::vector<double>* samples);
Outcome receive_over_tcp(const Command& command, Arenas& arenas, int control);

// memcpy, memcpy from the peer's memfd, process_vm_readv: the receiver's work alone.
Outcome copy_into_place(const Command& command, Arenas& arenas, std::vector<double>* samples);

}  // namespace kvt_limits
