// Grants with all the threads: what is read and written by them, and what their end means for whoever
// rewrites. `pair.a` owns, `pair.b` reads and writes.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <numeric>
#include <random>

#include "engine_pair.hpp"

using namespace kvt;
using namespace kvt::test;
using memory::Ids;
using protocol::GrantMode;
using protocol::GrantState;

namespace {

constexpr std::uint64_t kOurs = 1, kTheirs = 2, kRewritten = 3;

protocol::Token token_of(unsigned n) {
    protocol::Token token{};
    token[0] = static_cast<std::byte>(n);
    token[1] = static_cast<std::byte>(n >> 8);
    return token;
}

Ids ids_of(std::uint32_t begin, std::uint32_t end) {
    Ids ids(end - begin);
    std::iota(ids.begin(), ids.end(), begin);
    return ids;
}

struct Granting {
    explicit Granting(const Terms& terms = {}) : all(ids_of(0, terms.blocks)), pair(terms) {}

    GrantHandlePtr grant(GrantMode mode, unsigned readers = 1, Time ttl = protocol::kNever) {
        auto made = std::make_shared<GrantHandle>(pair.a.pool);
        made->token = token_of(++tokens);
        made->mode = mode;
        made->readers = readers;
        made->ttl = ttl;
        made->blocks = {all};
        pair.a.engine->grants().add(made);
        return made;
    }
    std::shared_ptr<TransferHandle> post(Role role, unsigned token, const Ids& ids,
                                         std::uint32_t wait_ms = 0) {
        auto args = pair.b.args(role, "one-sided", ids);
        args.use = std::make_shared<protocol::GrantUse>();
        args.use->token = token_of(token);
        args.use->wait_ms = wait_ms;
        if (ids.size() != all.size()) args.use->subset.emplace().push_back(ids);  // position i is block i
        return pair.b.connection->post(std::move(args));
    }
    void reuse_all() { pair.a.engine->grants().reuse(pair.a.pool->id(), {std::make_shared<const Ids>(all)}); }
    bool wait(Handle& handle) { return pair.a.connection->wait(handle, deadline()); }
    void expect_nothing_left() {
        for (Side* side : {&pair.a, &pair.b}) {
            for (const Time until = deadline(); side->pool->in_use() != 0 && monotonic_ns() < until;) {
                std::this_thread::yield();  // what was served ends a moment after its user's end
            }
            CHECK(side->pool->in_use() == 0);
        }
        CHECK(pair.a.engine->grants().awaited() == 0);
    }

    Ids all;
    EnginePair pair;
    unsigned tokens = 0;
};

constexpr Way kWays[] = {Way::tcp, Way::inproc};

}  // namespace

TEST_CASE("a read and a write, and the owner knows") {
    for (const Way way : kWays) {
        for (const DigestKind digest : {DigestKind::none, DigestKind::crc32c}) {
            Granting g({.way = way, .digest = digest});
            g.pair.a.blocks.fill(g.all, kOurs);
            const auto read_by = g.grant(GrantMode::read);
            const auto read = g.post(Role::destination, 1, g.all);
            CHECK(g.pair.b.outcome(*read) == Cause::ok);
            CHECK(g.pair.b.blocks.are(g.all, kOurs));
            CHECK(g.wait(*read_by));
            CHECK(g.pair.a.engine->grants().state_of(*read_by) == GrantState::read);
            CHECK(read_by->result.nbytes == read->nbytes);
            g.pair.b.blocks.fill(g.all, kTheirs);
            const auto written_by = g.grant(GrantMode::write);
            const auto write = g.post(Role::source, 2, g.all);
            CHECK(g.pair.b.outcome(*write) == Cause::ok);
            CHECK(g.wait(*written_by));
            CHECK(g.pair.a.blocks.are(g.all, kTheirs));
            g.expect_nothing_left();
        }
    }
}

