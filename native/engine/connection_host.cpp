// The connection as its path sees it: each call takes the session's lock for a few hundred nanoseconds.
#include <sys/epoll.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/clock.hpp"
#include "base/crc32c.hpp"
#include "engine/connection.hpp"
#include "engine/engine.hpp"
#include "engine/watch.hpp"

namespace kvt::engine {

using protocol::Cause;
using protocol::Time;

void Connection::prepare(std::shared_ptr<backends::Path> path, const protocol::SessionConfig& config) {
    const Time now = monotonic_ns();
    {
        const std::lock_guard lock(mutex_);
        if (!ending_ && !lost_.load(std::memory_order_relaxed)) {
            backend_ = path->name();
            backend_of_copies_ = path->name_of_copies();
            control_tally_.store(&engine_.tally(backend_));
            copies_tally_.store(&engine_.tally(backend_of_copies_));
            path_ = std::move(path);
            digest_ = config.digest;
            session_.open(config, now);
            heard_at_.store(now);
            spoke_at_.store(now);
            return;
        }
    }
    path->close();
}

void Connection::begin() {
    if (path() != nullptr) {
        open_.store(true, std::memory_order_release);
        settle();
    }
}

// Not lost: either nobody has begun to close, or who does is in.
bool Connection::enter() noexcept {
    const std::lock_guard lock(mutex_);
    if (lost_.load(std::memory_order_relaxed)) {
        return false;
    }
    engine_.visitor_comes();
    return true;
}

void Connection::leave() noexcept { engine_.visitor_leaves(); }

bool Connection::take_control(protocol::Bytes& out) {
    const std::lock_guard lock(mutex_);
    protocol::Bytes& from = session_.outbox();
    if (from.empty()) {
        return false;
    }
    if (out.empty()) {
        out.swap(from);
    } else {
        out.insert(out.end(), from.begin(), from.end());
        from.clear();
    }
    return true;
}

void Connection::receive(const protocol::Header& header, std::span<const std::byte> body) {
    std::optional<protocol::CloseCode> closed;
    {
        const std::lock_guard lock(mutex_);
        if (lost_.load(std::memory_order_relaxed)) {
            return;
        }
        session_.receive(header, body, monotonic_ns());
        closed = session_.peer_closed();
    }
    if (closed) {
        lose(Cause::peer_lost, *closed == protocol::CloseCode::closed
                                   ? "closed: the peer closed the connection"
                               : *closed == protocol::CloseCode::protocol
                                   ? "closed: the peer says that our bytes broke the protocol"
                                   : "closed: the peer says that we exceeded a limit");
    }
}

void Connection::receive_inline(const protocol::Header& header, std::span<const std::byte> payload,
                                const protocol::Trailer& trailer) {
    const Time now = monotonic_ns();
    const std::lock_guard lock(mutex_);
    if (lost_.load(std::memory_order_relaxed)) {
        return;
    }
    const protocol::ChunkTarget target = session_.chunk_begin(header, now);
    bool verified = true;
    if (target.store && trailer.status == protocol::ChunkStatus::ok) {
        std::uint64_t at = target.range.begin;
        const std::byte* from = payload.data();
        std::uint32_t digest = digest_ == protocol::DigestKind::none ? 0 : protocol::digest_seed(header);
        while (at < target.range.end) {
            iovec runs[64];
            std::size_t count = 0;
            at = target.transfer->runs(at, target.range.end, runs, std::size(runs), count);
            memory::scatter(from, runs, count);
            for (std::size_t i = 0; i < count; ++i) {
                // Of the bytes in place, not of those on the wire: what is reported is what can be read.
                digest = digest_ == protocol::DigestKind::none
                             ? 0
                             : crc32c(digest, runs[i].iov_base, runs[i].iov_len);
                from += runs[i].iov_len;
            }
        }
        verified = digest_ == protocol::DigestKind::none ||
                   (trailer.kind == digest_ && trailer.digest == digest);
    }
    session_.chunk_end(target, trailer, verified, monotonic_ns());  // the copy took time
    static_cast<TransferHandle&>(*target.transfer).signal_progress();
}

std::optional<protocol::ChunkJob> Connection::next_chunk() {
    const std::lock_guard lock(mutex_);
    return session_.next_chunk(monotonic_ns());
}

std::optional<protocol::ChunkTarget> Connection::next_copy() {
    const std::lock_guard lock(mutex_);
    return session_.next_copy(monotonic_ns());
}

std::optional<protocol::Bytes> Connection::locate(TransferHandle& source) {
    auto located = path_ ? path_->locate({source.plan(), source.block_pool()->memory()}) : std::nullopt;
    if (!located) {
        return std::nullopt;
    }
    // A grant that has ended meanwhile ends what is lent by it: whoever rewrites waits for neither.
    if (source.grant && located->loan && !engine_.grants().lend(source.grant, located->loan)) {
        return std::nullopt;
    }
    source.loan = std::move(located->loan);
    return std::move(located->location);
}

// By chunks, or by copies, also if that way is gone by now; what has moved nothing would have gone the way
// that there is.
std::string Connection::way_of(const TransferHandle& handle) const {
    const bool chunks = handle.chunks != 0 || handle.attempt > 1 || (handle.matched_at != 0 && !handle.pulls);
    const bool copies = handle.located || handle.copies != 0 ||
                        (path_ != nullptr && path_->channel() == backends::Path::Channel::up);
    return !chunks && copies ? backend_of_copies_ : backend_;
}

void Connection::can_copy(bool can) {
    Event event;
    std::shared_ptr<backends::Path> way;
    {
        const std::lock_guard lock(mutex_);
        session_.set_pulls(can, monotonic_ns());
        inactive_.notify_all();
        event.kind = Event::Kind::channel;
        event.session_id = session_id_;
        event.cause = can ? "up" : std::exchange(could_copy_, false) ? "broke" : "refused";
        could_copy_ = can;
        way = path_;
    }
    if (can) {
        for (const auto& grant : engine_.grants().all_for(reader())) {
            show(grant);
        }
    }
    settle();
    if (way && !is_lost()) {
        event.text = way->channel_refusal();
        engine_.post_event(std::move(event));
    }
}

void Connection::wait_channel(std::int64_t until) {
    using Channel = backends::Path::Channel;
    std::unique_lock lock(mutex_);
    const auto known = [&] { return path_ == nullptr || path_->channel() != Channel::awaited; };
    while (!known()) {
        const std::int64_t left = until - monotonic_ns();
        if (left <= 0) {
            return;
        }
        inactive_.wait_for(lock, std::chrono::nanoseconds(left));
    }
}

void Connection::copy_broke(const protocol::ChunkTarget& target) {
    const std::lock_guard lock(mutex_);
    session_.copy_broke(target, monotonic_ns());
    if (target.transfer->active == 0) {
        inactive_.notify_all();
    }
}

bool Connection::has_payload() {
    const std::lock_guard lock(mutex_);
    return session_.has_chunks() || session_.has_copies();
}

bool Connection::has_copies() {
    const std::lock_guard lock(mutex_);
    return session_.has_copies();
}

void Connection::heard() noexcept { heard_at_.store(monotonic_ns(), std::memory_order_relaxed); }

Time Connection::silent_ns() const noexcept { return monotonic_ns() - heard_at_.load(); }
void Connection::spoke() noexcept { spoke_at_.store(monotonic_ns(), std::memory_order_relaxed); }

protocol::ChunkTarget Connection::chunk_begin(const protocol::Header& header) {
    const std::lock_guard lock(mutex_);
    return session_.chunk_begin(header, monotonic_ns());
}

void Connection::chunk_end(const protocol::ChunkTarget& target, const protocol::Trailer& trailer,
                           bool verified) {
    const std::lock_guard lock(mutex_);
    session_.chunk_end(target, trailer, verified, monotonic_ns());
    static_cast<TransferHandle&>(*target.transfer).signal_progress();
    if (target.transfer->active == 0) {
        inactive_.notify_all();
    }
}

void Connection::chunk_left(const protocol::ChunkJob& job, bool whole, bool begun) {
    const std::lock_guard lock(mutex_);
    session_.chunk_left(job, whole, begun, monotonic_ns());
}

// ---- in this process: the destination's mover borrows the source's record while it copies

protocol::TransferPtr Connection::lend(std::uint64_t want) {
    const std::lock_guard lock(mutex_);
    return session_.lend(want, monotonic_ns());
}

void Connection::returned(const protocol::TransferPtr& transfer) {
    const std::lock_guard lock(mutex_);
    session_.returned(transfer, monotonic_ns());
    if (transfer->active == 0) {
        inactive_.notify_all();
    }
}

void Connection::wait_inactive(const protocol::TransferPtr& transfer) {
    std::unique_lock lock(mutex_);
    inactive_.wait(lock, [&] { return transfer->active == 0; });
}

// ---- the peer's process

void Connection::watch_process(int pid) {
    auto watch = ProcessWatch::open(pid, shared_from_this());
    if (!watch) {
        return;
    }
    if (engine_.reactor().add(watch->fd(), EPOLLIN, watch)) {
        return;  // its silence will do
    }
    {
        const std::lock_guard lock(mutex_);
        watch_ = std::move(watch);
    }
    if (is_lost()) {
        unwatch_process();  // close() may have looked before
    }
}

void Connection::unwatch_process() {
    std::shared_ptr<ProcessWatch> watch;
    {
        const std::lock_guard lock(mutex_);
        watch = std::move(watch_);
    }
    // A killed process's sockets end before its pidfd says so: what is for it alone waits for the proof.
    if (watch && !engine_.grants().outlives(reader())) {
        engine_.reactor().remove(watch->fd());
    }
}

// Two threads may act on the output at once: who takes messages first hands them over first.
void Connection::deliver_messages() {
    const std::lock_guard in_turn(delivery_mutex_);
    std::vector<protocol::Bytes> inbox;
    {
        const std::lock_guard lock(mutex_);
        inbox = session_.take_messages();
    }
    if (!inbox.empty()) {
        const std::size_t count = inbox.size();
        engine_.deliver(shared_from_this(), std::move(inbox));
        const std::lock_guard lock(mutex_);
        session_.messages_queued(count);
        session_.pump(monotonic_ns());
    }
}

// ---- for explain() and stats()

protocol::Session::Counters Connection::counters() const {
    const std::lock_guard lock(mutex_);
    return session_.counters();
}

// Where the way was changed in the middle, each way has what went by it.
void Connection::count(Operation operation, const Result& result) {
    const Cause outcome = result.outcome.cause;
    const std::uint64_t copied = std::min(result.resumed_nbytes, result.nbytes);
    tally_.record(operation, outcome, result.nbytes, result.seconds_ns);
    engine_.tally(result.backend).record(operation, outcome, result.nbytes - copied, result.seconds_ns);
    if (copied != 0) {
        std::unique_lock lock(mutex_);
        const std::string first = backend_of_copies_;
        lock.unlock();
        engine_.tally(first).record_part(operation, outcome, copied);
    }
}

std::size_t Connection::unfinished() const {
    const std::lock_guard lock(mutex_);
    return session_.unfinished();
}

std::string Connection::state_of(const TransferHandle& handle) const {
    std::unique_lock lock(mutex_);
    if (const auto owner = handle.connection(); owner.get() != this) {
        lock.unlock();
        return owner->state_of(handle);
    }
    if (handle.done()) {
        switch (handle.result.outcome.cause) {
            case Cause::ok: return "done";
            case Cause::cancelled: return "cancelled";
            default: return "failed";
        }
    }
    switch (handle.state) {
        case protocol::State::posted: return "posted";
        case protocol::State::matched: return "matched";
        default: return "moving";
    }
}

std::pair<std::uint64_t, std::uint64_t> Connection::progress_of(const TransferHandle& handle) const {
    std::unique_lock lock(mutex_);
    if (const auto owner = handle.connection(); owner.get() != this) {
        lock.unlock();
        return owner->progress_of(handle);
    }
    if (handle.role == protocol::Role::destination) {
        return {handle.verified.nbytes(), handle.nbytes};
    }
    if (handle.outcome.delivered == protocol::Delivered::yes) {
        return {handle.nbytes, handle.nbytes};
    }
    return {handle.sent_nbytes, handle.nbytes};
}

// ---- gates

void Connection::fail_gates() {
    if (forked()) {
        return;
    }
    {
        const std::lock_guard lock(mutex_);
        session_.fail_gates(monotonic_ns());
    }
    settle();
}

bool Connection::poll_gates() {
    bool waits = false, changed = false;
    if (forked()) {
        return false;
    }
    {
        const std::lock_guard lock(mutex_);
        const bool moves = session_.has_chunks();  // then the lanes are at it, and find the rest
        waits = session_.poll_gates(monotonic_ns());
        changed = session_.has_output() || (!moves && session_.has_chunks());
    }
    if (changed) {
        settle();
    }
    return waits;
}

bool Connection::gates_wait() const {
    const std::lock_guard lock(mutex_);
    return session_.gates_wait();
}

void LayerGate::attach(const std::shared_ptr<Connection>& connection) {
    const std::lock_guard lock(mutex_);
    std::erase_if(connections_, [](const auto& known) { return known.expired(); });
    for (const auto& known : connections_) {
        if (known.lock() == connection) {
            return;
        }
    }
    connections_.push_back(connection);
}

void LayerGate::kick() {
    if (generation_ != fork_generation()) {
        return;
    }
    std::vector<std::weak_ptr<Connection>> known;
    {
        const std::lock_guard lock(mutex_);
        known = connections_;
    }
    for (const auto& weak : known) {
        const auto connection = weak.lock();
        if (!connection) {
            continue;
        }
        if (const backends::PathHost::Visit visit(*connection); !visit) {
            continue;  // its transfers have ended
        } else if (failed()) {
            connection->fail_gates();
        } else {
            connection->poll_gates();
        }
    }
}

}  // namespace kvt::engine
