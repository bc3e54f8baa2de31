// The lane codec: any split of the stream gives the same events and bytes, and nothing is stored that
// shouldn't be.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "protocol/lane.hpp"

#include <doctest/doctest.h>

#include <array>
#include <cstring>
#include <numeric>
#include <random>

using namespace kvt::protocol;

namespace {

constexpr std::size_t kGuard = 16;

// Pieces with guards between them; in a shuffled place each.
class Scattered final : public Transfer {
  public:
    Scattered(std::size_t pieces, std::size_t piece, unsigned seed) : piece_(piece), places_(pieces) {
        nbytes = pieces * piece;
        std::iota(places_.begin(), places_.end(), std::size_t{0});
        std::shuffle(places_.begin(), places_.end(), std::mt19937(seed));
        memory.assign(pieces * (piece + kGuard) + kGuard, std::byte{0xee});
    }
    std::uint64_t runs(std::uint64_t begin, std::uint64_t end, iovec* out, std::size_t most,
                       std::size_t& count) const override {
        for (count = 0; begin < end && count < most; ++count) {
            const std::uint64_t within = begin % piece_, n = std::min(piece_ - within, end - begin);
            auto* at = const_cast<std::byte*>(memory.data()) + kGuard +
                       places_[begin / piece_] * (piece_ + kGuard) + within;
            out[count] = {at, static_cast<std::size_t>(n)};
            begin += n;
        }
        return begin;
    }
    void reorder(const std::vector<std::uint32_t>&) override {}
    Bytes stream() const {
        Bytes out;
        for (const std::size_t place : places_) {
            const auto from = memory.begin() + static_cast<long>(kGuard + place * (piece_ + kGuard));
            out.insert(out.end(), from, from + static_cast<long>(piece_));
        }
        return out;
    }
    bool guards_hold() const {
        for (std::size_t i = 0; i < memory.size(); ++i) {
            if (i % (piece_ + kGuard) < kGuard && memory[i] != std::byte{0xee}) return false;
        }
        return true;
    }
    Bytes memory;

  private:
    std::uint64_t piece_;
    std::vector<std::size_t> places_;
};

struct Ended {
    std::uint64_t offset;
    bool store, verified;
    ChunkStatus status;
    bool operator==(const Ended&) const = default;
};

struct Host final : LaneHost {
    std::shared_ptr<Scattered> into;
    bool store = true;
    std::vector<std::uint64_t> begun;
    std::vector<Ended> ended;
    std::vector<std::pair<bool, bool>> left;  // whole, begun

