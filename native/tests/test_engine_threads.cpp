// Threads on both ends that post, wait, cancel and send messages at once, until another thread closes the
// connection or an engine, or the sockets are cut: what is promised of one operation must hold of each.
//
// The threads of the two ends are pairs: by the seed the nth transfer of a pair is the same on both, with a
// key and blocks that no other pair touches. All else is left to the scheduler.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <list>
#include <map>
#include <mutex>
#include <random>
#include <set>

#include "engine_pair.hpp"

using namespace kvt;
using namespace kvt::test;
using memory::Ids;
using Random = std::mt19937;

namespace {

constexpr std::uint32_t kPairs = 4;
// A pair's slots are used in turn. Two transfers are in flight, and what one that is over has left in its
// blocks is looked at again when the slot is used next.
constexpr std::uint32_t kSlots = 4, kBlocks = 12;
constexpr std::size_t kEnded = 600;        // ends that have been seen before the end of all
constexpr std::uint64_t kRewritten = ~0u;  // seed of what belongs to no transfer
constexpr Terms kTerms{.chunk_nbytes = 32u << 10, .layers = 2, .blocks = kPairs * kSlots * kBlocks};

struct Step {
    bool from_a;
    bool stopped[2];  // by the source, by the destination
    std::uint32_t blocks;
};

Step step_of(std::uint32_t seed, std::uint32_t pair, std::uint32_t n) {
    std::seed_seq mixed{seed, pair, n};
    Random random(mixed);
    const bool from_a = random() % 2 == 0;
    const auto stop = random() % 8;
    return {from_a, {stop == 0, stop == 1}, 1 + static_cast<std::uint32_t>(random() % kBlocks)};
}

// What both ends have said of each transfer, and what was wrong: doctest's macros stay in one thread.
class Ledger {
  public:
    void note(Role role, const std::string& key, const protocol::Outcome& outcome) {
        const std::lock_guard lock(mutex_);
        (role == Role::source ? sources_ : destinations_)[key] = outcome;
        ++ended_;
        enough_.notify_all();
    }
    void expect(bool right, const std::string& what) {
        if (!right) {
            const std::lock_guard lock(mutex_);
            wrong_.push_back(what);
        }
    }
    void wait_for(std::size_t ended) {
        std::unique_lock lock(mutex_);
        CHECK(enough_.wait_for(lock, std::chrono::seconds(60), [&] { return ended_ >= ended; }));
    }
    // When all threads are gone.
    void judge() const {
        std::size_t moved = 0;
        for (const auto& [key, outcome] : sources_) {
            const auto there = destinations_.find(key);
            const bool sealed = there != destinations_.end() && there->second.cause == Cause::ok;
            INFO(key, ": ", outcome.reason);
            if (outcome.cause == Cause::ok) {
                CHECK(sealed);
                ++moved;
            } else if (outcome.delivered == Delivered::no) {
                CHECK_FALSE(sealed);
            }
        }
        for (const auto& what : wrong_) {
            FAIL_CHECK(what);
        }
        CHECK(moved > kEnded / 4);
    }

  private:
    std::mutex mutex_;
    std::condition_variable enough_;
    std::size_t ended_ = 0;
    std::map<std::string, protocol::Outcome> sources_, destinations_;
    std::vector<std::string> wrong_;
};

// One end's completion queue, polled by all of its threads: every handle's tag must come out once.
class Tags {
  public:
    const std::shared_ptr<Queue>& queue() const { return queue_; }
    std::uint64_t next() {
        const std::lock_guard lock(mutex_);
        due_.insert(++last_);
        return last_;
    }
    void refused(std::uint64_t tag) {
        const std::lock_guard lock(mutex_);
        due_.erase(tag);
    }
    void collect() {
        const auto came = queue_->poll();
        const std::lock_guard lock(mutex_);
        for (const std::uint64_t tag : came) {
            unknown_ += due_.erase(tag) == 0 ? 1 : 0;
        }
    }
    void expect_all() {
        collect();
        CHECK(due_.empty());
        CHECK(unknown_ == 0);
    }

  private:
    std::shared_ptr<Queue> queue_ = std::make_shared<Queue>();
    std::mutex mutex_;
    std::uint64_t last_ = 0, unknown_ = 0;
    std::set<std::uint64_t> due_;
};

class Worker {
  public:
    Worker(Side& side, bool is_a, std::uint32_t seed, std::uint32_t pair, Ledger& ledger, Tags& tags)
        : side_(side),
          is_a_(is_a),
          seed_(seed),
          pair_(pair),
          ledger_(ledger),
          tags_(tags),
          random_(seed * 2 * kPairs + pair * 2 + (is_a ? 1 : 0)) {}

