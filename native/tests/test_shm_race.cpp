// The race that the board's fence decides: an owner that ends a grant and rewrites its block as fast as it
// can, with streaming stores, in another process on another core; a reader that must not take one byte of the
// new block for the old one's.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <ostream>
#include <utility>
#include <vector>

#include "backends/shm_board.hpp"
#include "base/clock.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

using namespace kvt;
using namespace kvt::backends;

namespace {

constexpr std::size_t kMostWords = 512;
constexpr std::uint64_t kReads = 4'000'000;
constexpr std::int64_t kPatienceNs = 30'000'000'000;

std::vector<int> cores() {
    cpu_set_t set;
    CPU_ZERO(&set);
    ::sched_getaffinity(0, sizeof set, &set);
    std::vector<int> all;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (CPU_ISSET(cpu, &set)) {
            all.push_back(cpu);
        }
    }
    return all;
}

void pin(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    ::sched_setaffinity(0, sizeof set, &set);
}

void stream_words(std::uint64_t* to, std::size_t n, std::uint64_t value) {
#if defined(__x86_64__)
    for (std::size_t i = 0; i < n; ++i) {
        _mm_stream_si64(reinterpret_cast<long long*>(to + i), static_cast<long long>(value));
    }
#else
    for (std::size_t i = 0; i < n; ++i) {
        reinterpret_cast<std::atomic<std::uint64_t>*>(to + i)->store(value, std::memory_order_relaxed);
    }
#endif
}

constexpr GrantToken kToken{std::byte{42}};

// Every word of the block is the number of the grant that it stands for; the grant has it as its pool's
// number.
struct Arena {
    OwnBoard board;
    OwnSegment blocks{"test", kMostWords * sizeof(std::uint64_t)};
};

// An owner who ends, rewrites and grants again, with all the board's stores and none of its fences.
class Unfenced {
  public:
    explicit Unfenced(const OwnBoard& board)
        : memory_(*reinterpret_cast<BoardMemory*>(board.segment().data())) {}
    GrantPlace publish_every_block(const GrantToken& token, std::uint32_t pool) {
        BoardMemory::GrantSlot& slot = memory_.grants[kSlot];
        std::uint64_t words[2];
        std::memcpy(words, token.data(), sizeof words);
        slot.token[0].store(words[0], std::memory_order_relaxed);
        slot.token[1].store(words[1], std::memory_order_relaxed);
        slot.what.store(std::uint64_t{pool} << 32 | 1, std::memory_order_relaxed);
        const std::uint64_t generation = slot.generation.load(std::memory_order_relaxed) + 1;
        slot.generation.store(generation, std::memory_order_release);
        return {kSlot, generation};
    }
    void end(GrantPlace place) {
        memory_.grants[kSlot].generation.store(place.generation + 1, std::memory_order_release);
    }
    void fence() {}

  private:
    static constexpr std::uint32_t kSlot = static_cast<std::uint32_t>(kToken[0]);
    BoardMemory& memory_;
};

GrantPlace place_of(std::optional<GrantPlace> place) { return place.value(); }

// So that readers have time: now more, now less.
void linger(std::uint32_t version) {
    for (std::uint32_t spin = version * 2654435761u >> 20; spin > 0; --spin) {
        std::atomic_signal_fence(std::memory_order_seq_cst);
    }
}

template <class Board>
[[noreturn]] void rewrite_for_ever(Board& board, std::uint64_t* block, std::size_t words) {
    for (std::uint32_t version = 1;; ++version) {
        stream_words(block, words, version);
        const GrantPlace place = place_of(board.publish_every_block(kToken, version));
        linger(version);
        board.end(place);
        board.fence();
        stream_words(block, words, ~std::uint64_t{version});
    }
}

// Grants again and again, each time of other ids: as many as the number of the pool says, each that number.
[[noreturn]] void republish_for_ever(OwnBoard& board) {
    std::vector<std::uint32_t> ids;
    for (std::uint32_t version = 1;; ++version) {
        ids.assign(version % 64, version);
        const GroupIds group{0, ids};
        const GrantPlace place = place_of(board.publish(kToken, version, {&group, 1}));
        linger(version);
        board.end(place);
    }
}

// A process of its own, on its own core, until it goes out of scope.
class OwnerProcess {
  public:
    template <class Main>
    OwnerProcess(int cpu, const Main& main) : pid_(::fork()) {
        REQUIRE(pid_ >= 0);
        if (pid_ == 0) {
            ::prctl(PR_SET_PDEATHSIG, SIGKILL);
            pin(cpu);
            main();
        }
    }
    ~OwnerProcess() {
        ::kill(pid_, SIGKILL);
        ::waitpid(pid_, nullptr, 0);
    }
    OwnerProcess(const OwnerProcess&) = delete;
    OwnerProcess& operator=(const OwnerProcess&) = delete;

