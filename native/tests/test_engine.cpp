// The engine with its threads, between two ends in one process: bytes, what may be rewritten when, gates,
// ends. Written to be run under the sanitizers: a test's own stores are what a race with the engine's shows
// against.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <random>

#include "engine_pair.hpp"

using namespace kvt::test;
using kvt::memory::Ids;

namespace {

constexpr std::uint64_t kOurs = 1, kTheirs = 2, kRewritten = 3;

Ids shuffled(std::uint32_t count, unsigned seed) {
    Ids ids(count);
    std::iota(ids.begin(), ids.end(), 0u);
    std::shuffle(ids.begin(), ids.end(), std::mt19937(seed));
    return ids;
}

// All of a's blocks to b, which orders them in its own way; then the memory is the users' again.
void transfer_everything(const Terms& terms) {
    const Census before;
    {
        EnginePair pair(terms);
        const Ids from = shuffled(terms.blocks, 1), to = shuffled(terms.blocks, 2);
        pair.a.blocks.fill(from, kOurs);
        const auto received = pair.b.post(Role::destination, "k", to);
        const auto sent = pair.a.post(Role::source, "k", from);
        CHECK(pair.a.outcome(*sent) == Cause::ok);
        pair.a.blocks.fill(from, kRewritten);
        CHECK(pair.b.outcome(*received) == Cause::ok);
        CHECK(pair.b.blocks.are(to, kOurs));
        pair.b.blocks.fill(to, kTheirs);
        CHECK(received->result.nbytes == received->nbytes);
        CHECK(pair.b.pool->in_use() == 0);
        CHECK(pair.b.connection->unfinished() == 0);
        pair.close();
        CHECK(pair.b.blocks.are(to, kTheirs));
    }
    before.expect_no_more();
}

// Marks the layers one by one, each when the one before it has landed, in memory written just before.
template <class Release>
void layer_by_layer(Way way, Release release) {
    EnginePair pair({.way = way, .blocks = 16});
    const Ids from = shuffled(16, 3), to = shuffled(16, 4);
    const auto gate = std::make_shared<LayerGate>(pair.a.blocks.layers());
    const auto received = pair.b.post(Role::destination, "k", to);
    const auto sent = pair.a.post(Role::source, "k", from, gate);
    std::atomic<std::uint32_t> landed{0};
    std::thread computing([&] {
        for (std::uint32_t layer = 0; layer < pair.a.blocks.layers(); ++layer) {
            landed.wait(layer - 1);
            pair.a.blocks.fill_layer(layer, from, kOurs);
            release(*gate, layer);
        }
    });
    bool whole = true;
    for (std::uint32_t layer = 0; layer < pair.a.blocks.layers(); ++layer) {
        CHECK_FALSE(received->done());
        whole = pair.b.connection->wait_layer(received, layer, deadline()) ==
                    Connection::LayerState::landed &&
                pair.b.blocks.layer_is(layer, to, kOurs) && whole;
        landed.store(layer + 1);
        landed.notify_all();
    }
    computing.join();
    CHECK(whole);
    CHECK(pair.a.outcome(*sent) == Cause::ok);
    CHECK(pair.b.outcome(*received) == Cause::ok);
}

// A transfer that can't end: its last layer is never released. What is before it moves.
struct Unfinished {
    explicit Unfinished(EnginePair& pair)
        : from(shuffled(pair.a.blocks.count(), 5)), to(shuffled(pair.b.blocks.count(), 6)) {
        pair.a.blocks.fill(from, kOurs);
        gate = std::make_shared<LayerGate>(pair.a.blocks.layers());
        gate->word()->store(pair.a.blocks.layers() - 1);
        received = pair.b.post(Role::destination, "k", to);
        sent = pair.a.post(Role::source, "k", from, gate);
        CHECK(pair.b.connection->wait_layer(received, 0, deadline()) == Connection::LayerState::landed);
    }
    // Both are over: the memory is the users', and what a layer that landed holds stays.
    void expect_over(EnginePair& pair, Cause here, Cause there) {
        CHECK(pair.a.outcome(*sent) == here);
        pair.a.blocks.fill(from, kRewritten);
        CHECK(pair.b.outcome(*received) == there);
        CHECK(pair.b.blocks.layer_is(0, to, kOurs));
        pair.b.blocks.fill(to, kTheirs);
        pair.close();
        CHECK(pair.b.blocks.are(to, kTheirs));
        CHECK(received->result.block_outcomes.front().sealed.empty());
        CHECK(received->result.block_outcomes.front().poisoned.size() == to.size());
    }
    Ids from, to;
    std::shared_ptr<LayerGate> gate;
    std::shared_ptr<TransferHandle> sent, received;
};

constexpr Terms kLong{.chunk_nbytes = 64u << 10, .layers = 6, .blocks = 256};
constexpr Terms kLongInproc{.way = Way::inproc, .chunk_nbytes = 64u << 10, .layers = 6, .blocks = 256};

}  // namespace

