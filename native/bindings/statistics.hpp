// Counters as Python reads them: dicts of plain numbers.
#pragma once

#include <nanobind/nanobind.h>

#include "bindings/objects.hpp"

namespace kvt::bindings {

nanobind::dict statistics_of(const engine::Connection& connection);
/// {backend: {operation: {outcome: ...}}}, of all connections that the engine ever had.
nanobind::dict statistics_of(engine::Engine& engine);

}  // namespace kvt::bindings
