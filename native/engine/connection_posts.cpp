// What the user posts on a connection: transfers, messages, refusals; and what takes a post back.
#include <algorithm>
#include <numeric>
#include <utility>

#include "base/clock.hpp"
#include "base/recycled.hpp"
#include "engine/connection.hpp"
#include "engine/engine.hpp"

namespace kvt::engine {

using protocol::Cause;
using protocol::Time;

void Connection::claim(const std::shared_ptr<TransferHandle>& handle) {
    if (handle->role == protocol::Role::source) {
        return;
    }
    engine_.claim(*handle);
}

const memory::StreamPlan& Connection::plan(PostArgs& args) {
    if (args.plan) {
        return *args.plan;
    }
    std::vector<std::uint32_t> layers;
    if (args.layers) {
        layers = *args.layers;
    } else {
        layers.resize(args.pool->shape()->layers().size());
        std::iota(layers.begin(), layers.end(), 0u);
    }
    auto plan = std::make_shared<const memory::StreamPlan>(args.pool->shape(), std::move(layers),
                                                           std::move(args.ids), args.heads);
    if (const std::uint64_t most = engine_.options().max_transfer_pieces; plan->pieces() > most) {
        throw protocol::Excess(std::to_string(plan->pieces()) +
                               " pieces (layers x blocks) in one transfer, " + "max_transfer_pieces is " +
                               std::to_string(most) + ": split it, or raise that");
    }
    args.plan = std::move(plan);
    return *args.plan;
}

std::shared_ptr<TransferHandle> Connection::make_handle(PostArgs& args) {
    if (args.meta.size() > protocol::kMaxMetaNbytes) {
        throw std::invalid_argument("meta has at most 4,096 bytes");
    }
    plan(args);
    auto handle = std::allocate_shared<TransferHandle>(Recycled<TransferHandle>(), shared_from_this(),
                                                       args.pool, std::move(args.plan));
    handle->role = args.role;
    handle->key = std::move(args.key);
    handle->key_is_text = args.key_is_text;
    handle->meta = std::move(args.meta);
    handle->limits = args.limits;
    handle->use = std::move(args.use);
    handle->gate = args.gate;
    handle->layer_gate = args.gate;
    if (args.queue) {
        handle->subscribe(std::move(args.queue), args.tag);
    }
    return handle;
}

std::shared_ptr<TransferHandle> Connection::post(PostArgs args) {
    if (is_lost() && !heir()) {
        throw NotUsable(lost_cause(), lost_reason());
    }
    auto handle = make_handle(args);
    if (!args.pool->use()) {
        throw protocol::LocalViolation("the pool is closed");
    }
    std::shared_ptr<Connection> taker;
    try {
        claim(handle);
        taker = place(handle, args.pool->id());
    } catch (...) {
        engine_.release(*handle);
        args.pool->unuse();
        throw;
    }
    taker->attach_gate(*handle);
    taker->settle(handle->role == protocol::Role::source ? handle->nbytes : 0);
    return handle;
}

std::shared_ptr<MessageHandle> Connection::post_message(protocol::Bytes data,
                                                        std::shared_ptr<TransferHandle> after,
                                                        std::shared_ptr<Queue> queue, std::uint64_t tag) {
    if (data.size() > protocol::kMaxControlBodyNbytes) {
        throw std::invalid_argument("a message has at most 1 MiB");
    }
    if (is_lost() && !heir()) {
        throw NotUsable(lost_cause(), lost_reason());
    }
    auto handle = std::make_shared<MessageHandle>(shared_from_this());
    handle->nbytes = data.size();
    handle->data = std::move(data);
    if (queue) {
        handle->subscribe(std::move(queue), tag);
    }
    if (after && !after->done()) {
        handle->after = after;
        // Registered before the second look: whoever completes the transfer meanwhile either sees it or we
        // do.
        after->connection()->defer(handle);
        if (!after->done()) {
            return handle;
        }
        if (!after->connection()->undefer(handle)) {
            return handle;
        }
    }
    release_message(handle, after);
    return handle;
}

// Sends a message whose transfer has ended, or ends it with that transfer's error.
void Connection::release_message(const std::shared_ptr<MessageHandle>& message,
                                 const std::shared_ptr<TransferHandle>& after) {
    // The transfer may be another engine's; then ours may be gone, and with it what it counts.
    const Visit here(*this);
    const bool engine_stays = here || !after || &after->connection()->engine() == &engine_;
    if (after && after->result.outcome.cause != Cause::ok) {
        message->after = after;
        message->outcome = after->result.outcome;
        message->finished = true;
        complete(message, engine_stays);
        return;
    }
    message->after = nullptr;
    std::vector<protocol::MessagePtr> refused;
    const auto taker = unless_inherited([&] {
        session_.post_message(message, monotonic_ns());
        if (!engine_stays) {
            refused = session_.take_finished_messages();
        }
    });
    if (taker) {
        taker->release_message(message, after);
        return;
    }
    for (const auto& ended : refused) {
        complete(ended, false);
    }
    if (engine_stays) {
        settle();
    }
}

void Connection::cancel(const std::shared_ptr<TransferHandle>& handle) {
    {
        const std::lock_guard lock(mutex_);
        if (handle->connection().get() != this) {
            return;  // moved meanwhile: the caller looks again
        }
        session_.stop(handle, {Cause::cancelled, protocol::Delivered::no, "cancelled here", {}},
                      monotonic_ns());
    }
    settle();
}

void Connection::refuse(const std::string& key, const std::string& reason, Time remember_ns) {
    const Time now = monotonic_ns();
    const auto taker = unless_inherited([&] { session_.refuse(key, reason, now + remember_ns, now); });
    if (taker) {
        taker->refuse(key, reason, remember_ns);
    } else {
        settle();
    }
}

void Connection::forget_pool(std::uint64_t pool_id) {
    {
        const std::lock_guard lock(mutex_);
        session_.forget_pool(pool_id);
    }
    if (const auto way = path()) {
        way->forget_pool(pool_id);
    }
    settle();
}

void Connection::messages_taken(std::uint64_t nbytes) {
    {
        const std::lock_guard lock(mutex_);
        session_.messages_taken(nbytes);
    }
    settle();
}

}  // namespace kvt::engine
