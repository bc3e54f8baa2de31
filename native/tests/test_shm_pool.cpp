// A peer's pools, as it may describe them: what can't be is refused, and none costs more than moments.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "backends/shm_pool.hpp"

using namespace kvt;
using namespace kvt::backends;

namespace {

// Layers of one part each.
protocol::Bytes pool_of(const std::vector<memory::Part>& parts) {
    protocol::Bytes out;
    protocol::Writer writer(out);
    writer.integer(std::uint8_t{0});  // by addresses, and without names
    writer.integer(std::uint8_t{0});
    writer.integer(std::uint32_t{1});
    writer.text("kv");
    writer.integer(std::uint64_t{1});
    writer.integer(std::uint64_t{0});
    writer.integer(std::uint8_t{1});
    for (int i = 0; i < 3; ++i) writer.text("");
    writer.integer(std::uint64_t{0});
    writer.integer(static_cast<std::uint32_t>(parts.size()));
    for (const auto& part : parts) {
        writer.text("");
        writer.integer(std::uint32_t{0});
        writer.integer(std::uint32_t{1});
        writer.integer(std::uint64_t{0});
        writer.integer(std::uint64_t{part.base});
        writer.integer(static_cast<std::uint64_t>(part.block_stride));
        writer.integer(part.itemsize);
        writer.integer(std::uint8_t{0});
        writer.integer(static_cast<std::uint32_t>(part.axes.size()));
        for (const auto& axis : part.axes) {
            writer.integer(axis.count);
            writer.integer(static_cast<std::uint64_t>(axis.stride));
        }
    }
    return out;
}

template <class Work>
double milliseconds(Work work) {
    const auto from = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - from).count();
}

}  // namespace

TEST_CASE("M9: layers that are each scattered in a way of their own are refused before all are listed") {
    std::vector<memory::Part> parts;
    for (std::uint64_t i = 0; i < memory::kMaxLayers; ++i) {
        parts.push_back({1 << 20, 1 << 18, {{65'536 - i, 2}}, 1, -1});
    }
    const auto raw = pool_of(parts);
    const double ms = milliseconds(
        [&] { CHECK_THROWS_AS(decode_shm_pool(raw, PeerSegments()), protocol::Excess); });  // all: 211 ms
    MESSAGE(raw.size() << " bytes that describe 67 million places: " << ms << " ms");
    CHECK(ms < 1000);
}

TEST_CASE("M9: the most that is taken, and layers that are found to differ late") {
    std::vector<memory::Part> scattered, alike;
    for (std::uint64_t i = 0; i < memory::kMaxLayers; ++i) {
        scattered.push_back({1 << 20, 1 << 18, {{256 - i % 2, 2}}, 1, -1});  // two classes, in turn
        std::vector<memory::Axis> axes;
        for (int k = 0; k < 15; ++k) {
            axes.push_back({1, std::int64_t{1} << (40 - k)});
        }
        axes.push_back({1 + i, 1});
        alike.push_back({1 << 20, 1 << 18, std::move(axes), 1, -1});
    }
    for (const auto& parts : {scattered, alike}) {
        const auto raw = pool_of(parts);
        ShmPool pool;
        const double ms = milliseconds([&] { pool = decode_shm_pool(raw, PeerSegments()); });
        CHECK(pool.shape->segments() <= 1024);
        MESSAGE(raw.size() << " bytes: " << ms << " ms");
        CHECK(ms < 1000);
    }
}
