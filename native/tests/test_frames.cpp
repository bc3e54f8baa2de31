// Frames: what is written is read, what is bent is refused, nothing is read beyond its bytes.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "protocol/frames.hpp"

#include <doctest/doctest.h>

#include <random>

#include "base/crc32c.hpp"

using namespace kvt::protocol;

namespace {

constexpr int kTypes = static_cast<int>(FrameType::took);

using Raw = std::array<std::byte, kHeaderNbytes>;

Raw resealed(Raw raw) {
    store_le(raw.data() + 60, kvt::crc32c(0, raw.data(), 60));
    return raw;
}
Header decode(const Raw& raw, bool on_lane = false) {
    return decode_header(std::span<const std::byte, kHeaderNbytes>(raw), on_lane);
}
Header header_of(FrameType type, std::uint32_t body, std::uint8_t flags = 0) {
    Header header;
    header.type = type;
    header.body_nbytes = body;
    header.flags = flags;
    return header;
}

Terms some_terms() { return {5, {{0, 3}, {2, 1}}, {{1, 4096}, {0, 128}}}; }
PoolTerms some_pool() {
    return {"kv",
            true,
            {{"full", false, "bf16", "HND", "packed", 16}, {"raw", true, "", "", "", 0}},
            {{"a", 0}, {"b", 1}}};
}

// Every prefix and every longer body is refused.
template <class Decode>
void check_length(const Bytes& whole, Decode decode_body) {
    CHECK_NOTHROW(decode_body(whole));
    for (std::size_t n = 0; n < whole.size(); ++n) {
        CHECK_THROWS_AS(decode_body(std::span(whole).first(n)), Violation);
    }
    Bytes more = whole;
    more.push_back(std::byte{0});
    CHECK_THROWS_AS(decode_body(more), Violation);
}

}  // namespace

TEST_CASE("headers: round trip, and the golden bytes of one") {
    Header header;
    header.type = FrameType::chunk;
    header.attempt = 0x0102;
    header.body_nbytes = 0x00010203;
    header.transfer = 0x1112131415161718;
    header.offset = 0x2122232425262728;
    header.total = 0x3132333435363738;
    header.arg = 0x4142434445464748;
    const Raw raw = encode_header(header);
    const Header read = decode(raw, true);
    CHECK(read.type == header.type);
    CHECK(read.attempt == header.attempt);
    CHECK(read.body_nbytes == header.body_nbytes);
    CHECK(read.transfer == header.transfer);
    CHECK(read.offset == header.offset);
    CHECK(read.total == header.total);
    CHECK(read.arg == header.arg);
    const std::uint8_t golden[] = {4,    0,    2,    1,    3,    2,    1,    0,    0x18, 0x17,
                                   0x16, 0x15, 0x14, 0x13, 0x12, 0x11, 0x28, 0x27, 0x26, 0x25};
    for (std::size_t i = 0; i < std::size(golden); ++i) CHECK(std::to_integer<int>(raw[i]) == golden[i]);
    CHECK(std::to_integer<int>(raw[24]) == 0x38);
    CHECK(std::to_integer<int>(raw[32]) == 0x48);
}

TEST_CASE("headers: every flipped bit is noticed") {
    const Raw raw = encode_header(header_of(FrameType::chunk, 1000));
    for (std::size_t bit = 0; bit < 8 * kHeaderNbytes; ++bit) {
        Raw bent = raw;
        bent[bit / 8] ^= static_cast<std::byte>(1u << (bit % 8));
        CHECK_THROWS_AS(decode(bent, true), Violation);
    }
}

