#include "engine/connection.hpp"

#include <algorithm>
#include <utility>

#include "base/clock.hpp"
#include "base/crc32c.hpp"
#include "engine/engine.hpp"
#include "engine/watch.hpp"

namespace kvt::engine {

using protocol::Cause;
using protocol::Time;

namespace {

// Between the end of a lane and that of its connection, for the peer's last words on control.
constexpr Time kLaneGraceNs = 25'000'000;

}  // namespace

Connection::Connection(Engine& engine, std::string session_id)
    : engine_(engine),
      session_id_(std::move(session_id)),
      control_tally_(&engine.tally("none")),
      copies_tally_(control_tally_.load()),
      heard_at_(monotonic_ns()),
      spoke_at_(monotonic_ns()),
      dead_after_(engine.options().dead_after_ns) {}

Connection::~Connection() = default;

std::shared_ptr<backends::Path> Connection::path() const {
    const std::lock_guard lock(mutex_);
    return path_;
}

std::string Connection::backend() const {
    const std::lock_guard lock(mutex_);
    return backend_;
}

// ---- acting on the session's output

void Connection::settle(std::uint64_t small_nbytes) {
    if (forked()) {
        return;
    }
    while (settle_once(small_nbytes)) {
        small_nbytes = 0;
    }
}

Connection::Output Connection::take_output() {
    Output output;
    const std::lock_guard lock(mutex_);
    if (open_.load(std::memory_order_relaxed)) {
        session_.pump(monotonic_ns());
        put_inline();
        output.path = path_;
    }
    output.quiescing = session_.take_quiescing();
    output.finished = session_.take_finished();
    output.messages = session_.take_finished_messages();
    output.holds = session_.take_finished_holds();
    output.inbox = session_.has_messages();
    output.control = !session_.outbox().empty();
    output.payload = session_.has_chunks() || session_.has_copies();
    output.gated = session_.gates_wait();
    output.deadline = session_.next_deadline();
    for (const auto& transfer : output.finished) {
        auto& handle = static_cast<TransferHandle&>(*transfer);
        handle.snapshot(way_of(handle));
    }
    return output;
}

// True when what was done may have changed the session again. What a small write of this thread leaves is a
// word on a gate, and gates are polled.
bool Connection::settle_once(std::uint64_t small_nbytes) {
    Output output = take_output();
    // A success is done here before the peer can hear of it: what it sends then finds the handle done. A
    // failure after: what this side posts then comes behind the word that ends the old.
    for (const auto& transfer : output.finished) {
        if (transfer->outcome.cause == Cause::ok) {
            complete(transfer);
        }
    }
    if (output.inbox) {
        deliver_messages();  // then there is the word that they have come
    }
    if (output.path && (output.control || output.inbox)) {
        output.path->flush_control();
    }
    for (const auto& transfer : output.finished) {
        if (transfer->outcome.cause != Cause::ok) {
            complete(transfer);
        }
    }
    for (const auto& transfer : output.quiescing) {
        if (output.path) {
            output.path->quiesce(transfer);
        }
        const std::lock_guard lock(mutex_);
        session_.quiesced(transfer, monotonic_ns());
    }
    for (const auto& message : output.messages) {
        complete(message);
    }
    for (const auto& hold : output.holds) {
        complete(hold);
    }
    if (output.payload && output.path) {
        output.path->kick(small_nbytes);
    }
    engine_.need_by(output.deadline, output.gated ? shared_from_this() : nullptr);
    return !output.quiescing.empty();
}

// Small transfers ride on the control stream. Under the lock: at most 16 KiB are copied a frame.
void Connection::put_inline() {
    const Time now = monotonic_ns();
    while (auto job = session_.next_inline(now)) {
        protocol::Bytes& out = session_.outbox();
        const auto header = protocol::encode_header(job->header);
        out.insert(out.end(), header.begin(), header.end());
        const std::size_t body_at = out.size();
        out.resize(body_at + job->header.body_nbytes);
        std::uint64_t at = job->range.begin;
        std::byte* to = out.data() + body_at;
        while (at < job->range.end) {
            iovec runs[64];
            std::size_t count = 0;
            at = job->transfer->runs(at, job->range.end, runs, std::size(runs), count);
            memory::gather(runs, count, to);
            for (std::size_t i = 0; i < count; ++i) {
                to += runs[i].iov_len;
            }
        }
        protocol::Trailer trailer{protocol::ChunkStatus::ok, digest_, 0};
        if (digest_ == protocol::DigestKind::crc32c) {
            trailer.digest = crc32c(protocol::digest_seed(job->header), out.data() + body_at,
                                    job->header.body_nbytes);
        }
        const bool granted = job->transfer->still_granted();  // read, then looked at: never the reverse
        trailer.status = granted ? protocol::ChunkStatus::ok : protocol::ChunkStatus::aborted;
        const auto raw = protocol::encode_trailer(trailer);
        out.insert(out.end(), raw.begin(), raw.end());
        session_.chunk_left(*job, granted, true, now);
    }
}

namespace {

Operation operation_of(const TransferHandle& handle) noexcept {
    if (handle.role == protocol::Role::source) {
        return handle.use ? Operation::write : Operation::send;
    }
    return handle.use ? Operation::read : Operation::receive;
}

}  // namespace

void Connection::complete(const protocol::TransferPtr& transfer) {
    auto& handle = static_cast<TransferHandle&>(*transfer);
    engine_.release(handle);
    handle.loan = nullptr;
    handle.found = nullptr;  // the peer's memory doesn't stay mapped for who keeps the handle
    handle.location = {};
    handle.block_pool()->unuse();
    if (handle.grant) {  // the peer's operation, counted there
        engine_.grants().served(handle, reader());
    } else {
        count(operation_of(handle), handle.result);
    }
    handle.complete();
    std::vector<std::shared_ptr<MessageHandle>> ready;
    {
        const std::lock_guard lock(mutex_);
        const auto split = std::stable_partition(
            dependents_.begin(), dependents_.end(),
            [&](const auto& message) { return message->after.get() != &handle; });
        ready.assign(std::make_move_iterator(split), std::make_move_iterator(dependents_.end()));
        dependents_.erase(split, dependents_.end());
        handle.signal_progress();
    }
    for (const auto& message : ready) {
        const auto after = message->after;
        message->connection()->release_message(message, after);
    }
}

void Connection::complete(const protocol::MessagePtr& message, bool counted) {
    auto& handle = static_cast<MessageHandle&>(*message);
    handle.result.outcome = handle.outcome;
    if (counted) {
        const std::int64_t ns = handle.posted_at != 0 ? monotonic_ns() - handle.posted_at : 0;
        tally_.record(Operation::message, handle.outcome.cause, handle.nbytes, ns);
        control_tally_.load()->record(Operation::message, handle.outcome.cause, handle.nbytes, ns);
    }
    handle.complete();
}

// ---- waiting

namespace {

class UntilDone final : public backends::Path::StopCondition {
  public:
    explicit UntilDone(const Handle& handle) : handle_(handle) {}
    bool operator()() const noexcept override { return handle_.done(); }

