// What a shape must fulfil before anything is computed from it.
//
// Here: the checks, and the extent of a part, in arithmetic that can't overflow. Not here: patterns
// (shape.hpp).
// Invariant: what passes check_shape() has addresses of 64 bits, offsets of 63, and no byte twice in an
// array's block.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "memory/shape.hpp"

namespace kvt::memory {

// Throws std::invalid_argument, naming the group or layer.
void check_shape(const std::vector<Group>& groups, const std::vector<Layer>& layers, bool named);

// The addresses that blocks 0 ... num_blocks - 1 touch. Throws std::invalid_argument if one of them is no
// address.
Extent part_extent(const Part& part, std::uint64_t num_blocks);

std::string describe_layer(const std::vector<Layer>& layers, std::uint32_t layer);

}  // namespace kvt::memory
