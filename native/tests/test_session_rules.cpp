// A peer that breaks the rules, and what it can make us keep.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "session_pair.hpp"

using namespace kvt::test;

namespace {

const PoolTerms kPool = pool_of(2);
const Outcome kCancel{Cause::cancelled, Delivered::no, "", {}};

// A session and a hostile peer, which writes frames by hand.
struct Hostile {
    Party party;
    Party pen{SessionConfig{}};  // makes records whose terms the frames carry
    std::uint64_t next_want = 1, next_offer = 1;
    explicit Hostile(SessionConfig config = {}) : party(config) {
        say(FrameType::pool, 0, 7, 0, 0, encode_pool(kPool));
    }

    void say(FrameType type, std::uint8_t flags, std::uint64_t transfer, std::uint64_t total,
             std::uint64_t arg, Bytes body = {}) {
        Header header;
        header.type = type;
        header.flags = flags;
        header.transfer = transfer;
        header.total = total;
        header.arg = arg;
        header.body_nbytes = static_cast<std::uint32_t>(body.size());
        party.session.receive(header, body, 0);
        party.settle();
    }
    static Terms terms(std::uint32_t blocks, std::uint64_t piece) { return {7, {{0, blocks}}, {{0, piece}}}; }
    std::uint64_t want(const std::string& key, std::uint64_t nbytes = 100, std::uint8_t flags = 0) {
        std::vector<Range> ranges;
        if (nbytes > 0) ranges.push_back({0, nbytes});
        say(FrameType::want, flags, next_want, nbytes, 0, encode_want({key, "", terms(1, nbytes), ranges}));
        return next_want++;
    }
    std::uint64_t offer(const std::string& key, std::uint64_t nbytes = 100, bool gated = false) {
        say(FrameType::offer, 0, next_offer, nbytes, 0, encode_offer({key, "", "", gated, terms(1, nbytes)}));
        return next_offer++;
    }
    RecordPtr post(Role role, const std::string& key = "k", std::uint64_t nbytes = 100) {
        return party.post(party.make(role, key, kPool, {0}, 1, nbytes));
    }
    ChunkTarget chunk(std::uint64_t want_id, std::uint64_t offset, std::uint32_t nbytes, std::uint64_t total,
                      std::uint64_t arg = 0) {
        Header header{FrameType::chunk, 0, 1, nbytes, want_id, offset, total, arg};
        const ChunkTarget target = party.session.chunk_begin(header, 0);
        party.settle();
        return target;
    }
    void end(const ChunkTarget& target, Trailer trailer = {}, bool verified = true) {
        party.session.chunk_end(target, trailer, verified, 0);
        party.settle();
    }
    Header last_said() const { return party.said.back().header; }
    // A source whose every byte has left.
    RecordPtr sent(std::uint64_t nbytes = 100) {
        auto record = post(Role::source, "k", nbytes);
        want("k", nbytes);
        auto job = party.session.next_inline(0);
        REQUIRE(job);
        party.session.chunk_left(*job, true, true, 0);
        return record;
    }
};

}  // namespace

TEST_CASE("ids must be new, names known, totals true") {
    Hostile h;
    h.want("a");
    CHECK_THROWS_AS(h.say(FrameType::want, 0, 1, 100, 0, encode_want({"b", "", h.terms(1, 100), {{0, 100}}})),
                    Violation);
    CHECK_THROWS_AS(h.say(FrameType::want, 0, 9, 99, 0, encode_want({"b", "", h.terms(1, 100), {{0, 99}}})),
                    Violation);
    CHECK_THROWS_AS(
        h.say(FrameType::want, 0, 10, 100, 0, encode_want({"b", "", h.terms(1, 100), {{0, 101}}})),
        Violation);
    CHECK_THROWS_AS(h.say(FrameType::want, 0, 11, 100, 0, encode_want({"b", "", h.terms(1, 100), {}})),
                    Violation);
    CHECK_THROWS_AS(
        h.say(FrameType::want, 0, 12, 100, 5, encode_want({"b", "", h.terms(1, 100), {{0, 100}}})),
        Violation);
    CHECK_THROWS_AS(
        h.say(FrameType::want, kWantPulls, 13, 100, 0, encode_want({"b", "", h.terms(1, 100), {{0, 100}}})),
        Violation);
    Terms unknown = h.terms(1, 100);
    unknown.pool = 8;
    CHECK_THROWS_AS(h.say(FrameType::want, 0, 14, 100, 0, encode_want({"b", "", unknown, {{0, 100}}})),
                    Violation);
    h.offer("a");
    CHECK_THROWS_AS(
        h.say(FrameType::offer, 0, 1, 100, 0, encode_offer({"b", "", "", false, h.terms(1, 100)})),
        Violation);
    CHECK_THROWS_AS(
        h.say(FrameType::offer, 0, 5, 101, 0, encode_offer({"b", "", "", false, h.terms(1, 100)})),
        Violation);
    CHECK_THROWS_AS(h.offer("a"), Violation);
    CHECK_THROWS_AS(h.want("a"), Violation);
}

