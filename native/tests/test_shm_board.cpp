// The board against a model; what a hostile owner may write there; and the race that its fence decides.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "backends/shm_board.hpp"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>

#include "protocol/bytes.hpp"

using namespace kvt;
using namespace kvt::backends;

namespace {

Fd duplicate(int fd) { return Fd(::fcntl(fd, F_DUPFD_CLOEXEC, 0)); }

PeerBoard reader_of(const OwnBoard& own) {
    return PeerBoard::open(duplicate(own.segment().fd()), own.segment().size());
}

GrantToken token_of(std::uint64_t low, std::uint64_t high = 0) {
    GrantToken token;
    std::memcpy(token.data(), &low, 8);
    std::memcpy(token.data() + 8, &high, 8);
    return token;
}

using Ids = std::vector<std::uint32_t>;
using Groups = std::map<std::uint16_t, Ids>;

std::optional<GrantPlace> publish(OwnBoard& own, const GrantToken& token, std::uint32_t pool,
                                  const Groups& groups) {
    std::vector<GroupIds> spans;
    for (const auto& [group, ids] : groups) {
        spans.push_back({group, ids});
    }
    return own.publish(token, pool, spans);
}

Groups groups_of(const GrantCopy& copy) {
    Groups groups;
    for (const auto& [group, begin, count] : copy.groups) {
        groups[group] = Ids(copy.ids.begin() + begin, copy.ids.begin() + begin + count);
    }
    return groups;
}

BoardMemory& memory_of(const OwnBoard& own) { return *reinterpret_cast<BoardMemory*>(own.segment().data()); }

struct Model {
    struct Entry {
        GrantToken token;
        GrantPlace place;
        std::uint32_t pool;
        Groups groups;
    };
    OwnBoard own;
    PeerBoard reader = reader_of(own);
    std::vector<Entry> live;
    std::mt19937_64 random{7};

