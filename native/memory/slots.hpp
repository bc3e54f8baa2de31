// Claims in a regular arena: by block id, column and heads.
//
// Here: the table of one arena, and the question whether a new use of it collides.
// Not here: addresses (address_set.hpp), owners' lifetimes (busy.hpp).
// Invariant: slots_[id].count is the number of live uses with that id, whatever their columns and heads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "memory/plan.hpp"

namespace kvt::memory {

// A set of columns of one arena.
class ColumnSet {
  public:
    explicit ColumnSet(std::uint32_t columns) : words_((columns + 63) / 64) {}
    bool insert(std::uint32_t column);  // false if it was there
    bool contains(std::uint32_t column) const { return (words_[column / 64] >> (column % 64)) & 1; }
    bool intersects(const ColumnSet& other) const;

  private:
    std::vector<std::uint64_t> words_;
};

// What one claim holds of one group in a regular arena: the same heads of the same columns of each block.
struct Use {
    std::uint64_t owner;
    std::uint32_t arena, group;
    const Ids* ids;  // kept alive by the claim's plan
    Heads heads;
    ColumnSet columns;
};

class SlotTable {
  public:
    explicit SlotTable(std::uint64_t num_blocks) : num_blocks_(num_blocks), slots_(nullptr, &std::free) {}

    struct Hit {
        const Use* other;  // the new use itself: an id stands in it twice
        std::uint32_t id;
    };
    // Whether `use` collides with itself, with `siblings` (later uses of this arena by the same claim) or
    // with a live use.
    std::optional<Hit> find(const Use& use, const Use* siblings, std::size_t count);

    void reserve(std::size_t uses);  // so that as many calls of add() can't fail
    void add(const Use* use) noexcept;
    void remove(const Use* use) noexcept;

  private:
    struct Slot {
        std::uint32_t stamp;  // of the last use looked for here: finds doubles without clearing anything
        std::uint32_t count;
    };
    void allocate();
    std::uint32_t next_stamp();
    std::optional<std::uint32_t> first_stamped(const Ids& ids, std::uint32_t stamp) const;

    std::uint64_t num_blocks_;
    // By id, made by the first claim. From calloc, so that a pool of many small blocks costs the pages that
    // claims have touched.
    std::unique_ptr<Slot[], decltype(&std::free)> slots_;
    std::uint32_t stamp_ = 0;
    std::vector<const Use*> live_;
};

}  // namespace kvt::memory
