// What a peer's pools, WANTs, OFFERs and locations count against the memory that it may take here.
//
// Lives here: the numbers, alike at both ends (docs/reference/wire.md): the reader holds its peer to them,
// the writer holds itself back by them. Does not live here: who counts what, and when (session.hpp).
#pragma once

#include <cstddef>

#include "protocol/frames.hpp"

namespace kvt::protocol {

inline constexpr std::size_t kRecordCharge = 512;  // of a map's entry and its strings
inline constexpr std::size_t kTermsGroupCharge = 8;
inline constexpr std::size_t kTermsLayerCharge = 16;
inline constexpr std::size_t kRangeCharge = 16;
inline constexpr std::size_t kLocationWord = 4;
inline constexpr std::size_t kLocationHead = kRecordCharge + kMaxGroups * kLocationWord;
inline constexpr std::size_t kPoolGroupCharge = 144;
inline constexpr std::size_t kPoolLayerCharge = 40;

inline std::size_t charge_of_pool(const PoolTerms& pool, std::size_t body_nbytes) noexcept {
    return kRecordCharge + body_nbytes + pool.groups.size() * kPoolGroupCharge +
           pool.layers.size() * kPoolLayerCharge;
}

/// What stands for the key in a READ or WRITE.
inline std::size_t charge_of_use(const GrantUse& use) noexcept {
    return use.token.size() + use.positions() * sizeof(std::uint32_t);
}

/// Of a WANT or OFFER; `text_nbytes` are those of its key and meta.
inline std::size_t charge_of(std::size_t text_nbytes, const Terms& terms, std::size_t ranges) noexcept {
    return kRecordCharge + text_nbytes + terms.groups.size() * kTermsGroupCharge +
           terms.layers.size() * kTermsLayerCharge + ranges * kRangeCharge;
}

/// Of what LOCATED says, beyond what our own user's transfer accounts for: a number for each of its blocks
/// and layers, and for each group that the peer's pool may have.
inline std::size_t charge_of_location(std::size_t body_nbytes, const Terms& terms) noexcept {
    std::size_t accounted = kLocationHead + terms.layers.size() * kLocationWord;
    for (const auto& group : terms.groups) {
        accounted += std::size_t{group.blocks} * kLocationWord;
    }
    return body_nbytes > accounted ? body_nbytes - accounted : 0;
}

}  // namespace kvt::protocol
