// Which registered memory may share bytes with which.
//
// Here: sorting the groups of all registered pools into arenas, by arithmetic on their strides alone.
// Not here: transfers (busy.hpp).
// Invariant: two groups in different arenas share no byte. In a regular arena, a block `a` of one part and a
// block `b` of another (or the same) share a byte only if both parts are the same column and a == b.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "memory/shape.hpp"

namespace kvt::memory {

struct Arena {
    bool regular;
    std::uint64_t num_blocks;  // the largest of its groups
    std::uint32_t columns;     // distinct strided memories; numbered from 0 within the arena
};

class ArenaMap {
  public:
    struct Place {  // of one pool
        std::vector<std::uint32_t> arena_of_group;
        std::vector<std::vector<std::uint32_t>> columns_of_layer;  // one for each part
    };

    explicit ArenaMap(const std::vector<const PoolShape*>& pools);

    const std::vector<Arena>& arenas() const { return arenas_; }
    const Place* find(const PoolShape* pool) const;  // null if it isn't here
    void forget(const PoolShape* pool) noexcept { places_.erase(pool); }

  private:
    std::vector<Arena> arenas_;
    std::map<const PoolShape*, Place> places_;
};

}  // namespace kvt::memory
