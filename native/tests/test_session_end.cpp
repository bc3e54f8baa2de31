// How transfers end: cancels at every stage, deadlines, loss, late chunks.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "session_pair.hpp"

using namespace kvt::test;

namespace {

const PoolTerms kPool = pool_of(2);
const Outcome kCancel{Cause::cancelled, Delivered::no, "cancelled here", {}};

// Two chunks of 256 KiB.
struct Move {
    Pair pair;
    RecordPtr source, destination;
    explicit Move(bool memory = false) : pair(config_of(memory)) {
        source = pair.a.make(Role::source, "k", kPool, {0}, 2, 256 << 10);
        destination = pair.b.make(Role::destination, "k", kPool, {0}, 2, 256 << 10);
        fill(*source, 5);
    }
    static SessionConfig config_of(bool memory) {
        SessionConfig config;
        config.capabilities = memory ? kCanCopy : 0;
        config.pulls = memory;
        return config;
    }
    // 0: nothing; 1: both posted, nothing read; 2: the source has read; 3: a chunk is under way; 4: one has
    // landed; 5: both are under way; 6: all has landed, DONE is under way.
    std::vector<ChunkJob> jobs;
    std::vector<ChunkTarget> targets;
    void reach(int stage) {
        pair.b.post(destination);
        pair.a.post(source);
        if (stage >= 2) pair.deliver(pair.b);
        if (stage >= 2) pair.deliver(pair.a);
        if (stage >= 3) begin();
        if (stage == 3) return;
        if (stage >= 4) land(0);
        if (stage >= 5) begin();
        if (stage >= 6) land(1);
    }
    void begin() {
        jobs.push_back(*pair.take(pair.a));
        targets.push_back(pair.arrive(pair.a, jobs.back()));
        pair.left(pair.a, jobs.back());
    }
    void land(std::size_t i) { pair.land(pair.a, jobs[i], targets[i]); }
    void land_rest(int stage) {
        if (stage == 3) land(0);
        if (stage == 5) land(1);
    }
};

}  // namespace

TEST_CASE("cancel by either side at every stage: one outcome each, in agreement, nothing left") {
    for (int stage = 1; stage <= 6; ++stage) {
        for (const bool by_source : {true, false}) {
            for (const bool slow_quiesce : {true, false}) {
                CAPTURE(stage);
                CAPTURE(by_source);
                CAPTURE(slow_quiesce);
                Move m;
                m.reach(stage);
                Party& side = by_source ? m.pair.a : m.pair.b;
                const RecordPtr& mine = by_source ? m.source : m.destination;
                const RecordPtr& theirs = by_source ? m.destination : m.source;
                side.hold_quiesce = slow_quiesce;
                side.session.stop(mine, kCancel, 0);
                side.settle();
                m.land_rest(stage);
                m.pair.deliver(m.pair.other(side));
                if (slow_quiesce) {
                    side.hold_quiesce = false;
                    side.settle();
                }
                m.pair.run();
                if (by_source && stage <= 1) {  // unmatched: the destination waits on
                    CHECK(mine->outcome.cause == Cause::cancelled);
                    CHECK_FALSE(theirs->finished);
                    m.pair.b.session.stop(m.destination, kCancel, 0);
                    m.pair.run();
                } else if (stage == 6 || (by_source && stage == 5)) {
                    CHECK(m.source->outcome.cause == Cause::ok);  // sealed before the cancel
                    CHECK(m.destination->outcome.cause == Cause::ok);
                } else if (!by_source && stage == 1) {
                    CHECK(mine->outcome.cause == Cause::cancelled);
                    if (!theirs->finished) m.pair.a.session.stop(m.source, kCancel, 0);
                    m.pair.run();
                } else {
                    CHECK(mine->outcome.cause == Cause::cancelled);
                    CHECK(theirs->outcome.cause == Cause::peer_aborted);
                    CHECK(theirs->outcome.reason == "cancelled here");
                    CHECK(m.source->outcome.delivered == Delivered::no);
                }
                CHECK(m.pair.a.times_finished(m.source) == 1);
                CHECK(m.pair.b.times_finished(m.destination) == 1);
                m.pair.expect_idle();
            }
        }
    }
}

