#include "work.hpp"

#include <algorithm>
#include <numeric>
#include <random>
#include <stdexcept>

namespace kvt_limits {
namespace {

constexpr uint64_t kKiB = 1024;
constexpr uint64_t kArenaPages = 262144;  // 1 GiB of 4 KiB pages: the source of case n

std::vector<uint64_t> random_ids(uint64_t universe, uint64_t count, uint64_t step, std::mt19937_64& rng) {
    std::vector<uint64_t> ids(universe / step);
    std::iota(ids.begin(), ids.end(), 0);
    // A partial Fisher-Yates shuffle: only the ids that are used need be drawn.
    for (uint64_t i = 0; i < count; ++i) {
        std::swap(ids[i], ids[i + rng() % (ids.size() - i)]);
    }
    ids.resize(count);
    for (auto& id : ids) id *= step;
    return ids;
}

void add_piece(Work& work, Piece piece) {
    work.nbytes += piece.len;
    work.dst_extent = std::max(work.dst_extent, piece.dst + piece.len);
    if (!work.pieces.empty()) {
        Piece& last = work.pieces.back();
        if (last.src + last.len == piece.src && last.dst + last.len == piece.dst) {
            last.len += piece.len;
            return;
        }
    }
    work.pieces.push_back(piece);
}

void add_block(Work& work, const Shape& s, uint64_t src_block, uint64_t dst_block) {
    if (s.row_nbytes == 0) {
        add_piece(work, {src_block * s.block_nbytes, dst_block * s.block_nbytes, s.block_nbytes});
        return;
    }
    const uint64_t half = s.row_nbytes / 2;
    const uint64_t dst_row = s.compact_dst ? half : s.row_nbytes;
    const uint64_t rows = s.block_nbytes / s.row_nbytes;
    for (uint64_t row = 0; row < rows; ++row) {
        const uint64_t src = src_block * s.block_nbytes + row * s.row_nbytes;
        add_piece(work, {src, (dst_block * rows + row) * dst_row, half});
    }
}

Work make_pages(uint64_t count, std::mt19937_64& rng) {
    // Source ids repeat above 1 GiB; destination ids can't, so the destination is as large as the work.
    const uint64_t universe = std::max(count, uint64_t{2});
    std::vector<uint64_t> dst = random_ids(universe, count, 1, rng);
    Work work;
    uint64_t last = kArenaPages;
    for (uint64_t i = 0; i < count; ++i) {
        uint64_t src = rng() % kArenaPages;
        if (src == last + 1) src = (src + 7) % kArenaPages;  // never adjacent
        last = src;
        add_piece(work, {src * kPageRun, dst[i] * kPageRun, kPageRun});
    }
    return work;
}

std::vector<Run> merge(const std::vector<Piece>& pieces, uint64_t Piece::* offset) {
    std::vector<Run> runs;
    runs.reserve(pieces.size());
    for (const Piece& piece : pieces) {
        const uint64_t off = piece.*offset;
        if (!runs.empty() && runs.back().off + runs.back().len == off) {
            runs.back().len += piece.len;
        } else {
            runs.push_back({off, piece.len});
        }
    }
    return runs;
}

}  // namespace

Shape shape_of(const std::string& name) {
    if (name == "a") return {.layers = 32, .blocks = 512, .block_nbytes = 64 * kKiB, .ids = 256};
    if (name == "b") return {.layers = 32, .blocks = 512, .block_nbytes = 64 * kKiB, .ids = 1};
    if (name == "c") return {.layers = 1, .blocks = kArenaPages, .block_nbytes = kPageRun, .ids = 1};
    if (name == "d")
        return {.layers = 32, .blocks = 8192, .block_nbytes = kPageRun, .ids = 1024, .id_step = 2};
    if (name == "e") return {.layers = 61, .blocks = 256, .block_nbytes = 73728, .ids = 64};
    // K and V apart: 64 tensors of 512 blocks of 16 tokens x 8 heads x 128 x 2 bytes; half the heads are
    // moved.
    Shape f{.layers = 64, .blocks = 512, .block_nbytes = 32 * kKiB, .ids = 256, .row_nbytes = 2 * kKiB};
    f.compact_dst = name == "f";
    if (name == "f" || name == "fs") return f;
    throw std::invalid_argument("unknown case: " + name);
}

Work make_work(const std::string& name, uint64_t seed) {
    std::mt19937_64 rng(seed);
    if (name.rfind("n:", 0) == 0) return make_pages(std::stoull(name.substr(2)), rng);
    const Shape s = shape_of(name);
    const auto src = random_ids(s.blocks, s.ids, s.id_step, rng);
    const auto dst = random_ids(s.blocks, s.ids, s.id_step, rng);
    Work work;
    for (uint64_t layer = 0; layer < s.layers; ++layer) {
        for (uint64_t i = 0; i < s.ids; ++i) {
            add_block(work, s, layer * s.blocks + src[i], layer * s.blocks + dst[i]);
        }
    }
    return work;
}

std::vector<Piece> part_of(const Work& work, unsigned index, unsigned count) {
    std::vector<Piece> part;
    uint64_t done = 0;
    for (const Piece& piece : work.pieces) {
        const uint64_t owner = std::min<uint64_t>(done * count / work.nbytes, count - 1);
        if (owner == index) part.push_back(piece);
        done += piece.len;
    }
    return part;
}

std::vector<Run> src_runs(const std::vector<Piece>& pieces) { return merge(pieces, &Piece::src); }

std::vector<Run> dst_runs(const std::vector<Piece>& pieces) { return merge(pieces, &Piece::dst); }

}  // namespace kvt_limits
