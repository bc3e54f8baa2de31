// kvtransport._native: the engine for Python. These files convert, release the GIL, and forward.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <vector>

#include "base/crc32c.hpp"
#include "bindings/objects.hpp"
#include "protocol/transfer.hpp"

namespace {

using Row = std::tuple<std::string, std::string, std::string, std::string, std::string>;

std::vector<Row> transition_rows() {
    std::vector<Row> rows;
    for (const auto& row : kvt::protocol::transition_table()) {
        rows.emplace_back(name_of(row.role), name_of(row.from), name_of(row.event), name_of(row.to),
                          name_of(row.action));
    }
    return rows;
}

}  // namespace

NB_MODULE(_native, m) {
    // Whom a daemon thread kept at the interpreter's exit is no leak that a user should read about.
    nanobind::set_leak_warnings(false);
    m.doc() = "The native engine of kvtransport. Not public: use kvtransport.Endpoint.";
    kvt::bindings::bind_engine(m);
    kvt::bindings::bind_session(m);
    kvt::bindings::bind_transfer(m);
    kvt::bindings::bind_grants(m);
    kvt::bindings::bind_maps(m);
    m.def("transfer_table", &transition_rows);
    m.def(
        "crc32c",
        [](nanobind::bytes data, std::uint32_t crc) { return kvt::crc32c(crc, data.c_str(), data.size()); },
        nanobind::arg("data"), nanobind::arg("crc") = 0);
    m.def("crc32c_kind", [] { return std::string(kvt::crc32c_kind()); });
}
