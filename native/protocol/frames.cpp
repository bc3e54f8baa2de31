#include "protocol/frames.hpp"

#include <algorithm>
#include <string_view>
#include <unordered_set>

#include "base/crc32c.hpp"
#include "protocol/frames_parts.hpp"

namespace kvt::protocol {

namespace {

struct Rule {
    FrameType type;
    std::uint8_t flags;         // those that may be set
    std::uint32_t least, most;  // body bytes
};

constexpr Rule kRules[] = {
    {FrameType::pool, kPoolClosed, 0, kMaxControlBodyNbytes},
    {FrameType::offer, 0, 1, kMaxControlBodyNbytes},
    {FrameType::want, kWantPulls | kWantOfWrite, 1, kMaxControlBodyNbytes},
    {FrameType::chunk, 0, 1, kMaxChunkNbytes},
    {FrameType::done, 0, 0, 0},
    {FrameType::abort, kFromSource | kOfferId, 1, 16 * 1024},
    {FrameType::aborted, kFromSource | kOfferId, 0, 0},
    {FrameType::gated, kGateShut, 0, 0},
    {FrameType::released, 0, 4, 4 + 4 * kMaxLayers},
    {FrameType::message, 0, 0, kMaxControlBodyNbytes},
    {FrameType::message_ack, 0, 0, 0},
    {FrameType::ping, 0, 0, 0},
    {FrameType::close, 0, 0, 0},
    {FrameType::located, kBehindGate, 0, kMaxControlBodyNbytes},
    {FrameType::again, 0, 20, 4 + 16 * kMaxRanges},
    {FrameType::copied, 0, 0, 0},
    {FrameType::read, kWantPulls, 1, kMaxControlBodyNbytes},
    {FrameType::write, 0, 1, kMaxControlBodyNbytes},
    {FrameType::hold, kLetGo | kHoldMapped, 0, 20},
    {FrameType::held, kHeldNot, 0, 0},
    {FrameType::took, 0, 24, 24},
};

const Rule* rule_of(FrameType type) noexcept {
    const auto found = std::find_if(std::begin(kRules), std::end(kRules),
                                    [&](const Rule& r) { return r.type == type; });
    return found == std::end(kRules) ? nullptr : found;
}

bool has_name_twice(const std::vector<LayerTerms>& layers) {
    std::unordered_set<std::string_view> names;
    return !std::all_of(layers.begin(), layers.end(),
                        [&](const LayerTerms& layer) { return names.insert(layer.name).second; });
}

std::string read_key(Reader& in) {
    std::string key = in.text(kMaxKeyNbytes);
    if (key.empty()) {
        throw Violation("a transfer's key is empty");
    }
    return key;
}

// As much of a text as a reason may have, and no half of a UTF-8 character at its end.
std::string_view cut(std::string_view text) {
    if (text.size() <= kMaxReasonNbytes) {
        return text;
    }
    const auto continues = [&](std::size_t at) {
        return (static_cast<unsigned char>(text[at]) & 0xc0u) == 0x80u;
    };
    std::size_t end = kMaxReasonNbytes;
    while (end > kMaxReasonNbytes - 3 && continues(end)) {
        --end;
    }
    return text.substr(0, end);
}

}  // namespace

void write_terms(Writer& out, const Terms& terms) {
    out.integer(terms.pool);
    out.integer(static_cast<std::uint32_t>(terms.groups.size()));
    for (const auto& group : terms.groups) {
        out.integer(group.index);
        out.integer(group.blocks);
    }
    out.integer(static_cast<std::uint32_t>(terms.layers.size()));
    for (const auto& layer : terms.layers) {
        out.integer(layer.index);
        out.integer(layer.piece_nbytes);
    }
}

Terms read_terms(Reader& in) {
    Terms terms;
    terms.pool = in.integer<std::uint64_t>();
    const std::size_t groups = in.count(kMaxGroups, 6);
    terms.groups.reserve(groups);
    for (std::size_t i = 0; i < groups; ++i) {
        const auto index = in.integer<std::uint16_t>();
        terms.groups.push_back({index, in.integer<std::uint32_t>()});
    }
    const std::size_t layers = in.count(kMaxLayers, 10);
    terms.layers.reserve(layers);
    for (std::size_t i = 0; i < layers; ++i) {
        const auto index = in.integer<std::uint16_t>();
        terms.layers.push_back({index, in.integer<std::uint64_t>()});
    }
    return terms;
}

void write_ranges(Writer& out, const std::vector<Range>& ranges) {
    out.integer(static_cast<std::uint32_t>(ranges.size()));
    for (const Range& range : ranges) {
        out.integer(range.begin);
        out.integer(range.end);
    }
}

std::vector<Range> read_ranges(Reader& in) {
    std::vector<Range> ranges;
    const std::size_t n = in.count(kMaxRanges, 16);
    ranges.reserve(n);
    std::uint64_t from = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const auto begin = in.integer<std::uint64_t>();
        const auto end = in.integer<std::uint64_t>();
        if (begin < from || end <= begin) {
            throw Violation("the ranges of a frame aren't ascending");
        }
        ranges.push_back({begin, end});
        from = end;
    }
    return ranges;
}

