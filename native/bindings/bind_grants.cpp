#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <numeric>
#include <optional>

#include "bindings/convert.hpp"
#include "bindings/objects.hpp"
#include "bindings/raise.hpp"

namespace kvt::bindings {

namespace {

protocol::Token to_token(nb::bytes raw) {
    protocol::Token token;
    if (raw.size() != token.size()) {
        throw nb::value_error("a token has 16 bytes");
    }
    std::memcpy(token.data(), raw.c_str(), token.size());
    return token;
}

std::uint32_t to_wait_ms(double seconds) {
    if (!(seconds >= 0)) {
        throw nb::value_error("wait_grant_s is not a number of seconds");
    }
    return seconds > 4e6 ? 4'000'000'000u : static_cast<std::uint32_t>(seconds * 1e3);
}

std::shared_ptr<engine::Queue> queue_of(PyQueue* queue) {
    if (queue == nullptr) {
        return nullptr;
    }
    require_own(queue->generation);
    return queue->queue;
}

/// Of the one-sided call, as Python names it.
struct Use {
    nb::bytes token;
    nb::object subset, heads;
    double wait_s;
};

std::shared_ptr<protocol::GrantUse> to_use(const Use& from, const engine::PostArgs& args,
                                           const memory::PoolShape& shape) {
    auto use = std::make_shared<protocol::GrantUse>();
    use->token = to_token(from.token);
    use->wait_ms = to_wait_ms(from.wait_s);
    if (!from.heads.is_none()) {
        const auto slice = nb::cast<nb::tuple>(from.heads);
        use->every_head = false;
        use->head_begin = nb::cast<std::uint32_t>(slice[0]);
        use->head_count = nb::cast<std::uint32_t>(slice[1]);
    }
    if (from.subset.is_none()) {
        return use;
    }
    const auto positions = in_python([&] { return to_positions(from.subset, shape); });
    use->subset.emplace();
    for (std::size_t i = 0; i < positions.size(); ++i) {
        const std::size_t have = positions[i] ? positions[i]->size() : 0,
                          need = args.ids[i] ? args.ids[i]->size() : 0;
        if (have != need) {
            throw nb::value_error(("subset has " + std::to_string(have) + " positions for " +
                                   std::to_string(need) + " block ids")
                                      .c_str());
        }
        use->subset->push_back(positions[i] ? *positions[i] : memory::Ids());
    }
    // They go in one frame, with up to 20 KiB of terms.
    if (use->positions() > (protocol::kMaxControlBodyNbytes - (32u << 10)) / 4) {
        throw nb::value_error("a subset of more than 253,952 positions: split it");
    }
    return use;
}

PyTransfer post(PySession& self, Post common, PyPool& pool, const Use& use, double stall_s, double total_s) {
    engine::PostArgs args = to_args(self, pool, std::move(common));
    args.use = to_use(use, args, *pool.pool->shape());
    const protocol::Time stall = duration("stall_timeout_s", stall_s, false);
    const protocol::Time wait = protocol::Time{args.use->wait_ms} * 1'000'000;
    // The peer's engine answers by itself, when the wait is over at the latest.
    const protocol::Time match = stall > protocol::kNever - wait ? protocol::kNever : stall + wait;
    args.limits = {match, stall, duration("timeout_s", total_s, true)};
    PyTransfer made{self.engine};
    translate([&] {
        made.read = self.connection->read_now(args);
        if (!made.read) {
            made.transfer = self.connection->post(std::move(args));
        }
    });
    return made;
}

void bind_uses(nb::class_<PySession> session) {
    session
        .def(
            "post_read",
            [](PySession& self, PyPool& pool, nb::handle ids, nb::handle key,
               std::optional<std::vector<std::uint32_t>> layers, nb::object heads, nb::bytes token,
               nb::object subset, double wait_s, nb::object src_heads, double stall, double total,
               PyQueue* queue, std::uint64_t tag) {
                return post(self,
                            {protocol::Role::destination, ids, key, std::move(layers), std::move(heads),
                             nullptr, nb::bytes("", 0), queue, tag},
                            pool, {std::move(token), std::move(subset), std::move(src_heads), wait_s}, stall,
                            total);
            },
            nb::arg("pool"), nb::arg("ids").none(), nb::arg("key").none(), nb::arg("layers").none(),
            nb::arg("heads").none(), nb::arg("token"), nb::arg("subset").none(), nb::arg("wait_grant_s"),
            nb::arg("src_heads").none(), nb::arg("stall_timeout_s"), nb::arg("timeout_s"),
            nb::arg("queue").none(), nb::arg("handle_id"))
        .def(
            "post_write",
            [](PySession& self, PyPool& pool, nb::handle ids, nb::handle key,
               std::optional<std::vector<std::uint32_t>> layers, nb::object heads, nb::bytes token,
               nb::object subset, double wait_s, nb::object dst_heads, PyGate* gate, double stall,
               double total, nb::bytes meta, PyQueue* queue, std::uint64_t tag) {
                return post(self,
                            {protocol::Role::source, ids, key, std::move(layers), std::move(heads), gate,
                             std::move(meta), queue, tag},
                            pool, {std::move(token), std::move(subset), std::move(dst_heads), wait_s}, stall,
                            total);
            },
            nb::arg("pool"), nb::arg("ids").none(), nb::arg("key").none(), nb::arg("layers").none(),
            nb::arg("heads").none(), nb::arg("token"), nb::arg("subset").none(), nb::arg("wait_grant_s"),
            nb::arg("dst_heads").none(), nb::arg("gate").none(), nb::arg("stall_timeout_s"),
            nb::arg("timeout_s"), nb::arg("meta"), nb::arg("queue").none(), nb::arg("handle_id"));
}

void bind_leases(nb::class_<PySession> session) {
    session
        .def(
            "hold",
            [](PySession& self, nb::bytes token, double wait_s, PyQueue* queue, std::uint64_t tag,
               bool mapped) {
                require_alive(*self.engine);
                const auto which = to_token(std::move(token));
                const auto wait_ms = to_wait_ms(wait_s);
                auto lease = translate(
                    [&] { return self.connection->hold(which, wait_ms, queue_of(queue), tag, mapped); });
                return PyTransfer{self.engine, nullptr, nullptr, nullptr, std::move(lease)};
            },
            nb::arg("token"), nb::arg("wait_grant_s"), nb::arg("queue").none(), nb::arg("handle_id"),
            nb::arg("mapped") = false)
        .def(
            "refuse_token",
            [](PySession& self, nb::bytes token, const std::string& reason, double remember_s) {
                require_alive(*self.engine);
                const auto which = to_token(std::move(token));
                const protocol::Time remember = duration("remember_s", remember_s, false);
                translate([&] { self.connection->refuse(which, reason, remember); });
            },
            nb::arg("token"), nb::arg("reason"), nb::arg("remember_s"));
}

PyTransfer grant(PyPool& self, nb::handle ids, nb::bytes token, const std::string& mode, nb::bytes to,
                 unsigned readers, double ttl_s, PyQueue* queue, std::uint64_t tag) {
    require_alive(*self.engine);
    if (mode == "write" && !self.pool->writable()) {
        throw nb::value_error("the pool is read-only: nobody can write to it");
    }
    auto made = std::make_shared<engine::GrantHandle>(self.pool);
    made->token = to_token(std::move(token));
    made->mode = mode == "write" ? protocol::GrantMode::write : protocol::GrantMode::read;
    made->to.assign(to.c_str(), to.size());
    made->readers = readers;
    made->ttl = duration("ttl_s", ttl_s, true);
    const auto& groups = self.pool->shape()->groups();
    made->every_block = ids.is_none();
    if (made->every_block) {
        for (const auto& group : groups) {
            made->blocks.emplace_back(group.num_blocks);
            std::iota(made->blocks.back().begin(), made->blocks.back().end(), 0u);
        }
    } else {
        const auto given = in_python([&] { return to_ids(ids, *self.pool->shape()); });
        for (std::size_t g = 0; g < groups.size(); ++g) {
            made->blocks.push_back(given[g] ? *given[g] : memory::Ids());
            for (const std::uint32_t id : made->blocks[g]) {
                if (id >= groups[g].num_blocks) {
                    throw nb::value_error(
                        ("group '" + groups[g].name + "' has no block " + std::to_string(id)).c_str());
                }
            }
        }
    }
    if (const auto target = queue_of(queue)) {
        made->subscribe(target, tag);
    }
    translate([&] { self.engine->grants().add(made); });
    return {self.engine, nullptr, nullptr, std::move(made), nullptr};
}

void bind_owner(nb::class_<PyPool> pool) {
    pool.def("grant", &grant, nb::arg("ids").none(), nb::arg("token"), nb::kw_only(), nb::arg("mode"),
             nb::arg("to"), nb::arg("readers"), nb::arg("ttl_s"), nb::arg("queue").none(),
             nb::arg("handle_id"))
        .def(
            "reuse",
            [](PyPool& self, nb::handle ids) {
                require_alive(*self.engine);
                const auto blocks = in_python([&] { return to_ids(ids, *self.pool->shape()); });
                translate([&] { self.engine->grants().reuse(self.pool->id(), blocks); });
            },
            nb::arg("ids").none());
}

std::string grant_state(const PyTransfer& self) {
    require_alive(*self.engine);
    switch (self.engine->grants().state_of(*self.grant)) {
        case protocol::GrantState::open: return "open";
        case protocol::GrantState::read:
            return self.grant->mode == protocol::GrantMode::read ? "read" : "written";
        case protocol::GrantState::expired: return "expired";
        case protocol::GrantState::revoked: break;
    }
    return "revoked";
}

void revoke(const PyTransfer& self, bool force) {
    require_alive(*self.engine);
    const unsigned times = translate([&] { return self.engine->grants().revoke(self.grant, force); });
    if (times != 0) {
        raise("GrantError", "the grant is mapped by its readers, " + std::to_string(times) +
                                (times == 1 ? " time" : " times") +
                                ": wait until they have left `map_blocks`, or revoke(force=True), and what "
                                "they compute of its blocks raises StaleGrant");
    }
}

void bind_handles(nb::class_<PyTransfer> handle) {
    handle.def("grant_state", &grant_state)
        .def("revoke", &revoke, nb::arg("force"))
        .def("is_held",
             [](const PyTransfer& self) {
                 require_alive(*self.engine);
                 return self.lease->connection()->is_held(*self.lease);
             })
        .def("let_go", [](const PyTransfer& self) {
            require_alive(*self.engine);
            translate([&] { self.lease->connection()->let_go(self.lease); });
        });
}

}  // namespace

void bind_grants(nb::module_& m) {
    bind_uses(nb::borrow<nb::class_<PySession>>(m.attr("Session")));
    bind_leases(nb::borrow<nb::class_<PySession>>(m.attr("Session")));
    bind_owner(nb::borrow<nb::class_<PyPool>>(m.attr("Pool")));
    bind_handles(nb::borrow<nb::class_<PyTransfer>>(m.attr("Transfer")));
    nb::borrow<nb::class_<PyEngine>>(m.attr("Engine")).def("grants", [](PyEngine& self) {
        require_alive(*self.engine);
        const auto counters = self.engine->grants().counters();
        nb::dict out;
        out["made"] = counters.made;
        out["finished"] = counters.finished;
        out["expired"] = counters.expired;
        out["revoked"] = counters.revoked;
        out["open"] = self.engine->grants().open();
        return out;
    });
}

}  // namespace kvt::bindings
