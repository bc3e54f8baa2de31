// What two pools and two transfers say of their shape, and whether they fit.
//
// Lives here: the described values and their comparison. Does not live here: addresses, strides, block ids
// (memory). Invariant: fits() is pure and symmetric in what it refuses; both sides of a transfer reach the
// same verdict.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace kvt::protocol {

struct GroupTerms {
    std::string name;
    bool opaque = false;
    std::string dtype;
    std::string order;
    std::string kv;
    std::uint32_t tokens_per_block = 0;
};

struct LayerTerms {
    std::string name;
    std::uint16_t group = 0;
};

/// A pool as announced by POOL: everything that a peer may know of it.
struct PoolTerms {
    std::string name;
    bool named = false;  // its layers have names that the user gave
    std::vector<GroupTerms> groups;
    std::vector<LayerTerms> layers;
};

/// One transfer's use of a pool.
struct Terms {
    struct Group {
        std::uint16_t index = 0;
        std::uint32_t blocks = 0;
    };
    struct Layer {
        std::uint16_t index = 0;
        std::uint64_t piece_nbytes = 0;
    };
    std::uint64_t pool = 0;
    std::vector<Group> groups;  // those in use, ascending
    std::vector<Layer> layers;  // in stream order
};

struct Mismatch {
    std::string path;
    std::string ours;
    std::string theirs;
};

/// The two sides of a comparison; `ours` is the side that compares.
struct Side {
    const PoolTerms* pool = nullptr;
    const Terms* terms = nullptr;
};

/// Bytes of the stream that the terms describe. They must have passed check_terms(): their sum then can't
/// wrap.
std::uint64_t stream_nbytes(const PoolTerms& pool, const Terms& terms);
/// Checks indexes and counts against the pool; returns an empty string or what is wrong.
std::string check_terms(const PoolTerms& pool, const Terms& terms);

/// Compares source and destination. On success `order` holds, for each layer of the destination's stream, the
/// position of its partner in the source's `terms.layers`.
struct Fit {
    std::optional<Mismatch> mismatch;
    std::vector<std::uint32_t> order;
    bool in_order = true;  // order is 0, 1, 2...
};
Fit fit(const Side& source, const Side& destination, bool ours_is_source);

}  // namespace kvt::protocol