const char* name_of(FrameType type) noexcept {
    constexpr const char* kNames[] = {"?",     "POOL",    "OFFER",   "WANT",     "CHUNK",   "DONE",
                                      "ABORT", "ABORTED", "GATED",   "RELEASED", "MESSAGE", "MESSAGE_ACK",
                                      "PING",  "CLOSE",   "LOCATED", "AGAIN",    "COPIED",  "READ",
                                      "WRITE", "HOLD",    "HELD",    "TOOK"};
    const auto index = static_cast<std::size_t>(type);
    return index < std::size(kNames) ? kNames[index] : kNames[0];
}

std::array<std::byte, kHeaderNbytes> encode_header(const Header& header) noexcept {
    std::array<std::byte, kHeaderNbytes> raw{};
    raw[0] = static_cast<std::byte>(header.type);
    raw[1] = static_cast<std::byte>(header.flags);
    store_le(raw.data() + 2, header.attempt);
    store_le(raw.data() + 4, header.body_nbytes);
    store_le(raw.data() + 8, header.transfer);
    store_le(raw.data() + 16, header.offset);
    store_le(raw.data() + 24, header.total);
    store_le(raw.data() + 32, header.arg);
    store_le(raw.data() + 60, crc32c(0, raw.data(), 60));
    return raw;
}

Header decode_header(std::span<const std::byte, kHeaderNbytes> raw, bool on_lane) {
    if (load_le<std::uint32_t>(raw.data() + 60) != crc32c(0, raw.data(), 60)) {
        throw Violation("the CRC32C of a frame's header doesn't agree");
    }
    Header header;
    header.type = static_cast<FrameType>(raw[0]);
    header.flags = static_cast<std::uint8_t>(raw[1]);
    header.attempt = load_le<std::uint16_t>(raw.data() + 2);
    header.body_nbytes = load_le<std::uint32_t>(raw.data() + 4);
    header.transfer = load_le<std::uint64_t>(raw.data() + 8);
    header.offset = load_le<std::uint64_t>(raw.data() + 16);
    header.total = load_le<std::uint64_t>(raw.data() + 24);
    header.arg = load_le<std::uint64_t>(raw.data() + 32);
    const Rule* rule = rule_of(header.type);
    if (rule == nullptr) {
        throw Violation("a frame's type is unknown");
    }
    if ((header.flags & ~rule->flags) != 0) {
        throw Violation("a frame has flags that its type doesn't have");
    }
    const bool inline_chunk = header.type == FrameType::chunk && !on_lane;
    const std::uint32_t most = inline_chunk ? kMaxInlineNbytes : rule->most;
    if (header.body_nbytes < rule->least || header.body_nbytes > most) {
        throw Violation("a frame's body length is out of bounds");
    }
    if (on_lane && header.type != FrameType::chunk) {
        throw Violation("a lane carries CHUNK frames only");
    }
    if (std::any_of(raw.begin() + 40, raw.begin() + 60, [](std::byte b) { return b != std::byte{0}; })) {
        throw Violation("reserved bytes of a frame's header aren't zero");
    }
    return header;
}