    // Until a post is refused: the connection is lost.
    void run() {
        try {
            for (std::uint32_t n = 0;; ++n) {
                begin(n);
                if (n >= 2) {
                    finish(flights_[(n - 2) % kSlots]);
                }
            }
        } catch (const NotUsable&) {
        }
        for (auto& flight : flights_) {
            finish(flight);
        }
    }
    // When the engines are closed.
    void expect_over() {
        for (const auto& flight : flights_) {
            expect_kept(flight);
        }
        for (const auto& message : messages_) {
            ledger_.expect(message->done(), "a message never ended");
        }
    }

  private:
    struct Flight {
        std::shared_ptr<TransferHandle> handle;
        Step step{};
        std::uint64_t seed = 0;
        Ids ids;
        bool finished = false;
        std::uint64_t kept = kRewritten;  // once it is over
    };

    void begin(std::uint32_t n) {
        Flight& flight = flights_[n % kSlots];
        expect_kept(flight);
        const Step step = step_of(seed_, pair_, n);
        const Role role = step.from_a == is_a_ ? Role::source : Role::destination;
        Flight next{nullptr, step, (std::uint64_t{pair_} << 32) + n, {}};
        for (std::uint32_t i = 0; i < step.blocks; ++i) {
            next.ids.push_back((pair_ * kSlots + n % kSlots) * kBlocks + i);
        }
        std::shuffle(next.ids.begin(), next.ids.end(), random_);
        side_.blocks.fill(next.ids, role == Role::source ? next.seed : kRewritten);
        flight = Flight();
        next.handle = post(role, std::to_string(pair_) + "." + std::to_string(n), next.ids);
        flight = std::move(next);
        if (random_() % 3 == 0) {
            send(random_() % 2 == 0 ? flight.handle : nullptr);
        }
        if (stops(flight) && random_() % 2 == 0) {
            side_.connection->cancel(flight.handle);
        }
    }

    std::shared_ptr<TransferHandle> post(Role role, std::string key, const Ids& ids) {
        auto args = side_.args(role, std::move(key), ids);
        args.queue = tags_.queue();
        args.tag = tags_.next();
        const std::uint64_t tag = args.tag;
        try {
            return side_.connection->post(std::move(args));
        } catch (const NotUsable&) {
            tags_.refused(tag);
            throw;
        }
    }

    // "d" or "a" (after a transfer), the pair, its number: those without a transfer keep their order.
    void send(const std::shared_ptr<TransferHandle>& after) {
        const std::string text = (after ? "a " : "d ") + std::to_string(pair_) + " " +
                                 std::to_string(messages_.size());
        const auto* bytes = reinterpret_cast<const std::byte*>(text.data());
        const std::uint64_t tag = tags_.next();
        try {
            messages_.push_back(side_.connection->post_message(protocol::Bytes(bytes, bytes + text.size()),
                                                               after, tags_.queue(), tag));
        } catch (const NotUsable&) {
            tags_.refused(tag);
            throw;
        }
    }

    static bool stops(const Flight& flight) {
        return flight.step.stopped[flight.handle->role == Role::source ? 0 : 1];
    }

    void finish(Flight& flight) {
        if (!flight.handle || flight.finished) {
            return;
        }
        TransferHandle& handle = *flight.handle;
        if (stops(flight)) {
            side_.connection->cancel(flight.handle);
        } else if (flight.step.stopped[0] || flight.step.stopped[1]) {
            // The other end may have ended it before it heard of ours.
            if (!wait(flight, monotonic_ns() + 5 * kMs)) {
                side_.connection->cancel(flight.handle);
            }
        }
        look(flight);
        ledger_.expect(wait(flight, deadline()), handle.key + " never ended");
        flight.finished = true;
        ledger_.note(handle.role, handle.key, handle.result.outcome);
        const bool sealed = handle.role == Role::destination && handle.result.outcome.cause == Cause::ok;
        if (sealed) {
            flight.kept = flight.seed;
            expect_kept(flight);
        } else {
            expect_sealed_blocks(flight);
            side_.blocks.fill(flight.ids, kRewritten);
        }
    }

    bool wait(const Flight& flight, Time until) {
        TransferHandle& handle = *flight.handle;
        switch (random_() % 4) {
            case 0: break;
            case 1: side_.connection->wait_layer(flight.handle, kTerms.layers - 1, until); break;
            case 2: {
                Waiter waiter;
                if (handle.subscribe(&waiter)) {
                    waiter.wait(until);
                }
                handle.unsubscribe(&waiter);
                break;
            }
            default:
                for (; !handle.done() && monotonic_ns() < until; tags_.collect()) {
                    pollfd one{tags_.queue()->fd(), POLLIN, 0};
                    ::poll(&one, 1, 1);
                }
        }
        return side_.connection->wait(handle, until);
    }

    // As explain() and stats() do, at any time.
    void look(const Flight& flight) {
        const auto [moved, all] = side_.connection->progress_of(*flight.handle);
        ledger_.expect(moved <= all, flight.handle->key + " moved too much");
        ledger_.expect(!side_.connection->state_of(*flight.handle).empty(), "no state");
        (void)side_.connection->counters();
        (void)side_.connection->unfinished();
        (void)side_.pool->in_use();
    }

