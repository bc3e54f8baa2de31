// Two links of shared memory: what is announced, copied, ended, and what a peer that breaks the rules gets.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "shm_link_pair.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

using namespace kvt;
using namespace kvt::test;
using backends::Copied;

namespace {

constexpr std::size_t kSize = 3 << 20;

std::size_t open_fds() {
    DIR* const all = ::opendir("/proc/self/fd");
    std::size_t n = 0;
    while (::readdir(all) != nullptr) {
        ++n;
    }
    ::closedir(all);
    return n;
}

Bytes located(Links& links, const Memory& memory, std::shared_ptr<protocol::Loan>& loan,
              std::uint64_t pool = 1) {
    auto found = links.source.link->locate(memory.source(pool));
    REQUIRE(found);
    loan = found->loan;
    return found->location;
}

// Numbers of descriptors that are left: `n`.
class FewDescriptors {
  public:
    explicit FewDescriptors(rlim_t n) {
        REQUIRE(::getrlimit(RLIMIT_NOFILE, &was_) == 0);
        const Fd next(::open("/dev/null", O_RDONLY | O_CLOEXEC));
        const rlimit few{static_cast<rlim_t>(next.get()) + n, was_.rlim_max};
        REQUIRE(::setrlimit(RLIMIT_NOFILE, &few) == 0);
    }
    ~FewDescriptors() { ::setrlimit(RLIMIT_NOFILE, &was_); }

  private:
    rlimit was_{};
};

// Says on a channel what it likes.
class Raw {
  public:
    explicit Raw(Fd socket) : socket_(std::move(socket)) {}
    void say(const ShmMessage& message, Fd fd = Fd()) {
        REQUIRE(writer_.push(message, std::move(fd)));
        REQUIRE(writer_.flush(socket_.get()));
    }
    void file(ShmType type, std::uint64_t id, const Bytes& content) {
        const OwnSegment file("raw", content.size());
        std::memcpy(file.data(), content.data(), content.size());
        ShmMessage message{type, id};
        message.a = content.size();
        say(message, Fd(::fcntl(file.fd(), F_DUPFD_CLOEXEC, 0)));
    }
    void close() { socket_.reset(); }

