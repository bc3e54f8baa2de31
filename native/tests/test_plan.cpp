// Plans against a reference that writes down the address of every byte of the stream.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "memory/plan.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>

using namespace kvt::memory;

namespace {

Group group(std::string name, std::uint64_t num_blocks, std::uint64_t num_heads = 0) {
    return {std::move(name), num_blocks, num_heads, false, "float16", "NHD", "split", 16};
}

std::shared_ptr<const Ids> ids(Ids list) { return std::make_shared<const Ids>(std::move(list)); }

struct Byte {
    std::uintptr_t address;
    std::uint32_t group, id;
};

// Every byte of the stream, in order.
std::vector<Byte> bytes_of(const StreamPlan& plan, const std::vector<std::uint32_t>& layers) {
    std::vector<Byte> bytes;
    const PoolShape& shape = *plan.shape();
    for (const std::uint32_t l : layers) {
        const Layer& layer = shape.layers()[l];
        for (const std::uint32_t id : plan.ids(layer.group))
            for (const Segment& s : shape.pattern(l, plan.heads())->segments)
                for (std::uint64_t i = 0; i < s.nbytes; ++i) {
                    const Part& part = layer.parts[s.part];
                    bytes.push_back({part.base + id * static_cast<std::uint64_t>(part.block_stride) +
                                         static_cast<std::uint64_t>(s.offset) + i,
                                     layer.group, id});
                }
    }
    return bytes;
}

std::vector<std::uintptr_t> expand(const iovec* runs, std::size_t n) {
    std::vector<std::uintptr_t> out;
    for (std::size_t i = 0; i < n; ++i)
        for (std::size_t k = 0; k < runs[i].iov_len; ++k)
            out.push_back(reinterpret_cast<std::uintptr_t>(runs[i].iov_base) + k);
    return out;
}

struct Case {
    std::shared_ptr<const PoolShape> shape;
    std::vector<std::uint32_t> layers;
    std::vector<std::shared_ptr<const Ids>> by_group;
    Heads heads;
    StreamPlan plan() const { return {shape, layers, by_group, heads}; }
};

Part random_part(std::mt19937_64& random, std::uint64_t heads) {
    const auto tokens = 1 + random() % 4, width = 1 + random() % 3;
    const auto h = static_cast<std::int64_t>(heads), t = static_cast<std::int64_t>(tokens),
               w = static_cast<std::int64_t>(width);
    Part part{0x100000 + random() % 0x4000, h * t * w, {}, width, 0};
    if (random() % 2) {  // HND
        part.axes = {{heads, t * w}, {tokens, w}};
    } else {
        part.axes = {{tokens, h * w}, {heads, w}};
        part.head_axis = 1;
    }
    if (random() % 4 == 0) part.block_stride += 5;
    if (random() % 8 == 0) part.block_stride = -part.block_stride;
    return part;
}

Case random_case(std::mt19937_64& random) {
    const std::uint64_t heads = 1 + random() % 4;
    std::vector<Group> groups;
    std::vector<Layer> layers;
    Case made;
    for (std::uint32_t g = 0; g < 1 + random() % 3; ++g) {
        groups.push_back(group("g" + std::to_string(g), 4 + random() % 8, heads));
        Ids list(random() % 7);
        for (auto& id : list) id = static_cast<std::uint32_t>(random() % groups.back().num_blocks);
        if (random() % 3 == 0) std::sort(list.begin(), list.end());  // neighbours
        made.by_group.push_back(random() % 10 ? ids(list) : nullptr);
    }
    for (std::uint32_t l = 0; l < 1 + random() % 6; ++l) {
        Layer layer{"l" + std::to_string(l),
                    static_cast<std::uint32_t>(random() % groups.size()),
                    {random_part(random, heads)}};
        if (random() % 2) layer.parts.push_back(random_part(random, heads));
        if (!layers.empty() && random() % 2) {  // the same class elsewhere
            layer.parts = layers.back().parts;
            for (Part& part : layer.parts) part.base += 0x10000;
        }
        layers.push_back(layer);
        if (random() % 5) made.layers.push_back(l);
    }
    std::shuffle(made.layers.begin(), made.layers.end(), random);
    const auto first = static_cast<std::uint32_t>(random() % heads);
    made.heads = {first, 1 + static_cast<std::uint32_t>(random() % (heads - first)), random() % 2 == 0};
    made.shape = std::make_shared<const PoolShape>(std::move(groups), std::move(layers), true);
    return made;
}

}  // namespace

