// Two sessions driven by hand: the test says which frame, chunk or answer comes next.
//
// Lives here: records over real memory, the two sides, and the steps. Does not live here: time, randomness
// (sim/). Invariant: nothing moves unless a test says so; run() is the one exception, and moves everything
// until nothing is left.
#pragma once

#include <doctest/doctest.h>

#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "protocol/session.hpp"

namespace kvt::test {

using namespace kvt::protocol;

inline constexpr Time kMs = 1'000'000;
inline constexpr Time kSecond = 1000 * kMs;

/// A transfer over memory of its own: layers of pieces, each layer in a buffer by its index in the pool.
class Record final : public Transfer {
  public:
    std::uint64_t runs(std::uint64_t begin, std::uint64_t end, iovec* out, std::size_t most,
                       std::size_t& count) const override {
        count = 0;
        for (const auto& span : layout) {
            const std::uint64_t from = std::max(begin, span.range.begin), to = std::min(end, span.range.end);
            if (from >= to || count == most) {
                continue;
            }
            auto& buffer = const_cast<Record*>(this)->memory[span.layer];
            out[count++] = {buffer.data() + (from - span.range.begin), static_cast<std::size_t>(to - from)};
            begin = to;
        }
        return begin;
    }
    void reorder(const std::vector<std::uint32_t>& positions) override {
        std::vector<LayerSpan> old = layout;
        layout.clear();
        std::uint64_t at = 0;
        for (const std::uint32_t position : positions) {
            const std::uint64_t size = old[position].range.end - old[position].range.begin;
            layout.push_back({{at, at + size}, old[position].layer});
            at += size;
        }
    }
    std::optional<Bytes> locate() override { return Bytes(); }
    std::vector<LayerSpan> layout;  // as spans, which the session changes
    std::vector<std::vector<std::byte>> memory;
};
using RecordPtr = std::shared_ptr<Record>;

struct Frame {
    Header header;
    Bytes body;
};

inline PoolTerms pool_of(std::size_t layers, bool named = true) {
    PoolTerms pool;
    pool.name = "kv";
    pool.named = named;
    pool.groups.push_back({"g", false, "bfloat16", "HND", "packed", 16});
    for (std::size_t i = 0; i < layers; ++i) {
        pool.layers.push_back({"layer." + std::to_string(i), 0});
    }
    return pool;
}

/// One side: a session, what it has said, and what it has asked of its engine.
class Party {
  public:
    explicit Party(SessionConfig config) : session(config) {}

    RecordPtr make(Role role, const std::string& key, const PoolTerms& pool,
                   std::vector<std::uint16_t> layers, std::uint32_t blocks, std::uint64_t piece_nbytes) {
        auto record = std::make_shared<Record>();
        record->role = role;
        record->key = key;
        record->pool = &pool;
        record->limits = {300 * kSecond, 10 * kSecond, kNever};
        record->memory.resize(pool.layers.size());
        for (const std::uint16_t layer : layers) {
            const std::uint64_t size = blocks * piece_nbytes;
            record->terms.layers.push_back({layer, piece_nbytes});
            record->spans.push_back({{record->nbytes, record->nbytes + size}, layer});
            record->memory[layer].assign(size, std::byte{0});
            record->nbytes += size;
        }
        record->terms.groups.push_back({0, blocks});
        record->layout = record->spans;
        return record;
    }
    RecordPtr post(RecordPtr record, Time now = 0, std::uint64_t pool_id = 7) {
        session.post(record, pool_id, now);
        settle(now);
        return record;
    }
    /// Collects what the session has to say; answers quiescing unless `hold_quiesce`.
    void settle(Time now = 0) {
        for (;;) {
            for (auto& one : session.take_messages()) {
                inbox.push_back(std::move(one));
                session.messages_queued(1);
            }
            session.pump(now);
            Bytes& out = session.outbox();
            std::size_t at = 0;
            while (at < out.size()) {
                const Header header = decode_header(
                    std::span<const std::byte, kHeaderNbytes>(out.data() + at, kHeaderNbytes), false);
                const auto body = out.begin() + static_cast<std::ptrdiff_t>(at + kHeaderNbytes);
                said.push_back({header, Bytes(body, body + header.body_nbytes)});
                at += kHeaderNbytes + header.body_nbytes;
            }
            out.clear();
            for (auto& one : session.take_finished()) {
                finished.push_back(one);
            }
            for (auto& one : session.take_finished_messages()) {
                messages_done.push_back(one);
            }
            auto asked = session.take_quiescing();
            quiescing.insert(quiescing.end(), asked.begin(), asked.end());
            if (hold_quiesce || quiescing.empty()) {
                return;
            }
            answer_quiesce(now);
        }
    }
    void answer_quiesce(Time now = 0) {
        for (const auto& transfer : std::exchange(quiescing, {})) {
            session.quiesced(transfer, now);
        }
        if (hold_quiesce) {
            settle(now);
        }
    }
    std::size_t times_finished(const TransferPtr& transfer) const {
        return static_cast<std::size_t>(std::count(finished.begin(), finished.end(), transfer));
    }

