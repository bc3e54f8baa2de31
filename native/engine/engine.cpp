#include "engine/engine.hpp"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/clock.hpp"
#include "engine/admission.hpp"

namespace kvt::engine {

using protocol::Cause;
using protocol::kNever;
using protocol::Time;

namespace {

// A turn that comes so much later than planned means that the whole process stood still.
constexpr Time kStallNs = 500'000'000;
// How often a progress word is looked at while a gated transfer waits.
constexpr Time kGatePollNs = 200'000;
constexpr std::size_t kMaxEvents = 65'536;
// What a peer costs besides its messages while one of them waits, in both halves; 11.5 KiB were measured.
constexpr std::uint64_t kSenderNbytes = 16'384;

class Reactor final : public EventLoop {
  public:
    explicit Reactor(Engine& engine) : EventLoop("kvt-reactor", -1), engine_(engine) {}

  protected:
    std::int64_t on_turn() override { return engine_.turn(); }

  private:
    Engine& engine_;
};

void raise_fd(const Fd& fd) noexcept {
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto n = ::write(fd.get(), &one, sizeof one);
}

void lower_fd(const Fd& fd) noexcept {
    std::uint64_t count = 0;
    [[maybe_unused]] const auto n = ::read(fd.get(), &count, sizeof count);
}

const char* cause_word(Cause cause) noexcept {
    switch (cause) {
        case Cause::connection_closed: return "local";
        case Cause::protocol_error: return "protocol";
        case Cause::resource_limit: return "limit";
        default: return "lost";
    }
}

}  // namespace

Engine::Engine(Options options)
    : options_(std::move(options)),
      generation_(fork_generation()),
      events_(make_eventfd()),
      messages_event_(std::make_shared<Fd>(make_eventfd())),
      drop_at_(options_.max_protocol_nbytes) {
    reactor_ = std::make_unique<Reactor>(*this);
    for (unsigned i = 0; i < std::max(1u, options_.movers); ++i) {
        const int cpu = options_.cpus.empty() ? -1 : options_.cpus[i % options_.cpus.size()];
        movers_.push_back(std::make_unique<backends::Mover>(cpu));
    }
    admission_ = std::make_unique<Admission>(*this);
    try {
        reactor_->start();
        for (auto& mover : movers_) {
            mover->start();
        }
    } catch (...) {
        stop_threads();  // before any member of ours goes
        throw;
    }
}

void Engine::stop_threads() {
    for (auto& mover : movers_) {
        mover->stop();
    }
    reactor_->stop();
}

Engine::~Engine() {
    if (forked()) {
        // The threads aren't here and locks may be held for ever: leave all of it.
        (void)reactor_.release();
        for (auto& mover : movers_) {
            (void)mover.release();
        }
        (void)admission_.release();
        return;
    }
    close();
}

bool Engine::forked() const noexcept { return generation_ != fork_generation(); }

void Engine::close() {
    if (forked() || closed_.exchange(true)) {
        return;
    }
    admission_->close();
    for (const auto& connection : all_connections()) {
        connection->close(Cause::connection_closed, "the endpoint was closed", true);
    }
    grants_->close();     // after: who holds a lease hears that we have gone, not that the grant has
    wait_for_visitors();  // one of them may be closing a connection, whose handles are then done, too
    stop_threads();
    admission_->close_reserve();
    {
        const std::lock_guard lock(messages_mutex_);
        messages_.clear();
        raise_fd(*messages_event_);
        messages_event_.reset();  // whoever waits for it keeps it open so long
    }
    const std::lock_guard lock(events_mutex_);
    events_.reset();
}

void Engine::visitor_comes() noexcept {
    const std::lock_guard lock(visits_mutex_);
    ++visits_;
}

// Told under the lock: the engine may be gone as soon as it is free.
void Engine::visitor_leaves() noexcept {
    const std::lock_guard lock(visits_mutex_);
    if (--visits_ == 0) {
        visits_over_.notify_all();
    }
}

void Engine::wait_for_visitors() {
    std::unique_lock lock(visits_mutex_);
    visits_over_.wait(lock, [&] { return visits_ == 0; });
}

// ---- connections and pools

std::shared_ptr<Connection> Engine::new_connection(std::string session_id) {
    auto connection = std::make_shared<Connection>(*this, session_id);
    {
        const std::lock_guard lock(mutex_);
        if (closed()) {  // close() has, or will have, asked for all of them
            throw NotUsable(Cause::connection_closed, "the endpoint is closed");
        }
        connections_[std::move(session_id)] = connection;
    }
    reactor_->wake();  // heartbeats may begin
    return connection;
}

void Engine::rename(const std::shared_ptr<Connection>& connection, const std::string& session_id) {
    const std::lock_guard lock(mutex_);
    connections_.erase(connection->session_id());
    connection->set_session_id(session_id);
    if (!connection->is_lost()) {  // else nobody would forget it again
        connections_[session_id] = connection;
    }
}

std::vector<backends::Mover*> Engine::movers() noexcept {
    std::vector<backends::Mover*> all;
    for (auto& mover : movers_) {
        all.push_back(mover.get());
    }
    return all;
}

std::shared_ptr<Connection> Engine::find(const std::string& session_id) {
    const std::lock_guard lock(mutex_);
    const auto known = connections_.find(session_id);
    return known == connections_.end() ? nullptr : known->second;
}

std::vector<std::shared_ptr<Connection>> Engine::all_connections() {
    const std::lock_guard lock(mutex_);
    std::vector<std::shared_ptr<Connection>> all;
    all.reserve(connections_.size());
    for (const auto& [id, connection] : connections_) {
        all.push_back(connection);
    }
    return all;
}

std::vector<std::shared_ptr<Connection>> Engine::connections_to(const std::string& reader) {
    auto some = all_connections();
    std::erase_if(some, [&](const auto& connection) { return connection->reader() != reader; });
    return some;
}

Tally& Engine::tally(const std::string& backend) {
    const std::lock_guard lock(tallies_mutex_);
    return tallies_[backend];
}

std::map<std::string, Tally::Cells> Engine::tallies() {
    const std::lock_guard lock(tallies_mutex_);
    std::map<std::string, Tally::Cells> all;
    for (const auto& [backend, tally] : tallies_) {
        all.emplace(backend, tally.cells());
    }
    return all;
}

void Engine::forget(const Connection& connection) {
    std::shared_ptr<Connection> last;  // let go after the lock
    const std::lock_guard lock(mutex_);
    const auto known = connections_.find(connection.session_id());
    if (known != connections_.end() && known->second.get() == &connection) {
        last = known->second;
        connections_.erase(known);
    }
    gated_.erase(&connection);
}

void Engine::lost(const std::shared_ptr<Connection>& connection, Cause cause, const std::string& reason) {
    forget(*connection);
    Event event;
    event.kind = Event::Kind::lost;
    event.session_id = connection->session_id();
    event.cause = cause_word(cause);
    event.text = reason;
    post_event(std::move(event));
}

std::shared_ptr<Pool> Engine::new_pool(std::string name, std::shared_ptr<const memory::PoolShape> shape,
                                       bool writable, std::vector<Pool::Segment> segments) {
    std::uint64_t id = 0;
    {
        const std::lock_guard lock(mutex_);
        id = next_pool_++;
    }
    busy_.add_pool(shape.get());
    return std::make_shared<Pool>(id, std::move(name), std::move(shape), writable, std::move(segments));
}

bool Engine::close_pool(const std::shared_ptr<Pool>& pool, std::int64_t until) {
    if (pool->closed()) {
        return true;
    }
    grants_->end_pool(pool->id());
    if (!pool->close(until)) {
        return false;
    }
    busy_.remove_pool(pool->shape().get());
    if (!closed()) {
        for (const auto& connection : all_connections()) {
            connection->forget_pool(pool->id());
        }
    }
    return true;
}

// ---- claims

void Engine::claim(TransferHandle& handle) { handle.claim_id = claim(handle.key, handle.shared_plan()); }

std::uint64_t Engine::claim(const std::string& key, std::shared_ptr<const memory::StreamPlan> plan) {
    std::uint64_t owner = 0;
    {
        const std::lock_guard lock(claims_mutex_);
        owner = next_claim_++;
        claimants_.emplace(owner, &key);
    }
    const auto conflict = busy_.claim(owner, std::move(plan));
    if (conflict) {
        {
            const std::lock_guard lock(claims_mutex_);
            claimants_.erase(owner);
        }
        refuse(conflict);
    }
    return owner;
}

void Engine::refuse(const memory::BusyTable::Conflict& conflict) {
    std::string other;
    {
        const std::lock_guard lock(claims_mutex_);
        if (const auto known = claimants_.find(conflict.owner); known != claimants_.end()) {
            other = *known->second;
        }
    }
    const std::string where = "block " + std::to_string(conflict.block_id) + " of layer '" + conflict.layer +
                              "'";
    if (conflict.kind == memory::BusyTable::Conflict::within_call) {
        throw std::invalid_argument("destination bytes overlap within this call, at " + where);
    }
    throw protocol::LocalViolation(where + " is being received by the transfer with key '" + other + "'");
}

// So little is copied sooner than a claim is written down and taken out again: others wait for it.
void Engine::while_claimed(const std::string& key, const std::shared_ptr<const memory::StreamPlan>& plan,
                           const std::function<void()>& work) {
    constexpr std::uint64_t kLittle = 16u << 10;
    if (plan->nbytes() <= kLittle) {
        if (const auto conflict = busy_.during(plan, work)) {
            refuse(conflict);
        }
        return;
    }
    struct Claimed {
        ~Claimed() { engine.release(id); }
        Engine& engine;
        const std::uint64_t id;
    };
    const Claimed claimed{*this, claim(key, plan)};
    work();
}

void Engine::release(TransferHandle& handle) noexcept {
    if (handle.claim_id != 0) {
        release(std::exchange(handle.claim_id, 0));
    }
}

void Engine::release(std::uint64_t claim) noexcept {
    busy_.release(claim);
    const std::lock_guard lock(claims_mutex_);
    claimants_.erase(claim);
}

// ---- the reactor's turn

void Engine::need_by(Time deadline, const std::shared_ptr<Connection>& gated) {
    bool wake = false;
    if (gated) {
        const std::lock_guard lock(mutex_);
        auto& known = gated_[gated.get()];
        wake = known.expired();
        known = gated;
    }
    Time known = next_deadline_.load();
    while (deadline < known && !next_deadline_.compare_exchange_weak(known, deadline)) {
    }
    if (wake || deadline < planned_.load()) {
        reactor_->wake();
    }
}

Time Engine::tick_all(Time now, bool heartbeat, bool resumed) {
    Time next = kNever;
    for (const auto& connection : all_connections()) {
        next = std::min(next, connection->on_tick(now, heartbeat, resumed));
    }
    return next;
}

// Returns when to look next. However often the loop is woken meanwhile, progress words are looked at no more
// often than that. A connection stays among the gated for as long as a gate waits, so that what moves beside
// it wakes nobody.
Time Engine::poll_gated(Time now) {
    std::vector<std::shared_ptr<Connection>> waiting;
    {
        const std::lock_guard lock(mutex_);
        if (gated_.empty()) {
            return kNever;
        }
        if (now < next_gate_poll_) {
            return next_gate_poll_;
        }
        std::erase_if(gated_, [&](const auto& known) {
            auto connection = known.second.lock();
            const bool gone = connection == nullptr;
            if (!gone) {
                waiting.push_back(std::move(connection));
            }
            return gone;
        });
    }
    for (const auto& connection : waiting) {
        if (!connection->poll_gates() || connection->is_lost()) {
            // It is out before the second look: a post that comes between them puts it in again.
            {
                const std::lock_guard lock(mutex_);
                gated_.erase(connection.get());
            }
            if (connection->gates_wait() && !connection->is_lost()) {
                need_by(kNever, connection);
            }
        }
    }
    next_gate_poll_ = now + kGatePollNs;
    return next_gate_poll_;
}

Time Engine::turn() {
    const Time now = monotonic_ns();
    const Time planned = planned_.load();
    const bool resumed = planned != 0 && planned != kNever && now - planned > kStallNs;
    bool any = false;
    {
        const std::lock_guard lock(mutex_);
        any = !connections_.empty();
    }
    const bool heartbeat = any && now >= next_heartbeat_;
    if (heartbeat) {
        next_heartbeat_ = now + options_.ping_every_ns;
    }
    if (heartbeat || resumed || now >= next_deadline_.load()) {
        next_deadline_.store(kNever);
        need_by(tick_all(now, heartbeat, resumed), nullptr);
    }
    Time next = std::min(any ? next_heartbeat_ : kNever, next_deadline_.load());
    next = std::min(next, admission_->expire(now));
    next = std::min(next, grants_->on_time(now));
    next = std::min(next, poll_gated(now));
    planned_.store(next);
    // A deadline that came meanwhile was compared with the plan before this one.
    if (const Time since = next_deadline_.load(); since < next) {
        next = since;
        planned_.store(next);
    }
    return next;
}

// ---- events and messages

int Engine::event_fd() {
    const std::lock_guard lock(events_mutex_);
    return events_.get();
}

void Engine::post_event(Event event) {
    Fd own(event.fd);  // until somebody has it who takes events
    const std::lock_guard lock(events_mutex_);
    if (pending_events_.size() >= kMaxEvents) {
        return;
    }
    pending_events_.push_back(std::move(event));
    handed_over_ += own ? 1u : 0u;
    own.release();
    raise_fd(events_);
}

std::deque<Event> Engine::poll_events() {
    const std::lock_guard lock(events_mutex_);
    lower_fd(events_);
    handed_over_ = 0;
    return std::exchange(pending_events_, {});
}

std::size_t Engine::handed_over() {
    const std::lock_guard lock(events_mutex_);
    return handed_over_;
}

bool Engine::drop_oldest_handed_over() {
    const std::lock_guard lock(events_mutex_);
    const auto oldest = std::find_if(pending_events_.begin(), pending_events_.end(),
                                     [](const Event& event) { return event.fd >= 0; });
    if (oldest == pending_events_.end()) {
        return false;
    }
    ::close(oldest->fd);
    pending_events_.erase(oldest);
    --handed_over_;
    return true;
}

void Engine::log(int level, std::string text) {
    Event event;
    event.kind = Event::Kind::log;
    event.level = level;
    event.text = std::move(text);
    post_event(std::move(event));
}

std::uint64_t Engine::waiting_nbytes() const noexcept {
    return messages_nbytes_ + kSenderNbytes * senders_.size();
}

// A peer's window bounds what waits of it while it lives; those that are gone are bounded here, all together.
// The oldest go, and some more than need to, so that few looks are taken at those that stay.
std::vector<Engine::Waiting> Engine::drop_of_lost() {
    const std::uint64_t slack = options_.max_protocol_nbytes / 8;
    const std::uint64_t enough = options_.max_protocol_nbytes - slack;
    std::vector<Waiting> dropped;
    std::erase_if(messages_, [&](Waiting& one) {
        if (waiting_nbytes() <= enough || !one.first->is_lost()) {
            return false;
        }
        messages_nbytes_ -= protocol::message_charge(one.second.size());
        const auto sender = senders_.find(one.first.get());
        if (--sender->second == 0) {
            senders_.erase(sender);
        }
        dropped.push_back(std::move(one));
        return true;
    });
    drop_at_ = std::max(options_.max_protocol_nbytes, waiting_nbytes() + slack);
    return dropped;
}

void Engine::deliver(const std::shared_ptr<Connection>& from, std::vector<protocol::Bytes> messages) {
    std::vector<Waiting> dropped;  // let go after the lock
    {
        const std::lock_guard lock(messages_mutex_);
        for (auto& data : messages) {
            messages_nbytes_ += protocol::message_charge(data.size());
            messages_.emplace_back(from, std::move(data));
        }
        senders_[from.get()] += messages.size();
        if (messages_event_) {
            raise_fd(*messages_event_);
        }
        if (waiting_nbytes() > drop_at_) {
            dropped = drop_of_lost();
        }
    }
    std::map<std::string, std::uint64_t> counts;
    for (const auto& [sender, data] : dropped) {
        ++counts[sender->session_id()];
    }
    for (const auto& [session_id, count] : counts) {
        Event event;
        event.kind = Event::Kind::dropped;
        event.session_id = session_id;
        event.count = count;
        post_event(std::move(event));
    }
}

std::vector<Engine::Delivered> Engine::recv_messages(std::int64_t until) {
    std::deque<Waiting> taken;
    for (;;) {
        std::shared_ptr<Fd> event;
        {
            const std::lock_guard lock(messages_mutex_);
            event = messages_event_;
            if (!event) {
                break;  // closed
            }
            lower_fd(*event);
            taken.swap(messages_);
            senders_.clear();
            messages_nbytes_ = 0;
            drop_at_ = options_.max_protocol_nbytes;
        }
        const std::int64_t left = until - monotonic_ns();
        if (!taken.empty() || left <= 0 || closed()) {
            break;
        }
        pollfd one{event->get(), POLLIN, 0};
        const timespec timeout{left / 1'000'000'000, left % 1'000'000'000};
        if (::ppoll(&one, 1, &timeout, nullptr) < 0) {
            break;  // a signal: the interpreter looks at it
        }
    }
    std::vector<Delivered> out;
    std::unordered_map<std::shared_ptr<Connection>, std::uint64_t> consumed;
    for (auto& [from, data] : taken) {
        consumed[from] += data.size();
        out.push_back({from->session_id(), std::move(data)});
    }
    for (const auto& [from, nbytes] : consumed) {
        from->messages_taken(nbytes);
    }
    return out;
}

}  // namespace kvt::engine