TEST_CASE("the order of the stream: layers, then ids by position, then segments") {
    const Part k{0x1000, 100, {}, 100, -1}, v{0x9000, 100, {}, 100, -1}, far{0x20000, 128, {}, 100, -1};
    auto shape = std::make_shared<const PoolShape>(
        std::vector{group("g", 8)}, std::vector<Layer>{{"a", 0, {k, v}}, {"b", 0, {far}}}, true);
    const StreamPlan plan(shape, {1, 0}, {ids({3, 1, 2})}, Heads::every());
    CHECK(plan.nbytes() == 900);
    CHECK(plan.pieces() == 6);
    CHECK(plan.blocks() == 3);
    CHECK(plan.layer_begin(1) == 300);
    CHECK(plan.layer_end(1) == 900);
    CHECK(plan.layer_at(299) == 0);
    CHECK(plan.layer_at(300) == 1);
    CHECK(plan.layer_at(900) == 2);
    CHECK(plan.piece(1, 1) == StreamRange{500, 700});
    CHECK(plan.block_id(1, 1) == 1);
    iovec out[16];
    std::size_t count = 0;
    CHECK(plan.runs(0, ~std::uint64_t{0}, out, 16, count) == 900);
    REQUIRE(count == 9);
    CHECK(out[0].iov_base == reinterpret_cast<void*>(0x20000 + 3 * 128));
    CHECK(out[3].iov_base == reinterpret_cast<void*>(0x1000 + 3 * 100));
    CHECK(out[4].iov_base == reinterpret_cast<void*>(0x9000 + 3 * 100));
    CHECK(plan.runs(900, 1000, out, 16, count) == 900);
    CHECK(count == 0);
    CHECK(plan.runs(10, 10, out, 16, count) == 10);
    CHECK(plan.runs(10, 50, out, 0, count) == 10);
}

TEST_CASE("neighbours merge, across blocks and layers") {
    const Part a{0x10000, 64, {}, 64, -1}, b{0x10000 + 8 * 64, 64, {}, 64, -1};
    auto shape = std::make_shared<const PoolShape>(std::vector{group("g", 8)},
                                                   std::vector<Layer>{{"a", 0, {a}}, {"b", 0, {b}}}, true);
    const StreamPlan plan(shape, {0, 1}, {ids({0, 1, 2, 3, 4, 5, 6, 7})}, Heads::every());
    iovec out[2];
    std::size_t count = 0;
    CHECK(plan.runs(0, plan.nbytes(), out, 2, count) == 16 * 64);
    REQUIRE(count == 1);
    CHECK(out[0].iov_len == 16 * 64);
    CHECK(plan.runs(100, 700, out, 1, count) == 700);
    CHECK(out[0].iov_base == reinterpret_cast<void*>(0x10000 + 100));
}

