#include "engine/pool.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <utility>

#include "backends/pool_terms.hpp"
#include "base/clock.hpp"

namespace kvt::engine {

namespace {

std::atomic<std::uint64_t> next_segment{1};

bool lies_within(const memory::Extent& extent, const std::vector<memory::SharedSegment>& segments) {
    return std::any_of(segments.begin(), segments.end(), [&](const auto& segment) {
        return extent.begin >= segment.base && extent.end - segment.base <= segment.nbytes;
    });
}

bool lies_within(const memory::PoolShape& shape, const std::vector<memory::SharedSegment>& segments) {
    for (std::uint32_t layer = 0; layer < shape.layers().size(); ++layer) {
        for (std::uint32_t part = 0; part < shape.layers()[layer].parts.size(); ++part) {
            if (!lies_within(shape.extent(layer, part), segments)) {
                return false;
            }
        }
    }
    return true;
}

}  // namespace

Pool::Pool(std::uint64_t id, std::string name, std::shared_ptr<const memory::PoolShape> shape, bool writable,
           std::vector<Segment> segments)
    : id_(id), writable_(writable), shape_(std::move(shape)), segments_(std::move(segments)) {
    for (const Segment& segment : segments_) {
        shared_.push_back({next_segment++, segment.fd.get(), segment.base, segment.nbytes});
    }
    mapped_ = !shared_.empty() && lies_within(*shape_, shared_);
    terms_ = backends::terms_of(*shape_);
    terms_.name = std::move(name);
}

bool Pool::use() {
    const std::lock_guard lock(mutex_);
    if (closed_ || closers_ != 0) {
        return false;
    }
    ++uses_;
    return true;
}

void Pool::unuse() noexcept {
    const std::lock_guard lock(mutex_);
    if (--uses_ == 0) {
        idle_.notify_all();
    }
}

std::uint64_t Pool::in_use() const {
    const std::lock_guard lock(mutex_);
    return uses_;
}

bool Pool::closed() const {
    const std::lock_guard lock(mutex_);
    return closed_;
}

Pool::Closing::Closing(Pool& pool) : pool_(pool) {
    const std::lock_guard lock(pool_.mutex_);
    ++pool_.closers_;
}

Pool::Closing::~Closing() {
    const std::lock_guard lock(pool_.mutex_);
    --pool_.closers_;
}

bool Pool::close(std::int64_t until) {
    const Closing closing(*this);
    std::unique_lock lock(mutex_);
    while (uses_ != 0) {
        const std::int64_t left = until - monotonic_ns();
        if (left <= 0) {
            return false;
        }
        idle_.wait_for(lock, std::chrono::nanoseconds(left));
    }
    closed_ = true;
    return true;
}

}  // namespace kvt::engine
