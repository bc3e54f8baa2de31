#include "memory/address_set.hpp"

#include <algorithm>
#include <memory>
#include <stdexcept>

namespace kvt::memory {
namespace {

constexpr std::size_t kMaxRuns = std::size_t{64} << 20;
constexpr std::size_t kBatch = 256;

// Calls visit(begin, end) for each run of a range of the stream, until it returns true; returns whether it
// did.
template <class Visit>
bool any_run(const StreamPlan& plan, std::uint64_t at, std::uint64_t end, Visit&& visit) {
    iovec runs[kBatch];
    while (at < end) {
        std::size_t count = 0;
        at = plan.runs(at, end, runs, kBatch, count);
        for (std::size_t i = 0; i < count; ++i) {
            const auto begin = reinterpret_cast<std::uintptr_t>(runs[i].iov_base);
            if (visit(begin, begin + runs[i].iov_len)) return true;
        }
    }
    return false;
}

bool by_begin(const Extent& a, const Extent& b) { return a.begin < b.begin; }

// The same bytes in an order that is mostly that of their addresses: sorting ids once is far less work than
// sorting the runs of all layers, which are then in order already unless a piece goes to and fro between K
// and V.
StreamPlan in_order(const StreamPlan& plan, const std::vector<std::size_t>& layers) {
    const PoolShape& shape = *plan.shape();
    std::vector<std::uint32_t> sorted_layers;
    std::vector<std::shared_ptr<const Ids>> sorted_ids(shape.groups().size());
    for (const std::size_t i : layers) {
        sorted_layers.push_back(plan.layer(i));
        const std::uint32_t group = shape.layers()[plan.layer(i)].group;
        if (sorted_ids[group]) continue;
        auto list = std::make_shared<Ids>(plan.ids(group));
        std::sort(list->begin(), list->end());
        sorted_ids[group] = std::move(list);
    }
    std::sort(sorted_layers.begin(), sorted_layers.end(), [&](std::uint32_t a, std::uint32_t b) {
        return shape.layers()[a].parts[0].base < shape.layers()[b].parts[0].base;
    });
    return {plan.shape(), std::move(sorted_layers), std::move(sorted_ids), plan.heads()};
}

}  // namespace

AddressSet::AddressSet(const StreamPlan& plan, const std::vector<std::size_t>& layers,
                       std::optional<std::uintptr_t>* doubled) {
    if (layers.empty()) return;
    const StreamPlan ordered = in_order(plan, layers);
    extents_.reserve(ordered.pieces());
    any_run(ordered, 0, ordered.nbytes(), [&](std::uintptr_t begin, std::uintptr_t end) {
        if (extents_.size() == kMaxRuns)
            throw std::length_error(
                "a destination of more than 64 Mi runs, in memory that is also registered with other "
                "strides: split it");
        extents_.push_back({begin, end});
        return false;
    });
    if (!std::is_sorted(extents_.begin(), extents_.end(), by_begin))
        std::sort(extents_.begin(), extents_.end(), by_begin);
    std::size_t kept = 0;
    for (const Extent& next : extents_) {
        if (kept != 0 && next.begin < extents_[kept - 1].end) {
            *doubled = next.begin;
            return;
        }
        if (kept != 0 && next.begin == extents_[kept - 1].end)
            extents_[kept - 1].end = next.end;
        else
            extents_[kept++] = next;
    }
    extents_.resize(kept);
    if (kept < extents_.capacity() / 2)
        extents_.shrink_to_fit();  // neighbours have merged: don't hold memory for them
}

std::optional<std::uintptr_t> AddressSet::first_common(const AddressSet& other) const {
    if (extents_.size() > other.extents_.size()) return other.first_common(*this);
    // Each of the fewer is looked for among the more, from where the last one was found.
    auto from = other.extents_.begin();
    for (const Extent& mine : extents_) {
        // Steps that double, then halve: near neighbours cost a step or two, far ones a logarithm.
        std::ptrdiff_t step = 1;
        while (step < other.extents_.end() - from && from[step].end <= mine.begin) step *= 2;
        from = std::partition_point(from, from + std::min(step + 1, other.extents_.end() - from),
                                    [&](const Extent& e) { return e.end <= mine.begin; });
        if (from == other.extents_.end()) return std::nullopt;
        if (from->begin < mine.end) return std::max(from->begin, mine.begin);
    }
    return std::nullopt;
}

std::optional<PieceAt> find_piece(const StreamPlan& plan, const std::vector<std::size_t>& layers,
                                  std::uintptr_t address) {
    const auto holds = [=](std::uintptr_t begin, std::uintptr_t end) {
        return begin <= address && address < end;
    };
    for (const std::size_t i : layers)
        for (std::uint64_t p = 0; p < plan.positions(i); ++p) {
            const StreamRange piece = plan.piece(i, p);
            if (any_run(plan, piece.begin, piece.end, holds)) return PieceAt{i, plan.block_id(i, p)};
        }
    return std::nullopt;
}

}  // namespace kvt::memory