TEST_CASE("what a plan refuses") {
    auto shape = std::make_shared<const PoolShape>(
        std::vector{group("full", 8, 2), group("window", 4)},
        std::vector<Layer>{{"a", 0, {{0x1000, 64, {{2, 32}, {32, 1}}, 1, 0}}},
                           {"b", 1, {{0x9000, 64, {}, 64, -1}}}},
        true);
    auto message = [&](std::vector<std::uint32_t> layers, std::vector<std::shared_ptr<const Ids>> by_group) {
        try {
            StreamPlan(shape, std::move(layers), std::move(by_group), Heads::every());
        } catch (const std::out_of_range& error) {
            return std::string(error.what());
        }
        return std::string();
    };
    CHECK(message({0, 1}, {ids({7}), ids({3})}).empty());
    CHECK(message({0, 1}, {ids({7}), ids({3, 4})}) ==
          "group 'window' has no block 4 (position 1): it has num_blocks=4");
    CHECK(message({0}, {ids({0xffffffff}), nullptr}).find("4294967295") != std::string::npos);
    CHECK(message({2}, {ids({0}), nullptr}).find("no layer 2") != std::string::npos);
    CHECK_THROWS_AS(StreamPlan(shape, {0}, {ids({0})}, Heads::every()), std::invalid_argument);
    CHECK_THROWS_AS(StreamPlan(shape, {0}, {ids({0}), nullptr}, Heads{1, 2, false}), std::invalid_argument);
    CHECK_THROWS_AS(StreamPlan(shape, {1}, {nullptr, ids({0})}, Heads{0, 1, false}), std::invalid_argument);
    CHECK(StreamPlan(shape, {0}, {ids({0}), nullptr}, Heads{1, 1, false}).nbytes() == 32);
    CHECK(StreamPlan(shape, {}, {ids({0}), nullptr}, Heads::every()).nbytes() == 0);
    CHECK(StreamPlan(shape, {0, 1}, {nullptr, nullptr}, Heads::every()).layer_at(0) == 2);
}

TEST_CASE("2^31 pieces at most, and bytes that fit 63 bits") {
    const Part part{0x1000, 1, {}, 1, -1};
    std::vector<Layer> layers(1024, Layer{"", 0, {part}});
    auto shape = std::make_shared<const PoolShape>(std::vector{group("g", 8)}, layers, false);
    std::vector<std::uint32_t> all(1024);
    for (std::uint32_t i = 0; i < 1024; ++i) all[i] = i;
    CHECK(StreamPlan(shape, all, {ids(Ids(1u << 21, 1))}, Heads::every()).pieces() == kMaxPieces);
    CHECK_THROWS_AS(StreamPlan(shape, all, {ids(Ids((1u << 21) + 1, 1))}, Heads::every()), std::length_error);
    const Part huge{0x1000, 1, {}, std::uint64_t{1} << 47, -1};
    auto big = std::make_shared<const PoolShape>(std::vector{group("g", 8)},
                                                 std::vector<Layer>{{"", 0, {huge}}}, false);
    CHECK(StreamPlan(big, {0}, {ids(Ids(65535, 1))}, Heads::every()).nbytes() == std::uint64_t{65535} << 47);
    CHECK_THROWS_AS(StreamPlan(big, {0}, {ids(Ids(65536, 1))}, Heads::every()), std::length_error);
}

TEST_CASE("random plans: runs from any offset, in any portions") {
    const std::uint64_t seed = std::random_device{}();
    CAPTURE(seed);
    std::mt19937_64 random(seed);
    for (int round = 0; round < 1500; ++round) {
        const Case made = random_case(random);
        const StreamPlan plan = random() % 4
                                    ? made.plan()
                                    : Case{made.shape, {}, made.by_group, made.heads}.plan().reordered(
                                          made.layers);
        const auto bytes = bytes_of(plan, made.layers);
        REQUIRE(plan.nbytes() == bytes.size());
        for (int query = 0; query < 8; ++query) {
            const std::uint64_t begin = random() % (bytes.size() + 1),
                                end = begin + random() % (bytes.size() + 2 - begin);
            const std::uint64_t stop = std::min<std::uint64_t>(end, bytes.size());
            const std::size_t max = 1 + random() % 9;
            std::vector<std::uintptr_t> got, expected;
            for (std::uint64_t i = begin; i < stop; ++i) expected.push_back(bytes[i].address);
            for (std::uint64_t at = begin; at < stop;) {
                iovec out[9];
                std::size_t count = 0;
                const std::uint64_t reached = plan.runs(at, end, out, max, count);
                const auto part = expand(out, count);
                REQUIRE(reached > at);
                REQUIRE(part.size() == reached - at);
                if (reached < stop) REQUIRE(count == max);
                for (std::size_t i = 1; i < count; ++i)
                    REQUIRE(static_cast<char*>(out[i - 1].iov_base) + out[i - 1].iov_len != out[i].iov_base);
                got.insert(got.end(), part.begin(), part.end());
                at = reached;
            }
            REQUIRE(got == expected);
        }
    }
}

