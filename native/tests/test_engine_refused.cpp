// What the system refuses, and what peers do to a socket: it costs the connection that it is about, never the
// process, and is told at once.
//
// epoll_ctl, eventfd and operator new are this program's own, so that they can be told to refuse.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <new>

#include "engine_pair.hpp"

namespace {

std::atomic<int> refuse_watches{0}, refuse_eventfds{0};
thread_local int allocations_left = -1;  // of this thread; -1: as many as there are

bool refuses(std::atomic<int>& left) {
    int known = left.load();
    while (known > 0 && !left.compare_exchange_weak(known, known - 1)) {
    }
    return known > 0;
}

}  // namespace

extern "C" int epoll_ctl(int epoll, int operation, int fd, epoll_event* event) noexcept {
    if (operation == EPOLL_CTL_ADD && refuses(refuse_watches)) {
        errno = ENOSPC;
        return -1;
    }
    return static_cast<int>(::syscall(SYS_epoll_ctl, epoll, operation, fd, event));
}

extern "C" int eventfd(unsigned count, int flags) noexcept {
    if (refuses(refuse_eventfds)) {
        errno = EMFILE;
        return -1;
    }
    return static_cast<int>(::syscall(SYS_eventfd2, count, flags));
}

[[gnu::noinline]] void* operator new(std::size_t size) {
    if (allocations_left == 0) {
        throw std::bad_alloc();
    }
    allocations_left -= allocations_left > 0 ? 1 : 0;
    if (void* const at = std::malloc(size)) {
        return at;
    }
    throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* at) noexcept { std::free(at); }
[[gnu::noinline]] void operator delete(void* at, std::size_t) noexcept { std::free(at); }

using namespace kvt;
using namespace kvt::test;

namespace {

constexpr Terms kSmall{.layers = 1, .blocks = 2, .piece_nbytes = 4096};

// A connection whose other end is a bare socket for control and one for the lane.
struct Bare {
    explicit Bare(const Side& side) : connection(side.connection) {
        for (auto [near, far] : {std::pair{&near_control, &far_control}, std::pair{&near_lane, &far_lane}}) {
            int ends[2];
            REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0);
            *near = Fd(ends[0]);
            *far = Fd(ends[1]);
        }
        path = std::make_shared<backends::TcpPath>(connection, side.engine->reactor(), side.engine->movers(),
                                                   std::move(near_control), backends::TcpOptions{});
        connection->open(path, {});
    }
    void add_lane() {
        REQUIRE(path->reserve_lane(0));
        path->add_lane(std::move(near_lane), 0);
    }
    void expect_lost(Cause cause) const {
        for (const Time until = monotonic_ns() + 5 * kSecond;
             !connection->is_lost() && monotonic_ns() < until;) {
            std::this_thread::yield();
        }
        REQUIRE(connection->is_lost());
        CHECK(connection->lost_cause() == cause);
    }
    std::shared_ptr<Connection> connection;
    Fd near_control, near_lane, far_control, far_lane;
    std::shared_ptr<backends::TcpPath> path;
};