TEST_CASE("headers: types, flags, lengths and reserved bytes, with a CRC that agrees") {
    for (int type = 0; type < 256; ++type) {
        Raw raw = encode_header(header_of(FrameType::ping, 0));
        raw[0] = static_cast<std::byte>(type);
        if (type == 0 || type > kTypes) CHECK_THROWS_AS(decode(resealed(raw)), Violation);
    }
    for (const std::uint32_t length : {0u, 1u, 0x80000000u, 0xffffffffu, (1u << 20) + 1}) {
        for (int type = 1; type <= kTypes; ++type) {
            const Raw raw = encode_header(header_of(static_cast<FrameType>(type), length));
            if (length > 1) CHECK_THROWS_AS(decode(raw), Violation);
            CHECK((length > 1 || type == 4 || type <= kTypes));
        }
    }
    CHECK_NOTHROW(decode(encode_header(header_of(FrameType::chunk, kMaxChunkNbytes)), true));
    CHECK_THROWS_AS(decode(encode_header(header_of(FrameType::chunk, kMaxChunkNbytes + 1)), true), Violation);
    CHECK_THROWS_AS(decode(encode_header(header_of(FrameType::chunk, 0)), true), Violation);
    CHECK_NOTHROW(decode(encode_header(header_of(FrameType::chunk, kMaxInlineNbytes))));
    CHECK_THROWS_AS(decode(encode_header(header_of(FrameType::chunk, kMaxInlineNbytes + 1))), Violation);
    CHECK_THROWS_AS(decode(encode_header(header_of(FrameType::ping, 0)), true), Violation);  // on a lane
    CHECK_THROWS_AS(decode(encode_header(header_of(FrameType::done, 0, 1))), Violation);
    CHECK_THROWS_AS(decode(encode_header(header_of(FrameType::chunk, 8, 1)), true), Violation);
    CHECK_NOTHROW(decode(encode_header(header_of(FrameType::want, 8, kWantPulls))));
    CHECK_NOTHROW(decode(encode_header(header_of(FrameType::abort, 8, kFromSource | kOfferId))));
    for (std::size_t at = 40; at < 60; ++at) {
        Raw raw = encode_header(header_of(FrameType::ping, 0));
        raw[at] = std::byte{1};
        CHECK_THROWS_AS(decode(resealed(raw)), Violation);
    }
}

TEST_CASE("trailers") {
    const Trailer trailer{ChunkStatus::ok, DigestKind::crc32c, 0xdeadbeef};
    const auto raw = encode_trailer(trailer);
    const Trailer read = decode_trailer(raw);
    CHECK(read.status == trailer.status);
    CHECK(read.kind == trailer.kind);
    CHECK(read.digest == trailer.digest);
    for (const std::size_t at :
         {std::size_t{0}, std::size_t{1}, std::size_t{2}, std::size_t{3}, std::size_t{8}, std::size_t{15}}) {
        auto bent = raw;
        bent[at] = std::byte{9};
        CHECK_THROWS_AS(decode_trailer(bent), Violation);
    }
    Header chunk = header_of(FrameType::chunk, 10);
    std::vector<std::uint32_t> seeds{digest_seed(chunk)};
    chunk.offset = 1;
    seeds.push_back(digest_seed(chunk));
    chunk.transfer = 1;
    seeds.push_back(digest_seed(chunk));
    chunk.body_nbytes = 11;
    seeds.push_back(digest_seed(chunk));
    chunk.attempt = 2;
    seeds.push_back(digest_seed(chunk));
    std::sort(seeds.begin(), seeds.end());
    CHECK(std::adjacent_find(seeds.begin(), seeds.end()) == seeds.end());
}

TEST_CASE("bodies: round trips, and every other length is refused") {
    const Bytes offer = encode_offer({"key", "meta", "location", true, some_terms()});
    check_length(offer, [](std::span<const std::byte> raw) { decode_offer(raw); });
    const OfferBody read = decode_offer(offer);
    CHECK(read.key == "key");
    CHECK(read.meta == "meta");
    CHECK(read.location == "location");
    CHECK(read.gated);
    CHECK(read.terms.pool == 5);
    CHECK(read.terms.groups[1].index == 2);
    CHECK(read.terms.groups[1].blocks == 1);
    CHECK(read.terms.layers[0].index == 1);
    CHECK(read.terms.layers[0].piece_nbytes == 4096);

    const Bytes want = encode_want({"key", "", some_terms(), {{0, 5}, {7, 9}}});
    check_length(want, [](std::span<const std::byte> raw) { decode_want(raw); });
    CHECK(decode_want(want).ranges == std::vector<Range>{{0, 5}, {7, 9}});

    const Bytes abort = encode_abort({AbortCode::layout_mismatch, "why", {"dtype", "a", "b"}});
    check_length(abort, [](std::span<const std::byte> raw) { decode_abort(raw); });
    CHECK(decode_abort(abort).mismatch.theirs == "b");
    CHECK(decode_abort(encode_abort({AbortCode::cancelled, std::string(5000, 'x'), {}})).reason.size() ==
          kMaxReasonNbytes);

    const Bytes pool = encode_pool(some_pool());
    check_length(pool, [](std::span<const std::byte> raw) { decode_pool(raw); });
    CHECK(decode_pool(pool).groups[1].opaque);
    CHECK(decode_pool(pool).layers[1].name == "b");

    const Bytes released = encode_released({3, 1});
    check_length(released, [](std::span<const std::byte> raw) { decode_released(raw); });
    CHECK(decode_released(released) == std::vector<std::uint32_t>{3, 1});
}

