// The byte stream of one transfer, mapped to memory.
//
// Here: the order of the stream (layers as listed, then ids by position, then the segments of a piece), its
// cutting into runs, and which blocks a range of it belongs to.
// Not here: where a block lies (shape.hpp), who else writes there (busy.hpp), moving bytes (backends).
// Invariant: a plan that exists names only blocks that its pool has; it never changes and threads share it
// freely. It keeps nothing per piece: a run's address is computed when it is asked for.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "memory/gather.hpp"
#include "memory/shape.hpp"

namespace kvt::memory {

using Ids = std::vector<std::uint32_t>;

inline constexpr std::uint64_t kMaxPieces = std::uint64_t{1} << 31;  // of one transfer

// Offsets [begin, end) of a stream.
struct StreamRange {
    std::uint64_t begin, end;
    friend bool operator==(const StreamRange&, const StreamRange&) = default;
};

// Block ids of one group, each once, in the order of their first position.
struct GroupBlocks {
    std::string group;
    Ids ids;
};

// What became of each block of one group: sealed when all pieces of it, in all layers of the transfer, are
// verified.
struct BlockOutcome {
    std::string group;
    std::vector<std::uint32_t> sealed, poisoned;
};

class StreamPlan {
  public:
    // ids_by_group has an entry for each group of the pool; null or empty: no blocks of it. Throws
    // std::out_of_range (an id or a layer that the pool lacks), std::length_error (more than kMaxPieces, or
    // bytes that don't fit 63 bits), std::invalid_argument (heads that a layer lacks, or a wrong number of id
    // lists).
    StreamPlan(std::shared_ptr<const PoolShape> shape, std::vector<std::uint32_t> layers,
               std::vector<std::shared_ptr<const Ids>> ids_by_group, Heads heads);
    StreamPlan(const StreamPlan&) = default;
    StreamPlan(StreamPlan&&) = default;
    StreamPlan& operator=(const StreamPlan&) = default;
    StreamPlan& operator=(StreamPlan&&) = default;

    std::uint64_t nbytes() const { return nbytes_; }
    std::uint64_t pieces() const { return pieces_; }
    // Positions, summed over the groups that have a layer here.
    std::uint64_t blocks() const { return blocks_; }
    std::size_t layer_count() const { return rows_.size(); }
    std::uint32_t layer(std::size_t i) const { return rows_[i].layer; }
    std::uint64_t layer_begin(std::size_t i) const { return rows_[i].begin; }
    std::uint64_t layer_end(std::size_t i) const {
        return rows_[i].begin + rows_[i].piece_nbytes * rows_[i].positions;
    }
    // The index i of the layer that holds this offset; layer_count() past the end.
    std::size_t layer_at(std::uint64_t offset) const;

    std::uint64_t piece_nbytes(std::size_t i) const { return rows_[i].piece_nbytes; }
    std::uint64_t positions(std::size_t i) const { return rows_[i].positions; }  // pieces of layer i
    std::uint32_t block_id(std::size_t i, std::uint64_t position) const { return rows_[i].ids[position]; }
    StreamRange piece(std::size_t i, std::uint64_t position) const;

    const std::shared_ptr<const PoolShape>& shape() const { return shape_; }
    Heads heads() const { return heads_; }
    const Ids& ids(std::uint32_t group) const;  // empty if none

    // Fills out[0 ... max) with the memory of the stream from `begin`, adjacent runs merged; stops at `end`
    // (or the stream's end) or when another run would not fit. Returns the offset reached; `count` says how
    // many runs were written. Random access.
    std::uint64_t runs(std::uint64_t begin, std::uint64_t end, iovec* out, std::size_t max,
                       std::size_t& count) const;

    // The same ids and heads, other layers or another order of them.
    StreamPlan reordered(const std::vector<std::uint32_t>& layers) const;

    // The blocks that have a byte in any of the ranges, by group, each id once; groups without one are left
    // out. Goes through the ids once, however many ranges there are.
    std::vector<GroupBlocks> blocks_touching(const std::vector<StreamRange>& ranges) const;

    // What the verified ranges (sorted, none overlapping another; they may touch) make of every block, by
    // group.
    std::vector<BlockOutcome> outcome(const std::vector<StreamRange>& verified) const;

  private:
    struct Row {  // one layer of the stream
        std::uint64_t begin;
        std::uint64_t piece_nbytes;
        std::uint64_t positions;
        const std::uint32_t* ids;
        const Pattern* pattern;
        const Part* parts;
        std::uint32_t layer;
    };
    class Writer;
    class Marks;

    void check_ids() const;
    void lay_out(const std::vector<std::uint32_t>& layers);
    void count_up(const Row& row);
    static std::uint64_t walk_one(const Row& row, std::uint64_t at, std::uint64_t stop, Writer& writer);
    static std::uint64_t walk_many(const Row& row, std::uint64_t at, std::uint64_t stop, Writer& writer);

    std::shared_ptr<const PoolShape> shape_;
    std::vector<std::shared_ptr<const Ids>> ids_by_group_;
    Heads heads_;
    std::vector<std::shared_ptr<const Pattern>> patterns_;  // keeps alive what rows_ point to
    std::vector<Row> rows_;
    std::uint64_t nbytes_ = 0, pieces_ = 0, blocks_ = 0;
};

// Contiguous runs of memory that the whole stream is; walks them all.
std::uint64_t count_runs(const StreamPlan& plan);

}  // namespace kvt::memory