std::array<std::byte, kTrailerNbytes> encode_trailer(const Trailer& trailer) noexcept {
    std::array<std::byte, kTrailerNbytes> raw{};
    raw[0] = static_cast<std::byte>(trailer.status);
    raw[1] = static_cast<std::byte>(trailer.kind);
    store_le(raw.data() + 4, trailer.digest);
    return raw;
}

Trailer decode_trailer(std::span<const std::byte, kTrailerNbytes> raw) {
    Trailer trailer;
    trailer.status = static_cast<ChunkStatus>(raw[0]);
    trailer.kind = static_cast<DigestKind>(raw[1]);
    trailer.digest = load_le<std::uint32_t>(raw.data() + 4);
    if (trailer.status != ChunkStatus::ok && trailer.status != ChunkStatus::aborted) {
        throw Violation("a chunk's status is unknown");
    }
    if (trailer.kind != DigestKind::none && trailer.kind != DigestKind::crc32c) {
        throw Violation("a chunk's digest is of an unknown kind");
    }
    const auto unused = [](std::byte b) { return b != std::byte{0}; };
    if (std::any_of(raw.begin() + 2, raw.begin() + 4, unused) ||
        std::any_of(raw.begin() + 8, raw.end(), unused)) {
        throw Violation("reserved bytes of a chunk's trailer aren't zero");
    }
    return trailer;
}

std::uint32_t digest_seed(const Header& chunk) noexcept {
    std::array<std::byte, 28> raw{};
    store_le(raw.data(), chunk.transfer);
    store_le(raw.data() + 8, chunk.offset);
    store_le(raw.data() + 16, static_cast<std::uint64_t>(chunk.body_nbytes));
    store_le(raw.data() + 24, static_cast<std::uint32_t>(chunk.attempt));
    return crc32c(0, raw.data(), raw.size());
}

Bytes encode_offer(const OfferBody& body) {
    Bytes out;
    Writer writer(out);
    writer.text(body.key);
    writer.text(body.meta);
    writer.text(body.location);
    writer.integer(static_cast<std::uint8_t>(body.gated ? 1 : 0));
    write_terms(writer, body.terms);
    return out;
}

OfferBody decode_offer(std::span<const std::byte> raw) {
    Reader in(raw);
    OfferBody body;
    body.key = read_key(in);
    body.meta = in.text(kMaxMetaNbytes);
    body.location = in.text(kMaxLocationNbytes);
    body.gated = in.integer<std::uint8_t>() != 0;
    body.terms = read_terms(in);
    in.finish();
    return body;
}

Bytes encode_want(const WantBody& body) {
    Bytes out;
    Writer writer(out);
    writer.text(body.key);
    writer.text(body.meta);
    write_terms(writer, body.terms);
    write_ranges(writer, body.ranges);
    return out;
}

WantBody decode_want(std::span<const std::byte> raw) {
    Reader in(raw);
    WantBody body;
    body.key = read_key(in);
    body.meta = in.text(kMaxMetaNbytes);
    body.terms = read_terms(in);
    body.ranges = read_ranges(in);
    in.finish();
    return body;
}

Bytes encode_abort(const AbortBody& body) {
    Bytes out;
    Writer writer(out);
    writer.integer(static_cast<std::uint32_t>(body.code));
    for (const std::string* text :
         {&body.reason, &body.mismatch.path, &body.mismatch.ours, &body.mismatch.theirs}) {
        writer.text(cut(*text));
    }
    return out;
}

AbortBody decode_abort(std::span<const std::byte> raw) {
    Reader in(raw);
    AbortBody body;
    const auto code = in.integer<std::uint32_t>();
    if (code < static_cast<std::uint32_t>(AbortCode::cancelled) ||
        code > static_cast<std::uint32_t>(AbortCode::grant)) {
        throw Violation("an ABORT's code is unknown");
    }
    body.code = static_cast<AbortCode>(code);
    body.reason = in.text(kMaxReasonNbytes);
    for (std::string* text : {&body.mismatch.path, &body.mismatch.ours, &body.mismatch.theirs}) {
        *text = in.text(kMaxReasonNbytes);
    }
    in.finish();
    return body;
}

