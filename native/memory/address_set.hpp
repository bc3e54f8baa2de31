// Claims in an irregular arena: by address.
//
// Here: the bytes of some layers of a plan as a sorted list of extents, and the questions whether two lists
// meet and to which block an address belongs. Not here: arenas and owners (busy.hpp).
// Invariant: extents are sorted, don't overlap and don't touch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "memory/plan.hpp"

namespace kvt::memory {

class AddressSet {
  public:
    AddressSet() = default;
    // All bytes of the given layers of the plan (indices into its stream). If a byte occurs twice, `*doubled`
    // is its address and the set is unusable. Throws std::length_error if there are more than 64 Mi runs.
    AddressSet(const StreamPlan& plan, const std::vector<std::size_t>& layers,
               std::optional<std::uintptr_t>* doubled);

    bool empty() const { return extents_.empty(); }
    std::optional<std::uintptr_t> first_common(const AddressSet& other) const;

  private:
    std::vector<Extent> extents_;
};

struct PieceAt {
    std::size_t layer;  // index into the plan's stream
    std::uint32_t block_id;
};

// The piece of these layers that holds an address. Slow: walks the whole plan; for error messages.
std::optional<PieceAt> find_piece(const StreamPlan& plan, const std::vector<std::size_t>& layers,
                                  std::uintptr_t address);

}  // namespace kvt::memory
