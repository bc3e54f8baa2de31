// The bytes of every frame as version 1 has them: what is encoded today and what a peer of that version
// sends. tests/golden/frames.hex holds them; tests/unit/test_golden_bytes.py reads the same file by
// docs/reference/wire.md.
#include <doctest/doctest.h>

#include <cctype>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>

#include "base/crc32c.hpp"
#include "protocol/frames.hpp"

using namespace kvt;
using namespace kvt::protocol;

namespace {

struct Example {
    std::string name;
    Header header;
    Bytes body;
};

Header header_of(FrameType type, std::uint64_t transfer, std::uint64_t total = 0, std::uint64_t arg = 0,
                 std::uint8_t flags = 0) {
    Header header;
    header.type = type;
    header.flags = flags;
    header.transfer = transfer;
    header.total = total;
    header.arg = arg;
    return header;
}

Bytes bytes_of(const std::string& text) {
    const auto raw = std::as_bytes(std::span(text.data(), text.size()));
    return Bytes(raw.begin(), raw.end());
}

Terms terms_of_layers(std::uint64_t pool) { return {pool, {{0, 3}}, {{1, 4096}, {0, 4096}}}; }

std::vector<Example> pools_and_transfers() {
    const PoolTerms named{
        "kv", true, {{"full", false, "bfloat16", "HND", "packed", 16}}, {{"layers.0", 0}, {"layers.1", 0}}};
    const PoolTerms opaque{"", false, {{"", true, "", "", "", 0}}, {{"0", 0}}};
    const AbortBody mismatch{AbortCode::layout_mismatch, "", {"dtype", "bfloat16", "fp8_e4m3"}};
    return {
        {"pool", header_of(FrameType::pool, 7), encode_pool(named)},
        {"pool, opaque", header_of(FrameType::pool, 8), encode_pool(opaque)},
        {"pool, closed", header_of(FrameType::pool, 7, 0, 0, kPoolClosed), {}},
        {"offer", header_of(FrameType::offer, 1, 24576, 2),
         encode_offer({"req-42", "meta", "", true, terms_of_layers(7)})},
        {"want", header_of(FrameType::want, 3, 24576, 1),
         encode_want({"req-42", "", terms_of_layers(9), {{0, 8192}, {12288, 24576}}})},
        {"want, pulls", header_of(FrameType::want, 4, 24576, 0, kWantPulls),
         encode_want({std::string("\0\xff", 2), "", terms_of_layers(9), {{0, 24576}}})},
        {"done", header_of(FrameType::done, 3, 24576, 6), {}},
        {"abort", header_of(FrameType::abort, 3, 0, 5),
         encode_abort({AbortCode::cancelled, "cancelled here", {}})},
        {"abort, from source", header_of(FrameType::abort, 3, 0, 0, kFromSource), encode_abort(mismatch)},
        {"abort, of an offer", header_of(FrameType::abort, 2, 0, 0, kFromSource | kOfferId),
         encode_abort({AbortCode::timeout, "", {}})},
        {"aborted", header_of(FrameType::aborted, 3, 0, 5, kFromSource), {}},
        {"gated, shut", header_of(FrameType::gated, 3, 0, 1, kGateShut), {}},
        {"gated, open", header_of(FrameType::gated, 3, 0, 1), {}},
        {"released", header_of(FrameType::released, 4), encode_released({1, 0})},
        {"message", header_of(FrameType::message, 1), bytes_of("hello")},
        {"message_ack", header_of(FrameType::message_ack, 1, 69), {}},
        {"ping", header_of(FrameType::ping, 0), {}},
        {"close", header_of(FrameType::close, 0, 0, static_cast<std::uint64_t>(CloseCode::protocol)), {}},
    };
}

std::vector<Example> copies_and_grants() {
    Token token{};
    for (std::size_t i = 0; i < token.size(); ++i) {
        token[i] = static_cast<std::byte>(0xa0 + i);
    }
    const GrantUse whole{token, 0, true, 0, 0, {}}, part{token, 1500, false, 4, 2, {{{5, 0, 2}}}};
    Header located = header_of(FrameType::located, 4, 10'000'000'000, 2, kBehindGate),
           again = header_of(FrameType::again, 4);
    located.attempt = 1;
    again.attempt = 2;
    return {
        {"located", located, bytes_of("where")},
        {"again", again, encode_ranges({{0, 8192}, {12288, 24576}})},
        {"copied", header_of(FrameType::copied, 4, 8192), {}},
        {"read", header_of(FrameType::read, 5, 24576),
         encode_read({whole, terms_of_layers(9), {{0, 24576}}})},
        {"read, part", header_of(FrameType::read, 6, 24576, 0, kWantPulls),
         encode_read({part, terms_of_layers(9), {{0, 24576}}})},
        {"write", header_of(FrameType::write, 2, 24576), encode_write({part, "meta", terms_of_layers(7)})},
        {"want, of a write", header_of(FrameType::want, 7, 24576, 2, kWantOfWrite),
         encode_want({"token", "", terms_of_layers(9), {{0, 24576}}})},
        {"hold", header_of(FrameType::hold, 1), encode_hold({token, 1500})},
        {"hold, mapped", header_of(FrameType::hold, 1, 0, 0, kHoldMapped), encode_hold({token, 1500})},
        {"hold, let go", header_of(FrameType::hold, 1, 0, 0, kLetGo), {}},
        {"held", header_of(FrameType::held, 1), {}},
        {"held, not", header_of(FrameType::held, 1, 0, 0, kHeldNot), {}},
        {"took", header_of(FrameType::took, 0), encode_took({token, 0x1234})},
        {"abort, grant", header_of(FrameType::abort, 5, 0, 0, kFromSource),
         encode_abort({AbortCode::grant, "", {}})},
    };
}

Header chunk_header() {
    Header header = header_of(FrameType::chunk, 3, 24576, 1);
    header.attempt = 1;
    header.offset = 12288;
    return header;
}

void append_trailer(Bytes& out, const Trailer& trailer) {
    const auto raw = encode_trailer(trailer);
    out.insert(out.end(), raw.begin(), raw.end());
}

/// Everything, by name, as it is encoded.
std::map<std::string, Bytes> encoded() {
    std::map<std::string, Bytes> all;
    for (const Example& example : pools_and_transfers()) {
        append_frame(all[example.name], example.header, example.body);
    }
    for (const Example& example : copies_and_grants()) {
        append_frame(all[example.name], example.header, example.body);
    }
    const Bytes payload = bytes_of("golden bytes!");
    Header header = chunk_header();
    header.body_nbytes = static_cast<std::uint32_t>(payload.size());
    const std::uint32_t digest = crc32c(digest_seed(header), payload.data(), payload.size());
    append_frame(all["chunk, digest"], header, payload);
    append_trailer(all["chunk, digest"], {ChunkStatus::ok, DigestKind::crc32c, digest});
    append_frame(all["chunk, plain"], header, payload);
    append_trailer(all["chunk, plain"], {ChunkStatus::ok, DigestKind::none, 0});
    append_frame(all["chunk, aborted"], header, Bytes(13));
    append_trailer(all["chunk, aborted"], {ChunkStatus::aborted, DigestKind::none, 0});
    return all;
}

std::string hex_of(const Bytes& bytes) {
    constexpr const char* kDigits = "0123456789abcdef";
    std::string text;
    for (const std::byte byte : bytes) {
        text += kDigits[std::to_integer<unsigned>(byte) >> 4];
        text += kDigits[std::to_integer<unsigned>(byte) & 15];
    }
    return text;
}

/// name: a line in brackets; its hex: the lines that follow. A line that begins with # is for people.
std::map<std::string, std::string> checked_in() {
    const auto root = std::filesystem::path(__FILE__).parent_path().parent_path().parent_path();
    std::ifstream file(root / "tests" / "golden" / "frames.hex");
    std::map<std::string, std::string> all;
    std::string line, name;
    while (std::getline(file, line)) {
        if (line.starts_with("[")) {
            name = line.substr(1, line.find(']') - 1);
            all[name];
        } else if (!line.starts_with("#")) {
            for (const char c : line) {
                if (std::isxdigit(static_cast<unsigned char>(c)) != 0) all[name] += c;
            }
        }
    }
    return all;
}

Bytes bytes_of_hex(const std::string& hex) {
    Bytes bytes;
    for (std::size_t i = 0; i + 1 < hex.size(); i += 2) {
        bytes.push_back(static_cast<std::byte>(std::stoi(hex.substr(i, 2), nullptr, 16)));
    }
    return bytes;
}

/// A body, read and written again.
Bytes again(const Header& header, std::span<const std::byte> body) {
    switch (header.type) {
        case FrameType::pool:
            return (header.flags & kPoolClosed) != 0 ? Bytes() : encode_pool(decode_pool(body));
        case FrameType::offer: return encode_offer(decode_offer(body));
        case FrameType::want: return encode_want(decode_want(body));
        case FrameType::abort: return encode_abort(decode_abort(body));
        case FrameType::released: return encode_released(decode_released(body));
        case FrameType::again: return encode_ranges(decode_ranges(body));
        case FrameType::read: return encode_read(decode_read(body));
        case FrameType::write: return encode_write(decode_write(body));
        case FrameType::hold: return (header.flags & kLetGo) != 0 ? Bytes() : encode_hold(decode_hold(body));
        default: return Bytes(body.begin(), body.end());
    }
}

}  // namespace

TEST_CASE("what is encoded is what version 1 has on the wire") {
    const auto golden = checked_in();
    for (const auto& [name, bytes] : encoded()) {
        INFO(name);
        const auto known = golden.find(name);
        if (known == golden.end()) {
            FAIL_CHECK("not in tests/golden/frames.hex: ", hex_of(bytes));
        } else {
            CHECK(hex_of(bytes) == known->second);
        }
    }
}

TEST_CASE("what version 1 has on the wire is read") {
    const auto golden = checked_in();
    CHECK(golden.size() == encoded().size());
    for (const auto& [name, hex] : golden) {
        INFO(name);
        const Bytes raw = bytes_of_hex(hex);
        REQUIRE(raw.size() >= kHeaderNbytes);
        const std::span<const std::byte, kHeaderNbytes> first(raw.data(), kHeaderNbytes);
        const Header header = decode_header(first, false);
        const std::size_t tail = header.type == FrameType::chunk ? kTrailerNbytes : 0;
        REQUIRE(raw.size() == kHeaderNbytes + header.body_nbytes + tail);
        Bytes written;
        append_frame(written, header,
                     again(header, std::span(raw).subspan(kHeaderNbytes, header.body_nbytes)));
        if (tail != 0) {
            const std::span<const std::byte, kTrailerNbytes> last(raw.data() + raw.size() - tail,
                                                                  kTrailerNbytes);
            append_trailer(written, decode_trailer(last));
        }
        CHECK(hex_of(written) == hex);
    }
}

TEST_CASE("fields of a frame of version 1") {
    const auto golden = checked_in();
    const Bytes offer = bytes_of_hex(golden.at("offer"));
    const OfferBody body = decode_offer(std::span(offer).subspan(kHeaderNbytes));
    CHECK(body.key == "req-42");
    CHECK(body.meta == "meta");
    CHECK(body.gated);
    CHECK(body.terms.pool == 7);
    CHECK(body.terms.layers[0].index == 1);
    const Bytes abort = bytes_of_hex(golden.at("abort, from source"));
    CHECK(decode_abort(std::span(abort).subspan(kHeaderNbytes)).mismatch.theirs == "fp8_e4m3");
}
