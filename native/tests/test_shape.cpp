// Shapes: what is refused, and patterns against a walk over every element.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "memory/shape.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>

using namespace kvt::memory;

namespace {

Group group(std::uint64_t num_blocks, std::uint64_t num_heads = 0, std::string name = "g") {
    return {std::move(name), num_blocks, num_heads, false, "bfloat16", "HND", "packed", 16};
}

PoolShape one_layer(Part part, std::uint64_t num_blocks = 8, std::uint64_t num_heads = 0) {
    return PoolShape({group(num_blocks, num_heads)}, {{"l", 0, {std::move(part)}}}, true);
}

std::string refusal(Part part, std::uint64_t num_blocks = 8, std::uint64_t num_heads = 0) {
    try {
        one_layer(std::move(part), num_blocks, num_heads);
    } catch (const std::invalid_argument& error) {
        return error.what();
    }
    return "";
}

bool has(const std::string& text, const char* words) { return text.find(words) != std::string::npos; }

// Offsets of every byte of a part's block, in stream order: one element at a time.
std::vector<std::int64_t> bytes_of(const Part& part, Heads heads, std::size_t axis = 0, std::int64_t at = 0) {
    std::vector<std::int64_t> bytes;
    if (axis == part.axes.size()) {
        for (std::uint64_t i = 0; i < part.itemsize; ++i) bytes.push_back(at + static_cast<std::int64_t>(i));
        return bytes;
    }
    const bool sliced = static_cast<int>(axis) == part.head_axis && !heads.all;
    const std::uint64_t first = sliced ? heads.begin : 0,
                        count = sliced ? heads.count : part.axes[axis].count;
    for (std::uint64_t i = first; i < first + count; ++i) {
        const auto inner = bytes_of(part, heads, axis + 1,
                                    at + static_cast<std::int64_t>(i) * part.axes[axis].stride);
        bytes.insert(bytes.end(), inner.begin(), inner.end());
    }
    return bytes;
}

// Addresses of block 0, from a pattern.
std::vector<std::uintptr_t> addresses(const Layer& layer, const Pattern& pattern) {
    std::vector<std::uintptr_t> out;
    for (const Segment& s : pattern.segments)
        for (std::uint64_t i = 0; i < s.nbytes; ++i)
            out.push_back(layer.parts[s.part].base + static_cast<std::uint64_t>(s.offset) + i);
    return out;
}

}  // namespace

TEST_CASE("an opaque block is one segment") {
    const auto shape = one_layer({0x1000, 256, {}, 200, -1});
    const auto pattern = shape.pattern(0, Heads::every());
    CHECK(pattern->segments == std::vector<Segment>{{0, 0, 200}});
    CHECK(pattern->nbytes == 200);
    CHECK(shape.extent(0, 0) == Extent{0x1000, 0x1000 + 7 * 256 + 200});
    CHECK_THROWS_AS(shape.pattern(0, {0, 1, false}), std::invalid_argument);
    CHECK_THROWS_AS(shape.pattern(1, Heads::every()), std::out_of_range);
}

TEST_CASE("HND: a slice of heads is one segment; NHD: one for each token") {
    const Part hnd{0x10000, 8 * 16 * 64, {{8, 16 * 64}, {16, 64}, {32, 2}}, 2, 0};
    const Part nhd{0x10000, 8 * 16 * 64, {{16, 8 * 64}, {8, 64}, {32, 2}}, 2, 1};
    CHECK(one_layer(hnd, 8, 8).pattern(0, {2, 3, false})->segments ==
          std::vector<Segment>{{0, 2 * 1024, 3 * 1024}});
    const auto slice = one_layer(nhd, 8, 8).pattern(0, {2, 3, false});
    REQUIRE(slice->segments.size() == 16);
    CHECK(slice->segments[5] == Segment{0, 5 * 512 + 128, 192});
    CHECK(slice->starts[5] == 5 * 192);
    CHECK(slice->nbytes == 16 * 192);
    CHECK(one_layer(nhd, 8, 8).pattern(0, {0, 8, false})->segments.size() == 1);
    for (Heads bad :
         {Heads{0, 0, false}, Heads{8, 1, false}, Heads{7, 2, false}, Heads{1, 0xffffffff, false}})
        CHECK_THROWS_AS(one_layer(nhd, 8, 8).pattern(0, bad), std::invalid_argument);
}

