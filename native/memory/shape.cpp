// Patterns of pieces, and their cache. What a shape must fulfil is checked in shape_check.cpp.
#include "memory/shape.hpp"

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "memory/shape_check.hpp"

namespace kvt::memory {
namespace {

// A user may name many slices of heads over time, so what the cache keeps is bounded; then it starts anew.
constexpr std::uint64_t kMaxCachedSegments = 1u << 20;

// The axes that remain of a part when heads are sliced and its contiguous inside is taken as one run.
struct Walk {
    std::vector<Axis> axes;
    std::int64_t offset = 0;
    std::uint64_t run;
};

Walk reduce(const Part& part, Heads heads) {
    Walk walk{part.axes, 0, part.itemsize};
    if (part.head_axis >= 0 && !heads.all) {
        Axis& axis = walk.axes[static_cast<std::size_t>(part.head_axis)];
        walk.offset = static_cast<std::int64_t>(heads.begin) * axis.stride;
        axis.count = heads.count;
    }
    std::erase_if(walk.axes, [](const Axis& axis) { return axis.count == 1; });
    while (!walk.axes.empty() && walk.axes.back().stride == static_cast<std::int64_t>(walk.run)) {
        walk.run *= walk.axes.back().count;
        walk.axes.pop_back();
    }
    return walk;
}

void append(std::vector<Segment>& segments, Segment next) {
    if (!segments.empty()) {
        Segment& last = segments.back();
        if (last.part == next.part && last.offset + static_cast<std::int64_t>(last.nbytes) == next.offset) {
            last.nbytes += next.nbytes;
            return;
        }
    }
    segments.push_back(next);
}

// An odometer over the axes, the last one turning fastest.
void append_all(std::vector<Segment>& segments, const Walk& walk, std::uint32_t part, std::int64_t shift) {
    std::vector<std::uint64_t> at(walk.axes.size(), 0);
    std::int64_t offset = walk.offset + shift;
    while (true) {
        append(segments, {part, offset, walk.run});
        std::size_t k = walk.axes.size();
        while (k != 0 && ++at[k - 1] == walk.axes[k - 1].count) {
            offset -= static_cast<std::int64_t>(walk.axes[k - 1].count - 1) * walk.axes[k - 1].stride;
            at[--k] = 0;
        }
        if (k == 0) return;
        offset += walk.axes[k - 1].stride;
    }
}

void append_part(std::vector<Segment>& segments, const Part& part, std::uint32_t index, std::int64_t shift,
                 Heads heads) {
    const Walk walk = reduce(part, heads);
    std::uint64_t count = 1;
    for (const Axis& axis : walk.axes) {
        if (axis.count > kMaxSegments / count)
            throw std::invalid_argument("a block is scattered over more than " +
                                        std::to_string(kMaxSegments) + " places");
        count *= axis.count;
    }
    append_all(segments, walk, index, shift);
}

// Where part 0's blocks and this part's lie side by side (one array with a K/V axis), the distance between
// them: then both are counted from part 0, and K and V of a block may turn out to be one segment.
std::optional<std::int64_t> distance(const Part& first, const Part& part) {
    const auto shift = static_cast<std::int64_t>(part.base - first.base);
    const auto limit = first.block_stride < 0 ? -first.block_stride : first.block_stride;
    if (part.block_stride != first.block_stride || shift <= -limit || shift >= limit) return std::nullopt;
    return shift;
}

bool same_class(const Layer& a, const Layer& b) {
    if (a.parts.size() != b.parts.size()) return false;
    for (std::size_t i = 0; i < a.parts.size(); ++i) {
        const Part &p = a.parts[i], &q = b.parts[i];
        if (p.axes != q.axes || p.itemsize != q.itemsize || p.head_axis != q.head_axis) return false;
        if (distance(a.parts[0], p) != distance(b.parts[0], q)) return false;
    }
    return true;
}

Pattern make_pattern(const Layer& layer, Heads heads) {
    Pattern pattern{};
    for (std::uint32_t i = 0; i < layer.parts.size(); ++i) {
        const auto shift = distance(layer.parts[0], layer.parts[i]);
        append_part(pattern.segments, layer.parts[i], shift ? 0 : i, shift.value_or(0), heads);
        if (pattern.segments.size() > kMaxSegments)
            throw std::invalid_argument("a block is scattered over more than " +
                                        std::to_string(kMaxSegments) + " places");
    }
    pattern.starts.reserve(pattern.segments.size());
    for (const Segment& segment : pattern.segments) {
        pattern.starts.push_back(pattern.nbytes);
        pattern.nbytes += segment.nbytes;
    }
    return pattern;
}

}  // namespace

std::vector<Segment> part_segments(const Part& part, std::uint32_t index, Heads heads) {
    std::vector<Segment> segments;
    append_part(segments, part, index, 0, heads);
    return segments;
}

PoolShape::PoolShape(std::vector<Group> groups, std::vector<Layer> layers, bool named,
                     std::uint64_t most_segments)
    : groups_(std::move(groups)), layers_(std::move(layers)), named_(named) {
    check_shape(groups_, layers_, named_);
    classify();
    std::uint32_t classes = 0;
    for (std::uint32_t i = 0; i < layers_.size(); ++i) {  // so that what can be registered can be sent
        if (class_of_[i] < classes) continue;
        ++classes;
        segments_ += pattern(i, Heads::every())->segments.size();
        if (segments_ > most_segments)
            throw std::length_error("its blocks are scattered over more than " +
                                    std::to_string(most_segments) + " places");
    }
}

void PoolShape::classify() {
    std::vector<std::uint32_t> first_of_class;
    for (std::uint32_t i = 0; i < layers_.size(); ++i) {
        const auto same = std::find_if(first_of_class.begin(), first_of_class.end(),
                                       [&](std::uint32_t j) { return same_class(layers_[i], layers_[j]); });
        class_of_.push_back(static_cast<std::uint32_t>(same - first_of_class.begin()));
        if (same == first_of_class.end()) first_of_class.push_back(i);
    }
}

std::string PoolShape::describe_layer(std::uint32_t layer) const {
    return memory::describe_layer(layers_, layer);
}

Heads PoolShape::canonical(std::uint32_t layer, Heads heads) const {
    if (heads.all) return Heads::every();
    const Layer& named = layers_[layer];
    const std::uint64_t have = groups_[named.group].num_heads;
    const bool sliceable = std::all_of(named.parts.begin(), named.parts.end(),
                                       [](const Part& p) { return p.head_axis >= 0; });
    if (!sliceable)
        throw std::invalid_argument(describe_layer(layer) + " has no KV heads to take a slice of");
    if (heads.count == 0 || heads.begin >= have || heads.count > have - heads.begin)
        throw std::invalid_argument("heads " + std::to_string(heads.begin) + " to " +
                                    std::to_string(std::uint64_t{heads.begin} + heads.count) +
                                    " (exclusive) of " + describe_layer(layer) + ": it has " +
                                    std::to_string(have) + " KV heads");
    return heads.count == have ? Heads::every() : heads;
}

std::shared_ptr<const Pattern> PoolShape::pattern(std::uint32_t layer, Heads heads) const {
    if (layer >= layers_.size()) throw std::out_of_range("the pool has no layer " + std::to_string(layer));
    heads = canonical(layer, heads);
    const Key key{class_of_[layer], heads.begin, heads.count};
    const std::lock_guard lock(mutex_);
    if (const auto found = cache_.find(key); found != cache_.end()) return found->second;
    std::shared_ptr<const Pattern> made;
    try {
        made = std::make_shared<const Pattern>(make_pattern(layers_[layer], heads));
    } catch (const std::invalid_argument& error) {
        throw std::invalid_argument(describe_layer(layer) + ": " + error.what());
    }
    if (cached_segments_ + made->segments.size() > kMaxCachedSegments) {
        cache_.clear();
        cached_segments_ = 0;
    }
    cached_segments_ += made->segments.size();
    cache_.emplace(key, made);
    return made;
}

std::uint64_t PoolShape::piece_nbytes(std::uint32_t layer, Heads heads) const {
    return pattern(layer, heads)->nbytes;
}

std::uint64_t PoolShape::cached_segments() const {
    const std::lock_guard lock(mutex_);
    return cached_segments_;
}

Extent PoolShape::extent(std::uint32_t layer, std::uint32_t part) const {
    const Layer& of = layers_.at(layer);
    return part_extent(of.parts.at(part), groups_[of.group].num_blocks);
}

void PoolShape::require_within(std::uint32_t layer, std::uint32_t part, std::uintptr_t base,
                               std::uint64_t nbytes) const {
    const Extent has = extent(layer, part);
    const std::uint64_t needs = has.end - has.begin;
    if (has.begin >= base && needs <= nbytes && has.begin - base <= nbytes - needs) return;
    throw std::invalid_argument(describe_layer(layer) +
                                ": its blocks reach beyond the array that holds them (" +
                                std::to_string(nbytes) + " bytes)");
}

}  // namespace kvt::memory