TEST_CASE("an OFFER's floor is a WANT that was sent") {
    for (const std::uint64_t floor : {std::uint64_t{1}, std::uint64_t{2}, std::uint64_t{1} << 60}) {
        Hostile h;
        h.post(Role::destination, "other");
        const auto say = [&] {
            h.say(FrameType::offer, 0, 1, 100, floor, encode_offer({"k", "", "", false, h.terms(1, 100)}));
        };
        if (floor == 1) {
            CHECK_NOTHROW(say());
        } else {
            CHECK_THROWS_AS(say(), Violation);
        }
    }
}

TEST_CASE("a chunk's attempt is checked also when the chunk is drained") {
    Hostile h;
    const auto destination = h.post(Role::destination);
    CHECK_THROWS_AS(h.party.session.chunk_begin({FrameType::chunk, 0, 2, 10, 1, 0, 100, 0}, 0), Violation);
    h.party.session.stop(destination, kCancel, 0);
    h.party.settle();
    CHECK_THROWS_AS(h.party.session.chunk_begin({FrameType::chunk, 0, 0, 10, 1, 0, 100, 0}, 0), Violation);
    h.end(h.chunk(1, 0, 10, 100));
}

TEST_CASE("M9: ended receives, also of a peer that offers first and answers for none") {
    SessionConfig config;
    config.unmatched = 64;
    Hostile h(config);
    for (int i = 0; i < 300; ++i) {
        const std::string key = "k" + std::to_string(i);
        h.offer(key);
        const auto destination = h.post(Role::destination, key);
        CHECK(destination->told == (i < 256));
        h.party.session.stop(destination, kCancel, 0);
        h.party.settle();
    }
    CHECK(h.party.session.tombstones() == 256);
    CHECK(h.party.session.kept_for_peer() == 44);
    const auto waits = h.post(Role::destination, "k280");
    CHECK_FALSE(waits->told);
    h.say(FrameType::aborted, kFromSource, 1, 0, 0);
    CHECK(waits->told);
    CHECK(h.party.session.kept_for_peer() == 43);
}

TEST_CASE("M7: sizes that overflow") {
    Hostile h;
    const std::uint64_t huge = std::uint64_t{1} << 61;
    CHECK_THROWS_AS(h.say(FrameType::want, 0, 1, 0, 0, encode_want({"b", "", h.terms(0xffffffff, huge), {}})),
                    Violation);
    CHECK_THROWS_AS(
        h.say(FrameType::want, 0, 2, 0, 0, encode_want({"b", "", h.terms(2, ~std::uint64_t{0}), {}})),
        Violation);
    auto destination = h.post(Role::destination);
    CHECK_THROWS_AS(h.chunk(1, ~std::uint64_t{0}, 100, 100), Violation);
    CHECK_THROWS_AS(h.chunk(1, ~std::uint64_t{0} - 50, 100, 100), Violation);
    CHECK_THROWS_AS(h.chunk(1, 1, 100, 100), Violation);
    CHECK_THROWS_AS(h.chunk(1, 0, 100, ~std::uint64_t{0}), Violation);
    CHECK(destination->claimed.empty());
}

