// A connection that ends while it is being opened, and an engine that goes while its peer is at work: by
// another thread, at any moment between two steps.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <functional>

#include "engine_pair.hpp"

using namespace kvt;
using namespace kvt::test;

namespace {

constexpr const char* kSession = "0123456789abcdef";
constexpr Terms kSmall{.layers = 1, .blocks = 2, .piece_nbytes = 4096};

// One end of a session whose other end is a bare socket: the steps of opening, each on its own.
class Opening {
  public:
    explicit Opening(const Side& side)
        : side_(side), connection(side.engine->new_connection("not open yet")) {
        for (Fd* to : {&control_, &lane_}) {
            int ends[2];
            REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0);
            *to = Fd(ends[0]);
            far_.emplace_back(ends[1]);
        }
        auto args = side.args(Role::source, "k", {0, 1});
        waiting = connection->post(std::move(args));
    }
    void open() {
        path_ = std::make_shared<backends::TcpPath>(connection, side_.engine->reactor(),
                                                    side_.engine->movers(), std::move(control_),
                                                    backends::TcpOptions{});
        side_.engine->rename(connection, kSession);
        connection->open(path_, {});
    }
    void start() { path_->start(); }
    void add_lane() {
        if (path_->reserve_lane(0)) {
            path_->add_lane(std::move(lane_), 0);
        }
    }
    void close() const { connection->close(Cause::connection_closed, "closed", true); }

  private:
    const Side& side_;
    std::vector<Fd> far_;
    Fd control_, lane_;
    std::shared_ptr<backends::TcpPath> path_;

  public:
    std::shared_ptr<Connection> connection;
    std::shared_ptr<TransferHandle> waiting;
};

// Nothing of the connection is left in its engine, which lives on.
void expect_gone(const Side& side, const std::function<void(Opening&)>& steps) {
    const Census before;
    {
        Opening opening(side);
        steps(opening);
        CHECK(opening.waiting->done());
        CHECK(opening.waiting->result.outcome.cause == Cause::connection_closed);
        CHECK(opening.connection->is_lost());
    }
    CHECK(side.engine->find(kSession) == nullptr);
    CHECK(side.engine->find("not open yet") == nullptr);
    before.expect_no_more();
}

// Sends until the peer's end is gone.
void send_until_lost(const Side& side, int thread) {
    try {
        for (int n = 0;; ++n) {
            const auto handle = side.post(Role::source, std::to_string(thread) + "." + std::to_string(n),
                                          {0, 1});
            side.connection->cancel(handle);
            side.connection->post_message(protocol::Bytes(8), nullptr, nullptr, 0);
        }
    } catch (const NotUsable&) {
    }
}

}  // namespace

TEST_CASE("closed between any two steps of opening") {
    const Side side(kSmall, 's');
    expect_gone(side, [](Opening& it) {
        it.close();
        it.open();
        it.start();
        it.add_lane();
    });
    expect_gone(side, [](Opening& it) {
        it.open();
        it.close();
        it.start();
        it.add_lane();
    });
    expect_gone(side, [](Opening& it) {
        it.open();
        it.start();
        it.close();
        it.add_lane();
    });
    expect_gone(side, [](Opening& it) {
        it.open();
        it.start();
        it.add_lane();
        it.close();
    });
}

TEST_CASE("closed by another thread while it is opened") {
    const Side side(kSmall, 's');
    for (int round = 0; round < 200; ++round) {
        expect_gone(side, [round](Opening& it) {
            std::atomic<bool> go{false};
            std::thread closing([&] {
                while (!go.load()) {
                }
                for (int i = 0; i < round * 5; ++i) {
                    (void)it.connection->is_open();
                }
                it.close();
            });
            go.store(true);
            it.open();
            it.start();
            it.add_lane();
            closing.join();
        });
    }
}

TEST_CASE("one end within the process is closed before both are open") {
    for (const bool first : {true, false}) {
        const Side a(kSmall, 'a'), b(kSmall, 'b');
        protocol::SessionConfig config;
        config.capabilities = protocol::kCanCopy;
        config.pulls = true;
        auto to_b = std::make_shared<backends::InprocPath>(a.connection, a.engine->movers(), config.digest);
        auto to_a = std::make_shared<backends::InprocPath>(b.connection, b.engine->movers(), config.digest);
        backends::InprocPath::join(*to_b, a.connection, *to_a, b.connection);
        (first ? a : b).connection->close(Cause::connection_closed, "closed", true);
        a.connection->prepare(to_b, config);
        b.connection->prepare(to_a, config);
        a.connection->begin();
        b.connection->begin();
        CHECK(a.connection->is_lost());
        CHECK(b.connection->is_lost());
    }
}

TEST_CASE("a loop that has ended lets go of what is added") {
    EventLoop loop("kvt-test", -1);
    loop.start();
    loop.stop();
    const Fd socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    CHECK_FALSE(loop.add(socket.get(), 0, nullptr));
}

TEST_CASE("an engine goes while its peer in the process is at work") {
    Terms terms = kSmall;
    terms.way = Way::inproc;
    for (int round = 0; round < 50; ++round) {
        EnginePair pair(terms);
        std::vector<std::thread> threads;
        for (int i = 0; i < 3; ++i) {
            threads.emplace_back([&, i] { send_until_lost(pair.b, i); });
        }
        while (pair.a.connection->counters().messages_in < 20) {
            std::this_thread::yield();
        }
        pair.a.engine->close();
        pair.a.connection.reset();
        pair.a.pool.reset();
        pair.a.engine.reset();
        for (auto& thread : threads) {
            thread.join();
        }
    }
}

