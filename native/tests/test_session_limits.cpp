// Limits that honest peers keep by themselves: what counts, what waits for room, what a failed post leaves.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "session_pair.hpp"

using namespace kvt::test;

namespace {

const PoolTerms kPool = pool_of(2);
const Outcome kCancel{Cause::cancelled, Delivered::no, "", {}};

RecordPtr make(Party& party, Role role, const std::string& key, std::size_t meta_nbytes,
               const PoolTerms& pool = kPool) {
    std::vector<std::uint16_t> layers(pool.layers.size());
    for (std::uint16_t i = 0; i < layers.size(); ++i) layers[i] = i;
    auto record = party.make(role, key, pool, layers, 1, 16);
    record->meta = std::string(meta_nbytes, 'm');
    return record;
}

std::vector<RecordPtr> post_all(Party& party, Role role, const std::string& keys, int first, int last,
                                const PoolTerms& pool = kPool) {
    std::vector<RecordPtr> records;
    for (int i = first; i != last; i += first < last ? 1 : -1) {
        records.push_back(party.post(make(party, role, keys + std::to_string(i), 4000, pool)));
    }
    return records;
}

void check_ok(const std::vector<RecordPtr>& records) {
    const auto ok = [](const RecordPtr& record) {
        return record->finished && record->outcome.cause == Cause::ok;
    };
    CHECK(std::all_of(records.begin(), records.end(), ok));
}

}  // namespace

TEST_CASE("what a match makes our own posts say is no answer to the peer") {
    Pair pair;
    const PoolTerms pool = pool_of(61);
    const auto receives = post_all(pair.b, Role::destination, "k", 0, 3000, pool);
    const auto sends = post_all(pair.a, Role::source, "k", 2999, -1, pool);
    std::size_t most = 0;
    for (const Frame& frame : std::exchange(pair.a.said, {})) {  // nothing is taken from the outbox meanwhile
        REQUIRE_NOTHROW(pair.b.session.receive(frame.header, frame.body, 0));
        pair.b.session.pump(0);
        most = std::max(most, pair.b.session.outbox().size());
    }
    CHECK(most > SessionConfig{}.answers_nbytes);
    pair.run();
    check_ok(receives);
    check_ok(sends);
    pair.expect_idle();
}

TEST_CASE("refusals and mismatches use up what our own user posted: they are no answers either") {
    SessionConfig config;
    config.unmatched = config.peer_unmatched = 4096;
    Pair pair(config);
    for (int i = 0; i < 3000; ++i) {
        pair.b.session.refuse("k" + std::to_string(i), std::string(1024, 'r'), kSecond, 0);
    }
    const auto sends = post_all(pair.a, Role::source, "k", 0, 3000);
    for (const Frame& frame : std::exchange(pair.a.said, {})) {
        REQUIRE_NOTHROW(pair.b.session.receive(frame.header, frame.body, 0));
    }
    CHECK(pair.b.session.outbox().size() > config.answers_nbytes);
    pair.run();
    CHECK(sends.back()->outcome.cause == Cause::peer_aborted);
    pair.expect_idle();
}

TEST_CASE("posts wait for room in the peer's memory, and answers have more than what is told first") {
    SessionConfig config;
    config.peer_state_nbytes = 256 << 10;
    Pair pair(config);
    std::vector<RecordPtr> records;
    const auto note = [&](const std::vector<RecordPtr>& more) {
        records.insert(records.end(), more.begin(), more.end());
    };
    note(post_all(pair.a, Role::source, "a", 0, 200));
    note(post_all(pair.b, Role::source, "b", 0, 200));
    note(post_all(pair.a, Role::destination, "c", 0, 200));
    CHECK(pair.a.session.outstanding() == (64 << 10) / records.front()->charge);
    pair.run();  // throws where a peer is accused
    CHECK(pair.b.session.kept_for_peer() == pair.a.session.outstanding());
    note(post_all(pair.a, Role::destination, "b", 199, -1));  // no room to tell any, but b's first are here
    pair.run();
    CHECK(records[200]->outcome.cause == Cause::ok);
    note(post_all(pair.b, Role::destination, "a", 199, -1));
    note(post_all(pair.b, Role::source, "c", 199, -1));
    pair.run();
    check_ok(records);
    pair.expect_idle();
}