    ChunkTarget chunk_begin(const Header& header) override {
        begun.push_back(header.offset);
        if (header.transfer == 99) throw Violation("no such transfer");
        return {into, {header.offset, header.offset + header.body_nbytes}, store};
    }
    void chunk_end(const ChunkTarget& target, const Trailer& trailer, bool verified) override {
        ended.push_back({target.range.begin, target.store, verified, trailer.status});
    }
    void chunk_left(const ChunkJob&, bool whole, bool begun_) override { left.emplace_back(whole, begun_); }
};

struct Buffers {
    Bytes scratch = Bytes(8192), ring = Bytes(8192);
    Staging staging(bool ring_too = true) {
        return {scratch.data(), scratch.size(), ring_too ? ring.data() : nullptr, ring_too ? ring.size() : 0};
    }
};

ChunkJob job_of(const std::shared_ptr<Scattered>& from, std::uint64_t begin, std::uint64_t end) {
    ChunkJob job{from, {begin, end}, {}};
    job.header.type = FrameType::chunk;
    job.header.attempt = 1;
    job.header.transfer = 3;
    job.header.offset = begin;
    job.header.body_nbytes = static_cast<std::uint32_t>(end - begin);
    job.header.total = from->nbytes;
    return job;
}

// What a writer makes when at most `step()` bytes leave at a time; after `abandon_at` bytes it is told to
// stop.
template <class Step>
Bytes write(LaneWriter& writer, const Staging& staging, Step step, std::size_t abandon_at = ~std::size_t{0}) {
    Bytes out;
    for (bool done = false; !done;) {
        if (out.size() >= abandon_at) {
            writer.abandon();
            abandon_at = ~std::size_t{0};
            if (writer.idle()) return out;
        }
        iovec iov[24];
        const std::size_t count = writer.gather(iov, 24, 4096, staging);
        std::size_t room = std::min<std::size_t>(step(), abandon_at - out.size()), n = 0;
        for (std::size_t i = 0; i < count && room > 0; ++i) {
            const std::size_t here = std::min(room, iov[i].iov_len);
            const auto* at = static_cast<const std::byte*>(iov[i].iov_base);
            out.insert(out.end(), at, at + here);
            room -= here;
            n += here;
        }
        done = writer.wrote(n);
    }
    return out;
}

// Feeds the stream in pieces of step() bytes; before byte `retarget_at` the reader is taken out of the
// memory.
template <class Step>
void read(LaneReader& reader, const Bytes& stream, const Staging& staging, Step step,
          std::size_t retarget_at = ~std::size_t{0}) {
    for (std::size_t at = 0; at < stream.size();) {
        if (at >= retarget_at) {
            reader.retarget();
            retarget_at = ~std::size_t{0};
        }
        iovec iov[24];
        const std::size_t count = reader.want(iov, 24, 4096, staging);
        std::size_t n = 0, room = std::min({step(), stream.size() - at, retarget_at - at});
        for (std::size_t i = 0; i < count && room > 0; ++i) {
            const std::size_t here = std::min(room, iov[i].iov_len);
            std::memcpy(iov[i].iov_base, stream.data() + at + n, here);
            n += here;
            room -= here;
        }
        reader.got(iov, count, n);
        at += n;
    }
}

std::shared_ptr<Scattered> source_of(std::size_t pieces, std::size_t piece) {
    auto source = std::make_shared<Scattered>(pieces, piece, 1);
    std::mt19937 random(4);
    for (std::size_t i = 0; i < source->memory.size(); ++i) {
        if (i % (piece + kGuard) >= kGuard) source->memory[i] = static_cast<std::byte>(random());
    }
    return source;
}

const auto kAll = [] { return ~std::size_t{0}; };
const auto kOne = [] { return std::size_t{1}; };

// What a writer makes of one chunk of a source whose grant ends when so many bytes have left; `trailer_at`:
// where the call began that wrote the trailer's first byte.
struct Guarded {
    Guarded(DigestKind digest, std::size_t ends_at, std::size_t step, bool granted_all_along = false) {
        Buffers buffers;
        LaneWriter writer(host, digest);
        const auto ended = std::make_shared<std::atomic<bool>>(false);
        source->ended = ended;
        writer.start(job_of(source, 0, 50));
        for (bool done = false; !done;) {
            if (out.size() >= ends_at && !granted_all_along) ended->store(true);
            iovec iov[24];
            const std::size_t count = writer.gather(iov, 24, 4096, buffers.staging(false));
            const std::size_t before = out.size();
            for (std::size_t i = 0, room = step; i < count && room > 0; ++i) {
                const std::size_t here = std::min(room, iov[i].iov_len);
                const auto* at = static_cast<const std::byte*>(iov[i].iov_base);
                out.insert(out.end(), at, at + here);
                room -= here;
            }
            if (before <= kTrailer && out.size() > kTrailer) trailer_at = before;
            done = writer.wrote(out.size() - before);
        }
        Host reading;
        reading.into = std::make_shared<Scattered>(10, 5, 2);
        LaneReader reader(reading, digest);
        read(reader, out, buffers.staging(false), kAll);
        REQUIRE(reading.ended.size() == 1);
        end = reading.ended[0];
        whole = reading.into->stream() == source->stream();
    }
    static constexpr std::size_t kTrailer = kHeaderNbytes + 50;
    std::shared_ptr<Scattered> source = source_of(10, 5);
    Host host;
    Bytes out;
    std::size_t trailer_at = 0;
    Ended end{};
    bool whole = false;
};

// A short lane of three chunks.
struct Chunks {
    static constexpr std::array<std::uint64_t, 4> kCuts = {0, 1, 31, 50};