TEST_CASE("what was posted on a connection before another took its place") {
    EnginePair pair(kSmall);
    const auto early = pair.a.engine->new_connection("early");
    const auto sent = early->post(pair.a.args(Role::source, "k", {0, 1}));
    const auto after = early->post_message(protocol::Bytes(8), sent, nullptr, 0);
    const auto at_once = early->post_message(protocol::Bytes(9), nullptr, nullptr, 0);
    pair.a.connection->adopt(early);
    const auto received = pair.b.post(Role::destination, "k", {0, 1});
    CHECK(pair.a.outcome(*sent) == Cause::ok);
    CHECK(pair.b.outcome(*received) == Cause::ok);
    for (const auto& message : {at_once, after}) {
        REQUIRE(pair.a.connection->wait(*message, deadline()));
        CHECK(message->result.outcome.cause == Cause::ok);
    }
}

TEST_CASE("posted while another connection takes the place") {
    for (int round = 0; round < 40; ++round) {
        EnginePair pair(kSmall);
        const auto early = pair.a.engine->new_connection("early");
        std::vector<std::shared_ptr<TransferHandle>> sent;
        std::vector<std::shared_ptr<MessageHandle>> messages;
        std::atomic<int> posted{0};
        std::thread posting([&] {
            for (; posted < 20; ++posted) {
                sent.push_back(early->post(pair.a.args(Role::source, std::to_string(posted), {0, 1})));
                messages.push_back(early->post_message(protocol::Bytes(8), sent.back(), nullptr, 0));
            }
        });
        while (posted < round % 20) {
            std::this_thread::yield();
        }
        pair.a.connection->adopt(early);
        posting.join();
        for (int i = 0; i < 20; ++i) {
            const auto received = pair.b.post(Role::destination, std::to_string(i), {0, 1});
            CHECK(pair.b.outcome(*received) == Cause::ok);
            CHECK(pair.a.outcome(*sent[static_cast<std::size_t>(i)]) == Cause::ok);
        }
        for (const auto& message : messages) {
            REQUIRE(pair.a.connection->wait(*message, deadline()));
            CHECK(message->result.outcome.cause == Cause::ok);
        }
    }
}

TEST_CASE("a wait for a layer ends when another connection takes the place") {
    for (int round = 0; round < 20; ++round) {
        EnginePair pair(kSmall);
        const auto early = pair.a.engine->new_connection("early");
        const auto received = early->post(pair.a.args(Role::destination, "k", {0, 1}));
        std::atomic<int> waiting{0};
        std::vector<std::thread> threads;
        for (int i = 0; i < 4; ++i) {
            threads.emplace_back([&] {
                ++waiting;
                const Time until = deadline();
                while (received->connection()->wait_layer(received, 0, until) ==
                           Connection::LayerState::waiting &&
                       monotonic_ns() < until) {
                }
            });
        }
        const Time until = monotonic_ns() + 5 * kSecond;
        std::thread asks_the_old(
            [&] { CHECK(early->wait_layer(received, 0, until) == Connection::LayerState::waiting); });
        while (waiting < 4) {
            std::this_thread::yield();
        }
        pair.a.connection->adopt(early);
        asks_the_old.join();
        CHECK(monotonic_ns() < until);
        const auto sent = pair.b.post(Role::source, "k", {0, 1});
        CHECK(pair.b.outcome(*sent) == Cause::ok);
        for (auto& thread : threads) {
            thread.join();
        }
        CHECK(received->done());
    }
}

TEST_CASE("a gate that fails after another connection has taken the place, or while it does") {
    for (int round = 0; round < 60; ++round) {
        EnginePair pair(kSmall);
        const auto early = pair.a.engine->new_connection("early");
        const auto gate = std::make_shared<LayerGate>(1);
        auto args = pair.a.args(Role::source, "k", {0, 1});
        args.gate = gate;
        const auto sent = early->post(std::move(args));
        std::atomic<bool> go{round < 3};
        std::thread failing([&] {
            while (!go.load()) {
            }
            for (int i = 0; i < round * 5; ++i) {
                (void)early->is_open();
            }
            gate->fail("the model stopped");
            gate->kick();
        });
        if (round < 3) {
            failing.join();
        }
        go.store(true);
        pair.a.connection->adopt(early);
        if (round >= 3) {
            failing.join();
        }
        CHECK(pair.a.outcome(*sent) == Cause::cancelled);
    }
}

TEST_CASE("a gate is marked on the connection that took the place") {
    EnginePair pair(kSmall);
    const auto early = pair.a.engine->new_connection("early");
    const auto gate = std::make_shared<LayerGate>(1);
    auto args = pair.a.args(Role::source, "k", {0, 1});
    args.gate = gate;
    const auto sent = early->post(std::move(args));
    const auto received = pair.b.post(Role::destination, "k", {0, 1});
    pair.a.connection->adopt(early);
    gate->mark(0);
    gate->kick();
    CHECK(pair.a.outcome(*sent) == Cause::ok);
    CHECK(pair.b.outcome(*received) == Cause::ok);
}