TEST_CASE("random plans: blocks of a range, and what verified ranges make of blocks") {
    const std::uint64_t seed = std::random_device{}();
    CAPTURE(seed);
    std::mt19937_64 random(seed);
    for (int round = 0; round < 1500; ++round) {
        const Case made = random_case(random);
        const StreamPlan plan = made.plan();
        const auto bytes = bytes_of(plan, made.layers);
        std::vector<StreamRange> verified;
        for (std::uint64_t at = 0; at < bytes.size();) {
            const std::uint64_t end = std::min<std::uint64_t>(at + 1 + random() % 40, bytes.size());
            if (random() % 4) verified.push_back({at, end});
            at = end;
        }
        std::vector<bool> good(bytes.size());
        for (const auto& r : verified)
            std::fill(good.begin() + static_cast<long>(r.begin), good.begin() + static_cast<long>(r.end),
                      true);
        std::map<std::string, std::set<std::uint32_t>> all, bad, touched;
        for (std::uint64_t i = 0; i < bytes.size(); ++i) {
            const std::string& name = made.shape->groups()[bytes[i].group].name;
            all[name].insert(bytes[i].id);
            (good[i] ? touched : bad)[name].insert(bytes[i].id);
        }
        std::map<std::string, std::set<std::uint32_t>> got_all, got_bad, got_touched;
        for (const auto& of : plan.outcome(verified)) {
            got_all[of.group].insert(of.sealed.begin(), of.sealed.end());
            if (!of.poisoned.empty()) got_bad[of.group].insert(of.poisoned.begin(), of.poisoned.end());
            got_all[of.group].insert(of.poisoned.begin(), of.poisoned.end());
            REQUIRE(got_all[of.group].size() == of.sealed.size() + of.poisoned.size());  // each once
        }
        for (const auto& of : plan.blocks_touching(verified)) {
            REQUIRE_FALSE(got_touched.contains(of.group));
            got_touched[of.group].insert(of.ids.begin(), of.ids.end());
            REQUIRE(got_touched[of.group].size() == of.ids.size());  // each once
        }
        REQUIRE(got_all == all);
        REQUIRE(got_bad == bad);
        REQUIRE(got_touched == touched);
    }
}

TEST_CASE("gather and scatter") {
    std::vector<std::byte> memory(1000), buffer(300), back(1000);
    for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<std::byte>(i * 7);
    const iovec from[] = {
        {memory.data() + 900, 100}, {memory.data() + 3, 1}, {memory.data(), 0}, {memory.data() + 100, 199}};
    iovec to[4];
    for (int i = 0; i < 4; ++i)
        to[i] = {back.data() + (static_cast<std::byte*>(from[i].iov_base) - memory.data()), from[i].iov_len};
    gather(from, 4, buffer.data());
    CHECK(buffer[0] == memory[900]);
    CHECK(buffer[100] == memory[3]);
    CHECK(buffer[101] == memory[100]);
    scatter(buffer.data(), to, 4);
    for (std::size_t i = 0; i < 1000; ++i) {
        const bool within = i >= 900 || i == 3 || (i >= 100 && i < 299);
        REQUIRE(back[i] == (within ? memory[i] : std::byte{0}));
    }
}
