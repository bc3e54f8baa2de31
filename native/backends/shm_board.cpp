#include "backends/shm_board.hpp"

#include <cstring>
#include <iterator>
#include <new>
#include <numeric>
#include <utility>

#include "protocol/bytes.hpp"

namespace kvt::backends {

namespace {

constexpr std::uint64_t kMagic = 0x3130'6472'616f'626bULL;  // "kboard01" in memory
constexpr auto kRelaxed = std::memory_order_relaxed;

constexpr std::uint64_t kEveryBlock = 1, kGroupsMask = 7, kCounted = 1 << 4;

constexpr std::uint64_t pack_what(std::uint32_t pool, bool every_block, bool counted, std::uint64_t groups) {
    static_assert(kGrantGroups <= kGroupsMask);
    return std::uint64_t{pool} << 32 | (counted ? kCounted : 0) | groups << 1 |
           (every_block ? kEveryBlock : 0);
}

constexpr std::uint64_t pack_group(std::uint16_t group, std::uint32_t begin, std::uint32_t count) {
    static_assert(kBoardIds < 1 << 24);
    return std::uint64_t{group} << 48 | std::uint64_t{begin} << 24 | count;
}

constexpr GrantCopy::Group unpack_group(std::uint64_t word) {
    constexpr std::uint64_t k24 = (1 << 24) - 1;
    return {static_cast<std::uint16_t>(word >> 48), static_cast<std::uint32_t>(word >> 24 & k24),
            static_cast<std::uint32_t>(word & k24)};
}

struct TokenWords {
    explicit TokenWords(const GrantToken& token) { std::memcpy(word, token.data(), sizeof word); }
    std::uint32_t slot(std::uint32_t probe) const {
        return static_cast<std::uint32_t>((word[0] + probe) % kBoardGrants);
    }
    bool stands_in(const BoardMemory::GrantSlot& slot) const {
        return slot.token[0].load(kRelaxed) == word[0] && slot.token[1].load(kRelaxed) == word[1];
    }
    std::uint64_t word[2];
};

// The loads before it are done before the load of the generation that follows it.
bool unchanged(const std::atomic<std::uint64_t>& generation, std::uint64_t before) {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    return generation.load(kRelaxed) == before;
}

std::uint32_t checked(std::uint32_t index, std::uint32_t count) {
    if (index >= count) {
        throw protocol::Violation("a place beyond the peer's board");
    }
    return index;
}

}  // namespace

OwnBoard::OwnBoard() : segment_("kvt-board", sizeof(BoardMemory)), ids_of_slot_(kBoardGrants) {
    free_guards_.resize(kBoardGuards);
    std::iota(free_guards_.rbegin(), free_guards_.rend(), 0u);
    free_ids_.emplace(0, kBoardIds);
    memory().magic.store(kMagic, std::memory_order_release);
}

std::optional<Guard> OwnBoard::acquire() {
    if (free_guards_.empty()) {
        return std::nullopt;
    }
    const std::uint32_t index = free_guards_.back();
    free_guards_.pop_back();
    fence();
    return Guard{index, memory().guards[index].generation.load(kRelaxed)};
}

// pop_back() kept its room: there is nothing to allocate.
void OwnBoard::end(Guard guard) noexcept {
    auto& generation = memory().guards[guard.index].generation;
    if (generation.load(kRelaxed) == guard.generation) {
        generation.store(guard.generation + 1, std::memory_order_release);
        free_guards_.push_back(guard.index);
    }
}

void OwnBoard::end(GrantPlace place) noexcept {
    auto& generation = memory().grants[place.slot].generation;
    if (generation.load(kRelaxed) == place.generation) {
        generation.store(place.generation + 1, std::memory_order_release);
        give_back(std::exchange(ids_of_slot_[place.slot], IdRange{}));
    }
}

void OwnBoard::end_grants() noexcept {
    for (std::uint32_t slot = 0; slot < kBoardGrants; ++slot) {
        const std::uint64_t generation = memory().grants[slot].generation.load(kRelaxed);
        if (generation % 2 != 0) {
            end(GrantPlace{slot, generation});
        }
    }
}

std::optional<GrantPlace> OwnBoard::publish(const GrantToken& token, std::uint32_t pool,
                                            std::span<const GroupIds> groups, bool counted) {
    std::uint64_t count = 0;
    for (const GroupIds& group : groups) {
        count += group.ids.size();
    }
    const auto slot = groups.size() <= kGrantGroups ? free_slot(token) : std::nullopt;
    const auto begin = slot ? take_ids(count) : std::nullopt;
    if (!begin) {
        return std::nullopt;
    }
    ids_of_slot_[*slot] = {*begin, static_cast<std::uint32_t>(count)};
    BoardMemory& board = memory();
    // What stood here ended, and whoever sees a word of what follows sees that end, too.
    std::atomic_thread_fence(std::memory_order_release);
    std::uint32_t at = *begin;
    for (std::size_t i = 0; i < groups.size(); ++i) {
        const auto& [group, ids] = groups[i];
        board.grants[*slot].groups[i].store(pack_group(group, at, static_cast<std::uint32_t>(ids.size())),
                                            kRelaxed);
        for (const std::uint32_t id : ids) {
            board.ids[at++].store(id, kRelaxed);
        }
    }
    return fill(*slot, token, pack_what(pool, false, counted, groups.size()));
}

std::optional<GrantPlace> OwnBoard::publish_every_block(const GrantToken& token, std::uint32_t pool,
                                                        bool counted) {
    const auto slot = free_slot(token);
    if (!slot) {
        return std::nullopt;
    }
    std::atomic_thread_fence(std::memory_order_release);
    return fill(*slot, token, pack_what(pool, true, counted, 0));
}

GrantPlace OwnBoard::fill(std::uint32_t index, const GrantToken& token, std::uint64_t what) noexcept {
    BoardMemory::GrantSlot& slot = memory().grants[index];
    const TokenWords words(token);
    slot.token[0].store(words.word[0], kRelaxed);
    slot.token[1].store(words.word[1], kRelaxed);
    slot.what.store(what, kRelaxed);
    fence();  // streaming stores that filled the blocks would pass the release
    const std::uint64_t generation = slot.generation.load(kRelaxed) + 1;
    slot.generation.store(generation, std::memory_order_release);
    return {index, generation};
}

std::optional<std::uint32_t> OwnBoard::free_slot(const GrantToken& token) const noexcept {
    const TokenWords words(token);
    std::optional<std::uint32_t> free;
    for (std::uint32_t probe = 0; probe < kGrantProbes; ++probe) {
        const std::uint32_t index = words.slot(probe);
        const BoardMemory::GrantSlot& slot = memory().grants[index];
        if (slot.generation.load(kRelaxed) % 2 == 0) {
            free = free ? free : index;
        } else if (words.stands_in(slot)) {
            return std::nullopt;
        }
    }
    return free;
}

// The first that fits: there are at most as many holes as grants.
std::optional<std::uint32_t> OwnBoard::take_ids(std::uint64_t count) {
    if (count == 0) {
        return 0;
    }
    for (auto free = free_ids_.begin(); free != free_ids_.end(); ++free) {
        const auto [begin, room] = *free;
        if (room >= count) {
            const auto n = static_cast<std::uint32_t>(count);
            free_ids_.erase(free);
            if (room > n) {
                free_ids_.emplace(begin + n, room - n);
            }
            return begin;
        }
    }
    return std::nullopt;
}

// Where there is no memory to note it, the room for ids is lost: a grant's end can't fail.
void OwnBoard::give_back(IdRange range) noexcept try {
    if (range.count == 0) {
        return;
    }
    auto next = free_ids_.lower_bound(range.begin);
    if (next != free_ids_.end() && range.begin + range.count == next->first) {
        range.count += next->second;
        next = free_ids_.erase(next);
    }
    if (next != free_ids_.begin()) {
        const auto before = std::prev(next);
        if (before->first + before->second == range.begin) {
            before->second += range.count;
            return;
        }
    }
    free_ids_.emplace_hint(next, range.begin, range.count);
} catch (const std::bad_alloc&) {
}

PeerBoard PeerBoard::open(Fd fd, std::uint64_t nbytes) {
    if (nbytes != sizeof(BoardMemory)) {
        throw protocol::Violation("the peer's board has another size");
    }
    PeerBoard board(PeerSegment::open(std::move(fd), nbytes));
    if (board.memory().magic.load(std::memory_order_acquire) != kMagic) {
        throw protocol::Violation("what the peer calls its board isn't one");
    }
    return board;
}

bool PeerBoard::find(const GrantToken& token, GrantCopy& into) const {
    const TokenWords words(token);
    for (std::uint32_t probe = 0; probe < kGrantProbes; ++probe) {
        if (copy(words.slot(probe), token, into)) {
            return true;
        }
    }
    return false;
}

bool PeerBoard::copy(std::uint32_t index, const GrantToken& token, GrantCopy& into) const {
    const BoardMemory::GrantSlot& slot = memory().grants[index];
    const std::uint64_t generation = slot.generation.load(std::memory_order_acquire);
    if (generation % 2 == 0 || !TokenWords(token).stands_in(slot)) {
        return false;
    }
    into.place = {index, generation};
    into.groups.clear();
    into.ids.clear();
    const std::uint64_t what = slot.what.load(kRelaxed);
    into.pool = static_cast<std::uint32_t>(what >> 32);
    into.every_block = (what & kEveryBlock) != 0;
    into.counted = (what & kCounted) != 0;
    const std::uint64_t groups = what >> 1 & kGroupsMask;
    bool possible = groups <= kGrantGroups && !(into.every_block && groups > 0);
    std::uint64_t total = 0;
    for (std::uint64_t i = 0; possible && i < groups; ++i) {
        GrantCopy::Group group = unpack_group(slot.groups[i].load(kRelaxed));
        total += group.count;
        possible = group.begin <= kBoardIds && group.count <= kBoardIds - group.begin && total <= kBoardIds;
        for (std::uint32_t at = 0; possible && at < group.count; ++at) {
            into.ids.push_back(memory().ids[group.begin + at].load(kRelaxed));
        }
        group.begin = static_cast<std::uint32_t>(total - group.count);
        into.groups.push_back(group);
    }
    if (!unchanged(slot.generation, generation)) {
        return false;
    }
    if (!possible) {
        throw protocol::Violation("a grant on the peer's board names what can't be");
    }
    return true;
}

bool PeerBoard::live(Guard guard) const {
    const auto& line = memory().guards[checked(guard.index, kBoardGuards)];
    return line.generation.load(std::memory_order_acquire) == guard.generation;
}

bool PeerBoard::live(GrantPlace place) const {
    const auto& slot = memory().grants[checked(place.slot, kBoardGrants)];
    return slot.generation.load(std::memory_order_acquire) == place.generation;
}

bool PeerBoard::still(Guard guard) const {
    return unchanged(memory().guards[checked(guard.index, kBoardGuards)].generation, guard.generation);
}

bool PeerBoard::still(GrantPlace place) const {
    return unchanged(memory().grants[checked(place.slot, kBoardGrants)].generation, place.generation);
}

}  // namespace kvt::backends
