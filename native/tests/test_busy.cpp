// Claims: known layouts, and random ones against a table that knows the owner of every single byte.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "memory/busy.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>

#include "memory/address_set.hpp"
#include "memory/arena.hpp"

using namespace kvt::memory;
using Conflict = BusyTable::Conflict;
using Shape = std::shared_ptr<const PoolShape>;

namespace {

constexpr std::uint64_t kBlocks = 16, kHeads = 4, kTokens = 8, kRow = 32;  // kRow: bytes of a token and head
constexpr std::int64_t kPiece = kHeads * kTokens * kRow;

Group group(std::string name, std::uint64_t num_blocks = kBlocks, std::uint64_t heads = kHeads) {
    return {std::move(name), num_blocks, heads, false, "float16", "HND", "packed", kTokens};
}

Part hnd(std::uintptr_t base, std::int64_t block_stride = kPiece) {
    return {base, block_stride, {{kHeads, kTokens * kRow}, {kTokens, kRow}, {kRow / 2, 2}}, 2, 0};
}

Part nhd(std::uintptr_t base) {
    return {base, kPiece, {{kTokens, kHeads * kRow}, {kHeads, kRow}, {kRow / 2, 2}}, 2, 1};
}

Part opaque(std::uintptr_t base, std::uint64_t nbytes, std::int64_t stride) {
    return {base, stride, {}, nbytes, -1};
}

Shape pool(std::vector<Group> groups, std::vector<Layer> layers) {
    return std::make_shared<const PoolShape>(std::move(groups), std::move(layers), true);
}

// Layers "l0", "l1", ... of one group.
Shape pool_of(std::vector<Part> parts, std::uint64_t num_blocks = kBlocks, std::uint64_t heads = kHeads) {
    std::vector<Layer> layers;
    for (auto& part : parts) layers.push_back({"l" + std::to_string(layers.size()), 0, {part}});
    return pool({group("g", num_blocks, heads)}, std::move(layers));
}

std::shared_ptr<const StreamPlan> plan(const Shape& shape, std::vector<std::uint32_t> layers,
                                       std::vector<Ids> by_group, Heads heads = Heads::every()) {
    std::vector<std::shared_ptr<const Ids>> lists;
    for (auto& list : by_group) lists.push_back(std::make_shared<const Ids>(std::move(list)));
    return std::make_shared<const StreamPlan>(shape, std::move(layers), std::move(lists), heads);
}

std::vector<bool> regular(const std::vector<Shape>& shapes) {
    std::vector<const PoolShape*> pools;
    for (const auto& shape : shapes) pools.push_back(shape.get());
    std::vector<bool> out;
    const ArenaMap map(pools);
    for (const Arena& arena : map.arenas()) out.push_back(arena.regular);
    return out;
}

}  // namespace

TEST_CASE("arenas: what is regular") {
    const std::int64_t size = kPiece * kBlocks;
    SUBCASE("a tensor for each layer") {
        CHECK(regular({pool_of({nhd(0x10000), nhd(0x10000 + size)})}) == std::vector{true});
    }
    SUBCASE("all layers of a block together") {
        CHECK(regular({pool_of({hnd(0x10000, 2 * kPiece), hnd(0x10000 + kPiece, 2 * kPiece)})}) ==
              std::vector{true});
    }
    SUBCASE("layers between the heads of a block") {
        const std::int64_t h = kTokens * kRow;
        std::vector<Part> parts{hnd(0x10010, 2 * kPiece),
                                hnd(static_cast<std::uintptr_t>(0x10010 + h), 2 * kPiece)};
        for (auto& part : parts) part.axes[0].stride = 2 * h;
        CHECK(regular({pool_of(parts)}) == std::vector{true});
    }
    SUBCASE("groups that alias one storage, and one that does not") {
        const auto shape = pool(
            {group("a"), group("b", 8), group("c")},
            {{"a0", 0, {hnd(0x10000)}}, {"b0", 1, {hnd(0x10000)}}, {"c0", 2, {hnd(0x90000)}}});
        CHECK(regular({shape}) == std::vector{true, true});
        CHECK(ArenaMap({shape.get()}).arenas()[0].num_blocks == kBlocks);
    }
    SUBCASE("the same memory with other strides") {
        CHECK(regular({pool_of({hnd(0x10000)}), pool_of({opaque(0x10000 + 2 * kPiece, 64, 64)}),
                       pool_of({hnd(0x90000)})}) == std::vector{false, true});
    }
    SUBCASE("blocks that overlap") {
        CHECK(regular({pool_of({opaque(0x10000, 64, 48)}, 4, 0)}) == std::vector{false});
    }
    SUBCASE("overlaps of one byte, and only over the end of a stride") {
        CHECK(regular({pool_of({opaque(0x1000, 16, 64)}, 4, 0), pool_of({opaque(0x1010, 48, 64)}, 4, 0)}) ==
              std::vector{true, true});
        CHECK(regular({pool_of({opaque(0x1000, 17, 64)}, 4, 0), pool_of({opaque(0x1010, 48, 64)}, 4, 0)}) ==
              std::vector{false});
        CHECK(regular({pool_of({opaque(0x1030, 32, 64)}, 4, 0), pool_of({opaque(0x1050, 32, 64)}, 4, 0)}) ==
              std::vector{true, true});
        CHECK(regular({pool_of({opaque(0x1030, 33, 64)}, 4, 0), pool_of({opaque(0x1050, 32, 64)}, 4, 0)}) ==
              std::vector{false});
    }
    SUBCASE("the same memory, shifted by a block") {
        CHECK(regular({pool_of({hnd(0x10000)}), pool_of({hnd(0x10000 + kPiece)})}) == std::vector{false});
    }
    SUBCASE("next to each other") {
        CHECK(regular({pool_of({hnd(0x10000)}), pool_of({hnd(0x10000 + size)})}) == std::vector{true, true});
    }
}

