// The peer of the fuzz targets: well-formed frames by default, wrong in one named way when the input says so.
//
// Lives here: building frames. Does not live here: what they may do to a session (the targets).
// Invariant: a frame that isn't meant to be wrong has the right CRC32C, lengths and totals, so that the
// fuzzer spends its time behind the first check.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "fuzz/grants.hpp"
#include "fuzz/input.hpp"
#include "fuzz/record.hpp"
#include "protocol/frames.hpp"

namespace kvt::fuzz {

struct Frame {
    protocol::Header header;
    protocol::Bytes body;
};

class Peer {
  public:
    static std::string key_of(std::uint64_t n) { return "k" + std::to_string(n); }

    Frame pool(const Op& op) {
        Frame frame{{.type = protocol::FrameType::pool, .transfer = op.a % 6u + 1}, {}};
        LocalPool made = op.b % 7 < 4 ? local_pools()[op.b % 7] : odd_pool(op.b % 7 - 4, op.c);
        frame.body = protocol::encode_pool(made.terms);
        pools_.insert_or_assign(frame.header.transfer, std::move(made));
        return frame;
    }
    Frame close_pool(const Op& op) {
        return {
            {.type = protocol::FrameType::pool, .flags = protocol::kPoolClosed, .transfer = op.a % 6u + 1},
            {}};
    }
    Frame want(const Op& op, bool pulls) {
        const auto [terms, nbytes] = terms_for(op);
        std::vector<protocol::Range> ranges;
        if (nbytes > 1 && (op.d & 2) != 0) {
            ranges = {{0, nbytes / 2}, {nbytes / 2, nbytes - (op.d >> 2 & 1)}};
        } else if (nbytes > 0 && (op.d & 8) == 0) {
            ranges = {{0, nbytes}};
        }
        if (!ranges.empty() && ranges.back().begin >= ranges.back().end) ranges.pop_back();
        const std::uint8_t flags = pulls ? protocol::kWantPulls : 0;
        return {{.type = protocol::FrameType::want,
                 .flags = flags,
                 .transfer = ++last_want_,
                 .total = nbytes,
                 .arg = op.d >> 4 & 3u},
                protocol::encode_want({key_of(op.a % 4), meta_of(op), terms, ranges})};
    }
    Frame offer(const Op& op) {
        const auto [terms, nbytes] = terms_for(op);
        const std::string location((op.d & 4) != 0 ? 100 : 0, 'l');
        return {{.type = protocol::FrameType::offer,
                 .transfer = ++last_offer_,
                 .total = nbytes,
                 .arg = op.d >> 4 & 7u},
                protocol::encode_offer({key_of(op.a % 4), meta_of(op), location, (op.d & 2) != 0, terms})};
    }
    Frame read(const Op& op, bool pulls) {
        const auto [terms, nbytes] = terms_for(op);
        protocol::ReadBody body{use_of(op, terms), terms, {}};
        if (nbytes > 0) body.ranges.push_back({0, nbytes});
        return {{.type = protocol::FrameType::read,
                 .flags = pulls ? protocol::kWantPulls : std::uint8_t{0},
                 .transfer = ++last_want_,
                 .total = nbytes},
                protocol::encode_read(body)};
    }
    Frame write(const Op& op) {
        const auto [terms, nbytes] = terms_for(op);
        return {{.type = protocol::FrameType::write, .transfer = ++last_offer_, .total = nbytes},
                protocol::encode_write({use_of(op, terms), meta_of(op), terms})};
    }
    Frame hold(const Op& op) {
        protocol::Header header{.type = protocol::FrameType::hold, .transfer = last_hold_};
        if ((op.d & 3) == 0) {
            header.flags = protocol::kLetGo;
            return {header, {}};
        }
        header.flags = (op.d & 4) != 0 ? protocol::kHoldMapped : 0;
        header.transfer = ++last_hold_;
        return {header, protocol::encode_hold({token_of(op.a), op.e & 15u})};
    }
    /// A body for ABORT, always well formed.
    static protocol::Bytes abort_body(const Op& op) {
        protocol::AbortBody body{static_cast<protocol::AbortCode>(op.c % 8 + 1), std::string(op.d, 'r'), {}};
        if (op.c % 8 == 2) body.mismatch = {"dtype", "ours", "theirs"};
        return protocol::encode_abort(body);
    }
    /// Makes a frame wrong in the way that `g` names, from 192 on.
    static void spoil(Frame& frame, const Op& op) {
        const std::uint64_t extreme = kExtremes[op.e % kExtremes.size()];
        switch (op.g - 192) {
            case 0: frame.header.transfer = extreme; break;
            case 1: frame.header.offset = extreme; break;
            case 2: frame.header.total = extreme; break;
            case 3: frame.header.arg = extreme; break;
            case 4:
                frame.header.flags = static_cast<std::uint8_t>(frame.header.flags ^ 1u << op.e % 8);
                break;
            case 5: frame.header.attempt = op.e; break;
            case 6: frame.header.type = static_cast<protocol::FrameType>(op.e); break;
            case 7: frame.header.total += op.e; break;
            case 8: frame.header.arg += op.e; break;
            case 9: frame.header.transfer -= op.e; break;
            case 10:
                frame.body.resize(frame.body.size() - std::min<std::size_t>(frame.body.size(), op.e + 1u));
                break;
            case 11: frame.body.push_back(std::byte{op.e}); break;
            default: spoil_body(frame.body, op, extreme);
        }
    }
    /// What our side says, as a peer reads it.
    static void read_body(const protocol::Header& header, std::span<const std::byte> body) {
        using namespace protocol;
        switch (header.type) {
            case FrameType::pool: (header.flags & kPoolClosed) != 0 ? PoolTerms() : decode_pool(body); break;
            case FrameType::offer: decode_offer(body); break;
            case FrameType::want: decode_want(body); break;
            case FrameType::abort: decode_abort(body); break;
            case FrameType::released: decode_released(body); break;
            case FrameType::read: decode_read(body); break;
            case FrameType::write: decode_write(body); break;
            case FrameType::again: decode_ranges(body); break;
            default: break;
        }
    }
    static void append(protocol::Bytes& out, const Frame& frame) {
        protocol::append_frame(out, frame.header, frame.body);
    }

