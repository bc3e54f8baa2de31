// The native objects that Python holds. Each keeps the engine alive: an engine is closed by its Endpoint,
// never by a mover.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

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

/// A transfer's or a message's handle.
struct PyTransfer {
    EnginePtr engine;
    std::shared_ptr<engine::TransferHandle> transfer;  // one of the two
    std::shared_ptr<engine::MessageHandle> message;

    engine::Handle& handle() const noexcept {
        return transfer ? static_cast<engine::Handle&>(*transfer) : static_cast<engine::Handle&>(*message);
    }
    std::shared_ptr<engine::Connection> connection() const {
        return transfer ? transfer->connection() : message->connection();
    }
};

struct PySession {
    EnginePtr engine;
    std::shared_ptr<engine::Connection> connection;
    unsigned lanes = 0;
};

/// Nanoseconds from now, as a point of the monotonic clock; negative seconds: never.
std::int64_t until_of(double seconds) noexcept;
/// Waits, as one of the engine's callers, in slices that end when the interpreter has a signal to handle.
/// `step(until)` returns true when it is over.
bool wait_with_signals(const EnginePtr& engine, double timeout_s,
                       const std::function<bool(std::int64_t)>& step);

void bind_engine(nanobind::module_& m);
void bind_session(nanobind::module_& m);
void bind_transfer(nanobind::module_& m);

}  // namespace kvt::bindings
