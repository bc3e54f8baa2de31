// Two engines in one process, joined as two processes would be: a listener, preambles, lanes that JOIN; or by
// the inproc backend. With all their threads.
//
// Lives here: joining, blocks of memory with words to know them by, what a process holds. Does not live here:
// the handshake, which is Python's (both ends are simply told the session's id). Invariant: nothing of the
// engine is replaced or driven by hand, and both are closed when the pair goes.
#pragma once

#include <arpa/inet.h>
#include <doctest/doctest.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "backends/inproc.hpp"
#include "backends/tcp.hpp"
#include "base/clock.hpp"
#include "engine/admission.hpp"
#include "engine/engine.hpp"

namespace kvt::test {

using namespace kvt::engine;
using protocol::Cause;
using protocol::Delivered;
using protocol::DigestKind;
using protocol::Role;
using protocol::Time;

inline constexpr Time kMs = 1'000'000;
inline constexpr Time kSecond = 1000 * kMs;

/// A deadline that only a failure reaches.
inline Time deadline() { return monotonic_ns() + 30 * kSecond; }

/// What the process holds: made before the engines, compared after them.
class Census {
  public:
    Census() {
        const Waiter own;           // this thread's own eventfd stays with the thread
        std::thread([] {}).join();  // TSan starts one of its own with the first
        threads_ = entries("/proc/self/task");
        descriptors_ = entries("/proc/self/fd");
    }
    void expect_no_more() const {
        // A thread that was joined leaves /proc a moment later, and a loop may be letting go of a socket.
        for (const Time until = deadline(); more() && monotonic_ns() < until;) {
            std::this_thread::yield();
        }
        CHECK(entries("/proc/self/task") <= threads_);
        CHECK(entries("/proc/self/fd") <= descriptors_);
    }

  private:
    bool more() const {
        return entries("/proc/self/task") > threads_ || entries("/proc/self/fd") > descriptors_;
    }
    static std::ptrdiff_t entries(const char* folder) {
        return std::distance(std::filesystem::directory_iterator(folder), {});
    }
    std::ptrdiff_t threads_ = 0, descriptors_ = 0;
};

/// Layers of blocks, as words that say whose they are.
class Blocks {
  public:
    Blocks(std::uint32_t layers, std::uint32_t blocks, std::uint32_t nbytes)
        : layers_(layers),
          blocks_(blocks),
          words_(nbytes / 8),
          memory_(std::size_t{layers} * blocks * words_) {}

    std::shared_ptr<const memory::PoolShape> shape() const {
        std::vector<memory::Layer> all;
        for (std::uint32_t i = 0; i < layers_; ++i) {
            all.push_back({"layer." + std::to_string(i), 0, {{base(i), nbytes(), {}, words_ * 8, -1}}});
        }
        std::vector<memory::Group> groups{{"kv", blocks_, 0, true, "", "", "", 0}};
        return std::make_shared<const memory::PoolShape>(std::move(groups), std::move(all), true);
    }
    std::uint32_t layers() const { return layers_; }
    std::uint32_t count() const { return blocks_; }

    void fill_layer(std::uint32_t layer, const memory::Ids& ids, std::uint64_t seed) {
        for (std::size_t position = 0; position < ids.size(); ++position) {
            std::uint64_t* const to = piece(layer, ids[position]);
            for (std::uint64_t i = 0; i < words_; ++i) {
                to[i] = word(seed, layer, position, i);
            }
        }
    }
    bool piece_is(std::uint32_t layer, std::uint32_t block, std::size_t position, std::uint64_t seed) const {
        const std::uint64_t* const from = const_cast<Blocks*>(this)->piece(layer, block);
        for (std::uint64_t i = 0; i < words_; ++i) {
            if (from[i] != word(seed, layer, position, i)) {
                return false;
            }
        }
        return true;
    }
    bool layer_is(std::uint32_t layer, const memory::Ids& ids, std::uint64_t seed) const {
        for (std::size_t position = 0; position < ids.size(); ++position) {
            if (!piece_is(layer, ids[position], position, seed)) {
                return false;
            }
        }
        return true;
    }
    void fill(const memory::Ids& ids, std::uint64_t seed) {
        for (std::uint32_t layer = 0; layer < layers_; ++layer) {
            fill_layer(layer, ids, seed);
        }
    }
    bool are(const memory::Ids& ids, std::uint64_t seed) const {
        for (std::uint32_t layer = 0; layer < layers_; ++layer) {
            if (!layer_is(layer, ids, seed)) {
                return false;
            }
        }
        return true;
    }