TEST_CASE("K and V side by side in a block are one segment, apart they are two") {
    const Part k{0x10000, 2048, {{16, 64}, {32, 2}}, 2, -1};
    Part v = k;
    v.base += 1024;
    const PoolShape together({group(8)}, {{"l", 0, {k, v}}}, true);
    CHECK(together.pattern(0, Heads::every())->segments == std::vector<Segment>{{0, 0, 2048}});
    v.base = 0x90000;
    const PoolShape apart({group(8)}, {{"l", 0, {k, v}}}, true);
    CHECK(apart.pattern(0, Heads::every())->segments == std::vector<Segment>{{0, 0, 1024}, {1, 0, 1024}});
    Part near = k;
    near.base += 1024;
    const PoolShape both({group(8)}, {{"l", 0, {k, v}}, {"m", 0, {k, near}}}, true);
    CHECK(both.pattern(0, Heads::every())->segments.size() == 2);
    CHECK(both.pattern(1, Heads::every())->segments.size() == 1);
}

TEST_CASE("layers that differ only in their bases share a class and a pattern") {
    const Part a{0x10000, 4096, {{4096, 1}}, 1, -1}, b{0x80000, 8192, {{4096, 1}}, 1, -1},
        c{0x80000, 4096, {{2048, 1}}, 1, -1};
    const PoolShape shape({group(8)}, {{"a", 0, {a}}, {"b", 0, {b}}, {"c", 0, {c}}}, true);
    CHECK(shape.layer_class(0) == shape.layer_class(1));
    CHECK(shape.layer_class(0) != shape.layer_class(2));
    CHECK(shape.pattern(0, Heads::every()) == shape.pattern(1, Heads::every()));
    CHECK(shape.piece_nbytes(2, Heads::every()) == 2048);
}

TEST_CASE("strides that go down are allowed, strides that overlap are not") {
    CHECK(one_layer({0x10000, -64, {{4, -16}}, 16, -1}).pattern(0, Heads::every())->segments.size() == 4);
    CHECK(one_layer({0x10000, -64, {{4, -16}}, 16, -1}).extent(0, 0) ==
          Extent{0x10000 - 7 * 64 - 48, 0x10010});
    CHECK(has(refusal({0x10000, 64, {{4, 8}}, 16, -1}), "overlap"));
    CHECK(has(refusal({0x10000, 64, {{4, 0}}, 16, -1}), "overlap"));
    CHECK(has(refusal({0x10000, 64, {{2, 48}, {4, 16}}, 16, -1}), "overlap"));
    CHECK(refusal({0x10000, 64, {{1, 0}, {4, 16}}, 16, -1}).empty());
}

TEST_CASE("addresses that don't exist are refused") {
    constexpr auto kMax = std::numeric_limits<std::int64_t>::max();
    constexpr auto kMin = std::numeric_limits<std::int64_t>::min();
    CHECK(has(refusal({100, -64, {}, 64, -1}, 8), "out of memory"));
    CHECK(has(refusal({~std::uintptr_t{0} - 100, 64, {}, 64, -1}, 8), "out of memory"));
    CHECK(refusal({~std::uintptr_t{0} - 64, 64, {}, 64, -1}, 1).empty());
    CHECK(has(refusal({~std::uintptr_t{0} - 63, 64, {}, 64, -1}, 1), "out of memory"));
    CHECK(refusal({448, -64, {}, 64, -1}, 8).empty());
    CHECK(has(refusal({447, -64, {}, 64, -1}, 8), "out of memory"));
    CHECK(has(refusal({0x1000, 1, {{2, kMax}}, 1, -1}), "2^62"));
    CHECK(has(refusal({0x1000, 1, {{2, kMin}}, 1, -1}), "2^62"));
    CHECK(has(refusal({0x1000, kMax, {}, 1, -1}, 1), "2^62"));
    CHECK(has(refusal({0x1000, kMin, {}, 1, -1}, 2), "2^62"));
    CHECK(has(refusal({0x1000, 1 << 30, {}, 1, -1}, std::uint64_t{1} << 35), "2^32"));
    CHECK(has(refusal({0x1000, std::int64_t{1} << 40, {}, 1, -1}, std::uint64_t{1} << 32), "out of memory"));
    CHECK(has(refusal({0x1000, 1, {{~std::uint64_t{0}, kMax}}, 1, -1}), "2^32"));
    CHECK(has(refusal({0x1000, 1, {{1u << 31, kMax}}, 1, -1}), "out of memory"));
    CHECK(has(refusal({0x1000, 1, {}, std::uint64_t{1} << 49, -1}), "2^48"));
}

