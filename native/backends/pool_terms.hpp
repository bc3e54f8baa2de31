// A pool's shape in the words that the two sides compare.
#pragma once

#include "memory/shape.hpp"
#include "protocol/terms.hpp"

namespace kvt::backends {

/// All but the pool's own name.
protocol::PoolTerms terms_of(const memory::PoolShape& shape);

}  // namespace kvt::backends
