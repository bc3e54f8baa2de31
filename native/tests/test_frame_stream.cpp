// The control stream: any split gives the same frames, nothing comes out behind a bad byte, and no length of
// the peer's decides what is allocated before it has been checked.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "protocol/frame_stream.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <random>

#include "base/crc32c.hpp"

using namespace kvt::protocol;

namespace {

// What operator new was asked for since the last reset().
struct Allocations {
    std::size_t count = 0, largest = 0;
    void reset() noexcept { *this = {}; }
};
Allocations allocations;

}  // namespace

// Inlined, gcc would find malloc() without free() in them.
[[gnu::noinline]] void* operator new(std::size_t nbytes) {
    ++allocations.count;
    allocations.largest = std::max(allocations.largest, nbytes);
    if (void* made = std::malloc(nbytes)) return made;
    throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* made) noexcept { std::free(made); }
[[gnu::noinline]] void operator delete(void* made, std::size_t) noexcept { std::free(made); }

namespace {

constexpr std::size_t kAll = std::numeric_limits<std::size_t>::max();

Header header_of(FrameType type, std::uint8_t flags = 0) {
    Header header;
    header.type = type;
    header.flags = flags;
    header.attempt = 1;
    header.transfer = 0x1112131415161718;
    header.offset = 0x2122232425262728;
    header.total = 0x3132333435363738;
    header.arg = 0x4142434445464748;
    return header;
}

Bytes noise(std::size_t nbytes) {
    std::mt19937 random(static_cast<unsigned>(nbytes));
    Bytes made(nbytes);
    for (auto& byte : made) byte = static_cast<std::byte>(random());
    return made;
}

Bytes frame_of(FrameType type, const Bytes& body = {}, std::uint8_t flags = 0) {
    Bytes out;
    append_frame(out, header_of(type, flags), body);
    return out;
}

Bytes chunk_of(std::size_t nbytes, const Trailer& trailer = {ChunkStatus::ok, DigestKind::crc32c, 77}) {
    Bytes out = frame_of(FrameType::chunk, noise(nbytes));
    const auto raw = encode_trailer(trailer);
    out.insert(out.end(), raw.begin(), raw.end());
    return out;
}

// Each kind of frame, with and without a body where it may have none.
std::vector<Bytes> every_kind() {
    const Terms terms{5, {{0, 3}}, {{1, 4096}, {0, 128}}};
    const PoolTerms pool{"kv", true, {{"full", false, "bf16", "HND", "packed", 16}}, {{"a", 0}, {"b", 0}}};
    return {frame_of(FrameType::pool, encode_pool(pool)),
            frame_of(FrameType::pool, {}, kPoolClosed),
            frame_of(FrameType::offer, encode_offer({"key", "meta", "location", true, terms})),
            frame_of(FrameType::want, encode_want({"key", "", terms, {{0, 5}, {7, 9}}}), kWantPulls),
            chunk_of(1),
            chunk_of(300, {ChunkStatus::aborted, DigestKind::none, 0}),
            frame_of(FrameType::done),
            frame_of(FrameType::abort, encode_abort({AbortCode::cancelled, "why", {}}), kFromSource),
            frame_of(FrameType::aborted, {}, kFromSource | kOfferId),
            frame_of(FrameType::gated, {}, kGateShut),
            frame_of(FrameType::released, encode_released({1, 0})),
            frame_of(FrameType::message, noise(200)),
            frame_of(FrameType::message),
            frame_of(FrameType::message_ack),
            frame_of(FrameType::ping),
            frame_of(FrameType::close)};
}

// As every_kind(), and what is as long as it may be or longer than a read.
std::vector<Bytes> long_ones() {
    std::vector<Bytes> all{chunk_of(4096), chunk_of(kMaxInlineNbytes), chunk_of(kMaxInlineNbytes)};
    all.push_back(frame_of(FrameType::message, noise(FrameReader::kRoomNbytes - kHeaderNbytes)));
    all.push_back(frame_of(FrameType::message, noise(FrameReader::kRoomNbytes + 1)));
    const auto kinds = every_kind();
    all.insert(all.end(), kinds.begin(), kinds.end());
    all.push_back(frame_of(FrameType::message, noise(kMaxControlBodyNbytes)));
    all.push_back(frame_of(FrameType::message, noise(kMaxControlBodyNbytes - 1)));
    all.insert(all.end(), kinds.begin(), kinds.end());
    return all;
}

Bytes joined(const std::vector<Bytes>& frames) {
    Bytes out;
    for (const Bytes& frame : frames) out.insert(out.end(), frame.begin(), frame.end());
    return out;
}

// What came out: the frames as they are on the wire, and what was wrong then.
struct Heard {
    std::vector<Bytes> frames;
    std::string wrong;
    bool between = true;  // two frames
    bool operator==(const Heard&) const = default;
};

Bytes bytes_of(const ControlFrame& frame) {
    Bytes out;
    CHECK(frame.header.body_nbytes == frame.body.size());
    CHECK(frame.trailer.has_value() == (frame.header.type == FrameType::chunk));
    append_frame(out, frame.header, frame.body);
    if (frame.trailer) {
        const auto raw = encode_trailer(*frame.trailer);
        out.insert(out.end(), raw.begin(), raw.end());
    }
    return out;
}

// All frames that are whole; false once the stream is broken.
bool drain(FrameReader& reader, Heard& heard) {
    try {
        while (const auto frame = reader.next()) heard.frames.push_back(bytes_of(*frame));
    } catch (const Violation& violation) {
        heard.wrong = violation.what();
        return false;
    }
    return true;
}

// Gives the stream in pieces of step() bytes.
template <class Step>
Heard feed(const Bytes& stream, Step step) {
    FrameReader reader;
    Heard heard;
    for (std::size_t at = 0; at < stream.size() && heard.wrong.empty();) {
        const auto room = reader.room();
        REQUIRE(room.size() >= FrameReader::kRoomNbytes);
        const std::size_t n = std::min<std::size_t>({step(), room.size(), stream.size() - at});
        std::memcpy(room.data(), stream.data() + at, n);
        reader.got(n);
        at += n;
        drain(reader, heard);
    }
    heard.between = reader.empty();
    return heard;
}

// In pieces that end where `ends` says, ascending, and at the end.
Heard feed_cut(const Bytes& stream, std::vector<std::size_t> ends) {
    std::size_t which = 0, at = 0;
    return feed(stream, [&]() -> std::size_t {
        if (which == ends.size()) return kAll;
        const std::size_t n = ends[which++] - at;
        at += n;
        return n;
    });
}

Heard feed_whole(const Bytes& stream) {
    return feed(stream, [] { return kAll; });
}
Heard feed_bytes(const Bytes& stream) {
    return feed(stream, [] { return std::size_t{1}; });
}

Bytes resealed(Bytes frame) {
    store_le(frame.data() + 60, kvt::crc32c(0, frame.data(), 60));
    return frame;
}

}  // namespace

