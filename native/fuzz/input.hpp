// The fuzzer's input as a list of small decisions.
//
// Lives here: reading it. Does not live here: what the decisions mean (the targets).
// Invariant: reading past the end gives zeros, so every input is a program.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>

namespace kvt::fuzz {

/// Sizes that length fields are wrong with: faults.md M7.
inline constexpr std::array<std::uint64_t, 10> kExtremes = {0,
                                                            1,
                                                            2,
                                                            0x7fff'ffff,
                                                            0x8000'0000,
                                                            0xffff'ffff,
                                                            0x7fff'ffff'ffff'ffff,
                                                            0x8000'0000'0000'0000,
                                                            0xffff'ffff'ffff'fff0,
                                                            0xffff'ffff'ffff'ffff};

/// One decision: eight bytes, so that what a mutation inserts, copies or removes tends to be whole ones.
struct Op {
    std::uint8_t code = 0, a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0;
};

class Input {
  public:
    Input(const std::uint8_t* data, std::size_t nbytes) : data_(std::as_bytes(std::span(data, nbytes))) {}

    bool empty() const noexcept { return data_.empty(); }
    Op op() noexcept {
        std::array<std::uint8_t, 8> raw{};
        const auto head = take(raw.size());
        std::transform(head.begin(), head.end(), raw.begin(),
                       [](std::byte b) { return static_cast<std::uint8_t>(b); });
        return {raw[0], raw[1], raw[2], raw[3], raw[4], raw[5], raw[6], raw[7]};
    }
    /// At most `nbytes`: what is left.
    std::span<const std::byte> take(std::size_t nbytes) noexcept {
        const auto head = data_.first(std::min(nbytes, data_.size()));
        data_ = data_.subspan(head.size());
        return head;
    }

  private:
    std::span<const std::byte> data_;
};

/// Ends the run with a crash that names what didn't hold.
[[noreturn]] inline void broken(const char* what) noexcept {
    std::fprintf(stderr, "invariant broken: %s\n", what);
    std::abort();
}
inline void demand(bool holds, const char* what) noexcept {
    if (!holds) broken(what);
}

}  // namespace kvt::fuzz