TEST_CASE("M12: more than asked, twice, after the end") {
    Hostile h;
    CHECK_THROWS_AS(h.chunk(1, 0, 10, 100), Violation);  // nothing was asked
    auto destination = h.post(Role::destination);
    const auto half = h.chunk(1, 0, 50, 100);
    CHECK_THROWS_AS(h.chunk(1, 0, 50, 100), Violation);
    CHECK_THROWS_AS(h.chunk(1, 49, 10, 100), Violation);
    h.end(half);
    CHECK_THROWS_AS(h.chunk(1, 10, 10, 100), Violation);
    h.end(h.chunk(1, 50, 50, 100));
    CHECK(destination->outcome.cause == Cause::ok);
    CHECK_THROWS_AS(h.chunk(1, 0, 50, 100), Violation);
    CHECK_THROWS_AS(h.chunk(2, 0, 50, 100), Violation);
    CHECK_THROWS_AS(
        h.say(FrameType::abort, kFromSource, 2, 0, 0, encode_abort({AbortCode::cancelled, "", {}})),
        Violation);
    CHECK_THROWS_AS(h.say(FrameType::gated, kGateShut, 2, 0, 0), Violation);
}

TEST_CASE("M12, M14: a DONE before all was sent, twice, or with other counts") {
    for (const int which : {0, 1, 2, 3, 4, 5}) {
        CAPTURE(which);
        Hostile h;
        if (which == 0) {  // never asked
            CHECK_THROWS_AS(h.say(FrameType::done, 0, 1, 100, 1), Violation);
        } else if (which == 1) {  // nothing sent
            h.post(Role::source);
            h.want("k");
            CHECK_THROWS_AS(h.say(FrameType::done, 0, 1, 100, 0), Violation);
        } else if (which == 2) {
            h.sent();
            CHECK_THROWS_AS(h.say(FrameType::done, 0, 1, 99, 1), Violation);
        } else if (which == 3) {
            h.sent();
            CHECK_THROWS_AS(h.say(FrameType::done, 0, 1, 100, 2), Violation);
        } else if (which == 4) {
            auto source = h.sent();
            h.say(FrameType::done, 0, 1, 100, 1);
            CHECK(source->outcome.cause == Cause::ok);
            CHECK_THROWS_AS(h.say(FrameType::done, 0, 1, 100, 1), Violation);
        } else {  // half is sent
            auto source = h.post(Role::source, "k", 512 << 10);
            h.want("k", 512 << 10);
            auto job = h.party.session.next_chunk(0);
            REQUIRE(job);
            h.party.session.chunk_left(*job, true, true, 0);
            CHECK_THROWS_AS(h.say(FrameType::done, 0, 1, 512 << 10, 1), Violation);
            CHECK_FALSE(source->finished);
        }
    }
}

