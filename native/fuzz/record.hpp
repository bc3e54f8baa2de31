// Transfers of the fuzz targets: a few pools of ours, and a record over memory with guards around every
// piece.
//
// Lives here: our side's pools, the map from stream to memory, what a target noted of a transfer. Does not
// live here: what must hold (the targets). Invariant: a piece lies between two guards that nobody stores to.
#pragma once

#include <sys/uio.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "fuzz/input.hpp"
#include "protocol/session.hpp"

namespace kvt::fuzz {

struct LocalPool {
    protocol::PoolTerms terms;
    std::vector<std::uint64_t> piece_nbytes;  // by layer
};

inline const std::vector<LocalPool>& local_pools() {
    static const std::vector<LocalPool> pools = {
        {{"kv", true, {{"full", false, "bfloat16", "HND", "packed", 16}}, {{"a", 0}, {"b", 0}, {"c", 0}}},
         {64, 64, 96}},
        {{"raw", false, {{"", true, "", "", "", 0}}, {{"0", 0}}}, {9000}},
        {{"hybrid",
          true,
          {{"full", false, "fp8", "NHD", "split", 16}, {"window", false, "fp8", "NHD", "split", 8}},
          {{"x", 0}, {"y", 1}, {"z", 0}}},
         {24, 700, 24}},
        {{"kv", true, {{"full", false, "float16", "HND", "packed", 16}}, {{"a", 0}, {"b", 0}}}, {64, 64}},
    };
    return pools;
}

inline constexpr std::size_t kGuardNbytes = 32;
inline constexpr std::byte kGuard{0xa5};

/// The terms of a transfer over some of a pool's layers; group g has `blocks` + g blocks, none at all with 0.
inline protocol::Terms terms_of(const LocalPool& pool, std::uint8_t blocks, std::uint8_t skipped,
                                bool backwards) {
    protocol::Terms terms;
    for (std::uint16_t g = 0; g < pool.terms.groups.size(); ++g) {
        terms.groups.push_back({g, blocks == 0 ? 0 : static_cast<std::uint32_t>(blocks + g)});
    }
    for (std::uint16_t i = 0; i < pool.terms.layers.size(); ++i) {
        if ((skipped >> i & 1) == 0) terms.layers.push_back({i, pool.piece_nbytes[i]});
    }
    if (backwards) std::reverse(terms.layers.begin(), terms.layers.end());
    return terms;
}

class Record final : public protocol::Transfer {
  public:
    std::optional<protocol::Bytes> locate() override { return protocol::Bytes(7); }
    Record(protocol::Role its_role, std::string its_key, const LocalPool& from, protocol::Terms its_terms) {
        role = its_role;
        key = std::move(its_key);
        pool = &from.terms;
        terms = std::move(its_terms);
        std::uint64_t at = 0, where = kGuardNbytes;
        for (const auto& layer : terms.layers) {
            const std::uint64_t blocks = terms.groups[from.terms.layers[layer.index].group].blocks;
            rows_.push_back({at, layer.piece_nbytes, blocks, where});
            spans.push_back({{at, at + blocks * layer.piece_nbytes}, layer.index});
            at += blocks * layer.piece_nbytes;
            where += blocks * (layer.piece_nbytes + kGuardNbytes);
        }
        nbytes = at;
        memory_.assign(where, kGuard);
    }

    std::uint64_t runs(std::uint64_t begin, std::uint64_t end, iovec* out, std::size_t most,
                       std::size_t& count) const override {
        demand(begin <= end && end <= nbytes, "runs() is asked for bytes that the transfer doesn't have");
        count = 0;
        while (begin < end && count < most) {
            const iovec run = run_at(begin, end);
            out[count++] = run;
            begin += run.iov_len;
        }
        return begin;
    }
    void reorder(const std::vector<std::uint32_t>& positions) override {
        std::vector<std::uint32_t> sorted = positions;
        std::sort(sorted.begin(), sorted.end());
        demand(sorted.size() == rows_.size(), "reorder() names fewer or more layers");
        for (std::uint32_t i = 0; i < sorted.size(); ++i)
            demand(sorted[i] == i, "reorder() is no permutation");
        std::vector<Row> rows;
        std::uint64_t at = 0;
        for (const std::uint32_t position : positions) {
            rows.push_back(rows_[position]);
            rows.back().begin = at;
            at += rows.back().nbytes();
        }
        rows_ = std::move(rows);
    }

    /// Where in the stream a byte of the memory is; nbytes for guards and foreign addresses.
    std::uint64_t offset_of(const std::byte* address) const noexcept {
        if (address < memory_.data() || address >= memory_.data() + memory_.size()) return nbytes;
        const auto place = static_cast<std::uint64_t>(address - memory_.data());
        for (const Row& row : rows_) {
            if (place < row.place || place >= row.place + row.blocks * (row.piece + kGuardNbytes)) continue;
            const std::uint64_t within = (place - row.place) % (row.piece + kGuardNbytes);
            const std::uint64_t block = (place - row.place) / (row.piece + kGuardNbytes);
            return within < row.piece ? row.begin + block * row.piece + within : nbytes;
        }
        return nbytes;
    }
    const std::vector<std::byte>& memory() const noexcept { return memory_; }

    // What the target saw.
    protocol::RangeSet handed;  // source: in chunks that were begun
    protocol::RangeSet stored;  // destination: a chunk was let in
    protocol::RangeSet sealed;  // destination: a chunk ended well
    bool quiet = false;         // the engine has said quiesced
    bool asked_again = false;   // destination: `stored` has let go of what broke
    unsigned outcomes = 0;

  private:
    struct Row {
        std::uint64_t begin, piece, blocks, place;
        std::uint64_t nbytes() const noexcept { return piece * blocks; }
    };
    iovec run_at(std::uint64_t begin, std::uint64_t end) const noexcept {
        for (const Row& row : rows_) {
            if (begin < row.begin || begin >= row.begin + row.nbytes()) continue;
            const std::uint64_t block = (begin - row.begin) / row.piece,
                                within = (begin - row.begin) % row.piece;
            std::byte* to = const_cast<std::byte*>(memory_.data()) + row.place +
                            block * (row.piece + kGuardNbytes) + within;
            return {to, static_cast<std::size_t>(std::min(row.piece - within, end - begin))};
        }
        broken("an offset lies in no layer");
    }

    std::vector<Row> rows_;
    std::vector<std::byte> memory_;
};

}  // namespace kvt::fuzz
