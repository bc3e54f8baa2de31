// Copies between scattered runs and one contiguous buffer: the staging of pieces too small for a descriptor
// each.
//
// Here: gather and scatter. Not here: which runs (plan.hpp), or when (backends).
// Invariant: exactly the bytes of the runs are touched, in order. Buffer and runs don't overlap.
#pragma once

#include <sys/uio.h>

#include <cstddef>

namespace kvt::memory {

void gather(const iovec* runs, std::size_t n, std::byte* out) noexcept;
void scatter(const std::byte* in, const iovec* runs, std::size_t n) noexcept;

}  // namespace kvt::memory
