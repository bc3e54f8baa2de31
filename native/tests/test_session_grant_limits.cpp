// What a peer can make a session keep by one-sided frames, and what honest peers aren't accused of.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <map>

#include "grant_pair.hpp"

using namespace kvt::test;

namespace {

constexpr auto kWrite = GrantMode::write;

/// A peer that says what it likes to `g.pair.a`, and doesn't read.
struct Hostile {
    explicit Hostile(SessionConfig config = granting()) : g(config) {
        say({.type = FrameType::pool, .transfer = 7}, encode_pool(g.pool));
    }
    void say(Header header, const Bytes& body = {}) {
        header.body_nbytes = static_cast<std::uint32_t>(body.size());
        g.pair.a.session.receive(header, body, g.pair.now);
        g.pair.a.session.pump(g.pair.now);  // not settled: what it says piles up
    }
    void read(std::uint64_t id, unsigned token, std::uint32_t wait_ms = 0, std::uint32_t blocks = kBlocks) {
        const Terms terms{7, {{0, blocks}}, {{0, kPiece}}};
        ReadBody body{{token_of(token), wait_ms, true, 0, 0, {}}, terms, {}};
        if (blocks != kBlocks) body.use.subset = first(blocks);
        if (blocks != 0) body.ranges.push_back({0, blocks * kPiece});
        say({.type = FrameType::read, .transfer = id, .total = blocks * kPiece}, encode_read(body));
    }
    void write(std::uint64_t id, unsigned token, std::uint32_t wait_ms = 0, std::uint32_t blocks = kBlocks) {
        const Terms terms{7, {{0, blocks}}, {{0, kPiece}}};
        WriteBody body{{token_of(token), wait_ms, true, 0, 0, {}}, {}, terms};
        if (blocks != kBlocks) body.use.subset = first(blocks);
        say({.type = FrameType::write, .transfer = id, .total = blocks * kPiece}, encode_write(body));
    }
    Granting g;
};

SessionConfig small(std::uint32_t unmatched) {
    SessionConfig config = granting();
    config.unmatched = config.peer_unmatched = unmatched;
    return config;
}

}  // namespace

TEST_CASE("a user holds itself to the peer's limit, and what waits gets its turn") {
    Granting g(small(2));
    g.host.add(grant_of(1, GrantMode::read, 0));
    g.host.add(grant_of(2, kWrite, 0));
    std::vector<RecordPtr> all;
    for (int i = 0; i < 20; ++i) all.push_back(i % 2 == 0 ? g.read(1) : g.write(2));
    for (int i = 0; i < 20; ++i) all.push_back(g.read(3, 100));
    CHECK(g.pair.b.session.outstanding() == 2);
    for (int i = 0; i < 12; ++i) {
        g.run();
        g.pass(100 * kMs);
    }
    g.run();
    for (std::size_t i = 0; i < all.size(); ++i) {
        CHECK(all[i]->outcome.cause == (i < 20 ? Cause::ok : Cause::grant_denied));
    }
    g.expect_nothing_left();
}

TEST_CASE("a write that was withdrawn while its WANT was under way counts no more") {
    Granting g(small(1));
    g.host.add(grant_of(1, kWrite, 0));
    const auto write = g.write(1);
    g.pair.deliver(g.pair.b);  // served, and its WANT under way
    g.cancel(write);
    const auto next = g.write(1);
    CHECK_NOTHROW(g.pair.deliver(g.pair.b));
    CHECK(g.host.served[0]->outcome.cause == Cause::peer_aborted);
    g.run();
    CHECK(next->outcome.cause == Cause::ok);
    g.expect_nothing_left();
}

