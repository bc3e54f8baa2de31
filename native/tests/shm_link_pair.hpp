// Two ends of shared memory in one process, joined by a socketpair: each a link with a reactor of its own.
//
// Lives here: the ends, memory to copy, what a host is told. Does not live here: sessions. Invariant: a host
// that is told something finds the link without any lock held.
#pragma once

#include <doctest/doctest.h>
#include <sys/socket.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <fstream>
#include <functional>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "backends/shm_link.hpp"
#include "backends/shm_segment.hpp"

namespace kvt::test {

using namespace kvt::backends;
using protocol::Bytes;
using protocol::Cause;

inline constexpr auto kPatience = std::chrono::seconds(30);

inline void until(const std::function<bool()>& holds) {
    const auto last = std::chrono::steady_clock::now() + kPatience;
    while (!holds()) {
        REQUIRE(std::chrono::steady_clock::now() < last);
        std::this_thread::yield();
    }
}

/// What a link tells its connection, and nothing of what a connection does for lanes.
class Host final : public PathHost {
  public:
    void settle() override {}
    bool take_control(Bytes&) override { return false; }
    void receive(const protocol::Header&, std::span<const std::byte>) override {}
    void receive_inline(const protocol::Header&, std::span<const std::byte>,
                        const protocol::Trailer&) override {}
    std::optional<protocol::ChunkJob> next_chunk() override { return std::nullopt; }
    std::optional<protocol::ChunkTarget> next_copy() override { return std::nullopt; }
    bool has_payload() override { return false; }
    bool has_copies() override { return false; }
    void heard() noexcept override {}
    void spoke() noexcept override {}
    void lose(Cause cause, const std::string& reason) override {
        look();
        why = reason;
        lost.store(static_cast<int>(cause));
    }
    void lane_broke(const std::string&) override {}
    bool is_lost() const noexcept override { return lost.load() >= 0; }
    void can_copy(bool can) override {
        look();
        (can ? came_up : broke).fetch_add(1);
    }
    void copy_broke(const protocol::ChunkTarget&) override {}
    bool enter() noexcept override { return true; }
    void leave() noexcept override {}
    protocol::TransferPtr lend(std::uint64_t) override { return nullptr; }
    void returned(const protocol::TransferPtr&) override {}
    void wait_inactive(const protocol::TransferPtr&) override {}
    protocol::ChunkTarget chunk_begin(const protocol::Header&) override { return {}; }
    void chunk_end(const protocol::ChunkTarget&, const protocol::Trailer&, bool) override {}
    void chunk_left(const protocol::ChunkJob&, bool, bool) override {}

    std::weak_ptr<ShmLink> link;
    std::atomic<int> came_up{0}, broke{0}, lost{-1}, looks_that_hung{0};
    std::string why;

  private:
    // Another thread uses the link meanwhile: it would wait for good for a lock that our caller holds.
    void look() {
        auto looked = std::make_shared<std::promise<void>>();
        auto seen = looked->get_future();
        std::thread([there = link.lock(), looked]() mutable {
            if (there) {
                there->act();
                there->why_not();
                there->forget_pool(~0ull);
            }
            there = nullptr;  // before: a test may count what a link holds
            looked->set_value();
        }).detach();
        looks_that_hung += seen.wait_for(kPatience) == std::future_status::ready ? 0 : 1;
    }
};

/// One block of `nbytes` in memory that is shared, or isn't.
class Memory {
  public:
    Memory(std::size_t nbytes, bool shared, std::uint64_t id = 1)
        : shared_(shared), segment_("test-pool", nbytes), plain_(shared ? 0 : nbytes) {
        auto* const at = shared ? segment_.data() : plain_.data();
        if (shared) {
            segments.push_back({id, segment_.fd(), reinterpret_cast<std::uintptr_t>(at), nbytes});
        }
        std::vector<memory::Group> groups{{"kv", 1, 0, true, "", "", "", 0}};
        const auto stride = static_cast<std::int64_t>(nbytes);
        std::vector<memory::Layer> layers{
            {"0", 0, {{reinterpret_cast<std::uintptr_t>(at), stride, {}, nbytes, -1}}}};
        auto shape = std::make_shared<const memory::PoolShape>(std::move(groups), std::move(layers), false);
        plan = std::make_unique<memory::StreamPlan>(
            std::move(shape), std::vector<std::uint32_t>{0},
            std::vector{std::make_shared<const memory::Ids>(memory::Ids{0})}, memory::Heads::every());
        for (std::size_t i = 0; i < nbytes; ++i) {
            at[i] = static_cast<std::byte>(i * 7 + i / 251);
        }
        content.assign(at, at + nbytes);
    }
    SourceMemory source(std::uint64_t pool = 1) const {
        return {*plan, {plan->shape(), pool, segments, shared_}};
    }

    std::vector<memory::SharedSegment> segments;
    std::unique_ptr<memory::StreamPlan> plan;
    Bytes content;

  private:
    const bool shared_;
    OwnSegment segment_;
    Bytes plain_;
};

/// A destination of as many bytes.
class Into final : public protocol::Transfer {
  public:
    Into(std::size_t size, Bytes where) : memory(size) {
        role = protocol::Role::destination;
        nbytes = size;
        location = std::move(where);
    }
    std::uint64_t runs(std::uint64_t begin, std::uint64_t end, iovec* out, std::size_t most,
                       std::size_t& count) const override {
        count = most > 0 && begin < end ? 1 : 0;
        if (count == 0) {
            return begin;
        }
        *out = {const_cast<std::byte*>(memory.data()) + begin, static_cast<std::size_t>(end - begin)};
        return end;
    }
    void reorder(const std::vector<std::uint32_t>&) override {}
    protocol::Range all() const { return {0, nbytes}; }

    Bytes memory;
};

struct End {
    explicit End(Fd channel) : loop("test-reactor", -1), host(std::make_shared<Host>()) {
        loop.start();
        link = std::make_shared<ShmLink>(host, loop, std::move(channel));
        host->link = link;
    }
    ~End() {
        link->close();
        loop.stop();
        CHECK(host->looks_that_hung.load() == 0);
    }
    EventLoop loop;
    std::shared_ptr<Host> host;
    std::shared_ptr<ShmLink> link;
};

inline std::pair<Fd, Fd> channel() {
    int ends[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    return {Fd(ends[0]), Fd(ends[1])};
}

/// Both up, and each proved to read the other's memory.
struct Links {
    Links() : Links(channel()) {}
    explicit Links(std::pair<Fd, Fd> ends) : source(std::move(ends.first)), sink(std::move(ends.second)) {
        source.link->start();
        sink.link->start();
        until([&] { return source.link->up() && sink.link->up() && source.link->peer_reads_us(); });
        until([&] { return sink.link->peer_reads_us() && sink.host->came_up.load() == 1; });
    }
    End source, sink;
};

/// Mappings of this process whose file has this name.
inline int mappings(const std::string& name) {
    std::ifstream maps("/proc/self/maps");
    int found = 0;
    for (std::string line; std::getline(maps, line);) {
        found += line.find("memfd:" + name) != std::string::npos ? 1 : 0;
    }
    return found;
}

}  // namespace kvt::test
