// Sorting memory into arenas. Cold: runs when a pool is registered or leaves.
//
// Theory of operation. Parts that are equal are one *column*. Columns whose extents overlap, in a chain, are
// a *cluster*. A cluster is regular if all its columns have one block stride S and the bytes of their blocks
// 0, taken modulo S, don't overlap: then a byte of any block tells its column and, since it lies at a known
// place of its column's block, its id. (So the layers of one array in which all layers of a block stand
// together are regular too.) Groups that share a column, or an irregular cluster, are in one arena.
#include "memory/arena.hpp"

#include <algorithm>
#include <numeric>
#include <tuple>

namespace kvt::memory {
namespace {

struct Item {  // one part of one layer of one pool
    const PoolShape* pool;
    std::uint32_t layer, part;
    std::uint32_t group;  // counted over all pools
    Extent extent;
    const Part& strided() const { return pool->layers()[layer].parts[part]; }
};

struct Column {
    Extent extent;
    std::vector<std::size_t> items;
    const Part* part;
};

auto order_of(const Part& part) {
    return std::tuple(part.base, part.block_stride, part.itemsize, part.head_axis, part.axes.size());
}

bool before(const Part& a, const Part& b) {
    if (order_of(a) != order_of(b)) return order_of(a) < order_of(b);
    return std::lexicographical_compare(a.axes.begin(), a.axes.end(), b.axes.begin(), b.axes.end(),
                                        [](const Axis& x, const Axis& y) {
                                            return std::tie(x.count, x.stride) < std::tie(y.count, y.stride);
                                        });
}

std::vector<Column> columns_of(const std::vector<Item>& items) {
    std::vector<std::size_t> order(items.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(),
              [&](std::size_t a, std::size_t b) { return before(items[a].strided(), items[b].strided()); });
    std::vector<Column> columns;
    for (const std::size_t i : order) {
        const Item& item = items[i];
        if (columns.empty() || !(*columns.back().part == item.strided()))
            columns.push_back({item.extent, {}, &item.strided()});
        Extent& extent = columns.back().extent;  // groups may see more or fewer blocks of the same memory
        extent = {std::min(extent.begin, item.extent.begin), std::max(extent.end, item.extent.end)};
        columns.back().items.push_back(i);
    }
    std::sort(columns.begin(), columns.end(),
              [](const Column& a, const Column& b) { return a.extent.begin < b.extent.begin; });
    return columns;
}

std::uint64_t length(std::int64_t stride) {
    return stride < 0 ? std::uint64_t{0} - static_cast<std::uint64_t>(stride)
                      : static_cast<std::uint64_t>(stride);
}

// The bytes of a column's block 0 modulo `stride`. False if there are more than that (as with a stride of 0).
bool append_remainders(const Part& part, std::uint64_t stride, std::vector<Extent>& out) {
    for (const Segment& segment : part_segments(part, 0, Heads::every())) {
        if (segment.nbytes > stride) return false;
        const std::uint64_t begin = (part.base + static_cast<std::uint64_t>(segment.offset)) % stride,
                            end = begin + segment.nbytes;
        out.push_back({begin, std::min(end, stride)});
        if (end > stride) out.push_back({0, end - stride});
    }
    return true;
}

bool is_regular(const Column* first, const Column* last) {
    const std::uint64_t stride = length(first->part->block_stride);
    std::vector<Extent> taken;
    for (const Column* column = first; column != last; ++column)
        if (length(column->part->block_stride) != stride || !append_remainders(*column->part, stride, taken))
            return false;
    std::sort(taken.begin(), taken.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
    return std::adjacent_find(taken.begin(), taken.end(), [](const Extent& a, const Extent& b) {
               return b.begin < a.end;
           }) == taken.end();
}

class Unions {
  public:
    explicit Unions(std::size_t n) : parent_(n), irregular_(n) {
        std::iota(parent_.begin(), parent_.end(), std::uint32_t{0});
    }
    std::uint32_t root(std::uint32_t i) {
        while (parent_[i] != i) i = parent_[i] = parent_[parent_[i]];
        return i;
    }
    void join(std::uint32_t a, std::uint32_t b) {
        a = root(a), b = root(b);
        parent_[b] = a;
        irregular_[a] = irregular_[a] || irregular_[b];
    }
    void spoil(std::uint32_t i) { irregular_[root(i)] = true; }
    bool irregular(std::uint32_t i) { return irregular_[root(i)]; }

  private:
    std::vector<std::uint32_t> parent_;
    std::vector<bool> irregular_;
};

void join_groups(const std::vector<Item>& items, const std::vector<Column>& columns, Unions& groups) {
    for (const Column& column : columns)
        for (const std::size_t i : column.items) groups.join(items[column.items[0]].group, items[i].group);
    for (std::size_t first = 0, last; first < columns.size(); first = last) {
        std::uintptr_t end = columns[first].extent.end;
        for (last = first + 1; last < columns.size() && columns[last].extent.begin < end; ++last)
            end = std::max(end, columns[last].extent.end);
        if (is_regular(&columns[first], columns.data() + last)) continue;
        const std::uint32_t group = items[columns[first].items[0]].group;
        for (std::size_t c = first + 1; c < last; ++c) groups.join(group, items[columns[c].items[0]].group);
        groups.spoil(group);
    }
}

std::vector<Item> items_of(const std::vector<const PoolShape*>& pools) {
    std::vector<Item> items;
    std::uint32_t first_group = 0;
    for (const PoolShape* pool : pools) {
        for (std::uint32_t l = 0; l < pool->layers().size(); ++l)
            for (std::uint32_t p = 0; p < pool->layers()[l].parts.size(); ++p)
                items.push_back({pool, l, p, first_group + pool->layers()[l].group, pool->extent(l, p)});
        first_group += static_cast<std::uint32_t>(pool->groups().size());
    }
    return items;
}

}  // namespace

ArenaMap::ArenaMap(const std::vector<const PoolShape*>& pools) {
    const std::vector<Item> items = items_of(pools);
    const std::vector<Column> columns = columns_of(items);
    std::size_t groups = 0;
    for (const PoolShape* pool : pools) groups += pool->groups().size();
    Unions unions(groups);
    join_groups(items, columns, unions);

    std::map<std::uint32_t, std::uint32_t> arena_of_root;
    std::uint32_t group = 0;  // counted over all pools, as in items
    for (const PoolShape* pool : pools) {
        Place& place = places_[pool];
        for (const Group& of : pool->groups()) {
            const std::uint32_t root = unions.root(group++);
            const auto [at, fresh] = arena_of_root.try_emplace(root,
                                                               static_cast<std::uint32_t>(arenas_.size()));
            if (fresh) arenas_.push_back({!unions.irregular(root), 0, 0});
            arenas_[at->second].num_blocks = std::max(arenas_[at->second].num_blocks, of.num_blocks);
            place.arena_of_group.push_back(at->second);
        }
        for (const Layer& layer : pool->layers()) place.columns_of_layer.emplace_back(layer.parts.size());
    }
    for (const Column& column : columns) {
        const std::uint32_t number = arenas_[arena_of_root.at(unions.root(items[column.items[0]].group))]
                                         .columns++;
        for (const std::size_t i : column.items)
            places_[items[i].pool].columns_of_layer[items[i].layer][items[i].part] = number;
    }
}

const ArenaMap::Place* ArenaMap::find(const PoolShape* pool) const {
    const auto found = places_.find(pool);
    return found == places_.end() ? nullptr : &found->second;
}

}  // namespace kvt::memory