    Chunks(DigestKind digest_kind, std::size_t piece)
        : digest(digest_kind), source(source_of(50 / piece, piece)) {
        Host host;
        Buffers buffers;
        LaneWriter writer(host, digest);
        for (std::size_t i = 1; i < kCuts.size(); ++i) {
            writer.start(job_of(source, kCuts[i - 1], kCuts[i]));
            const Bytes chunk = write(writer, buffers.staging(), kAll);
            stream.insert(stream.end(), chunk.begin(), chunk.end());
            ends.push_back(stream.size());
        }
    }
    Bytes part(std::size_t begin, std::size_t end) const {
        return Bytes(stream.begin() + static_cast<long>(begin), stream.begin() + static_cast<long>(end));
    }
    // Whether all of it arrives as it was sent, cut there.
    bool arrive(std::array<std::size_t, 2> cuts, bool ring) const {
        Host host;
        Buffers buffers;
        host.into = std::make_shared<Scattered>(10, 5, 2);
        LaneReader reader(host, digest);
        read(reader, part(0, cuts[0]), buffers.staging(ring), kAll);
        read(reader, part(cuts[0], cuts[1]), buffers.staging(ring), kAll);
        read(reader, part(cuts[1], stream.size()), buffers.staging(ring), kAll);
        std::vector<Ended> expected;
        for (std::size_t i = 0; i + 1 < kCuts.size(); ++i)
            expected.push_back({kCuts[i], true, true, ChunkStatus::ok});
        return host.ended == expected && host.into->stream() == source->stream() && host.into->guards_hold();
    }

    DigestKind digest;
    std::shared_ptr<Scattered> source;
    Bytes stream;
    std::vector<std::size_t> ends;
};

}  // namespace

