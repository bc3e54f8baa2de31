// A control stream, cut anywhere: the frames that come out, and the violation, are those of the whole stream.
//
// The input is a program of eight-byte steps: frames are put on the stream (well formed unless a step says
// how not), or any bytes, and cuts are added to the list by which it is read. What must come out is found by
// walking over the stream in one piece.
#include <sanitizer/allocator_interface.h>

#include <cstring>
#include <string>

#include "base/crc32c.hpp"
#include "fuzz/input.hpp"
#include "fuzz/mutator.hpp"
#include "fuzz/peer.hpp"
#include "protocol/frame_stream.hpp"

namespace kvt::fuzz {

using namespace protocol;

namespace {

constexpr std::size_t kMostStream = 1u << 20;
constexpr std::size_t kMostCuts = 4096;  // of one reading; what is left comes in whole reads
constexpr std::size_t kMostSteps = 120;
constexpr std::size_t kSmallStream = 2048;
// The buffer grows by doubling, with the old one beside it; and a little for what has been heard.
constexpr std::size_t kHeldNbytes = 4 * FrameReader::kMostNbytes;

/// One frame, as far as it is compared.
struct Noted {
    std::array<std::byte, kHeaderNbytes> header;
    std::uint32_t body;
    std::array<std::byte, kTrailerNbytes> trailer;
    bool operator==(const Noted&) const = default;
};

Noted note(const Header& header, std::span<const std::byte> body, const std::optional<Trailer>& trailer) {
    return {encode_header(header), crc32c(0, body.data(), body.size()),
            trailer ? encode_trailer(*trailer) : std::array<std::byte, kTrailerNbytes>{}};
}

struct Heard {
    std::vector<Noted> frames;
    std::string wrong;
    bool between = true;  // two frames, when the stream ended
    bool operator==(const Heard&) const = default;
};

Heard walk(std::span<const std::byte> stream) {
    Heard heard;
    try {
        while (stream.size() >= kHeaderNbytes) {
            const Header header = decode_header(stream.first<kHeaderNbytes>(), false);
            const bool chunk = header.type == FrameType::chunk;
            const std::size_t nbytes = kHeaderNbytes + header.body_nbytes + (chunk ? kTrailerNbytes : 0);
            if (stream.size() < nbytes) break;
            std::optional<Trailer> trailer;
            if (chunk)
                trailer = decode_trailer(
                    stream.subspan(kHeaderNbytes + header.body_nbytes).first<kTrailerNbytes>());
            heard.frames.push_back(note(header, stream.subspan(kHeaderNbytes, header.body_nbytes), trailer));
            stream = stream.subspan(nbytes);
        }
    } catch (const Violation& violation) {
        heard.wrong = violation.what();
    }
    heard.between = stream.empty();
    return heard;
}

class Script {
  public:
    Script(Input input, std::size_t base) : input_(input), base_nbytes_(base) {}

    void run() {
        for (std::size_t i = 0; i < kMostSteps && !input_.empty(); ++i) step(input_.op());
        const Heard expected = walk(stream_);
        demand(read({}) == expected, "the stream in whole reads gives something else");
        demand(read(cuts_) == expected, "the stream in pieces gives something else");
        if (stream_.size() <= kSmallStream) {
            demand(read({1}) == expected, "the stream byte by byte gives something else");
        }
    }

