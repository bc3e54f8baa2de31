// A simulated transfer: where its pieces lie, and what the checker notes of it, in words of its own.
//
// Invariant: what the checker uses (content, identity, times, the outcome as its user saw it) is written by
// the simulator only, never read from the protocol's bookkeeping.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "memory.hpp"
#include "protocol/session.hpp"

namespace kvt::sim {

using protocol::Time;
inline constexpr Time kUs = 1000, kMs = 1'000'000, kSecond = 1'000'000'000;

struct Row {
    std::uint32_t layer = 0;
    std::vector<std::uint32_t> blocks;  // by position
};

/// What the checker knows of one side of a transfer.
struct History {
    std::uint64_t uid = 0;
    unsigned machine = 0;
    protocol::Role role{};
    std::string key, meta;
    std::vector<Row> rows;  // as posted
    std::map<std::pair<std::uint32_t, std::size_t>, std::vector<std::byte>>
        content;               // source: by layer and position
    bool mismatching = false;  // posted with terms that don't fit its key's
    bool gated = false;
    protocol::Limits limits;
    Time posted_at = 0, over_at = -1;
    unsigned outcomes = 0;
    protocol::Outcome outcome;
    std::string peer_meta;
    bool asked_to_stop = false;
    Time moved_at = -1;
    bool empty = false;
    bool shown = false;                // source: no transfer, but what a read that asks nobody has found
    bool taken = false;                // destination: it asked nobody
    bool counted = false;              // and the grant counts its readers
    bool leased = false;               // under a lease of its reader
    const History* partner = nullptr;  // destination that asks nobody: what it has found
};

class Record final : public protocol::Transfer, public std::enable_shared_from_this<Record> {
  public:
    Record(Memory& memory, std::vector<Row> rows) : memory_(memory), rows_(std::move(rows)) {}

    std::uint64_t runs(std::uint64_t begin, std::uint64_t end, iovec* out, std::size_t most,
                       std::size_t& count) const override {
        count = 0;
        std::uint64_t at = 0;
        for (const Row& row : rows_) {
            const std::size_t piece = memory_.piece_nbytes(row.layer);
            const std::uint64_t size = piece * row.blocks.size();
            for (std::size_t i = begin >= at + size ? row.blocks.size()
                                 : begin > at       ? (begin - at) / piece
                                                    : 0;
                 i < row.blocks.size(); ++i) {
                const std::uint64_t piece_at = at + i * piece;
                if (begin >= end || piece_at >= end || count == most) {
                    return begin;
                }
                const std::uint64_t to = std::min<std::uint64_t>(end, piece_at + piece);
                out[count++] = {memory_.piece(row.layer, row.blocks[i]) + (begin - piece_at),
                                static_cast<std::size_t>(to - begin)};
                begin = to;
            }
            at += size;
        }
        return begin;
    }
    void reorder(const std::vector<std::uint32_t>& positions) override {
        std::vector<Row> rows;
        for (const std::uint32_t position : positions) {
            rows.push_back(rows_[position]);
        }
        rows_ = std::move(rows);
    }

    std::optional<protocol::Bytes> locate() override { return protocol::Bytes(); }

    std::shared_ptr<History> history;
    std::shared_ptr<protocol::Gate> open_gate;

  private:
    Memory& memory_;
    std::vector<Row> rows_;
};
using RecordPtr = std::shared_ptr<Record>;

}  // namespace kvt::sim
