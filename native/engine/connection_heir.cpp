// One connection takes another's place: what is posted before the handshake is over belongs to a connection
// that never opens, and moves to the one that did.
//
// Whoever still holds the old one, in the middle of a call even, finds its heir: a post is made there.
#include <iterator>
#include <utility>
#include <vector>

#include "base/clock.hpp"
#include "engine/connection.hpp"
#include "engine/engine.hpp"

namespace kvt::engine {

using protocol::Cause;
using protocol::Time;

std::shared_ptr<Connection> Connection::heir() const {
    const std::lock_guard lock(mutex_);
    return heir_;
}

std::shared_ptr<Connection> Connection::place(const std::shared_ptr<TransferHandle>& handle,
                                              std::uint64_t pool_id) {
    const auto taker = unless_inherited([&] { session_.post(handle, pool_id, monotonic_ns()); });
    if (!taker) {
        return shared_from_this();
    }
    handle->move_to(taker);
    return taker->place(handle, pool_id);
}

void Connection::defer(const std::shared_ptr<MessageHandle>& message) {
    if (const auto taker = unless_inherited([&] { dependents_.push_back(message); })) {
        taker->defer(message);
    }
}

bool Connection::undefer(const std::shared_ptr<MessageHandle>& message) {
    bool found = false;
    const auto taker = unless_inherited([&] { found = std::erase(dependents_, message) != 0; });
    return taker ? taker->undefer(message) : found;
}

// False, with the handle's outcome, where this connection can't take the post.
bool Connection::take_over(TransferHandle& handle, const protocol::TransferPtr& transfer, Time now) {
    try {
        session_.take_over(transfer, now);
        return true;
    } catch (const protocol::LocalViolation&) {
        handle.outcome = {Cause::cancelled,
                          protocol::Delivered::no,
                          "its key is in use on the connection to the same peer",
                          {}};
    } catch (const protocol::Excess& excess) {
        handle.outcome = {Cause::resource_limit, protocol::Delivered::no, excess.what(), {}};
    }
    handle.over_at = now;
    handle.snapshot(backend_);
    return false;
}

// Not under the lock: a gate that has failed ends what waits for it.
void Connection::attach_gate(TransferHandle& handle) {
    if (handle.layer_gate) {
        handle.layer_gate->attach(shared_from_this());
        if (handle.layer_gate->failed()) {
            fail_gates();
        }
    }
}

// Under both locks.
void Connection::take_over_rest(Connection& other, Time now) {
    for (auto& hold : other.session_.give_up_holds()) {
        std::static_pointer_cast<LeaseHandle>(hold)->move_to(shared_from_this());
        session_.post_hold(std::move(hold));
    }
    for (auto& message : other.session_.give_up_messages()) {
        session_.post_message(std::move(message), now);
    }
    session_.take_over_refusals(other.session_, now);
}

void Connection::adopt(const std::shared_ptr<Connection>& other) {
    std::vector<protocol::TransferPtr> refused;
    std::vector<std::shared_ptr<TransferHandle>> gated;
    const Time now = monotonic_ns();
    {
        const std::scoped_lock lock(mutex_, other->mutex_);
        for (auto& transfer : other->session_.give_up_posts()) {
            auto handle = std::static_pointer_cast<TransferHandle>(transfer);
            handle->move_to(shared_from_this());
            // Who waits for a layer looks for the handle's new lock.
            for (Sink* const waiter : std::exchange(handle->layer_waiters, {})) {
                waiter->signal(0);
            }
            if (!take_over(*handle, transfer, now)) {
                refused.push_back(std::move(transfer));
            } else if (handle->layer_gate) {
                gated.push_back(std::move(handle));
            }
        }
        take_over_rest(*other, now);
        dependents_.insert(dependents_.end(), std::make_move_iterator(other->dependents_.begin()),
                           std::make_move_iterator(other->dependents_.end()));
        other->dependents_.clear();
        other->session_.lost(Cause::connection_closed, "another connection to this peer has taken its place",
                             now);
        if (!other->lost_.exchange(true)) {
            other->heir_ = shared_from_this();
        }
    }
    for (const auto& transfer : refused) {
        complete(transfer);
    }
    other->engine_.forget(*other);
    for (const auto& handle : gated) {
        attach_gate(*handle);
    }
    settle();
}

}  // namespace kvt::engine
