// Every kernel against known values and against a bit-by-bit reference.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "base/crc32c.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

namespace {

// Long division, one bit at a time: slow and obvious.
std::uint32_t reference(std::uint32_t crc, const unsigned char* p, std::size_t n) {
    crc = ~crc;
    for (std::size_t i = 0; i < n; ++i) {
        crc ^= p[i];
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82F63B78u : 0u);
    }
    return ~crc;
}

std::vector<unsigned char> random_bytes(std::size_t n, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<unsigned char> bytes(n);
    for (auto& b : bytes) b = static_cast<unsigned char>(random());
    return bytes;
}

}  // namespace

TEST_CASE("known values") {
    // RFC 3720, appendix B.4, and the check value of the catalogue of parametrised CRC algorithms.
    std::vector<unsigned char> zeros(32, 0), ones(32, 0xff), up(32);
    for (std::size_t i = 0; i < up.size(); ++i) up[i] = static_cast<unsigned char>(i);
    for (const auto& kernel : kvt::crc32c_kernels()) {
        const std::string name = kernel.name;
        CAPTURE(name);
        CHECK(kernel.run(0, "123456789", 9) == 0xE3069283);
        CHECK(kernel.run(0, zeros.data(), 32) == 0x8A9136AA);
        CHECK(kernel.run(0, ones.data(), 32) == 0x62A8AB43);
        CHECK(kernel.run(0, up.data(), 32) == 0x46DD794E);
        CHECK(kernel.run(0, nullptr, 0) == 0);
    }
}

TEST_CASE("the kernels of this machine") {
    const auto kernels = kvt::crc32c_kernels();
    REQUIRE(!kernels.empty());
    CHECK(std::string(kernels.back().name) == "table");
    CHECK(std::string(kernels.front().name) == kvt::crc32c_kind());
    CHECK(kvt::crc32c(0, "123456789", 9) == 0xE3069283);
    for (const auto& kernel : kernels) MESSAGE("tested here: ", std::string(kernel.name));
}

TEST_CASE("every length up to 1100, at every alignment of a cache line's start") {
    const auto bytes = random_bytes(1200, 1);
    for (const auto& kernel : kvt::crc32c_kernels())
        for (std::size_t n = 0; n <= 1100; ++n) {
            const std::size_t at = n % 64;
            REQUIRE_MESSAGE(kernel.run(0, bytes.data() + at, n) == reference(0, bytes.data() + at, n),
                            std::string(kernel.name), " ", n);
        }
}

TEST_CASE("random lengths, alignments and starting values") {
    const std::uint64_t seed = std::random_device{}();
    CAPTURE(seed);
    const auto bytes = random_bytes(200'000, seed);
    std::mt19937_64 random(seed);
    for (int round = 0; round < 60; ++round) {
        const std::size_t at = random() % 64;
        const std::size_t n = random() % (round % 2 ? 5'000 : bytes.size() - at);
        const auto start = static_cast<std::uint32_t>(random());
        const auto expected = reference(start, bytes.data() + at, n);
        for (const auto& kernel : kvt::crc32c_kernels())
            REQUIRE_MESSAGE(kernel.run(start, bytes.data() + at, n) == expected, std::string(kernel.name),
                            " at ", at, " n ", n);
    }
}

TEST_CASE("chained over cuts of any length") {
    const std::uint64_t seed = std::random_device{}();
    CAPTURE(seed);
    const auto bytes = random_bytes(70'000, seed);
    std::mt19937_64 random(seed);
    const auto whole = reference(0, bytes.data(), bytes.size());
    for (const auto& kernel : kvt::crc32c_kernels())
        for (int round = 0; round < 20; ++round) {
            std::uint32_t crc = 0;
            for (std::size_t at = 0; at < bytes.size();) {
                const std::size_t n = std::min<std::size_t>(random() % 3000, bytes.size() - at);
                crc = kernel.run(crc, bytes.data() + at, n);
                at += n;
            }
            REQUIRE_MESSAGE(crc == whole, std::string(kernel.name));
        }
}

TEST_CASE("every flipped bit shows") {
    auto bytes = random_bytes(700, 7);
    for (const auto& kernel : kvt::crc32c_kernels()) {
        const auto good = kernel.run(0, bytes.data(), bytes.size());
        for (std::size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
            bytes[bit / 8] ^= static_cast<unsigned char>(1u << (bit % 8));
            REQUIRE_MESSAGE(kernel.run(0, bytes.data(), bytes.size()) != good, std::string(kernel.name),
                            " bit ", bit);
            bytes[bit / 8] ^= static_cast<unsigned char>(1u << (bit % 8));
        }
    }
}