TEST_CASE("unsplit, and byte by byte: what was put in") {
    const std::vector<Bytes> frames = long_ones();
    const Bytes stream = joined(frames);
    CHECK(feed_whole(stream) == Heard{frames, "", true});
    CHECK(feed_bytes(stream) == Heard{frames, "", true});
}

TEST_CASE("split once, anywhere") {
    const std::vector<Bytes> frames = every_kind();
    const Bytes stream = joined(frames);
    const Heard expected{frames, "", true};
    for (std::size_t at = 1; at < stream.size(); ++at) {
        CAPTURE(at);
        CHECK(feed_cut(stream, {at}) == expected);
    }
}

TEST_CASE("split twice, anywhere") {
    const std::vector<Bytes> frames = {frame_of(FrameType::message, noise(5)), chunk_of(3),
                                       frame_of(FrameType::ping)};
    const Bytes stream = joined(frames);
    const Heard expected{frames, "", true};
    for (std::size_t first = 1; first < stream.size(); ++first) {
        for (std::size_t second = first + 1; second < stream.size(); ++second) {
            if (feed_cut(stream, {first, second}) != expected) FAIL_CHECK(first, " ", second);
        }
    }
}

TEST_CASE("long frames: split beside each edge, and at random") {
    const std::vector<Bytes> frames = long_ones();
    const Bytes stream = joined(frames);
    const Heard expected{frames, "", true};
    std::size_t edge = 0;
    for (const Bytes& frame : frames) {
        for (const std::size_t at : {edge + 1, edge + kHeaderNbytes - 1, edge + kHeaderNbytes,
                                     edge + frame.size() - 1, edge + frame.size()}) {
            CHECK(feed_cut(stream, {at}) == expected);
        }
        edge += frame.size();
    }
    std::mt19937 random(5);
    for (int seed = 0; seed < 60; ++seed) {
        CAPTURE(seed);
        const std::size_t most = std::size_t{1} << (6 + seed % 13);
        CHECK(feed(stream, [&] { return 1 + random() % most; }) == expected);
    }
}

