// The shape of a pool's memory: where the bytes of a block lie, as numbers.
//
// Here: groups of layers, the strided parts that make up a layer's blocks, and the contiguous segments of one
// piece (a piece is one block of one layer), for all heads or a slice of them.
// Not here: who owns the memory, what may be read (this never touches a byte), how pieces follow each other
// (plan.hpp).
// Invariant: a PoolShape that exists is sound. No address of any of its blocks overflows, no array's block
// covers a byte twice, every count fits its type. It never changes, so threads share it freely.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

namespace kvt::memory {

inline constexpr std::uint64_t kMaxSegments = 65'536;  // contiguous segments of one piece

// What a peer can be told of a pool (docs/reference/wire.md).
inline constexpr std::size_t kMaxGroups = 1024, kMaxLayers = 1024;
inline constexpr std::size_t kMaxNameNbytes = 255;  // of a group or layer, in UTF-8

// `count` items, `stride` bytes from each to the next (may be negative).
struct Axis {
    std::uint64_t count;
    std::int64_t stride;
    friend bool operator==(const Axis&, const Axis&) = default;
};

// One array of a layer: K, or V, or both packed.
struct Part {
    std::uintptr_t base;        // address of block 0's first element
    std::int64_t block_stride;  // bytes from a block to the next (may be negative)
    std::vector<Axis> axes;  // of one block, outermost first, in stream order; empty: a block is one element
    std::uint64_t itemsize;  // bytes of the innermost element
    int head_axis = -1;      // which of `axes` counts KV heads; -1: none
    friend bool operator==(const Part&, const Part&) = default;
};

struct Layer {
    std::string name;
    std::uint32_t group;      // index of its group
    std::vector<Part> parts;  // in stream order
};

// Layers that share block ids.
struct Group {
    std::string name;
    std::uint64_t num_blocks;  // ids are 0 ... num_blocks - 1
    std::uint64_t num_heads;   // 0: none
    bool opaque;
    std::string dtype, order, kv;  // what must agree between two sides; empty when opaque
    std::uint64_t tokens_per_block;
};

// Contiguous bytes of a piece: nbytes at parts[part].base + id * parts[part].block_stride + offset.
struct Segment {
    std::uint32_t part;
    std::int64_t offset;
    std::uint64_t nbytes;
    friend bool operator==(const Segment&, const Segment&) = default;
};

// All bytes of a piece in stream order, neighbours merged. starts[i] is where segments[i] begins in the
// piece's stream.
struct Pattern {
    std::vector<Segment> segments;
    std::vector<std::uint64_t> starts;
    std::uint64_t nbytes;
};

// A slice of the KV heads; `all` makes begin and count meaningless.
struct Heads {
    std::uint32_t begin, count;
    bool all;
    static constexpr Heads every() { return {0, 0, true}; }
};

// Addresses [begin, end).
struct Extent {
    std::uintptr_t begin, end;
    friend bool operator==(const Extent&, const Extent&) = default;
};

class PoolShape {
  public:
    // Throws std::invalid_argument, naming the layer or group and what is wrong with it; std::length_error
    // where the pieces of all classes of layers have more than `most_segments` together.
    PoolShape(std::vector<Group> groups, std::vector<Layer> layers, bool named,
              std::uint64_t most_segments = UINT64_MAX);

    const std::vector<Group>& groups() const { return groups_; }
    const std::vector<Layer>& layers() const { return layers_; }
    bool named() const { return named_; }

    // Layers of one class have equal patterns (their bases may differ); classes count from 0.
    std::uint32_t layer_class(std::uint32_t layer) const { return class_of_.at(layer); }

    // Cached. Throws std::invalid_argument if the layer has no such heads or the slice has more than
    // kMaxSegments.
    std::shared_ptr<const Pattern> pattern(std::uint32_t layer, Heads heads) const;
    std::uint64_t piece_nbytes(std::uint32_t layer, Heads heads) const;
    // Of whole pieces, one of each class of layers.
    std::uint64_t segments() const noexcept { return segments_; }
    // Of all patterns that are cached now.
    std::uint64_t cached_segments() const;

    // The addresses that any block of this part may touch.
    Extent extent(std::uint32_t layer, std::uint32_t part) const;
    // Throws std::invalid_argument unless that extent lies within [base, base + nbytes): the array that the
    // user registered.
    void require_within(std::uint32_t layer, std::uint32_t part, std::uintptr_t base,
                        std::uint64_t nbytes) const;

    // "layer 'model.3'": as the user knows it, whether peers pair by it or not.
    std::string describe_layer(std::uint32_t layer) const;

  private:
    using Key = std::tuple<std::uint32_t, std::uint32_t, std::uint32_t>;  // class, first head, heads
    Heads canonical(std::uint32_t layer, Heads heads) const;
    void classify();

    std::vector<Group> groups_;
    std::vector<Layer> layers_;
    bool named_;
    std::vector<std::uint32_t> class_of_;  // by layer
    std::uint64_t segments_ = 0;
    mutable std::mutex mutex_;  // the cache only
    mutable std::map<Key, std::shared_ptr<const Pattern>> cache_;
    mutable std::uint64_t cached_segments_ = 0;
};

// The segments of one part alone (their `part` is `index`, their offsets relative to that part's base),
// merged. Throws std::invalid_argument if there are more than kMaxSegments.
std::vector<Segment> part_segments(const Part& part, std::uint32_t index, Heads heads);

}  // namespace kvt::memory
