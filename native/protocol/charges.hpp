// What a peer's pools, WANTs and OFFERs count against the memory that it may take here.
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

}  // namespace kvt::protocol
