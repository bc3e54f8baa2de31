// The memory mode: the destination copies, so an offer is as good as bytes and every end of a source needs a
// verdict.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "session_pair.hpp"

using namespace kvt::test;

namespace {

const PoolTerms kPool = pool_of(2);
const Outcome kCancel{Cause::cancelled, Delivered::no, "", {}};

SessionConfig memory() {
    SessionConfig config;
    config.memory_backend = true;
    return config;
}

struct Copying {
    Pair pair{memory()};
    RecordPtr source = pair.a.make(Role::source, "k", kPool, {0}, 1, 3 << 20);
    RecordPtr destination = pair.b.make(Role::destination, "k", kPool, {0}, 1, 3 << 20);
    Copying() { fill(*source, 3); }
    void cancel_source() {
        pair.a.session.stop(source, kCancel, pair.now);
        pair.a.settle(pair.now);
    }
    void silence() {
        pair.now += 90 * kMs;
        pair.a.session.on_time(pair.now);
        pair.a.settle(pair.now);
    }
    RecordPtr again(Party& party, Role role) {
        return party.post(party.make(role, "k", kPool, {0}, 1, 3 << 20), pair.now);
    }
};

}  // namespace

TEST_CASE("a cancelled source waits for the verdict: the copy may be whole") {
    for (int copies = 0; copies <= 3; ++copies) {
        CAPTURE(copies);
        Copying c;
        c.pair.a.post(c.source);
        c.pair.b.post(c.destination);
        c.pair.deliver(c.pair.a);
        for (int i = 0; i < copies; ++i) CHECK(c.pair.copy_one(c.pair.b));
        c.cancel_source();  // before it has read the WANT
        CHECK_FALSE(c.source->finished);
        CHECK(c.pair.a.session.lend(1, 0) == nullptr);
        c.pair.run();
        CHECK(c.source->outcome.cause == (copies == 3 ? Cause::ok : Cause::cancelled));
        CHECK(c.destination->outcome.cause == (copies == 3 ? Cause::ok : Cause::peer_aborted));
        CHECK(c.source->outcome.delivered == (copies == 3 ? Delivered::yes : Delivered::no));
        c.pair.expect_idle();
    }
}

TEST_CASE("a source that was matched aborts with copies made") {
    Copying c;
    c.pair.a.post(c.source);
    c.pair.b.post(c.destination);
    c.pair.deliver(c.pair.a);
    c.pair.deliver(c.pair.b);
    CHECK(c.pair.copy_one(c.pair.b));
    c.cancel_source();
    c.pair.run();
    CHECK(c.source->outcome.cause == Cause::cancelled);
    CHECK(c.destination->outcome.cause == Cause::peer_aborted);
    c.pair.expect_idle();
}

TEST_CASE("an offer that nobody took is answered for") {
    Copying c;
    c.pair.a.post(c.source);
    c.pair.deliver(c.pair.a);
    c.cancel_source();
    c.pair.deliver(c.pair.a);
    CHECK_FALSE(c.source->finished);
    c.pair.run();
    CHECK(c.source->outcome.cause == Cause::cancelled);
    CHECK(c.source->outcome.delivered == Delivered::no);
    c.pair.expect_idle();
}

TEST_CASE("a verdict that comes late belongs to the offer that was left, not to the key's next user") {
    for (const bool want_crossed : {false, true}) {    // the WANT went out before the OFFER came
        for (const bool reposted : {false, true}) {    // the source's key is in use again
            for (const bool copied : {false, true}) {  // the late word is DONE
                CAPTURE(want_crossed);
                CAPTURE(reposted);
                CAPTURE(copied);
                Copying c;
                c.pair.a.post(c.source);
                if (want_crossed) c.pair.b.post(c.destination);
                c.pair.deliver(c.pair.a);
                if (!want_crossed) c.pair.b.post(c.destination);
                for (int i = 0; copied && i < 3; ++i) c.pair.copy_one(c.pair.b);
                c.cancel_source();
                c.silence();
                CHECK(c.source->outcome.delivered == Delivered::unknown);
                RecordPtr next;
                if (reposted) next = c.again(c.pair.a, Role::source);
                c.pair.run();
                CHECK(c.destination->outcome.cause == (copied ? Cause::ok : Cause::peer_aborted));
                if (reposted) {
                    CHECK_FALSE(next->finished);
                    auto receive = c.again(c.pair.b, Role::destination);
                    c.pair.run();
                    CHECK(next->outcome.cause == Cause::ok);
                    CHECK(receive->outcome.cause == Cause::ok);
                }
                c.pair.expect_idle();
            }
        }
    }
}

