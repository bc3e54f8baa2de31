// Bounded little-endian reading and writing of frame bodies.
//
// Lives here: the two cursors that every body goes through. Does not live here: what the bodies mean
// (frames.hpp). Invariant: a Reader never reads past its span and never allocates from a length that it
// hasn't checked against the bytes that are left; bounds are compared by subtraction.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace kvt::protocol {

/// The peer broke the rules of the wire; the session that caught it ends with RemoteProtocolError.
struct Violation : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// The peer asked for more than the limits allow; the session ends with ResourceLimit.
struct Excess : std::runtime_error {
    using std::runtime_error::runtime_error;
};

template <class Integer>
Integer load_le(const std::byte* from) noexcept {
    Integer value = 0;
    for (std::size_t i = 0; i < sizeof(Integer); ++i) {
        value = static_cast<Integer>(value | static_cast<Integer>(static_cast<Integer>(from[i]) << (8 * i)));
    }
    return value;
}

template <class Integer>
void store_le(std::byte* to, Integer value) noexcept {
    for (std::size_t i = 0; i < sizeof(Integer); ++i) {
        to[i] = static_cast<std::byte>(value >> (8 * i));
    }
}

using Bytes = std::vector<std::byte>;

/// Appends to a byte vector.
class Writer {
  public:
    explicit Writer(Bytes& out) : out_(out) {}

    template <class Integer>
    void integer(Integer value) {
        const std::size_t at = out_.size();
        out_.resize(at + sizeof(Integer));
        store_le(out_.data() + at, value);
    }
    void bytes(std::span<const std::byte> data) { out_.insert(out_.end(), data.begin(), data.end()); }
    /// A string of at most 65,535 bytes behind its 16-bit length.
    void text(std::string_view value) {
        if (value.size() > 0xffff) {
            throw std::length_error("a text of the wire has at most 65,535 bytes");
        }
        integer(static_cast<std::uint16_t>(value.size()));
        bytes(std::as_bytes(std::span(value.data(), value.size())));
    }

  private:
    Bytes& out_;
};

/// Reads a body front to back; a short body is a Violation.
class Reader {
  public:
    explicit Reader(std::span<const std::byte> data) : data_(data) {}

    template <class Integer>
    Integer integer() {
        return load_le<Integer>(take(sizeof(Integer)).data());
    }
    std::span<const std::byte> take(std::size_t nbytes) {
        if (nbytes > data_.size()) {
            throw Violation("a frame's body is shorter than its fields");
        }
        const auto head = data_.first(nbytes);
        data_ = data_.subspan(nbytes);
        return head;
    }
    std::string text(std::size_t most) {
        const std::size_t nbytes = integer<std::uint16_t>();
        if (nbytes > most) {
            throw Violation("a text in a frame is longer than its limit");
        }
        const auto raw = take(nbytes);
        return std::string(reinterpret_cast<const char*>(raw.data()), raw.size());
    }
    /// A count of items of `item_nbytes` each, checked against what is left before anybody allocates.
    std::size_t count(std::size_t most, std::size_t item_nbytes) {
        const std::size_t n = integer<std::uint32_t>();
        if (n > most || n > data_.size() / item_nbytes) {
            throw Violation("a count in a frame is beyond its limit or its body");
        }
        return n;
    }
    void finish() const {
        if (!data_.empty()) {
            throw Violation("a frame's body is longer than its fields");
        }
    }

  private:
    std::span<const std::byte> data_;
};

}  // namespace kvt::protocol
