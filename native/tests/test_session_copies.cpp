// The destination copies from the source's memory by itself, and what becomes of it when that way breaks.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "session_pair.hpp"

using namespace kvt::test;

namespace {

const PoolTerms kPool = pool_of(2);
const Outcome kCancel{Cause::cancelled, Delivered::no, "", {}};
constexpr std::uint64_t kMib = 1 << 20;

SessionConfig copying() {
    SessionConfig config;
    config.capabilities = kCanCopy;
    config.pulls = true;
    return config;
}

struct Copying {
    Pair pair{copying()};
    RecordPtr source = pair.a.make(Role::source, "k", kPool, {0}, 1, 3 * kMib);
    RecordPtr destination = pair.b.make(Role::destination, "k", kPool, {0}, 1, 3 * kMib);
    Copying() { fill(*source, 3); }
    /// Up to the source's word where its bytes are.
    void meet() {
        pair.a.post(source);
        pair.b.post(destination);
        pair.deliver(pair.a);
        pair.deliver(pair.b);
        pair.deliver(pair.a);
    }
    void cancel_source() {
        pair.a.session.stop(source, kCancel, pair.now);
        pair.a.settle(pair.now);
    }
    void break_way() {
        pair.b.session.set_pulls(false, pair.now);
        pair.b.settle(pair.now);
    }
    Frame take_said(Party& party) {
        REQUIRE_FALSE(party.said.empty());
        Frame frame = party.said.front();
        party.said.pop_front();
        return frame;
    }
};

}  // namespace

TEST_CASE("no byte goes by chunks where the destination copies") {
    Copying c;
    c.meet();
    CHECK_FALSE(c.pair.a.session.has_chunks());
    CHECK(c.source->state == State::sent);
    CHECK(c.destination->located);
    c.pair.run();
    CHECK(c.source->outcome.cause == Cause::ok);
    CHECK(c.destination->memory == c.source->memory);
    CHECK(c.destination->copies == 3);
    CHECK(c.source->copies == 3);
    CHECK(c.source->chunks == 0);
    c.pair.expect_idle();
}

TEST_CASE("a cancelled source waits for the verdict: the copy may be whole") {
    for (int copies = 0; copies <= 3; ++copies) {
        CAPTURE(copies);
        Copying c;
        c.meet();
        for (int i = 0; i < copies; ++i) CHECK(c.pair.copy_one(c.pair.b));
        c.cancel_source();
        CHECK_FALSE(c.source->finished);
        CHECK(c.pair.a.session.lend(1, 0) == nullptr);
        c.pair.run();
        CHECK(c.source->outcome.cause == (copies == 3 ? Cause::ok : Cause::cancelled));
        CHECK(c.destination->outcome.cause == (copies == 3 ? Cause::ok : Cause::peer_aborted));
        CHECK(c.source->outcome.delivered == (copies == 3 ? Delivered::yes : Delivered::no));
        c.pair.expect_idle();
    }
}

TEST_CASE("a source that leaves without a verdict doesn't know, and the late word is the old want's") {
    for (const bool copied : {false, true}) {
        Copying c;
        c.meet();
        for (int i = 0; copied && i < 3; ++i) c.pair.copy_one(c.pair.b);
        c.cancel_source();
        c.pair.now += 90 * kMs;
        c.pair.a.session.on_time(c.pair.now);
        c.pair.a.settle(c.pair.now);
        CHECK(c.source->outcome.delivered == Delivered::unknown);
        auto next = c.pair.a.post(c.pair.a.make(Role::source, "k", kPool, {0}, 1, 3 * kMib), c.pair.now);
        c.pair.run();
        CHECK(c.destination->outcome.cause == (copied ? Cause::ok : Cause::peer_aborted));
        CHECK_FALSE(next->finished);
        c.pair.b.post(c.pair.b.make(Role::destination, "k", kPool, {0}, 1, 3 * kMib), c.pair.now);
        c.pair.run();
        CHECK(next->outcome.cause == Cause::ok);
        c.pair.expect_idle();
    }
}

