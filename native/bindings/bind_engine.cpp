#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "backends/inproc.hpp"
#include "backends/shm_path.hpp"
#include "backends/tcp.hpp"
#include "base/clock.hpp"
#include "bindings/convert.hpp"
#include "bindings/objects.hpp"
#include "bindings/raise.hpp"
#include "bindings/statistics.hpp"

namespace kvt::bindings {

namespace {

nb::tuple event_tuple(const engine::Event& event) {
    using Kind = engine::Event::Kind;
    switch (event.kind) {
        case Kind::accepted:
            return nb::make_tuple("accepted", event.listener, event.fd,
                                  nb::bytes(event.preamble.data(), event.preamble.size()));
        case Kind::lost:
            return nb::make_tuple("lost", nb::bytes(event.session_id.data(), event.session_id.size()),
                                  event.cause, shown(event.text));
        case Kind::dropped:
            return nb::make_tuple("dropped", nb::bytes(event.session_id.data(), event.session_id.size()),
                                  event.count);
        case Kind::channel:
            return nb::make_tuple("channel", nb::bytes(event.session_id.data(), event.session_id.size()),
                                  event.cause, shown(event.text));
        case Kind::log: break;
    }
    return nb::make_tuple("log", event.level, shown(event.text));
}

// What both sides say of their limits: ours, and what the peer holds us to.
protocol::SessionConfig session_config(const engine::Engine& engine, const std::string& protection,
                                       std::uint32_t peer_unmatched, std::uint32_t peer_regions,
                                       std::uint64_t peer_message_queue_nbytes) {
    protocol::SessionConfig config = engine.options().session;
    config.peer_unmatched = peer_unmatched;
    config.peer_regions = peer_regions;
    config.message_window_nbytes = peer_message_queue_nbytes / 2;
    if (protection == "digest") {
        config.digest = protocol::DigestKind::crc32c;
    } else if (protection != "plain") {
        throw std::invalid_argument("protection '" + protection + "' is not one that this build has");
    }
    return config;
}

void attach_tcp(PySession& session, Fd control, const std::string& session_id,
                const protocol::SessionConfig& config, const backends::TcpOptions& options, int peer_pid,
                bool shared_memory) {
    engine::Engine& engine = *session.engine;
    if (engine.closed()) {
        throw engine::NotUsable(protocol::Cause::connection_closed, "the endpoint is closed");
    }
    ::fcntl(control.get(), F_SETFL, ::fcntl(control.get(), F_GETFL) | O_NONBLOCK);
    auto stream = std::make_shared<backends::TcpPath>(session.connection, engine.reactor(), engine.movers(),
                                                      std::move(control), options);
    std::shared_ptr<backends::Path> path = stream;
    if (shared_memory) {
        path = std::make_shared<backends::ShmPath>(session.connection, engine.reactor(), engine.movers(),
                                                   stream);
    }
    engine.rename(session.connection, session_id);
    session.connection->open(path, config);
    stream->start();
    if (peer_pid > 0) {
        session.connection->watch_process(peer_pid);
    }
    session.lanes = options.lanes;
    engine.admission().retry_joins();
}

PySession open_session(PyEngine& self, int control_fd, nb::bytes session_id, const std::string& protection,
                       unsigned lanes, std::uint64_t chunk_nbytes, int peer_pid, const std::string& backend,
                       std::uint32_t peer_unmatched, std::uint32_t peer_regions,
                       std::uint64_t peer_message_queue_nbytes, int socket_buffer_nbytes,
                       nb::bytes peer_incarnation, std::uint64_t capabilities, bool shared_memory) {
    Fd control(control_fd);  // ours from here on, whatever the outcome
    require_alive(*self.engine);
    const std::string id(session_id.c_str(), session_id.size());
    const std::string reader(peer_incarnation.c_str(), peer_incarnation.size());
    return translate([&] {
        auto config = session_config(*self.engine, protection, peer_unmatched, peer_regions,
                                     peer_message_queue_nbytes);
        config.chunk_nbytes = chunk_nbytes;
        config.capabilities = capabilities;
        PySession session{self.engine, self.engine->new_connection(id), 0};
        session.connection->set_reader(reader);
        attach_tcp(session, std::move(control), id, config,
                   {lanes, socket_buffer_nbytes, config.digest, backend}, peer_pid, shared_memory);
        return session;
    });
}

protocol::SessionConfig inproc_config(const engine::Engine& engine, const engine::Engine& peer,
                                      const std::string& protection) {
    const auto& theirs = peer.options().session;
    auto config = session_config(engine, protection, theirs.unmatched, theirs.regions,
                                 theirs.message_queue_nbytes);
    config.capabilities = protocol::kCanCopy | protocol::kCanGrant;
    config.pulls = true;
    return config;
}

nb::tuple open_inproc_pair(PyEngine& self, PyEngine& other, nb::bytes session_id,
                           const std::string& protection, PySession* mine, PySession* theirs) {
    require_alive(*self.engine);
    require_alive(*other.engine);
    const std::string id(session_id.c_str(), session_id.size());
    auto pair = translate([&] {
        const auto config_a = inproc_config(*self.engine, *other.engine, protection);
        const auto config_b = inproc_config(*other.engine, *self.engine, protection);
        // One session id names both ends; an engine joined to itself needs two.
        const std::string other_id = self.engine == other.engine ? id + "+" : id;
        PySession a = mine != nullptr ? *mine : PySession{self.engine, self.engine->new_connection(id), 0};
        PySession b = theirs != nullptr ? *theirs
                                        : PySession{other.engine, other.engine->new_connection(other_id), 0};
        auto path_a = std::make_shared<backends::InprocPath>(a.connection, self.engine->movers(),
                                                             config_a.digest);
        auto path_b = std::make_shared<backends::InprocPath>(b.connection, other.engine->movers(),
                                                             config_b.digest);
        backends::InprocPath::join(*path_a, a.connection, *path_b, b.connection);
        self.engine->rename(a.connection, id);
        other.engine->rename(b.connection, other_id);
        a.connection->set_reader(other.engine->options().incarnation);
        b.connection->set_reader(self.engine->options().incarnation);
        // Quiet until both are open: the first frame of one must find the other ready.
        a.connection->prepare(path_a, config_a);
        b.connection->prepare(path_b, config_b);
        a.connection->begin();
        b.connection->begin();
        return std::make_pair(a, b);
    });
    return nb::make_tuple(nb::cast(pair.first), nb::cast(pair.second));
}

nb::list recv_messages(PyEngine& self, double timeout_s) {
    require_alive(*self.engine);
    std::vector<engine::Engine::Delivered> got;
    wait_with_signals(self.engine, timeout_s, [&](std::int64_t until) {
        got = self.engine->recv_messages(until);
        return !got.empty() || self.engine->closed();
    });
    nb::list out;
    for (const auto& message : got) {
        out.append(nb::make_tuple(
            nb::bytes(message.session_id.data(), message.session_id.size()),
            nb::bytes(reinterpret_cast<const char*>(message.data.data()), message.data.size())));
    }
    return out;
}

using SegmentTuple = std::tuple<int, std::uintptr_t, std::uint64_t>;

PyPool make_pool(PyEngine& engine, nb::object name, nb::list groups, nb::list layers, bool named,
                 bool writable, const std::vector<SegmentTuple>& shared) {
    require_alive(*engine.engine);
    try {
        std::vector<engine::Pool::Segment> segments;
        for (const auto& [fd, base, nbytes] : shared) {
            Fd own(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
            if (!own) {
                throw std::system_error(errno, std::generic_category(), "a pool");
            }
            segments.push_back({std::move(own), base, nbytes});
        }
        auto shape = to_shape(std::move(groups), std::move(layers), named);
        const std::string text = name.is_none() ? std::string() : nb::cast<std::string>(name);
        return {engine.engine,
                engine.engine->new_pool(text, std::move(shape), writable, std::move(segments))};
    } catch (const nb::python_error&) {
        throw;
    } catch (const nb::builtin_exception&) {
        throw;
    } catch (...) {
        rethrow();
    }
}

bool close_pool(PyPool& self, double timeout_s) {
    require_alive(*self.engine);
    const engine::Pool::Closing closing(*self.pool);  // between the slices, too
    return wait_with_signals(self.engine, timeout_s,
                             [&](std::int64_t until) { return self.engine->close_pool(self.pool, until); });
}

}  // namespace

std::int64_t until_of(double seconds) noexcept {
    if (seconds < 0 || seconds > 1e9) {
        return INT64_MAX;
    }
    return monotonic_ns() + static_cast<std::int64_t>(seconds * 1e9);
}

bool wait_with_signals(const EnginePtr& engine, double timeout_s,
                       const std::function<bool(std::int64_t)>& step) {
    const std::int64_t until = until_of(timeout_s);
    for (;;) {
        // A condition variable isn't ended by a signal, hence slices; what waits on a descriptor is, at once.
        const std::int64_t slice = std::min(until, monotonic_ns() + 200'000'000);
        bool over = false;
        {
            const Calling here(engine->callers);
            translate([&] { over = step(slice); });
        }
        if (over) {
            return true;
        }
        check_signals();
        if (monotonic_ns() >= until) {
            return false;
        }
    }
}

namespace {

void bind_queue(nb::module_& m) {
    nb::class_<PyQueue>(m, "Queue")
        .def("__init__",
             [](PyQueue* self) {
                 new (self) PyQueue{translate([] { return std::make_shared<engine::Queue>(); })};
             })
        .def("fileno",
             [](const PyQueue& self) {
                 require_own(self.generation);
                 return self.queue->fd();
             })
        .def(
            "push",
            [](const PyQueue& self, std::uint64_t tag) {
                require_own(self.generation);
                self.queue->signal(tag);
            },
            nb::arg("tag"))
        .def("poll", [](const PyQueue& self) {
            require_own(self.generation);
            return self.queue->poll();
        });
}

void bind_gate(nb::module_& m) {
    nb::class_<PyGate>(m, "Gate")
        .def(
            "__init__",
            [](PyGate* self, std::uint32_t num_layers) {
                new (self) PyGate{std::make_shared<engine::LayerGate>(num_layers)};
            },
            nb::arg("num_layers"))
        .def(
            "mark_ready",
            [](const PyGate& self, std::uint32_t layer) {
                require_own(self.generation);
                if (layer >= self.gate->num_layers()) {
                    throw nb::value_error(("the gate has " + std::to_string(self.gate->num_layers()) +
                                           " layers, not a layer " + std::to_string(layer))
                                              .c_str());
                }
                translate([&] {
                    self.gate->mark(layer);
                    self.gate->kick();
                });
            },
            nb::arg("layer"))
        .def(
            "fail",
            [](const PyGate& self, std::string reason) {
                require_own(self.generation);
                translate([&] {
                    self.gate->fail(std::move(reason));
                    self.gate->kick();
                });
            },
            nb::arg("reason"))
        .def("word_address",
             [](const PyGate& self) { return reinterpret_cast<std::uintptr_t>(self.gate->word()); })
        .def_prop_ro("num_layers", [](const PyGate& self) { return self.gate->num_layers(); });
}

void bind_pool(nb::module_& m) {
    nb::class_<PyPool>(m, "Pool")
        .def(
            "__init__",
            [](PyPool* self, PyEngine& engine, nb::object name, nb::list groups, nb::list layers, bool named,
               bool writable, const std::vector<SegmentTuple>& segments) {
                new (self) PyPool(make_pool(engine, std::move(name), std::move(groups), std::move(layers),
                                            named, writable, segments));
            },
            nb::arg("engine"), nb::arg("name").none(), nb::arg("groups"), nb::arg("layers"), nb::kw_only(),
            nb::arg("named"), nb::arg("writable"), nb::arg("segments") = nb::list())
        .def("close", &close_pool, nb::arg("timeout_s"))
        .def("in_use",
             [](const PyPool& self) {
                 require_alive(*self.engine);
                 return self.pool->in_use();
             })
        .def_prop_ro("id", [](const PyPool& self) { return self.pool->id(); });
}

nb::class_<PyEngine> declare_engine(nb::module_& m) {
    return nb::class_<PyEngine>(m, "Engine")
        .def(
            "__init__",
            [](PyEngine* self, nb::bytes incarnation, unsigned movers, std::vector<int> cpus,
               double dead_after_s, double handshake_timeout_s, std::uint32_t max_pending,
               std::uint32_t max_unmatched, std::uint32_t max_regions, std::uint64_t max_message_queue_nbytes,
               std::size_t max_control_queue_nbytes, std::uint64_t max_transfer_pieces,
               std::uint64_t max_protocol_nbytes) {
                engine::Options options;
                options.incarnation.assign(incarnation.c_str(), incarnation.size());
                options.movers = movers;
                options.cpus = std::move(cpus);
                options.dead_after_ns = static_cast<protocol::Time>(dead_after_s * 1e9);
                options.handshake_timeout_ns = static_cast<protocol::Time>(handshake_timeout_s * 1e9);
                options.max_pending = max_pending;
                options.session.unmatched = max_unmatched;
                options.session.regions = max_regions;
                options.session.message_queue_nbytes = max_message_queue_nbytes;
                options.max_transfer_pieces = max_transfer_pieces;
                options.max_protocol_nbytes = max_protocol_nbytes;
                options.session.outbox_nbytes = max_control_queue_nbytes;
                // Not less than by default: an honest peer's burst, read at once, may have so many answers.
                options.session.answers_nbytes = std::max(options.session.answers_nbytes,
                                                          2 * max_control_queue_nbytes);
                new (self)
                    PyEngine{translate([&] { return std::make_shared<CalledEngine>(std::move(options)); })};
            },
            nb::arg("incarnation"), nb::kw_only(), nb::arg("movers"), nb::arg("cpus"),
            nb::arg("dead_after_s"), nb::arg("handshake_timeout_s"), nb::arg("max_pending") = 64,
            nb::arg("max_unmatched") = 1024, nb::arg("max_regions") = 1024,
            nb::arg("max_message_queue_nbytes") = 64u << 20, nb::arg("max_control_queue_nbytes") = 1u << 20,
            nb::arg("max_transfer_pieces") = 16u << 20, nb::arg("max_protocol_nbytes") = 256u << 20);
}

void bind_listeners(nb::class_<PyEngine>& engine) {
    engine
        .def(
            "add_listener",
            [](PyEngine& self, int fd) {
                require_open(*self.engine);
                return translate([&] {
                    Fd own(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
                    if (!own) {
                        throw std::system_error(errno, std::generic_category(), "listen");
                    }
                    return self.engine->admission().add_listener(std::move(own));
                });
            },
            nb::arg("fd"))
        .def(
            "remove_listener",
            [](PyEngine& self, std::uint64_t id) {
                require_alive(*self.engine);
                self.engine->admission().remove_listener(id);
            },
            nb::arg("listener_id"))
        .def("event_fd",
             [](PyEngine& self) {
                 require_alive(*self.engine);
                 return self.engine->event_fd();
             })
        .def("poll_events", [](PyEngine& self) {
            require_alive(*self.engine);
            nb::list out;
            for (const auto& event : self.engine->poll_events()) {
                out.append(event_tuple(event));
            }
            return out;
        });
}

void bind_sessions(nb::class_<PyEngine>& engine) {
    engine
        .def(
            "new_session",
            [](PyEngine& self, nb::bytes placeholder) {
                require_alive(*self.engine);
                const std::string id(placeholder.c_str(), placeholder.size());
                return translate([&] { return PySession{self.engine, self.engine->new_connection(id), 0}; });
            },
            nb::arg("placeholder"))
        .def("open_session", &open_session, nb::arg("control_fd"), nb::kw_only(), nb::arg("session_id"),
             nb::arg("protection"), nb::arg("lanes"), nb::arg("chunk_nbytes"), nb::arg("peer_pid"),
             nb::arg("backend") = "tcp", nb::arg("peer_max_unmatched") = 1024,
             nb::arg("peer_max_regions") = 1024, nb::arg("peer_max_message_queue_nbytes") = 64u << 20,
             nb::arg("socket_buffer_nbytes") = 0, nb::arg("peer_incarnation") = nb::bytes("", 0),
             nb::arg("capabilities") = 0, nb::arg("shared_memory") = false)
        .def("open_inproc_pair", &open_inproc_pair, nb::arg("other"), nb::kw_only(), nb::arg("session_id"),
             nb::arg("protection") = "plain", nb::arg("mine").none() = nb::none(),
             nb::arg("theirs").none() = nb::none())
        .def("recv_messages", &recv_messages, nb::arg("timeout_s"))
        .def("operations",
             [](PyEngine& self) {
                 require_alive(*self.engine);
                 return statistics_of(*self.engine);
             })
        .def("forked", [](PyEngine& self) { return self.engine->forked(); })
        .def("close", [](PyEngine& self) { translate([&] { self.engine->close(); }); })
        .def(
            "wait_for_callers",
            [](PyEngine& self, double timeout_s) {
                require_alive(*self.engine);
                const std::int64_t until = until_of(timeout_s);
                return translate([&] { return self.engine->callers.wait_until_gone(until); });
            },
            nb::arg("timeout_s"));
}

}  // namespace

void bind_engine(nb::module_& m) {
    bind_queue(m);
    bind_gate(m);
    auto engine = declare_engine(m);
    bind_pool(m);
    bind_listeners(engine);
    bind_sessions(engine);
}

}  // namespace kvt::bindings
