// What the two ends of shared memory tell each other of a pool and of a transfer: where its bytes lie.
//
// Lives here: the two bodies, and from them a plan over the peer's memory. Does not live here: how they
// travel (shm_link.hpp), the copying. Invariant: a plan over mapped memory reads nothing beyond the segments
// that it was checked against, whatever the peer wrote; what doesn't check is a protocol::Violation.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backends/path.hpp"
#include "backends/pool_terms.hpp"
#include "backends/shm_board.hpp"
#include "backends/shm_channel.hpp"
#include "memory/plan.hpp"

namespace kvt::backends {

/// Contiguous segments of the pieces of a pool, one piece of each class of layers: a peer's reactor lists
/// them all when it reads of the pool, the most in 10 ms. What is scattered further isn't told.
inline constexpr std::uint64_t kMostShmSegments = 4 * memory::kMaxSegments;

/// A pool's memory for a peer: in segments, or, where some part lies in none, by addresses of this process.
protocol::Bytes encode_shm_pool(const memory::PoolShape& shape,
                                const std::vector<memory::SharedSegment>& segments);

/// A peer's pool, as this process reads it.
struct ShmPool {
    std::shared_ptr<const memory::PoolShape> shape;
    std::shared_ptr<const protocol::PoolTerms> terms;
    bool mapped = false;  // else its addresses are the peer's, for process_vm_readv
    std::vector<std::shared_ptr<const PeerSegment>> segments;  // that the addresses lie in
    std::uint64_t kept_nbytes = 0;  // about as much memory as its description takes here
};
ShmPool decode_shm_pool(std::span<const std::byte> raw, const PeerSegments& segments);

struct ShmLocation {
    std::uint64_t pool = 0;
    Guard guard{};
};
protocol::Bytes encode_shm_location(const ShmLocation& location, const memory::StreamPlan& plan);
/// Of the pool, which the caller looks up by `location.pool`, once the head was read.
ShmLocation decode_shm_location(protocol::Reader& in);
std::shared_ptr<const memory::StreamPlan> decode_shm_plan(protocol::Reader& in, const ShmPool& pool,
                                                          std::uint64_t nbytes);

}  // namespace kvt::backends