Bytes encode_pool(const PoolTerms& pool) {
    Bytes out;
    Writer writer(out);
    writer.text(pool.name);
    writer.integer(static_cast<std::uint8_t>(pool.named ? 1 : 0));
    writer.integer(static_cast<std::uint32_t>(pool.groups.size()));
    for (const auto& group : pool.groups) {
        writer.text(group.name);
        writer.integer(static_cast<std::uint8_t>(group.opaque ? 1 : 0));
        writer.text(group.dtype);
        writer.text(group.order);
        writer.text(group.kv);
        writer.integer(group.tokens_per_block);
    }
    writer.integer(static_cast<std::uint32_t>(pool.layers.size()));
    for (const auto& layer : pool.layers) {
        writer.text(layer.name);
        writer.integer(layer.group);
    }
    return out;
}

PoolTerms decode_pool(std::span<const std::byte> raw) {
    Reader in(raw);
    PoolTerms pool;
    pool.name = in.text(kMaxNameNbytes);
    pool.named = in.integer<std::uint8_t>() != 0;
    const std::size_t groups = in.count(kMaxGroups, 13);
    for (std::size_t i = 0; i < groups; ++i) {
        GroupTerms group;
        group.name = in.text(kMaxNameNbytes);
        group.opaque = in.integer<std::uint8_t>() != 0;
        group.dtype = in.text(kMaxNameNbytes);
        group.order = in.text(kMaxNameNbytes);
        group.kv = in.text(kMaxNameNbytes);
        group.tokens_per_block = in.integer<std::uint32_t>();
        pool.groups.push_back(std::move(group));
    }
    const std::size_t layers = in.count(kMaxLayers, 4);
    for (std::size_t i = 0; i < layers; ++i) {
        LayerTerms layer;
        layer.name = in.text(kMaxNameNbytes);
        layer.group = in.integer<std::uint16_t>();
        if (layer.group >= groups) {
            throw Violation("a POOL's layer names a group that isn't there");
        }
        pool.layers.push_back(std::move(layer));
    }
    in.finish();
    if (pool.named && has_name_twice(pool.layers)) {
        throw Violation("a POOL has two layers of one name");
    }
    return pool;
}

Bytes encode_released(const std::vector<std::uint32_t>& layers) {
    Bytes out;
    Writer writer(out);
    writer.integer(static_cast<std::uint32_t>(layers.size()));
    for (const std::uint32_t layer : layers) {
        writer.integer(layer);
    }
    return out;
}

std::vector<std::uint32_t> decode_released(std::span<const std::byte> raw) {
    Reader in(raw);
    const std::size_t n = in.count(kMaxLayers, 4);
    std::vector<std::uint32_t> layers(n);
    for (auto& layer : layers) {
        layer = in.integer<std::uint32_t>();
    }
    in.finish();
    return layers;
}

Bytes encode_ranges(const std::vector<Range>& ranges) {
    Bytes out;
    Writer writer(out);
    write_ranges(writer, ranges);
    return out;
}

std::vector<Range> decode_ranges(std::span<const std::byte> raw) {
    Reader in(raw);
    std::vector<Range> ranges = read_ranges(in);
    in.finish();
    return ranges;
}

void append_frame(Bytes& out, Header header, std::span<const std::byte> body) {
    header.body_nbytes = static_cast<std::uint32_t>(body.size());
    const auto raw = encode_header(header);
    const std::size_t at = out.size();
    out.resize(at + raw.size() + body.size());  // at once: no memory for it leaves no half of a frame
    std::copy(raw.begin(), raw.end(), out.begin() + static_cast<std::ptrdiff_t>(at));
    std::copy(body.begin(), body.end(), out.begin() + static_cast<std::ptrdiff_t>(at + raw.size()));
}

}  // namespace kvt::protocol
