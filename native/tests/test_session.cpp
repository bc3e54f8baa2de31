// Matching, order, keys, gates and messages between two sessions.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <algorithm>

#include "session_pair.hpp"

using namespace kvt::test;

namespace {

const PoolTerms kFour = pool_of(4);
const PoolTerms kPlain = pool_of(4, false);

struct Send {
    Pair pair;
    RecordPtr source, destination;
    explicit Send(std::uint64_t piece = 300'000, SessionConfig config = {}) : pair(config) {
        source = pair.a.make(Role::source, "k", kFour, {0, 1}, 2, piece);
        destination = pair.b.make(Role::destination, "k", kFour, {0, 1}, 2, piece);
        fill(*source, 5);
    }
    void check_ok() {
        CHECK(source->outcome.cause == Cause::ok);
        CHECK(source->outcome.delivered == Delivered::yes);
        CHECK(destination->outcome.cause == Cause::ok);
        CHECK(pair.a.times_finished(source) == 1);
        CHECK(pair.b.times_finished(destination) == 1);
        CHECK(source->memory == destination->memory);
        pair.expect_idle();
    }
};

}  // namespace

TEST_CASE("either side first, or both at once") {
    for (const bool memory : {false, true}) {
        for (const std::uint64_t piece :
             {std::uint64_t{1}, std::uint64_t{3000}, std::uint64_t{300'000}, std::uint64_t{3'000'000}}) {
            for (int order = 0; order < 3; ++order) {
                CAPTURE(memory);
                CAPTURE(piece);
                CAPTURE(order);
                SessionConfig config;
                config.capabilities = memory ? kCanCopy : 0;
                config.pulls = memory;
                Send s(piece, config);
                s.source->meta = piece == 3000 ? "from source" : "";
                s.destination->meta = "from destination";
                if (order == 0) s.pair.a.post(s.source);
                if (order == 0) s.pair.deliver(s.pair.a);
                s.pair.b.post(s.destination);
                if (order == 1) s.pair.deliver(s.pair.b);
                if (order != 0) s.pair.a.post(s.source);
                s.pair.run();
                s.check_ok();
                CHECK(s.source->peer_meta == "from destination");
                CHECK(s.destination->peer_meta == s.source->meta);
            }
        }
    }
}

TEST_CASE("layers pair by name where both sides have names, else by position") {
    for (const bool memory : {false, true}) {
        for (const bool named : {true, false}) {
            for (const bool source_first : {true, false}) {
                CAPTURE(memory);
                CAPTURE(named);
                CAPTURE(source_first);
                SessionConfig config;
                config.capabilities = memory ? kCanCopy : 0;
                config.pulls = memory;
                Pair pair(config);
                const PoolTerms& pool = named ? kFour : kPlain;
                auto source = pair.a.make(Role::source, "k", pool, {3, 0, 2}, 3, 700);
                auto destination = pair.b.make(Role::destination, "k", pool, {2, 3, 0}, 3, 700);
                fill(*source, 1);
                if (source_first) pair.a.post(source);
                pair.b.post(destination);
                if (!source_first) pair.a.post(source);
                pair.run();
                REQUIRE(destination->outcome.cause == Cause::ok);
                const std::vector<std::uint16_t> from = {3, 0, 2}, to = {2, 3, 0};
                for (std::size_t i = 0; i < 3; ++i) {
                    CHECK(destination->memory[to[i]] == source->memory[named ? to[i] : from[i]]);
                }
                pair.expect_idle();
            }
        }
    }
}

TEST_CASE("empty transfers, with and without meta, either side first") {
    for (const bool memory : {false, true}) {
        for (const bool source_first : {true, false}) {
            for (const char* meta : {"", "m"}) {
                SessionConfig config;
                config.capabilities = memory ? kCanCopy : 0;
                config.pulls = memory;
                Send s(0, config);
                s.source->meta = meta;
                if (source_first) s.pair.a.post(s.source);
                if (source_first) s.pair.deliver(s.pair.a);
                s.pair.b.post(s.destination);
                if (!source_first) s.pair.a.post(s.source);
                s.pair.run();
                s.check_ok();
                CHECK(s.destination->peer_meta == meta);
            }
        }
    }
}

TEST_CASE("an empty receive isn't done by an offer that is withdrawn") {
    Send s(0);
    s.pair.a.post(s.source);
    s.pair.deliver(s.pair.a);
    s.pair.b.post(s.destination);  // its WANT is under way
    s.pair.a.session.stop(s.source, {Cause::cancelled, Delivered::no, "", {}}, 0);
    s.pair.run();
    CHECK(s.source->outcome.cause == Cause::cancelled);
    CHECK_FALSE(s.destination->finished);
    auto again = s.pair.a.post(s.pair.a.make(Role::source, "k", kFour, {0, 1}, 2, 0));
    s.pair.run();
    CHECK(again->outcome.cause == Cause::ok);
    CHECK(s.destination->outcome.cause == Cause::ok);
}

TEST_CASE("a mismatch is seen by each side, whoever compares first, and names the field both ways") {
    PoolTerms other = kFour;
    other.groups[0].dtype = "fp8_e4m3";
    for (const bool memory : {false, true}) {
        for (int order = 0; order < 3; ++order) {
            CAPTURE(order);
            SessionConfig config;
            config.capabilities = memory ? kCanCopy : 0;
            config.pulls = memory;
            Pair pair(config);
            auto source = pair.a.make(Role::source, "k", kFour, {0, 1}, 2, 100);
            auto destination = pair.b.make(Role::destination, "k", other, {0, 1}, 2, 100);
            if (order == 0) pair.a.post(source);
            if (order == 0) pair.deliver(pair.a);
            pair.b.post(destination);
            if (order == 1) pair.deliver(pair.b);
            if (order != 0) pair.a.post(source);
            pair.run();
            REQUIRE(source->outcome.cause == Cause::layout_mismatch);
            REQUIRE(destination->outcome.cause == Cause::layout_mismatch);
            CHECK(source->outcome.mismatch.path == "dtype");
            CHECK(source->outcome.mismatch.ours == "bfloat16");
            CHECK(source->outcome.mismatch.theirs == "fp8_e4m3");
            CHECK(destination->outcome.mismatch.ours == "fp8_e4m3");
            CHECK(destination->outcome.mismatch.theirs == "bfloat16");
            CHECK(source->outcome.delivered == Delivered::no);
            CHECK(destination->first_byte_at == 0);
            pair.expect_idle();
        }
    }
}

TEST_CASE("a key is used again at once, while an old offer is still under way") {
    Send s;
    s.pair.a.post(s.source);       // an OFFER, delayed
    s.pair.b.post(s.destination);  // a WANT
    s.pair.deliver(s.pair.b);
    while (s.pair.move(s.pair.a)) {
    }
    CHECK_FALSE(s.destination->finished);  // all bytes are there, the offer isn't
    s.pair.run();
    s.check_ok();
    for (int i = 0; i < 3; ++i) {
        auto source = s.pair.a.post(s.pair.a.make(Role::source, "k", kFour, {0}, 1, 64));
        s.pair.run();
        auto destination = s.pair.b.post(s.pair.b.make(Role::destination, "k", kFour, {0}, 1, 64));
        s.pair.run();
        CHECK(source->outcome.cause == Cause::ok);
        CHECK(destination->outcome.cause == Cause::ok);
        s.pair.expect_idle();
    }
}

TEST_CASE("an offer that crosses a want that was taken back isn't the next one's") {
    for (const bool memory : {false, true}) {
        SessionConfig config;
        config.capabilities = memory ? kCanCopy : 0;
        config.pulls = memory;
        Send s(100, config);
        s.source->meta = "first";
        s.pair.a.post(s.source);
        s.pair.b.post(s.destination);
        s.pair.b.session.stop(s.destination, {Cause::cancelled, Delivered::no, "", {}}, 0);
        s.pair.b.settle();
        auto next = s.pair.b.post(s.pair.b.make(Role::destination, "k", kFour, {0, 1}, 2, 100));
        s.pair.deliver(s.pair.a);  // the OFFER comes: it is the cancelled one's
        CHECK_FALSE(next->offer_seen);
        s.pair.run();
        CHECK(s.source->outcome.cause == Cause::peer_aborted);
        CHECK_FALSE(next->finished);
        auto second = s.pair.a.post(s.pair.a.make(Role::source, "k", kFour, {0, 1}, 2, 100));
        s.pair.run();
        CHECK(second->outcome.cause == Cause::ok);
        CHECK(next->outcome.cause == Cause::ok);
        CHECK(next->peer_meta == "");
        s.pair.expect_idle();
    }
}

TEST_CASE("the meta of a withdrawn offer isn't delivered") {
    for (const bool chunk_first : {true, false}) {
        for (const char* meta : {"", "second"}) {
            CAPTURE(chunk_first);
            CAPTURE(meta);
            Send s(100);
            s.source->meta = "first";
            s.pair.a.post(s.source);
            s.pair.deliver(s.pair.a);
            s.pair.b.post(s.destination);
            s.pair.a.session.stop(s.source, {Cause::cancelled, Delivered::no, "", {}}, 0);
            s.pair.a.settle();
            s.pair.deliver(s.pair.b);
            auto second = s.pair.a.make(Role::source, "k", kFour, {0, 1}, 2, 100);
            second->meta = meta;
            s.pair.a.post(second);
            if (chunk_first) CHECK(s.pair.move(s.pair.a));  // overtakes the ABORT and the second OFFER
            s.pair.run();
            CHECK(second->outcome.cause == Cause::ok);
            CHECK(s.destination->outcome.cause == Cause::ok);
            CHECK(s.destination->peer_meta == meta);
            s.pair.expect_idle();
        }
    }
}

TEST_CASE("a second use of an unfinished key is the caller's error") {
    Send s;
    s.pair.a.post(s.source);
    CHECK_THROWS_AS(s.pair.a.post(s.pair.a.make(Role::source, "k", kFour, {0}, 1, 1)), LocalViolation);
    s.pair.a.post(
        s.pair.a.make(Role::destination, "k", kFour, {0}, 1, 1));  // the other direction is another name
}

TEST_CASE("gates: layers in any order, by marks or by the word") {
    for (const bool memory : {false, true}) {
        for (const bool by_word : {true, false}) {
            SessionConfig config;
            config.capabilities = memory ? kCanCopy : 0;
            config.pulls = memory;
            Pair pair(config);
            auto gate = std::make_shared<Gate>(4);
            auto source = pair.a.make(Role::source, "k", kFour, {0, 1, 2, 3}, 2, 20'000);
            source->memory[2].clear();
            auto destination = pair.b.make(Role::destination, "k", kFour, {0, 1, 2, 3}, 2, 20'000);
            source->gate = gate;
            source = pair.a.make(Role::source, "k", kFour, {0, 1, 2, 3}, 2, 20'000);
            source->gate = gate;
            fill(*source, 3);
            pair.b.post(destination);
            pair.a.post(source);
            pair.run();
            CHECK(destination->state == State::matched);
            CHECK(destination->gate_shut);
            CHECK(source->gate_shut);
            const std::vector<std::uint32_t> order = by_word ? std::vector<std::uint32_t>{0, 1, 2, 3}
                                                             : std::vector<std::uint32_t>{2, 0, 3, 1};
            for (std::size_t i = 0; i < 4; ++i) {
                CHECK_FALSE(destination->finished);
                if (by_word) {
                    gate->word()->store(i + 1);
                } else {
                    gate->mark(order[i]);
                }
                CHECK(pair.a.session.poll_gates(0) == (i < 3));
                pair.run();
                CHECK(destination->verified.contains({order[i] * 40'000u, order[i] * 40'000u + 40'000u}));
                CHECK(destination->gate_shut == (i < 3 && !memory));
            }
            CHECK(source->outcome.cause == Cause::ok);
            CHECK(destination->memory == source->memory);
            pair.expect_idle();
        }
    }
}

TEST_CASE("gates: empty layers hold nothing back") {
    for (const bool memory : {false, true}) {
        SessionConfig config;
        config.capabilities = memory ? kCanCopy : 0;
        config.pulls = memory;
        Pair pair(config);
        PoolTerms pool = pool_of(3);
        pool.groups.push_back({"none", true, "", "", "", 0});
        pool.layers[1].group = 1;
        const auto without_middle = [&](Party& side, Role role) {
            auto record = side.make(role, "k", pool, {0, 1, 2}, 1, 100);
            record->spans = {{{0, 100}, 0}, {{100, 100}, 1}, {{100, 200}, 2}};  // group 1 has no blocks
            record->layout = record->spans;
            record->nbytes = 200;
            return record;
        };
        auto source = without_middle(pair.a, Role::source),
             destination = without_middle(pair.b, Role::destination);
        source->gate = std::make_shared<Gate>(3);
        auto gate = std::const_pointer_cast<Gate>(source->gate);
        pair.a.post(source);
        pair.b.post(destination);
        pair.run();
        gate->mark(2);
        pair.a.session.poll_gates(0);
        pair.run();
        gate->mark(0);
        pair.a.session.poll_gates(0);
        pair.run();
        CHECK(source->outcome.cause == Cause::ok);
        CHECK(destination->outcome.cause == Cause::ok);
    }
}

TEST_CASE("gates: a failed one ends the transfer with its reason, at once or when the destination comes") {
    for (const bool memory : {false, true}) {
        for (const bool early : {true, false}) {
            SessionConfig config;
            config.capabilities = memory ? kCanCopy : 0;
            config.pulls = memory;
            Send s(100, config);
            auto gate = std::make_shared<Gate>(4);
            s.source->gate = gate;
            if (early) gate->fail("prefill failed");
            s.pair.a.post(s.source);
            s.pair.b.post(s.destination);
            s.pair.run();
            if (!early) {
                gate->mark(0);
                s.pair.a.session.poll_gates(0);
                s.pair.run();
                gate->fail("prefill failed");
                s.pair.a.session.poll_gates(0);
                s.pair.run();
            }
            CHECK(s.source->outcome.cause == Cause::cancelled);
            CHECK(s.destination->outcome.cause == Cause::peer_aborted);
            CHECK(s.destination->outcome.reason == "prefill failed");
            s.pair.expect_idle();
        }
    }
}

TEST_CASE("a chunk that GATED overtakes leaves the clocks standing") {
    Send s(20'000);
    auto gate = std::make_shared<Gate>(4);
    gate->mark(0);
    s.source->gate = gate;
    s.pair.b.post(s.destination);
    s.pair.a.post(s.source);
    s.pair.deliver(s.pair.b);
    auto job = s.pair.take(s.pair.a);
    REQUIRE(job);
    s.pair.left(s.pair.a, *job);
    s.pair.deliver(s.pair.a);  // GATED(shut), before the chunk
    s.pair.land(s.pair.a, *job, s.pair.arrive(s.pair.a, *job));
    CHECK(s.destination->gate_shut);
    s.pair.now = 60 * kSecond;
    s.pair.b.session.on_time(s.pair.now);
    CHECK(s.destination->state == State::moving);
}

TEST_CASE("refusals: before, after, for sends and receives, remembered and forgotten") {
    for (const bool memory : {false, true}) {
        SessionConfig config;
        config.capabilities = memory ? kCanCopy : 0;
        config.pulls = memory;
        for (int which = 0; which < 4; ++which) {
            CAPTURE(which);
            Send s(100, config);
            const bool before = which % 2 == 0, of_send = which / 2 == 0;
            Party& refuser = of_send ? s.pair.b : s.pair.a;
            Party& waiter = of_send ? s.pair.a : s.pair.b;
            const RecordPtr& waits = of_send ? s.source : s.destination;
            if (before) refuser.session.refuse("k", "no", kSecond, 0);
            waiter.post(waits);
            s.pair.run();
            if (!before) refuser.session.refuse("k", "no", kSecond, 0);
            s.pair.run();
            CHECK(waits->outcome.cause == Cause::peer_aborted);
            CHECK(waits->outcome.reason == "no");
            s.pair.expect_idle();
        }
        Send s(100, config);
        s.pair.a.session.refuse("k", "no", kSecond, 0);
        s.pair.now = 2 * kSecond;  // forgotten
        s.pair.b.post(s.destination, s.pair.now);
        s.pair.run();
        CHECK_FALSE(s.destination->finished);
        s.pair.a.session.refuse("other", "no", 9 * kSecond, s.pair.now);
        s.pair.a.post(s.pair.a.make(Role::source, "other", kFour, {0}, 1, 8),
                      s.pair.now);  // means it after all
        auto other = s.pair.b.post(s.pair.b.make(Role::destination, "other", kFour, {0}, 1, 8), s.pair.now);
        s.pair.run();
        CHECK(other->outcome.cause == Cause::ok);
    }
}

TEST_CASE("messages: in order, acknowledged, held back by the window") {
    SessionConfig config;
    config.message_window_nbytes = 3000;
    config.message_queue_nbytes = 6000;
    Pair pair(config);
    std::vector<MessagePtr> messages;
    for (std::size_t i = 0; i < 60; ++i) {
        auto message = std::make_shared<Message>();
        message->data = Bytes(i % 3 == 0 ? 0 : i * 10, static_cast<std::byte>(i));
        messages.push_back(message);
        pair.a.session.post_message(message, 0);
    }
    std::size_t taken = 0;
    for (int round = 0; round < 200 && taken < 60; ++round) {
        pair.run();
        std::uint64_t nbytes = 0;
        for (; taken < pair.b.inbox.size(); ++taken) {
            CHECK(pair.b.inbox[taken] ==
                  Bytes(taken % 3 == 0 ? 0 : taken * 10, static_cast<std::byte>(taken)));
            nbytes += pair.b.inbox[taken].size();
        }
        CHECK(nbytes <= 3000);
        pair.b.session.messages_taken(nbytes);
    }
    pair.run();
    CHECK(taken == 60);
    CHECK(pair.a.messages_done == messages);
    CHECK(std::all_of(messages.begin(), messages.end(),
                      [](const auto& m) { return m->outcome.cause == Cause::ok; }));
}

TEST_CASE("what exceeds the peer's limit waits here, and its ids stay in order") {
    SessionConfig config;
    config.unmatched = config.peer_unmatched = 4;
    Pair pair(config);
    std::vector<RecordPtr> sources, destinations;
    for (int i = 0; i < 20; ++i) {
        destinations.push_back(
            pair.b.post(pair.b.make(Role::destination, "k" + std::to_string(i), kFour, {0}, 1, 64)));
    }
    pair.run();
    CHECK(pair.b.session.outstanding() == 4);
    // This one is offered, so that its WANT goes out before older ones.
    sources.push_back(pair.a.post(pair.a.make(Role::source, "offered", kFour, {0}, 1, 64)));
    pair.run();
    destinations.push_back(pair.b.post(pair.b.make(Role::destination, "offered", kFour, {0}, 1, 64)));
    pair.run();
    CHECK(destinations.back()->outcome.cause == Cause::ok);
    for (int i = 0; i < 20; ++i) {
        sources.push_back(pair.a.post(pair.a.make(Role::source, "k" + std::to_string(i), kFour, {0}, 1, 64)));
        pair.run();
    }
    for (const auto& record : destinations) CHECK(record->outcome.cause == Cause::ok);
    for (const auto& record : sources) CHECK(record->outcome.cause == Cause::ok);
    pair.expect_idle();
}

TEST_CASE("withdrawn offers don't make the destination exceed the source's limit") {
    SessionConfig config;
    config.unmatched = config.peer_unmatched = 4;
    Pair pair(config);
    std::vector<RecordPtr> destinations;
    for (int round = 0; round < 3; ++round) {
        std::vector<RecordPtr> sources;
        for (int i = 0; i < 4; ++i) {
            sources.push_back(
                pair.a.post(pair.a.make(Role::source, std::to_string(round * 4 + i), kFour, {0}, 1, 64)));
        }
        pair.deliver(pair.a);
        for (int i = 0; i < 4; ++i) {
            destinations.push_back(pair.b.post(
                pair.b.make(Role::destination, std::to_string(round * 4 + i), kFour, {0}, 1, 64)));
        }
        for (const auto& source : sources) {
            pair.a.session.stop(source, {Cause::cancelled, Delivered::no, "", {}}, 0);
        }
        pair.run();
    }
    for (int i = 0; i < 12; ++i) {
        auto source = pair.a.post(pair.a.make(Role::source, std::to_string(i), kFour, {0}, 1, 64));
        pair.run();
        CHECK(source->outcome.cause == Cause::ok);
        CHECK(destinations[static_cast<std::size_t>(i)]->outcome.cause == Cause::ok);
    }
    pair.expect_idle();
}

TEST_CASE("each side keeps to the other's limits, not to its own") {
    SessionConfig few, many;
    few.unmatched = many.peer_unmatched = 2;
    few.regions = many.peer_regions = 4;
    Pair pair(many);
    pair.b.session.open(few, 0);
    for (int i = 0; i < 5; ++i) {
        pair.a.post(pair.a.make(Role::source, "a" + std::to_string(i), kFour, {0}, 1, 64));
        pair.b.post(pair.b.make(Role::source, "b" + std::to_string(i), kFour, {0}, 1, 64), 0, 7 + i % 2);
    }
    pair.run();  // b would throw what is beyond its own
    CHECK(pair.a.session.outstanding() == 2);
    CHECK(pair.b.session.outstanding() == 5);
    for (int i = 0; i < 5; ++i) {
        pair.b.post(pair.b.make(Role::destination, "a" + std::to_string(i), kFour, {0}, 1, 64));
        pair.a.post(pair.a.make(Role::destination, "b" + std::to_string(i), kFour, {0}, 1, 64));
    }
    pair.run();
    CHECK(pair.a.finished.size() == 10);
    pair.expect_idle();
}

TEST_CASE("a pool beyond the peer's regions is refused at the post, until another is closed") {
    SessionConfig config;
    config.regions = config.peer_regions = 9;
    Pair pair(config);
    const PoolTerms two = pool_of(2), none = pool_of(0);
    const auto post = [&](const std::string& key, const PoolTerms& pool, std::uint64_t id) {
        pair.a.post(pair.a.make(Role::destination, key, pool, {}, 1, 64), 0, id);
        pair.run();
    };
    post("1", kFour, 1);
    post("2", kFour, 2);
    post("again", kFour, 1);
    CHECK_THROWS_AS(post("3", two, 3), Excess);
    CHECK(pair.a.session.unfinished() == 3);
    post("3", none, 4);
    CHECK_THROWS_AS(post("5", none, 5), Excess);
    pair.a.session.forget_pool(2);
    post("5", two, 3);
    post("6", two, 6);
    CHECK_THROWS_AS(post("7", none, 7), Excess);
}

TEST_CASE("the peer's regions are known only when the session opens: what is beyond ends then") {
    Session session;
    Party side{SessionConfig{}};
    std::vector<RecordPtr> posts;
    for (int i = 0; i < 3; ++i) {
        posts.push_back(side.make(Role::destination, std::to_string(i), kFour, {0}, 1, 8));
        session.post(posts.back(), static_cast<std::uint64_t>(i), i);
    }
    SessionConfig config;
    config.peer_regions = 9;
    session.open(config, 5);
    for (const auto& transfer : session.take_quiescing()) session.quiesced(transfer, 5);
    REQUIRE(session.take_finished() == std::vector<TransferPtr>{posts[2]});
    CHECK(posts[2]->outcome.cause == Cause::resource_limit);
    CHECK(session.unfinished() == 2);
}

TEST_CASE("posts wait for the handshake, and may move to another session") {
    Session session;
    Party side{SessionConfig{}};
    auto source = side.make(Role::source, "s", kFour, {0}, 1, 8);
    auto destination = side.make(Role::destination, "d", kFour, {0}, 1, 8);
    session.post(source, 7, 5);
    session.post(destination, 7, 6);
    session.pump(0);
    CHECK(session.outbox().empty());
    const auto posts = session.give_up_posts();
    REQUIRE(posts.size() == 2);
    CHECK(session.unfinished() == 0);
    for (const auto& transfer : posts) side.session.take_over(transfer, 9);
    side.settle();
    CHECK(source->posted_at == 5);
    CHECK(source->told);
    CHECK(destination->told);
    CHECK_THROWS_AS(side.session.take_over(side.make(Role::source, "s", kFour, {0}, 1, 8), 9),
                    LocalViolation);
}

TEST_CASE("long transfers aren't starved by short ones, nor the other way round") {
    Pair pair;
    auto post_both = [&](const std::string& key, std::uint64_t nbytes) {
        pair.b.post(pair.b.make(Role::destination, key, kFour, {0}, 1, nbytes));
        return pair.a.post(pair.a.make(Role::source, key, kFour, {0}, 1, nbytes));
    };
    auto large = post_both("long", 20u << 20);
    auto small = post_both("short", 7u << 20);
    pair.deliver(pair.b);
    unsigned long_chunks = 0, short_chunks = 0;
    for (int i = 0; i < 9; ++i) {
        const auto job = pair.take(pair.a);
        REQUIRE(job);
        ++(job->transfer == large ? long_chunks : short_chunks);
    }
    CHECK(short_chunks >= 7);
    CHECK(long_chunks >= 1);
}
