// One-sided transfers and leases of two sessions: every crossing, every end, every loss.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "grant_pair.hpp"

using namespace kvt::test;

namespace {

constexpr auto kWrite = GrantMode::write;

}  // namespace

TEST_CASE("a read and a write by a grant, by chunks and by copies") {
    for (const std::uint64_t more : {std::uint64_t{0}, kCanCopy}) {
        Granting g(granting(more));
        g.host.add(grant_of(1));
        g.host.add(grant_of(2, kWrite));
        const auto read = g.read(1), write = g.write(2);
        g.run();
        CHECK(read->outcome.cause == Cause::ok);
        CHECK(write->outcome.cause == Cause::ok);
        REQUIRE(g.host.served.size() == 2);
        CHECK(read->memory == g.host.served[0]->memory);
        CHECK(write->memory == g.host.served[1]->memory);
        CHECK(g.host.book.size() == 0);
        g.expect_nothing_left();
    }
}

TEST_CASE("a write's meta is its destination's, and its chunks name the WRITE") {
    Granting g;
    g.host.add(grant_of(1, kWrite));
    auto write = g.make(Role::source, 1);
    write->meta = "hello";
    g.pair.b.post(write);
    g.pair.deliver(g.pair.b);
    g.pair.deliver(g.pair.a);
    const auto job = g.pair.take(g.pair.b);
    REQUIRE(job);
    CHECK(job->header.arg == write->id);
    g.pair.left(g.pair.b, *job);
    g.pair.land(g.pair.b, *job, g.pair.arrive(g.pair.b, *job));
    g.run();
    CHECK(g.host.served[0]->peer_meta == "hello");
    CHECK(write->outcome.cause == Cause::ok);
    g.expect_nothing_left();
}

TEST_CASE("unknown, foreign, ended and out of range: one answer, byte for byte") {
    std::vector<Bytes> answers;
    for (int why = 0; why < 4; ++why) {
        Granting g;
        auto grant = grant_of(1);
        if (why == 1) grant->to = "another";
        if (why != 0) g.host.add(grant);
        if (why == 2) g.host.end(grant);
        auto read = g.make(Role::destination, 1, 0, 2);
        auto use = *read->use;
        if (why == 3) use.subset->at(0)[1] = kBlocks;
        read->use = std::make_shared<GrantUse>(use);
        g.pair.b.post(read);
        g.pair.deliver(g.pair.b);
        REQUIRE(g.pair.a.said.size() == 1);
        Frame& answer = g.pair.a.said.front();
        append_frame(answers.emplace_back(), answer.header, answer.body);
        g.run();
        CHECK(read->outcome.cause == Cause::grant_denied);
        g.expect_nothing_left();
    }
    for (const Bytes& answer : answers) CHECK(answer == answers[0]);
}

TEST_CASE("who was let in once hears that it is stale") {
    Granting g;
    const auto grant = grant_of(1);
    g.host.add(grant);
    const auto lease = g.hold(1);
    g.run();
    CHECK(lease->state == Hold::State::held);
    g.host.end(grant);
    g.run();
    CHECK(lease->outcome.cause == Cause::grant_stale);
    const auto read = g.read(1);
    g.run();
    CHECK(read->outcome.cause == Cause::grant_stale);
    const auto stranger = g.read(2);
    g.run();
    CHECK(stranger->outcome.cause == Cause::grant_denied);
    g.expect_nothing_left();
}

TEST_CASE("the owner knows which leases are of blocks that are mapped") {
    Granting g;
    const auto grant = grant_of(1, GrantMode::read, 0);
    const auto times = [&] { return GrantBook::times_mapped(*grant); };
    const auto waits = g.hold(1, 1000, true);
    g.run();
    g.host.add(grant);
    const auto plain = g.hold(1), mapped = g.hold(1, 0, true);
    g.run();
    for (const auto& lease : {waits, plain, mapped}) CHECK(lease->state == Hold::State::held);
    CHECK(times() == 2);
    g.let_go(plain);
    g.run();
    CHECK(times() == 2);
    g.let_go(mapped);
    g.let_go(waits);
    g.run();
    CHECK(times() == 0);
    g.expect_nothing_left();
}