TEST_CASE("doubles within a call") {
    BusyTable busy;
    const auto shape = pool_of({hnd(0x10000), hnd(0x90000), hnd(0x10000)});  // l2 is l0 again
    busy.add_pool(shape.get());
    auto conflict = busy.claim(1, plan(shape, {0, 1}, {{3, 5, 3}}));
    CHECK(conflict.kind == Conflict::within_call);
    CHECK(conflict.block_id == 3);
    CHECK(conflict.layer == "l0");
    conflict = busy.claim(1, plan(shape, {0, 1, 2}, {{3, 5}}));
    CHECK(conflict.kind == Conflict::within_call);
    CHECK(conflict.layer == "l2");
    CHECK(busy.claim(1, plan(shape, {0, 0}, {{3}})).kind == Conflict::within_call);
    CHECK(busy.claim(1, plan(shape, {0, 1}, {{3, 5}})).kind ==
          Conflict::none);  // refused claims hold nothing
}

TEST_CASE("claims in flight") {
    BusyTable busy;
    const auto shape = pool_of({hnd(0x10000), hnd(0x90000)});
    busy.add_pool(shape.get());
    CHECK_FALSE(busy.claim(1, plan(shape, {0}, {{1, 2, 3}})));
    CHECK_FALSE(busy.claim(2, plan(shape, {1}, {{1, 2, 3}})));
    CHECK_FALSE(busy.claim(3, plan(shape, {0, 1}, {{4, 5}})));
    const auto conflict = busy.claim(4, plan(shape, {1, 0}, {{9, 3}}));
    CHECK(conflict.kind == Conflict::in_flight);
    CHECK((conflict.owner == 1 || conflict.owner == 2));
    CHECK(conflict.block_id == 3);
    CHECK(conflict.layer == (conflict.owner == 1 ? "l0" : "l1"));
    busy.release(1);
    CHECK_FALSE(busy.claim(4, plan(shape, {0}, {{9, 3}})));
    busy.release(2);
    busy.release(3);
    busy.release(4);
    busy.release(4);
    busy.release(77);
    CHECK_FALSE(busy.claim(5, plan(shape, {0, 1}, {{0, 1, 2, 3, 4, 5, 9}})));
}

TEST_CASE("blocks that overlap by one byte") {
    BusyTable busy;
    const auto shape = pool_of({opaque(0x1000, 17, 16)}, 8, 0);
    busy.add_pool(shape.get());
    CHECK_FALSE(busy.claim(1, plan(shape, {0}, {{1, 3}})));
    CHECK(busy.claim(2, plan(shape, {0}, {{2}})).owner == 1);
    const auto conflict = busy.claim(2, plan(shape, {0}, {{6, 5}}));
    CHECK(conflict.kind == Conflict::within_call);
    CHECK((conflict.block_id == 5 || conflict.block_id == 6));
    CHECK_FALSE(busy.claim(2, plan(shape, {0}, {{7, 5}})));
}

