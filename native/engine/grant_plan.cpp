#include "engine/grant_plan.hpp"

#include <algorithm>
#include <numeric>
#include <string>
#include <utility>

namespace kvt::engine {

using protocol::GrantUse;
using protocol::PoolTerms;
using protocol::Terms;

namespace {

using IdsPtr = std::shared_ptr<const memory::Ids>;

IdsPtr whole(const GrantedBlocks& granted, std::size_t group) {
    if (granted.ids != nullptr) {
        return {granted.keep, &(*granted.ids)[group]};  // not a copy for each of many
    }
    auto every = std::make_shared<memory::Ids>(granted.shape.groups()[group].num_blocks);
    std::iota(every->begin(), every->end(), 0u);
    return every;
}

IdsPtr some(const GrantedBlocks& granted, std::size_t group, const memory::Ids& positions) {
    const memory::Ids* const ids = granted.ids == nullptr ? nullptr : &(*granted.ids)[group];
    const std::uint64_t count = ids ? ids->size() : granted.shape.groups()[group].num_blocks;
    auto chosen = std::make_shared<memory::Ids>();
    chosen->reserve(positions.size());
    for (const std::uint32_t position : positions) {
        if (position >= count) {
            throw NotGranted();
        }
        chosen->push_back(ids ? (*ids)[position] : position);
    }
    return chosen;
}

}  // namespace

IdsPtr ids_of(const GrantedBlocks& granted, std::size_t group, const memory::Ids* positions) {
    return positions ? some(granted, group, *positions) : whole(granted, group);
}

Terms terms_of(const memory::StreamPlan& plan) {
    Terms terms;
    const std::size_t groups = plan.shape()->groups().size();
    for (std::uint32_t i = 0; i < groups; ++i) {
        terms.groups.push_back(
            {static_cast<std::uint16_t>(i), static_cast<std::uint32_t>(plan.ids(i).size())});
    }
    for (std::size_t i = 0; i < plan.layer_count(); ++i) {
        terms.layers.push_back({static_cast<std::uint16_t>(plan.layer(i)), plan.piece_nbytes(i)});
    }
    return terms;
}

std::optional<std::vector<std::uint32_t>> layers_for(const Terms& terms, const PoolTerms& theirs,
                                                     const PoolTerms& owners, protocol::Mismatch& mismatch) {
    std::vector<std::uint32_t> layers;
    layers.reserve(terms.layers.size());
    for (const auto& layer : terms.layers) {
        std::size_t place = layer.index;
        const std::string& name = theirs.layers[layer.index].name;
        // The same layers in the same order are the rule: then each stands where it is looked for first.
        const bool at_once = place < owners.layers.size() && owners.layers[place].name == name;
        if (theirs.named && owners.named && !at_once) {
            place = static_cast<std::size_t>(std::find_if(owners.layers.begin(), owners.layers.end(),
                                                          [&](const auto& one) { return one.name == name; }) -
                                             owners.layers.begin());
        }
        if (place >= owners.layers.size()) {
            mismatch = {"layers", std::to_string(owners.layers.size()) + " layers", "'" + name + "'"};
            return std::nullopt;
        }
        layers.push_back(static_cast<std::uint32_t>(place));
    }
    return layers;
}

std::vector<IdsPtr> ids_for(const GrantedBlocks& granted, const GrantUse& use, const Terms& terms,
                            const PoolTerms& theirs, const PoolTerms& owners,
                            const std::vector<std::uint32_t>& layers) {
    std::vector<IdsPtr> ids(owners.groups.size());
    for (std::size_t i = 0; i < layers.size(); ++i) {
        const std::size_t owners_group = owners.layers[layers[i]].group;
        const std::uint16_t group = theirs.layers[terms.layers[i].index].group;
        const auto place = std::find_if(terms.groups.begin(), terms.groups.end(),
                                        [&](const auto& known) { return known.index == group; });
        if (ids[owners_group] != nullptr || place == terms.groups.end()) {
            continue;
        }
        ids[owners_group] = use.subset
                                ? some(granted, owners_group,
                                       (*use.subset)[static_cast<std::size_t>(place - terms.groups.begin())])
                                : whole(granted, owners_group);
    }
    return ids;
}

}  // namespace kvt::engine