TEST_CASE("both sides cancel at once at every stage") {
    for (const bool memory : {false, true}) {
        for (int stage = 1; stage <= (memory ? 2 : 6); ++stage) {
            CAPTURE(stage);
            Move m(memory);
            m.reach(stage);
            m.pair.a.session.stop(m.source, kCancel, 0);
            m.pair.b.session.stop(m.destination, kCancel, 0);
            m.pair.a.settle();
            m.pair.b.settle();
            m.land_rest(stage);
            m.pair.run();
            const bool sealed = stage == 6;
            CHECK(m.source->outcome.cause == (sealed ? Cause::ok : Cause::cancelled));
            CHECK(m.destination->outcome.cause == (sealed ? Cause::ok : Cause::cancelled));
            CHECK(m.pair.a.times_finished(m.source) == 1);
            CHECK(m.pair.b.times_finished(m.destination) == 1);
            m.pair.expect_idle();
        }
    }
}

TEST_CASE("a cancelled destination is over once quiet, and drains what comes late") {
    Move m;
    m.reach(3);
    auto second = m.pair.take(m.pair.a);  // begun before the source hears of the cancel
    REQUIRE(second);
    m.pair.b.hold_quiesce = true;
    m.pair.b.session.stop(m.destination, kCancel, 0);
    m.pair.b.settle();
    CHECK_FALSE(m.destination->finished);
    m.pair.b.answer_quiesce();
    CHECK(m.destination->finished);
    CHECK(m.pair.b.session.tombstones() == 1);
    m.pair.b.hold_quiesce = false;
    m.pair.deliver(m.pair.b);
    m.pair.left(m.pair.a, *second);
    m.pair.run();
    CHECK(m.pair.b.session.tombstones() ==
          1);  // ABORTED counts two chunks: one hasn't ended, one hasn't come
    m.land(0);
    const ChunkTarget late = m.pair.arrive(m.pair.a, *second);
    CHECK_FALSE(late.store);
    m.pair.land(m.pair.a, *second, late);
    CHECK(m.pair.b.session.counters().drained_chunks == 1);
    m.pair.expect_idle();
    CHECK_THROWS_AS(m.pair.arrive(m.pair.a, *second), Violation);  // after the end
}

TEST_CASE("a chunk that the mover gives back unbegun isn't counted") {
    Move m;
    m.reach(2);
    auto job = m.pair.take(m.pair.a);
    REQUIRE(job);
    m.pair.a.hold_quiesce = true;
    m.pair.a.session.stop(m.source, kCancel, 0);
    m.pair.a.settle();
    m.pair.left(m.pair.a, *job, false, false);
    m.pair.a.hold_quiesce = false;
    m.pair.a.settle();
    REQUIRE(m.pair.a.said.back().header.type == FrameType::abort);
    CHECK(m.pair.a.said.back().header.arg == 0);
    m.pair.run();
    m.pair.expect_idle();
}

TEST_CASE("DONE overtakes the note that the last chunk has left") {
    for (const bool cancel : {false, true}) {
        for (const bool truth : {true, false}) {
            CAPTURE(cancel);
            CAPTURE(truth);
            Move m;
            m.reach(4);
            auto job = m.pair.take(m.pair.a);
            m.pair.a.hold_quiesce = true;
            if (cancel) m.pair.a.session.stop(m.source, kCancel, 0);
            m.pair.land(m.pair.a, *job, m.pair.arrive(m.pair.a, *job));
            m.pair.deliver(m.pair.b);
            CHECK_FALSE(m.source->finished);  // a mover may still read the source
            m.pair.left(m.pair.a, *job, truth, true);
            m.pair.a.hold_quiesce = false;
            m.pair.a.settle();
            CHECK(m.source->finished);
            CHECK(m.source->outcome.cause == (truth ? Cause::ok : Cause::protocol_error));
            m.pair.b.session.ping();
            m.pair.b.settle();
            if (truth) {
                m.pair.run();
                m.pair.expect_idle();
            } else {
                CHECK_THROWS_AS(m.pair.deliver(m.pair.b), Violation);
            }
        }
    }
}

