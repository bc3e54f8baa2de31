// Copies between runs that are cut differently at both ends, within a process and out of another one.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "backends/shm_copy.hpp"

#include <doctest/doctest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "backends/copy.hpp"
#include "memory/plan.hpp"

using namespace kvt;
using namespace kvt::backends;

namespace {

// A stream whose runs lie anywhere in memory of its own, with gaps of a byte that nobody may touch.
class Scattered {
  public:
    static constexpr std::byte kGap{0xee};

    Scattered(std::uint64_t nbytes, std::uint64_t longest, std::mt19937& random) {
        std::vector<std::uint64_t> lengths;
        for (std::uint64_t left = nbytes; left > 0; left -= lengths.back()) {
            lengths.push_back(std::min<std::uint64_t>(left, 1 + random() % longest));
        }
        memory_.assign(nbytes + lengths.size() + 1, kGap);
        std::vector<std::size_t> order(lengths.size());
        for (std::size_t i = 0; i < order.size(); ++i) {
            order[i] = i;
        }
        std::shuffle(order.begin(), order.end(), random);
        std::vector<std::uint64_t> place(lengths.size());
        std::uint64_t at = 1;
        for (const std::size_t i : order) {
            place[i] = at;
            at += lengths[i] + 1;
        }
        std::uint64_t begin = 0;
        for (std::size_t i = 0; i < lengths.size(); ++i) {
            runs_.push_back({begin, begin + lengths[i], place[i]});
            begin += lengths[i];
        }
    }
    std::uint64_t runs(std::uint64_t begin, std::uint64_t end, iovec* out, std::size_t max,
                       std::size_t& count) const {
        count = 0;
        for (const Run& run : runs_) {
            if (begin < end && run.begin <= begin && begin < run.end && count < max) {
                const std::uint64_t n = std::min(end, run.end) - begin;
                out[count++] = {base() + run.place + (begin - run.begin), n};
                begin += n;
            }
        }
        return begin;
    }
    // In the order of the stream.
    template <class Byte>
    void each(const Byte& byte) {
        for (const Run& run : runs_) {
            for (std::uint64_t i = run.begin; i < run.end; ++i) {
                byte(i, memory_[run.place + i - run.begin]);
            }
        }
    }
    std::size_t gaps() const { return std::count(memory_.begin(), memory_.end(), kGap); }
    std::size_t expected_gaps() const { return runs_.size() + 1; }
    std::size_t pieces() const { return runs_.size(); }

  private:
    struct Run {
        std::uint64_t begin, end, place;
    };
    std::byte* base() const { return const_cast<std::byte*>(memory_.data()); }
    std::vector<Run> runs_;
    std::vector<std::byte> memory_;
};

std::byte value_at(std::uint64_t i) {
    return static_cast<std::byte>((i * 0x9e3779b97f4a7c15ull >> 56) % 0xee);
}

void fill(Scattered& stream) {
    stream.each([](std::uint64_t i, std::byte& byte) { byte = value_at(i); });
}

// How many bytes of [begin, end) are wrong, and how many outside aren't as they were.
std::size_t wrong(Scattered& stream, std::uint64_t begin, std::uint64_t end) {
    std::size_t n = 0;
    stream.each([&](std::uint64_t i, const std::byte& byte) {
        n += byte == (begin <= i && i < end ? value_at(i) : Scattered::kGap) ? 0 : 1;
    });
    return n;
}

// A process that does nothing until it is let go.
class Sleeper {
  public:
    Sleeper() : Sleeper([] {}) {}
    template <class First>
    explicit Sleeper(const First& first) : pid_(::fork()) {
        REQUIRE(pid_ >= 0);
        if (pid_ == 0) {
            ::prctl(PR_SET_PDEATHSIG, SIGKILL);
            first();
            for (;;) {
                ::pause();
            }
        }
    }
    ~Sleeper() { end(); }
    Sleeper(const Sleeper&) = delete;
    Sleeper& operator=(const Sleeper&) = delete;
    void end() {
        if (pid_ > 0) {
            ::kill(pid_, SIGKILL);
            ::waitpid(pid_, nullptr, 0);
            pid_ = 0;
        }
    }
    pid_t pid() const { return pid_; }

  private:
    pid_t pid_;
};

}  // namespace

TEST_CASE("any range between any runs is copied, and nothing else is touched") {
    std::mt19937 random(5);
    for (int round = 0; round < 300; ++round) {
        const std::uint64_t nbytes = 1 + random() % 20'000;
        Scattered source(nbytes, 1 + random() % 300, random);
        Scattered destination(nbytes, 1 + random() % 3000, random);
        fill(source);
        const std::uint64_t begin = random() % nbytes, end = begin + random() % (nbytes - begin + 1);
        std::uint64_t seen = 0;
        copy_runs(source, destination, begin, end, [&](const void* from, const void* to, std::size_t n) {
            REQUIRE(std::memcmp(from, to, n) == 0);
            seen += n;
        });
        CHECK(seen == end - begin);
        REQUIRE(wrong(destination, begin, end) == 0);
        CHECK(source.gaps() == source.expected_gaps());
    }
}