TEST_CASE("two sides that fill different heads of the same blocks") {
    for (const Part& part : {hnd(0x10000), nhd(0x10000)})
        for (const bool irregular : {false, true}) {
            BusyTable busy;
            const auto shape = pool_of({part});
            const auto view = pool_of({opaque(0x10000, 1000, 1000)}, 4, 0);
            busy.add_pool(shape.get());
            if (irregular) busy.add_pool(view.get());
            CHECK_FALSE(busy.claim(1, plan(shape, {0}, {{1, 2}}, {0, 2, false})));
            CHECK_FALSE(busy.claim(2, plan(shape, {0}, {{2, 1}}, {2, 1, false})));
            CHECK(busy.claim(3, plan(shape, {0}, {{2}}, {2, 2, false})).owner == 2);
            CHECK(busy.claim(3, plan(shape, {0}, {{2}}, {1, 1, false})).owner == 1);
            CHECK(busy.claim(3, plan(shape, {0}, {{2}})).kind == Conflict::in_flight);
            CHECK_FALSE(busy.claim(3, plan(shape, {0}, {{1, 2}}, {3, 1, false})));
        }
}

TEST_CASE("hybrid models: groups whose layers are the same memory") {
    BusyTable busy;
    const auto shape = pool({group("full"), group("window")}, {{"f0", 0, {hnd(0x10000)}},
                                                               {"w0", 1, {hnd(0x10000)}},
                                                               {"f1", 0, {hnd(0x90000)}},
                                                               {"w1", 1, {hnd(0x90000)}}});
    busy.add_pool(shape.get());
    CHECK_FALSE(busy.claim(1, plan(shape, {0, 1, 2, 3}, {{1, 2}, {3, 4}})));
    const auto conflict = busy.claim(2, plan(shape, {1}, {{}, {2}}));
    CHECK(conflict.owner == 1);
    CHECK(conflict.layer == "w0");
    CHECK(busy.claim(2, plan(shape, {0, 1}, {{7}, {6, 7}})).kind == Conflict::within_call);
    CHECK_FALSE(busy.claim(2, plan(shape, {0, 3}, {{7}, {6, 7}})));  // the same block, other layers of it
}

TEST_CASE("a pool that is added over live claims, and leaves again") {
    BusyTable busy;
    const auto first = pool_of({hnd(0x10000), hnd(0x90000)});
    busy.add_pool(first.get());
    CHECK_FALSE(busy.claim(1, plan(first, {0, 1}, {{1, 2}})));
    const auto second = pool_of({opaque(0x10000 + kPiece - 64, 64, 64)}, 64,
                                0);  // its block 1 is where first's block 1 begins
    busy.add_pool(second.get());
    CHECK_FALSE(busy.claim(2, plan(second, {0}, {{0}})));
    CHECK(busy.claim(3, plan(second, {0}, {{1}})).owner == 1);
    CHECK(busy.claim(3, plan(first, {0}, {{0}})).owner == 2);
    CHECK(busy.claim(3, plan(first, {1}, {{2}})).owner == 1);
    CHECK_FALSE(busy.claim(3, plan(first, {1}, {{0}})));
    busy.remove_pool(second.get());
    CHECK(busy.claim(4, plan(first, {0}, {{0}})).owner == 2);  // still in flight
    CHECK_THROWS_AS(busy.claim(4, plan(second, {0}, {{5}})), std::logic_error);
    busy.release(2);
    CHECK_FALSE(busy.claim(4, plan(first, {0}, {{0}})));
    busy.release(1);
    CHECK_FALSE(busy.claim(5, plan(first, {0}, {{1, 2}})));
    CHECK_THROWS_AS(busy.add_pool(first.get()), std::logic_error);
}

TEST_CASE("misuse of a call comes before what others do") {
    BusyTable busy;
    const auto shape = pool({group("a"), group("b")}, {{"a", 0, {hnd(0x10000)}}, {"b", 1, {hnd(0x90000)}}});
    busy.add_pool(shape.get());
    CHECK_FALSE(busy.claim(1, plan(shape, {0, 1}, {{1}, {1}})));
    const auto conflict = busy.claim(2, plan(shape, {0, 1}, {{1}, {4, 4}}));
    CHECK(conflict.kind == Conflict::within_call);
    CHECK(conflict.block_id == 4);
    CHECK(conflict.layer == "b");
}

