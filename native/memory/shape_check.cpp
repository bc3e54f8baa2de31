// Checks of shapes. Sums are made in 128 bits from terms that were checked to fit 65, so none can wrap.
#include "memory/shape_check.hpp"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <utility>

namespace kvt::memory {
namespace {

__extension__ typedef __int128
    Wide;  // an extension that both compilers have, which -Wpedantic would point out

constexpr Wide kEndOfMemory = Wide{1} << 64;
constexpr Wide kMaxOffset =
    Wide{1} << 62;  // within a block, and from a block to the next: so that int64 holds sums of two
constexpr std::uint64_t kMaxBlocks = std::uint64_t{1} << 32;  // ids have 32 bits
constexpr std::uint64_t kMaxCount = std::uint64_t{1} << 32;   // of one axis
constexpr std::size_t kMaxAxes = 16;
constexpr std::uint64_t kMaxPieceBytes = std::uint64_t{1} << 48;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

// Bytes below (low <= 0) and above the first element that an axis spans.
struct Span {
    Wide low = 0, high = 0;
    void add(std::uint64_t count, std::int64_t stride) {
        const Wide reach = Wide{count - 1} * stride;
        if (reach <= -kEndOfMemory || reach >= kEndOfMemory) refuse("a stride leads out of memory");
        (reach < 0 ? low : high) += reach;
    }
};

Span span_of_block(const Part& part) {
    Span span;
    for (const Axis& axis : part.axes) span.add(axis.count, axis.stride);
    span.high += part.itemsize;
    if (span.low < -kMaxOffset || span.high > kMaxOffset) refuse("a block spans more than 2^62 bytes");
    return span;
}

// No element of a block may share a byte with another: such a destination would end up with whichever was
// written last. Strides nest, each at least as long as all that lies within it; other layouts without overlap
// exist, but no one's tensors have them.
void check_no_overlap(const Part& part) {
    std::vector<std::pair<std::uint64_t, std::uint64_t>> axes;  // length of stride, count
    for (const Axis& axis : part.axes) {
        const auto stride = static_cast<std::uint64_t>(axis.stride);
        if (axis.count > 1)
            axes.emplace_back(axis.stride < 0 ? std::uint64_t{0} - stride : stride, axis.count);
    }
    std::sort(axes.begin(), axes.end());
    Wide inside = part.itemsize;
    for (const auto& [stride, count] : axes) {
        if (Wide{stride} < inside)
            refuse("elements of one block overlap (a stride is shorter than what it steps over)");
        inside += Wide{count - 1} * Wide{stride};
    }
}

void check_part(const Part& part, const Group& group) {
    if (part.itemsize == 0) refuse("an element has no bytes");
    if (part.axes.size() > kMaxAxes) refuse("a block has more than " + std::to_string(kMaxAxes) + " axes");
    Wide nbytes = part.itemsize;
    for (const Axis& axis : part.axes) {
        if (axis.count == 0) refuse("an axis of a block is empty");
        if (axis.count > kMaxCount) refuse("an axis of a block has more than 2^32 items");
        nbytes *= axis.count;
        if (nbytes > kMaxPieceBytes) break;
    }
    if (nbytes > kMaxPieceBytes) refuse("a block has more than 2^48 bytes");
    if (part.head_axis < -1 || part.head_axis >= static_cast<int>(part.axes.size()))
        refuse("head_axis names no axis of a block");
    if (part.head_axis >= 0 && part.axes[static_cast<std::size_t>(part.head_axis)].count != group.num_heads)
        refuse("its head axis has " +
               std::to_string(part.axes[static_cast<std::size_t>(part.head_axis)].count) +
               " heads, its group " + std::to_string(group.num_heads));
    part_extent(part, group.num_blocks);
    check_no_overlap(part);
}

// The start of the name tells which it is, cut where a character starts.
void check_name(const char* of_what, const std::string& name) {
    if (name.size() <= kMaxNameNbytes) return;
    std::size_t shown = 32;
    while (shown > 28 && (static_cast<unsigned char>(name[shown]) & 0xc0u) == 0x80u) --shown;
    refuse(std::string(of_what) + " '" + name.substr(0, shown) + "...' has a name of " +
           std::to_string(name.size()) + " bytes in UTF-8, the most is " + std::to_string(kMaxNameNbytes));
}

void check_count(const char* of_what, std::size_t count, std::size_t most) {
    if (count > most)
        refuse("a pool of " + std::to_string(count) + " " + of_what + ", the most is " +
               std::to_string(most) + ": register several pools");
}

void check_groups(const std::vector<Group>& groups) {
    if (groups.empty()) refuse("a pool needs a group");
    check_count("groups", groups.size(), kMaxGroups);
    std::set<std::string> names;
    for (const Group& group : groups) {
        check_name("group", group.name);
        if (!names.insert(group.name).second) refuse("two groups are named '" + group.name + "'");
        if (group.num_blocks == 0) refuse("group '" + group.name + "' has no blocks");
        if (group.num_blocks > kMaxBlocks) refuse("group '" + group.name + "' has more than 2^32 blocks");
        if (group.num_heads > kMaxCount - 1)
            refuse("group '" + group.name + "' has more than 2^32 - 1 heads");
    }
}

void check_layer(const Layer& layer, const std::vector<Group>& groups) {
    if (layer.group >= groups.size())
        refuse("it names group " + std::to_string(layer.group) + ", the pool has " +
               std::to_string(groups.size()));
    if (layer.parts.empty()) refuse("it has no arrays");
    if (layer.parts.size() > kMaxAxes) refuse("it has more than " + std::to_string(kMaxAxes) + " arrays");
    for (const Part& part : layer.parts) check_part(part, groups[layer.group]);
}

}  // namespace

void check_shape(const std::vector<Group>& groups, const std::vector<Layer>& layers, bool named) {
    check_groups(groups);
    if (layers.empty()) refuse("a pool needs a layer");
    check_count("layers", layers.size(), kMaxLayers);
    std::set<std::string> names;
    for (std::uint32_t i = 0; i < layers.size(); ++i) {
        check_name("layer", layers[i].name);
        if (named && !names.insert(layers[i].name).second)
            refuse("two layers are named '" + layers[i].name + "'");
        try {
            check_layer(layers[i], groups);
        } catch (const std::invalid_argument& error) {
            refuse(describe_layer(layers, i) + ": " + error.what());
        }
    }
}

Extent part_extent(const Part& part, std::uint64_t num_blocks) {
    if (part.block_stride < -kMaxOffset || part.block_stride > kMaxOffset)
        refuse("a block stride of more than 2^62 bytes");
    Span span = span_of_block(part);
    span.add(num_blocks, part.block_stride);
    const Wide begin = Wide{part.base} + span.low, end = Wide{part.base} + span.high;
    // The last address itself is left out, so that an end always fits.
    if (begin < 0 || end >= kEndOfMemory) refuse("its blocks reach out of memory");
    return {static_cast<std::uintptr_t>(begin), static_cast<std::uintptr_t>(end)};
}

std::string describe_layer(const std::vector<Layer>& layers, std::uint32_t layer) {
    const std::string& name = layers.at(layer).name;
    return name.empty() ? "layer " + std::to_string(layer) : "layer '" + name + "'";
}

}  // namespace kvt::memory
