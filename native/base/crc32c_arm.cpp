// CRC-32C with ARMv8's crc32c instruction: three chains side by side as in crc32c_x86.cpp, merged in plain
// arithmetic (the carry-less multiplication is optional on ARM). Tested under emulation (qemu) only.
#if defined(__aarch64__)

#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>

#include <cstring>

#include "base/crc32c_kernels.hpp"
#include "base/crc32c_poly.hpp"

#define KVT_CRC __attribute__((target("+crc")))

namespace kvt::crc32c_kernel {
namespace {

std::uint64_t load64(const unsigned char* p) {
    std::uint64_t word;
    std::memcpy(&word, p, sizeof word);
    return word;
}

constexpr std::size_t kLane = 8192;  // long enough that two multiplications of 32 steps hardly count
constexpr std::uint32_t kOver2 = crc32c_poly::x_to(8 * 2 * kLane), kOver1 = crc32c_poly::x_to(8 * kLane);

KVT_CRC std::uint32_t three_chains(std::uint32_t a, const unsigned char* p) {
    std::uint32_t b = 0, c = 0;
    for (std::size_t i = 0; i < kLane; i += 8) {
        a = __crc32cd(a, load64(p + i));
        b = __crc32cd(b, load64(p + kLane + i));
        c = __crc32cd(c, load64(p + 2 * kLane + i));
    }
    return crc32c_poly::multiply(a, kOver2) ^ crc32c_poly::multiply(b, kOver1) ^ c;
}

}  // namespace

bool armv8_available() noexcept { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }

KVT_CRC std::uint32_t armv8(std::uint32_t crc, const void* data, std::size_t nbytes) noexcept {
    auto* p = static_cast<const unsigned char*>(data);
    crc = ~crc;
    for (; nbytes >= 3 * kLane; nbytes -= 3 * kLane, p += 3 * kLane) crc = three_chains(crc, p);
    for (; nbytes >= 8; nbytes -= 8, p += 8) crc = __crc32cd(crc, load64(p));
    for (; nbytes != 0; --nbytes, ++p) crc = __crc32cb(crc, *p);
    return ~crc;
}

}  // namespace kvt::crc32c_kernel

#endif  // __aarch64__
