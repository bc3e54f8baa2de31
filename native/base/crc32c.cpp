// The choice of a CRC-32C kernel, and the one that every machine can run: tables, eight bytes at a time
// ("slicing-by-8", Kounavis and Berry, "A Systematic Approach to Building High Performance Software-based CRC
// Generators", ISCC 2005).
#include "base/crc32c.hpp"

#include <array>
#include <atomic>
#include <bit>
#include <cstring>

#include "base/crc32c_kernels.hpp"
#include "base/crc32c_poly.hpp"

namespace kvt {
namespace {

using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

// tables[k][b]: what the byte b does to the register when k more bytes of zeros follow it.
constexpr Tables make_tables() {
    Tables tables{};
    for (std::uint32_t b = 0; b < 256; ++b) {
        std::uint32_t crc = b;
        for (int bit = 0; bit < 8; ++bit) crc = crc32c_poly::times_x(crc);
        tables[0][b] = crc;
    }
    for (std::size_t k = 1; k < 8; ++k)
        for (std::size_t b = 0; b < 256; ++b)
            tables[k][b] = (tables[k - 1][b] >> 8) ^ tables[0][tables[k - 1][b] & 0xff];
    return tables;
}

constexpr Tables kTables = make_tables();

std::uint64_t load_little(const unsigned char* p) {
    std::uint64_t word;
    std::memcpy(&word, p, sizeof word);
    if constexpr (std::endian::native == std::endian::big) word = __builtin_bswap64(word);
    return word;
}

std::uint32_t table(std::uint32_t crc, const void* data, std::size_t nbytes) noexcept {
    auto* p = static_cast<const unsigned char*>(data);
    crc = ~crc;
    for (; nbytes >= 8; nbytes -= 8, p += 8) {
        std::uint64_t word = load_little(p) ^ crc;
        crc = 0;
        for (std::size_t i = 0; i < 8; ++i, word >>= 8) crc ^= kTables[7 - i][word & 0xff];
    }
    for (; nbytes != 0; --nbytes, ++p) crc = (crc >> 8) ^ kTables[0][(crc ^ *p) & 0xff];
    return ~crc;
}

struct Choice {
    std::array<Crc32cKernel, 3> kernels{};
    std::size_t count = 0;

    Choice() {
#if defined(__x86_64__)
        if (crc32c_kernel::vpclmulqdq_available())
            kernels[count++] = {"vpclmulqdq", crc32c_kernel::vpclmulqdq};
        if (crc32c_kernel::sse42_available()) kernels[count++] = {"sse4.2", crc32c_kernel::sse42};
#elif defined(__aarch64__)
        if (crc32c_kernel::armv8_available()) kernels[count++] = {"armv8", crc32c_kernel::armv8};
#endif
        kernels[count++] = {"table", table};
    }
};

const Choice& choice() noexcept {
    static const Choice chosen;
    return chosen;
}

std::uint32_t choose(std::uint32_t crc, const void* data, std::size_t nbytes) noexcept;

// Starts at choose(), which puts the best kernel here: a header's 64 bytes can't afford the guard of a static
// at every call.
constinit std::atomic<std::uint32_t (*)(std::uint32_t, const void*, std::size_t) noexcept> active{choose};

std::uint32_t choose(std::uint32_t crc, const void* data, std::size_t nbytes) noexcept {
    auto* run = choice().kernels[0].run;
    active.store(run, std::memory_order_relaxed);
    return run(crc, data, nbytes);
}

}  // namespace

std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t nbytes) noexcept {
    return active.load(std::memory_order_relaxed)(crc, data, nbytes);
}

const char* crc32c_kind() noexcept { return choice().kernels[0].name; }

std::span<const Crc32cKernel> crc32c_kernels() noexcept { return {choice().kernels.data(), choice().count}; }

}  // namespace kvt