  private:
    pid_t pid_;
};

struct Seen {
    std::uint64_t tried = 0, accepted = 0, wrong = 0;
    friend std::ostream& operator<<(std::ostream& out, const Seen& seen) {
        return out << seen.tried << " tried, " << seen.accepted << " accepted, " << seen.wrong << " wrong";
    }
};

PeerBoard reader_of(const OwnBoard& own) {
    return PeerBoard::open(Fd(::fcntl(own.segment().fd(), F_DUPFD_CLOEXEC, 0)), own.segment().size());
}

// Takes what is granted until `reads` of it were accepted, or so many that were wrong, or patience ends.
// take(grant) says whether it was right, or nothing where it isn't accepted.
template <class Take>
Seen take_grants(const PeerBoard& board, std::uint64_t reads, std::uint64_t enough_wrong, const Take& take) {
    const std::int64_t until = monotonic_ns() + kPatienceNs;
    GrantCopy grant;
    Seen seen;
    while (seen.accepted < reads && seen.wrong < enough_wrong) {
        if (++seen.tried % 4096 == 0 && monotonic_ns() > until) {
            break;
        }
        const std::optional<bool> right = board.find(kToken, grant) ? take(grant) : std::nullopt;
        seen.accepted += right ? 1 : 0;
        seen.wrong += right && !*right ? 1 : 0;
    }
    return seen;
}

// This thread on the first core and the owner on the last, while it lives.
class Cores {
  public:
    Cores() : all_(cores()) { pin(all_.front()); }
    ~Cores() {
        cpu_set_t set;
        CPU_ZERO(&set);
        for (const int cpu : all_) {
            CPU_SET(cpu, &set);
        }
        ::sched_setaffinity(0, sizeof set, &set);
    }
    int owner() const { return all_.back(); }

  private:
    std::vector<int> all_;
};

Seen race_for_blocks(bool fenced, std::size_t words, std::uint64_t reads, std::uint64_t enough_wrong) {
    Arena arena;
    const Cores both;
    const OwnerProcess owner(both.owner(), [&] {
        auto* const block = reinterpret_cast<std::uint64_t*>(arena.blocks.data());
        if (fenced) {
            rewrite_for_ever(arena.board, block, words);
        }
        Unfenced board(arena.board);
        rewrite_for_ever(board, block, words);
    });
    const PeerBoard board = reader_of(arena.board);
    const auto blocks = PeerSegment::open(Fd(::fcntl(arena.blocks.fd(), F_DUPFD_CLOEXEC, 0)),
                                          arena.blocks.size());
    std::vector<std::uint64_t> copy(words);
    return take_grants(board, reads, enough_wrong, [&](const GrantCopy& grant) -> std::optional<bool> {
        std::memcpy(copy.data(), blocks.data(), words * sizeof(std::uint64_t));
        if (!board.still(grant.place)) {
            return std::nullopt;
        }
        return std::all_of(copy.begin(), copy.end(), [&](auto word) { return word == grant.pool; });
    });
}

Seen race_for_entries(std::uint64_t reads) {
    Arena arena;
    const Cores both;
    const OwnerProcess owner(both.owner(), [&] { republish_for_ever(arena.board); });
    return take_grants(reader_of(arena.board), reads, 1, [](const GrantCopy& grant) {
        return std::optional(
            grant.groups.size() == 1 && grant.ids.size() == grant.pool % 64 &&
            std::all_of(grant.ids.begin(), grant.ids.end(), [&](auto id) { return id == grant.pool; }));
    });
}

bool one_core() {
    if (cores().size() > 1) {
        return false;
    }
    MESSAGE("not run: there is one core");
    return true;
}

}  // namespace

TEST_CASE("F15: of millions of reads beside an owner that ends and rewrites, none is torn or stale") {
    if (one_core()) {
        return;
    }
    for (const auto& [words, reads] : {std::pair{8u, kReads}, {64u, kReads / 2}, {512u, kReads / 40}}) {
        const Seen seen = race_for_blocks(true, words, reads, 1);
        MESSAGE(seen);
        CHECK(seen.accepted == reads);
        CHECK(seen.wrong == 0);
    }
}

TEST_CASE("F15: without the fences such reads are seen") {
    if (one_core()) {
        return;
    }
    const Seen seen = race_for_blocks(false, 8, kReads, 1000);
    MESSAGE(seen);
#if defined(__x86_64__)
    CHECK(seen.wrong == 1000);
#endif
}

TEST_CASE("an entry that is found is whole, however often it is rewritten") {
    if (one_core()) {
        return;
    }
    const Seen seen = race_for_entries(kReads / 40);
    MESSAGE(seen);
    CHECK(seen.accepted == kReads / 40);
    CHECK(seen.wrong == 0);
}
