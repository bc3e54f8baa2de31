// When the reactor turns: in time for a deadline that comes while it plans, and no more often than there is
// something to do.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <thread>

#include "engine_pair.hpp"

using namespace kvt;
using namespace kvt::test;

namespace {

constexpr Time kLongest = 100 * kMs;  // that a deadline may be passed by

kvt::memory::Ids every(std::uint32_t count) {
    kvt::memory::Ids ids(count);
    std::iota(ids.begin(), ids.end(), 0u);
    return ids;
}

}  // namespace

TEST_CASE("a deadline that comes while the reactor plans is kept") {
    EnginePair pair({.layers = 1, .blocks = 2, .piece_nbytes = 4096});
    const auto post = [&](const std::string& key, std::uint32_t block) {
        auto args = pair.a.args(Role::destination, key, {block});
        args.limits.match = kMs / 2;
        return pair.a.connection->post(std::move(args));
    };
    // The moment is some hundred nanoseconds long; a plan waits in the middle of it for a lock that another
    // has.
    std::atomic<bool> over{false};
    std::vector<std::thread> busy(3);
    for (std::thread& one : busy) {
        one = std::thread([&] {
            while (!over.load()) {
                pair.a.engine->admission().retry_joins();
            }
        });
    }
    std::vector<Time> late;
    for (int n = 0; n < 1500; ++n) {
        // The first one's end makes the reactor plan anew; the second is posted at one moment of that.
        const Time from = monotonic_ns();
        const auto first = post("first." + std::to_string(n), 0);
        while (monotonic_ns() < from + kMs / 2 + n % 150 * 1000) {
        }
        const Time again = monotonic_ns();
        const auto second = post("second." + std::to_string(n), 1);
        CHECK(pair.a.outcome(*second) == Cause::timeout_match);
        late.push_back(monotonic_ns() - again - kMs / 2);
        CHECK(pair.a.outcome(*first) == Cause::timeout_match);
    }
    over.store(true);
    for (std::thread& one : busy) {
        one.join();
    }
    // A lost wake-up lasts until the next heartbeat, 250 ms; a busy machine may hold up one or two.
    CHECK(std::count_if(late.begin(), late.end(), [](Time by) { return by > kLongest; }) <= 2);
}

TEST_CASE("a gate that waits doesn't make the reactor spin while others move") {
    constexpr Terms terms{.chunk_nbytes = 64u << 10, .layers = 4, .blocks = 1024};
    EnginePair pair(terms);
    const auto gate = std::make_shared<LayerGate>(terms.layers);
    const auto waiting = pair.b.post(Role::destination, "gated", {0});
    const auto held = pair.a.post(Role::source, "gated", {0}, gate);
    kvt::memory::Ids rest = every(terms.blocks);
    rest.erase(rest.begin());
    const Time from = monotonic_ns();
    const std::uint64_t before = pair.a.engine->reactor().rounds();
    std::uint64_t transfers = 0;
    for (; monotonic_ns() - from < 300 * kMs; ++transfers) {
        const auto received = pair.b.post(Role::destination, std::to_string(transfers), rest);
        const auto sent = pair.a.post(Role::source, std::to_string(transfers), rest);
        REQUIRE(pair.a.outcome(*sent) == Cause::ok);
        REQUIRE(pair.b.outcome(*received) == Cause::ok);
    }
    const std::uint64_t rounds = pair.a.engine->reactor().rounds() - before;
    const auto polls = static_cast<std::uint64_t>((monotonic_ns() - from) / 200'000);
    CHECK(rounds < 2 * (polls + 10 * transfers));
    gate->fail("enough");
    gate->kick();
    CHECK(pair.a.outcome(*held) == Cause::cancelled);
    CHECK(pair.b.outcome(*waiting) == Cause::peer_aborted);
}