TEST_CASE("reads that wait, reads that are served and WANTs that wait count together") {
    Hostile peer(small(3));
    peer.g.host.add(grant_of(1, GrantMode::read, 0));
    peer.read(1, 1);
    peer.read(2, 9, 1000);
    WantBody want{"k", "", {7, {{0, 1}}, {{0, 8}}}, {{0, 8}}};
    peer.say({.type = FrameType::want, .transfer = 3, .total = 8}, encode_want(want));
    CHECK_THROWS_AS(peer.read(4, 1), Excess);
}

TEST_CASE("writes of nothing are served to a bound, too") {
    Hostile peer;
    peer.g.host.add(grant_of(1, kWrite, 0));
    const auto all = [&] {
        for (std::uint64_t id = 1; id < 5000; ++id) {
            peer.write(id, 1, 0, 0);
            peer.g.pair.a.session.outbox().clear();
        }
    };
    CHECK_THROWS_AS(all(), Excess);
    CHECK(peer.g.host.served.size() == 1024);
}

TEST_CASE("a peer that asks and doesn't read the answers is an excess, whatever it asks") {
    for (int what = 0; what < 2; ++what) {
        CAPTURE(what);
        SessionConfig config = granting();
        config.answers_nbytes = 4096;
        Hostile peer(config);
        const auto ask = [&] {
            for (std::uint64_t id = 1; id < 500; ++id) {
                if (what == 0) {
                    peer.read(id, 9);
                    peer.say(
                        {.type = FrameType::aborted, .transfer = id});  // so that nothing is awaited of it
                } else {
                    peer.write(id, 9);
                }
            }
        };
        CHECK_THROWS_AS(ask(), Excess);
        CHECK(peer.g.pair.a.session.outbox().size() < 8192);
    }
}