    // Of a receive that failed: what is reported received is.
    void expect_sealed_blocks(const Flight& flight) {
        for (const auto& group : flight.handle->result.block_outcomes) {
            for (const std::uint32_t id : group.sealed) {
                const auto at = std::find(flight.ids.begin(), flight.ids.end(), id) - flight.ids.begin();
                for (std::uint32_t layer = 0; layer < kTerms.layers; ++layer) {
                    ledger_.expect(
                        side_.blocks.piece_is(layer, id, static_cast<std::size_t>(at), flight.seed),
                        flight.handle->key + " sealed a block with other bytes");
                }
            }
        }
    }

    void expect_kept(const Flight& flight) {
        if (flight.finished) {
            ledger_.expect(side_.blocks.are(flight.ids, flight.kept), flight.handle->key + ": other bytes");
        }
    }

    Side& side_;
    const bool is_a_;
    const std::uint32_t seed_, pair_;
    Ledger& ledger_;
    Tags& tags_;
    Random random_;
    std::array<Flight, kSlots> flights_;
    std::vector<std::shared_ptr<MessageHandle>> messages_;
};

// Takes an end's messages until told to stop: none twice, a thread's own in its order.
void read_messages(Side& side, Ledger& ledger, const std::atomic<bool>& stop) {
    std::set<std::string> seen;
    std::map<std::string, int> last;
    for (bool again = true; again;) {
        again = !stop.load();
        for (const auto& message : side.engine->recv_messages(monotonic_ns() + 10 * kMs)) {
            const std::string text(reinterpret_cast<const char*>(message.data.data()), message.data.size());
            ledger.expect(seen.insert(text).second, "message " + text + " came twice");
            if (text.front() == 'd') {
                const std::string pair = text.substr(2, text.rfind(' ') - 2);
                const int number = std::atoi(text.c_str() + text.rfind(' '));
                const auto before = last.find(pair);
                ledger.expect(before == last.end() || before->second < number, "message " + text + " late");
                last[pair] = number;
            }
        }
    }
}

enum class End { close_a, close_b, close_engine_a, close_engine_b, cut };

void end_it(EnginePair& pair, End how, Way way) {
    switch (how) {
        case End::close_a: pair.a.connection->close(Cause::connection_closed, "closed", true); break;
        case End::close_b: pair.b.connection->close(Cause::connection_closed, "closed", true); break;
        case End::close_engine_a: pair.a.engine->close(); break;
        case End::close_engine_b: pair.b.engine->close(); break;
        case End::cut:
            if (way == Way::tcp) {
                pair.cut();
            } else {
                pair.b.connection->close(Cause::peer_lost, "reset: cut", false);
            }
    }
}

void run_all(const Terms& terms, End how, std::uint32_t seed) {
    EnginePair pair(terms);
    Ledger ledger;
    Tags tags_a, tags_b;
    std::list<Worker> workers;
    std::vector<std::thread> threads, readers;
    std::atomic<bool> stop{false};
    for (Side* side : {&pair.a, &pair.b}) {
        readers.emplace_back([&, side] { read_messages(*side, ledger, stop); });
        for (std::uint32_t i = 0; i < kPairs; ++i) {
            const bool is_a = side == &pair.a;
            Worker& worker = workers.emplace_back(*side, is_a, seed, i, ledger, is_a ? tags_a : tags_b);
            threads.emplace_back([&worker] { worker.run(); });
        }
    }
    ledger.wait_for(kEnded);
    end_it(pair, how, terms.way);
    for (auto& thread : threads) {
        thread.join();
    }
    stop.store(true);
    for (auto& thread : readers) {
        thread.join();
    }
    pair.close();
    for (auto& worker : workers) {
        worker.expect_over();
    }
    tags_a.expect_all();
    tags_b.expect_all();
    ledger.judge();
    CHECK(pair.a.pool->in_use() == 0);
    CHECK(pair.b.pool->in_use() == 0);
}

void run_every_end(Terms terms) {
    const char* const given = std::getenv("KVT_ENGINE_SEED");
    std::uint32_t seed = given == nullptr ? 1 : static_cast<std::uint32_t>(std::atoi(given));
    for (const End how : {End::close_a, End::close_b, End::close_engine_a, End::close_engine_b, End::cut}) {
        INFO("KVT_ENGINE_SEED=", seed, ", end ", static_cast<int>(how));
        terms.digest = seed % 2 == 0 ? DigestKind::crc32c : DigestKind::none;
        const Census before;
        run_all(terms, how, seed++);
        before.expect_no_more();
    }
}

}  // namespace

TEST_CASE("threads at once, over sockets") { run_every_end(kTerms); }

TEST_CASE("threads at once, within the process") {
    Terms terms = kTerms;
    terms.way = Way::inproc;
    run_every_end(terms);
}
