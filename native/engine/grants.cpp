#include "engine/grants.hpp"

#include <algorithm>
#include <iterator>
#include <utility>

#include "base/clock.hpp"
#include "engine/connection.hpp"
#include "engine/engine.hpp"

namespace kvt::engine {

using protocol::Cause;
using protocol::Delivered;
using protocol::GrantMode;
using protocol::GrantPtr;
using protocol::GrantState;
using protocol::Time;
using protocol::Token;

namespace {

GrantHandlePtr handle_of(const GrantPtr& grant) { return std::static_pointer_cast<GrantHandle>(grant); }

std::string text_of(const Token& token) {
    return {reinterpret_cast<const char*>(token.data()), token.size()};
}

const protocol::Outcome kFinished{Cause::ok, Delivered::yes, {}, {}};
const protocol::Outcome kExpired{Cause::grant_stale, Delivered::no, "it expired before it was used", {}};
const protocol::Outcome kRevoked{Cause::cancelled, Delivered::no, "it was revoked here", {}};
const protocol::Outcome kReused{Cause::cancelled, Delivered::no, "its blocks were reused", {}};
const protocol::Outcome kClosed{Cause::cancelled, Delivered::no, "its pool was closed", {}};
const protocol::Outcome kEndpointClosed{
    Cause::connection_closed, Delivered::no, "the endpoint was closed", {}};
const protocol::Outcome kDead{
    Cause::peer_lost, Delivered::no, "reset: the peer that it was for has ended", {}};

}  // namespace

void Grants::count(GrantState state) {
    switch (state) {
        case GrantState::read: ++counters_.finished; break;
        case GrantState::expired: ++counters_.expired; break;
        case GrantState::revoked: ++counters_.revoked; break;
        case GrantState::open: break;
    }
}

void Grants::add(const GrantHandlePtr& grant) {
    std::vector<std::weak_ptr<Connection>> waiters;
    Time deadline = protocol::kNever;
    std::string to;
    {
        const std::lock_guard lock(mutex_);
        if (closed_) {
            throw NotUsable(Cause::connection_closed, "the endpoint is closed");
        }
        if (!book_.add(grant, monotonic_ns())) {
            throw protocol::LocalViolation("the token names another grant that is open: mint a new one");
        }
        ++counters_.made;
        deadline = grant->deadline;
        to = grant->to;
        if (const auto known = awaited_.find(text_of(grant->token)); known != awaited_.end()) {
            waiters = known->second;
        }
    }
    engine_.need_by(deadline, nullptr);
    if (!to.empty()) {
        for (const auto& connection : engine_.connections_to(to)) {
            connection->show(grant);
        }
    }
    for (const auto& weak : waiters) {
        if (const auto waiter = weak.lock()) {
            waiter->grant_came(grant->token);
        }
    }
}

bool Grants::await(const Token& token, const std::shared_ptr<Connection>& waiter) {
    const std::lock_guard lock(mutex_);
    auto& waiters = awaited_[text_of(token)];
    std::erase_if(waiters, [](const auto& known) { return known.expired(); });
    if (std::none_of(waiters.begin(), waiters.end(),
                     [&](const auto& known) { return known.lock() == waiter; })) {
        waiters.push_back(waiter);
    }
    return book_.find(token) != nullptr;
}

void Grants::await_no_more(const Token& token, const Connection& waiter) {
    const std::lock_guard lock(mutex_);
    const auto known = awaited_.find(text_of(token));
    if (known == awaited_.end()) {
        return;
    }
    const auto mine = waiter.weak_from_this();
    std::erase_if(known->second, [&](const auto& one) {
        return one.expired() || (!one.owner_before(mine) && !mine.owner_before(one));
    });
    if (known->second.empty()) {
        awaited_.erase(known);
    }
}

// ---- ends

// `ended` is set in all of them. What the user may do next is to rewrite: the fence keeps that behind. Where
// a session asks, its lock is held: whatever touches sessions is the reactor's then.
void Grants::finish(const Ended& ended, const protocol::Outcome& outcome, By by) {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    for (const GrantPtr& grant : ended) {
        end_loans(*handle_of(grant));
    }
    bool later = false;
    for (const GrantPtr& one : ended) {
        const GrantHandlePtr grant = handle_of(one);
        const bool lands = grant->mode == GrantMode::write;
        {
            const std::lock_guard lock(mutex_);
            count(grant->state);
            grant->result.outcome = outcome;
        }
        if (lands && by == By::user) {
            retire(grant);  // bytes land there: not a moment longer
            continue;
        }
        if (!lands) {
            grant->complete();  // what is still read can't be sealed: nobody waits for that
        }
        const std::lock_guard lock(mutex_);
        retiring_.push_back(grant);
        later = true;
    }
    if (later) {
        engine_.reactor().enqueue(shared_from_this());
    }
}

// A loan's end is fenced by itself.
void Grants::end_loans(GrantHandle& grant) {
    std::vector<std::weak_ptr<protocol::Loan>> loans;
    std::vector<GrantHandle::Shown> shown;
    {
        const std::lock_guard lock(mutex_);
        loans.swap(grant.loans);
        shown.swap(grant.shown);
    }
    for (const auto& one : shown) {
        one.as->end();
    }
    for (const auto& weak : loans) {
        if (const auto loan = weak.lock()) {
            loan->end();
        }
    }
}

// Under the lock, in one with the end: who finds the grant ended finds it here.
void Grants::note_ended(const Ended& ended) {
    for (const GrantPtr& grant : ended) {
        if (grant->mode == GrantMode::write) {
            landing_.push_back(handle_of(grant));
        }
    }
}

// What others have ended a moment ago, and the reactor hasn't stopped yet: bytes may still land there.
void Grants::stop_landing(std::uint64_t pool) {
    std::vector<GrantHandlePtr> landing;
    {
        const std::lock_guard lock(mutex_);
        std::copy_if(landing_.begin(), landing_.end(), std::back_inserter(landing),
                     [&](const auto& grant) { return grant->pool_id == pool; });
    }
    for (const GrantHandlePtr& grant : landing) {
        stop_served(grant);
    }
}

bool Grants::run() {
    std::vector<GrantHandlePtr> retiring;
    {
        const std::lock_guard lock(mutex_);
        retiring.swap(retiring_);
    }
    for (const GrantHandlePtr& grant : retiring) {
        retire(grant);
    }
    return false;
}

void Grants::retire(const GrantHandlePtr& grant) {
    stop_served(grant);
    {
        const std::lock_guard lock(mutex_);
        std::erase(landing_, grant);
    }
    grant->complete();
    tell_holders(*grant);
}

void Grants::stop_served(const GrantHandlePtr& grant) {
    std::vector<std::weak_ptr<TransferHandle>> served;
    {
        const std::lock_guard lock(mutex_);
        served = grant->served;  // each leaves it when it is over: two may be at this
    }
    for (const auto& weak : served) {
        if (const auto transfer = weak.lock(); transfer && !transfer->done()) {
            transfer->connection()->stop_served(transfer);
        }
    }
}

void Grants::tell_holders(GrantHandle& grant) {
    std::unordered_map<std::string, std::weak_ptr<Connection>> holders;
    {
        const std::lock_guard lock(mutex_);
        holders = std::exchange(grant.holders, {});
    }
    for (const auto& [reader, weak] : holders) {
        if (const auto holder = weak.lock()) {
            holder->hold_ended(grant.token);
        }
    }
}

unsigned Grants::revoke(const GrantHandlePtr& grant, bool force) {
    Ended ended;
    {
        const std::lock_guard lock(mutex_);
        if (const unsigned times = protocol::GrantBook::times_mapped(*grant); times != 0 && !force) {
            return times;
        }
        if (book_.end(grant, GrantState::revoked)) {
            ended.push_back(grant);
            note_ended(ended);
        }
    }
    finish(ended, kRevoked, By::user);
    if (grant->mode == GrantMode::write) {
        stop_served(grant);
    }
    return 0;
}

void Grants::reuse(std::uint64_t pool, const Blocks& by_group) {
    Ended ended;
    {
        const std::lock_guard lock(mutex_);
        for (std::size_t group = 0; group < by_group.size(); ++group) {
            if (by_group[group] == nullptr) {
                continue;
            }
            auto more = book_.end_blocks(pool, group, *by_group[group]);
            ended.insert(ended.end(), more.begin(), more.end());
        }
        note_ended(ended);
    }
    finish(ended, kReused, By::user);
    stop_landing(pool);
}

void Grants::end_pool(std::uint64_t pool) {
    Ended ended;
    {
        const std::lock_guard lock(mutex_);
        ended = book_.end_pool(pool);
        note_ended(ended);
    }
    finish(ended, kClosed, By::user);
    stop_landing(pool);
}

void Grants::close() {
    Ended ended;
    {
        const std::lock_guard lock(mutex_);
        closed_ = true;
        ended = book_.end_all();
        note_ended(ended);
    }
    finish(ended, kEndpointClosed, By::user);
}

Time Grants::on_time(Time now) {
    Ended ended;
    Time next = protocol::kNever;
    {
        const std::lock_guard lock(mutex_);
        ended = book_.expire(now);
        note_ended(ended);
        next = book_.next_deadline();
    }
    finish(ended, kExpired, By::others);
    return next;
}

// ---- for connections

GrantHandlePtr Grants::admit(const Token& token, const std::string& reader, GrantMode mode) {
    const std::lock_guard lock(mutex_);
    return handle_of(book_.admit(token, reader, mode));
}

bool Grants::serving(const GrantHandlePtr& grant, const std::shared_ptr<TransferHandle>& transfer) {
    const std::lock_guard lock(mutex_);
    if (grant->state != GrantState::open) {
        return false;
    }
    std::erase_if(grant->served, [](const auto& known) { return known.expired(); });
    grant->served.push_back(transfer);
    return true;
}

bool Grants::lend(const GrantHandlePtr& grant, const std::shared_ptr<protocol::Loan>& loan) {
    const std::lock_guard lock(mutex_);
    if (grant->state != GrantState::open) {
        return false;
    }
    std::erase_if(grant->loans, [](const auto& known) { return known.expired(); });
    grant->loans.push_back(loan);
    return true;
}

// ---- what is shown to readers

bool Grants::may_show(const GrantHandle& grant, const std::string& reader, const Connection& to) const {
    const std::lock_guard lock(mutex_);
    return protocol::GrantBook::open_to(grant, reader) &&
           std::none_of(grant.shown.begin(), grant.shown.end(),
                        [&](const auto& one) { return one.to.lock().get() == &to; });
}

bool Grants::shows(const GrantHandlePtr& grant, GrantHandle::Shown shown) {
    const std::lock_guard lock(mutex_);
    if (grant->state != GrantState::open) {
        return false;
    }
    std::erase_if(grant->shown, [](const auto& one) { return one.to.expired(); });
    grant->shown.push_back(std::move(shown));
    return true;
}

std::vector<GrantHandlePtr> Grants::all_for(const std::string& reader) const {
    const std::lock_guard lock(mutex_);
    std::vector<GrantHandlePtr> all;
    for (const GrantPtr& grant : book_.all_for(reader)) {
        all.push_back(handle_of(grant));
    }
    return all;
}

// Under the lock: who has finished with a grant that goes on doesn't find it any more.
Grants::Loans Grants::hidden_from(GrantHandle& grant, const std::string& reader) {
    Loans hidden;
    if (!grant.finished.contains(reader)) {
        return hidden;
    }
    for (auto& one : grant.shown) {
        if (one.reader == reader) {
            hidden.push_back(std::move(one.as));
        }
    }
    std::erase_if(grant.shown, [](const auto& one) { return one.as == nullptr; });
    return hidden;
}

void Grants::end_all(const Loans& loans) noexcept {
    for (const auto& loan : loans) {
        loan->end();
    }
}

void Grants::took(const protocol::TookBody& what, const std::string& reader) {
    Ended ended;
    Loans hidden;
    {
        const std::lock_guard lock(mutex_);
        const GrantPtr found = book_.find(what.token);
        const GrantHandlePtr grant = found ? handle_of(found) : nullptr;
        const auto it = [&](const auto& one) { return one.reader == reader && one.as->mark() == what.mark; };
        if (grant == nullptr || std::none_of(grant->shown.begin(), grant->shown.end(), it)) {
            return;  // it was of one that has ended
        }
        if (const GrantPtr over = book_.over(grant, reader, true)) {
            ended.push_back(over);
        } else {
            hidden = hidden_from(*grant, reader);
        }
    }
    end_all(hidden);
    finish(ended, kFinished, By::others);
}

void Grants::served(const TransferHandle& transfer, const std::string& reader) {
    Ended ended;
    Loans hidden;
    const GrantHandlePtr& grant = transfer.grant;
    const bool succeeded = transfer.result.outcome.cause == Cause::ok;
    {
        const std::lock_guard lock(mutex_);
        std::erase_if(grant->served, [&](const auto& known) {
            const auto alive = known.lock();
            return alive == nullptr || alive.get() == &transfer;
        });
        if (succeeded && grant->state == GrantState::open) {  // else its user may read the result already
            const std::uint64_t before = grant->result.nbytes;
            grant->result = transfer.result;
            grant->result.nbytes += before;
        }
        if (const GrantPtr over = book_.over(grant, reader, succeeded)) {
            ended.push_back(over);
            note_ended(ended);
        } else {
            hidden = hidden_from(*grant, reader);
        }
    }
    end_all(hidden);
    finish(ended, kFinished, By::others);
}

GrantHandlePtr Grants::hold(const Token& token, const std::shared_ptr<Connection>& holder,
                            const std::string& reader, bool mapped) {
    const std::lock_guard lock(mutex_);
    const GrantPtr known = book_.hold(token, reader, mapped);
    if (known == nullptr) {
        return nullptr;
    }
    auto grant = handle_of(known);
    grant->holders[reader] = holder;
    return grant;
}

void Grants::release(const Token& token, const protocol::GrantHost::Holding& holding,
                     const std::string& reader, bool mapped) {
    Ended ended;
    Loans hidden;
    Time next = protocol::kNever;
    {
        const std::lock_guard lock(mutex_);
        const GrantPtr grant = book_.find(token);
        if (const GrantPtr over = book_.release(token, holding, reader, monotonic_ns(), mapped)) {
            ended.push_back(over);
            note_ended(ended);
        } else if (grant && grant->ended == holding) {
            hidden = hidden_from(*handle_of(grant), reader);
        }
        next = book_.next_deadline();
    }
    end_all(hidden);
    finish(ended, kFinished, By::others);
    engine_.need_by(next, nullptr);
}

void Grants::reader_gone(const std::string& reader, bool dead) {
    Ended ended;
    Time next = protocol::kNever;
    {
        const std::lock_guard lock(mutex_);
        ended = book_.reader_gone(reader, dead, monotonic_ns());
        note_ended(ended);
        if (dead) {
            watched_.erase(reader);
        }
        next = book_.next_deadline();
    }
    finish(ended, kDead, By::others);
    engine_.need_by(next, nullptr);
}

bool Grants::outlives(const std::string& reader) {
    const std::lock_guard lock(mutex_);
    return book_.has_for(reader) && watched_.insert(reader).second;
}

// ---- for the user to see

GrantState Grants::state_of(const GrantHandle& grant) const {
    const std::lock_guard lock(mutex_);
    return grant.state;
}

Grants::Counters Grants::counters() const {
    const std::lock_guard lock(mutex_);
    return counters_;
}

std::size_t Grants::awaited() const {
    const std::lock_guard lock(mutex_);
    return awaited_.size();
}

std::size_t Grants::open() const {
    const std::lock_guard lock(mutex_);
    return book_.size();
}

}  // namespace kvt::engine
