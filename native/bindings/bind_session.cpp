#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "backends/path.hpp"
#include "bindings/convert.hpp"
#include "bindings/objects.hpp"
#include "bindings/raise.hpp"
#include "bindings/statistics.hpp"

namespace kvt::bindings {

protocol::Time duration(const char* name, double seconds, bool may_be_none) {
    if (seconds < 0 && may_be_none) {
        return protocol::kNever;
    }
    if (!(seconds >= 0)) {
        throw nb::value_error((std::string(name) + " is not a number of seconds").c_str());
    }
    return seconds > 1e9 ? protocol::kNever : static_cast<protocol::Time>(seconds * 1e9);
}

engine::PostArgs to_args(PySession& self, PyPool& pool, Post from) {
    require_alive(*self.engine);
    if (pool.engine != self.engine) {  // its id and its claims on bytes mean something else here
        throw nb::value_error("the pool was registered with another Endpoint than this connection's");
    }
    if (from.role == protocol::Role::destination && !pool.pool->writable()) {
        throw nb::value_error("the pool is read-only: it can be sent from, not received into");
    }
    engine::PostArgs args;
    args.role = from.role;
    args.pool = pool.pool;
    args.ids = in_python([&] { return to_ids(from.ids, *pool.pool->shape()); });
    args.key = to_key(from.key, args.key_is_text);
    args.layers = std::move(from.layers);
    if (!from.heads.is_none()) {
        const auto slice = nb::cast<nb::tuple>(from.heads);
        args.heads = {nb::cast<std::uint32_t>(slice[0]), nb::cast<std::uint32_t>(slice[1]), false};
    }
    args.meta.assign(from.meta.c_str(), from.meta.size());
    if (from.gate != nullptr) {
        require_own(from.gate->generation);
        args.gate = from.gate->gate;
    }
    if (from.queue != nullptr) {
        require_own(from.queue->generation);
        args.queue = from.queue->queue;
    }
    args.tag = from.tag;
    return args;
}

namespace {

struct Timeouts {
    double match, stall, total;
};

PyTransfer post(PySession& self, Post common, PyPool& pool, Timeouts timeouts) {
    engine::PostArgs args = to_args(self, pool, std::move(common));
    args.limits = {duration("match_timeout_s", timeouts.match, false),
                   duration("stall_timeout_s", timeouts.stall, false),
                   duration("timeout_s", timeouts.total, true)};
    auto handle = translate([&] { return self.connection->post(std::move(args)); });
    return {self.engine, std::move(handle)};
}

PyTransfer post_message(PySession& self, nb::bytes data, PyTransfer* after, PyQueue* queue,
                        std::uint64_t tag) {
    require_alive(*self.engine);
    const auto* from = reinterpret_cast<const std::byte*>(data.c_str());
    protocol::Bytes bytes(from, from + data.size());
    if (after != nullptr && !after->transfer && !after->read) {
        throw nb::type_error("after= takes a Transfer");
    }
    if (after != nullptr) {
        require_alive(*after->engine);
    }
    if (queue != nullptr) {
        require_own(queue->generation);
    }
    auto handle = translate([&] {
        return self.connection->post_message(std::move(bytes), after == nullptr ? nullptr : after->transfer,
                                             queue == nullptr ? nullptr : queue->queue, tag);
    });
    return {self.engine, nullptr, std::move(handle)};
}

std::string cause_of(const std::string& reason) { return reason.substr(0, reason.find(": ")); }

}  // namespace

namespace {

void bind_opening(nb::class_<PySession>& session) {
    session.def_prop_ro("id", [](const PySession& self) {
        require_alive(*self.engine);
        const std::string id = self.connection->session_id();
        return nb::bytes(id.data(), id.size());
    });
}

void bind_lanes(nb::class_<PySession>& session) {
    session
        .def(
            "adopt",
            [](PySession& self, PySession& other) {
                require_alive(*self.engine);
                require_alive(*other.engine);
                translate([&] { self.connection->adopt(other.connection); });
            },
            nb::arg("other"))
        .def(
            "add_lane",
            [](PySession& self, int fd, std::uint32_t number) {
                Fd own(fd);
                require_alive(*self.engine);
                translate([&] {
                    const auto path = self.connection->path();
                    if (path && path->reserve_lane(number)) {
                        path->add_lane(std::move(own), number);
                    }
                });
            },
            nb::arg("fd"), nb::arg("number"))
        .def("ready", [](PySession& self) {
            require_alive(*self.engine);
            const auto path = self.connection->path();
            return path == nullptr ? self.connection->is_open() : path->lanes_up() >= self.lanes;
        });
}

void add_channel(PySession& self, int fd) {
    Fd own(fd);
    require_alive(*self.engine);
    translate([&] {
        if (const auto path = self.connection->path(); path && path->wants_channel()) {
            path->add_channel(std::move(own));
        }
    });
}

// Where it stands, and what is wrong with it.
nb::tuple channel_of(PySession& self) {
    require_alive(*self.engine);
    using Channel = backends::Path::Channel;
    const auto path = self.connection->path();
    const Channel state = path ? path->channel() : Channel::none;
    return nb::make_tuple(state == Channel::up        ? "up"
                          : state == Channel::awaited ? "awaited"
                                                      : "none",
                          path ? shown(path->channel_refusal()) : std::string());
}

void bind_channel(nb::class_<PySession>& session) {
    session.def("add_channel", &add_channel, nb::arg("fd"))
        .def(
            "refuse_channel",
            [](PySession& self, const std::string& why) {
                require_alive(*self.engine);
                if (const auto path = self.connection->path()) {
                    path->refuse_channel(why);
                }
            },
            nb::arg("why"))
        .def("channel", &channel_of)
        .def(
            "wait_channel",
            [](PySession& self, double timeout_s) {
                require_alive(*self.engine);
                const std::int64_t until = until_of(timeout_s);
                const Calling here(self.engine->callers);
                translate([&] { self.connection->wait_channel(until); });
            },
            nb::arg("timeout_s"));
}

void bind_posts(nb::class_<PySession>& session) {
    session
        .def(
            "post_send",
            [](PySession& self, PyPool& pool, nb::handle ids, nb::handle key,
               std::optional<std::vector<std::uint32_t>> layers, nb::object heads, PyGate* gate, double match,
               double stall, double total, nb::bytes meta, PyQueue* queue, std::uint64_t tag) {
                return post(self,
                            {protocol::Role::source, ids, key, std::move(layers), std::move(heads), gate,
                             std::move(meta), queue, tag},
                            pool, {match, stall, total});
            },
            nb::arg("pool"), nb::arg("ids").none(), nb::arg("key").none(), nb::arg("layers").none(),
            nb::arg("heads").none(), nb::arg("gate").none(), nb::arg("match_timeout_s"),
            nb::arg("stall_timeout_s"), nb::arg("timeout_s"), nb::arg("meta"), nb::arg("queue").none(),
            nb::arg("handle_id"))
        .def(
            "post_recv",
            [](PySession& self, PyPool& pool, nb::handle ids, nb::handle key,
               std::optional<std::vector<std::uint32_t>> layers, nb::object heads, double match, double stall,
               double total, nb::bytes meta, PyQueue* queue, std::uint64_t tag) {
                return post(self,
                            {protocol::Role::destination, ids, key, std::move(layers), std::move(heads),
                             nullptr, std::move(meta), queue, tag},
                            pool, {match, stall, total});
            },
            nb::arg("pool"), nb::arg("ids").none(), nb::arg("key").none(), nb::arg("layers").none(),
            nb::arg("heads").none(), nb::arg("match_timeout_s"), nb::arg("stall_timeout_s"),
            nb::arg("timeout_s"), nb::arg("meta"), nb::arg("queue").none(), nb::arg("handle_id"));
}

void bind_rest(nb::class_<PySession>& session) {
    session
        .def(
            "refuse",
            [](PySession& self, nb::handle key, const std::string& reason, double remember_s) {
                require_alive(*self.engine);
                bool text = false;
                const std::string native = to_key(key, text);
                const auto remember = duration("remember_s", remember_s, false);
                translate([&] { self.connection->refuse(native, reason, remember); });
            },
            nb::arg("key").none(), nb::arg("reason"), nb::arg("remember_s"))
        .def("post_message", &post_message, nb::arg("data"), nb::arg("after").none(), nb::arg("queue").none(),
             nb::arg("handle_id"))
        .def(
            "close",
            [](PySession& self, const std::string& cause) {
                require_alive(*self.engine);
                const bool local = cause == "local" || cause == "closed";
                translate([&] {
                    if (local) {
                        self.connection->close(protocol::Cause::connection_closed,
                                               "the connection was closed", true);
                    } else {
                        self.connection->close(protocol::Cause::peer_lost, cause, false);
                    }
                });
            },
            nb::arg("cause"));
}

void bind_views(nb::class_<PySession>& session) {
    session
        .def(
            "set_peer",
            [](PySession& self, std::string label) {
                require_alive(*self.engine);
                self.connection->set_label(std::move(label));
            },
            nb::arg("label"))
        .def("state",  // takes no lock: a forked child may ask
             [](const PySession& self) {
                 return self.connection->is_lost()   ? "lost"
                        : self.connection->is_open() ? "open"
                                                     : "connecting";
             })
        .def("silent_s",
             [](const PySession& self) {
                 require_alive(*self.engine);
                 return static_cast<double>(self.connection->silent_ns()) / 1e9;
             })
        .def("lost_reason",
             [](const PySession& self) {
                 require_alive(*self.engine);
                 const std::string reason = shown(self.connection->lost_reason());
                 return nb::make_tuple(cause_of(reason), reason);
             })
        .def("backend",
             [](const PySession& self) {
                 require_alive(*self.engine);
                 return self.connection->backend();
             })
        .def("stats", [](const PySession& self) {
            require_alive(*self.engine);
            return statistics_of(*self.connection);
        });
}

}  // namespace

void bind_session(nb::module_& m) {
    nb::class_<PySession> session(m, "Session");
    bind_opening(session);
    bind_lanes(session);
    bind_channel(session);
    bind_posts(session);
    bind_rest(session);
    bind_views(session);
}

}  // namespace kvt::bindings
