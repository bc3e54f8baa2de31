// CRC-32C (Castagnoli), the checksum of frame headers and chunk bodies.
//
// Here: the one function that the rest of the core calls, and the list of kernels that can compute it on this
// machine.
// Not here: what is checksummed and when (protocol, backends); authentication (a CRC finds accidents, not
// attackers).
// Invariant: every kernel gives the same value for the same bytes, whatever their length, alignment or
// cutting.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvt {

// The CRC-32C of the bytes so far (`crc`, 0 at the start) followed by `data`: crc32c(crc32c(0, a), b) ==
// crc32c(0, ab). `data` may be null when `nbytes` is 0.
std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t nbytes) noexcept;

// The kernel that crc32c() uses on this machine: "vpclmulqdq", "sse4.2", "armv8" or "table".
const char* crc32c_kind() noexcept;

struct Crc32cKernel {
    const char* name;
    std::uint32_t (*run)(std::uint32_t crc, const void* data, std::size_t nbytes) noexcept;
};

// The kernels that this machine can run, best first; the last is always "table". For tests and measurements.
std::span<const Crc32cKernel> crc32c_kernels() noexcept;

}  // namespace kvt