  private:
    static std::uint64_t word(std::uint64_t seed, std::uint64_t layer, std::uint64_t position,
                              std::uint64_t i) {
        return (seed + 1) * 0x9e3779b97f4a7c15u ^ (layer << 56) ^ (position << 40) ^ i;
    }
    std::int64_t nbytes() const { return static_cast<std::int64_t>(words_ * 8); }
    std::uint64_t* piece(std::uint32_t layer, std::uint32_t block) {
        return memory_.data() + (std::size_t{layer} * blocks_ + block) * words_;
    }
    std::uintptr_t base(std::uint32_t layer) const {
        return reinterpret_cast<std::uintptr_t>(const_cast<Blocks*>(this)->piece(layer, 0));
    }

    std::uint32_t layers_, blocks_;
    std::uint64_t words_;
    std::vector<std::uint64_t> memory_;
};

enum class Way { tcp, inproc };

struct Terms {
    Way way = Way::tcp;
    DigestKind digest = DigestKind::none;
    unsigned lanes = 2, movers = 2;
    std::uint64_t chunk_nbytes = 0;
    std::uint32_t layers = 4, blocks = 64, piece_nbytes = 8192;
};

/// One end: an engine, its connection, a pool over all of its blocks.
struct Side {
    Side(const Terms& terms, char name) : blocks(terms.layers, terms.blocks, terms.piece_nbytes) {
        Options options;
        options.incarnation = std::string(16, name);
        options.movers = terms.movers;
        options.dead_after_ns = 20 * kSecond;  // a sanitizer on a busy machine is no dead peer
        engine = std::make_shared<Engine>(options);
        connection = engine->new_connection(std::string("not open yet: ") + name);
        pool = engine->new_pool("kv", blocks.shape(), true);
    }
    PostArgs args(Role role, std::string key, memory::Ids ids) const {
        PostArgs out;
        out.role = role;
        out.pool = pool;
        out.ids.push_back(std::make_shared<const memory::Ids>(std::move(ids)));
        out.key = std::move(key);
        out.limits = {30 * kSecond, 30 * kSecond, protocol::kNever};
        return out;
    }
    std::shared_ptr<TransferHandle> post(Role role, std::string key, memory::Ids ids,
                                         std::shared_ptr<LayerGate> gate = nullptr) const {
        auto out = args(role, std::move(key), std::move(ids));
        out.gate = std::move(gate);
        return connection->post(std::move(out));
    }
    Cause outcome(TransferHandle& handle) const {
        REQUIRE(connection->wait(handle, deadline()));
        return handle.result.outcome.cause;
    }

    Blocks blocks;
    std::shared_ptr<Engine> engine;
    std::shared_ptr<Connection> connection;
    std::shared_ptr<Pool> pool;
};

/// A listener of this side's engine, at a free port of loopback.
inline sockaddr_in listen_on(const Side& side) {
    Fd socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    auto* const raw = reinterpret_cast<sockaddr*>(&address);
    REQUIRE(::bind(socket.get(), raw, length) == 0);
    REQUIRE(::listen(socket.get(), 256) == 0);
    REQUIRE(::getsockname(socket.get(), raw, &length) == 0);
    side.engine->admission().add_listener(std::move(socket));
    return address;
}

class EnginePair {
  public:
    explicit EnginePair(const Terms& terms = {}) : a(terms, 'a'), b(terms, 'b'), terms_(terms) {
        config_.digest = terms.digest;
        config_.chunk_nbytes = terms.chunk_nbytes;
        config_.capabilities = protocol::kCanGrant | (terms.way == Way::inproc ? protocol::kCanCopy : 0);
        a.connection->set_reader("b");
        b.connection->set_reader("a");
        config_.pulls = terms.way == Way::inproc;
        if (terms.way == Way::inproc) {
            join_inproc();
        } else {
            join_tcp();
        }
    }
    ~EnginePair() { close(); }
    EnginePair(const EnginePair&) = delete;
    EnginePair& operator=(const EnginePair&) = delete;

