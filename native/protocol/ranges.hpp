// A set of half-open byte ranges of one stream, kept sorted and merged.
//
// Invariant: ranges are ascending, non-empty and never touch, so a stream that is all there is one range.
// Chunks arrive nearly in order over a few lanes, hence the vector: it has a handful of entries.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "protocol/frames.hpp"

namespace kvt::protocol {

class RangeSet {
  public:
    bool overlaps(Range range) const noexcept {
        const auto next = first_after(range.begin);
        return next != ranges_.end() && next->begin < range.end;
    }
    bool contains(Range range) const noexcept {
        const auto next = first_after(range.begin);
        return next != ranges_.end() && next->begin <= range.begin && range.end <= next->end;
    }
    /// Adds a range that doesn't overlap the set.
    void add(Range range) {
        auto next = first_after(range.begin);
        if (next != ranges_.begin() && std::prev(next)->end == range.begin) {
            --next;
            next->end = range.end;
            const auto after = std::next(next);
            if (after != ranges_.end() && after->begin == next->end) {
                next->end = after->end;
                ranges_.erase(after);
            }
        } else if (next != ranges_.end() && next->begin == range.end) {
            next->begin = range.begin;
        } else {
            ranges_.insert(next, range);
        }
        nbytes_ += range.end - range.begin;
    }
    /// Takes up to `most` bytes from the front; the set must not be empty.
    Range take_front(std::uint64_t most) {
        Range& front = ranges_.front();
        const Range taken{front.begin, std::min(front.end, front.begin + most)};
        front.begin = taken.end;
        nbytes_ -= taken.end - taken.begin;
        if (front.begin == front.end) {
            ranges_.erase(ranges_.begin());
        }
        return taken;
    }
    bool empty() const noexcept { return ranges_.empty(); }
    std::uint64_t nbytes() const noexcept { return nbytes_; }
    const std::vector<Range>& ranges() const noexcept { return ranges_; }
    void clear() noexcept {
        ranges_.clear();
        nbytes_ = 0;
    }

  private:
    // The first range that ends after `offset`.
    std::vector<Range>::const_iterator first_after(std::uint64_t offset) const noexcept {
        return std::upper_bound(ranges_.begin(), ranges_.end(), offset,
                                [](std::uint64_t at, const Range& r) { return at < r.end; });
    }
    std::vector<Range>::iterator first_after(std::uint64_t offset) noexcept {
        return std::upper_bound(ranges_.begin(), ranges_.end(), offset,
                                [](std::uint64_t at, const Range& r) { return at < r.end; });
    }

    std::vector<Range> ranges_;
    std::uint64_t nbytes_ = 0;
};

}  // namespace kvt::protocol