TEST_CASE("what is contiguous at both ends is one copy") {
    std::vector<std::byte> a(64 << 10), b(64 << 10);
    const auto shape_of = [](std::vector<std::byte>& at) {
        return std::make_shared<const memory::PoolShape>(
            std::vector<memory::Group>{{"g", 16, 0, true, "", "", "", 0}},
            std::vector<memory::Layer>{
                {"layer0", 0, {{reinterpret_cast<std::uintptr_t>(at.data()), 4096, {}, 4096, -1}}}},
            false);
    };
    const auto plan_of = [&](std::vector<std::byte>& at, memory::Ids ids) {
        return memory::StreamPlan(shape_of(at), {0}, {std::make_shared<const memory::Ids>(std::move(ids))},
                                  memory::Heads::every());
    };
    const auto source = plan_of(a, {2, 3, 4, 5, 9}), destination = plan_of(b, {7, 8, 9, 1, 2});
    std::vector<std::size_t> pieces;
    copy_runs(source, destination, 0, source.nbytes(),
              [&](const void*, const void*, std::size_t n) { pieces.push_back(n); });
    CHECK(pieces == std::vector<std::size_t>{3 * 4096, 4096, 4096});
    CHECK_THROWS_AS(copy_runs(source, destination, 0, source.nbytes() + 1), std::out_of_range);
    CHECK_THROWS_AS((void)read_runs(::getpid(), source, destination, 0, source.nbytes() + 1),
                    std::out_of_range);
}

TEST_CASE("memory of another process is read, in as many calls as it takes") {
    std::mt19937 random(6);
    for (const std::uint64_t longest : {4u, 100u, 5000u}) {
        Scattered source(100'000, longest, random), destination(100'000, 70, random);
        fill(source);
        const Sleeper other;  // which has all of it, where we have it
        source.each([](std::uint64_t, std::byte& byte) { byte = std::byte{0}; });
        CHECK(destination.pieces() > kPiecesPerRead);
        CHECK_FALSE(read_runs(other.pid(), source, destination, 3, 99'000));
        CHECK(wrong(destination, 3, 99'000) == 0);
    }
}

TEST_CASE("a read that can't be is an error: forbidden, gone, or not all of it there") {
    std::vector<std::byte> into(8192);
    auto* const page = static_cast<std::byte*>(
        ::mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    REQUIRE(page != MAP_FAILED);
    REQUIRE(::munmap(page + 4096, 4096) == 0);
    const iovec from{page, 8192}, half{page, 4096}, to{into.data(), 8192}, half_to{into.data(), 4096};
    Sleeper other;
    CHECK_FALSE(read_pieces(other.pid(), &half_to, 1, &half, 1, 4096));
    CHECK(read_pieces(other.pid(), &to, 1, &from, 1, 8192) == std::errc::bad_address);  // it reads half
    const iovec nothing{page + 4096, 4096};
    CHECK(read_pieces(other.pid(), &half_to, 1, &nothing, 1, 4096) == std::errc::bad_address);
    const pid_t was = other.pid();
    other.end();
    CHECK(read_pieces(was, &half_to, 1, &half, 1, 4096) == std::errc::no_such_process);
    ::munmap(page, 4096);
    if (::geteuid() != 0) {
        CHECK(read_pieces(1, &half_to, 1, &half, 1, 4096) == std::errc::operation_not_permitted);
    }
}

TEST_CASE("F23: the process at the other end is known by its socket, and its death is seen at once") {
    const Fd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un any{};
    any.sun_family = AF_UNIX;
    REQUIRE(::bind(listener.get(), reinterpret_cast<sockaddr*>(&any), sizeof(sa_family_t)) == 0);
    socklen_t nbytes = sizeof any;
    REQUIRE(::getsockname(listener.get(), reinterpret_cast<sockaddr*>(&any), &nbytes) == 0);
    REQUIRE(::listen(listener.get(), 1) == 0);
    Sleeper other([&] {
        const int socket = ::socket(AF_UNIX, SOCK_STREAM, 0);
        (void)::connect(socket, reinterpret_cast<sockaddr*>(&any), nbytes);
    });
    const Fd accepted(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    REQUIRE(accepted);
    const auto peer = PeerProcess::at_other_end(accepted.get());
    CHECK(peer.pid() == other.pid());
    CHECK(peer.alive());
    other.end();
    CHECK_FALSE(peer.alive());
    CHECK_THROWS_AS(PeerProcess::at_other_end(peer.pidfd()), std::system_error);
}