    Groups some_groups() {
        Groups groups;
        for (std::size_t i = random() % (kGrantGroups + 1); i > 0; --i) {
            Ids& ids = groups[static_cast<std::uint16_t>(random())];
            ids.resize(random() % (random() % 8 == 0 ? 20'000 : 200));
            std::generate(ids.begin(), ids.end(), [this] { return static_cast<std::uint32_t>(random()); });
        }
        return groups;
    }
    bool add() {
        Entry entry{token_of(random(), random()), {}, static_cast<std::uint32_t>(random()), some_groups()};
        const auto place = publish(own, entry.token, entry.pool, entry.groups);
        if (place) {
            entry.place = *place;
            live.push_back(std::move(entry));
        }
        return place.has_value();
    }
    void end_one() {
        std::swap(live[random() % live.size()], live.back());
        const Entry ended = std::move(live.back());
        live.pop_back();
        own.end(ended.place);
        own.end(ended.place);  // a second end is nothing
        GrantCopy copy;
        CHECK_FALSE(reader.find(ended.token, copy));
        CHECK_FALSE(reader.still(ended.place));
    }
    void check() {
        GrantCopy copy;
        for (const Entry& entry : live) {
            REQUIRE(reader.find(entry.token, copy));
            REQUIRE(copy.pool == entry.pool);
            REQUIRE_FALSE(copy.every_block);
            REQUIRE(groups_of(copy) == entry.groups);
            REQUIRE(reader.still(copy.place));
        }
    }
};

}  // namespace

TEST_CASE("what is published is found, what has ended isn't, through any sequence of both") {
    Model model;
    std::size_t refused = 0;
    for (int step = 0; step < 6000; ++step) {
        if (model.live.empty() || model.random() % 5 < 3) {
            refused += model.add() ? 0 : 1;
        } else {
            model.end_one();
        }
        if (step % 500 == 0) {
            model.check();
        }
    }
    model.check();
    CHECK(refused > 0);  // of room for ids
    CHECK(model.live.size() > 200);
    while (!model.live.empty()) {
        model.end_one();
    }
    CHECK(publish(model.own, token_of(1), 0, {{0, Ids(kBoardIds)}}));  // all room has come back, in one piece
}

TEST_CASE("what doesn't fit is left to asking") {
    OwnBoard own;
    const PeerBoard reader = reader_of(own);
    CHECK_FALSE(publish(own, token_of(1), 0, {{0, {}}, {1, {}}, {2, {}}, {3, {}}, {4, {}}}));
    CHECK_FALSE(publish(own, token_of(1), 0, {{0, Ids(kBoardIds + 1)}}));
    std::vector<GrantPlace> places;
    for (std::uint64_t i = 0; i < kGrantProbes; ++i) {  // all of them want the same slot
        places.push_back(publish(own, token_of(kBoardGrants - 2, i), 0, {{0, {1}}}).value());
    }
    CHECK_FALSE(publish(own, token_of(kBoardGrants - 2, 99), 0, {{0, {1}}}));
    CHECK_FALSE(own.publish_every_block(token_of(kBoardGrants - 2, 99), 0));
    own.end(places[3]);
    CHECK_FALSE(publish(own, token_of(kBoardGrants - 2, 5), 0, {{0, {1}}}));  // that token stands further on
    CHECK(publish(own, token_of(kBoardGrants - 2, 99), 0, {{0, {1}}}));
    GrantCopy copy;
    CHECK(reader.find(token_of(kBoardGrants - 2, 99), copy));
    CHECK(reader.find(token_of(kBoardGrants - 2, 7), copy));
    CHECK(copy.place.slot == 5);  // past the end of the table
    CHECK_FALSE(reader.find(token_of(kBoardGrants - 2, 3), copy));
}

TEST_CASE("a grant of all of a pool has no ids") {
    OwnBoard own;
    const PeerBoard reader = reader_of(own);
    const auto place = own.publish_every_block(token_of(3), 77);
    REQUIRE(place);
    GrantCopy copy;
    copy.ids = {1, 2, 3};  // of the last one
    REQUIRE(reader.find(token_of(3), copy));
    CHECK(copy.pool == 77);
    CHECK(copy.every_block);
    CHECK((copy.ids.empty() && copy.groups.empty()));
    own.end(*place);
    OwnBoard::fence();
    CHECK_FALSE(reader.still(copy.place));
}

TEST_CASE("a guard holds until its end; the next one in its place is another") {
    OwnBoard own;
    const PeerBoard reader = reader_of(own);
    std::set<std::uint32_t> indexes;
    std::vector<Guard> guards;
    while (const auto guard = own.acquire()) {
        indexes.insert(guard->index);
        guards.push_back(*guard);
    }
    CHECK(indexes.size() == kBoardGuards);
    const Guard first = guards[0];
    CHECK((reader.live(first) && reader.still(first)));
    own.end(first);
    own.end(first);
    OwnBoard::fence();
    CHECK_FALSE((reader.live(first) || reader.still(first)));
    const auto next = own.acquire();
    REQUIRE(next);
    CHECK(next->index == first.index);
    CHECK((reader.still(*next) && !reader.still(first)));
    own.end(first);  // late
    CHECK(reader.still(*next));
    CHECK_FALSE(own.acquire());
}

TEST_CASE("M18: a hostile board is a violation, and nothing beyond it is read") {
    OwnBoard own;
    const PeerBoard reader = reader_of(own);
    const auto place = publish(own, token_of(9), 1, {{0, {5, 6}}});
    REQUIRE(place);
    BoardMemory::GrantSlot& slot = memory_of(own).grants[place->slot];
    const auto said = [&](std::uint64_t what, std::uint64_t group) {
        slot.what.store(what);
        slot.groups[0].store(group);
        GrantCopy copy;
        CHECK_THROWS_AS(reader.find(token_of(9), copy), protocol::Violation);
        CHECK(copy.ids.size() <= kBoardIds);
    };
    constexpr std::uint64_t kOneGroup = 2;
    said(kOneGroup, std::uint64_t{kBoardIds} << 24 | 1);
    said(kOneGroup, std::uint64_t{0xffffff} << 24 | 0xffffff);
    said(kOneGroup, std::uint64_t{0xffffff} << 24);
    said(kOneGroup, kBoardIds + 1);
    slot.groups[1].store(1);
    said(2 * kOneGroup, kBoardIds);  // and one more
    said(2 * (kGrantGroups + 1), 0);
    said(0xffffffff, 0);
    said(kOneGroup | 1, 0);  // groups, and every block
    for (const std::uint32_t index : {kBoardGuards, ~0u}) {
        CHECK_THROWS_AS(reader.still(Guard{index, 0}), protocol::Violation);
        CHECK_THROWS_AS(reader.live(Guard{index, 0}), protocol::Violation);
        CHECK_THROWS_AS(reader.still(GrantPlace{index, 0}), protocol::Violation);
    }
}

TEST_CASE("bytes at random in place of a board: found or not or a violation, never more") {
    OwnBoard own;
    const PeerBoard reader = reader_of(own);
    std::mt19937_64 random(3);
    auto* const words = reinterpret_cast<std::uint64_t*>(memory_of(own).grants);
    GrantCopy copy;
    std::size_t violations = 0;
    for (int i = 0; i < 20'000; ++i) {
        const std::size_t slot = random() % kBoardGrants;
        for (std::size_t word = 0; word < 8; ++word) {
            words[8 * slot + word] = random();
        }
        words[8 * slot + 3] &= ~std::uint64_t{0xfffffff0};  // few groups, else each is a violation
        GrantToken token;
        std::memcpy(token.data(), words + 8 * slot + 1, sizeof token);
        words[8 * slot + 1] = words[8 * slot + 1] / kBoardGrants * kBoardGrants + slot;
        std::memcpy(token.data(), words + 8 * slot + 1, sizeof token);
        try {
            reader.find(token, copy);
        } catch (const protocol::Violation&) {
            ++violations;
        }
        REQUIRE(copy.ids.size() <= kBoardIds);
    }
    CHECK(violations > 100);
}

TEST_CASE("what isn't a board is refused") {
    const OwnSegment small("test", sizeof(BoardMemory) - 4096), blank("test", sizeof(BoardMemory));
    CHECK_THROWS_AS(PeerBoard::open(duplicate(small.fd()), small.size()), protocol::Violation);
    CHECK_THROWS_AS(PeerBoard::open(duplicate(small.fd()), sizeof(BoardMemory)), protocol::Violation);
    CHECK_THROWS_AS(PeerBoard::open(duplicate(blank.fd()), blank.size()), protocol::Violation);
}
