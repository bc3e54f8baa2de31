#include "memory/slots.hpp"

#include <algorithm>
#include <new>

namespace kvt::memory {
namespace {

bool overlap(const Heads& a, const Heads& b) {
    if (a.all || b.all) return true;
    return a.begin < std::uint64_t{b.begin} + b.count && b.begin < std::uint64_t{a.begin} + a.count;
}

// Whether the two share bytes of any block that both name.
bool rivals(const Use& a, const Use& b) {
    return overlap(a.heads, b.heads) && a.columns.intersects(b.columns);
}

}  // namespace

bool ColumnSet::insert(std::uint32_t column) {
    const bool fresh = !contains(column);
    words_[column / 64] |= std::uint64_t{1} << (column % 64);
    return fresh;
}

bool ColumnSet::intersects(const ColumnSet& other) const {
    std::uint64_t both = 0;
    for (std::size_t i = 0; i < words_.size(); ++i) both |= words_[i] & other.words_[i];
    return both != 0;
}

void SlotTable::allocate() {
    if (slots_) return;
    slots_.reset(static_cast<Slot*>(std::calloc(num_blocks_, sizeof(Slot))));
    if (!slots_) throw std::bad_alloc();
}

void SlotTable::reserve(std::size_t uses) {
    allocate();
    // Never to measure: that would copy the list at every claim.
    if (live_.capacity() - live_.size() < uses) live_.reserve(2 * live_.size() + uses + 16);
}

std::uint32_t SlotTable::next_stamp() {
    if (++stamp_ == 0) {  // after 2^32 claims the oldest stamps would look new
        for (std::uint64_t id = 0; id < num_blocks_; ++id) slots_[id].stamp = 0;
        stamp_ = 1;
    }
    return stamp_;
}

std::optional<std::uint32_t> SlotTable::first_stamped(const Ids& ids, std::uint32_t stamp) const {
    for (const std::uint32_t id : ids)
        if (slots_[id].stamp == stamp) return id;
    return std::nullopt;
}

std::optional<SlotTable::Hit> SlotTable::find(const Use& use, const Use* siblings, std::size_t count) {
    allocate();
    const std::uint32_t stamp = next_stamp();
    bool busy = false;
    for (const std::uint32_t id : *use.ids) {
        Slot& slot = slots_[id];
        if (slot.stamp == stamp) return Hit{&use, id};
        slot.stamp = stamp;
        busy |= slot.count != 0;
    }
    for (const Use* other = siblings; other != siblings + count; ++other)
        if (rivals(use, *other))
            if (const auto id = first_stamped(*other->ids, stamp)) return Hit{other, *id};
    if (!busy) return std::nullopt;  // the common case: no need to look at anyone else's ids
    for (const Use* other : live_)
        if (rivals(use, *other))
            if (const auto id = first_stamped(*other->ids, stamp)) return Hit{other, *id};
    return std::nullopt;
}

void SlotTable::add(const Use* use) noexcept {
    for (const std::uint32_t id : *use->ids) ++slots_[id].count;
    live_.push_back(use);
}

void SlotTable::remove(const Use* use) noexcept {
    const auto at = std::find(live_.begin(), live_.end(), use);
    if (at == live_.end()) return;
    *at = live_.back();
    live_.pop_back();
    for (const std::uint32_t id : *use->ids) --slots_[id].count;
}

}  // namespace kvt::memory