namespace {

// Every byte of a plan, and the (id, layer) pairs that hold it.
std::multimap<std::uintptr_t, std::pair<std::uint32_t, std::string>> bytes_of(const StreamPlan& of) {
    std::multimap<std::uintptr_t, std::pair<std::uint32_t, std::string>> bytes;
    for (std::size_t i = 0; i < of.layer_count(); ++i) {
        const Layer& layer = of.shape()->layers()[of.layer(i)];
        const auto pattern = of.shape()->pattern(of.layer(i), of.heads());
        for (std::uint64_t p = 0; p < of.positions(i); ++p)
            for (const Segment& s : pattern->segments)
                for (std::uint64_t k = 0; k < s.nbytes; ++k)
                    bytes.emplace(
                        layer.parts[s.part].base +
                            of.block_id(i, p) * static_cast<std::uint64_t>(layer.parts[s.part].block_stride) +
                            static_cast<std::uint64_t>(s.offset) + k,
                        std::pair(of.block_id(i, p), layer.name));
    }
    return bytes;
}

struct Reference {
    std::map<std::uint64_t, std::set<std::uintptr_t>> live;

    // Whether what the table said of this claim is right.
    bool agrees(const Conflict& said, const StreamPlan& of) const {
        const auto bytes = bytes_of(of);
        bool doubled = false;
        for (auto at = bytes.begin(); at != bytes.end(); ++at)
            doubled = doubled || bytes.count(at->first) > 1;
        if (doubled) return said.kind == Conflict::within_call;
        bool clash = false, named_rightly = false;
        for (const auto& [owner, taken] : live)
            for (const auto& [address, piece] : bytes)
                if (taken.contains(address)) {
                    clash = true;
                    named_rightly = named_rightly || (owner == said.owner && piece.first == said.block_id &&
                                                      piece.second == said.layer);
                }
        if (!clash) return said.kind == Conflict::none;
        return said.kind == Conflict::in_flight && named_rightly;
    }
    void add(std::uint64_t owner, const StreamPlan& of) {
        for (const auto& [address, piece] : bytes_of(of)) live[owner].insert(address);
    }
};

// Small parts in little memory, so that they often meet; strides and bases often equal, so that arenas are
// often regular.
Part random_part(std::mt19937_64& random, std::uint64_t heads) {
    const auto h = static_cast<std::int64_t>(heads);
    Part part{0x1000 + 4 * h * (random() % 4 ? 12 * (random() % 6) : random() % 30), 4 * h, {}, 2, 0};
    if (random() % 2)
        part.axes = {{heads, 4}, {2, 2}};
    else
        part.axes = {{2, 2 * h}, {heads, 2}}, part.head_axis = 1;
    if (random() % 3 == 0) part.block_stride *= 2;
    if (random() % 6 == 0) part.base += 2;
    if (random() % 12 == 0) part.block_stride = -part.block_stride;
    if (random() % 12 == 0) part.block_stride -= 2;
    if (random() % 12 == 0) part.block_stride = 0;
    return part;
}

Shape random_pool(std::mt19937_64& random, const std::vector<Shape>& others) {
    const std::uint64_t heads = 1 + random() % 3;
    std::vector<Group> groups;
    for (std::uint64_t g = 0; g < 1 + random() % 2; ++g)
        groups.push_back(group("g" + std::to_string(g), 3 + random() % 5, heads));
    std::vector<Layer> layers;
    for (std::uint64_t l = 0; l < 1 + random() % 4; ++l) {
        Layer layer{"l" + std::to_string(l),
                    static_cast<std::uint32_t>(random() % groups.size()),
                    {random_part(random, heads)}};
        if (random() % 4 == 0) layer.parts.push_back(random_part(random, heads));
        if (!layers.empty() && random() % 3 == 0) layer.parts = layers[random() % layers.size()].parts;
        if (!others.empty() && random() % 4 == 0) {
            const PoolShape& other = *others[random() % others.size()];
            if (other.groups()[0].num_heads == heads) layer.parts = other.layers()[0].parts;
        }
        layers.push_back(layer);
    }
    return pool(std::move(groups), std::move(layers));
}

std::shared_ptr<const StreamPlan> random_plan(std::mt19937_64& random, const Shape& shape) {
    std::vector<std::uint32_t> layers;
    for (std::uint32_t l = 0; l < shape->layers().size(); ++l)
        if (random() % 2) layers.push_back(l);
    std::shuffle(layers.begin(), layers.end(), random);
    std::vector<Ids> by_group;
    for (const Group& of : shape->groups()) {
        Ids all(of.num_blocks);
        std::iota(all.begin(), all.end(), std::uint32_t{0});
        std::shuffle(all.begin(), all.end(), random);
        all.resize(random() % 3);
        if (all.size() == 2 && random() % 16 == 0) all[1] = all[0];
        by_group.push_back(all);
    }
    const auto heads = static_cast<std::uint32_t>(shape->groups()[0].num_heads),
               first = static_cast<std::uint32_t>(random() % heads);
    return plan(shape, layers, by_group,
                {first, 1 + static_cast<std::uint32_t>(random() % (heads - first)), random() % 3 == 0});
}

struct Tally {
    int none = 0, within = 0, in_flight = 0, regular = 0, irregular = 0;
};

void random_history(std::mt19937_64& random, Tally& tally) {
    BusyTable busy;
    Reference reference;
    std::vector<Shape> pools;
    std::uint64_t next_owner = 1;
    for (int step = 0; step < 60; ++step) {
        const auto what = random() % 12;
        if (pools.empty() || (what == 0 && pools.size() < 5)) {
            pools.push_back(random_pool(random, pools));
            busy.add_pool(pools.back().get());
            for (const bool is_regular : regular(pools)) ++(is_regular ? tally.regular : tally.irregular);
        } else if (what == 1) {
            const auto at = pools.begin() + static_cast<long>(random() % pools.size());
            busy.remove_pool(at->get());
            pools.erase(at);
        } else if (what < 5 && !reference.live.empty()) {
            auto at = reference.live.begin();
            std::advance(at, random() % reference.live.size());
            busy.release(at->first);
            reference.live.erase(at);
        } else {
            const auto wanted = random_plan(random, pools[random() % pools.size()]);
            const std::uint64_t owner = next_owner++;
            const Conflict said = busy.claim(owner, wanted);
            REQUIRE(reference.agrees(said, *wanted));
            if (!said) reference.add(owner, *wanted);
            ++(said.kind == Conflict::none          ? tally.none
               : said.kind == Conflict::within_call ? tally.within
                                                    : tally.in_flight);
        }
    }
}

}  // namespace

