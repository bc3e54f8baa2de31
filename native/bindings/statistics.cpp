#include "bindings/statistics.hpp"

#include <cstddef>

#include "bindings/raise.hpp"

namespace kvt::bindings {

namespace {

using engine::Tally;

const char* name_of(engine::Operation operation) {
    switch (operation) {
        case engine::Operation::send: return "send";
        case engine::Operation::receive: return "recv";
        case engine::Operation::message: return "message";
        case engine::Operation::read: return "read";
        case engine::Operation::write: return "write";
    }
    return "";
}

void add(Tally::Cell& sum, const Tally::Cell& cell) {
    sum.count += cell.count;
    sum.nbytes += cell.nbytes;
    sum.total_ns += cell.total_ns;
    for (std::size_t i = 0; i < sum.buckets.size(); ++i) {
        sum.buckets[i] += cell.buckets[i];
    }
}

nb::dict to_dict(const Tally::Cell& cell) {
    nb::list bounds, counts;
    for (std::size_t i = 0; i < Tally::kBounds; ++i) {
        bounds.append(static_cast<double>(Tally::bound_us(i)) / 1e6);
    }
    for (const std::uint64_t count : cell.buckets) {
        counts.append(count);
    }
    nb::dict seconds;
    seconds["sum"] = static_cast<double>(cell.total_ns) / 1e9;
    seconds["bounds"] = bounds;
    seconds["counts"] = counts;
    nb::dict out;
    out["count"] = cell.count;
    out["nbytes"] = cell.nbytes;
    out["seconds"] = seconds;
    return out;
}

// {operation: {"ok" or the error's class: ...}}. Several causes are one class (the kinds of timeout).
nb::dict to_dict(const Tally::Cells& cells) {
    std::map<std::pair<std::string, std::string>, Tally::Cell> named;
    for (const auto& [of, cell] : cells) {
        const auto& [operation, cause] = of;
        add(named[{name_of(operation), cause == protocol::Cause::ok ? "ok" : class_of(cause)}], cell);
    }
    nb::dict out;
    for (const auto& [of, cell] : named) {
        const auto& [operation, outcome] = of;
        if (!out.contains(operation.c_str())) {
            out[operation.c_str()] = nb::dict();
        }
        nb::cast<nb::dict>(out[operation.c_str()])[outcome.c_str()] = to_dict(cell);
    }
    return out;
}

}  // namespace

nb::dict statistics_of(const engine::Connection& connection) {
    const auto counters = connection.counters();
    nb::dict out;
    out["chunks_sent"] = counters.chunks_out;
    out["chunks_received"] = counters.chunks_in;
    out["bytes_sent"] = counters.bytes_out;
    out["bytes_received"] = counters.bytes_in;
    out["drained_chunks"] = counters.drained_chunks;
    out["drained_bytes"] = counters.drained_bytes;
    out["sends_ok"] = counters.sends_ok;
    out["sends_failed"] = counters.sends_failed;
    out["receives_ok"] = counters.receives_ok;
    out["receives_failed"] = counters.receives_failed;
    out["corrupt_chunks"] = counters.corrupt_chunks;
    out["messages_sent"] = counters.messages_out;
    out["messages_received"] = counters.messages_in;
    out["unfinished"] = connection.unfinished();
    out["operations"] = to_dict(connection.tally().cells());
    return out;
}

nb::dict statistics_of(engine::Engine& engine) {
    nb::dict out;
    for (const auto& [backend, cells] : engine.tallies()) {
        if (!cells.empty()) {
            out[backend.c_str()] = to_dict(cells);
        }
    }
    return out;
}

}  // namespace kvt::bindings