TEST_CASE("a source knows when the first copy began, if it can see it") {
    Copying c;
    c.meet();
    c.pair.now = 5 * kMs;
    CHECK(c.pair.copy_one(c.pair.b));
    c.pair.now = 9 * kMs;
    c.pair.run();
    CHECK(c.source->first_byte_at == 5 * kMs);
    CHECK(c.source->over_at == 9 * kMs);
    c.pair.expect_idle();
}

TEST_CASE("a source whose destination stops copying ends by its own clock") {
    Copying c;
    c.source->limits.stall = kSecond;
    c.meet();
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

TEST_CASE("copies that the source can't see are told, often enough for its clock, and not for nothing") {
    Copying c;
    c.source->limits.stall = 100 * kMs;
    c.meet();
    const auto copy_unseen = [&] {
        const auto target = c.pair.b.session.next_copy(c.pair.now);
        REQUIRE(target);
        Pair::copy(*c.source, *c.destination, target->range);
        c.pair.b.session.chunk_end(*target, {}, true, c.pair.now);
        c.pair.b.settle(c.pair.now);
    };
    c.pair.now = 10 * kMs;
    copy_unseen();
    CHECK(c.pair.b.said.empty());  // too soon to say again
    c.pair.now = 90 * kMs;
    copy_unseen();
    REQUIRE(c.pair.b.said.size() == 1);
    CHECK(c.pair.b.said.front().header.type == FrameType::copied);
    const Frame told = c.pair.b.said.front();
    c.pair.deliver(c.pair.b);
    CHECK(c.source->sent_nbytes == 2 * kMib);
    c.pair.now = 150 * kMs;
    c.pair.a.session.receive(told.header, told.body, c.pair.now);  // says nothing new: moves no clock
    c.pair.a.session.on_time(c.pair.now);
    CHECK(c.pair.a.session.next_deadline() == 190 * kMs);
    c.pair.run();
    CHECK(c.source->outcome.cause == Cause::ok);
    c.pair.expect_idle();
}

TEST_CASE("a destination that cancels with a copy under way waits for it, and for the source's word") {
    Copying c;
    c.meet();
    c.pair.b.hold_quiesce = true;
    const auto target = c.pair.b.session.next_copy(0);
    REQUIRE(target);
    c.pair.b.session.stop(c.destination, kCancel, 0);
    c.pair.b.settle();
    c.pair.b.session.chunk_end(*target, {}, true, 0);
    CHECK_FALSE(c.destination->finished);
    c.pair.b.hold_quiesce = false;
    c.pair.b.settle();
    CHECK(c.destination->finished);
    CHECK(c.pair.b.session.tombstones() == 1);
    c.pair.run();
    CHECK(c.source->outcome.cause == Cause::peer_aborted);
    c.pair.expect_idle();
}

TEST_CASE("a broken way: what has verified stays, the rest comes by chunks, and both say so") {
    for (int copies = 0; copies <= 2; ++copies) {
        for (const bool in_copy : {false, true}) {  // the way breaks under a copy
            CAPTURE(copies);
            CAPTURE(in_copy);
            Copying c;
            c.meet();
            for (int i = 0; i < copies; ++i) CHECK(c.pair.copy_one(c.pair.b));
            if (in_copy) {
                const auto target = c.pair.b.session.next_copy(0);
                REQUIRE(target);
                c.break_way();
                CHECK(c.pair.b.said.empty());  // not before the copy is over
                c.pair.b.session.copy_broke(*target, 0);
                c.pair.b.settle();
            } else {
                c.break_way();
            }
            REQUIRE(c.pair.b.said.size() == 1);
            CHECK(c.pair.b.said.front().header.type == FrameType::again);
            std::fill(c.destination->memory[0].begin() + copies * static_cast<std::ptrdiff_t>(kMib),
                      c.destination->memory[0].end(), std::byte{0});
            c.pair.run();
            CHECK(c.source->outcome.cause == Cause::ok);
            CHECK(c.destination->outcome.cause == Cause::ok);
            CHECK(c.destination->memory == c.source->memory);
            CHECK(c.destination->resumed_nbytes == static_cast<std::uint64_t>(copies) * kMib);
            CHECK(c.source->resumed_nbytes == c.destination->resumed_nbytes);
            CHECK(c.destination->chunks == static_cast<std::uint64_t>(4 * (3 - copies)));  // of 256 KiB
            CHECK(c.pair.a.session.counters().bytes_out == (3u - static_cast<unsigned>(copies)) * kMib);
            c.pair.expect_idle();
        }
    }
}

TEST_CASE("a way that broke before LOCATED was read: all comes by chunks") {
    Copying c;
    c.pair.b.post(c.destination);  // a WANT that pulls
    c.break_way();
    c.pair.a.post(c.source);
    c.pair.run();
    CHECK(c.destination->attempt == 2);
    CHECK(c.destination->copies == 0);
    CHECK(c.destination->memory == c.source->memory);
    CHECK(c.source->outcome.cause == Cause::ok);
    auto next = c.pair.b.post(c.pair.b.make(Role::destination, "k2", kPool, {0}, 1, kMib));
    c.pair.a.post(c.pair.a.make(Role::source, "k2", kPool, {0}, 1, kMib));
    c.pair.run();
    CHECK(next->attempt == 1);  // wasn't told that it can copy
    CHECK(next->chunks == 4);
    c.pair.expect_idle();
}

TEST_CASE("a broken way and a gate: what is released before and after comes by chunks") {
    for (const bool released_crosses : {false, true}) {
        Pair pair(copying());
        auto source = pair.a.make(Role::source, "k", kPool, {0, 1}, 1, kMib);
        auto destination = pair.b.make(Role::destination, "k", kPool, {0, 1}, 1, kMib);
        auto gate = std::make_shared<Gate>(2);
        source->gate = gate;
        fill(*source, 4);
        pair.a.post(source);
        pair.b.post(destination);
        pair.run();
        CHECK(destination->gate_shut);
        gate->mark(0);
        if (released_crosses) pair.a.session.poll_gates(0);
        pair.b.session.set_pulls(false, 0);
        pair.b.settle();
        pair.run();
        pair.a.session.poll_gates(0);
        pair.run();
        CHECK(destination->verified.contains({0, kMib}));
        CHECK_FALSE(destination->finished);
        gate->mark(1);
        pair.a.session.poll_gates(0);
        pair.run();
        CHECK(source->outcome.cause == Cause::ok);
        CHECK(destination->memory == source->memory);
        pair.expect_idle();
    }
}

TEST_CASE("a source that ends while the destination asks again") {
    Copying c;
    c.meet();
    CHECK(c.pair.copy_one(c.pair.b));
    c.break_way();
    c.cancel_source();
    c.pair.run();
    CHECK(c.source->outcome.cause == Cause::cancelled);
    CHECK(c.source->outcome.delivered == Delivered::no);
    CHECK(c.destination->outcome.cause == Cause::peer_aborted);
    c.pair.expect_idle();
}

TEST_CASE("violations of a source that locates") {
    Copying c;
    c.pair.a.post(c.source);
    c.pair.b.post(c.destination);
    c.pair.deliver(c.pair.a);
    c.pair.deliver(c.pair.b);
    const Frame located = c.take_said(c.pair.a);
    REQUIRE(located.header.type == FrameType::located);
    Session& b = c.pair.b.session;
    Header wrong = located.header;
    wrong.attempt = 2;
    CHECK_THROWS_AS(b.receive(wrong, located.body, 0), Violation);
    wrong = located.header;
    wrong.transfer = 9;
    CHECK_THROWS_AS(b.receive(wrong, located.body, 0), Violation);
    b.receive(located.header, located.body, 0);
    CHECK_THROWS_AS(b.receive(located.header, located.body, 0), Violation);  // twice
    Header chunk;
    chunk.type = FrameType::chunk;
    chunk.attempt = 1;
    chunk.transfer = 1;
    chunk.body_nbytes = 100;
    chunk.total = c.destination->nbytes;
    CHECK_THROWS_AS(b.chunk_begin(chunk, 0), Violation);
}

TEST_CASE("M9: locations that say more than was asked for count, until their transfers end") {
    SessionConfig config = copying();
    config.peer_state_nbytes = 4u << 20;
    Pair pair(config);
    const auto located = [&](std::uint32_t blocks, std::size_t nbytes) {
        const auto wanted = pair.b.make(Role::destination, "k" + std::to_string(pair.b.session.unfinished()),
                                        kPool, {0}, blocks, 1);
        pair.b.post(wanted);
        Header header{.type = FrameType::located, .attempt = 1, .transfer = wanted->id};
        header.body_nbytes = static_cast<std::uint32_t>(nbytes);
        pair.b.session.receive(header, Bytes(nbytes), 0);
        return wanted;
    };
    const auto cancel_all = [&](std::vector<RecordPtr>& all) {
        for (const auto& one : std::exchange(all, {})) {
            pair.b.session.stop(one, kCancel, 0);
            pair.b.settle();
        }
    };
    std::vector<RecordPtr> all;
    for (int i = 0; i < 64; ++i) {  // as much as was asked for: any number of them
        all.push_back(located(100'000, 400'000));
    }
    for (int round = 0; round < 3; ++round) {  // what has ended counts no more
        cancel_all(all);
        for (int i = 0; i < 3; ++i) {
            all.push_back(located(1, 1 << 20));
        }
    }
    CHECK_NOTHROW(located(1, 1 << 20));
    CHECK_THROWS_AS(located(1, 1 << 20), Excess);
}

TEST_CASE("violations of a destination that asks again") {
    const auto again = [](std::uint64_t want, std::uint16_t attempt, std::vector<Range> ranges) {
        return Frame{{.type = FrameType::again, .attempt = attempt, .transfer = want}, encode_ranges(ranges)};
    };
    const std::vector<Frame> wrong = {again(1, 1, {{0, kMib}}), again(1, 3, {{0, kMib}}),
                                      again(1, 2, {{0, 4 * kMib}}), again(2, 2, {{0, kMib}})};
    for (const Frame& frame : wrong) {
        Copying c;
        c.meet();
        CHECK_THROWS_AS(c.pair.a.session.receive(frame.header, frame.body, 0), Violation);
    }
    Copying c;
    c.meet();
    const Frame right = again(1, 2, {{0, kMib}});
    c.pair.a.session.receive(right.header, right.body, 0);
    const Frame second = again(1, 3, {{0, kMib}});
    CHECK_THROWS_AS(c.pair.a.session.receive(second.header, second.body, 0), Violation);
    Header copied{.type = FrameType::copied, .transfer = 1, .total = kMib};
    CHECK_THROWS_AS(c.pair.a.session.receive(copied, {}, 0), Violation);
}

TEST_CASE("who hasn't said that it can copy isn't told where") {
    Pair pair;
    auto source = pair.a.post(pair.a.make(Role::source, "k", kPool, {0}, 1, kMib));
    auto destination = pair.b.post(pair.b.make(Role::destination, "k", kPool, {0}, 1, kMib));
    pair.deliver(pair.a);
    Header located{.type = FrameType::located, .attempt = 1, .transfer = 1};
    CHECK_THROWS_AS(pair.b.session.receive(located, {}, 0), Violation);
    Frame want = pair.b.said.back();
    want.header.flags = kWantPulls;
    CHECK_THROWS_AS(pair.a.session.receive(want.header, want.body, 0), Violation);
}

TEST_CASE("violations of a gate, where the destination copies") {
    Pair pair(copying());
    auto source = pair.a.make(Role::source, "k", kPool, {0, 1}, 1, kMib);
    source->gate = std::make_shared<Gate>(2);
    pair.a.post(source);
    auto destination = pair.b.post(pair.b.make(Role::destination, "k", kPool, {0, 1}, 1, kMib));
    const auto released = [&](std::uint32_t layer) {
        pair.b.session.receive({.type = FrameType::released, .transfer = 1}, encode_released({layer}), 0);
    };
    pair.deliver(pair.a);
    CHECK_THROWS_AS(released(0), Violation);  // before LOCATED
    pair.deliver(pair.b);
    pair.deliver(pair.a);
    CHECK_THROWS_AS(released(2), Violation);
    released(0);
    CHECK_THROWS_AS(released(0), Violation);
    const Header done{.type = FrameType::done, .transfer = 1, .total = destination->nbytes, .arg = 2};
    CHECK_THROWS_AS(pair.a.session.receive(done, {}, 0), Violation);  // before all was released
}
