// The stream of a transfer, computed from its ids when asked for. Questions about blocks are answered in
// outcome.cpp.
#include "memory/plan.hpp"

#include <algorithm>
#include <iterator>
#include <stdexcept>

namespace kvt::memory {

namespace {

std::uintptr_t address_of(const Part& part, std::uint32_t id, std::int64_t offset) {
    // Modulo 2^64, as addresses are: the shape has checked that the sum is one.
    return part.base + id * static_cast<std::uint64_t>(part.block_stride) +
           static_cast<std::uint64_t>(offset);
}

}  // namespace

// Writes runs and merges what is adjacent, across pieces and layers.
class StreamPlan::Writer {
  public:
    Writer(iovec* out, std::size_t max) : out_(out), max_(max) {}

    bool put(std::uintptr_t address, std::uint64_t nbytes) {
        if (address == end_ && used_ != 0) {
            out_[used_ - 1].iov_len += nbytes;
        } else {
            if (used_ == max_) return false;
            out_[used_++] = {reinterpret_cast<void*>(address), nbytes};
        }
        end_ = address + nbytes;
        return true;
    }
    std::size_t used() const { return used_; }

  private:
    iovec* out_;
    std::size_t max_, used_ = 0;
    std::uintptr_t end_ = 0;
};

StreamPlan::StreamPlan(std::shared_ptr<const PoolShape> shape, std::vector<std::uint32_t> layers,
                       std::vector<std::shared_ptr<const Ids>> ids_by_group, Heads heads)
    : shape_(std::move(shape)), ids_by_group_(std::move(ids_by_group)), heads_(heads) {
    if (ids_by_group_.size() != shape_->groups().size())
        throw std::invalid_argument("block ids for " + std::to_string(ids_by_group_.size()) +
                                    " groups, the pool has " + std::to_string(shape_->groups().size()));
    check_ids();
    lay_out(layers);
}

void StreamPlan::check_ids() const {
    for (std::uint32_t g = 0; g < ids_by_group_.size(); ++g) {
        const Ids& list = ids(g);
        const std::uint64_t num_blocks = shape_->groups()[g].num_blocks;
        std::uint32_t largest = 0;
        for (const std::uint32_t id : list)
            largest = std::max(largest, id);  // one pass without a branch; whose it is comes later
        if (list.empty() || largest < num_blocks) continue;
        const auto bad = std::find_if(list.begin(), list.end(),
                                      [=](std::uint32_t id) { return id >= num_blocks; });
        throw std::out_of_range("group '" + shape_->groups()[g].name + "' has no block " +
                                std::to_string(*bad) + " (position " + std::to_string(bad - list.begin()) +
                                "): it has num_blocks=" + std::to_string(num_blocks));
    }
}

void StreamPlan::lay_out(const std::vector<std::uint32_t>& layers) {
    rows_.reserve(layers.size());
    std::uint32_t last_class = 0;
    for (const std::uint32_t index : layers) {
        if (index >= shape_->layers().size())
            throw std::out_of_range("the pool has no layer " + std::to_string(index) + ": it has " +
                                    std::to_string(shape_->layers().size()));
        const Layer& layer = shape_->layers()[index];
        if (patterns_.empty() || shape_->layer_class(index) != last_class)
            patterns_.push_back(shape_->pattern(index, heads_));
        last_class = shape_->layer_class(index);
        const Pattern& pattern = *patterns_.back();
        const Ids& list = ids(layer.group);
        rows_.push_back(
            {nbytes_, pattern.nbytes, list.size(), list.data(), &pattern, layer.parts.data(), index});
        count_up(rows_.back());
    }
    if (ids_by_group_.size() == 1) {
        blocks_ = rows_.empty() ? 0 : ids(0).size();
        return;
    }
    std::vector<bool> used(ids_by_group_.size());
    for (const Row& row : rows_) used[shape_->layers()[row.layer].group] = true;
    for (std::uint32_t g = 0; g < used.size(); ++g) blocks_ += used[g] ? ids(g).size() : 0;
}

void StreamPlan::count_up(const Row& row) {
    pieces_ +=
        row.positions;  // at most 2^32 layers of as many ids as fit memory: can't wrap before it is refused
    if (row.positions > kMaxPieces || pieces_ > kMaxPieces)
        throw std::length_error("more than " + std::to_string(kMaxPieces) +
                                " pieces (layers x blocks) in one transfer: split it");
    std::uint64_t nbytes;
    if (__builtin_mul_overflow(row.piece_nbytes, row.positions, &nbytes) ||
        __builtin_add_overflow(nbytes_, nbytes, &nbytes) || nbytes >> 63 != 0)
        throw std::length_error("a transfer of more than 2^63 bytes: split it");
    nbytes_ = nbytes;
}

const Ids& StreamPlan::ids(std::uint32_t group) const {
    static const Ids none;
    const auto& list = ids_by_group_.at(group);
    return list ? *list : none;
}

StreamPlan StreamPlan::reordered(const std::vector<std::uint32_t>& layers) const {
    StreamPlan other = *this;
    other.patterns_.clear();
    other.rows_.clear();
    other.nbytes_ = other.pieces_ = other.blocks_ = 0;
    other.lay_out(layers);
    return other;
}

StreamRange StreamPlan::piece(std::size_t i, std::uint64_t position) const {
    const Row& row = rows_[i];
    const std::uint64_t begin = row.begin + position * row.piece_nbytes;
    return {begin, begin + row.piece_nbytes};
}

std::size_t StreamPlan::layer_at(std::uint64_t offset) const {
    if (offset >= nbytes_) return rows_.size();
    // The last layer that begins here or before: layers without a piece begin where the next one does.
    const auto after = std::upper_bound(rows_.begin(), rows_.end(), offset,
                                        [](std::uint64_t at, const Row& row) { return at < row.begin; });
    return static_cast<std::size_t>(after - rows_.begin()) - 1;
}

std::uint64_t StreamPlan::runs(std::uint64_t begin, std::uint64_t end, iovec* out, std::size_t max,
                               std::size_t& count) const {
    Writer writer(out, max);
    end = std::min(end, nbytes_);
    for (std::size_t i = layer_at(begin); begin < end; ++i) {
        const Row& row = rows_[i];
        const std::uint64_t stop = std::min(end, layer_end(i)) - row.begin;
        const bool one = row.pattern->segments.size() == 1;
        const std::uint64_t at = begin - row.begin;
        const std::uint64_t reached = at == stop ? stop
                                      : one      ? walk_one(row, at, stop, writer)
                                                 : walk_many(row, at, stop, writer);
        begin = row.begin + reached;
        if (reached != stop) break;
    }
    count = writer.used();
    return begin;
}

// A piece is one run: the common case (HND and packed, whole blocks, MLA).
std::uint64_t StreamPlan::walk_one(const Row& row, std::uint64_t at, std::uint64_t stop, Writer& writer) {
    const Segment& segment = row.pattern->segments[0];
    const Part& part = row.parts[segment.part];
    std::uint64_t within = at % row.piece_nbytes;
    for (const std::uint32_t* id = row.ids + at / row.piece_nbytes; at < stop; ++id) {
        const std::uint64_t nbytes = std::min(row.piece_nbytes - within, stop - at);
        if (!writer.put(address_of(part, *id, segment.offset) + within, nbytes)) break;
        at += nbytes;
        within = 0;
    }
    return at;
}

std::uint64_t StreamPlan::walk_many(const Row& row, std::uint64_t at, std::uint64_t stop, Writer& writer) {
    const auto& segments = row.pattern->segments;
    const auto& starts = row.pattern->starts;
    std::uint64_t within = at % row.piece_nbytes;
    auto k = static_cast<std::size_t>(std::upper_bound(starts.begin(), starts.end(), within) -
                                      starts.begin()) -
             1;
    within -= starts[k];
    for (const std::uint32_t* id = row.ids + at / row.piece_nbytes; at < stop; ++id, k = 0)
        for (; k != segments.size() && at < stop; ++k) {
            const Segment& segment = segments[k];
            const std::uint64_t nbytes = std::min(segment.nbytes - within, stop - at);
            if (!writer.put(address_of(row.parts[segment.part], *id, segment.offset) + within, nbytes))
                return at;
            at += nbytes;
            within = 0;
        }
    return at;
}

std::uint64_t count_runs(const StreamPlan& plan) {
    std::uint64_t total = 0, at = 0;
    while (at < plan.nbytes()) {
        iovec out[64];
        std::size_t count = 0;
        at = plan.runs(at, plan.nbytes(), out, std::size(out), count);
        total += count;
    }
    return total;
}

}  // namespace kvt::memory