TEST_CASE("random pools, claims and releases against a table of bytes") {
    const std::uint64_t seed = std::random_device{}();
    CAPTURE(seed);
    std::mt19937_64 random(seed);
    Tally tally;
    for (int round = 0; round < 1000; ++round) random_history(random, tally);
    MESSAGE("claims: ", tally.none, " granted, ", tally.within, " doubled, ", tally.in_flight,
            " in flight; arenas: ", tally.regular, " regular, ", tally.irregular, " not");
    for (const int count : {tally.none, tally.within, tally.in_flight, tally.regular, tally.irregular})
        CHECK(count > 1000);
}

TEST_CASE("sets of addresses: the first common one") {
    const std::uint64_t seed = std::random_device{}();
    CAPTURE(seed);
    std::mt19937_64 random(seed);
    const auto shape = pool_of({opaque(0x1000, 3, 4)}, 4096, 0);
    for (std::size_t round = 0; round < 500; ++round) {
        std::set<std::uint32_t> a, b;
        while (a.size() < 1 + round % 5) a.insert(static_cast<std::uint32_t>(random() % 4096));
        while (b.size() < 200) b.insert(static_cast<std::uint32_t>(random() % 4096));
        std::vector<std::uint32_t> both;
        std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
        std::optional<std::uintptr_t> doubled;
        const auto pa = plan(shape, {0}, {Ids(a.begin(), a.end())}),
                   pb = plan(shape, {0}, {Ids(b.rbegin(), b.rend())});
        const AddressSet x(*pa, {0}, &doubled), y(*pb, {0}, &doubled);
        REQUIRE(!doubled);
        const auto common = random() % 2 ? x.first_common(y) : y.first_common(x);
        REQUIRE(common.has_value() == !both.empty());
        if (common) REQUIRE(*common == 0x1000 + 4 * both[0]);
        if (common) REQUIRE(find_piece(*pa, {0}, *common)->block_id == both[0]);
    }
}