TEST_CASE("loss in every state: what each side knows") {
    for (const bool memory : {false, true}) {
        for (int stage = 0; stage <= (memory ? 2 : 6); ++stage) {
            for (const bool stopping : {false, true}) {
                CAPTURE(memory);
                CAPTURE(stage);
                CAPTURE(stopping);
                Move m(memory);
                if (stage == 0) {
                    m.pair.a.post(m.source);
                    m.pair.b.post(m.destination);
                } else {
                    m.reach(stage);
                }
                m.pair.a.hold_quiesce = m.pair.b.hold_quiesce = true;
                if (stopping) m.pair.a.session.stop(m.source, kCancel, 0);
                if (stopping) m.pair.b.session.stop(m.destination, kCancel, 0);
                m.pair.a.session.lost(Cause::peer_lost, "reset", 0);
                m.pair.b.session.lost(Cause::peer_lost, "reset", 0);
                m.pair.a.settle();
                m.pair.b.settle();
                CHECK_FALSE(m.source->finished);
                m.pair.a.hold_quiesce = m.pair.b.hold_quiesce = false;
                m.pair.a.settle();
                m.pair.b.settle();
                m.land_rest(stage);
                const bool sealed = stage == 6;
                CHECK(m.source->outcome.cause == (stopping ? Cause::cancelled : Cause::peer_lost));
                CHECK(m.destination->outcome.cause == (sealed     ? Cause::ok
                                                       : stopping ? Cause::cancelled
                                                                  : Cause::peer_lost));
                const bool unknown = stage >= (memory ? 2 : 5);
                CHECK(m.source->outcome.delivered == (unknown ? Delivered::unknown : Delivered::no));
                CHECK(m.pair.a.times_finished(m.source) == 1);
                CHECK(m.pair.b.times_finished(m.destination) == 1);
                m.pair.a.said.clear();
                m.pair.b.said.clear();
                m.pair.expect_idle();
            }
        }
    }
}

TEST_CASE("loss in verdict, ending and draining; posts and messages afterwards") {
    Move m;
    m.reach(4);
    m.pair.a.session.stop(m.source, kCancel, 0);
    m.pair.a.settle();
    CHECK(m.source->state == State::verdict);
    m.pair.a.session.lost(Cause::peer_lost, "reset", 0);
    m.pair.a.settle();
    CHECK(m.source->outcome.cause == Cause::cancelled);
    CHECK(m.source->outcome.delivered == Delivered::no);  // half of it never left
    m.pair.b.hold_quiesce = true;
    m.pair.deliver(m.pair.a);
    CHECK(m.destination->state == State::ending);
    m.pair.b.session.lost(Cause::connection_closed, "closed", 0);
    m.pair.b.answer_quiesce();
    CHECK(m.destination->outcome.cause == Cause::peer_aborted);
    m.pair.b.hold_quiesce = false;
    for (const Role role : {Role::source, Role::destination}) {
        auto late = m.pair.b.post(m.pair.b.make(role, "late", kPool, {0}, 1, 8));
        CHECK(late->finished);
        CHECK(late->outcome.cause == Cause::connection_closed);
        CHECK(late->outcome.delivered == Delivered::no);
    }
    auto message = std::make_shared<Message>();
    m.pair.b.session.post_message(message, 0);
    CHECK(message->outcome.cause == Cause::connection_closed);
    m.pair.b.said.clear();
    m.pair.a.said.clear();
    m.pair.expect_idle();
}

TEST_CASE("deadlines: match, gate, bytes, total, on both sides") {
    const auto expire = [](Pair& pair, Party& side, Time at) {
        CHECK(side.session.next_deadline() <= at);
        pair.now = at - 1;
        side.session.on_time(pair.now);
        side.settle(pair.now);
        CHECK(side.finished.empty());
        pair.now = at;
        side.session.on_time(pair.now);
        side.settle(pair.now);
    };
    SUBCASE("match") {
        Move m;
        m.pair.a.post(m.source);
        expire(m.pair, m.pair.a, 300 * kSecond);
        CHECK(m.source->outcome.cause == Cause::timeout_match);
        m.pair.b.post(m.destination, m.pair.now);
        m.pair.run();
        CHECK_FALSE(m.destination->finished);  // nothing was left behind
        expire(m.pair, m.pair.b, 600 * kSecond);
        CHECK(m.destination->outcome.cause == Cause::timeout_match);
    }
    SUBCASE("total") {
        for (const bool source : {true, false}) {
            Move m;
            m.source->limits.total = m.destination->limits.total = 3 * kSecond;
            m.reach(4);
            expire(m.pair, source ? m.pair.a : m.pair.b, 3 * kSecond);
            m.pair.run();
            const RecordPtr& mine = source ? m.source : m.destination;
            CHECK(mine->outcome.cause == Cause::timeout_total);
            CHECK((source ? m.destination : m.source)->outcome.cause == Cause::peer_aborted);
        }
    }
    SUBCASE("bytes") {
        for (const bool source : {true, false}) {
            Move m;
            m.pair.now = kSecond;
            m.reach(4);
            expire(m.pair, source ? m.pair.a : m.pair.b, 11 * kSecond);
            m.pair.run();
            CHECK((source ? m.source : m.destination)->outcome.cause == Cause::timeout_bytes);
        }
    }
    SUBCASE("gate") {
        for (const bool source : {true, false}) {
            Move m;
            auto gate = std::make_shared<Gate>(2);
            m.source->gate = gate;
            m.reach(2);
            expire(m.pair, source ? m.pair.a : m.pair.b, 300 * kSecond);
            m.pair.run();
            CHECK((source ? m.source : m.destination)->outcome.cause == Cause::timeout_gate);
        }
    }
    SUBCASE("our own pause restarts all but the total") {
        Move m;
        m.reach(4);
        m.pair.now = 60 * kSecond;
        m.pair.b.session.resumed(m.pair.now);
        m.pair.b.session.on_time(m.pair.now);
        CHECK(m.destination->state == State::moving);
    }
}