  private:
    Fd socket_;
    ShmWriter writer_;
};

// A link with such a peer.
struct Exposed {
    Exposed() : Exposed(channel()) {}
    explicit Exposed(std::pair<Fd, Fd> ends) : raw(std::move(ends.first)), here(std::move(ends.second)) {
        here.link->start();
    }
    void ends_with(Cause cause, const char* why) const {
        until([&] { return here.host->is_lost(); });
        CHECK(here.host->lost.load() == static_cast<int>(cause));
        CHECK(here.host->why.find(why) != std::string::npos);
        CHECK_FALSE(here.link->up());
    }
    Raw raw;
    End here;
};

// A pool whose pieces are scattered over so many times 65,536 places.
std::shared_ptr<const memory::PoolShape> scattered(std::uint64_t count) {
    std::vector<memory::Layer> layers;
    for (std::uint64_t i = 0; i < count; ++i) {
        layers.push_back({std::to_string(i), 0, {{1 << 20, 1 << 18, {{65'536 - i, 2}}, 1, -1}}});
    }
    std::vector<memory::Group> groups{{"kv", 1, 0, true, "", "", "", 0}};
    return std::make_shared<const memory::PoolShape>(std::move(groups), std::move(layers), false);
}

}  // namespace

TEST_CASE("shared and plain memory are copied, byte for byte") {
    for (const bool shared : {true, false}) {
        CAPTURE(shared);
        Links links;
        const Memory memory(kSize, shared);
        std::shared_ptr<protocol::Loan> loan;
        Into to(kSize, located(links, memory, loan));
        CHECK(links.sink.link->copy(to, {1000, kSize - 1}) == Copied::good);
        CHECK(to.memory[999] == std::byte{0});
        CHECK(to.memory[kSize - 1] == std::byte{0});
        CHECK(std::memcmp(to.memory.data() + 1000, memory.content.data() + 1000, kSize - 1001) == 0);
    }
}

TEST_CASE("a pool is announced once, and all of it is let go of with the link or the pool") {
    const auto fds = open_fds();
    {
        Links links;
        const Memory memory(kSize, true);
        const int own = mappings("test-pool");
        std::shared_ptr<protocol::Loan> loan;
        for (int i = 0; i < 3; ++i) {
            Into to(kSize, located(links, memory, loan));
            CHECK(links.sink.link->copy(to, to.all()) == Copied::good);
            CHECK(to.memory == memory.content);
            CHECK(mappings("test-pool") == own + 1);
        }
        const auto announced = open_fds();
        std::shared_ptr<protocol::Loan> second;
        const Bytes beside = located(links, memory, second, 2);  // another pool over the same segment
        Into to(kSize, beside);
        CHECK(links.sink.link->copy(to, to.all()) == Copied::good);
        CHECK(mappings("test-pool") == own + 1);
        CHECK(open_fds() == announced);
        to.found = nullptr;
        links.source.link->forget_pool(1);
        links.source.link->forget_pool(2);
        links.source.link->forget_pool(2);
        until([&] { return mappings("test-pool") == own; });
    }
    CHECK(mappings("test-pool") == 0);
    CHECK(open_fds() == fds);
}

TEST_CASE("guards: 4,096 at once, then none, and each comes back by its end or its going") {
    Links links;
    const Memory memory(4096, true);
    for (int round = 0; round < 3; ++round) {
        std::vector<std::shared_ptr<protocol::Loan>> loans(kBoardGuards);
        for (auto& loan : loans) {
            located(links, memory, loan);
        }
        CHECK_FALSE(links.source.link->locate(memory.source()));
        loans[17]->end();
        loans[17]->end();  // once is enough: it gives back one
        std::shared_ptr<protocol::Loan> other;
        Into to(4096, located(links, memory, other));
        CHECK_FALSE(links.source.link->locate(memory.source()));
        loans[17] = nullptr;  // what it had is another's now
        CHECK(links.sink.link->copy(to, to.all()) == Copied::good);
    }
}

TEST_CASE("F14, F15: what is copied after the loan's end is stale, whoever has the guard then") {
    for (const bool shared : {true, false}) {
        Links links;
        const Memory memory(kSize, shared);
        std::shared_ptr<protocol::Loan> loan, next;
        Into to(kSize, located(links, memory, loan));
        CHECK(links.sink.link->copy(to, {0, 4096}) == Copied::good);
        loan->end();
        CHECK(links.sink.link->copy(to, {4096, 8192}) == Copied::stale);
        located(links, memory, next);
        CHECK(links.sink.link->copy(to, {4096, 8192}) == Copied::stale);
    }
}

TEST_CASE("F24: plain memory that has been given back is stale, not a fault") {
    Links links;
    std::shared_ptr<protocol::Loan> loan;
    Into to(64 << 20, {});  // which was there before: its memory isn't where the other's was
    {
        const Memory large(64 << 20, false);  // malloc gives that back to the system
        to.location = located(links, large, loan);
    }
    CHECK(links.sink.link->copy(to, {32 << 20, 33 << 20}) == Copied::stale);
}

TEST_CASE(
    "the way breaks, at either end, while somebody copies: no more of it is good, and hosts are told once") {
    for (const bool at_source : {true, false}) {
        CAPTURE(at_source);
        Links links;
        const Memory memory(kSize, true);
        std::shared_ptr<protocol::Loan> loan;
        Into to(kSize, located(links, memory, loan));
        std::atomic<int> good{0};
        std::thread copier([&] {
            while (links.sink.link->copy(to, {0, 1 << 20}) == Copied::good) {
                ++good;
            }
        });
        until([&] { return good.load() > 2; });
        (at_source ? links.source : links.sink).link->close();
        copier.join();
        End& other = at_source ? links.sink : links.source;
        until([&] { return other.host->broke.load() == 1; });
        CHECK(links.sink.link->copy(to, to.all()) == Copied::broke);
        CHECK_FALSE(links.source.link->locate(memory.source()));
        CHECK(other.link->why_not().find("closed by the peer") != std::string::npos);
        CHECK(other.host->lost.load() == -1);
        CHECK((links.source.link->closed() && links.sink.link->closed()));
    }
}

TEST_CASE("a link that is closed before it starts watches nothing") {
    auto ends = channel();
    End here(std::move(ends.first));
    ends.second.reset();
    here.link->close();
    here.link->start();
    here.loop.wake();
    const auto rounds = here.loop.rounds();
    for (int i = 0; i < 100'000; ++i) {
        std::this_thread::yield();  // a loop that spins makes thousands of rounds meanwhile
    }
    CHECK(here.loop.rounds() < rounds + 100);
}

TEST_CASE("M7, M11: a location that can't be is a violation; a pool that isn't there is no way to copy") {
    Links links;
    const Memory memory(8192, true);
    std::shared_ptr<protocol::Loan> loan;
    const Bytes good = located(links, memory, loan);
    for (std::size_t n = 0; n < good.size(); ++n) {
        Into cut(8192, Bytes(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(n)));
        CHECK_THROWS_AS(links.sink.link->copy(cut, cut.all()), protocol::Violation);
    }
    Bytes longer = good, foreign = good, block = good, guard = good;
    longer.push_back(std::byte{0});
    foreign[0] = std::byte{99};
    block[block.size() - 1] = std::byte{1};  // id 2^24
    protocol::store_le<std::uint32_t>(guard.data() + 8, kBoardGuards);
    for (const Bytes& wrong : {longer, block, guard}) {
        Into to(8192, wrong);
        CHECK_THROWS_AS(links.sink.link->copy(to, to.all()), protocol::Violation);
    }
    Into unknown(8192, foreign), small(4096, good);
    CHECK(links.sink.link->copy(unknown, unknown.all()) == Copied::broke);
    CHECK_THROWS_AS(links.sink.link->copy(small, small.all()), protocol::Violation);
    Into fine(8192, good);
    CHECK(links.sink.link->copy(fine, fine.all()) == Copied::good);
}

TEST_CASE("M17: what a peer may not say on the channel ends the session") {
    SUBCASE("a second board") {
        Exposed one;
        const OwnBoard board;
        for (int i = 0; i < 2; ++i) {
            ShmMessage message{ShmType::board};
            message.a = board.segment().size();
            one.raw.say(message, Fd(::fcntl(board.segment().fd(), F_DUPFD_CLOEXEC, 0)));
        }
        one.ends_with(Cause::protocol_error, "second board");
    }
    SUBCASE("a board of another size") {
        Exposed one;
        one.raw.file(ShmType::board, 0, Bytes(4096));
        one.ends_with(Cause::protocol_error, "another size");
    }
    SUBCASE("a pool that is announced twice") {
        Exposed one;
        const Memory memory(4096, false);
        for (int i = 0; i < 2; ++i) {
            one.raw.file(ShmType::pool, 5, encode_shm_pool(*memory.plan->shape(), {}));
        }
        one.ends_with(Cause::protocol_error, "twice");
    }
    SUBCASE("a pool in a segment that isn't there") {
        Exposed one;
        const Memory memory(4096, true);
        one.raw.file(ShmType::pool, 5, encode_shm_pool(*memory.plan->shape(), memory.segments));
        one.ends_with(Cause::protocol_error, "a segment that isn't there");
    }
    SUBCASE("a pool that reaches beyond its segment") {
        Exposed one;
        const Memory memory(8192, true);
        one.raw.file(ShmType::segment, 1, Bytes(4096));
        one.raw.file(ShmType::pool, 5, encode_shm_pool(*memory.plan->shape(), memory.segments));
        one.ends_with(Cause::protocol_error, "beyond");
    }
    SUBCASE("a segment that it takes back without having shared it") {
        Exposed one;
        one.raw.say({ShmType::gone, 3});
        one.ends_with(Cause::protocol_error, "doesn't share");
    }
    SUBCASE("nothing at all") {
        Exposed one;
        one.raw.close();
        until([&] { return one.here.host->broke.load() == 1; });
        CHECK(one.here.host->lost.load() == -1);
    }
}

TEST_CASE("M9: descriptions of pools that take much memory here are counted, and end it") {
    const Bytes one_pool = encode_shm_pool(*scattered(4), {});
    CHECK(one_pool.size() < 2000);
    Exposed one;
    for (std::uint64_t id = 0; id < 40; ++id) {  // one at a time: those that are gone don't count
        one.raw.file(ShmType::pool, id, one_pool);
        one.raw.say({ShmType::pool_gone, id});
    }
    for (std::uint64_t id = 100; id < 140; ++id) {
        one.raw.file(ShmType::pool, id, one_pool);
    }
    one.ends_with(Cause::resource_limit, "too long descriptions");
}

TEST_CASE("M9: a pool that is scattered further than a peer lists isn't told of, and none is taken") {
    Links links;
    const Memory memory(kSize, false);
    const auto shape = scattered(5);
    const memory::StreamPlan plan(shape, {0}, {std::make_shared<const memory::Ids>(memory::Ids{0})},
                                  memory::Heads::every());
    CHECK_FALSE(links.source.link->locate({plan, {shape, 9, memory.segments, false}}));
    CHECK(links.source.link->locate(memory.source()));
    Exposed one;
    one.raw.file(ShmType::pool, 5, encode_shm_pool(*shape, {}));
    one.ends_with(Cause::resource_limit, "scattered over more than 262144 places");
}

#if !defined(__SANITIZE_ADDRESS__)  // UBSan needs two descriptors to look at an exception
TEST_CASE("F20: without descriptors nothing is located, or no link comes about; then it goes on") {
    Links links;
    const Memory memory(kSize, true);
    const int own = mappings("test-pool");
    for (const rlim_t left : {0, 1}) {  // for neither, or for the segment and not for the pool
        CAPTURE(left);
        {
            const FewDescriptors few(left);
            CHECK_FALSE(links.source.link->locate(memory.source()));
        }
        links.source.link->forget_pool(1);  // what was half told is taken back
        std::shared_ptr<protocol::Loan> loan;
        {
            Into to(kSize, located(links, memory, loan));
            CHECK(links.sink.link->copy(to, to.all()) == Copied::good);
        }
        links.source.link->forget_pool(1);
        until([&] { return mappings("test-pool") == own; });
    }
    {
        auto ends = channel();
        End here(std::move(ends.first));
        {
            const FewDescriptors few(0);
            here.link->start();
        }
        CHECK(here.host->broke.load() == 1);
        CHECK(here.link->why_not().find("descriptor") != std::string::npos);
    }
}
#endif