TEST_CASE("any split, any staging, with and without digests: the same bytes and events") {
    std::mt19937 random(11);
    for (const auto digest : {DigestKind::none, DigestKind::crc32c}) {
        for (const std::size_t piece : {std::size_t{1}, std::size_t{100}, std::size_t{5000}}) {
            for (int way = 0; way < 12; ++way) {
                CAPTURE(piece);
                CAPTURE(way);
                const auto step = [&]() -> std::size_t {
                    return way == 0 ? kAll() : way == 1 ? kOne() : 1 + random() % (way < 6 ? 200 : 9000);
                };
                Host host;
                Buffers buffers;
                auto source = source_of(12'000 / piece, piece);
                host.into = std::make_shared<Scattered>(12'000 / piece, piece, 2);
                LaneWriter writer(host, digest);
                LaneReader reader(host, digest);
                Bytes stream;
                const std::uint64_t cuts[] = {0, 1, 3000, 3001, 9000, source->nbytes};
                for (std::size_t i = 1; i < std::size(cuts); ++i) {
                    writer.start(job_of(source, cuts[i - 1], cuts[i]));
                    const Bytes chunk = write(writer, buffers.staging(way % 2 == 0), step);
                    CHECK(chunk.size() == kHeaderNbytes + cuts[i] - cuts[i - 1] + kTrailerNbytes);
                    stream.insert(stream.end(), chunk.begin(), chunk.end());
                }
                read(reader, stream, buffers.staging(way % 3 != 0), step);
                CHECK(host.into->stream() == source->stream());
                CHECK(host.into->guards_hold());
                CHECK(host.begun == std::vector<std::uint64_t>{0, 1, 3000, 3001, 9000});
                REQUIRE(host.ended.size() == 5);
                for (std::size_t i = 0; i < 5; ++i)
                    CHECK(host.ended[i] == Ended{cuts[i], true, true, ChunkStatus::ok});
                CHECK(host.left == std::vector<std::pair<bool, bool>>(5, {true, true}));
            }
        }
    }
}

TEST_CASE("split once and split twice, anywhere") {
    for (const auto digest : {DigestKind::none, DigestKind::crc32c}) {
        for (const bool ring : {false, true}) {
            const Chunks chunks(digest, 5);
            for (std::size_t first = 1; first < chunks.stream.size(); ++first) {
                for (std::size_t second = first; second < chunks.stream.size(); ++second) {
                    if (!chunks.arrive({first, second}, ring)) FAIL_CHECK(first, " ", second);
                }
            }
        }
    }
}

TEST_CASE("a lane that ends early has ended what was whole, and stored no more than came") {
    const Chunks chunks(DigestKind::crc32c, 5);
    for (std::size_t n = 0; n < chunks.stream.size(); ++n) {
        CAPTURE(n);
        for (const bool bytewise : {false, true}) {
            Host host;
            Buffers buffers;
            host.into = std::make_shared<Scattered>(10, 5, 2);
            LaneReader reader(host, DigestKind::crc32c);
            const auto step = [&] { return bytewise ? kOne() : kAll(); };
            read(reader, chunks.part(0, n), buffers.staging(n % 2 == 0), step);
            std::size_t whole = 0, begun = 0, stored = 0;
            for (std::size_t i = 0; i + 1 < Chunks::kCuts.size(); ++i) {
                whole += n >= chunks.ends[i] ? 1 : 0;
                const std::size_t at = i == 0 ? 0 : chunks.ends[i - 1];
                begun += n >= at + kHeaderNbytes ? 1 : 0;
                if (n > at + kHeaderNbytes)
                    stored += std::min<std::size_t>(n - at - kHeaderNbytes,
                                                    Chunks::kCuts[i + 1] - Chunks::kCuts[i]);
            }
            CHECK(host.ended.size() == whole);
            CHECK(host.begun.size() == begun);
            const Bytes landed = host.into->stream(), sent = chunks.source->stream();
            CHECK(std::equal(landed.begin(), landed.begin() + static_cast<long>(stored), sent.begin()));
            CHECK(std::all_of(landed.begin() + static_cast<long>(stored), landed.end(),
                              [](std::byte b) { return b == std::byte{0xee}; }));
        }
    }
}

TEST_CASE("a bad byte anywhere in a header, split anywhere before: nothing of it is begun") {
    const Chunks chunks(DigestKind::crc32c, 5);
    for (std::size_t at = chunks.ends[0]; at < chunks.ends[0] + kHeaderNbytes; ++at) {
        for (std::size_t cut = 1; cut < chunks.ends[0] + kHeaderNbytes; ++cut) {
            Bytes bent = chunks.stream;
            bent[at] ^= std::byte{0x10};
            Host host;
            Buffers buffers;
            host.into = std::make_shared<Scattered>(10, 5, 2);
            LaneReader reader(host, DigestKind::crc32c);
            const auto edge = bent.begin() + static_cast<long>(cut);
            read(reader, Bytes(bent.begin(), edge), buffers.staging(), kAll);
            CHECK_THROWS_AS(read(reader, Bytes(edge, bent.end()), buffers.staging(), kAll), Violation);
            CHECK(host.begun == std::vector<std::uint64_t>{0});
            CHECK(host.ended.size() == 1);
        }
    }
}

TEST_CASE("abandoned at every byte: the stream stays in step, and says so in time") {
    for (const std::size_t piece : {std::size_t{10}, std::size_t{150}}) {
        for (std::size_t at = 0; at <= kHeaderNbytes + 300 + kTrailerNbytes; ++at) {
            CAPTURE(at);
            Host host;
            Buffers buffers;
            auto source = source_of(600 / piece, piece);
            host.into = std::make_shared<Scattered>(600 / piece, piece, 2);
            LaneWriter writer(host, DigestKind::crc32c);
            writer.start(job_of(source, 0, 300));
            CHECK(writer.uses(source.get()));
            const Bytes first = write(writer, buffers.staging(), kOne, at);
            CHECK(host.left.size() == 1);
            CHECK(writer.idle());
            CHECK_FALSE(writer.uses(source.get()));
            LaneReader reader(host, DigestKind::crc32c);
            if (at == 0) {
                CHECK(first.empty());
                CHECK(host.left[0] == std::pair{false, false});
                continue;
            }
            read(reader, first, buffers.staging(), kAll);
            REQUIRE(host.ended.size() == 1);
            const bool whole = at > kHeaderNbytes + 300;  // its trailer was under way
            CHECK(host.left[0] == std::pair{whole, true});
            CHECK((host.ended[0].status == ChunkStatus::ok) == whole);
            CHECK((!whole || host.ended[0].verified));
            writer.start(job_of(source, 300, 600));
            read(reader, write(writer, buffers.staging(), kAll), buffers.staging(), kOne);
            CHECK(host.ended.back() == Ended{300, true, true, ChunkStatus::ok});
        }
    }
}

TEST_CASE("after an abandon no byte of the source is read") {
    Host host;
    Buffers buffers;
    auto source = source_of(4, 1000);
    host.into = std::make_shared<Scattered>(4, 1000, 2);
    LaneWriter writer(host, DigestKind::none);
    writer.start(job_of(source, 0, 4000));
    iovec iov[24];
    writer.gather(iov, 24, 1 << 20, buffers.staging());
    CHECK_FALSE(writer.wrote(kHeaderNbytes + 500));
    std::weak_ptr<Scattered> watched = source;
    writer.abandon();
    source.reset();
    CHECK(watched.expired());  // nothing keeps it for the padding
    const Bytes rest = write(writer, buffers.staging(), kAll);
    CHECK(std::all_of(rest.begin(), rest.begin() + 3500, [](std::byte b) { return b == std::byte{0}; }));
}

TEST_CASE("taken out at every byte: nothing further is stored, and the next chunk is understood") {
    for (const std::size_t piece : {std::size_t{10}, std::size_t{150}}) {
        Host writes;
        Buffers buffers;
        auto source = source_of(600 / piece, piece);
        LaneWriter writer(writes, DigestKind::crc32c);
        writer.start(job_of(source, 0, 300));
        Bytes stream = write(writer, buffers.staging(), kAll);
        const std::size_t first = stream.size();
        writer.start(job_of(source, 300, 600));
        const Bytes second = write(writer, buffers.staging(), kAll);
        stream.insert(stream.end(), second.begin(), second.end());
        for (std::size_t at = kHeaderNbytes; at < first; ++at) {
            CAPTURE(at);
            Host host;
            host.into = std::make_shared<Scattered>(600 / piece, piece, 2);
            LaneReader reader(host, DigestKind::crc32c);
            read(reader, stream, buffers.staging(), kOne, at);
            REQUIRE(host.ended.size() == 2);
            CHECK_FALSE(host.ended[0].store);
            CHECK(host.ended[1] == Ended{300, true, true, ChunkStatus::ok});
            const Bytes landed = host.into->stream();
            const std::size_t stored = std::min<std::size_t>(at - kHeaderNbytes, 300);
            for (std::size_t i = stored; i < 300; ++i) CHECK(landed[i] == std::byte{0xee});
            CHECK(host.into->guards_hold());
        }
    }
}

TEST_CASE("any flipped bit of the body, of its place or of its trailer is noticed") {
    Buffers buffers;
    Host host;
    auto source = source_of(30, 10);
    LaneWriter writer(host, DigestKind::crc32c);
    writer.start(job_of(source, 0, 300));
    const Bytes stream = write(writer, buffers.staging(), kAll);
    for (std::size_t bit = 0; bit < stream.size() * 8; bit += 3) {
        Bytes bent = stream;
        bent[bit / 8] ^= static_cast<std::byte>(1u << (bit % 8));
        Host other;
        other.into = std::make_shared<Scattered>(30, 10, 2);
        LaneReader reader(other, DigestKind::crc32c);
        bool violation = false;
        try {
            read(reader, bent, buffers.staging(bit % 2 == 0), kAll);
        } catch (const Violation&) {
            violation = true;
        }
        const bool refused = !other.ended.empty() &&
                             (!other.ended[0].verified || other.ended[0].status != ChunkStatus::ok);
        CHECK((violation || refused));
        if (bit < kHeaderNbytes * 8) CHECK(other.begun.empty());
    }
}

TEST_CASE("a chunk that lands under another name fails its digest") {
    Buffers buffers;
    auto source = source_of(60, 10);
    for (int which = 0; which < 3; ++which) {
        Host host;
        host.into = std::make_shared<Scattered>(60, 10, 2);
        LaneWriter writer(host, DigestKind::crc32c);
        ChunkJob job = job_of(source, 0, 300);
        writer.start(job);
        Bytes stream = write(writer, buffers.staging(), kAll);
        if (which == 0) job.header.transfer += 1;
        if (which == 1) job.header.offset += 1;
        if (which == 2) job.header.attempt += 1;
        const auto header = encode_header(job.header);
        std::copy(header.begin(), header.end(), stream.begin());
        LaneReader reader(host, DigestKind::crc32c);
        read(reader, stream, buffers.staging(), kAll);
        CHECK_FALSE(host.ended.at(0).verified);
    }
}

TEST_CASE("what the session refuses is stored nowhere") {
    Buffers buffers;
    Host host;
    auto source = source_of(30, 10);
    host.into = std::make_shared<Scattered>(30, 10, 2);
    const Bytes before = host.into->memory;
    LaneWriter writer(host, DigestKind::none);
    ChunkJob job = job_of(source, 0, 300);
    writer.start(job);
    const Bytes good = write(writer, buffers.staging(), kAll);
    host.store = false;
    LaneReader drains(host, DigestKind::none);
    read(drains, good, buffers.staging(), kOne);
    job.header.transfer = 99;
    writer.start(job);
    const Bytes stream = write(writer, buffers.staging(), kAll);
    LaneReader refuses(host, DigestKind::none);
    CHECK_THROWS_AS(read(refuses, stream, buffers.staging(), kAll), Violation);
    CHECK(host.into->memory == before);
}

TEST_CASE("the trailer of what is read by a grant leaves by a call of its own, after the last byte") {
    for (const DigestKind digest : {DigestKind::none, DigestKind::crc32c}) {
        for (const std::size_t step : {std::size_t{1}, std::size_t{7}, ~std::size_t{0}}) {
            const Guarded whole(digest, 0, step, true);
            CHECK(whole.trailer_at == Guarded::kTrailer);
            CHECK(whole.end == Ended{0, true, true, ChunkStatus::ok});
            CHECK(whole.whole);
            CHECK(whole.host.left == std::vector{std::pair(true, true)});
        }
    }
}

TEST_CASE(
    "a grant that ends before the trailer has begun: ABORTED; after: what it speaks for was read before") {
    for (const DigestKind digest : {DigestKind::none, DigestKind::crc32c}) {
        for (const std::size_t step : {std::size_t{1}, std::size_t{7}, ~std::size_t{0}}) {
            for (std::size_t at = 0; at <= Guarded::kTrailer + kTrailerNbytes - 1; ++at) {
                CAPTURE(at);
                const Guarded cut(digest, at, step);
                const bool seen = at <= cut.trailer_at;  // it had ended when the trailer was made
                CHECK(cut.end.status == (seen ? ChunkStatus::aborted : ChunkStatus::ok));
                CHECK(cut.host.left == std::vector{std::pair(!seen, true)});
                CHECK(cut.out.size() == Guarded::kTrailer + kTrailerNbytes);
            }
        }
    }
}

TEST_CASE("a source of its own user's needs no call more") {
    Host host;
    Buffers buffers;
    LaneWriter writer(host, DigestKind::crc32c);
    const auto source = source_of(10, 5);
    writer.start(job_of(source, 0, 50));
    iovec iov[24];
    std::size_t planned = 0;
    const std::size_t count = writer.gather(iov, 24, 4096, buffers.staging(false));
    for (std::size_t i = 0; i < count; ++i) planned += iov[i].iov_len;
    CHECK(planned == kHeaderNbytes + 50 + kTrailerNbytes);
}