TEST_CASE("a verdict that doesn't come in time: unknown, within 100 ms, and the late word is understood") {
    for (const int word : {0, 1, 2}) {  // DONE, ABORT, DONE that was not yet on its way
        CAPTURE(word);
        Move m;
        m.reach(5);
        if (word == 0) m.land(1);
        m.pair.a.session.stop(m.source, kCancel, 0);
        m.pair.a.settle();
        m.pair.now = m.pair.a.session.next_deadline();
        CHECK(m.pair.now <= 100 * kMs);
        m.pair.a.session.on_time(m.pair.now);
        m.pair.a.settle(m.pair.now);
        CHECK(m.source->outcome.cause == Cause::cancelled);
        CHECK(m.source->outcome.delivered == Delivered::unknown);
        if (word == 1) m.pair.b.session.stop(m.destination, kCancel, m.pair.now);
        m.pair.b.settle();
        if (word != 0) m.land(1);
        m.pair.run();
        if (word == 2)
            CHECK(m.destination->outcome.cause == Cause::ok);  // it was all there when the ABORT came
        m.pair.expect_idle();
    }
}

TEST_CASE("digests: bad chunks fail the transfer when all has come, by name; the others are sealed") {
    Move m;
    m.reach(3);
    m.pair.land(m.pair.a, m.jobs[0], m.targets[0], false);
    CHECK_FALSE(m.destination->finished);
    m.begin();
    m.land(1);
    m.pair.run();
    CHECK(m.destination->outcome.cause == Cause::integrity);
    CHECK(m.source->outcome.cause == Cause::peer_aborted);
    CHECK(m.source->outcome.delivered == Delivered::no);
    CHECK(m.destination->corrupt.ranges() == std::vector<Range>{{0, 256 << 10}});
    CHECK(m.destination->verified.ranges() == std::vector<Range>{{256 << 10, 512 << 10}});
    m.pair.expect_idle();
}

TEST_CASE("the key of a cancelled transfer is free at once, on both sides") {
    for (const bool memory : {false, true}) {
        for (const bool by_source : {true, false}) {
            for (int stage = 1; stage <= (memory ? 2 : 5); ++stage) {
                CAPTURE(memory);
                CAPTURE(by_source);
                CAPTURE(stage);
                Move m(memory);
                m.reach(stage);
                Party& side = by_source ? m.pair.a : m.pair.b;
                side.session.stop(by_source ? m.source : m.destination, kCancel, 0);
                side.settle();
                std::vector<RecordPtr> sources, destinations;
                const auto again = [&] {
                    if (m.source->finished && sources.empty())
                        sources.push_back(
                            m.pair.a.post(m.pair.a.make(Role::source, "k", kPool, {0}, 2, 256 << 10)));
                    if (m.destination->finished && destinations.empty() &&
                        (sources.empty() || !sources[0]->finished)) {
                        destinations.push_back(
                            m.pair.b.post(m.pair.b.make(Role::destination, "k", kPool, {0}, 2, 256 << 10)));
                    }
                };
                again();
                m.land_rest(stage);
                m.pair.run();
                again();
                m.pair.run();
                const RecordPtr& source = sources.empty() ? m.source : sources[0];
                const RecordPtr& destination = destinations.empty() ? m.destination : destinations[0];
                CHECK(source->outcome.cause == Cause::ok);
                CHECK(destination->outcome.cause == Cause::ok);
                m.pair.expect_idle();
            }
        }
    }
}