TEST_CASE("a reason that is too long ends with a whole character") {
    const auto cut = [](const std::string& reason) {
        const Bytes raw = encode_abort({AbortCode::layout_mismatch, reason, {"dtype", reason, ""}});
        const AbortBody read = decode_abort(raw);
        CHECK(read.mismatch.ours == read.reason);
        return read.reason.size();
    };
    CHECK(cut(std::string(1024, 'x')) == 1024);
    for (const std::string character : {"\u00e9", "\u20ac", "\U0001f511"}) {
        for (std::size_t before = 0; before < 8; ++before) {
            std::string reason(before, 'x');
            while (reason.size() <= 1030) reason += character;
            const std::size_t fit = (1024 - before) / character.size() * character.size() + before;
            CHECK(cut(reason) == fit);
        }
    }
    CHECK(cut(std::string(2000, '\x80')) > 1000);  // bytes that are no UTF-8
}

TEST_CASE("bodies of one-sided frames: round trips, and every other length is refused") {
    const GrantUse part{{std::byte{1}, std::byte{2}}, 77, false, 3, 2, {{{4, 0, 9}, {1}}}};
    const GrantUse all{{std::byte{7}}, 0, true, 0, 0, {}};
    for (const GrantUse& use : {part, all}) {
        const Bytes read = encode_read({use, some_terms(), {{0, 5}, {5, 9}}});
        check_length(read, [](std::span<const std::byte> raw) { decode_read(raw); });
        const ReadBody again = decode_read(read);
        CHECK(again.use.token == use.token);
        CHECK(again.use.wait_ms == use.wait_ms);
        CHECK(again.use.every_head == use.every_head);
        CHECK(again.use.head_begin == use.head_begin);
        CHECK(again.use.head_count == use.head_count);
        CHECK(again.use.subset == use.subset);
        CHECK(again.ranges == std::vector<Range>{{0, 5}, {5, 9}});
        CHECK(encode_read(again) == read);
        const Bytes write = encode_write({use, "meta", some_terms()});
        check_length(write, [](std::span<const std::byte> raw) { decode_write(raw); });
        CHECK(decode_write(write).meta == "meta");
        CHECK(encode_write(decode_write(write)) == write);
    }
    CHECK(part.positions() == 4);
    CHECK(all.positions() == 0);
    const Bytes hold = encode_hold({part.token, 5});
    check_length(hold, [](std::span<const std::byte> raw) { decode_hold(raw); });
    CHECK(encode_hold(decode_hold(hold)) == hold);
    const Bytes ranges = encode_ranges({{1, 2}, {4, 8}});
    check_length(ranges, [](std::span<const std::byte> raw) { decode_ranges(raw); });
    CHECK(decode_ranges(ranges) == std::vector<Range>{{1, 2}, {4, 8}});
}

TEST_CASE("bodies of one-sided frames: values out of bounds") {
    const ReadBody plain{.use = {}, .terms = some_terms(), .ranges = {}};
    Bytes read = encode_read(plain);
    for (int flags = 0; flags < 256; ++flags) {
        read[20] = static_cast<std::byte>(flags);  // behind the token and the wait
        if (flags > 3) CHECK_THROWS_AS(decode_read(read), Violation);
    }
    Terms huge = some_terms();
    huge.groups[0].blocks = 0xffffffff;  // its positions aren't there: nothing is allocated
    ReadBody bent = plain;
    bent.terms = huge;
    bent.use.subset = {{1}, {2}};
    CHECK_THROWS_AS(decode_read(encode_read(bent)), Violation);
    bent = plain;
    bent.ranges = {{5, 5}};
    CHECK_THROWS_AS(decode_read(encode_read(bent)), Violation);
    const WriteBody wordy{.use = {}, .meta = std::string(4097, 'm'), .terms = some_terms()};
    CHECK_THROWS_AS(decode_write(encode_write(wordy)), Violation);
    CHECK_THROWS_AS(decode_ranges(encode_ranges({{4, 8}, {1, 2}})), Violation);
    CHECK_THROWS_AS(decode_ranges(encode_ranges(std::vector<Range>(4097, Range{0, 1}))), Violation);
}

