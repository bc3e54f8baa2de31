// Block ids, keys and pool descriptions from Python's forms to native ones. Needs the GIL.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <string>
#include <vector>

#include "engine/pool.hpp"
#include "memory/plan.hpp"

namespace kvt::bindings {

namespace nb = nanobind;

/// ids: a sequence of int, a range, a 1-D integer array on the CPU, or a mapping {group name: any of these};
/// one entry for each group.
std::vector<std::shared_ptr<const memory::Ids>> to_ids(nb::handle ids, const memory::PoolShape& shape);
/// Positions in the ids of a grant, in the same forms, for each group of `shape`.
std::vector<std::shared_ptr<const memory::Ids>> to_positions(nb::handle positions,
                                                             const memory::PoolShape& shape);
/// A str (as UTF-8) or bytes of 1 to 255 bytes; `text` says which it was.
std::string to_key(nb::handle key, bool& text);
std::shared_ptr<memory::PoolShape> to_shape(nb::list groups, nb::list layers, bool named);

}  // namespace kvt::bindings