// A control connection's first bytes.
Fd dial(const sockaddr_in& address) {
    Fd socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    const timeval patience{10, 0};
    ::setsockopt(socket.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    REQUIRE(::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
    std::string said("KVTRNSP1\1\0\1\0\1\1", 14);
    said.resize(Admission::kPreambleNbytes);
    (void)::send(socket.get(), said.data(), said.size(), MSG_NOSIGNAL);
    return socket;
}

bool closed_by_peer(const Fd& socket) {
    char byte = 0;
    const auto n = ::recv(socket.get(), &byte, 1, 0);
    return n == 0 || (n < 0 && errno == ECONNRESET);
}

// Throws whenever it is called.
struct Failing final : Pollable, Runnable {
    void on_events(std::uint32_t) override { throw std::bad_alloc(); }
    bool run() override { throw std::bad_alloc(); }
    void failed(const std::exception&) override {
        ++ends;
        ends.notify_all();
        throw std::bad_alloc();
    }
    std::atomic<int> ends{0};
};

}  // namespace

TEST_CASE("a stranger that can't be watched is dropped, and the next one is heard") {
    const Side side(kSmall, 's');
    const auto address = listen_on(side);
    refuse_watches = 1;
    const Time from = monotonic_ns();
    CHECK(closed_by_peer(dial(address)));
    CHECK(monotonic_ns() - from < side.engine->options().handshake_timeout_ns);
    const Fd next = dial(address);
    pollfd one{side.engine->event_fd(), POLLIN, 0};
    bool handed_over = false;
    while (!handed_over && ::poll(&one, 1, 10'000) == 1) {
        for (const Event& event : side.engine->poll_events()) {
            if (event.kind == Event::Kind::accepted) {
                handed_over = true;
                ::close(event.fd);
            }
        }
    }
    CHECK(handed_over);
}

TEST_CASE("a listener that can't be watched is an error of the call") {
    const Side side(kSmall, 's');
    refuse_watches = 1;
    CHECK_THROWS_AS(side.engine->admission().add_listener(Fd(::socket(AF_INET, SOCK_STREAM, 0))),
                    std::system_error);
}

TEST_CASE("a control stream or a lane that can't be watched ends its connection") {
    for (const bool lane : {false, true}) {
        const Side side(kSmall, 's');
        Bare bare(side);
        refuse_watches = lane ? 0 : 1;
        bare.path->start();
        if (lane) {
            refuse_watches = 1;
            bare.add_lane();
        }
        bare.expect_lost(Cause::resource_limit);
    }
}

TEST_CASE("what is thrown on a loop's thread ends who threw it") {
    EventLoop loop("kvt-test", -1);
    loop.start();
    const auto failing = std::make_shared<Failing>();
    const Fd event = make_eventfd();
    CHECK_FALSE(loop.add(event.get(), EPOLLIN | EPOLLET, failing));
    const std::uint64_t number = 1;
    REQUIRE(::write(event.get(), &number, sizeof number) == sizeof number);
    failing->ends.wait(0);
    loop.enqueue(failing);
    failing->ends.wait(1);
    CHECK(failing->ends == 2);
    loop.stop();
}

TEST_CASE("an engine without its descriptors is none") {
    for (const int which : {1, 2}) {
        refuse_eventfds = which;
        CHECK_THROWS_AS(Engine(Options{}), std::system_error);
        refuse_eventfds = 0;
    }
}

TEST_CASE("what Python hasn't taken counts among the pending, and the oldest goes") {
    const Side side(kSmall, 's');
    const auto address = listen_on(side);
    const std::size_t most = side.engine->options().max_pending;
    std::vector<Fd> all;
    for (std::size_t i = 0; i < most + 20; ++i) {
        all.push_back(dial(address));
    }
    for (std::size_t i = 0; i < 20; ++i) {
        CHECK(closed_by_peer(all[i]));
    }
    for (const Time until = deadline(); side.engine->handed_over() < most && monotonic_ns() < until;) {
        std::this_thread::yield();
    }
    std::size_t taken = 0;
    for (const Event& event : side.engine->poll_events()) {
        taken += event.fd >= 0 ? 1u : 0u;
        ::close(event.fd);
    }
    CHECK(taken == most);
}

TEST_CASE("an event that there is no memory for closes its descriptor, and isn't counted") {
    const Side side(kSmall, 's');
    std::size_t posted = 0;
    bool threw = false;
    while (!threw) {
        int ends[2];
        REQUIRE(::pipe2(ends, O_CLOEXEC | O_NONBLOCK) == 0);
        const Fd far(ends[0]);
        Event event;
        event.kind = Event::Kind::accepted;
        event.fd = ends[1];
        allocations_left = 0;
        try {
            side.engine->post_event(std::move(event));
            ++posted;
        } catch (const std::bad_alloc&) {
            threw = true;
        }
        allocations_left = -1;
        char byte = 0;
        CHECK(::read(far.get(), &byte, 1) == (threw ? 0 : -1));
    }
    CHECK(side.engine->handed_over() == posted);
    for (const Event& event : side.engine->poll_events()) {
        ::close(event.fd);
    }
}

TEST_CASE("what can't be watched for want of memory isn't kept") {
    EventLoop loop("test-loop", -1);
    const Fd watched = make_eventfd();
    bool added = false;
    for (int left = 0; !added; ++left) {
        const auto pollable = std::make_shared<Failing>();
        allocations_left = left;
        try {
            added = !loop.add(watched.get(), EPOLLIN, pollable);
        } catch (const std::bad_alloc&) {
        }
        allocations_left = -1;
        CHECK(pollable.use_count() == (added ? 3 : 1));
    }
    loop.remove(watched.get());
}

TEST_CASE("a lane that ends behind bytes has ended") {
    const Side side(kSmall, 's');
    Bare bare(side);
    bare.path->start();
    REQUIRE(::send(bare.far_lane.get(), "0123456789", 10, MSG_NOSIGNAL) == 10);
    REQUIRE(::shutdown(bare.far_lane.get(), SHUT_WR) == 0);
    bare.add_lane();
    bare.expect_lost(Cause::peer_lost);
}
