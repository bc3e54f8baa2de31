#include "memory/busy.hpp"

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "memory/address_set.hpp"
#include "memory/arena.hpp"
#include "memory/slots.hpp"

namespace kvt::memory {
namespace {

// What a claim holds, in the terms of one ArenaMap.
struct Holding {
    std::vector<Use> uses;               // in regular arenas, sorted by arena
    std::vector<std::size_t> irregular;  // layers of the plan's stream in irregular arenas
    AddressSet addresses;                // of those
};

std::string name_of(const StreamPlan& plan, std::size_t i) {
    return plan.shape()->layers()[plan.layer(i)].name;  // which a user knows, whether peers pair by it or not
}

std::uint32_t group_of(const StreamPlan& plan, std::size_t i) {
    return plan.shape()->layers()[plan.layer(i)].group;
}

Use& use_of(std::vector<Use>& uses, const StreamPlan& plan, std::uint64_t owner, std::uint32_t group,
            std::uint32_t arena, std::uint32_t columns) {
    for (Use& use : uses)
        if (use.group == group) return use;
    return uses.emplace_back(Use{owner, arena, group, &plan.ids(group), plan.heads(), ColumnSet(columns)});
}

// The first layer of the use's group that has a column in `columns`: for messages.
std::string layer_in(const StreamPlan& plan, const ArenaMap::Place& place, std::uint32_t group,
                     const ColumnSet& columns) {
    for (std::size_t i = 0; i < plan.layer_count(); ++i)
        if (group_of(plan, i) == group)
            for (const std::uint32_t column : place.columns_of_layer[plan.layer(i)])
                if (columns.contains(column)) return name_of(plan, i);
    return {};
}

using Conflict = BusyTable::Conflict;

// Fills `holding`; tells if the plan has a byte twice (as far as that takes no look at ids: see
// SlotTable::find).
Conflict hold(const ArenaMap& map, const ArenaMap::Place& place, std::uint64_t owner, const StreamPlan& plan,
              Holding& holding) {
    for (std::size_t i = 0; i < plan.layer_count(); ++i) {
        const std::uint32_t group = group_of(plan, i), arena = place.arena_of_group[group];
        if (plan.positions(i) == 0) continue;
        if (!map.arenas()[arena].regular) {
            holding.irregular.push_back(i);
            continue;
        }
        Use& use = use_of(holding.uses, plan, owner, group, arena, map.arenas()[arena].columns);
        for (const std::uint32_t column : place.columns_of_layer[plan.layer(i)])
            if (!use.columns.insert(column))
                return {Conflict::within_call, owner, use.ids->front(), name_of(plan, i)};
    }
    std::stable_sort(holding.uses.begin(), holding.uses.end(),
                     [](const Use& a, const Use& b) { return a.arena < b.arena; });
    std::optional<std::uintptr_t> doubled;
    holding.addresses = AddressSet(plan, holding.irregular, &doubled);
    if (!doubled) return {};
    const auto piece = find_piece(plan, holding.irregular, *doubled);
    return {Conflict::within_call, owner, piece ? piece->block_id : 0,
            piece ? name_of(plan, piece->layer) : ""};
}

}  // namespace

struct BusyTable::Claim {
    std::uint64_t owner;
    std::shared_ptr<const StreamPlan> plan;
    Holding holding;
};

struct BusyTable::Index {
    ArenaMap map;
    std::vector<SlotTable> slots;         // by arena; unused where that is irregular
    std::vector<const Claim*> irregular;  // live claims that hold addresses

    explicit Index(const std::vector<const PoolShape*>& pools) : map(pools) {
        for (const Arena& arena : map.arenas()) slots.emplace_back(arena.num_blocks);
    }