    Session session;
    bool hold_quiesce = false;
    std::deque<Frame> said;  // on control, not yet delivered
    std::vector<TransferPtr> quiescing, finished;
    std::vector<MessagePtr> messages_done;
    std::vector<Bytes> inbox;
};

class Pair {
  public:
    explicit Pair(SessionConfig config = {}) : a(config), b(config), kind(config.digest) {}

    Party& other(Party& side) { return &side == &a ? b : a; }
    void deliver_one(Party& from) {
        REQUIRE(!from.said.empty());
        const Frame frame = std::move(from.said.front());
        from.said.pop_front();
        other(from).session.receive(frame.header, frame.body, now);
        other(from).settle(now);
    }
    void deliver(Party& from) {
        while (!from.said.empty()) {
            deliver_one(from);
        }
    }
    std::optional<ChunkJob> take(Party& from) {
        auto job = from.session.next_inline(now);
        if (!job) {
            job = from.session.next_chunk(now);
        }
        from.settle(now);
        return job;
    }
    ChunkTarget arrive(Party& from, const ChunkJob& job) { return arrive_header(from, job.header); }
    ChunkTarget arrive_header(Party& from, const Header& header) {
        const ChunkTarget target = other(from).session.chunk_begin(header, now);
        other(from).settle(now);
        return target;
    }
    void land(Party& from, const ChunkJob& job, const ChunkTarget& target, bool verified = true,
              ChunkStatus status = ChunkStatus::ok) {
        if (target.store && status == ChunkStatus::ok) {
            copy(*job.transfer, *target.transfer, job.range);
        }
        other(from).session.chunk_end(target, {status, kind, 0}, verified, now);
        other(from).settle(now);
    }
    void left(Party& from, const ChunkJob& job, bool whole = true, bool begun = true) {
        from.session.chunk_left(job, whole, begun, now);
        from.settle(now);
    }
    /// One chunk, from end to end.
    bool move(Party& from) {
        auto job = take(from);
        if (!job) {
            return false;
        }
        left(from, *job);
        land(from, *job, arrive(from, *job));
        return true;
    }
    bool copy_one(Party& side) {
        auto target = side.session.next_copy(now);
        if (!target) {
            return false;
        }
        const TransferPtr source = other(side).session.lend(target->transfer->want, now);
        Trailer trailer{source ? ChunkStatus::ok : ChunkStatus::aborted, kind, 0};
        if (source) {
            copy(*source, *target->transfer, target->range);
            other(side).session.returned(source, now);
        }
        side.session.chunk_end(*target, trailer, source != nullptr, now);
        side.settle(now);
        return true;
    }
    void run() {
        for (bool again = true; again;) {
            a.settle(now);
            b.settle(now);
            again = !a.said.empty() || !b.said.empty();
            deliver(a);
            deliver(b);
            again = move(a) || again;
            again = move(b) || again;
            again = copy_one(a) || again;
            again = copy_one(b) || again;
        }
    }
    static void copy(const Transfer& from, const Transfer& to, Range range) {
        while (range.begin < range.end) {
            iovec source{}, target{};
            std::size_t n = 0;
            from.runs(range.begin, range.end, &source, 1, n);
            to.runs(range.begin, range.end, &target, 1, n);
            const std::size_t nbytes = std::min(source.iov_len, target.iov_len);
            std::memcpy(target.iov_base, source.iov_base, nbytes);
            range.begin += nbytes;
        }
    }
    void expect_idle() {
        for (Party* side : {&a, &b}) {
            CHECK(side->session.unfinished() == 0);
            CHECK(side->session.tombstones() == 0);
            CHECK(side->session.kept_for_peer() == 0);
            CHECK(side->session.outstanding() == 0);
            CHECK(side->said.empty());
        }
    }

    Party a, b;  // a is the source of most tests
    DigestKind kind;
    Time now = 0;
};

inline void fill(Record& record, unsigned seed) {
    for (std::size_t layer = 0; layer < record.memory.size(); ++layer) {
        for (std::size_t i = 0; i < record.memory[layer].size(); ++i) {
            record.memory[layer][i] = static_cast<std::byte>(seed + layer * 31 + i * 7 + (i >> 8));
        }
    }
}

}  // namespace kvt::test