  private:
    const Handle& handle_;
};

}  // namespace

bool Connection::wait(Handle& handle, std::int64_t until) {
    if (handle.done()) {
        return true;
    }
    Waiter waiter;
    if (!handle.subscribe(&waiter)) {
        return true;
    }
    const std::shared_ptr<backends::Path> way = path();
    bool driven = false;
    if (way) {
        driven = way->drive(UntilDone(handle), waiter.fd(), until);
    }
    if (!driven && !handle.done()) {
        waiter.wait(until);
    }
    handle.unsubscribe(&waiter);
    return handle.done();
}

Connection::LayerState Connection::wait_layer(const std::shared_ptr<TransferHandle>& handle,
                                              std::uint32_t layer, std::int64_t until) {
    Waiter waiter;
    std::unique_lock lock(mutex_);
    if (handle->connection().get() != this) {
        return LayerState::waiting;
    }
    const auto span = std::find_if(handle->spans.begin(), handle->spans.end(),
                                   [&](const auto& s) { return s.layer == layer; });
    if (span == handle->spans.end()) {
        return LayerState::unknown;
    }
    const protocol::Range range = span->range;
    const auto landed = [&] { return range.begin == range.end || handle->verified.contains(range); };
    handle->layer_waiters.push_back(&waiter);
    while (!landed() && !handle->done()) {
        waiter.rearm();
        lock.unlock();
        const bool signalled = waiter.wait(until);
        lock.lock();
        if (handle->connection().get() != this) {
            return LayerState::waiting;  // adopt() has withdrawn the waiter; the handle isn't ours to read
        }
        if (!signalled) {
            break;  // time, or a signal for the interpreter
        }
    }
    std::erase(handle->layer_waiters, &waiter);
    if (landed()) {
        return LayerState::landed;
    }
    return handle->done() ? LayerState::over : LayerState::waiting;
}

// ---- loss and the clock

namespace {

// What the peer hears of the end.
std::optional<protocol::CloseCode> last_word(Cause cause, bool tell) noexcept {
    if (tell) {
        return protocol::CloseCode::closed;
    }
    switch (cause) {
        case Cause::protocol_error: return protocol::CloseCode::protocol;
        case Cause::resource_limit: return protocol::CloseCode::limit;
        default: return std::nullopt;
    }
}

}  // namespace

namespace {

// Proved: it won't come back as who it was.
bool has_died(Cause cause, const std::string& reason) noexcept {
    return cause == Cause::peer_lost && (reason == kProcessEnded || reason.starts_with("restarted"));
}

}  // namespace

void Connection::close(Cause cause, const std::string& reason, bool tell) {
    if (forked()) {
        return;
    }
    const Visit here(*this);
    const auto word = last_word(cause, tell);
    std::shared_ptr<backends::Path> path;
    {
        const std::lock_guard lock(mutex_);
        if (!here || ending_) {
            return;  // the first reason is the reason: the peer's answer to our goodbye is not
        }
        ending_ = true;
        path = path_;
        if (word) {
            session_.say_close(*word);
        }
    }
    if (path && word) {
        path->flush_control();
    }
    {
        const std::lock_guard lock(mutex_);
        if (lost_.exchange(true)) {
            return;
        }
        lost_cause_ = cause;
        lost_reason_ = reason;
        session_.lost(cause, reason, monotonic_ns());
    }
    settle();
    if (path) {
        path->close();
    }
    {
        const std::lock_guard lock(mutex_);
        path_ = nullptr;  // its descriptors close when the last thread has left it
    }
    engine_.grants().reader_gone(reader(), has_died(cause, reason));
    unwatch_process();
    engine_.lost(shared_from_this(), cause, reason);
}

void Connection::lane_broke(const std::string& reason) {
    // A peer that closes says so on control, after the last DONE; another thread may be about to read that.
    // Control that ends, too, decides at once; a lane that broke alone does when the grace is over.
    const Time until = monotonic_ns() + kLaneGraceNs;
    {
        const std::lock_guard lock(mutex_);
        if (lane_broken_until_ == protocol::kNever) {
            lane_broken_until_ = until;
            lane_broken_reason_ = reason;
        }
    }
    if (const auto way = path()) {
        way->read_last_words();
    }
    engine_.need_by(until, nullptr);
}

Cause Connection::lost_cause() const {
    const std::lock_guard lock(mutex_);
    return lost_cause_;
}

std::string Connection::lost_reason() const {
    const std::lock_guard lock(mutex_);
    return lost_reason_;
}

Time Connection::on_tick(Time now, bool heartbeat, bool resumed) {
    if (is_lost()) {
        return protocol::kNever;
    }
    if (resumed) {
        heard_at_.store(now);
    }
    const bool live = is_open();
    if (live && now - heard_at_.load() > dead_after_) {
        close(Cause::peer_lost,
              "heartbeat: nothing heard for " + std::to_string((now - heard_at_.load()) / 1'000'000) + " ms",
              false);
        return protocol::kNever;
    }
    if (lane_grace_over(now)) {
        return protocol::kNever;
    }
    bool output = false;
    {
        const std::lock_guard lock(mutex_);
        if (resumed) {
            session_.resumed(now);
        }
        session_.on_time(now);
        if (heartbeat && live && now - spoke_at_.load() >= engine_.options().ping_every_ns - 20'000'000) {
            session_.ping();
        }
        output = session_.has_output();
    }
    if (output) {
        settle();
    }
    const std::lock_guard lock(mutex_);
    return std::min(session_.next_deadline(), lane_broken_until_);
}

bool Connection::lane_grace_over(Time now) {
    std::string reason;
    {
        const std::lock_guard lock(mutex_);
        if (now < lane_broken_until_) {
            return false;
        }
        reason = lane_broken_reason_;
    }
    close(Cause::peer_lost, reason, false);
    return true;
}

}  // namespace kvt::engine