TEST_CASE("pools of which a peer can't keep the names are refused when they are used") {
    SessionConfig config;
    config.peer_state_nbytes = 64 << 10;
    Pair pair(config);
    PoolTerms large = pool_of(100);
    for (auto& layer : large.layers) layer.name += std::string(200, 'n');
    pair.a.post(make(pair.a, Role::source, "small", 0));
    const auto first = pair.a.post(make(pair.a, Role::source, "k", 0, large), 0, 8);
    CHECK_THROWS_AS(pair.a.post(make(pair.a, Role::source, "other", 0, large), 0, 9), Excess);
    pair.run();
    const auto mine = pair.b.post(make(pair.b, Role::destination, "k", 0, large), 0, 8);
    pair.run();
    check_ok({first, mine});
    pair.a.session.forget_pool(8);
    CHECK_NOTHROW(pair.a.post(make(pair.a, Role::source, "other", 0, large), 0, 9));
}

TEST_CASE("a post that throws leaves nothing: the key is free, and nothing is outstanding") {
    for (const Role role : {Role::source, Role::destination}) {
        Pair pair;
        PoolTerms endless = kPool;
        endless.layers[1].name = std::string(70'000, 'n');  // no text of the wire
        CHECK_THROWS_AS(pair.a.post(make(pair.a, role, "k", 0, endless), 0, 8), std::length_error);
        CHECK_THROWS_AS(pair.a.post(make(pair.a, role, std::string(70'000, 'k'), 0)), std::length_error);
        CHECK(pair.a.session.unfinished() == 0);
        CHECK(pair.a.session.outstanding() == 0);
        const auto mine = pair.a.post(make(pair.a, role, "k", 0));
        const Role other = role == Role::source ? Role::destination : Role::source;
        const auto theirs = pair.b.post(make(pair.b, other, "k", 0));
        pair.run();
        check_ok({mine, theirs});
        pair.expect_idle();
    }
}

TEST_CASE("a refused key refuses both directions that wait under it") {
    Pair pair;
    const auto send = pair.a.post(make(pair.a, Role::source, "k", 0));
    const auto receive = pair.a.post(make(pair.a, Role::destination, "k", 0));
    pair.run();
    pair.b.session.refuse("k", "no", kSecond, 0);
    pair.run();
    for (const auto& record : {send, receive}) {
        CHECK(record->outcome.cause == Cause::peer_aborted);
        CHECK(record->outcome.reason == "no");
    }
    pair.expect_idle();
}

TEST_CASE("an OFFER that waits for room and is withdrawn: its receive is told like any other") {
    SessionConfig config;
    config.unmatched = config.peer_unmatched = 1;
    Pair pair(config);
    for (int i = 0; i < 4; ++i) {  // ended receives, of which the source hasn't read
        const auto ended = pair.b.post(make(pair.b, Role::destination, "e" + std::to_string(i), 0));
        pair.b.session.stop(ended, kCancel, 0);
        pair.b.settle();
    }
    CHECK(pair.b.session.tombstones() == 4);
    const auto first = pair.a.post(make(pair.a, Role::source, "k", 0));
    pair.deliver(pair.a);
    const auto receive = pair.b.post(make(pair.b, Role::destination, "k", 0));
    CHECK_FALSE(receive->told);
    CHECK(pair.b.session.kept_for_peer() == 1);
    SUBCASE("met") {
        pair.run();
        check_ok({first, receive});
    }
    SUBCASE("withdrawn") {
        pair.a.session.stop(first, kCancel, 0);
        pair.a.settle();
        pair.deliver(pair.a);
        CHECK_FALSE(receive->told);
        pair.run();
        CHECK(receive->told);
        const auto second = pair.a.post(make(pair.a, Role::source, "k", 0));
        pair.run();
        check_ok({second, receive});
    }
    pair.expect_idle();
}
