// One-sided operations of a connection: leases, and serving the peer by grants of ours.
//
// What is served is planned here: the peer names positions and layers, this side's memory is found by the
// grant. Called under the session's lock where GrantHost says so.
#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.hpp"
#include "engine/connection.hpp"
#include "engine/engine.hpp"
#include "engine/grant_plan.hpp"

namespace kvt::engine {

using protocol::GrantMode;
using protocol::GrantUse;
using protocol::Mismatch;
using protocol::PoolTerms;
using protocol::Role;
using protocol::Terms;
using protocol::Token;

// ---- serving

Connection::Service Connection::plan_service(const GrantHandlePtr& grant, const GrantUse& use,
                                             const Terms& terms, const PoolTerms& theirs, Role role) {
    Service service;
    const auto& pool = grant->block_pool();
    auto layers = layers_for(terms, theirs, pool->terms(), service.mismatch);
    if (!layers) {
        service.answer = Answer::mismatch;
        return service;
    }
    const GrantedBlocks granted{&grant->blocks, grant, *pool->shape()};
    auto ids = ids_for(granted, use, terms, theirs, pool->terms(), *layers);
    const memory::Heads heads{use.head_begin, use.head_count, use.every_head};
    auto plan = std::make_shared<memory::StreamPlan>(pool->shape(), std::move(*layers), std::move(ids),
                                                     heads);
    auto handle = std::make_shared<TransferHandle>(shared_from_this(), pool, std::move(plan));
    handle->role = role;
    handle->terms.pool = pool->id();
    handle->key.assign(reinterpret_cast<const char*>(use.token.data()), use.token.size());
    handle->grant = grant;
    handle->ended = grant->ended;
    const protocol::Side mine{&pool->terms(), &handle->terms}, other{&theirs, &terms};
    auto fits = role == Role::source ? fit(mine, other, true) : fit(other, mine, false);
    if (fits.mismatch) {
        service.answer = Answer::mismatch;
        service.mismatch = std::move(*fits.mismatch);
        return service;
    }
    if (!pool->use()) {
        return service;
    }
    service.transfer = std::move(handle);
    service.answer = Answer::served;
    return service;
}

Connection::Service Connection::serve_read(const protocol::ReadBody& read, const PoolTerms& theirs) {
    const auto grant = engine_.grants().admit(read.use.token, reader_, GrantMode::read);
    if (!grant) {
        return {};
    }
    show(grant, path_, reader_);
    try {
        Service service = plan_service(grant, read.use, read.terms, theirs, Role::source);
        if (service.answer == Answer::served &&
            !engine_.grants().serving(grant, std::static_pointer_cast<TransferHandle>(service.transfer))) {
            grant->block_pool()->unuse();
            return {};
        }
        return service;
    } catch (const NotGranted&) {
    } catch (const std::logic_error&) {  // heads that there aren't, or too many pieces
    }
    return {};
}

Connection::Service Connection::serve_write(const protocol::WriteBody& write, const PoolTerms& theirs) {
    const auto grant = engine_.grants().admit(write.use.token, reader_, GrantMode::write);
    if (!grant) {
        return {};
    }
    Service service;
    try {
        service = plan_service(grant, write.use, write.terms, theirs, Role::destination);
    } catch (const NotGranted&) {
    } catch (const std::logic_error&) {
    }
    if (service.answer != Answer::served) {
        return service;
    }
    const auto transfer = std::static_pointer_cast<TransferHandle>(service.transfer);
    try {
        engine_.claim(*transfer);
    } catch (const std::invalid_argument&) {  // it names some of them twice
        grant->block_pool()->unuse();
        return {};
    } catch (const protocol::LocalViolation&) {  // others fill some of these bytes
        grant->block_pool()->unuse();
        return {Answer::busy, nullptr, {}};
    } catch (...) {
        grant->block_pool()->unuse();
        throw;
    }
    if (!engine_.grants().serving(grant, transfer)) {
        engine_.release(*transfer);
        grant->block_pool()->unuse();
        return {};
    }
    return service;
}

Connection::Holding Connection::hold(const Token& token, bool mapped) {
    const auto grant = engine_.grants().hold(token, shared_from_this(), reader_, mapped);
    if (grant == nullptr) {
        return nullptr;
    }
    show(grant, path_, reader_);
    return grant->ended;
}

void Connection::release(const Token& token, const Holding& holding, bool mapped) {
    engine_.grants().release(token, holding, reader_, mapped);
}

void Connection::took(const protocol::TookBody& what) { engine_.grants().took(what, reader_); }

bool Connection::await(const Token& token) { return engine_.grants().await(token, shared_from_this()); }

void Connection::await_no_more(const Token& token) { engine_.grants().await_no_more(token, *this); }

// ---- for Grants

void Connection::show(const GrantHandlePtr& grant) { show(grant, path(), reader()); }

// The end of the grant is to find what is shown: it is known there before anything is shown.
void Connection::show(const GrantHandlePtr& grant, const std::shared_ptr<backends::Path>& way,
                      const std::string& reader) {
    if (grant->mode != GrantMode::read || way == nullptr ||
        !engine_.grants().may_show(*grant, reader, *this)) {
        return;
    }
    const auto shown = way->publication();
    if (shown == nullptr || !engine_.grants().shows(grant, {reader, weak_from_this(), shown})) {
        return;
    }
    const auto* const blocks = grant->every_block ? nullptr : &grant->blocks;
    shown->publish({grant->token, grant->block_pool()->memory(), blocks, grant->readers != 0});
}

void Connection::grant_came(const Token& token) {
    const Visit here(*this);
    if (!here) {
        return;
    }
    {
        const std::lock_guard lock(mutex_);
        session_.grant_came(token, monotonic_ns());
    }
    settle();
}

void Connection::hold_ended(const Token& token) {
    const Visit here(*this);
    if (!here) {
        return;
    }
    {
        const std::lock_guard lock(mutex_);
        session_.hold_ended(token);
    }
    settle();
}

void Connection::stop_served(const std::shared_ptr<TransferHandle>& transfer) {
    {
        const std::lock_guard lock(mutex_);
        if (!transfer->finished) {
            session_.stop(transfer, {protocol::Cause::grant_stale, protocol::Delivered::no, {}, {}},
                          monotonic_ns());
        }
    }
    settle();
    if (transfer->role == Role::source) {
        return;  // nothing that it still reads can be sealed
    }
    Waiter waiter;  // another thread may be at the end of it: some system call's time
    if (transfer->subscribe(&waiter)) {
        while (!transfer->done()) {
            waiter.wait(INT64_MAX);
        }
        transfer->unsubscribe(&waiter);
    }
}

// ---- leases on the peer's grants

std::shared_ptr<LeaseHandle> Connection::hold(const Token& token, std::uint32_t wait_ms,
                                              std::shared_ptr<Queue> queue, std::uint64_t tag, bool mapped) {
    if (is_lost() && !heir()) {
        throw NotUsable(lost_cause(), lost_reason());
    }
    auto lease = std::make_shared<LeaseHandle>(shared_from_this());
    lease->token = token;
    lease->wait_ms = wait_ms;
    lease->mapped = mapped;
    if (queue) {
        lease->subscribe(std::move(queue), tag);
    }
    place(lease)->settle();
    return lease;
}

std::shared_ptr<Connection> Connection::place(const std::shared_ptr<LeaseHandle>& lease) {
    const auto taker = unless_inherited([&] { session_.post_hold(lease); });
    if (!taker) {
        return shared_from_this();
    }
    lease->move_to(taker);
    return taker->place(lease);
}

std::shared_ptr<const backends::FoundGrant> Connection::shown(const Token& token) {
    const auto way = is_open() ? path() : nullptr;
    if (way == nullptr) {
        return nullptr;
    }
    try {
        auto grant = way->find_grant(token);
        for (std::size_t group = 0; grant && group < grant->blocks.size(); ++group) {
            const std::uint64_t there = grant->shape->groups()[group].num_blocks;
            for (const std::uint32_t id : grant->blocks[group]) {
                if (id >= there) {
                    throw protocol::Violation(
                        "a grant on the peer's board names a block that its pool hasn't");
                }
            }
        }
        return grant;
    } catch (const protocol::Violation& violation) {
        lose(protocol::Cause::protocol_error, violation.what());
        return nullptr;
    }
}

void Connection::let_go(const std::shared_ptr<LeaseHandle>& lease) {
    {
        const std::lock_guard lock(mutex_);
        if (lease->connection().get() == this) {
            session_.let_go(lease);
        }
    }
    settle();
}

void Connection::refuse(const Token& token, const std::string& reason, protocol::Time remember_ns) {
    const protocol::Time now = monotonic_ns();
    const auto taker = unless_inherited([&] { session_.refuse(token, reason, now + remember_ns, now); });
    if (taker) {
        taker->refuse(token, reason, remember_ns);
    } else {
        settle();
    }
}

void Connection::complete(const protocol::HoldPtr& hold) {
    auto& lease = static_cast<LeaseHandle&>(*hold);
    lease.result.outcome = lease.outcome;
    lease.complete();
}

}  // namespace kvt::engine