TEST_CASE("a stream that ends early gives what was whole") {
    const std::vector<Bytes> frames = every_kind();
    const Bytes stream = joined(frames);
    std::size_t whole = 0, edge = 0;
    for (std::size_t n = 0; n < stream.size(); ++n) {
        CAPTURE(n);
        if (n == edge + frames[whole].size()) edge += frames[whole++].size();
        const Bytes begun(stream.begin(), stream.begin() + static_cast<std::ptrdiff_t>(n));
        const Heard expected{
            {frames.begin(), frames.begin() + static_cast<std::ptrdiff_t>(whole)}, "", n == edge};
        CHECK(feed_whole(begun) == expected);
        if (n % 7 == 0) CHECK(feed_bytes(begun) == expected);
    }
}

TEST_CASE("a bad byte anywhere in a header: a violation, and nothing behind it") {
    for (const Bytes& bad : every_kind()) {
        for (std::size_t at = 0; at < kHeaderNbytes; ++at) {
            CAPTURE(at);
            std::vector<Bytes> frames = {frame_of(FrameType::message, noise(9)), bad,
                                         frame_of(FrameType::ping)};
            frames[1][at] ^= std::byte{0x10};
            const Bytes stream = joined(frames);
            const std::size_t edge = frames[0].size() + kHeaderNbytes;
            for (const Heard& heard : {feed_whole(stream), feed_bytes(stream), feed_cut(stream, {edge - 1}),
                                       feed_cut(stream, {frames[0].size() + at + 1})}) {
                CHECK(heard.frames == std::vector<Bytes>{frames[0]});
                CHECK(heard.wrong == "the CRC32C of a frame's header doesn't agree");
            }
            // The header alone is enough: no body is waited for.
            const Bytes begun(stream.begin(), stream.begin() + static_cast<std::ptrdiff_t>(edge));
            CHECK_FALSE(feed_whole(begun).wrong.empty());
        }
    }
}

TEST_CASE("once it is broken it stays broken, whatever follows") {
    Bytes bent = frame_of(FrameType::ping);
    bent[20] ^= std::byte{1};
    Bytes bad_trailer = chunk_of(40);
    bad_trailer[bad_trailer.size() - 1] = std::byte{1};
    for (const Bytes& bad : {bent, bad_trailer}) {
        FrameReader reader;
        Heard heard;
        const Bytes stream = joined({bad, frame_of(FrameType::ping), frame_of(FrameType::close)});
        for (int turn = 0; turn < 300; ++turn) {
            const auto room = reader.room();
            const std::size_t n = std::min(room.size(), stream.size());
            std::copy_n(stream.begin(), n, room.begin());
            reader.got(n);
            CHECK_FALSE(drain(reader, heard));
        }
        CHECK(heard.frames.empty());
        CHECK(reader.room().size() < FrameReader::kMostNbytes);
    }
}

TEST_CASE("a chunk with a bad trailer isn't given out") {
    for (std::size_t at = 0; at < kTrailerNbytes; ++at) {
        CAPTURE(at);
        if (at >= 4 && at < 8) continue;  // the digest: for the session to compare
        std::vector<Bytes> frames = {frame_of(FrameType::ping), chunk_of(100), frame_of(FrameType::done)};
        frames[1][kHeaderNbytes + 100 + at] = std::byte{9};
        for (const Heard& heard : {feed_whole(joined(frames)), feed_bytes(joined(frames))}) {
            CHECK(heard.frames == std::vector<Bytes>{frames[0]});
            CHECK_FALSE(heard.wrong.empty());
        }
    }
}

