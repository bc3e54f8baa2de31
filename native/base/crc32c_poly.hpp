// Arithmetic modulo the CRC-32C polynomial, from which every constant of the kernels is derived.
//
// Here: powers of x and products in the reflected form that CRC registers have (bit 31 is x^0). All
// constexpr.
// Not here: reading memory. Not part of the interface of crc32c.hpp.
// Invariant: a value is always the remainder of degree below 32.
#pragma once

#include <cstdint>

namespace kvt::crc32c_poly {

inline constexpr std::uint32_t kPolynomial = 0x82F63B78;  // Castagnoli's, reflected: RFC 3720, appendix B.4
inline constexpr std::uint32_t kOne = 0x80000000;         // x^0

constexpr std::uint32_t times_x(std::uint32_t a) { return (a >> 1) ^ ((a & 1) ? kPolynomial : 0); }

constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
    std::uint32_t product = 0;
    for (int bit = 31; bit >= 0; --bit) {  // from a's coefficient of x^0 up
        product ^= ((a >> bit) & 1) ? b : 0;
        b = times_x(b);
    }
    return product;
}

constexpr std::uint32_t x_to(std::uint64_t n) {
    std::uint32_t result = kOne;
    for (std::uint32_t square = kOne >> 1; n != 0; n >>= 1, square = multiply(square, square))
        if (n & 1) result = multiply(result, square);
    return result;
}

// A carry-less product of two reflected registers comes out one place low: it reads as the product times x. A
// 32-bit constant in the low half of a 64-bit register reads as the constant times x^32. So to multiply a
// 64-bit register by x^n, with a 128-bit register as the result, multiply by x^(n - 33). (The same 33 serves
// a 32-bit register whose 64-bit product then goes through the crc32 instruction, which multiplies by x^32.)
constexpr std::uint64_t fold(std::uint64_t n) { return x_to(n - 33); }

static_assert(multiply(x_to(17), x_to(40)) == x_to(57));
static_assert(x_to(32) == kPolynomial);  // x^32 mod P is P without its leading term

}  // namespace kvt::crc32c_poly