TEST_CASE("a late offer that was never taken doesn't swallow the next want") {
    for (const bool refused : {false, true}) {
        Copying c;
        c.pair.a.post(c.source);
        c.pair.deliver(c.pair.a);
        c.cancel_source();
        c.silence();
        CHECK(c.pair.a.session.kept_for_peer() == 1);
        if (refused) c.pair.b.session.refuse("k", "no", kSecond, c.pair.now);
        c.pair.b.settle();
        c.pair.run();
        CHECK(c.pair.a.session.kept_for_peer() == 0);
        c.pair.b.post(c.destination, c.pair.now);
        c.pair.run();
        auto next = c.again(c.pair.a, Role::source);
        c.pair.run();
        CHECK(next->outcome.cause == Cause::ok);
        CHECK(c.destination->outcome.cause == Cause::ok);
        c.pair.expect_idle();
    }
}

TEST_CASE("a source knows the copies' number, and when the first began") {
    Copying c;
    c.pair.a.post(c.source);
    c.pair.b.post(c.destination);
    c.pair.deliver(c.pair.a);
    c.pair.deliver(c.pair.b);
    c.pair.now = 5 * kMs;
    CHECK(c.pair.copy_one(c.pair.b));
    c.pair.now = 9 * kMs;
    c.pair.run();
    CHECK(c.source->outcome.cause == Cause::ok);
    CHECK(c.source->first_byte_at == 5 * kMs);
    CHECK(c.source->over_at == 9 * kMs);
    CHECK(c.destination->chunks == 3);
    CHECK(c.source->chunks == 3);
    c.pair.expect_idle();
}

TEST_CASE("a source whose destination stops copying ends by its own clock") {
    Copying c;
    c.source->limits.stall = kSecond;
    c.pair.a.post(c.source);
    c.pair.b.post(c.destination);
    c.pair.deliver(c.pair.a);
    c.pair.deliver(c.pair.b);
    c.pair.now = 900 * kMs;
    CHECK(c.pair.copy_one(c.pair.b));
    c.pair.now = 1899 * kMs;  // the copy has set it back
    c.pair.a.session.on_time(c.pair.now);
    c.pair.a.settle(c.pair.now);
    CHECK(c.source->state == State::sent);
    CHECK(c.pair.a.session.next_deadline() == 1900 * kMs);
    c.pair.now = 1900 * kMs;
    c.pair.a.session.on_time(c.pair.now);
    c.pair.a.settle(c.pair.now);
    CHECK(c.source->state == State::verdict);
    c.pair.run();
    CHECK(c.source->outcome.cause == Cause::timeout_bytes);
    CHECK(c.source->outcome.delivered == Delivered::no);
    CHECK(c.destination->outcome.cause == Cause::peer_aborted);
    c.pair.expect_idle();
}

TEST_CASE("copies that find the source gone are no bytes") {
    Copying c;
    c.pair.a.post(c.source);
    c.pair.b.post(c.destination);
    c.pair.deliver(c.pair.a);
    c.pair.a.hold_quiesce = true;
    c.cancel_source();
    CHECK(c.pair.copy_one(c.pair.b));
    CHECK(c.destination->verified.empty());
    c.pair.a.hold_quiesce = false;
    c.pair.a.settle();
    c.pair.run();
    CHECK(c.destination->outcome.cause == Cause::peer_aborted);
    c.pair.expect_idle();
}

TEST_CASE("a destination that cancels with a copy under way waits for it, and for the source's word") {
    Copying c;
    c.pair.b.post(c.destination);
    c.pair.a.post(c.source);
    c.pair.deliver(c.pair.b);
    c.pair.deliver(c.pair.a);
    c.pair.b.hold_quiesce = true;
    const auto target = c.pair.b.session.next_copy(0);
    REQUIRE(target);
    c.pair.b.session.stop(c.destination, kCancel, 0);
    c.pair.b.settle();
    c.pair.b.session.chunk_end(*target, {}, true, 0);
    c.pair.b.hold_quiesce = false;
    c.pair.b.settle();
    CHECK(c.destination->finished);
    CHECK(c.pair.b.session.tombstones() == 1);
    c.pair.run();
    CHECK(c.source->outcome.cause == Cause::peer_aborted);
    c.pair.expect_idle();
}
