// Destination bytes in use: a byte is the destination of one transfer at a time.
//
// Here: claims of whole transfers, all or nothing, and who stands in the way of one.
// Not here: source bytes (any number of transfers may read a block), what a conflict means to the user
// (engine, bindings).
// Invariant: no two live claims share a byte, and no claim holds a byte twice, whichever pools or layers name
// it.
//
// Theory of operation. Groups whose memory may share bytes form an arena (arena.hpp); a group that shares
// with none is an arena of its own. In a *regular* arena two parts of layers are either the same strided
// memory or share no byte, so two pieces overlap if and only if id, column (the same strided memory) and
// heads do. A claim then costs one table entry per id, whatever the number of layers. In an *irregular* arena
// (views of other strides on the same memory) a claim keeps the sorted addresses of its bytes instead, which
// costs more and is right for any strides. Adding a pool sorts the groups into arenas anew and lays the live
// claims out again, so a group may change tier under way.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "memory/plan.hpp"
#include "memory/shape.hpp"

namespace kvt::memory {

class BusyTable {
  public:
    struct Conflict {
        enum Kind { none, within_call, in_flight } kind = none;
        std::uint64_t owner = 0;     // of the claim in flight
        std::uint32_t block_id = 0;  // of the new claim
        std::string layer;           // name, or index in a pool without names
        explicit operator bool() const { return kind != none; }
    };

    BusyTable();
    ~BusyTable();
    BusyTable(const BusyTable&) = delete;
    BusyTable& operator=(const BusyTable&) = delete;

    // The shape must live until remove_pool() and the release of the last claim on it (plans keep it alive).
    void add_pool(const PoolShape* pool);
    // Claims on the pool stay in force until they are released.
    void remove_pool(const PoolShape* pool);

    // Throws std::logic_error if the plan's pool was not added or has been removed, std::length_error if an
    // irregular claim has more than 64 Mi runs.
    Conflict claim(std::uint64_t owner, std::shared_ptr<const StreamPlan> plan);
    // Does `work`, which is over in a moment, while nobody else may claim; not where claim() would find a
    // conflict. Throws as claim() does, and what `work` throws.
    Conflict during(std::shared_ptr<const StreamPlan> plan, const std::function<void()>& work);
    // Everything that this owner has claimed; nothing if it has claimed nothing.
    void release(std::uint64_t owner) noexcept;

  private:
    struct Claim;
    struct Index;  // arenas, and what the live claims hold of them

    Conflict find(Claim& claim);
    bool in_use(const PoolShape* pool) const noexcept;
    void rebuild();

    std::mutex mutex_;
    std::vector<const PoolShape*> pools_;    // registered
    std::vector<const PoolShape*> leaving_;  // removed, but with live claims
    std::unique_ptr<Index> index_;
    std::unordered_map<std::uint64_t, std::vector<std::unique_ptr<Claim>>> claims_;  // by owner
};

}  // namespace kvt::memory
