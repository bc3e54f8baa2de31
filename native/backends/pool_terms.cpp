#include "backends/pool_terms.hpp"

namespace kvt::backends {

protocol::PoolTerms terms_of(const memory::PoolShape& shape) {
    protocol::PoolTerms terms;
    terms.named = shape.named();
    for (const memory::Group& group : shape.groups()) {
        terms.groups.push_back({group.name, group.opaque, group.dtype, group.order, group.kv,
                                static_cast<std::uint32_t>(group.tokens_per_block)});
    }
    for (const memory::Layer& layer : shape.layers()) {
        terms.layers.push_back({layer.name, static_cast<std::uint16_t>(layer.group)});
    }
    return terms;
}

}  // namespace kvt::backends
