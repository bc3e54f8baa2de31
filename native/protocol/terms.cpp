#include "protocol/terms.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <unordered_map>

namespace kvt::protocol {

namespace {

// Groups ascend in checked terms: a peer's thousand groups times its thousand layers would cost us half a
// millisecond a frame.
const Terms::Group* group_in(const Terms& terms, std::uint16_t index) noexcept {
    const auto found = std::lower_bound(terms.groups.begin(), terms.groups.end(), index,
                                        [](const Terms::Group& g, std::uint16_t i) { return g.index < i; });
    return found == terms.groups.end() || found->index != index ? nullptr : &*found;
}

std::uint32_t blocks_of(const PoolTerms& pool, const Terms& terms, const Terms::Layer& layer) noexcept {
    const Terms::Group* group = group_in(terms, pool.layers[layer.index].group);
    return group == nullptr ? 0 : group->blocks;
}

Mismatch oriented(std::string path, std::string source, std::string destination, bool ours_is_source) {
    if (ours_is_source) {
        return {std::move(path), std::move(source), std::move(destination)};
    }
    return {std::move(path), std::move(destination), std::move(source)};
}

/// For each layer of the destination's stream, the position of its partner in the source's; empty when a name
/// is missing, with the name in `missing`.
std::vector<std::uint32_t> pair_layers(const Side& source, const Side& destination, std::string& missing) {
    const std::size_t n = destination.terms->layers.size();
    std::vector<std::uint32_t> order(n);
    if (!source.pool->named || !destination.pool->named) {
        for (std::size_t i = 0; i < n; ++i) {
            order[i] = static_cast<std::uint32_t>(i);
        }
        return order;
    }
    std::unordered_map<std::string_view, std::uint32_t> by_name;
    for (std::size_t i = 0; i < source.terms->layers.size(); ++i) {
        by_name.emplace(source.pool->layers[source.terms->layers[i].index].name,
                        static_cast<std::uint32_t>(i));
    }
    for (std::size_t i = 0; i < n; ++i) {
        const std::string& name = destination.pool->layers[destination.terms->layers[i].index].name;
        const auto found = by_name.find(name);
        if (found == by_name.end()) {
            missing = name;
            return {};
        }
        order[i] = found->second;
    }
    return order;
}

struct Difference {
    std::string path, source, destination;
};

/// What of two groups must agree and doesn't; an empty path when they do.
Difference compare_groups(const GroupTerms& source, const GroupTerms& destination, bool by_name) {
    if (by_name && source.name != destination.name) {
        return {"groups", source.name, destination.name};
    }
    if (source.opaque || destination.opaque) {
        return {};  // an opaque pool pairs with any pool of equal piece bytes
    }
    if (source.dtype != destination.dtype) {
        return {"dtype", source.dtype, destination.dtype};
    }
    if (source.order != destination.order) {
        return {"order", source.order, destination.order};
    }
    if (source.kv != destination.kv) {
        return {"kv", source.kv, destination.kv};
    }
    if (source.tokens_per_block != destination.tokens_per_block) {
        return {"tokens_per_block", std::to_string(source.tokens_per_block),
                std::to_string(destination.tokens_per_block)};
    }
    return {};
}

Difference compare_layer(const Side& source, const Terms::Layer& theirs, const Side& destination,
                         const Terms::Layer& mine) {
    const bool by_name = source.pool->groups.size() > 1 && destination.pool->groups.size() > 1;
    Difference found = compare_groups(source.pool->groups[source.pool->layers[theirs.index].group],
                                      destination.pool->groups[destination.pool->layers[mine.index].group],
                                      by_name);
    if (!found.path.empty()) {
        return found;
    }
    const std::uint32_t have = blocks_of(*source.pool, *source.terms, theirs);
    const std::uint32_t want = blocks_of(*destination.pool, *destination.terms, mine);
    if (have != want) {
        return {"blocks", std::to_string(have), std::to_string(want)};
    }
    if (theirs.piece_nbytes != mine.piece_nbytes) {
        return {"piece_nbytes", std::to_string(theirs.piece_nbytes), std::to_string(mine.piece_nbytes)};
    }
    return {};
}

}  // namespace

std::string check_terms(const PoolTerms& pool, const Terms& terms) {
    for (std::size_t i = 0; i < terms.groups.size(); ++i) {
        const bool ascends = i == 0 || terms.groups[i - 1].index < terms.groups[i].index;
        if (terms.groups[i].index >= pool.groups.size() || !ascends) {
            return "a transfer's terms name a group twice, out of order, or one that isn't there";
        }
    }
    constexpr std::uint64_t kMost = std::uint64_t{1} << 62;
    std::uint64_t total = 0;
    std::vector<bool> seen(pool.layers.size());  // twice would make the pairing by name no permutation
    for (const auto& layer : terms.layers) {
        if (layer.index >= pool.layers.size() || seen[layer.index]) {
            return "a transfer's terms name a layer twice or one that isn't there";
        }
        seen[layer.index] = true;
        const std::uint64_t blocks = blocks_of(pool, terms, layer);
        if (blocks != 0 && layer.piece_nbytes > (kMost - total) / blocks) {
            return "a transfer's bytes exceed 2^62";
        }
        total += blocks * layer.piece_nbytes;
    }
    return {};
}

std::uint64_t stream_nbytes(const PoolTerms& pool, const Terms& terms) {
    std::uint64_t total = 0;
    for (const auto& layer : terms.layers) {
        total += layer.piece_nbytes * blocks_of(pool, terms, layer);
    }
    return total;
}

Fit fit(const Side& source, const Side& destination, bool ours_is_source) {
    Fit result;
    const auto refuse = [&](std::string path, std::string have, std::string want) {
        result.mismatch = oriented(std::move(path), std::move(have), std::move(want), ours_is_source);
        result.order.clear();
        return result;
    };
    const std::size_t layers = destination.terms->layers.size();
    if (source.terms->layers.size() != layers) {
        return refuse("layers", std::to_string(source.terms->layers.size()) + " layers",
                      std::to_string(layers) + " layers");
    }
    std::string missing;
    result.order = pair_layers(source, destination, missing);
    if (!missing.empty()) {
        return refuse("layers", "no layer '" + missing + "'", "'" + missing + "'");
    }
    for (std::size_t i = 0; i < layers; ++i) {
        result.in_order = result.in_order && result.order[i] == i;
        Difference found = compare_layer(source, source.terms->layers[result.order[i]], destination,
                                         destination.terms->layers[i]);
        if (!found.path.empty()) {
            return refuse(std::move(found.path), std::move(found.source), std::move(found.destination));
        }
    }
    return result;
}

}  // namespace kvt::protocol
