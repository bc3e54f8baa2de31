// The native objects that Python holds. Each keeps the engine alive: an engine is closed by its Endpoint,
// never by a mover.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/fd.hpp"
#include "bindings/interpreter.hpp"
#include "engine/admission.hpp"
#include "engine/connection.hpp"
#include "engine/engine.hpp"

namespace kvt::bindings {

struct CalledEngine final : engine::Engine {
    using Engine::Engine;
    Callers callers;
};

using EnginePtr = std::shared_ptr<CalledEngine>;

/// A queue or a gate belongs to no engine: it remembers the process that it was made in.
struct PyQueue {
    std::shared_ptr<engine::Queue> queue;
    std::uint64_t generation = fork_generation();
};

struct PyGate {
    std::shared_ptr<engine::LayerGate> gate;
    std::uint64_t generation = fork_generation();
};

struct PyPool {
    EnginePtr engine;
    std::shared_ptr<engine::Pool> pool;
};

/// The handle of a transfer, a message, a grant or a lease.
struct PyTransfer {
    EnginePtr engine;
    std::shared_ptr<engine::TransferHandle> transfer = nullptr;  // one of the five
    std::shared_ptr<engine::MessageHandle> message = nullptr;
    std::shared_ptr<engine::GrantHandle> grant = nullptr;
    std::shared_ptr<engine::LeaseHandle> lease = nullptr;
    std::shared_ptr<engine::DoneRead> read = nullptr;

    engine::Handle& handle() const noexcept {
        return transfer  ? static_cast<engine::Handle&>(*transfer)
               : message ? static_cast<engine::Handle&>(*message)
               : grant   ? static_cast<engine::Handle&>(*grant)
               : lease   ? static_cast<engine::Handle&>(*lease)
                         : static_cast<engine::Handle&>(*read);
    }
    /// Once it is done; not of a read that always was.
    const engine::Result& result() const noexcept {
        return transfer  ? transfer->result
               : message ? message->result
               : grant   ? grant->result
                         : lease->result;
    }
    /// Null for a grant, which is no connection's, and for what was done from the beginning.
    std::shared_ptr<engine::Connection> connection() const {
        return transfer  ? transfer->connection()
               : message ? message->connection()
               : lease   ? lease->connection()
                         : nullptr;
    }
};

struct PySession {
    EnginePtr engine;
    std::shared_ptr<engine::Connection> connection;
    unsigned lanes = 0;
};

struct PyEngine {
    EnginePtr engine;
};

/// A limit of a transfer, from seconds; negative means none where `may_be_none`.
protocol::Time duration(const char* name, double seconds, bool may_be_none);

/// What all posts of transfers have, as Python gives it.
struct Post {
    protocol::Role role;
    nanobind::handle ids, key;
    std::optional<std::vector<std::uint32_t>> layers;
    nanobind::object heads;
    PyGate* gate;
    nanobind::bytes meta;
    PyQueue* queue;
    std::uint64_t tag;
};
/// With everything but limits. Raises what the call's misuse is.
engine::PostArgs to_args(PySession& self, PyPool& pool, Post from);

/// Nanoseconds from now, as a point of the monotonic clock; negative seconds: never.
std::int64_t until_of(double seconds) noexcept;
/// Waits, as one of the engine's callers, in slices that end when the interpreter has a signal to handle.
/// `step(until)` returns true when it is over.
bool wait_with_signals(const EnginePtr& engine, double timeout_s,
                       const std::function<bool(std::int64_t)>& step);

void bind_engine(nanobind::module_& m);
void bind_session(nanobind::module_& m);
void bind_transfer(nanobind::module_& m);
/// What grants add to the classes of the others.
void bind_grants(nanobind::module_& m);
/// And what reads a grant's blocks where they lie.
void bind_maps(nanobind::module_& m);

}  // namespace kvt::bindings
