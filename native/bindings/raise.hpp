// From native outcomes to kvtransport's typed errors.
//
// The classes live in kvtransport/errors.py and are looked up there when first needed: any of them can be
// made by cls(message, **attributes). All functions here need the GIL, except translate(), which gives it up
// meanwhile.
#pragma once

#include <nanobind/nanobind.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "bindings/interpreter.hpp"
#include "engine/connection.hpp"
#include "engine/engine.hpp"

namespace kvt::bindings {

namespace nb = nanobind;

/// Text that a peer or a user may have had a hand in, for a message: control characters and what isn't UTF-8
/// come out as \xNN. Unchanged if done again.
std::string shown(const std::string& raw);

/// `message` needn't be shown() before.
[[noreturn]] void raise(const char* cls, const std::string& message, nb::dict attributes = nb::dict());
nb::object make_error(const char* cls, const std::string& message, nb::dict attributes);

/// The class, in kvtransport.errors, of what isn't ok.
const char* class_of(protocol::Cause cause) noexcept;

/// The exception of a transfer or message that ended with anything but success.
nb::object error_of(const engine::TransferHandle& handle);
nb::object error_of(const engine::MessageHandle& handle);
nb::object error_of(const engine::GrantHandle& handle);
nb::object error_of(const engine::LeaseHandle& handle);

/// Rethrows the C++ exception in flight as the Python one that callers expect. Needs the GIL.
[[noreturn]] void rethrow();

/// Runs `work` without the GIL. Exceptions come out as Python's.
template <class Work>
auto translate(Work&& work) {
    try {
        const Unlocked unlocked;
        return std::forward<Work>(work)();
    } catch (const nb::python_error&) {
        throw;
    } catch (...) {
        rethrow();
    }
}

void require_alive(const engine::Engine& engine);
/// For what has no engine: the fork generation that it was made in.
void require_own(std::uint64_t generation);
void require_open(const engine::Engine& engine);

}  // namespace kvt::bindings
