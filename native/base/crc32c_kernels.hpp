// The kernels of crc32c.hpp that need special instructions.
//
// Here: their names, and whether this machine has what they need. Not here: the choice between them
// (crc32c.cpp).
// Invariant: a kernel is called only where its available() is true.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvt::crc32c_kernel {

#if defined(__x86_64__)
bool vpclmulqdq_available() noexcept;
std::uint32_t vpclmulqdq(std::uint32_t crc, const void* data, std::size_t nbytes) noexcept;
bool sse42_available() noexcept;
std::uint32_t sse42(std::uint32_t crc, const void* data, std::size_t nbytes) noexcept;
#elif defined(__aarch64__)
bool armv8_available() noexcept;
std::uint32_t armv8(std::uint32_t crc, const void* data, std::size_t nbytes) noexcept;
#endif

}  // namespace kvt::crc32c_kernel
