// From ranges of a plan's stream to blocks: what errors and results report. Cold: runs once, when a transfer
// ends.
#include <algorithm>
#include <unordered_set>

#include "memory/plan.hpp"

namespace kvt::memory {

// The positions, by group, that a range of the stream touches.
class StreamPlan::Marks {
  public:
    explicit Marks(const StreamPlan& plan) : plan_(plan), touched_(plan.shape_->groups().size()) {
        for (std::uint32_t g = 0; g < touched_.size(); ++g) touched_[g].resize(plan.ids(g).size());
    }

    void touch(std::uint64_t begin, std::uint64_t end) {
        end = std::min(end, plan_.nbytes_);
        for (std::size_t i = plan_.layer_at(begin); begin < end; ++i) {
            const std::uint64_t stop = std::min(end, plan_.layer_end(i));
            if (stop > begin) touch_layer(plan_.rows_[i], begin, stop);
            begin = stop;
        }
    }

    bool touched(std::uint32_t group, std::size_t position) const { return touched_[group][position]; }

    // Whether the plan has a layer of this group: its ids mean nothing otherwise.
    bool in_use(std::uint32_t group) const {
        return std::any_of(plan_.rows_.begin(), plan_.rows_.end(),
                           [&](const Row& row) { return plan_.shape_->layers()[row.layer].group == group; });
    }

  private:
    void touch_layer(const Row& row, std::uint64_t begin, std::uint64_t end) {
        auto& marks = touched_[plan_.shape_->layers()[row.layer].group];
        const auto first = static_cast<std::ptrdiff_t>((begin - row.begin) / row.piece_nbytes);
        const auto last = static_cast<std::ptrdiff_t>((end - 1 - row.begin) / row.piece_nbytes);
        std::fill(marks.begin() + first, marks.begin() + last + 1, true);
    }

    const StreamPlan& plan_;
    std::vector<std::vector<bool>> touched_;
};

std::vector<GroupBlocks> StreamPlan::blocks_touching(const std::vector<StreamRange>& ranges) const {
    Marks marks(*this);
    for (const StreamRange& range : ranges) marks.touch(range.begin, range.end);
    std::vector<GroupBlocks> found;
    for (std::uint32_t g = 0; g < ids_by_group_.size(); ++g) {
        GroupBlocks blocks{shape_->groups()[g].name, {}};
        std::unordered_set<std::uint32_t> seen;
        for (std::size_t p = 0; p < ids(g).size(); ++p)
            if (marks.touched(g, p) && seen.insert(ids(g)[p]).second) blocks.ids.push_back(ids(g)[p]);
        if (!blocks.ids.empty()) found.push_back(std::move(blocks));
    }
    return found;
}

std::vector<BlockOutcome> StreamPlan::outcome(const std::vector<StreamRange>& verified) const {
    Marks missing(*this);
    std::uint64_t reached = 0;
    for (const StreamRange& range : verified) {
        if (range.begin > reached) missing.touch(reached, range.begin);
        reached = std::max(reached, range.end);
    }
    if (reached < nbytes_) missing.touch(reached, nbytes_);
    std::vector<BlockOutcome> outcomes;
    for (std::uint32_t g = 0; g < ids_by_group_.size(); ++g) {
        if (ids(g).empty() || !missing.in_use(g)) continue;
        BlockOutcome of{shape_->groups()[g].name, {}, {}};
        std::unordered_set<std::uint32_t> poisoned, seen;  // an id may stand at several positions of a source
        for (std::size_t p = 0; p < ids(g).size(); ++p)
            if (missing.touched(g, p)) poisoned.insert(ids(g)[p]);
        for (const std::uint32_t id : ids(g))
            if (seen.insert(id).second) (poisoned.contains(id) ? of.poisoned : of.sealed).push_back(id);
        outcomes.push_back(std::move(of));
    }
    return outcomes;
}

}  // namespace kvt::memory
