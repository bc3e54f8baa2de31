// The frames of an established session: 64-byte headers, bodies, chunk trailers. The only native parser of
// peer bytes.
//
// Lives here: encoding and decoding, limits of every field. Does not live here: what a frame does
// (session.hpp). Invariant: nothing of a frame is used before the CRC32C of its header has agreed, and no
// body is accepted whose length the type does not allow. docs/reference/wire.md is the normative text.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "protocol/bytes.hpp"
#include "protocol/terms.hpp"

namespace kvt::protocol {

inline constexpr std::size_t kHeaderNbytes = 64;
inline constexpr std::size_t kTrailerNbytes = 16;
inline constexpr std::size_t kMaxChunkNbytes = 1u << 20;
inline constexpr std::size_t kMaxInlineNbytes = 16u << 10;
inline constexpr std::size_t kMaxControlBodyNbytes = 1u << 20;
inline constexpr std::size_t kMaxKeyNbytes = 255;
inline constexpr std::size_t kMaxMetaNbytes = 4096;
inline constexpr std::size_t kMaxReasonNbytes = 1024;
inline constexpr std::size_t kMaxLocationNbytes = 4096;
inline constexpr std::size_t kMaxRanges = 4096;
inline constexpr std::size_t kMaxNameNbytes = 255;  // of a pool, group or layer
inline constexpr std::size_t kMaxGroups = 1024;     // of a pool
inline constexpr std::size_t kMaxLayers = 1024;     // of a pool

enum class FrameType : std::uint8_t {
    pool = 1,
    offer = 2,
    want = 3,
    chunk = 4,
    done = 5,
    abort = 6,
    aborted = 7,
    gated = 8,
    released = 9,
    message = 10,
    message_ack = 11,
    ping = 12,
    close = 13,
    located = 14,
    again = 15,
    copied = 16,
    read = 17,
    write = 18,
    hold = 19,
    held = 20,
    took = 21,
};

// What both sides have offered in the handshake, a bit each: frames and flags that version 1 has grown.
inline constexpr std::uint64_t kCanCopy = 1;   // WANT's flag 1, LOCATED, AGAIN, COPIED, RELEASED
inline constexpr std::uint64_t kCanGrant = 2;  // READ, WRITE, HOLD, HELD, TOOK, WANT's flag 2, ABORT's code 8

// Flags, by frame type; every bit that isn't named for the type is zero.
inline constexpr std::uint8_t kPoolClosed = 1;   // POOL: forget this pool
inline constexpr std::uint8_t kWantPulls = 1;    // WANT: the destination can copy by itself what is LOCATED
inline constexpr std::uint8_t kWantOfWrite = 2;  // WANT: it answers a WRITE
inline constexpr std::uint8_t kLetGo = 1;        // HOLD: the lease is given back
inline constexpr std::uint8_t kHoldMapped = 2;   // HOLD: the blocks are read where they lie while it is held
inline constexpr std::uint8_t kHeldNot = 1;      // HELD: no, or no more
inline constexpr std::uint8_t kFromSource =
    1;                                        // ABORT, ABORTED: said by the source (else by the destination)
inline constexpr std::uint8_t kOfferId = 2;   // ABORT, ABORTED: the id is an offer's, not a want's
inline constexpr std::uint8_t kGateShut = 1;  // GATED
inline constexpr std::uint8_t kBehindGate = 1;  // LOCATED: RELEASED will name the layers

/// Why a transfer ended, as the wire says it.
enum class AbortCode : std::uint32_t {
    cancelled = 1,
    timeout = 2,
    layout_mismatch = 3,
    integrity = 4,
    gate_failed = 5,
    refused = 6,
    local_error = 7,
    grant = 8,  // unknown, foreign, ended, out of range: one answer for all
};

enum class CloseCode : std::uint32_t { closed = 1, protocol = 2, limit = 3 };

struct Header {
    FrameType type{};
    std::uint8_t flags = 0;
    std::uint16_t attempt = 0;
    std::uint32_t body_nbytes = 0;  // of the bytes behind the header; a chunk's trailer not counted
    std::uint64_t transfer = 0;     // whose: a pool, an offer (OFFER, kOfferId), a message; else a want
    std::uint64_t offset = 0;       // of a chunk in the transfer's stream
    // Bytes: of the transfer, sealed (DONE), verified (COPIED), taken (MESSAGE_ACK). LOCATED: nanoseconds
    std::uint64_t total = 0;
    // By type. DONE, ABORT, ABORTED: chunks that came or were begun. CLOSE: the code. WANT: the offer that it
    // answers, or 0. CHUNK, GATED, LOCATED: the source's offer for this transfer, or 0. OFFER: it is for the
    // first want of its key whose id is greater than this, or, if there is none, for one to come.
    std::uint64_t arg = 0;
};

/// Encodes with the CRC32C in the last four bytes.
std::array<std::byte, kHeaderNbytes> encode_header(const Header& header) noexcept;
/// Verifies the CRC, type, flags and body length; throws Violation. `on_lane`: only CHUNK is allowed there.
Header decode_header(std::span<const std::byte, kHeaderNbytes> raw, bool on_lane);

enum class ChunkStatus : std::uint8_t { ok = 1, aborted = 2 };
enum class DigestKind : std::uint8_t { none = 0, crc32c = 1 };

struct Trailer {
    ChunkStatus status = ChunkStatus::ok;
    DigestKind kind = DigestKind::none;
    std::uint32_t digest = 0;
};
std::array<std::byte, kTrailerNbytes> encode_trailer(const Trailer& trailer) noexcept;
Trailer decode_trailer(std::span<const std::byte, kTrailerNbytes> raw);
/// What a chunk's digest starts from, so that a chunk that lands under another name fails.
std::uint32_t digest_seed(const Header& chunk) noexcept;

/// Half-open range of a transfer's stream.
struct Range {
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
    bool operator==(const Range&) const = default;
};

struct OfferBody {
    std::string key;
    std::string meta;
    std::string location;  // version 1 has these two on the wire and no use for them: LOCATED came in their
    bool gated = false;    // place. Written empty, read and dropped
    Terms terms;
};
struct WantBody {
    std::string key;
    std::string meta;
    Terms terms;
    std::vector<Range> ranges;
};
/// 128 random bits that name a grant.
using Token = std::array<std::byte, 16>;

/// A grant, and what of it: by a READ the source's part, by a WRITE the destination's.
struct GrantUse {
    Token token{};
    std::uint32_t wait_ms = 0;  // for the grant to come
    bool every_head = true;
    std::uint32_t head_begin = 0, head_count = 0;
    /// Positions in the grant's ids, for each group of the terms; null: all of them.
    std::optional<std::vector<std::vector<std::uint32_t>>> subset;