    void close() {
        for (const Side* side : {&a, &b}) {
            if (side->engine) {
                side->engine->close();
            }
        }
    }
    /// Every socket between the two ends, as a machine between them would do it.
    void cut() const {
        for (const Fd& socket : taps_) {
            ::shutdown(socket.get(), SHUT_RDWR);
        }
    }

    Side a, b;

  private:
    static constexpr const char* kSession = "0123456789abcdef";

    void join_inproc() {
        auto to_b = std::make_shared<backends::InprocPath>(a.connection, a.engine->movers(), config_.digest);
        auto to_a = std::make_shared<backends::InprocPath>(b.connection, b.engine->movers(), config_.digest);
        backends::InprocPath::join(*to_b, a.connection, *to_a, b.connection);
        a.engine->rename(a.connection, kSession);
        b.engine->rename(b.connection, kSession);
        a.connection->prepare(to_b, config_);
        b.connection->prepare(to_a, config_);
        a.connection->begin();
        b.connection->begin();
    }

    // `a` dials `b`. The first lane comes before the session is open there, the others after.
    void join_tcp() {
        const sockaddr_in address = listen_on(b);
        const auto out = open(a, dial(address, 1, 0));
        Fd first = dial(address, 2, 0);
        open(b, accepted());
        for (std::uint32_t lane = 0; lane < terms_.lanes; ++lane) {
            Fd socket = lane == 0 ? std::move(first) : dial(address, 2, lane);
            std::byte answer[Admission::kJoinAnswerNbytes];
            REQUIRE(::recv(socket.get(), answer, sizeof answer, MSG_WAITALL) == sizeof answer);
            REQUIRE(answer[12] == std::byte{0});
            REQUIRE(out->reserve_lane(lane));
            out->add_lane(std::move(socket), lane);
        }
    }

    // A preamble without a key, and for a lane (role 2) the JOIN behind it.
    Fd dial(const sockaddr_in& address, char role, std::uint32_t lane) {
        Fd socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
        const timeval patience{30, 0};
        ::setsockopt(socket.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        REQUIRE(::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
        std::string said("KVTRNSP1\1\0\1\0", 12);
        said += {role, '\1'};
        said.resize(Admission::kPreambleNbytes);
        if (role == 2) {
            said += kSession;
            said += static_cast<char>(lane);
            said.resize(Admission::kPreambleNbytes + Admission::kJoinNbytes);
        }
        REQUIRE(::send(socket.get(), said.data(), said.size(), MSG_NOSIGNAL) ==
                static_cast<ssize_t>(said.size()));
        taps_.emplace_back(::fcntl(socket.get(), F_DUPFD_CLOEXEC, 0));
        return socket;
    }

    Fd accepted() const {
        pollfd one{b.engine->event_fd(), POLLIN, 0};
        REQUIRE(::poll(&one, 1, 30'000) == 1);
        const auto events = b.engine->poll_events();
        REQUIRE(events.size() == 1);
        REQUIRE(events.front().kind == Event::Kind::accepted);
        return Fd(events.front().fd);
    }

    std::shared_ptr<backends::TcpPath> open(const Side& side, Fd control) const {
        ::fcntl(control.get(), F_SETFL, ::fcntl(control.get(), F_GETFL) | O_NONBLOCK);
        const backends::TcpOptions options{terms_.lanes, 0, terms_.digest, "tcp"};
        auto path = std::make_shared<backends::TcpPath>(side.connection, side.engine->reactor(),
                                                        side.engine->movers(), std::move(control), options);
        side.engine->rename(side.connection, kSession);
        side.connection->open(path, config_);
        path->start();
        side.engine->admission().retry_joins();
        return path;
    }

    Terms terms_;
    protocol::SessionConfig config_;
    std::vector<Fd> taps_;
};

}  // namespace kvt::test
