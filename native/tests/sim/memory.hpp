// The memory of a simulated machine: layers of blocks with canaries between them, and a shadow of what every
// byte outside a live receive must be.
//
// Lives here: addresses, allocation, the shadow. Does not live here: when memory is given back (machine.hpp).
// Invariant: a block that no live receive owns equals its shadow; who changes it changes both.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "random.hpp"

namespace kvt::sim {

class Memory {
  public:
    static constexpr std::size_t kBlocks = 12;
    static constexpr std::size_t kCanary = 8;

    Memory(const std::vector<std::size_t>& pieces, Random& random) : pieces_(pieces), random_(random) {
        std::size_t at = kCanary;
        for (const std::size_t piece : pieces_) {
            bases_.push_back(at);
            at += kBlocks * (piece + kCanary);
        }
        bytes_.resize(at);
        for (auto& byte : bytes_) {
            byte = static_cast<std::byte>(random_.next());
        }
        shadow_ = bytes_;
        owned_.assign(pieces_.size() * kBlocks, false);
        reads_.assign(pieces_.size() * kBlocks, 0);
        written_late_.assign(pieces_.size() * kBlocks, false);
    }

    std::byte* piece(std::size_t layer, std::size_t block) noexcept {
        return bytes_.data() + at(layer, block);
    }
    std::size_t layers() const noexcept { return pieces_.size(); }
    std::size_t piece_nbytes(std::size_t layer) const noexcept { return pieces_[layer]; }

    bool free_for_receive(std::size_t layer, std::size_t block) const noexcept {
        return !owned_[layer * kBlocks + block] && reads_[layer * kBlocks + block] == 0;
    }
    bool free_for_send(std::size_t layer, std::size_t block) const noexcept {
        return !owned_[layer * kBlocks + block] && !written_late_[layer * kBlocks + block];
    }
    void own(std::size_t layer, std::size_t block) noexcept { owned_[layer * kBlocks + block] = true; }
    /// The receive is over: its owner writes something else there at once.
    void disown(std::size_t layer, std::size_t block) noexcept {
        owned_[layer * kBlocks + block] = false;
        rewrite(layer, block);
    }
    void read(std::size_t layer, std::size_t block) noexcept { ++reads_[layer * kBlocks + block]; }
    /// A gated send's: its bytes come when its layer is released, and until then nobody else may send it.
    void write_late(std::size_t layer, std::size_t block) noexcept {
        written_late_[layer * kBlocks + block] = true;
    }
    void write(std::size_t layer, std::size_t block, const std::vector<std::byte>& bytes) noexcept {
        std::copy(bytes.begin(), bytes.end(), bytes_.begin() + static_cast<std::ptrdiff_t>(at(layer, block)));
        std::copy(bytes.begin(), bytes.end(),
                  shadow_.begin() + static_cast<std::ptrdiff_t>(at(layer, block)));
    }
    /// Whether a send that isn't over reads the block at this address.
    bool may_be_read(const void* address) const noexcept {
        const auto place = static_cast<std::size_t>(static_cast<const std::byte*>(address) - bytes_.data());
        std::size_t layer = pieces_.size() - 1;
        while (bases_[layer] > place) --layer;
        return reads_[layer * kBlocks + (place - bases_[layer]) / (pieces_[layer] + kCanary)] > 0;
    }
    /// The send is over; when it was the last of its block, the owner rewrites it at once.
    void unread(std::size_t layer, std::size_t block) noexcept {
        if (--reads_[layer * kBlocks + block] == 0) {
            written_late_[layer * kBlocks + block] = false;
            rewrite(layer, block);
        }
    }
    /// Whether everything that no receive owns is as it was left.
    bool intact() const noexcept {
        if (owned_.size() == static_cast<std::size_t>(std::count(owned_.begin(), owned_.end(), false))) {
            return bytes_ == shadow_;
        }
        std::size_t from = 0;
        for (std::size_t layer = 0; layer < pieces_.size(); ++layer) {
            for (std::size_t block = 0; block < kBlocks; ++block) {
                if (owned_[layer * kBlocks + block]) {
                    const std::size_t hole = at(layer, block);
                    if (std::memcmp(bytes_.data() + from, shadow_.data() + from, hole - from) != 0) {
                        return false;
                    }
                    from = hole + pieces_[layer];
                }
            }
        }
        return std::memcmp(bytes_.data() + from, shadow_.data() + from, bytes_.size() - from) == 0;
    }
    bool holds(const void* address) const noexcept {
        return address >= bytes_.data() && address < bytes_.data() + bytes_.size();
    }

  private:
    std::size_t at(std::size_t layer, std::size_t block) const noexcept {
        return bases_[layer] + block * (pieces_[layer] + kCanary);
    }
    void rewrite(std::size_t layer, std::size_t block) noexcept {
        const std::size_t from = at(layer, block);
        for (std::size_t i = 0; i < pieces_[layer]; i += 8) {
            const std::uint64_t fresh = random_.next();
            std::memcpy(bytes_.data() + from + i, &fresh, std::min<std::size_t>(8, pieces_[layer] - i));
        }
        std::memcpy(shadow_.data() + from, bytes_.data() + from, pieces_[layer]);
    }

    std::vector<std::size_t> pieces_, bases_;
    std::vector<std::byte> bytes_, shadow_;
    std::vector<bool> owned_, written_late_;
    std::vector<unsigned> reads_;
    Random& random_;
};

}  // namespace kvt::sim