TEST_CASE("a read and its grant, made at the same moment: none is missed") {
    Granting g({.blocks = 2, .piece_nbytes = 64});
    for (unsigned n = 1; n <= 300; ++n) {
        std::thread owner([&] { g.grant(GrantMode::read); });
        const auto read = g.post(Role::destination, n, g.all, 20'000);
        owner.join();
        CHECK(g.pair.b.outcome(*read) == Cause::ok);
    }
    g.expect_nothing_left();
}

TEST_CASE("what is rewritten while it is read is sealed as it was, or not at all") {
    for (const Way way : kWays) {
        Granting g({.way = way, .chunk_nbytes = 65'536});
        std::mt19937 random(5);
        for (int i = 0; i < 60; ++i) {
            g.pair.a.blocks.fill(g.all, kOurs);
            const auto grant = g.grant(GrantMode::read);
            const auto read = g.post(Role::destination, g.tokens, g.all);
            for (unsigned spin = random() % 20'000; spin != 0; --spin)
                std::atomic_signal_fence(std::memory_order_seq_cst);
            g.reuse_all();
            g.pair.a.blocks.fill(g.all, kRewritten);
            const Cause cause = g.pair.b.outcome(*read);
            CHECK((cause == Cause::ok || cause == Cause::grant_stale || cause == Cause::grant_denied));
            if (cause == Cause::ok) CHECK(g.pair.b.blocks.are(g.all, kOurs));
            CHECK(g.wait(*grant));
        }
        g.expect_nothing_left();
    }
}

TEST_CASE("when revoke has returned no byte of a write lands any more") {
    for (const Way way : kWays) {
        Granting g({.way = way, .chunk_nbytes = 65'536});
        std::mt19937 random(6);
        g.pair.b.blocks.fill(g.all, kTheirs);
        for (int i = 0; i < 60; ++i) {
            const auto grant = g.grant(GrantMode::write);
            const auto write = g.post(Role::source, g.tokens, g.all);
            for (unsigned spin = random() % 20'000; spin != 0; --spin)
                std::atomic_signal_fence(std::memory_order_seq_cst);
            i % 2 == 0 ? (void)g.pair.a.engine->grants().revoke(grant) : g.reuse_all();
            g.pair.a.blocks.fill(g.all, kRewritten);
            g.pair.b.outcome(*write);
            CHECK(g.wait(*grant));
            CHECK(g.pair.a.blocks.are(g.all, kRewritten));
        }
        g.expect_nothing_left();
    }
}

TEST_CASE("nor of one whose grant a faster write has ended, or its time") {
    Granting g({.chunk_nbytes = 65'536, .blocks = 64, .piece_nbytes = 16'384});
    const Ids first = ids_of(0, 1), rest = ids_of(1, 64);
    g.pair.b.blocks.fill(g.all, kTheirs);
    for (int i = 0; i < 60; ++i) {
        const auto grant = g.grant(GrantMode::write, 1, i % 2 == 0 ? protocol::kNever : 2 * kMs);
        const auto slow = g.post(Role::source, g.tokens, rest), fast = g.post(Role::source, g.tokens, first);
        while (g.pair.a.engine->grants().state_of(*grant) == GrantState::open) {
            std::this_thread::yield();
        }
        i % 4 < 2 ? g.reuse_all() : (void)g.pair.a.engine->grants().revoke(grant);
        g.pair.a.blocks.fill(rest, kRewritten);
        g.pair.b.outcome(*fast);
        g.pair.b.outcome(*slow);
        CHECK(g.pair.a.blocks.are(rest, kRewritten));
        CHECK(g.wait(*grant));
    }
    g.expect_nothing_left();
}

TEST_CASE("the reactor ends a grant when its time is over, and nothing of it is read after") {
    Granting g;
    const auto grant = g.grant(GrantMode::read, 1, 20 * kMs);
    CHECK(g.wait(*grant));
    CHECK(g.pair.a.engine->grants().state_of(*grant) == GrantState::expired);
    CHECK(grant->result.outcome.cause == Cause::grant_stale);
    const auto read = g.post(Role::destination, 1, g.all);
    CHECK(g.pair.b.outcome(*read) == Cause::grant_denied);
    const auto late = g.post(Role::destination, 9, g.all, 20);
    CHECK(g.pair.b.outcome(*late) == Cause::grant_denied);
    g.expect_nothing_left();
}

namespace {

struct Shown final : backends::Publication {
    void publish(const backends::OpenGrant&) override {}
    std::uint64_t mark() const override { return 7; }
    void end() noexcept override { over.store(true); }
    std::atomic<bool> over{false};
};

}  // namespace

TEST_CASE("what is shown ends for whoever has finished with it, and for all with the grant") {
    Granting g;
    auto& grants = g.pair.a.engine->grants();
    const auto& connection = g.pair.a.connection;
    const auto grant = g.grant(GrantMode::read, 4);
    std::vector<std::shared_ptr<Shown>> shown;
    for (const char* reader : {"took", "held", "reads"}) {
        CHECK_FALSE(grants.may_show(*grant, reader, *connection));  // it isn't for them alone
        REQUIRE(grants.hold(grant->token, connection, reader, false));
        shown.push_back(std::make_shared<Shown>());
        CHECK(grants.shows(grant, {reader, connection, shown.back()}));
    }
    grants.took({grant->token, 7}, "took");
    CHECK_FALSE(shown[0]->over.load());  // it has a lease, and may come again
    grants.release(grant->token, grant->ended, "took", false);
    CHECK(shown[0]->over.load());
    CHECK_FALSE(shown[1]->over.load());
    grants.release(grant->token, grant->ended, "held", false);
    CHECK(shown[1]->over.load());
    CHECK_FALSE(shown[2]->over.load());
    grants.revoke(grant);
    CHECK(shown[2]->over.load());
    CHECK_FALSE(grants.may_show(*grant, "reads", *connection));
    CHECK_FALSE(grants.shows(grant, {"reads", connection, std::make_shared<Shown>()}));
}

TEST_CASE("what a reader is shown of a grant for several ends when it says that it has read") {
    Granting g;
    auto& grants = g.pair.a.engine->grants();
    const auto grant = g.grant(GrantMode::read, 2);
    const auto mine = std::make_shared<Shown>(), anothers = std::make_shared<Shown>();
    CHECK(grants.shows(grant, {"mine", g.pair.a.connection, mine}));
    CHECK(grants.shows(grant, {"another's", g.pair.a.connection, anothers}));
    grants.took({grant->token, 6}, "mine");  // of another grant of this token
    CHECK_FALSE(mine->over.load());
    grants.took({grant->token, 7}, "mine");
    CHECK(mine->over.load());
    CHECK_FALSE(anothers->over.load());
    grants.took({grant->token, 7}, "another's");
    CHECK(anothers->over.load());
    CHECK(grants.state_of(*grant) == GrantState::read);
}

TEST_CASE("a lease keeps a grant from expiring, until its holder has gone") {
    for (const Way way : kWays) {
        Granting g({.way = way});
        const auto grant = g.grant(GrantMode::read, 1, 30 * kMs);
        const auto lease = g.pair.b.connection->hold(token_of(1), 0, nullptr, 0);
        for (const Time until = deadline();
             !g.pair.b.connection->is_held(*lease) && monotonic_ns() < until;) {
            std::this_thread::yield();
        }
        REQUIRE(g.pair.b.connection->is_held(*lease));
        CHECK_FALSE(g.pair.a.connection->wait(*grant, monotonic_ns() + 100 * kMs));
        g.pair.b.engine->close();
        CHECK(lease->done());
        CHECK(g.wait(*grant));
        CHECK(g.pair.a.engine->grants().state_of(*grant) == GrantState::expired);
        g.expect_nothing_left();
    }
}

TEST_CASE("an endpoint is closed with reads, writes, leases and waits under way") {
    const Census before;
    for (int who = 0; who < 2; ++who) {
        Granting g;
        const auto read_by = g.grant(GrantMode::read, 0), written_by = g.grant(GrantMode::write, 0);
        const auto lease = g.pair.b.connection->hold(token_of(1), 0, nullptr, 0);
        std::vector<std::shared_ptr<TransferHandle>> all;
        for (int i = 0; i < 5; ++i) all.push_back(g.post(Role::source, 2, g.all));
        all.push_back(g.post(Role::destination, 1, ids_of(0, 1)));
        all.push_back(g.post(Role::destination, 9, ids_of(1, 2), 20'000));
        (who == 0 ? g.pair.a : g.pair.b).engine->close();
        for (const auto& one : all) CHECK(g.pair.b.connection->wait(*one, deadline()));
        CHECK(g.pair.b.connection->wait(*lease, deadline()));
        g.expect_nothing_left();
    }
    before.expect_no_more();
}
