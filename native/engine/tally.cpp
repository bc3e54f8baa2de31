#include "engine/tally.hpp"

#include <algorithm>
#include <bit>

namespace kvt::engine {

void Tally::record(Operation operation, protocol::Cause outcome, std::uint64_t nbytes, std::int64_t ns) {
    const std::uint64_t us = ns > 0 ? static_cast<std::uint64_t>(ns + 999) / 1000 : 0;
    // The first bound that isn't below: 16 us is bucket 0, 17 us bucket 1.
    const std::size_t bucket = us <= 16 ? 0 : static_cast<std::size_t>(std::bit_width(us - 1)) - 4;
    const std::lock_guard lock(mutex_);
    Cell& cell = cells_[{operation, outcome}];
    ++cell.count;
    cell.nbytes += nbytes;
    cell.total_ns += std::max<std::int64_t>(ns, 0);
    ++cell.buckets[std::min(bucket, kBounds)];
}

void Tally::record_part(Operation operation, protocol::Cause outcome, std::uint64_t nbytes) {
    const std::lock_guard lock(mutex_);
    cells_[{operation, outcome}].nbytes += nbytes;
}

Tally::Cells Tally::cells() const {
    const std::lock_guard lock(mutex_);
    return cells_;
}

}  // namespace kvt::engine