TEST_CASE("a DONE for bytes that the source broke off is no success") {
    Hostile h;
    auto source = h.post(Role::source, "k", 100'000);
    h.want("k", 100'000);
    auto job = h.party.session.next_chunk(0);
    REQUIRE(job);
    h.party.hold_quiesce = true;
    h.party.session.stop(source, kCancel, 0);
    h.party.session.chunk_left(*job, false, true, 0);
    h.party.hold_quiesce = false;
    h.party.settle();
    CHECK(source->state == State::verdict);
    CHECK_THROWS_AS(h.say(FrameType::done, 0, 1, 100'000, 1), Violation);
}

TEST_CASE("a peer that says DONE early and stops reading holds nobody: the deadline ends it") {
    Hostile h;
    auto source = h.post(Role::source, "k", 100'000);
    h.want("k", 100'000);
    auto job = h.party.session.next_chunk(0);
    REQUIRE(job);
    h.party.hold_quiesce = true;
    h.say(FrameType::done, 0, 1, 100'000, 1);
    CHECK(h.party.quiescing.size() == 1);  // asked at once: the mover leaves the chunk
    h.party.session.chunk_left(*job, false, true, 0);
    h.party.answer_quiesce();
    CHECK(source->outcome.cause == Cause::protocol_error);
    CHECK_THROWS_AS(h.say(FrameType::ping, 0, 0, 0, 0), Violation);
}

TEST_CASE("answers to nothing") {
    Hostile h;
    const Bytes abort = encode_abort({AbortCode::cancelled, "", {}});
    CHECK_THROWS_AS(h.say(FrameType::aborted, 0, 1, 0, 0), Violation);
    CHECK_THROWS_AS(h.say(FrameType::aborted, kFromSource, 1, 0, 0), Violation);
    CHECK_THROWS_AS(h.say(FrameType::aborted, kOfferId, 1, 0, 0), Violation);
    CHECK_THROWS_AS(h.say(FrameType::abort, 0, 1, 0, 0, abort), Violation);
    CHECK_THROWS_AS(h.say(FrameType::abort, kOfferId, 1, 0, 0, abort), Violation);
    CHECK_THROWS_AS(h.say(FrameType::abort, kOfferId | kFromSource, 1, 0, 0, abort), Violation);
    CHECK_THROWS_AS(h.say(FrameType::message_ack, 0, 1, 0, 0), Violation);
    CHECK_THROWS_AS(h.say(FrameType::message, 0, 2, 0, 0), Violation);
    CHECK_THROWS_AS(h.say(FrameType::released, 0, 1, 0, 0, encode_released({0})), Violation);
    CHECK_THROWS_AS(h.say(FrameType::close, 0, 0, 0, 4), Violation);
    auto destination = h.post(Role::destination);
    CHECK_THROWS_AS(h.say(FrameType::aborted, kFromSource, 1, 0, 0), Violation);
    h.party.session.stop(destination, kCancel, 0);
    h.party.settle();
    CHECK_THROWS_AS(h.say(FrameType::aborted, kFromSource | kOfferId, 1, 0, 0), Violation);
    CHECK(h.party.session.tombstones() == 1);
    auto source = h.sent();
    CHECK_THROWS_AS(h.say(FrameType::aborted, 0, 1, 0, 0), Violation);
    h.say(FrameType::close, 0, 0, 0, 2);
    CHECK(h.party.session.peer_closed() == CloseCode::protocol);
}

TEST_CASE("counts of an ABORT or ABORTED bind the source") {
    for (const bool by_source : {true, false}) {
        for (const std::uint64_t said : {0, 1, 2}) {
            Hostile h;
            auto destination = h.post(Role::destination);
            const auto first = h.chunk(1, 0, 10, 100);
            h.end(first);
            if (!by_source) h.party.session.stop(destination, kCancel, 0);
            h.party.settle();
            const auto type = by_source ? FrameType::abort : FrameType::aborted;
            const Bytes body = by_source ? encode_abort({AbortCode::cancelled, "", {}}) : Bytes();
            if (said == 0) {
                CHECK_THROWS_AS(h.say(type, kFromSource, 1, 0, said, body), Violation);
                continue;
            }
            h.say(type, kFromSource, 1, 0, said, body);
            CHECK(destination->finished);
            CHECK(h.party.session.tombstones() == said - 1);
            if (said == 2) h.end(h.chunk(1, 0, 10, 100));  // anything, into scratch
            CHECK(h.party.session.tombstones() == 0);
            CHECK_THROWS_AS(h.chunk(1, 20, 10, 100), Violation);
        }
    }
}

TEST_CASE("a digest of another kind, an aborted chunk, and too many pieces") {
    SessionConfig config;
    config.digest = DigestKind::crc32c;
    Hostile h(config);
    auto destination = h.post(Role::destination);
    CHECK_THROWS_AS(h.end(h.chunk(1, 0, 10, 100), {ChunkStatus::ok, DigestKind::none, 0}), Violation);
    h.end(h.chunk(1, 10, 90, 100), {ChunkStatus::aborted, DigestKind::crc32c, 0});
    CHECK(destination->verified.empty());
    CHECK_FALSE(destination->finished);

    Hostile scattered;
    auto large = scattered.post(Role::destination, "k", 1 << 20);
    CHECK_THROWS_AS(
        [&] {
            for (std::uint64_t at = 0; at < 1 << 20; at += 2) {
                scattered.end(scattered.chunk(1, at, 1, 1 << 20));
            }
        }(),
        Excess);
    CHECK(large->claimed.ranges().size() <= 10'000);

    Hostile corrupt;
    auto bad = corrupt.post(Role::destination, "k", 1 << 20);
    for (std::uint64_t at = 0; at < 1 << 20 && !bad->finished; ++at) {
        corrupt.end(corrupt.chunk(1, at, 1, 1 << 20), {}, at % 2 == 0);
    }
    CHECK(bad->outcome.cause == Cause::integrity);
    CHECK(bad->corrupt.ranges().size() <= 10'000);
}

TEST_CASE("a MESSAGE_ACK for a message that is posted and not sent") {
    SessionConfig config;
    config.message_window_nbytes = message_charge(10);
    Hostile h(config);
    for (int i = 0; i < 2; ++i) {
        auto message = std::make_shared<Message>();
        message->data = Bytes(10);
        h.party.session.post_message(message, 0);
        h.party.settle();
    }
    CHECK_THROWS_AS(h.say(FrameType::message_ack, 0, 2, 0, 0), Violation);
    h.say(FrameType::message_ack, 0, 1, 0, 0);
    CHECK(h.party.messages_done.size() == 1);
}

TEST_CASE("chunks name their offer: another's, or two, is a violation") {
    Hostile h;
    h.offer("other");
    auto destination = h.post(Role::destination);
    CHECK_THROWS_AS(h.chunk(1, 0, 10, 100, 1), Violation);
    h.end(h.chunk(1, 0, 10, 100, 2));
    CHECK_THROWS_AS(h.chunk(1, 10, 10, 100, 0), Violation);
    CHECK_THROWS_AS(h.say(FrameType::gated, 0, 1, 0, 1), Violation);
    h.end(h.chunk(1, 10, 90, 100, 2));
    CHECK_FALSE(destination->finished);
    h.offer("k");
    CHECK(destination->outcome.cause == Cause::ok);
}

TEST_CASE("a GATED that repeats what is known moves no clock") {
    for (const bool shut : {true, false}) {
        Hostile h;
        const auto destination = h.post(Role::destination);
        const Time limit = shut ? 300 * kSecond : 10 * kSecond;
        for (const Time now : {kSecond, kSecond + limit / 2}) {
            h.party.session.receive({FrameType::gated, shut ? kGateShut : std::uint8_t{0}, 0, 0, 1}, {}, now);
        }
        h.party.session.on_time(limit);
        CHECK(destination->undecided());
        h.party.session.on_time(kSecond + limit);
        CHECK(destination->outcome.cause == (shut ? Cause::timeout_gate : Cause::timeout_bytes));
    }
}

TEST_CASE("M9: offers, wants, pools, messages and answers are bounded") {
    SUBCASE("wants") {
        Hostile h;
        CHECK_THROWS_AS(
            [&] {
                for (int i = 0; i < 3000; ++i) h.want(std::to_string(i));
            }(),
            Excess);
        CHECK(h.party.session.kept_for_peer() == 1024);
    }
    SUBCASE("wants that claim to answer") {
        Hostile h;
        h.post(Role::source, "mine");
        const auto flood = [&] {
            for (std::uint64_t i = 1; i < 5000; ++i) {
                h.say(FrameType::want, 0, i, 100, 1,
                      encode_want({std::to_string(i), "", h.terms(1, 100), {{0, 100}}}));
            }
        };
        CHECK_THROWS_AS(flood(), Excess);
        CHECK(h.party.session.kept_for_peer() == 2048);
    }
    SUBCASE("offers") {
        Hostile h;
        CHECK_THROWS_AS(
            [&] {
                for (int i = 0; i < 3000; ++i) h.offer(std::to_string(i));
            }(),
            Excess);
        CHECK(h.party.session.kept_for_peer() == 1024);
    }
    SUBCASE("regions, also of pools without layers") {
        Hostile h;
        CHECK_THROWS_AS(
            [&] {
                for (std::uint64_t i = 100; i < 2000; ++i)
                    h.say(FrameType::pool, 0, i, 0, 0, encode_pool(pool_of(1)));
            }(),
            Excess);
        Hostile empty;
        CHECK_THROWS_AS(
            [&] {
                for (std::uint64_t i = 100; i < 2000; ++i)
                    empty.say(FrameType::pool, 0, i, 0, 0, encode_pool(pool_of(0)));
            }(),
            Excess);
        CHECK_THROWS_AS(h.say(FrameType::pool, 0, 7, 0, 0, encode_pool(kPool)), std::runtime_error);  // twice
        CHECK_THROWS_AS(h.say(FrameType::pool, kPoolClosed, 7, 0, 0, encode_pool(kPool)), Violation);
    }
    SUBCASE("bytes of pools") {
        Hostile h;
        PoolTerms fat = pool_of(1);
        fat.groups.assign(800, {std::string(250, 'g'), false, std::string(250, 'd'), std::string(250, 'o'),
                                std::string(250, 'k'), 1});
        CHECK_THROWS_AS(
            [&] {
                for (std::uint64_t i = 100; i < 1000; ++i)
                    h.say(FrameType::pool, 0, i, 0, 0, encode_pool(fat));
            }(),
            Excess);
    }
    SUBCASE("messages, also empty ones") {
        for (const std::size_t size : {std::size_t{0}, std::size_t{100'000}}) {
            SessionConfig config;
            config.message_queue_nbytes = 1 << 20;
            Hostile h(config);
            CHECK_THROWS_AS(
                [&] {
                    for (std::uint64_t i = 1; i < 100'000; ++i)
                        h.say(FrameType::message, 0, i, 0, 0, Bytes(size));
                }(),
                Excess);
            CHECK(h.party.inbox.size() <= 20'000);
        }
    }
    SUBCASE("answers that it doesn't read") {
        SessionConfig config;
        config.capabilities = kCanGrant;
        Hostile h(config);
        const auto flood = [&] {
            Header header{FrameType::hold, 0, 0, 0, 0, 0, 0, 0};
            for (std::uint64_t i = 1; i < 100'000; ++i) {
                header.transfer = i;
                h.party.session.receive(header, encode_hold({}), 0);
            }
        };
        CHECK_THROWS_AS(flood(), Excess);
    }
    SUBCASE("but a burst of messages has one answer") {
        SessionConfig config;
        Hostile h(config);
        Header header{FrameType::message, 0, 0, 0, 0, 0, 0, 0};
        for (std::uint64_t i = 1; i <= 300'000; ++i) {  // an honest window's: 64 bytes are charged for each
            header.transfer = i;
            h.party.session.receive(header, {}, 0);
        }
        CHECK(h.party.session.outbox().empty());  // none of them is queued for the user yet
        h.party.settle();
        REQUIRE(h.party.said.size() == 1);
        CHECK(h.party.said.front().header.type == FrameType::message_ack);
        CHECK(h.party.said.front().header.transfer == 300'000);
    }
    SUBCASE("words on refused wants") {
        Hostile h;
        const auto flood = [&] {
            for (std::uint64_t i = 0; i < 100'000; ++i) {
                h.party.session.refuse("k", "no", kSecond, 0);
                h.want("k");
                h.party.said.clear();
            }
        };
        CHECK_THROWS_AS(flood(), Excess);
    }
}

TEST_CASE("our own frames are never the peer's excess") {
    Pair pair;
    std::vector<RecordPtr> posts;
    for (int i = 0; i < 1000; ++i) {
        auto record = pair.a.make(Role::source, "k" + std::to_string(i), kPool, {0}, 1, 64);
        record->meta = std::string(4000, 'm');
        pair.a.session.post(record, 7, 0);  // not taken from the outbox
        posts.push_back(record);
    }
    CHECK_NOTHROW(pair.a.session.receive({FrameType::ping, 0, 0, 0, 0, 0, 0, 0}, {}, 0));
    for (const auto& record : posts) {
        auto mine = pair.b.make(Role::destination, record->key, kPool, {0}, 1, 64);
        pair.b.post(mine);
    }
    pair.run();
    for (const auto& record : posts) CHECK(record->outcome.cause == Cause::ok);
}

TEST_CASE("a pool that closes while its wants wait, and one that takes its id") {
    for (const bool reused : {false, true}) {
        for (const bool source : {true, false}) {
            Hostile h;
            source ? h.want("k") : h.offer("k");
            h.say(FrameType::pool, kPoolClosed, 7, 0, 0);
            if (reused) h.say(FrameType::pool, 0, 7, 0, 0, encode_pool(pool_of(0)));
            auto mine = h.post(source ? Role::source : Role::destination);
            CHECK(mine->outcome.cause == Cause::layout_mismatch);
            CHECK(mine->outcome.mismatch.path == "pool");
        }
    }
}