  private:
    // ---- the peer
    void step(const Op& op) {
        if (op.code % 16 >= 11) {
            cuts_.push_back(1 + (op.code % 16 < 14 ? op.a : op.a | op.b << 8));
        } else if (stream_.size() < kMostStream) {
            op.code % 16 == 10 ? put_raw(op) : put_frame(op);
        }
    }
    void put_frame(const Op& op) {
        Frame frame = frame_of(op);
        if (op.g >= 192) Peer::spoil(frame, op);
        const std::size_t at = stream_.size();
        Peer::append(stream_, frame);
        if (frame.header.type == FrameType::chunk) {
            auto trailer = encode_trailer({ChunkStatus::ok, DigestKind::crc32c, op.f});
            if (op.g >= 160 && op.g < 192) trailer[op.g % kTrailerNbytes] = std::byte{op.e};
            stream_.insert(stream_.end(), trailer.begin(), trailer.end());
        }
        if (op.g >= 128 && op.g < 160) {  // a length that isn't the body's, under a CRC that agrees
            store_le(stream_.data() + at + 4, static_cast<std::uint32_t>(kExtremes[op.e % 6]));
            store_le(stream_.data() + at + 60, crc32c(0, stream_.data() + at, 60));
        }
        if (op.g >= 112 && op.g < 128) stream_[at + op.e % kHeaderNbytes] ^= std::byte{op.f};
    }
    Frame frame_of(const Op& op) {
        switch (op.code % 16) {
            case 0: return peer_.pool(op);
            case 1: return peer_.close_pool(op);
            case 2: return peer_.want(op, (op.d & 1) != 0);
            case 3: return peer_.offer(op);
            case 4: return {{.type = FrameType::abort, .flags = kFromSource}, Peer::abort_body(op)};
            case 5: return {{.type = FrameType::released}, encode_released({op.b, op.c})};
            case 6: return {{.type = FrameType::message, .transfer = op.a}, filled(op, op.b * 4200u)};
            case 7: return {{.type = FrameType::message, .transfer = op.a}, filled(op, op.b)};
            case 8: return {{.type = FrameType::chunk, .transfer = op.a}, filled(op, 1u + op.b * 64u)};
            case 9: return peer_.read(op, (op.d & 1) != 0);
            case 10: return peer_.write(op);
            case 11: return peer_.hold(op);
            case 12:
                return {{.type = FrameType::again, .transfer = op.a}, encode_ranges({{op.b, op.b + 9u}})};
            case 13: return {{.type = FrameType::located, .transfer = op.a}, filled(op, op.b * 16u)};
            default: return {{.type = FrameType::ping, .transfer = op.a, .arg = op.b}, {}};
        }
    }
    static Bytes filled(const Op& op, std::size_t nbytes) {
        Bytes body(std::min(nbytes, kMaxControlBodyNbytes), std::byte{op.c});
        for (std::size_t i = 0; i < body.size(); i += 97) body[i] = static_cast<std::byte>(i >> 3);
        return body;
    }
    void put_raw(const Op& op) {
        const auto raw = input_.take(op.b);
        const std::size_t at = stream_.size();
        stream_.insert(stream_.end(), raw.begin(), raw.end());
        if ((op.a & 1) != 0 && raw.size() >= kHeaderNbytes) {
            store_le(stream_.data() + at + 60, crc32c(0, stream_.data() + at, 60));
        }
    }

    // ---- the socket: by these cuts, over and over; without any, all that there is room for. A broken
    // stream stays where it broke.
    Heard read(const std::vector<std::size_t>& cuts) const {
        FrameReader reader;
        Heard heard;
        std::size_t at = 0;
        for (std::size_t turn = 0; at < stream_.size() && heard.wrong.empty(); ++turn) {
            const auto room = reader.room();
            demand(room.size() >= FrameReader::kRoomNbytes, "there is no room for the next bytes");
            demand(room.size() <= FrameReader::kMostNbytes, "more is asked for than a frame has");
            const std::size_t left = stream_.size() - at;
            const std::size_t cut = cuts.empty() || turn > kMostCuts ? left : cuts[turn % cuts.size()];
            const std::size_t n = std::min({cut, room.size(), left});
            std::memcpy(room.data(), stream_.data() + at, n);
            reader.got(n);
            at += n;
            take(reader, heard);
            demand(__sanitizer_get_current_allocated_bytes() < base_nbytes_ + mine() + kHeldNbytes,
                   "a stream made us keep too much");
        }
        heard.between = reader.empty();
        return heard;
    }
    static void take(FrameReader& reader, Heard& heard) {
        try {
            while (const auto frame = reader.next())
                heard.frames.push_back(note(frame->header, frame->body, frame->trailer));
        } catch (const Violation& violation) {
            heard.wrong = violation.what();
            try {
                demand(!reader.next(), "a frame behind a violation");
                broken("a violation is forgotten");
            } catch (const Violation&) {
            }
        }
    }
    std::size_t mine() const noexcept { return 4 * stream_.capacity(); }

    Input input_;
    std::size_t base_nbytes_;
    Peer peer_;
    Bytes stream_;
    std::vector<std::size_t> cuts_;
};

/// A few frames and a few ways to cut them.
const std::vector<Scene>& scenes() {
    static const std::vector<Scene> all = {
        {{0, 0, 0}, {2, 0, 0, 1}, {8, 0, 64}, {9}, {11, 3}},
        {{6, 1, 250, 7}, {9}, {14, 255, 127}},
        {{8, 0, 255, 1}, {8, 0, 64, 2}, {11, 70}, {12, 200}},
    };
    return all;
}

}  // namespace

}  // namespace kvt::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t nbytes) {
    const std::size_t base = __sanitizer_get_current_allocated_bytes();
    kvt::fuzz::Script(kvt::fuzz::Input(data, nbytes), base).run();
    return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t nbytes, std::size_t most,
                                               unsigned seed) {
    return kvt::fuzz::mutate_steps(data, nbytes, most, seed, kvt::fuzz::scenes());
}
