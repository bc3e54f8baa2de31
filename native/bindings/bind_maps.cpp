// Grants that are read where they lie: what Python needs to lay arrays over a peer's blocks.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/objects.hpp"
#include "bindings/raise.hpp"

namespace kvt::bindings {

namespace {

using backends::FoundGrant;
using backends::Standing;

/// A grant of the peer's; its memory stays mapped while this lives, also after its connection.
struct PyShownGrant {
    EnginePtr engine;
    std::shared_ptr<const FoundGrant> grant;
};

// Both as Pool's constructor takes them.
nb::list groups_of(const PyShownGrant& self) {
    nb::list out;
    for (const auto& group : self.grant->shape->groups()) {
        out.append(nb::make_tuple(group.name, group.num_blocks, group.num_heads, group.opaque, group.dtype,
                                  group.order, group.kv, group.tokens_per_block));
    }
    return out;
}

nb::list layers_of(const PyShownGrant& self) {
    nb::list out;
    for (const auto& layer : self.grant->shape->layers()) {
        nb::list parts;
        for (const auto& part : layer.parts) {
            nb::list axes;
            for (const auto& axis : part.axes) {
                axes.append(nb::make_tuple(axis.count, axis.stride));
            }
            parts.append(nb::make_tuple(part.base, part.block_stride, axes, part.itemsize, part.head_axis));
        }
        out.append(nb::make_tuple(layer.name, layer.group, parts));
    }
    return out;
}

std::optional<std::vector<memory::Ids>> blocks_of(const PyShownGrant& self) {
    return self.grant->every_block ? std::nullopt : std::optional(self.grant->blocks);
}

const char* standing_of(const PyShownGrant& self) {
    require_alive(*self.engine);
    switch (translate([&] { return self.grant->standing(); })) {
        case Standing::good: return "good";
        case Standing::owner_gone: return "owner gone";
        case Standing::ended: break;
    }
    return "ended";
}

bool wait_answer(const PyTransfer& self, double timeout_s) {
    require_alive(*self.engine);
    engine::Handle& answer = self.lease->answer;
    return wait_with_signals(self.engine, timeout_s, [&](std::int64_t until) {
        engine::Waiter waiter;
        if (answer.subscribe(&waiter)) {
            waiter.wait(until);
            answer.unsubscribe(&waiter);
        }
        return answer.done();
    });
}

}  // namespace

void bind_maps(nb::module_& m) {
    nb::class_<PyShownGrant>(m, "ShownGrant")
        .def_prop_ro("mapped", [](const PyShownGrant& self) { return self.grant->mapped; })
        .def_prop_ro("named", [](const PyShownGrant& self) { return self.grant->shape->named(); })
        .def("groups", &groups_of)
        .def("layers", &layers_of)
        .def("blocks", &blocks_of)
        .def("standing", &standing_of);
    nb::borrow<nb::class_<PyTransfer>>(m.attr("Transfer"))
        .def("wait_answer", &wait_answer, nb::arg("timeout_s"))
        .def("shown", [](const PyTransfer& self) -> std::optional<PyShownGrant> {
            require_alive(*self.engine);
            auto grant = translate([&] { return self.lease->connection()->shown(self.lease->token); });
            return grant ? std::optional(PyShownGrant{self.engine, std::move(grant)}) : std::nullopt;
        });
}

}  // namespace kvt::bindings
