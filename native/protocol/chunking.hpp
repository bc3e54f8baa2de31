// How large a chunk is: formulas, each with the measurement behind it. Never a probe at start.
#pragma once

#include <algorithm>
#include <cstdint>

#include "protocol/frames.hpp"

namespace kvt::protocol {

/// Transfers up to this size share the lanes before longer ones: one block of a large model (2 to 5 MiB)
/// counts as short.
inline constexpr std::uint64_t kShortNbytes = 8u << 20;
/// After so many chunks of short transfers in a row a long one gets a turn, so that short ones can't starve
/// it.
inline constexpr unsigned kShortInARow = 8;

/// 1 MiB chunks carry 512 MiB at 16.5 GB/s on two lanes, smaller ones lose to per-chunk work; a 2 MiB block
/// in 256 KiB chunks took 184 us at the median against 293 us as one piece, because both lanes and both ends
/// work at once. The same with digests: half of it cost 5 %.
inline std::uint64_t chunk_nbytes_for(std::uint64_t transfer_nbytes, std::uint64_t configured) noexcept {
    if (configured != 0) {
        return std::min<std::uint64_t>(configured, kMaxChunkNbytes);
    }
    return transfer_nbytes <= (4u << 20) ? 256u << 10 : 1u << 20;
}

}  // namespace kvt::protocol
