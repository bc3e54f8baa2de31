// Memory of a pool that other processes of the host can map.
#pragma once

#include <cstdint>

namespace kvt::memory {

/// A file of memory (a sealed memfd), and where it is mapped here. Whoever made the pool keeps both.
struct SharedSegment {
    std::uint64_t id;  // of this process, never used again
    int fd;
    std::uintptr_t base;  // of the file's first byte
    std::uint64_t nbytes;
};

}  // namespace kvt::memory