TEST_CASE("what comes before its grant waits for it") {
    Granting g;
    const auto read = g.read(1, 1000), write = g.write(2, 1000);
    const auto lease = g.hold(3, 1000);
    g.run();
    CHECK(g.pair.a.session.kept_for_peer() == 3);
    CHECK(g.host.awaited.size() == 3);
    for (const unsigned n : {1u, 2u, 3u}) g.host.add(grant_of(n, n == 2 ? kWrite : GrantMode::read));
    g.run();
    CHECK(read->outcome.cause == Cause::ok);
    CHECK(write->outcome.cause == Cause::ok);
    CHECK(lease->state == Hold::State::held);
    g.let_go(lease);
    g.run();
    g.expect_nothing_left();
}

TEST_CASE("a grant that is made while its read is looked at isn't missed") {
    for (int what = 0; what < 3; ++what) {
        CAPTURE(what);
        Granting g;
        g.host.on_await = [&] { g.host.book.add(grant_of(1, what == 1 ? kWrite : GrantMode::read), 0); };
        const auto transfer = what == 0 ? g.read(1, 1000) : what == 1 ? g.write(1, 1000) : nullptr;
        const auto lease = what == 2 ? g.hold(1, 1000) : nullptr;
        g.run();
        if (transfer) CHECK(transfer->outcome.cause == Cause::ok);
        if (lease) CHECK(lease->state == Hold::State::held);
        if (lease) g.let_go(lease);
        g.run();
        g.expect_nothing_left();
    }
}

TEST_CASE("a grant of that name which is another's leaves it waiting for the next") {
    Granting g;
    const auto read = g.read(1, 1000);
    g.run();
    const auto foreign = grant_of(1);
    foreign->to = "another";
    g.host.add(foreign);
    g.run();
    CHECK_FALSE(read->finished);
    g.host.end(foreign);
    g.host.add(grant_of(1));
    g.run();
    CHECK(read->outcome.cause == Cause::ok);
    g.expect_nothing_left();
}

TEST_CASE("the wait for a grant ends, and leaves nothing") {
    Granting g;
    const auto read = g.read(1, 100), write = g.write(2, 100), longer = g.read(3, 300);
    const auto lease = g.hold(4, 100);
    g.run();
    g.pass(100 * kMs);
    g.run();
    CHECK(read->outcome.cause == Cause::grant_denied);
    CHECK(write->outcome.cause == Cause::grant_denied);
    CHECK(lease->outcome.cause == Cause::grant_denied);
    CHECK_FALSE(longer->finished);
    g.pass(200 * kMs);
    g.run();
    CHECK(longer->outcome.cause == Cause::grant_denied);
    g.expect_nothing_left();
}

TEST_CASE("the end of a wait crosses its withdrawal, and its grant") {
    for (int first = 0; first < 3; ++first) {
        CAPTURE(first);
        Granting g;
        const auto read = g.read(1, 100), write = g.write(2, 100);
        g.pair.deliver(g.pair.b);
        if (first == 0) {  // the user gives up while the answer is under way
            g.pass(100 * kMs);
            g.cancel(read);
            g.cancel(write);
        } else if (first == 1) {  // or is served while the word that it gives up is
            g.cancel(read);
            g.cancel(write);
            g.host.add(grant_of(1));
            g.host.add(grant_of(2, kWrite));
        } else {
            g.cancel(read);
            g.cancel(write);
            g.pair.deliver(g.pair.b);
            g.pass(100 * kMs);
        }
        g.run();
        CHECK(read->outcome.cause == Cause::cancelled);
        CHECK(write->outcome.cause == Cause::cancelled);
        g.expect_nothing_left();
    }
}

TEST_CASE("a write that is withdrawn crosses the WANT that answers it") {
    for (const bool held_back : {false, true}) {
        Granting g;
        g.host.add(grant_of(1, kWrite));
        const auto write = g.write(1);
        g.pair.deliver(g.pair.b);
        g.pair.b.hold_quiesce = held_back;  // its loads are still being stopped when the WANT comes
        g.cancel(write);
        g.pair.deliver(g.pair.a);
        g.pair.b.hold_quiesce = false;
        g.pair.b.answer_quiesce();
        g.run();
        CHECK(write->outcome.cause == Cause::cancelled);
        CHECK(g.host.served[0]->outcome.cause == Cause::peer_aborted);
        g.expect_nothing_left();
    }
}