  private:
    struct Wanted {
        protocol::Terms terms;
        std::uint64_t nbytes = 0;
    };
    static void spoil_body(protocol::Bytes& body, const Op& op, std::uint64_t extreme) {
        if (body.empty()) return;
        const std::size_t at = (static_cast<std::size_t>(op.f) << 3 | op.g % 8) % body.size();
        if (op.g % 2 == 0) {
            body[at] = std::byte{op.e};
        } else {
            for (std::size_t i = at; i < std::min(body.size(), at + 8); ++i)
                body[i] = static_cast<std::byte>(extreme >> 8 * (i - at));
        }
    }
    static LocalPool odd_pool(int which, std::uint8_t size) {
        if (which == 0) return {};  // no layers
        if (which == 1) {           // one name twice
            return {{"kv", true, local_pools()[0].terms.groups, {{"a", 0}, {"a", 0}, {"b", 0}}},
                    {64, 64, 96}};
        }
        LocalPool pool{{"many", true, {}, {}}, {}};
        pool.terms.groups.assign(size + 1u, {std::string(200, 'g'), false, "d", "o", "k", 1});
        pool.terms.layers.push_back({"a", size});
        pool.piece_nbytes.push_back(64);
        return pool;
    }
    Wanted terms_for(const Op& op) const {
        const auto known = pools_.find(op.b % 6u + 1);
        const LocalPool& pool = known == pools_.end() ? local_pools()[0] : known->second;
        Wanted wanted{terms_of(pool, op.c & 3, op.c >> 2 & 7, (op.c >> 5 & 1) != 0), 0};
        wanted.terms.pool = op.b % 6u + 1;
        if ((op.c >> 6 & 1) != 0 && !wanted.terms.layers.empty()) {
            wanted.terms.layers.back() = wanted.terms.layers.front();  // a layer twice
        }
        wanted.nbytes = protocol::stream_nbytes(pool.terms, wanted.terms);
        return wanted;
    }
    static protocol::GrantUse use_of(const Op& op, const protocol::Terms& terms) {
        protocol::GrantUse use;
        use.token = token_of(op.a);
        use.wait_ms = op.e & 15u;
        if ((op.d & 4) != 0) {
            use.subset.emplace();
            for (const auto& group : terms.groups) use.subset->emplace_back(group.blocks, op.f % 4u);
        }
        return use;
    }
    static std::string meta_of(const Op& op) { return (op.d & 1) != 0 ? "meta" : std::string(); }

    std::map<std::uint64_t, LocalPool> pools_;  // as last announced
    std::uint64_t last_want_ = 0, last_offer_ = 0, last_hold_ = 0;
};

}  // namespace kvt::fuzz