    std::size_t positions() const noexcept;
};
struct ReadBody {
    GrantUse use;
    Terms terms;
    std::vector<Range> ranges;
};
struct WriteBody {
    GrantUse use;
    std::string meta;
    Terms terms;
};
struct HoldBody {
    Token token{};
    std::uint32_t wait_ms = 0;
};
struct TookBody {
    Token token{};
    std::uint64_t mark = 0;  // as it was shown: a token may name another grant by now
};
struct AbortBody {
    AbortCode code{};
    std::string reason;
    Mismatch mismatch;  // set for layout_mismatch, as the teller sees it
};

Bytes encode_offer(const OfferBody& body);
Bytes encode_want(const WantBody& body);
Bytes encode_abort(const AbortBody& body);
Bytes encode_pool(const PoolTerms& pool);
Bytes encode_released(const std::vector<std::uint32_t>& layers);
OfferBody decode_offer(std::span<const std::byte> raw);
WantBody decode_want(std::span<const std::byte> raw);
AbortBody decode_abort(std::span<const std::byte> raw);
PoolTerms decode_pool(std::span<const std::byte> raw);
std::vector<std::uint32_t> decode_released(std::span<const std::byte> raw);
Bytes encode_ranges(const std::vector<Range>& ranges);
Bytes encode_read(const ReadBody& body);
Bytes encode_write(const WriteBody& body);
Bytes encode_hold(const HoldBody& body);
ReadBody decode_read(std::span<const std::byte> raw);
WriteBody decode_write(std::span<const std::byte> raw);
HoldBody decode_hold(std::span<const std::byte> raw);
Bytes encode_took(const TookBody& body);
TookBody decode_took(std::span<const std::byte> raw);
/// Of AGAIN: ascending, none empty, none touching another.
std::vector<Range> decode_ranges(std::span<const std::byte> raw);

/// Appends header and body to `out`; header.body_nbytes is set from the body.
void append_frame(Bytes& out, Header header, std::span<const std::byte> body);

const char* name_of(FrameType type) noexcept;

}  // namespace kvt::protocol
