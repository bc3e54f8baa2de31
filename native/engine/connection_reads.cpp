// Small reads of what the peer has granted, and shows to us: by the thread that posts them, which asks
// nobody.
//
// Whatever stands in the way (no such grant there, another layout, positions that it hasn't, an end while the
// bytes were copied) is the peer's to say: the read is then posted as any other.
#include <algorithm>
#include <utility>

#include "base/clock.hpp"
#include "engine/connection.hpp"
#include "engine/engine.hpp"
#include "engine/grant_plan.hpp"

namespace kvt::engine {

using backends::Copied;
using backends::FoundGrant;
using protocol::Time;

namespace {

// A post returns at once: as long as this takes to copy, some 25 us, is at once for whoever comes for the
// result by another way. Who doesn't waits for it next, and may as well copy what it would wait for.
constexpr std::uint64_t kAlwaysHere = 256u << 10, kMostHere = 2u << 20;

bool fits(const FoundGrant& grant, const memory::StreamPlan& plan, const TransferHandle& handle) {
    protocol::Terms terms;
    for (std::uint16_t i = 0; i < grant.terms->groups.size(); ++i) {
        terms.groups.push_back({i, static_cast<std::uint32_t>(plan.ids(i).size())});
    }
    for (std::size_t i = 0; i < plan.layer_count(); ++i) {
        terms.layers.push_back({static_cast<std::uint16_t>(plan.layer(i)), plan.piece_nbytes(i)});
    }
    return !protocol::fit({grant.terms.get(), &terms}, {handle.pool, &handle.terms}, false).mismatch;
}

memory::StreamPlan plan_of(const FoundGrant& grant, const TransferHandle& handle,
                           std::vector<std::uint32_t> layers) {
    const protocol::GrantUse& use = *handle.use;
    // Not kept beyond the copying: `grant` outlives it.
    const GrantedBlocks granted{
        grant.every_block ? nullptr : &grant.blocks, {std::shared_ptr<const void>(), &grant}, *grant.shape};
    auto ids = ids_for(granted, use, handle.terms, *handle.pool, *grant.terms, layers);
    return {grant.shape, std::move(layers), std::move(ids), {use.head_begin, use.head_count, use.every_head}};
}

bool all_in_order(const TransferHandle& handle) {
    const auto& layers = handle.terms.layers;
    bool all = layers.size() == handle.pool->layers.size();
    for (std::size_t i = 0; all && i < layers.size(); ++i) {
        all = layers[i].index == i;
    }
    return all;
}

bool same_pieces(const memory::StreamPlan& a, const memory::StreamPlan& b) {
    bool same = a.layer_count() == b.layer_count();
    for (std::size_t i = 0; same && i < a.layer_count(); ++i) {
        same = a.positions(i) == b.positions(i) && a.piece_nbytes(i) == b.piece_nbytes(i);
    }
    return same;
}

}  // namespace

// True: it is done.
bool Connection::read_here(const std::shared_ptr<TransferHandle>& posted, bool queued) {
    const TransferHandle& handle = *posted;
    if (handle.role != protocol::Role::destination || handle.use == nullptr || handle.nbytes == 0 ||
        handle.nbytes > (queued ? kAlwaysHere : kMostHere) || !is_open()) {
        return false;
    }
    const auto way = path();
    if (way == nullptr) {
        return false;
    }
    try {
        const auto grant = way->find_grant(handle.use->token);
        return grant && handle.nbytes <= std::max(kAlwaysHere, grant->at_once_nbytes) &&
               copy_here(*grant, posted);
    } catch (const protocol::Violation& violation) {
        lose(protocol::Cause::protocol_error, violation.what());
        return false;
    }
}

// Which layers stand for which, and that their layouts agree, is found out once: the same pools are read
// again and again.
std::optional<memory::StreamPlan> Connection::plan_here(const FoundGrant& grant,
                                                        const TransferHandle& handle) {
    const auto& terms = grant.terms;
    const std::uint64_t pool = handle.block_pool()->id();
    const bool every_layer = all_in_order(handle);
    std::optional<std::vector<std::uint32_t>> layers;
    if (every_layer) {
        const std::lock_guard lock(mutex_);
        if (paired_.pool == pool && paired_.with == terms) {
            layers = paired_.layers;
        }
    }
    const bool known = layers.has_value();
    protocol::Mismatch mismatch;
    if (!known && !(layers = layers_for(handle.terms, *handle.pool, *terms, mismatch))) {
        return std::nullopt;
    }
    try {
        auto plan = plan_of(grant, handle, *layers);
        if (!same_pieces(plan, handle.plan()) || (!known && !fits(grant, plan, handle))) {
            return std::nullopt;
        }
        if (!known && every_layer) {
            const std::lock_guard lock(mutex_);
            paired_ = {pool, terms, std::move(*layers)};
        }
        return plan;
    } catch (const NotGranted&) {
    } catch (const std::logic_error&) {  // heads that there aren't, or blocks
    }
    return std::nullopt;
}

bool Connection::copy_here(const FoundGrant& grant, const std::shared_ptr<TransferHandle>& posted) {
    TransferHandle& handle = *posted;
    const Time begun = monotonic_ns();
    const auto plan = plan_here(grant, handle);
    if (!plan) {
        return false;
    }
    {
        const std::lock_guard lock(mutex_);
        if (!session_.may_take(handle.use->token, grant.counted)) {
            return false;
        }
    }
    if (grant.copy(*plan, handle.plan()) != Copied::good) {
        return false;
    }
    const Time now = monotonic_ns();
    {
        const std::lock_guard lock(mutex_);
        session_.took(posted, grant.counted, begun, now);
        handle.snapshot(way_of(handle));
    }
    complete(posted);
    if (grant.counted) {
        engine_.need_by(now, nullptr);  // the reactor says it
    }
    return true;
}

}  // namespace kvt::engine
