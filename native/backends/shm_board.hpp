// What one peer may read without asking: generation words and grants, in a memfd that the owner writes.
//
// Lives here: the layout of that memory, the owner's side of it and the reader's. Not here: how it reaches
// the peer (shm_channel.hpp), when a grant ends, what its ids mean.
//
// Theory of operation. Each guard and each grant has a generation; that of a live grant is odd. The owner
// ends one by storing the next generation, calls fence(), and only then rewrites the blocks; what it wrote is
// fenced again before an entry says that it may be read. A reader notes the generation, copies the blocks,
// fences, and loads the generation again: if it is the one that it noted, then every byte of the copy was
// loaded after the blocks were written and before they were rewritten. Release stores in place of the fences
// aren't enough: streaming stores aren't ordered by them. Measured (Zen 5, 64-byte blocks, the reader on
// another core): of the reads that passed the check nine in ten were wrong without fences; some were with
// either fence alone; none of 40 million with both.
//
// Invariant: an entry is rewritten only after its end, and what it says is good only if its generation is the
// same after as before it was copied. The owner may be hostile: nothing in a peer's board is used as an index
// before it was compared with the sizes below, which are the same for everybody.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <vector>

#include "backends/shm_segment.hpp"

namespace kvt::backends {

using GrantToken = std::array<std::byte, 16>;  // random: it is its own hash

/// Where the owner says that a transfer's bytes are still the ones that it offered.
struct Guard {
    std::uint32_t index;
    std::uint64_t generation;
};

/// Where a grant stands.
struct GrantPlace {
    std::uint32_t slot;
    std::uint64_t generation;
};

struct GroupIds {
    std::uint16_t group;
    std::span<const std::uint32_t> ids;
};

/// What a board says of one grant, copied while it was live.
struct GrantCopy {
    struct Group {
        std::uint16_t group;
        std::uint32_t begin, count;  // in ids
    };
    GrantPlace place;
    std::uint32_t pool;
    bool every_block;  // of the pool; then there are no groups
    bool counted;      // the owner counts its readers
    std::vector<Group> groups;
    std::vector<std::uint32_t> ids;
};

inline constexpr std::uint32_t kBoardGuards = 4096;
inline constexpr std::uint32_t kBoardGrants = 4096;
inline constexpr std::uint32_t kBoardIds = 1 << 18;  // of all grants; 1 MiB
inline constexpr std::uint32_t kGrantProbes = 8;     // slots that a token may stand in, in a row
inline constexpr std::uint32_t kGrantGroups = 4;     // that a slot has room for

struct BoardMemory {
    struct alignas(64) GuardLine {
        std::atomic<std::uint64_t> generation;
    };
    struct alignas(64) GrantSlot {
        std::atomic<std::uint64_t> generation;
        std::atomic<std::uint64_t> token[2];
        std::atomic<std::uint64_t> what;                  // pool:32 | counted:1 | groups:3 | every block:1
        std::atomic<std::uint64_t> groups[kGrantGroups];  // group:16 | begin:24 | count:24
    };
    alignas(64) std::atomic<std::uint64_t> magic;
    GuardLine guards[kBoardGuards];
    GrantSlot grants[kBoardGrants];
    std::atomic<std::uint32_t> ids[kBoardIds];
};
static_assert(sizeof(BoardMemory::GrantSlot) == 64 && std::atomic<std::uint64_t>::is_always_lock_free);

/// The owner's side. Its calls are made one at a time.
class OwnBoard {
  public:
    /// Throws std::system_error, as OwnSegment does.
    OwnBoard();

    const OwnSegment& segment() const noexcept { return segment_; }

    /// For bytes that are written by now. Nothing when all are in use.
    std::optional<Guard> acquire();
    /// Its guard or grant no longer holds, once fence() was called: only then may the blocks be rewritten.
    /// Nothing where it has ended before.
    void end(Guard guard) noexcept;
    void end(GrantPlace place) noexcept;
    /// All grants: for who can't end them one by one any more.
    void end_grants() noexcept;
    /// One for any number of ends.
    static void fence() noexcept { std::atomic_thread_fence(std::memory_order_seq_cst); }

    /// For blocks that are written by now. Nothing where it doesn't fit (too many groups or ids, no free slot
    /// near its token) or the token stands here already: then its readers must ask.
    std::optional<GrantPlace> publish(const GrantToken& token, std::uint32_t pool,
                                      std::span<const GroupIds> groups, bool counted = false);
    std::optional<GrantPlace> publish_every_block(const GrantToken& token, std::uint32_t pool,
                                                  bool counted = false);

  private:
    struct IdRange {
        std::uint32_t begin, count;
    };
    std::optional<std::uint32_t> free_slot(const GrantToken& token) const noexcept;
    std::optional<std::uint32_t> take_ids(std::uint64_t count);
    void give_back(IdRange range) noexcept;
    GrantPlace fill(std::uint32_t slot, const GrantToken& token, std::uint64_t what) noexcept;
    BoardMemory& memory() const noexcept { return *reinterpret_cast<BoardMemory*>(segment_.data()); }

    OwnSegment segment_;
    std::vector<std::uint32_t> free_guards_;
    std::vector<IdRange> ids_of_slot_;
    std::map<std::uint32_t, std::uint32_t> free_ids_;  // begin -> count; no two touch
};

/// The reader's side; threads share it.
class PeerBoard {
  public:
    /// As PeerSegment::open().
    static PeerBoard open(Fd fd, std::uint64_t nbytes);

    /// False: no such grant stands here (any more). Throws protocol::Violation where the entry can't be.
    bool find(const GrantToken& token, GrantCopy& into) const;
    /// Before copying: whether it is worth while.
    bool live(Guard guard) const;
    bool live(GrantPlace place) const;
    /// After copying: whether what was copied is what was offered or granted. Violation: no such place.
    bool still(Guard guard) const;
    bool still(GrantPlace place) const;

  private:
    explicit PeerBoard(PeerSegment segment) : segment_(std::move(segment)) {}
    bool copy(std::uint32_t slot, const GrantToken& token, GrantCopy& into) const;
    const BoardMemory& memory() const noexcept {
        return *reinterpret_cast<const BoardMemory*>(segment_.data());
    }

    PeerSegment segment_;
};

}  // namespace kvt::backends