    Conflict find_by_slot(const Claim& claim);
    Conflict find_by_address(const Claim& claim) const;
    void add(const Claim& claim, const Holding& holding);
    void remove(const Claim& claim) noexcept;
};

Conflict BusyTable::Index::find_by_slot(const Claim& claim) {
    const auto& uses = claim.holding.uses;
    Conflict in_flight;
    for (std::size_t k = 0; k < uses.size(); ++k) {
        std::size_t siblings = 0;
        while (k + 1 + siblings < uses.size() && uses[k + 1 + siblings].arena == uses[k].arena) ++siblings;
        const auto hit = slots[uses[k].arena].find(uses[k], uses.data() + k + 1, siblings);
        if (!hit) continue;
        const bool own = std::any_of(uses.begin(), uses.end(),
                                     [&](const Use& use) { return &use == hit->other; });
        if (!own && in_flight) continue;
        const Conflict conflict{
            own ? Conflict::within_call : Conflict::in_flight, hit->other->owner, hit->id,
            layer_in(*claim.plan, *map.find(claim.plan->shape().get()), uses[k].group, hit->other->columns)};
        if (own) return conflict;  // misuse comes first, whatever else is under way
        in_flight = conflict;
    }
    return in_flight;
}

Conflict BusyTable::Index::find_by_address(const Claim& claim) const {
    for (const Claim* other : irregular) {
        const auto address = claim.holding.addresses.first_common(other->holding.addresses);
        if (!address) continue;
        const auto piece = find_piece(*claim.plan, claim.holding.irregular, *address);
        return {Conflict::in_flight, other->owner, piece ? piece->block_id : 0,
                piece ? name_of(*claim.plan, piece->layer) : ""};
    }
    return {};
}

// All or nothing. The holding may be moved afterwards: the tables point to its uses, which stay where they
// are.
void BusyTable::Index::add(const Claim& claim, const Holding& holding) {
    for (const Use& use : holding.uses) slots[use.arena].reserve(holding.uses.size());
    if (!holding.addresses.empty()) irregular.push_back(&claim);
    for (const Use& use : holding.uses) slots[use.arena].add(&use);
}

void BusyTable::Index::remove(const Claim& claim) noexcept {
    for (const Use& use : claim.holding.uses) slots[use.arena].remove(&use);
    std::erase(irregular, &claim);
}

BusyTable::BusyTable() : index_(std::make_unique<Index>(pools_)) {}
BusyTable::~BusyTable() = default;

bool BusyTable::in_use(const PoolShape* pool) const noexcept {
    for (const auto& [owner, claims] : claims_)
        for (const auto& claim : claims)
            if (claim->plan->shape().get() == pool) return true;
    return false;
}

// Sorts all memory anew and lays the live claims out in it. Changes nothing if it throws.
void BusyTable::rebuild() {
    std::vector<const PoolShape*> pools = pools_;
    pools.insert(pools.end(), leaving_.begin(), leaving_.end());
    auto fresh = std::make_unique<Index>(pools);
    std::vector<std::pair<Claim*, Holding>> held;
    for (const auto& [owner, claims] : claims_)
        for (const auto& claim : claims) {
            Holding& holding = held.emplace_back(claim.get(), Holding{}).second;
            hold(fresh->map, *fresh->map.find(claim->plan->shape().get()), owner, *claim->plan, holding);
            fresh->add(*claim, holding);
        }
    for (auto& [claim, holding] : held) claim->holding = std::move(holding);
    index_ = std::move(fresh);
}

void BusyTable::add_pool(const PoolShape* pool) {
    const std::lock_guard lock(mutex_);
    if (std::find(pools_.begin(), pools_.end(), pool) != pools_.end())
        throw std::logic_error("this pool was added before");
    const auto pools = pools_, leaving = leaving_;
    try {
        pools_.push_back(pool);
        std::erase(leaving_, pool);
        rebuild();
    } catch (...) {
        pools_ = pools;
        leaving_ = leaving;
        throw;
    }
}

void BusyTable::remove_pool(const PoolShape* pool) {
    const std::lock_guard lock(mutex_);
    const auto at = std::find(pools_.begin(), pools_.end(), pool);
    if (at == pools_.end()) return;
    if (in_use(pool))
        leaving_.push_back(pool);
    else
        index_->map.forget(pool);
    pools_.erase(at);
    try {
        rebuild();
    } catch (const std::exception&) {
        // Without memory for it, arenas stay as they were: larger than need be, and right.
    }
}

// Under the lock: what is in the way of a claim, whose holding is filled.
BusyTable::Conflict BusyTable::find(Claim& claim) {
    const PoolShape* pool = claim.plan->shape().get();
    if (std::find(pools_.begin(), pools_.end(), pool) == pools_.end())
        throw std::logic_error("the pool of this transfer is not registered, or closed");
    if (auto conflict = hold(index_->map, *index_->map.find(pool), claim.owner, *claim.plan, claim.holding))
        return conflict;
    auto conflict = index_->find_by_slot(claim);
    return conflict ? conflict : index_->find_by_address(claim);
}

BusyTable::Conflict BusyTable::during(std::shared_ptr<const StreamPlan> plan,
                                      const std::function<void()>& work) {
    Claim claim{0, std::move(plan), {}};
    const std::lock_guard lock(mutex_);
    auto conflict = find(claim);
    if (!conflict) work();
    return conflict;
}

BusyTable::Conflict BusyTable::claim(std::uint64_t owner, std::shared_ptr<const StreamPlan> plan) {
    const std::lock_guard lock(mutex_);
    auto fresh = std::make_unique<Claim>(Claim{owner, std::move(plan), {}});
    if (auto conflict = find(*fresh)) return conflict;
    auto& of_owner = claims_[owner];
    of_owner.reserve(of_owner.size() + 1);
    index_->add(*fresh, fresh->holding);
    of_owner.push_back(std::move(fresh));
    return {};
}

void BusyTable::release(std::uint64_t owner) noexcept {
    const std::lock_guard lock(mutex_);
    const auto found = claims_.find(owner);
    if (found == claims_.end()) return;
    for (const auto& claim : found->second) index_->remove(*claim);
    const auto ended = std::move(found->second);  // keeps the pools alive until they are forgotten
    claims_.erase(found);
    std::erase_if(leaving_, [this](const PoolShape* pool) {
        if (in_use(pool)) return false;
        index_->map.forget(pool);
        return true;
    });
}

}  // namespace kvt::memory