TEST_CASE(
    "answers to HOLD wait for room: a peer that reads late may have asked for as many leases as there are") {
    constexpr std::uint64_t kMost = 65'536, kHeld = 40'000;
    Hostile peer(granting());
    peer.g.host.add(grant_of(1, GrantMode::read, 0));
    Session& a = peer.g.pair.a.session;
    const auto ask = [&](std::uint64_t id, unsigned token) {
        peer.say({.type = FrameType::hold, .transfer = id}, encode_hold({token_of(token), 0}));
    };
    std::uint64_t last = 0;
    while (last < kHeld) ask(++last, 1);
    peer.g.host.book.end(peer.g.host.book.find(token_of(1)), GrantState::revoked);
    a.hold_ended(token_of(1));                      // two words on each
    for (std::uint64_t id = 1; id <= 1000; ++id) {  // of what is let go the peer need hear nothing
        peer.say({.type = FrameType::hold, .flags = kLetGo, .transfer = id});
    }
    const auto refused = [&] {
        while (last < 3 * kMost) ask(++last, 9);
    };
    CHECK_THROWS_AS(refused(), Excess);
    CHECK(last >= kMost);
    CHECK(a.outbox().size() < (1u << 20));
    std::map<std::uint64_t, int> words;
    for (bool more = true; more;) {
        peer.g.pair.a.settle();
        more = !peer.g.pair.a.said.empty();
        for (const Frame& frame : std::exchange(peer.g.pair.a.said, {})) {
            const bool held = frame.header.flags == 0;
            CHECK(words[frame.header.transfer] == (held || frame.header.transfer > kHeld ? 0 : 1));
            words[frame.header.transfer] += held ? 1 : 2;
        }
    }
    for (std::uint64_t id = 20'000; id <= kHeld; ++id) CHECK(words[id] == 3);
    CHECK(words[kHeld + 1] == 2);
    CHECK(words.size() <= kMost + (1u << 19) / 64);
}

TEST_CASE("WANTs for writes that weren't made are answers, too") {
    SessionConfig config = granting();
    config.answers_nbytes = 4096;
    Granting g(config);
    const auto write = g.write(9);
    g.run();
    CHECK(write->finished);
    const WantBody body{"k", "", {7, {{0, kBlocks}}, {{0, kPiece}}}, {{0, kBlocks * kPiece}}};
    Header header{.type = FrameType::pool, .transfer = 7};
    g.pair.b.session.receive(header, encode_pool(g.pool), 0);
    const auto ask = [&] {
        for (std::uint64_t id = 1; id < 500; ++id) {
            const Header want{.type = FrameType::want,
                              .flags = kWantOfWrite,
                              .transfer = id,
                              .total = kBlocks * kPiece,
                              .arg = write->id};
            g.pair.b.session.receive(want, encode_want(body), 0);
            g.pair.b.session.receive({.type = FrameType::aborted, .transfer = id}, {}, 0);
        }
    };
    CHECK_THROWS_AS(ask(), Excess);
}

TEST_CASE("charges come back: a peer that asks for ever asks within its share") {
    SessionConfig config = granting();
    config.peer_state_nbytes = 6 << 10;
    Granting g(config);
    g.host.add(grant_of(1, GrantMode::read, 0));
    g.host.add(grant_of(2, kWrite, 0));
    for (int i = 0; i < 60; ++i) {
        const auto read = g.read(1), write = g.write(2), denied = g.read(8), late = g.read(9, 10),
                   given_up = g.write(9, 1000), refused = g.write(7, 1000),
                   empty = g.make(Role::source, 2, 0, 0);
        g.pair.b.post(empty, g.pair.now);
        g.run();
        g.cancel(given_up);
        g.run();
        g.pair.a.session.refuse(token_of(7), "no", g.pair.now + 1, g.pair.now);
        g.pass(10 * kMs);
        g.run();
        for (const auto& one : {read, write, denied, late, given_up, refused, empty}) REQUIRE(one->finished);
        CHECK(read->outcome.cause == Cause::ok);
        CHECK(write->outcome.cause == Cause::ok);
    }
    g.expect_nothing_left();
}

TEST_CASE("our own user's ended receives are no fault of the peer that writes") {
    Granting g(small(2));
    for (int i = 0; i < 30; ++i) {  // the answers to these are under way
        auto receive = g.pair.a.make(Role::destination, "k" + std::to_string(i), g.pool, {0}, 1, 8);
        g.pair.a.post(receive);
        g.pair.a.session.stop(receive, {Cause::cancelled, Delivered::no, "", {}}, 0);
        g.pair.a.settle();
    }
    CHECK(g.pair.a.session.tombstones() >= 8);
    g.host.add(grant_of(1, kWrite));
    const auto write = g.write(1);
    CHECK_NOTHROW(g.pair.deliver(g.pair.b));
    g.run();
    CHECK(write->outcome.cause == Cause::ok);
    g.expect_nothing_left();
}

TEST_CASE("one-sided frames where they weren't agreed on, or that can't be") {
    for (int what = 0; what < 9; ++what) {
        CAPTURE(what);
        Hostile peer(what < 4 ? SessionConfig{} : granting());
        const WantBody body{"k", "", {7, {{0, 1}}, {{0, 8}}}, {{0, 8}}};
        const auto say = [&] {
            switch (what) {
                case 0: peer.read(1, 1); break;
                case 1: peer.write(1, 1); break;
                case 2: peer.say({.type = FrameType::hold, .transfer = 1}, encode_hold({})); break;
                case 3:
                    peer.say({.type = FrameType::want, .flags = kWantOfWrite, .transfer = 1, .total = 8},
                             encode_want(body));
                    break;
                case 4: peer.say({.type = FrameType::hold, .flags = kLetGo, .transfer = 1}); break;
                case 5: peer.say({.type = FrameType::held, .transfer = 1}); break;
                case 6: peer.say({.type = FrameType::hold, .transfer = 1}); break;
                case 7: peer.say({.type = FrameType::hold, .flags = kLetGo | kHoldMapped}); break;
                default: peer.read(2, 1); peer.read(2, 1);
            }
        };
        CHECK_THROWS_AS(say(), Violation);
    }
}