TEST_CASE("a read against the end of its grant, in every state") {
    for (int state = 0; state < 6; ++state) {
        CAPTURE(state);
        Granting g;
        const auto grant = grant_of(1);
        g.host.add(grant);
        const auto read = g.read(1);
        std::optional<ChunkJob> job;
        if (state > 0) g.pair.deliver(g.pair.b);                                    // its READ is there
        if (state > 1) job = g.pair.take(g.pair.a);                                 // a mover reads
        if (state > 2) g.pair.left(g.pair.a, *job);                                 // its last byte has left
        if (state > 3) g.pair.land(g.pair.a, *job, g.pair.arrive(g.pair.a, *job));  // DONE is under way
        if (state > 4) g.pair.deliver(g.pair.b);
        g.host.settle();
        g.host.end(grant);
        if (state == 2) g.pair.left(g.pair.a, *job, false);
        if (state == 2 || state == 3) {
            g.pair.land(g.pair.a, *job, g.pair.arrive(g.pair.a, *job), true,
                        state == 2 ? ChunkStatus::aborted : ChunkStatus::ok);
        }
        g.run();
        const Cause ends[] = {Cause::grant_denied, Cause::grant_denied, Cause::grant_stale,
                              Cause::ok,           Cause::ok,           Cause::ok};
        CHECK(read->outcome.cause == ends[state]);
        CHECK(g.host.served.size() == (state == 0 ? 0 : 1));
        for (const auto& served : g.host.served) {
            CHECK((served->outcome.cause == Cause::ok) == (read->outcome.cause == Cause::ok));
        }
        g.expect_nothing_left();
    }
}

TEST_CASE("a write against the end of its grant, in every state") {
    for (int state = 0; state < 5; ++state) {
        CAPTURE(state);
        Granting g;
        const auto grant = grant_of(1, kWrite);
        g.host.add(grant);
        const auto write = g.write(1);
        std::optional<ChunkJob> job;
        if (state > 0) g.pair.deliver(g.pair.b);
        if (state > 1) g.pair.deliver(g.pair.a);  // the WANT is there
        if (state > 2) job = g.pair.take(g.pair.b);
        if (state > 3) g.pair.left(g.pair.b, *job);
        g.host.end(grant);
        if (state > 2) {
            const ChunkTarget target = g.pair.arrive(g.pair.b, *job);
            CHECK_FALSE(target.store);  // it has ended: not a byte
            if (state == 3) g.pair.left(g.pair.b, *job);
            g.pair.land(g.pair.b, *job, target);
        }
        g.run();
        CHECK(write->outcome.cause == (state < 1 ? Cause::grant_denied : Cause::grant_stale));
        CHECK(write->outcome.delivered == Delivered::no);
        for (const auto& served : g.host.served) CHECK(served->outcome.cause == Cause::grant_stale);
        g.expect_nothing_left();
    }
}

TEST_CASE("leases: the word that one has ended crosses its being let go") {
    Granting g;
    const auto grant = grant_of(1);
    g.host.add(grant);
    const auto held = g.hold(1), asked = g.hold(2), waits = g.hold(3, 1000), untold = g.hold(1);
    g.let_go(untold);
    g.run();
    CHECK(asked->outcome.cause == Cause::grant_denied);
    g.host.end(grant);  // HELD, no more
    g.let_go(held);     // crosses it
    g.let_go(waits);
    g.host.add(grant_of(3));  // and so does this one's coming
    g.run();
    CHECK(held->outcome.cause == Cause::ok);
    CHECK(waits->outcome.cause == Cause::ok);
    g.let_go(held);  // twice is once
    g.run();
    g.expect_nothing_left();
}