TEST_CASE("refusals name the layer or the group") {
    const Part good{0x1000, 64, {}, 64, -1};
    CHECK(has(refusal({0x1000, 64, {}, 0, -1}), "layer 'l'"));
    CHECK(has(refusal({0x1000, 64, {{0, 1}}, 1, -1}), "empty"));
    CHECK(has(refusal({0x1000, 64, {}, 1, 0}), "head_axis"));
    CHECK(has(refusal({0x1000, 64, {{4, 1}}, 1, 0}, 8, 2), "4 heads"));
    CHECK(has(refusal({0x1000, 0x200000, {{70000, 2}}, 1, -1}), "scattered"));
    CHECK(has(refusal({0x1000, 0x200000, {{300, 1024}, {300, 2}}, 1, -1}), "scattered"));
    CHECK(has(refusal(good, 0), "no blocks"));
    CHECK_THROWS_AS(PoolShape({}, {{"l", 0, {good}}}, true), std::invalid_argument);
    CHECK_THROWS_AS(PoolShape({group(1)}, {}, true), std::invalid_argument);
    CHECK_THROWS_AS(PoolShape({group(1)}, {{"l", 1, {good}}}, true), std::invalid_argument);
    CHECK_THROWS_AS(PoolShape({group(1)}, {{"l", 0, {}}}, true), std::invalid_argument);
    CHECK_THROWS_AS(PoolShape({group(1), group(1)}, {{"l", 0, {good}}}, true), std::invalid_argument);
    CHECK_THROWS_AS(PoolShape({group(1)}, {{"l", 0, {good}}, {"l", 0, {good}}}, true), std::invalid_argument);
    CHECK_NOTHROW(PoolShape({group(1)}, {{"", 0, {good}}, {"", 0, {good}}}, false));
}

TEST_CASE("a shape must lie within the array that it describes") {
    const auto shape = one_layer({0x1000, 64, {}, 60, -1}, 8);
    const std::uint64_t needs = 7 * 64 + 60;
    CHECK_NOTHROW(shape.require_within(0, 0, 0x1000, needs));
    CHECK_NOTHROW(shape.require_within(0, 0, 0x0ff0, needs + 0x10));
    CHECK_THROWS_AS(shape.require_within(0, 0, 0x1000, needs - 1), std::invalid_argument);
    CHECK_THROWS_AS(shape.require_within(0, 0, 0x1001, needs + 100), std::invalid_argument);
    CHECK_THROWS_AS(shape.require_within(0, 0, 0x0ff0, needs), std::invalid_argument);
    CHECK_THROWS_AS(shape.require_within(0, 0, 0x2000, ~std::uint64_t{0}), std::invalid_argument);
    CHECK_THROWS_AS(shape.require_within(0, 0, 0, 0x1000), std::invalid_argument);
}

TEST_CASE("the cache of patterns is bounded") {
    const std::uint64_t heads = 200, tokens = 1000;
    const auto shape = one_layer(
        {0x10000, 1 << 20, {{tokens, static_cast<std::int64_t>(heads)}, {heads, 1}}, 1, 1}, 8, heads);
    const auto kept = shape.pattern(0, {0, 1, false});
    for (std::uint32_t first = 0; first < heads; ++first)
        for (std::uint32_t count = 1;
             count <= std::min<std::uint32_t>(9, static_cast<std::uint32_t>(heads) - first); ++count)
            REQUIRE(shape.pattern(0, {first, count, false})->segments.size() == tokens);
    CHECK(kept->segments.size() == tokens);
    CHECK(kept.use_count() == 1);  // the cache let go of it
    CHECK(shape.pattern(0, {0, 1, false})->segments == kept->segments);
}