TEST_CASE("one transfer moves every byte, and then the memory is the users' again") {
    transfer_everything({});
    transfer_everything({.way = Way::inproc});
    transfer_everything({.layers = 1, .blocks = 1, .piece_nbytes = 64});  // inline
}

TEST_CASE("with digests") {
    transfer_everything({.digest = DigestKind::crc32c});
    transfer_everything({.way = Way::inproc, .digest = DigestKind::crc32c});
    transfer_everything({.digest = DigestKind::crc32c, .layers = 1, .blocks = 1, .piece_nbytes = 64});
}

TEST_CASE("many small pieces go through the staging") {
    const Terms small{.chunk_nbytes = 32u << 10, .layers = 8, .blocks = 1024, .piece_nbytes = 72};
    for (const auto digest : {DigestKind::none, DigestKind::crc32c}) {
        Terms terms = small;
        terms.digest = digest;
        transfer_everything(terms);
        terms.way = Way::inproc;
        transfer_everything(terms);
    }
}

TEST_CASE("more lanes than movers, and one of each") {
    transfer_everything({.lanes = 4, .movers = 3, .chunk_nbytes = 16u << 10, .blocks = 256});
    transfer_everything({.lanes = 1, .movers = 1, .chunk_nbytes = 16u << 10, .blocks = 256});
}

TEST_CASE("a gate that another thread marks") {
    for (const Way way : {Way::tcp, Way::inproc}) {
        layer_by_layer(way, [](LayerGate& gate, std::uint32_t layer) {
            gate.mark(layer);
            gate.kick();
        });
    }
}

TEST_CASE("a gate that another thread releases through the progress word alone") {
    for (const Way way : {Way::tcp, Way::inproc}) {
        layer_by_layer(way, [](LayerGate& gate, std::uint32_t layer) {
            gate.word()->store(layer + 1, std::memory_order_release);
        });
    }
}

TEST_CASE("a gate that fails in mid-transfer") {
    for (const Terms& terms : {kLong, kLongInproc}) {
        EnginePair pair(terms);
        Unfinished transfer(pair);
        std::thread([gate = transfer.gate] {
            gate->fail("the model stopped");
            gate->kick();
        }).join();
        transfer.expect_over(pair, Cause::cancelled, Cause::peer_aborted);
    }
}

TEST_CASE("either side cancels in mid-transfer") {
    for (const Terms& terms : {kLong, kLongInproc}) {
        for (const bool source : {true, false}) {
            EnginePair pair(terms);
            Unfinished transfer(pair);
            if (source) {
                pair.a.connection->cancel(transfer.sent);
            } else {
                pair.b.connection->cancel(transfer.received);
            }
            transfer.expect_over(pair, source ? Cause::cancelled : Cause::peer_aborted,
                                 source ? Cause::peer_aborted : Cause::cancelled);
        }
    }
}

TEST_CASE("the sockets are cut in mid-transfer") {
    const Census before;
    {
        EnginePair pair(kLong);
        Unfinished transfer(pair);
        pair.cut();
        transfer.expect_over(pair, Cause::peer_lost, Cause::peer_lost);
    }
    before.expect_no_more();
}

TEST_CASE("an engine closes in mid-transfer") {
    for (const Terms& terms : {kLong, kLongInproc}) {
        const Census before;
        {
            EnginePair pair(terms);
            Unfinished transfer(pair);
            pair.b.engine->close();
            transfer.expect_over(pair, Cause::peer_lost, Cause::connection_closed);
            CHECK_THROWS_AS(pair.b.post(Role::destination, "late", transfer.to), NotUsable);
        }
        before.expect_no_more();
    }
}