TEST_CASE("a token that names another grant by now: each lease is on the one that it was given for") {
    for (const bool lets_go : {false, true}) {
        CAPTURE(lets_go);
        Granting g;
        const auto earlier = grant_of(1), later = grant_of(1, GrantMode::read, 2);
        g.host.add(earlier);
        const auto on_earlier = g.hold(1);
        g.run();
        g.host.book.end(earlier, GrantState::revoked);  // the reactor hasn't told of it yet
        g.host.add(later);
        const auto on_later = g.hold(1);
        if (lets_go) g.let_go(on_earlier);
        g.run();
        CHECK(on_later->state == Hold::State::held);
        CHECK(later->leases["b"] == 1);
        g.host.stop(earlier);
        g.run();
        CHECK(on_earlier->outcome.cause == (lets_go ? Cause::ok : Cause::grant_stale));
        CHECK(on_later->state == Hold::State::held);
        CHECK(later->leases["b"] == 1);
        g.let_go(on_later);
        g.run();
        CHECK_FALSE(later->leases.contains("b"));
        CHECK(later->finished.contains("b"));
        g.expect_nothing_left();
    }
}

TEST_CASE("a refusal before and after: the waiting side hears the reason") {
    Granting g;
    g.pair.a.session.refuse(token_of(1), "no prefill", 100 * kMs, 0);
    const auto early = g.hold(1, 1000);
    g.run();
    CHECK(early->outcome.cause == Cause::grant_denied);  // at once, and the reason stays for the read
    const auto before = g.read(1, 1000), read = g.read(2, 1000), write = g.write(3, 1000);
    const auto lease = g.hold(2, 1000);
    g.run();
    CHECK(before->outcome.cause == Cause::peer_aborted);
    CHECK(before->outcome.reason == "no prefill");
    for (const unsigned n : {2u, 3u}) g.pair.a.session.refuse(token_of(n), "no prefill", 100 * kMs, 0);
    g.run();
    CHECK(read->outcome.reason == "no prefill");
    CHECK(write->outcome.reason == "no prefill");
    CHECK(lease->outcome.cause == Cause::grant_denied);
    g.pair.a.session.refuse(token_of(4), "no prefill", 100 * kMs, 0);
    g.pass(100 * kMs);  // it is remembered so long
    const auto later = g.hold(4, 1000);
    g.run();
    CHECK(later->state == Hold::State::asked);
    g.let_go(later);
    const auto after = g.read(4);
    g.run();
    CHECK(after->outcome.cause == Cause::grant_denied);
    g.expect_nothing_left();
}

namespace {

// A read that asks nobody, as the engine does it.
bool take(Granting& g, unsigned token, bool counted) {
    if (!g.pair.b.session.may_take(token_of(token), counted)) return false;
    g.pair.b.session.took({token_of(token), 1}, 4096, counted);
    g.run();
    return true;
}

}  // namespace

TEST_CASE("a read that asks nobody: the owner learns of it, and one is all that there is") {
    Granting g;
    const auto grant = grant_of(1), two = grant_of(2, GrantMode::read, 2),
               standing = grant_of(3, GrantMode::read, 0);
    for (const auto& one : {grant, two, standing}) g.host.add(one);
    CHECK(take(g, 1, true));
    CHECK(grant->state == GrantState::read);
    CHECK_FALSE(take(g, 1, true));
    CHECK(take(g, 2, true));
    CHECK(two->state == GrantState::open);
    CHECK(two->finished.size() == 1);
    CHECK_FALSE(take(g, 2, true));
    CHECK(take(g, 3, false));
    CHECK(take(g, 3, false));
    CHECK(standing->state == GrantState::open);
    const auto read = g.read(1);  // what it asks for it hears
    g.run();
    CHECK(read->outcome.cause == Cause::grant_stale);
    CHECK(g.pair.b.session.counters().receives_ok == 4);
    g.expect_nothing_left();
}