TEST_CASE("headers: the bounds and flags of the younger types") {
    const auto fits = [](FrameType type, std::uint32_t body, std::uint8_t flags = 0) {
        try {
            decode(encode_header(header_of(type, body, flags)));
            return true;
        } catch (const Violation&) {
            return false;
        }
    };
    CHECK(fits(FrameType::hold, 20));
    CHECK(fits(FrameType::hold, 0, kLetGo));
    CHECK_FALSE(fits(FrameType::hold, 21));
    CHECK(fits(FrameType::held, 0, kHeldNot));
    CHECK(fits(FrameType::took, 24));
    CHECK_FALSE(fits(FrameType::took, 23));
    CHECK_FALSE(fits(FrameType::took, 24, 1));
    CHECK_FALSE(fits(FrameType::held, 1));
    CHECK(fits(FrameType::located, 0, kBehindGate));
    CHECK_FALSE(fits(FrameType::again, 19));
    CHECK_FALSE(fits(FrameType::copied, 1));
    CHECK(fits(FrameType::read, 1, kWantPulls));
    CHECK_FALSE(fits(FrameType::read, 1, kWantOfWrite));
    CHECK_FALSE(fits(FrameType::read, 0));
    CHECK(fits(FrameType::write, 1));
    CHECK_FALSE(fits(FrameType::write, 1, 1));
    CHECK(fits(FrameType::want, 1, kWantPulls | kWantOfWrite));
    CHECK_FALSE(fits(FrameType::want, 1, 4));
}

TEST_CASE("bodies: values out of bounds") {
    CHECK_THROWS_AS(decode_want(encode_want({"", "", some_terms(), {}})), Violation);
    CHECK_THROWS_AS(decode_want(encode_want({std::string(256, 'k'), "", some_terms(), {}})), Violation);
    CHECK_THROWS_AS(decode_want(encode_want({"k", std::string(4097, 'm'), some_terms(), {}})), Violation);
    CHECK_THROWS_AS(decode_want(encode_want({"k", "", some_terms(), {{5, 5}}})), Violation);
    CHECK_THROWS_AS(decode_want(encode_want({"k", "", some_terms(), {{5, 4}}})), Violation);
    CHECK_THROWS_AS(decode_want(encode_want({"k", "", some_terms(), {{5, 9}, {8, 10}}})), Violation);
    CHECK_THROWS_AS(decode_want(encode_want({"k", "", some_terms(), std::vector<Range>(4097, Range{0, 1})})),
                    Violation);
    CHECK_THROWS_AS(decode_offer(encode_offer({"k", "", std::string(4097, 'l'), false, some_terms()})),
                    Violation);
    Terms many = some_terms();
    many.layers.assign(1025, {0, 1});
    CHECK_THROWS_AS(decode_want(encode_want({"k", "", many, {}})), Violation);
    many = some_terms();
    many.groups.assign(1025, {0, 1});
    CHECK_THROWS_AS(decode_want(encode_want({"k", "", many, {}})), Violation);
    for (const std::uint32_t code : {0u, 9u, 0xffffffffu}) {
        CHECK_THROWS_AS(decode_abort(encode_abort({static_cast<AbortCode>(code), "", {}})), Violation);
    }
    PoolTerms pool = some_pool();
    pool.layers[0].group = 2;
    CHECK_THROWS_AS(decode_pool(encode_pool(pool)), Violation);
    pool = some_pool();
    pool.name = std::string(256, 'n');
    CHECK_THROWS_AS(decode_pool(encode_pool(pool)), Violation);
    CHECK_THROWS_AS(decode_released(encode_released(std::vector<std::uint32_t>(1025))), Violation);
}

TEST_CASE("random bytes: a Violation or a value, never more") {
    std::mt19937_64 random(7);
    for (int i = 0; i < 200'000; ++i) {
        Bytes raw(random() % 96);
        for (auto& byte : raw) byte = static_cast<std::byte>(random() % 3 == 0 ? random() : 0);
        const auto quietly = [&](auto read) {
            try {
                read(std::span<const std::byte>(raw));
            } catch (const Violation&) {
            }
        };
        quietly([](auto body) { decode_offer(body); });
        quietly([](auto body) { decode_want(body); });
        quietly([](auto body) { decode_abort(body); });
        quietly([](auto body) { decode_pool(body); });
        quietly([](auto body) { decode_released(body); });
        quietly([](auto body) { decode_ranges(body); });
        quietly([](auto body) { decode_read(body); });
        quietly([](auto body) { decode_write(body); });
        quietly([](auto body) { decode_hold(body); });
        if (raw.size() >= kHeaderNbytes) {
            Raw head{};
            std::copy_n(raw.begin(), kHeaderNbytes, head.begin());
            quietly([&](auto) { decode(resealed(head), i % 2 == 0); });
        }
    }
}
