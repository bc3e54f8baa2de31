#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <functional>

#include "base/clock.hpp"
#include "bindings/objects.hpp"
#include "bindings/raise.hpp"

namespace kvt::bindings {

namespace {

nb::object exception_of(const PyTransfer& self) {
    if (!self.handle().done()) {
        return nb::none();
    }
    if (self.read || self.result().outcome.cause == protocol::Cause::ok) {
        return nb::none();
    }
    require_alive(*self.engine);  // the error names the peer, which the connection's lock is for
    return self.transfer  ? error_of(*self.transfer)
           : self.message ? error_of(*self.message)
           : self.grant   ? error_of(*self.grant)
                          : error_of(*self.lease);
}

constexpr double seconds(std::int64_t ns) noexcept { return static_cast<double>(ns) / 1e9; }

nb::object result_of_read(const engine::DoneRead& read) {
    return nb::make_tuple(read.nbytes(), seconds(read.seconds_ns()), read.backend(), read.blocks(),
                          read.merged_runs(), 1, 0, seconds(read.seconds_ns()), 0.0, nb::bytes("", 0));
}

nb::object result_of(const PyTransfer& self) {
    if (self.read) {
        return result_of_read(*self.read);
    }
    if (!self.handle().done()) {
        raise("LocalProtocolError", "the result was asked for before the operation ended");
    }
    const nb::object error = exception_of(self);
    if (!error.is_none()) {
        PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
        throw nb::python_error();
    }
    if (!self.transfer && !self.grant) {
        return nb::none();
    }
    const engine::Result& r = self.result();
    const std::uint64_t runs = self.transfer ? self.transfer->merged_runs() : 0;
    return nb::make_tuple(r.nbytes, seconds(r.seconds_ns), r.backend, r.blocks, runs, r.chunks,
                          r.resumed_nbytes, seconds(r.wire_ns), seconds(r.queued_ns),
                          nb::bytes(r.meta.data(), r.meta.size()));
}

bool wait_for(engine::Handle& handle, std::int64_t until) {
    engine::Waiter waiter;
    if (handle.subscribe(&waiter)) {
        waiter.wait(until);
        handle.unsubscribe(&waiter);
    }
    return handle.done();
}

bool wait(const PyTransfer& self, double timeout_s) {
    if (self.handle().done()) {
        return true;
    }
    require_alive(*self.engine);
    const std::int64_t until = until_of(timeout_s);
    for (;;) {
        bool over = false;
        {
            const Calling here(self.engine->callers);
            over = translate([&] {
                const auto connection = self.connection();
                return connection ? connection->wait(self.handle(), until) : wait_for(self.handle(), until);
            });
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

bool wait_layer(const PyTransfer& self, std::uint32_t layer, double timeout_s) {
    using LayerState = engine::Connection::LayerState;
    if (!self.transfer && !self.read) {
        throw nb::type_error("only a transfer has layers");
    }
    if (self.read && self.read->has_layer(layer)) {
        return true;
    }
    const std::int64_t until = until_of(timeout_s);
    for (;;) {
        require_alive(*self.engine);
        LayerState state{};
        if (self.read) {
            state = LayerState::unknown;
        } else {
            const Calling here(self.engine->callers);
            state = translate([&] { return self.connection()->wait_layer(self.transfer, layer, until); });
        }
        switch (state) {
            case LayerState::landed: return true;
            case LayerState::unknown:
                throw nb::value_error(("the transfer has no layer " + std::to_string(layer)).c_str());
            case LayerState::over:
                result_of(self);
                return true;  // raises: a layer that didn't land means an error
            case LayerState::waiting: break;
        }
        check_signals();
        if (monotonic_ns() >= until) {
            return false;
        }
    }
}

std::vector<CalledEngine*> engines_of(const std::vector<PyTransfer*>& handles) {
    std::vector<CalledEngine*> engines;
    for (const PyTransfer* handle : handles) {
        CalledEngine* const engine = handle->engine.get();
        if (engines.empty() || (engines.back() != engine &&
                                std::find(engines.begin(), engines.end(), engine) == engines.end())) {
            engines.push_back(engine);
        }
    }
    return engines;
}

/// Until one of the handles has ended, or all that haven't yet; a signal and `until` end it, too.
void wait_once(const std::vector<PyTransfer*>& handles, const std::vector<CalledEngine*>& engines,
               std::int64_t until, bool all_of, const std::function<bool()>& satisfied) {
    std::vector<Calling> here;
    here.reserve(engines.size());
    for (CalledEngine* engine : engines) {
        here.emplace_back(engine->callers);
    }
    translate([&] {
        engine::Waiter waiter;
        bool ended = false;
        for (const PyTransfer* handle : handles) {
            // For all of them, those that are done already don't wake us; for any of them, one suffices.
            ended = !handle->handle().subscribe(&waiter) && !all_of ? true : ended;
        }
        if (!ended && !satisfied()) {
            waiter.wait(until);
        }
        for (const PyTransfer* handle : handles) {
            handle->handle().unsubscribe(&waiter);
        }
    });
}

/// One waiter over many handles.
bool wait_many(const std::vector<PyTransfer*>& handles, double timeout_s, bool all_of) {
    const auto engines = engines_of(handles);
    for (const CalledEngine* engine : engines) {
        require_alive(*engine);
    }
    const std::int64_t until = until_of(timeout_s);
    const auto satisfied = [&] {
        std::size_t done = 0;
        for (const PyTransfer* handle : handles) {
            done += handle->handle().done() ? 1u : 0u;
        }
        return all_of ? done == handles.size() : done > 0 || handles.empty();
    };
    while (!satisfied()) {
        wait_once(handles, engines, until, all_of, satisfied);
        check_signals();
        if (monotonic_ns() >= until) {
            return satisfied();
        }
    }
    return true;
}

std::string state_of(const PyTransfer& self) {
    require_alive(*self.engine);  // the connection's lock may have been held at the fork
    if (self.transfer) {
        return self.transfer->connection()->state_of(*self.transfer);
    }
    if (!self.handle().done()) {
        return "posted";
    }
    if (self.read) {
        return "done";
    }
    return self.result().outcome.cause == protocol::Cause::ok ? "done" : "failed";
}

std::pair<std::uint64_t, std::uint64_t> progress_of(const PyTransfer& self) {
    require_alive(*self.engine);
    if (self.read) {
        return std::make_pair(self.read->nbytes(), self.read->nbytes());
    }
    if (!self.transfer) {
        return std::make_pair(std::uint64_t{0}, std::uint64_t{0});
    }
    return self.transfer->connection()->progress_of(*self.transfer);
}

}  // namespace

void bind_transfer(nb::module_& m) {
    nb::class_<PyTransfer>(m, "Transfer")
        .def("wait", &wait, nb::arg("timeout_s"))
        .def("result", &result_of)
        .def("exception", &exception_of)
        .def("done", [](const PyTransfer& self) { return self.handle().done(); })
        .def("cancel",
             [](const PyTransfer& self) {
                 require_alive(*self.engine);
                 if (self.transfer && !self.transfer->done()) {
                     translate([&] {
                         std::shared_ptr<engine::Connection> asked;
                         while (asked !=
                                self.transfer->connection()) {  // it may be taken over by another meanwhile
                             asked = self.transfer->connection();
                             asked->cancel(self.transfer);
                         }
                     });
                 }
             })
        .def("state", &state_of)
        .def("progress", &progress_of)
        .def("wait_layer", &wait_layer, nb::arg("layer"), nb::arg("timeout_s"))
        .def(
            "subscribe",
            [](const PyTransfer& self, PyQueue& queue, std::uint64_t tag) {
                require_alive(*self.engine);
                require_own(queue.generation);
                return self.handle().subscribe(queue.queue, tag);
            },
            nb::arg("queue"), nb::arg("handle_id"));

    m.def("wait_many", &wait_many, nb::arg("handles"), nb::arg("timeout_s"), nb::arg("all_of"));
}

}  // namespace kvt::bindings
