#include "backends/shm_pool.hpp"

#include <algorithm>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

namespace kvt::backends {

namespace {

using memory::PoolShape;
using protocol::Reader;
using protocol::Violation;
using protocol::Writer;

constexpr std::size_t kMaxName = 255, kMaxParts = 2, kMaxAxes = 16;
constexpr std::size_t kPartNbytes = 36, kAxisNbytes = 16, kLayerNbytes = 10, kGroupNbytes = 37;

const memory::SharedSegment* segment_of(const memory::Extent& extent,
                                        const std::vector<memory::SharedSegment>& segments) {
    for (const auto& segment : segments) {
        if (extent.begin >= segment.base && extent.end - segment.base <= segment.nbytes) {
            return &segment;
        }
    }
    return nullptr;
}

bool all_within(const PoolShape& shape, const std::vector<memory::SharedSegment>& segments) {
    for (std::uint32_t layer = 0; layer < shape.layers().size(); ++layer) {
        for (std::uint32_t part = 0; part < shape.layers()[layer].parts.size(); ++part) {
            if (segment_of(shape.extent(layer, part), segments) == nullptr) {
                return false;
            }
        }
    }
    return true;
}

void write_part(Writer& out, const memory::Part& part, std::uint64_t segment, std::uint64_t base) {
    out.integer(segment);
    out.integer(base);
    out.integer(static_cast<std::uint64_t>(part.block_stride));
    out.integer(part.itemsize);
    out.integer(static_cast<std::uint8_t>(part.head_axis + 1));
    out.integer(static_cast<std::uint32_t>(part.axes.size()));
    for (const memory::Axis& axis : part.axes) {
        out.integer(axis.count);
        out.integer(static_cast<std::uint64_t>(axis.stride));
    }
}

memory::Part read_part(Reader& in, std::uint64_t& segment) {
    memory::Part part{};
    segment = in.integer<std::uint64_t>();
    part.base = in.integer<std::uint64_t>();
    part.block_stride = static_cast<std::int64_t>(in.integer<std::uint64_t>());
    part.itemsize = in.integer<std::uint64_t>();
    part.head_axis = int{in.integer<std::uint8_t>()} - 1;
    const std::size_t axes = in.count(kMaxAxes, kAxisNbytes);
    for (std::size_t i = 0; i < axes; ++i) {
        const auto count = in.integer<std::uint64_t>();
        part.axes.push_back({count, static_cast<std::int64_t>(in.integer<std::uint64_t>())});
    }
    return part;
}

void write_group(Writer& out, const memory::Group& group) {
    out.text(group.name);
    out.integer(group.num_blocks);
    out.integer(group.num_heads);
    out.integer(static_cast<std::uint8_t>(group.opaque ? 1 : 0));
    for (const std::string* text : {&group.dtype, &group.order, &group.kv}) {
        out.text(*text);
    }
    out.integer(group.tokens_per_block);
}

memory::Group read_group(Reader& in) {
    memory::Group group{};
    group.name = in.text(kMaxName);
    group.num_blocks = in.integer<std::uint64_t>();
    group.num_heads = in.integer<std::uint64_t>();
    group.opaque = in.integer<std::uint8_t>() != 0;
    for (std::string* text : {&group.dtype, &group.order, &group.kv}) {
        *text = in.text(kMaxName);
    }
    group.tokens_per_block = in.integer<std::uint64_t>();
    return group;
}

// Where each part lies, by layer and part: the segment that it must lie in.
using Places = std::vector<std::vector<std::shared_ptr<const PeerSegment>>>;

void check_places(const PoolShape& shape, const Places& places) {
    for (std::uint32_t layer = 0; layer < places.size(); ++layer) {
        for (std::uint32_t part = 0; part < places[layer].size(); ++part) {
            const auto& segment = places[layer][part];
            shape.require_within(layer, part, reinterpret_cast<std::uintptr_t>(segment->data()),
                                 segment->size());
        }
    }
}

std::vector<memory::Layer> read_layers(Reader& in, bool mapped, bool named, const PeerSegments& segments,
                                       Places& places) {
    std::vector<memory::Layer> layers;
    const std::size_t count = in.count(memory::kMaxLayers, kLayerNbytes);
    for (std::size_t i = 0; i < count; ++i) {
        std::string name = in.text(kMaxName);
        memory::Layer layer{named ? std::move(name) : std::to_string(i), in.integer<std::uint32_t>(), {}};
        places.emplace_back();
        const std::size_t parts = in.count(kMaxParts, kPartNbytes);
        for (std::size_t k = 0; k < parts; ++k) {
            std::uint64_t id = 0;
            memory::Part part = read_part(in, id);
            if (mapped) {
                auto segment = segments.find(id);
                if (segment == nullptr || part.base > segment->size()) {
                    throw Violation("a pool of shared memory lies in a segment that isn't there");
                }
                part.base += reinterpret_cast<std::uintptr_t>(segment->data());
                places.back().push_back(std::move(segment));
            }
            layer.parts.push_back(std::move(part));
        }
        layers.push_back(std::move(layer));
    }
    return layers;
}

}  // namespace

protocol::Bytes encode_shm_pool(const PoolShape& shape, const std::vector<memory::SharedSegment>& segments) {
    protocol::Bytes out;
    Writer writer(out);
    const bool mapped = all_within(shape, segments);
    writer.integer(static_cast<std::uint8_t>(mapped ? 1 : 0));
    writer.integer(static_cast<std::uint8_t>(shape.named() ? 1 : 0));
    writer.integer(static_cast<std::uint32_t>(shape.groups().size()));
    for (const auto& group : shape.groups()) {
        write_group(writer, group);
    }
    writer.integer(static_cast<std::uint32_t>(shape.layers().size()));
    for (std::uint32_t i = 0; i < shape.layers().size(); ++i) {
        const auto& layer = shape.layers()[i];
        writer.text(shape.named() ? layer.name : std::string());
        writer.integer(layer.group);
        writer.integer(static_cast<std::uint32_t>(layer.parts.size()));
        for (std::uint32_t k = 0; k < layer.parts.size(); ++k) {
            const auto* const segment = mapped ? segment_of(shape.extent(i, k), segments) : nullptr;
            write_part(writer, layer.parts[k], segment ? segment->id : 0,
                       layer.parts[k].base - (segment ? segment->base : 0));
        }
    }
    return out;
}

ShmPool decode_shm_pool(std::span<const std::byte> raw, const PeerSegments& segments) {
    Reader in(raw);
    ShmPool pool;
    pool.mapped = in.integer<std::uint8_t>() != 0;
    const bool named = in.integer<std::uint8_t>() != 0;
    std::vector<memory::Group> groups;
    const std::size_t count = in.count(memory::kMaxGroups, kGroupNbytes);
    for (std::size_t i = 0; i < count; ++i) {
        groups.push_back(read_group(in));
    }
    Places places;
    auto layers = read_layers(in, pool.mapped, named, segments, places);
    in.finish();
    try {
        pool.shape = std::make_shared<const PoolShape>(std::move(groups), std::move(layers), named,
                                                       kMostShmSegments);
        pool.terms = std::make_shared<const protocol::PoolTerms>(terms_of(*pool.shape));
        if (pool.mapped) {
            check_places(*pool.shape, places);
        }
    } catch (const std::length_error& too_long) {
        throw protocol::Excess(std::string("a pool of shared memory: ") + too_long.what());
    } catch (const std::logic_error& wrong) {
        throw Violation(std::string("a pool of shared memory can't be: ") + wrong.what());
    }
    constexpr std::uint64_t kOfAByte = 4, kOfASegment = sizeof(memory::Segment) + sizeof(std::uint64_t);
    pool.kept_nbytes = raw.size() * kOfAByte + pool.shape->cached_segments() * kOfASegment;
    for (auto& of_layer : places) {
        std::move(of_layer.begin(), of_layer.end(), std::back_inserter(pool.segments));
    }
    std::sort(pool.segments.begin(), pool.segments.end());
    pool.segments.erase(std::unique(pool.segments.begin(), pool.segments.end()), pool.segments.end());
    return pool;
}

protocol::Bytes encode_shm_location(const ShmLocation& location, const memory::StreamPlan& plan) {
    protocol::Bytes out;
    Writer writer(out);
    writer.integer(location.pool);
    writer.integer(location.guard.index);
    writer.integer(location.guard.generation);
    const memory::Heads heads = plan.heads();
    writer.integer(static_cast<std::uint8_t>(heads.all ? 1 : 0));
    writer.integer(heads.begin);
    writer.integer(heads.count);
    writer.integer(static_cast<std::uint32_t>(plan.layer_count()));
    for (std::size_t i = 0; i < plan.layer_count(); ++i) {
        writer.integer(plan.layer(i));
    }
    const auto groups = static_cast<std::uint32_t>(plan.shape()->groups().size());
    std::vector<bool> used(groups, false);
    for (std::size_t i = 0; i < plan.layer_count(); ++i) {
        used[plan.shape()->layers()[plan.layer(i)].group] = true;
    }
    writer.integer(groups);
    for (std::uint32_t group = 0; group < groups; ++group) {
        const memory::Ids none, &ids = used[group] ? plan.ids(group) : none;
        writer.integer(static_cast<std::uint32_t>(ids.size()));
        writer.bytes(std::as_bytes(std::span(ids)));  // both ends are on one host: of one byte order
    }
    return out;
}

ShmLocation decode_shm_location(Reader& in) {
    ShmLocation location;
    location.pool = in.integer<std::uint64_t>();
    location.guard.index = in.integer<std::uint32_t>();
    location.guard.generation = in.integer<std::uint64_t>();
    return location;
}

std::shared_ptr<const memory::StreamPlan> decode_shm_plan(Reader& in, const ShmPool& pool,
                                                          std::uint64_t nbytes) {
    memory::Heads heads{};
    heads.all = in.integer<std::uint8_t>() != 0;
    heads.begin = in.integer<std::uint32_t>();
    heads.count = in.integer<std::uint32_t>();
    std::vector<std::uint32_t> layers(in.count(memory::kMaxLayers, 4));
    for (std::uint32_t& layer : layers) {
        layer = in.integer<std::uint32_t>();
    }
    std::vector<std::shared_ptr<const memory::Ids>> ids(in.count(memory::kMaxGroups, 4));
    for (auto& of_group : ids) {
        const auto raw = in.take(in.count(protocol::kMaxControlBodyNbytes / 4, 4) * 4);
        auto some = std::make_shared<memory::Ids>(raw.size() / 4);
        if (!raw.empty()) {  // else there is no data() that memcpy may be given
            std::memcpy(some->data(), raw.data(), raw.size());
        }
        of_group = std::move(some);
    }
    in.finish();
    try {
        auto plan = std::make_shared<const memory::StreamPlan>(pool.shape, std::move(layers), std::move(ids),
                                                               heads);
        if (plan->nbytes() != nbytes) {
            throw Violation("a location's bytes aren't those of its transfer");
        }
        return plan;
    } catch (const std::logic_error& wrong) {
        throw Violation(std::string("a location can't be: ") + wrong.what());
    }
}

}  // namespace kvt::backends