TEST_CASE("lengths: 0, 1, 2^31 and 2^32-1 under a CRC that agrees, refused before anything is allocated") {
    using enum FrameType;
    const std::vector<FrameType> not_0 = {offer, want, chunk, abort, released};
    const std::vector<FrameType> not_1 = {done, aborted, gated, released, message_ack, ping, close};
    const auto has = [](const auto& list, FrameType type) {
        return std::find(list.begin(), list.end(), type) != list.end();
    };
    for (int number = 1; number <= 13; ++number) {
        const auto type = static_cast<FrameType>(number);
        CAPTURE(name_of(type));
        for (const std::uint32_t nbytes : {0u, 1u, 0x8000'0000u, 0xffff'ffffu}) {
            CAPTURE(nbytes);
            const bool refused = nbytes > 1 || has(nbytes == 0 ? not_0 : not_1, type);
            Header header = header_of(type);
            header.body_nbytes = nbytes;
            const auto raw = encode_header(header);
            Bytes stream(raw.begin(), raw.end());
            stream.resize(kHeaderNbytes + nbytes % 2 + (type == chunk ? kTrailerNbytes : 0));
            if (type == chunk) stream[kHeaderNbytes + 1] = std::byte{1};
            allocations.reset();
            const Heard heard = feed_whole(stream);
            CHECK(allocations.largest <= kHeaderNbytes + FrameReader::kRoomNbytes);
            CHECK(heard.wrong == (refused ? "a frame's body length is out of bounds" : ""));
            CHECK(heard.frames.size() == (refused ? 0 : 1));
        }
    }
}

TEST_CASE("a length is believed only under a CRC that agrees") {
    Bytes bent = frame_of(FrameType::message, noise(kMaxControlBodyNbytes));
    bent[60] ^= std::byte{1};
    allocations.reset();
    CHECK_FALSE(feed_whole(bent).wrong.empty());
    CHECK(allocations.largest <= kHeaderNbytes + FrameReader::kRoomNbytes);
    Bytes longer = frame_of(FrameType::message);
    store_le(longer.data() + 4, static_cast<std::uint32_t>(kMaxControlBodyNbytes + 1));
    allocations.reset();
    CHECK_FALSE(feed_whole(resealed(longer)).wrong.empty());
    CHECK(allocations.largest <= kHeaderNbytes + FrameReader::kRoomNbytes);
}

TEST_CASE("what is held is bounded, and given back behind a long frame") {
    FrameReader reader;
    const Bytes stream = joined({chunk_of(100), frame_of(FrameType::message, noise(kMaxControlBodyNbytes)),
                                 frame_of(FrameType::message, noise(kMaxControlBodyNbytes))});
    std::mt19937 random(3);
    std::size_t frames = 0, most = 0;
    for (std::size_t at = 0; at < stream.size();) {
        const auto room = reader.room();
        const std::size_t n = std::min<std::size_t>({1 + random() % 50'000, room.size(), stream.size() - at});
        std::copy_n(stream.begin() + static_cast<std::ptrdiff_t>(at), n, room.begin());
        reader.got(n);
        at += n;
        most = std::max(most, room.size());
        while (reader.next()) ++frames;
    }
    CHECK(frames == 3);
    CHECK(most <= FrameReader::kMostNbytes);
    CHECK(most >= kMaxControlBodyNbytes);  // what is missing of a long frame can come in one read
    CHECK(reader.room().size() == kHeaderNbytes + FrameReader::kRoomNbytes);
    std::size_t taken = 0;
    for (std::size_t n = reader.room().size(); n > 0; n = reader.room().size()) {  // nobody asks for frames
        reader.got(n);
        taken += n;
    }
    CHECK(taken <= FrameReader::kMostNbytes);
}

TEST_CASE("inline chunks cost no copy and no allocation") {
    FrameReader reader;
    const Bytes chunk = chunk_of(4096);
    bool in_place = true;
    for (int i = 0; i < 1000; ++i) {
        if (i == 1) allocations.reset();
        const auto room = reader.room();
        std::copy(chunk.begin(), chunk.end(), room.begin());
        reader.got(chunk.size());
        const auto frame = reader.next();
        in_place = in_place && frame && frame->body.data() == room.data() + kHeaderNbytes;
        in_place = in_place && !reader.next();
    }
    CHECK(allocations.count == 0);
    CHECK(in_place);
    const Bytes many = joined(std::vector<Bytes>(100, chunk));
    std::size_t whole = 0;
    for (int turn = 0; turn < 2; ++turn) {  // once to come to its size, then for nothing
        allocations.reset();
        for (std::size_t at = 0; at < many.size();) {
            const auto room = reader.room();
            const std::size_t n = std::min<std::size_t>({room.size(), many.size() - at, 30'000});
            std::copy_n(many.begin() + static_cast<std::ptrdiff_t>(at), n, room.begin());
            reader.got(n);
            at += n;
            while (reader.next()) ++whole;
        }
    }
    CHECK(whole == 200);
    CHECK(allocations.count == 0);
}
