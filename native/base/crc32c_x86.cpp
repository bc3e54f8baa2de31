// CRC-32C with x86-64's crc32 and carry-less multiplication.
//
// "sse4.2": three crc32 chains side by side, since the instruction takes three cycles and starts one each
// cycle; their registers are merged by multiplying with powers of x (Gopal et al., "Fast CRC Computation for
// iSCSI Polynomial Using CRC32 Instruction", Intel 2011).
// "vpclmulqdq": the message is folded 256 bytes at a time by multiplying 64-bit lanes with powers of x (Gopal
// et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009, here on
// four lanes at once). The last 16 bytes go through the crc32 instruction instead of a Barrett reduction.
#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// gcc's own AVX-512 headers start from undefined registers, which it then warns about where they are inlined
// (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <cstring>

#include "base/crc32c_kernels.hpp"
#include "base/crc32c_poly.hpp"

#define KVT_SSE42 __attribute__((target("sse4.2,pclmul")))
#define KVT_AVX512 __attribute__((target("sse4.2,pclmul,avx512f,avx512vl,vpclmulqdq")))

namespace kvt::crc32c_kernel {
namespace {

using crc32c_poly::fold;

std::uint64_t load64(const unsigned char* p) {
    std::uint64_t word;
    std::memcpy(&word, p, sizeof word);
    return word;
}

// One chain: for what is too short to be worth more. `crc` is the register, not inverted.
KVT_SSE42 inline std::uint32_t chain(std::uint32_t crc, const unsigned char* p, std::size_t nbytes) {
    std::uint64_t wide = crc;
    for (; nbytes >= 8; nbytes -= 8, p += 8) wide = _mm_crc32_u64(wide, load64(p));
    crc = static_cast<std::uint32_t>(wide);
    if (nbytes & 4) {
        std::uint32_t word;
        std::memcpy(&word, p, sizeof word);
        crc = _mm_crc32_u32(crc, word);
        p += 4;
    }
    if (nbytes & 2) {
        std::uint16_t word;
        std::memcpy(&word, p, sizeof word);
        crc = _mm_crc32_u16(crc, word);
        p += 2;
    }
    return (nbytes & 1) ? _mm_crc32_u8(crc, *p) : crc;
}

KVT_SSE42 inline std::uint64_t product(std::uint64_t a, std::uint64_t b) {
    return static_cast<std::uint64_t>(_mm_cvtsi128_si64(_mm_clmulepi64_si128(
        _mm_cvtsi64_si128(static_cast<long long>(a)), _mm_cvtsi64_si128(static_cast<long long>(b)), 0)));
}

// Three chains of kLane bytes each, as long as there are that many.
template <std::size_t kLane>
KVT_SSE42 inline std::uint32_t three_chains(std::uint32_t crc, const unsigned char*& p, std::size_t& nbytes) {
    constexpr std::uint64_t kOver2 = fold(8 * 2 * kLane), kOver1 = fold(8 * kLane);
    for (; nbytes >= 3 * kLane; nbytes -= 3 * kLane, p += 3 * kLane) {
        std::uint64_t a = crc, b = 0, c = 0;
        for (std::size_t i = 0; i < kLane; i += 8) {
            a = _mm_crc32_u64(a, load64(p + i));
            b = _mm_crc32_u64(b, load64(p + kLane + i));
            c = _mm_crc32_u64(c, load64(p + 2 * kLane + i));
        }
        crc = static_cast<std::uint32_t>(c ^ _mm_crc32_u64(0, product(a, kOver2) ^ product(b, kOver1)));
    }
    return crc;
}

// Constants that move a 128-bit lane over `bits` more bits of message: its low half holds the higher powers
// of x.
KVT_AVX512 inline __m128i lane_constants(std::uint64_t low, std::uint64_t high) {
    return _mm_set_epi64x(static_cast<long long>(high), static_cast<long long>(low));
}

template <std::uint64_t kBits>
KVT_AVX512 inline __m512i over_bits() {
    constexpr std::uint64_t kLow = fold(kBits + 64), kHigh = fold(kBits);
    return _mm512_broadcast_i32x4(lane_constants(kLow, kHigh));
}

// `lanes` moved by `constants`, plus `next`.
KVT_AVX512 inline __m512i fold_into(__m512i lanes, __m512i constants, __m512i next) {
    __m512i low = _mm512_clmulepi64_epi128(lanes, constants, 0x00);
    __m512i high = _mm512_clmulepi64_epi128(lanes, constants, 0x11);
    return _mm512_ternarylogic_epi64(low, high, next, 0x96);  // exclusive or of the three
}

// Four lanes to one: the first three move over those behind them.
KVT_AVX512 inline __m128i fold_lanes(__m512i lanes) {
    constexpr std::uint64_t k3[] = {fold(3 * 128 + 64), fold(3 * 128)},
                            k2[] = {fold(2 * 128 + 64), fold(2 * 128)}, k1[] = {fold(128 + 64), fold(128)};
    __m512i constants = _mm512_castsi128_si512(lane_constants(k3[0], k3[1]));
    constants = _mm512_inserti32x4(constants, lane_constants(k2[0], k2[1]), 1);
    constants = _mm512_inserti32x4(constants, lane_constants(k1[0], k1[1]), 2);
    constants = _mm512_inserti32x4(constants, _mm_setzero_si128(), 3);
    __m512i last = _mm512_maskz_mov_epi64(0xC0, lanes);
    __m512i sum = fold_into(lanes, constants, last);
    __m256i half = _mm256_xor_si256(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
    return _mm_xor_si128(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// At least 256 bytes. Leaves fewer than 64; the returned register stands before them.
KVT_AVX512 inline std::uint32_t fold_all(std::uint32_t crc, const unsigned char*& p, std::size_t& nbytes) {
    __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 64);
    __m512i c = _mm512_loadu_si512(p + 128), d = _mm512_loadu_si512(p + 192);
    a = _mm512_xor_si512(a, _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
    p += 256, nbytes -= 256;
    const __m512i by_256 = over_bits<8 * 256>();
    for (; nbytes >= 256; nbytes -= 256, p += 256) {
        a = fold_into(a, by_256, _mm512_loadu_si512(p));
        b = fold_into(b, by_256, _mm512_loadu_si512(p + 64));
        c = fold_into(c, by_256, _mm512_loadu_si512(p + 128));
        d = fold_into(d, by_256, _mm512_loadu_si512(p + 192));
    }
    a = fold_into(a, over_bits<8 * 128>(), c);
    b = fold_into(b, over_bits<8 * 128>(), d);
    const __m512i by_64 = over_bits<8 * 64>();
    a = fold_into(a, by_64, b);
    for (; nbytes >= 64; nbytes -= 64, p += 64) a = fold_into(a, by_64, _mm512_loadu_si512(p));
    const __m128i rest = fold_lanes(a);
    const std::uint64_t wide = _mm_crc32_u64(0, static_cast<std::uint64_t>(_mm_cvtsi128_si64(rest)));
    return static_cast<std::uint32_t>(
        _mm_crc32_u64(wide, static_cast<std::uint64_t>(_mm_extract_epi64(rest, 1))));
}

}  // namespace

bool sse42_available() noexcept {
    return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
}

KVT_SSE42 std::uint32_t sse42(std::uint32_t crc, const void* data, std::size_t nbytes) noexcept {
    auto* p = static_cast<const unsigned char*>(data);
    crc = ~crc;
    crc = three_chains<4096>(crc, p, nbytes);  // a merge costs about 20 cycles
    crc = three_chains<512>(crc, p, nbytes);
    crc = three_chains<64>(crc, p, nbytes);
    return ~chain(crc, p, nbytes);
}

bool vpclmulqdq_available() noexcept {
    return sse42_available() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("vpclmulqdq");
}

KVT_AVX512 std::uint32_t vpclmulqdq(std::uint32_t crc, const void* data, std::size_t nbytes) noexcept {
    auto* p = static_cast<const unsigned char*>(data);
    crc = ~crc;
    if (nbytes >= 256) crc = fold_all(crc, p, nbytes);
    return ~chain(crc, p, nbytes);
}

}  // namespace kvt::crc32c_kernel

#endif  // __x86_64__
