// Bodies of the one-sided frames: a grant by its token, and what of it.
#include "protocol/frames_parts.hpp"

namespace kvt::protocol {

namespace {

constexpr std::uint8_t kSomeHeads = 1, kSubset = 2;

void write_token(Writer& out, const Token& token) { out.bytes(token); }

Token read_token(Reader& in) {
    Token token;
    const auto raw = in.take(token.size());
    std::copy(raw.begin(), raw.end(), token.begin());
    return token;
}

// Of a subset only the positions are written: how many, by group, the terms say.
void write_use(Writer& out, const GrantUse& use) {
    write_token(out, use.token);
    out.integer(use.wait_ms);
    out.integer(static_cast<std::uint8_t>((use.every_head ? 0 : kSomeHeads) | (use.subset ? kSubset : 0)));
    out.integer(use.head_begin);
    out.integer(use.head_count);
}

GrantUse read_use(Reader& in, bool& subset) {
    GrantUse use;
    use.token = read_token(in);
    use.wait_ms = in.integer<std::uint32_t>();
    const auto flags = in.integer<std::uint8_t>();
    use.head_begin = in.integer<std::uint32_t>();
    use.head_count = in.integer<std::uint32_t>();
    if ((flags & ~(kSomeHeads | kSubset)) != 0) {
        throw Violation("a use of a grant has unknown flags");
    }
    use.every_head = (flags & kSomeHeads) == 0;
    subset = (flags & kSubset) != 0;
    return use;
}

void write_subset(Writer& out, const GrantUse& use) {
    if (use.subset) {
        for (const auto& positions : *use.subset) {
            for (const std::uint32_t position : positions) {
                out.integer(position);
            }
        }
    }
}

void read_subset(Reader& in, const Terms& terms, GrantUse& use) {
    use.subset.emplace();
    for (const Terms::Group& group : terms.groups) {
        const auto raw = in.take(std::size_t{group.blocks} * 4);  // before anything is allocated
        auto& positions = use.subset->emplace_back(group.blocks);
        for (std::size_t i = 0; i < positions.size(); ++i) {
            positions[i] = load_le<std::uint32_t>(raw.data() + 4 * i);
        }
    }
}

}  // namespace

std::size_t GrantUse::positions() const noexcept {
    std::size_t n = 0;
    for (std::size_t i = 0; subset && i < subset->size(); ++i) {
        n += (*subset)[i].size();
    }
    return n;
}

Bytes encode_read(const ReadBody& body) {
    Bytes out;
    Writer writer(out);
    write_use(writer, body.use);
    write_terms(writer, body.terms);
    write_subset(writer, body.use);
    write_ranges(writer, body.ranges);
    return out;
}

ReadBody decode_read(std::span<const std::byte> raw) {
    Reader in(raw);
    ReadBody body;
    bool subset = false;
    body.use = read_use(in, subset);
    body.terms = read_terms(in);
    if (subset) {
        read_subset(in, body.terms, body.use);
    }
    body.ranges = read_ranges(in);
    in.finish();
    return body;
}

Bytes encode_write(const WriteBody& body) {
    Bytes out;
    Writer writer(out);
    write_use(writer, body.use);
    writer.text(body.meta);
    write_terms(writer, body.terms);
    write_subset(writer, body.use);
    return out;
}

WriteBody decode_write(std::span<const std::byte> raw) {
    Reader in(raw);
    WriteBody body;
    bool subset = false;
    body.use = read_use(in, subset);
    body.meta = in.text(kMaxMetaNbytes);
    body.terms = read_terms(in);
    if (subset) {
        read_subset(in, body.terms, body.use);
    }
    in.finish();
    return body;
}

Bytes encode_hold(const HoldBody& body) {
    Bytes out;
    Writer writer(out);
    write_token(writer, body.token);
    writer.integer(body.wait_ms);
    return out;
}

HoldBody decode_hold(std::span<const std::byte> raw) {
    Reader in(raw);
    HoldBody body;
    body.token = read_token(in);
    body.wait_ms = in.integer<std::uint32_t>();
    in.finish();
    return body;
}

Bytes encode_took(const TookBody& body) {
    Bytes out;
    Writer writer(out);
    write_token(writer, body.token);
    writer.integer(body.mark);
    return out;
}

TookBody decode_took(std::span<const std::byte> raw) {
    Reader in(raw);
    TookBody body;
    body.token = read_token(in);
    body.mark = in.integer<std::uint64_t>();
    in.finish();
    return body;
}

}  // namespace kvt::protocol
