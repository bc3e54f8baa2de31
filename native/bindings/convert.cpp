#include "bindings/convert.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>

namespace kvt::bindings {

namespace {

using IdsPtr = std::shared_ptr<const memory::Ids>;

[[noreturn]] void bad_id(const std::string& id) {
    throw nb::value_error(("block id " + id + " is out of range").c_str());
}

std::uint32_t checked(long long id) {
    if (id < 0 || id > std::numeric_limits<std::uint32_t>::max()) {
        bad_id(std::to_string(id));
    }
    return static_cast<std::uint32_t>(id);
}

std::uint32_t checked_int(nb::handle number) {
    int overflow = 0;
    const long long id = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
    if (overflow != 0) {
        bad_id(nb::repr(number).c_str());
    }
    return checked(id);
}

std::uint32_t one_id(PyObject* item) {
    if (PyBool_Check(item)) {
        throw nb::type_error("a block id is an int, not a bool");
    }
    if (PyLong_CheckExact(item)) {
        return checked_int(item);
    }
    const nb::object held = nb::borrow(item);      // its __index__ may take it out of its list
    PyObject* const index = PyNumber_Index(item);  // numpy's integers
    if (index == nullptr) {
        throw nb::python_error();
    }
    const nb::object keep = nb::steal(index);
    return checked_int(index);
}

/// The text of a Python string; ValueError for one that UTF-8 can't carry.
std::string to_text(nb::handle text) {
    Py_ssize_t nbytes = 0;
    const char* const utf8 = PyUnicode_AsUTF8AndSize(text.ptr(), &nbytes);
    if (utf8 == nullptr) {
        throw nb::python_error();
    }
    return {utf8, static_cast<std::size_t>(nbytes)};
}

IdsPtr from_range(nb::handle range, std::uint64_t num_blocks) {
    if (nb::cast<bool>(nb::bool_(range))) {  // the ends first: a range may be longer than any memory
        for (const int end : {0, -1}) {
            const std::uint32_t id = one_id(nb::object(range[nb::int_(end)]).ptr());
            if (id >= num_blocks) {
                throw nb::value_error(("block id " + std::to_string(id) +
                                       " is out of range: num_blocks=" + std::to_string(num_blocks))
                                          .c_str());
            }
        }
    }
    const std::size_t n = nb::len(range);
    const auto start = n == 0 ? 0 : nb::cast<long long>(range.attr("start"));
    const auto step = n < 2 ? 1 : nb::cast<long long>(range.attr("step"));
    auto ids = std::make_shared<memory::Ids>(n);
    for (std::size_t i = 0; i < n; ++i) {
        (*ids)[i] = static_cast<std::uint32_t>(start + step * static_cast<long long>(i));
    }
    return ids;
}

/// `stride` counts integers, which needn't be aligned: an array may begin anywhere in a buffer.
template <class Integer>
void copy_ids(const void* data, std::size_t n, std::int64_t stride, memory::Ids& out) {
    const auto* from = static_cast<const std::byte*>(data);
    const std::int64_t step = stride * static_cast<std::int64_t>(sizeof(Integer));
    long long least = 0, most = 0;
    for (std::size_t i = 0; i < n; ++i) {
        Integer value;
        std::memcpy(&value, from + static_cast<std::int64_t>(i) * step, sizeof value);
        const auto id = static_cast<long long>(value);
        least = std::min(least, id);
        most = std::max(most, id);
        out[i] = static_cast<std::uint32_t>(id);
    }
    checked(least);
    checked(most);
}

bool from_array(nb::handle array, IdsPtr& out) {
    nb::ndarray<nb::ro, nb::device::cpu> view;
    if (!nb::try_cast(array, view)) {
        return false;
    }
    if (view.ndim() != 1) {
        throw nb::value_error("block ids have one dimension");
    }
    auto ids = std::make_shared<memory::Ids>(view.shape(0));
    const std::int64_t stride = view.size() == 0 ? 1 : view.stride(0);
    if (view.dtype() == nb::dtype<std::int32_t>()) {
        copy_ids<std::int32_t>(view.data(), ids->size(), stride, *ids);
    } else if (view.dtype() == nb::dtype<std::int64_t>()) {
        copy_ids<std::int64_t>(view.data(), ids->size(), stride, *ids);
    } else if (view.dtype() == nb::dtype<std::uint32_t>()) {
        copy_ids<std::uint32_t>(view.data(), ids->size(), stride, *ids);
    } else {
        throw nb::type_error("an array of block ids is int32 or int64");
    }
    out = std::move(ids);
    return true;
}

IdsPtr from_sequence(nb::handle ids) {
    if (PyUnicode_Check(ids.ptr()) || PyBytes_Check(ids.ptr())) {
        throw nb::type_error("block ids are ints, not text");
    }
    if (PyAnySet_Check(ids.ptr())) {
        throw nb::type_error("block ids have an order, and a set has none");
    }
    PyObject* const fast = PySequence_Fast(
        ids.ptr(), "block ids are a sequence of int, a range, an int32/int64 array, or {group: ids}");
    if (fast == nullptr) {
        throw nb::python_error();
    }
    const nb::object keep = nb::steal(fast);
    const auto n = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(fast));
    auto out = std::make_shared<memory::Ids>(n);
    for (std::size_t i = 0; i < n; ++i) {
        if (static_cast<std::size_t>(PySequence_Fast_GET_SIZE(fast)) != n) {  // an item's __index__ did it
            throw nb::value_error("the list of block ids changed while it was read");
        }
        (*out)[i] = one_id(PySequence_Fast_GET_ITEM(fast, static_cast<Py_ssize_t>(i)));
    }
    return out;
}

IdsPtr one_group(nb::handle ids, std::uint64_t num_blocks) {
    if (PyList_CheckExact(ids.ptr()) || PyTuple_CheckExact(ids.ptr())) {
        return from_sequence(ids);
    }
    if (PyRange_Check(ids.ptr())) {
        return from_range(ids, num_blocks);
    }
    IdsPtr out;
    if (from_array(ids, out)) {
        return out;
    }
    return from_sequence(ids);
}

bool is_mapping(nb::handle ids) {
    if (PyDict_Check(ids.ptr())) {
        return true;
    }
    if (PyList_CheckExact(ids.ptr()) || PyTuple_CheckExact(ids.ptr()) || PyRange_Check(ids.ptr())) {
        return false;  // the usual ones, without asking Python
    }
    return nb::isinstance(ids, nb::module_::import_("collections.abc").attr("Mapping"));
}

std::size_t group_named(nb::handle name, const std::vector<memory::Group>& groups) {
    if (!PyUnicode_Check(name.ptr())) {
        throw nb::type_error("block ids by group are {name: ids}, and a name is a str");
    }
    const std::string wanted = to_text(name);
    const auto found = std::find_if(groups.begin(), groups.end(),
                                    [&](const auto& group) { return group.name == wanted; });
    if (found == groups.end()) {
        throw nb::value_error(("the pool has no group '" + wanted + "'").c_str());
    }
    return static_cast<std::size_t>(found - groups.begin());
}

}  // namespace