TEST_CASE("random shapes against a walk over every byte") {
    const std::uint64_t seed = std::random_device{}();
    CAPTURE(seed);
    std::mt19937_64 random(seed);
    for (int round = 0; round < 2000; ++round) {
        Layer layer{"l", 0, {}};
        const std::uint64_t heads = 1 + random() % 4;
        const bool sliced = random() % 2;
        const std::size_t parts = 1 + random() % 3;
        for (std::size_t p = 0; p < parts; ++p) {
            // Axes in random order of strides, nested with random padding; some go down.
            Part part{0x100000 + random() % 0x1000,
                      0,
                      {{heads, 0}, {1 + random() % 4, 0}, {1 + random() % 4, 0}},
                      1 + random() % 3,
                      0};
            std::swap(part.axes[0],
                      part.axes[static_cast<std::size_t>(part.head_axis = static_cast<int>(random() % 3))]);
            std::vector<std::size_t> order{0, 1, 2};
            std::shuffle(order.begin(), order.end(), random);
            if (random() % 2) order = {2, 1, 0};
            auto inside = static_cast<std::int64_t>(part.itemsize);
            for (const std::size_t axis : order) {
                const std::int64_t stride = inside +
                                            (random() % 3 == 0 ? static_cast<std::int64_t>(random() % 3) : 0);
                part.axes[axis].stride = random() % 8 == 0 ? -stride : stride;
                inside = stride * static_cast<std::int64_t>(part.axes[axis].count);
            }
            part.block_stride = inside * (random() % 4 == 0 ? 3 : 1);
            if (p != 0 && random() % 2) {
                part = layer.parts[0];
                part.base += static_cast<std::uintptr_t>(static_cast<std::int64_t>(p) *
                                                         (part.block_stride / 3));
            }
            layer.parts.push_back(part);
        }
        const PoolShape shape({group(4, heads)}, {layer}, true);
        const auto first = static_cast<std::uint32_t>(random() % heads);
        const Heads slice{first, 1 + static_cast<std::uint32_t>(random() % (heads - first)), !sliced};
        const auto pattern = shape.pattern(0, slice);
        std::vector<std::uintptr_t> expected;
        for (const Part& part : layer.parts)
            for (const std::int64_t offset : bytes_of(part, slice))
                expected.push_back(part.base + static_cast<std::uint64_t>(offset));
        REQUIRE(addresses(layer, *pattern) == expected);
        REQUIRE(pattern->nbytes == expected.size());
        for (std::size_t i = 1; i < pattern->segments.size();
             ++i) {  // merged as far as can be, and starts add up
            const Segment &a = pattern->segments[i - 1], &b = pattern->segments[i];
            REQUIRE(!(a.part == b.part && a.offset + static_cast<std::int64_t>(a.nbytes) == b.offset));
            REQUIRE(pattern->starts[i] == pattern->starts[i - 1] + a.nbytes);
        }
    }
}

TEST_CASE("what a peer can't be told of a pool is no shape") {
    const auto refusal = [](std::size_t groups, std::size_t layers, std::string group, std::string layer) {
        std::vector<Group> all;
        for (std::size_t i = 0; i < groups; ++i) {
            all.push_back({group + std::to_string(i), 4, 0, true, "", "", "", 0});
        }
        const Part part{0x1000, 64, {}, 64, -1};
        std::vector<Layer> of(layers, Layer{"", 0, {part}});
        of[0].name = std::move(layer);
        try {
            PoolShape(std::move(all), std::move(of), false);
        } catch (const std::invalid_argument& error) {
            return std::string(error.what());
        }
        return std::string();
    };
    CHECK(refusal(1024, 1024, std::string(251, 'g'), std::string(255, 'n')).empty());
    CHECK(refusal(1, 1025, "g", "n").find("1025 layers, the most is 1024") != std::string::npos);
    CHECK(refusal(1025, 1, "g", "n").find("1025 groups, the most is 1024") != std::string::npos);
    CHECK(refusal(1, 1, std::string(255, 'g'), "n").find("256 bytes") != std::string::npos);
    CHECK(refusal(1, 1, "g", std::string(256, 'n')).find("layer 'nnn") != std::string::npos);
    std::string euros;  // the message isn't cut within one
    for (int i = 0; i < 100; ++i) euros += "\u20ac";
    CHECK(refusal(1, 1, "g", euros).find(euros.substr(0, 30) + "...' has a name of 300 bytes") !=
          std::string::npos);
}
