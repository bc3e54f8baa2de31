// The parts that several bodies have. For frames.cpp and frames_grants.cpp only.
#pragma once

#include <vector>

#include "protocol/frames.hpp"

namespace kvt::protocol {

void write_terms(Writer& out, const Terms& terms);
Terms read_terms(Reader& in);
void write_ranges(Writer& out, const std::vector<Range>& ranges);
std::vector<Range> read_ranges(Reader& in);

}  // namespace kvt::protocol