namespace {

// `bounded`: by the blocks that the shape has; a range is looked at before it is spread out.
std::vector<IdsPtr> by_group(nb::handle ids, const memory::PoolShape& shape, bool bounded) {
    const auto& groups = shape.groups();
    const auto bound = [&](std::size_t group) {
        return bounded ? groups[group].num_blocks : std::uint64_t{1} << 32;
    };
    std::vector<IdsPtr> out(groups.size());
    if (!is_mapping(ids)) {
        if (groups.size() != 1) {
            throw nb::value_error("the pool has several groups: block ids are {group: ids}");
        }
        out[0] = one_group(ids, bound(0));
        return out;
    }
    // A list of our own: converting a group's ids may run code that changes the mapping.
    for (const nb::handle item : nb::borrow<nb::mapping>(ids).items()) {
        if (!PyTuple_Check(item.ptr()) || PyTuple_GET_SIZE(item.ptr()) != 2) {
            throw nb::type_error("the items of block ids by group are pairs (name, ids)");
        }
        const std::size_t group = group_named(PyTuple_GET_ITEM(item.ptr(), 0), groups);
        out[group] = one_group(PyTuple_GET_ITEM(item.ptr(), 1), bound(group));
    }
    return out;
}

}  // namespace

std::vector<IdsPtr> to_ids(nb::handle ids, const memory::PoolShape& shape) {
    return by_group(ids, shape, true);
}

std::vector<IdsPtr> to_positions(nb::handle positions, const memory::PoolShape& shape) {
    return by_group(positions, shape, false);
}

std::string to_key(nb::handle key, bool& text) {
    std::string out;
    if (PyUnicode_Check(key.ptr())) {
        text = true;
        out = to_text(key);
    } else if (PyBytes_Check(key.ptr())) {
        text = false;
        out.assign(PyBytes_AS_STRING(key.ptr()), static_cast<std::size_t>(PyBytes_GET_SIZE(key.ptr())));
    } else {
        throw nb::type_error("a key is str or bytes");
    }
    if (out.empty() || out.size() > 255) {
        throw nb::value_error("a key has 1 to 255 bytes");
    }
    return out;
}

std::shared_ptr<memory::PoolShape> to_shape(nb::list groups, nb::list layers, bool named) {
    using GroupTuple = std::tuple<std::string, std::uint64_t, std::uint64_t, bool, std::string, std::string,
                                  std::string, std::uint64_t>;
    using AxisTuple = std::pair<std::uint64_t, std::int64_t>;
    using PartTuple = std::tuple<std::uintptr_t, std::int64_t, std::vector<AxisTuple>, std::uint64_t, int>;
    using LayerTuple = std::tuple<std::string, std::uint32_t, std::vector<PartTuple>>;
    std::vector<memory::Group> native_groups;
    for (const auto& [name, blocks, heads, opaque, dtype, order, kv, tokens] :
         nb::cast<std::vector<GroupTuple>>(groups)) {
        native_groups.push_back({name, blocks, heads, opaque, dtype, order, kv, tokens});
    }
    std::vector<memory::Layer> native_layers;
    for (const auto& [name, group, parts] : nb::cast<std::vector<LayerTuple>>(layers)) {
        memory::Layer layer{name, group, {}};
        for (const auto& [address, block_stride, axes, itemsize, head_axis] : parts) {
            memory::Part part{address, block_stride, {}, itemsize, head_axis};
            for (const auto& [count, stride] : axes) {
                part.axes.push_back({count, stride});
            }
            layer.parts.push_back(std::move(part));
        }
        native_layers.push_back(std::move(layer));
    }
    return std::make_shared<memory::PoolShape>(std::move(native_groups), std::move(native_layers), named);
}

}  // namespace kvt::bindings
