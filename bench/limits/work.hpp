// The work W that every participant of the bench moves: which bytes of the source arena go to which bytes of
// the destination arena. What lives here: pure arithmetic on offsets. What doesn't: memory, sockets, clocks.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace kvt_limits {

// One contiguous copy from source to destination: the unit that a bare implementation can't avoid.
struct Piece {
    uint64_t src;
    uint64_t dst;
    uint64_t len;
};

// Contiguous bytes at one end.
struct Run {
    uint64_t off;
    uint64_t len;
};

struct Work {
    std::vector<Piece> pieces;  // in stream order, merged where contiguous at both ends
    uint64_t nbytes = 0;
    uint64_t dst_extent = 0;  // one past the last destination byte
};

// What a case looks like: `layers` x `blocks` blocks of `block_nbytes` on each side, `ids` of them moved.
struct Shape {
    uint64_t layers = 0;
    uint64_t blocks = 0;
    uint64_t block_nbytes = 0;
    uint64_t ids = 0;
    uint64_t id_step = 1;  // 2: only even ids, so that no two pieces are adjacent
    uint64_t row_nbytes =
        0;  // 0: whole blocks; else rows of this many bytes (NHD: one token), of which half is moved
    bool compact_dst = false;  // the destination holds the half rows only (tensor parallelism 1 -> 2)
};

inline constexpr uint64_t kArenaBytes = 61ULL * 256 * 73728;  // the largest case but n: (e)
inline constexpr uint64_t kPageRun = 4096;

// Case names: a b c d e f fs n:COUNT. Throws std::invalid_argument for another name.
Shape shape_of(const std::string& name);

// Random source ids to random destination ids; equal for equal (name, seed) in every process.
Work make_work(const std::string& name, uint64_t seed);

// The i-th of n contiguous parts of a work, split by bytes at piece borders.
std::vector<Piece> part_of(const Work& work, unsigned index, unsigned count);

// Each end merges what is contiguous there, as a bare implementation would before it builds its iovecs.
std::vector<Run> src_runs(const std::vector<Piece>& pieces);
std::vector<Run> dst_runs(const std::vector<Piece>& pieces);

}  // namespace kvt_limits