TEST_CASE("with a lease as many as one likes; without it no more, nor after one that has asked") {
    Granting g;
    const auto grant = grant_of(1, GrantMode::read, 2);
    g.host.add(grant);
    const auto lease = g.hold(1), second = g.hold(1);
    g.run();
    CHECK(take(g, 1, true));
    CHECK(take(g, 1, true));
    CHECK(grant->finished.empty());
    g.pair.b.session.let_go(lease);
    g.run();
    CHECK(take(g, 1, true));
    g.pair.b.session.let_go(second);
    CHECK_FALSE(take(g, 1, true));  // before the owner has read that, too
    g.run();
    CHECK(grant->finished.size() == 1);
    g.host.end(grant);
    const auto asked = grant_of(2, GrantMode::read, 2);
    g.host.add(asked);
    const auto read = g.read(2);
    g.run();
    CHECK(read->outcome.cause == Cause::ok);
    CHECK_FALSE(take(g, 2, true));
    g.host.end(asked);
    g.expect_nothing_left();
}

TEST_CASE("nothing is taken of a session that isn't open, or whose words wait to be sent") {
    Granting g;
    g.host.add(grant_of(1));
    g.pair.b.session.outbox().resize(600u << 10);
    CHECK_FALSE(g.pair.b.session.may_take(token_of(1), false));
    g.pair.b.session.outbox().clear();
    CHECK(g.pair.b.session.may_take(token_of(1), false));
    g.pair.b.session.lost(Cause::peer_lost, "reset", 1);
    CHECK_FALSE(g.pair.b.session.may_take(token_of(1), false));
}

TEST_CASE("M: who says TOOK of what it wasn't given is let in as by a READ, or not at all") {
    Granting g;
    const auto another = grant_of(1), write = grant_of(2, GrantMode::write);
    another->to = "another";
    g.host.add(another);
    g.host.add(write);
    for (unsigned n = 1; n <= 3; ++n) {
        g.pair.a.session.receive({.type = FrameType::took, .body_nbytes = 24}, encode_took({token_of(n), 1}),
                                 0);
    }
    g.run();
    CHECK(another->state == GrantState::open);
    CHECK(write->state == GrantState::open);
    g.host.end(another);
    g.host.end(write);
    g.expect_nothing_left();
}

TEST_CASE("loss in every state: one outcome each, and no pool in use") {
    for (int state = 0; state < 5; ++state) {
        CAPTURE(state);
        Granting g;
        for (const unsigned n : {1u, 3u}) g.host.add(grant_of(n));
        g.host.add(grant_of(2, kWrite));
        const std::vector<RecordPtr> all{g.read(1), g.write(2), g.read(8, 1000), g.write(9, 1000)};
        const auto held = g.hold(3), waits = g.hold(7, 1000);
        std::optional<ChunkJob> job;
        if (state > 0) g.pair.deliver(g.pair.b);
        if (state > 1) g.pair.deliver(g.pair.a);
        if (state > 2) job = g.pair.take(g.pair.a);
        if (state > 3) g.pair.arrive(g.pair.a, *job);
        g.lose();
        for (const auto& record : all) {
            CHECK(g.pair.b.times_finished(record) == 1);
            CHECK(record->outcome.cause == Cause::peer_lost);
        }
        for (const auto& served : g.host.served) CHECK(g.pair.a.times_finished(served) == 1);
        CHECK(held->outcome.cause == Cause::peer_lost);
        CHECK(waits->outcome.cause == Cause::peer_lost);
        g.expect_nothing_left();
    }
}

TEST_CASE("layouts that don't fit, and blocks that others write") {
    Granting g;
    g.host.add(grant_of(1));
    g.host.add(grant_of(2, kWrite));
    g.pool.groups[0].dtype = "float16";
    PoolTerms other = pool_of(2);
    auto read = g.make(Role::destination, 1), write = g.make(Role::source, 2);
    read->pool = write->pool = &other;
    g.pair.b.post(read);
    g.pair.b.post(write);
    g.run();
    for (const auto& record : {read, write}) {
        CHECK(record->outcome.cause == Cause::layout_mismatch);
        CHECK(record->outcome.mismatch.path == "dtype");
        CHECK(record->outcome.mismatch.ours == "bfloat16");
    }
    g.host.busy = true;
    const auto late = g.write(2);
    g.run();
    CHECK(late->outcome.cause == Cause::peer_aborted);
    g.expect_nothing_left();
}
