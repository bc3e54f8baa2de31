#include "engine/pool.hpp"

#include <chrono>
#include <utility>

#include "base/clock.hpp"

namespace kvt::engine {

Pool::Pool(std::uint64_t id, std::string name, std::shared_ptr<const memory::PoolShape> shape, bool writable)
    : id_(id), writable_(writable), shape_(std::move(shape)) {
    terms_.name = std::move(name);
    terms_.named = shape_->named();
    for (const memory::Group& group : shape_->groups()) {
        terms_.groups.push_back({group.name, group.opaque, group.dtype, group.order, group.kv,
                                 static_cast<std::uint32_t>(group.tokens_per_block)});
    }
    for (const memory::Layer& layer : shape_->layers()) {
        terms_.layers.push_back({layer.name, static_cast<std::uint16_t>(layer.group)});
    }
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
