// Small reads of what the peer has granted, and shows to us: by the thread that posts them, which asks
// nobody.
//
// Whatever stands in the way (no such grant there, another layout, positions that it hasn't, an end while the
// bytes were copied) is the peer's to say: the read is then posted as any other. It is nothing to the session
// but what it counts and remembers, so that there is no record of it there.
#include <algorithm>
#include <functional>
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
constexpr std::uint64_t kAlwaysHere = 256u << 10;

class InUse {
  public:
    explicit InUse(Pool& pool) : pool_(pool), in_(pool.use()) {}
    ~InUse() {
        if (in_) {
            pool_.unuse();
        }
    }
    InUse(const InUse&) = delete;
    InUse& operator=(const InUse&) = delete;
    explicit operator bool() const noexcept { return in_; }

  private:
    Pool& pool_;
    const bool in_;
};

// `layers` are the owner's, which ours stand for in their order.
memory::StreamPlan plan_of(const FoundGrant& grant, const PostArgs& args, std::vector<std::uint32_t> layers) {
    const protocol::GrantUse& use = *args.use;
    // Not kept beyond the copying: `grant` outlives it.
    const GrantedBlocks granted{
        grant.every_block ? nullptr : &grant.blocks, {std::shared_ptr<const void>(), &grant}, *grant.shape};
    std::vector<std::shared_ptr<const memory::Ids>> ids(grant.shape->groups().size());
    for (std::size_t i = 0; i < layers.size(); ++i) {
        const std::uint32_t theirs = grant.shape->layers()[layers[i]].group;
        const std::uint32_t ours = args.pool->shape()->layers()[args.plan->layer(i)].group;
        if (ids[theirs] == nullptr) {
            ids[theirs] = ids_of(granted, theirs, use.subset ? &(*use.subset)[ours] : nullptr);
        }
    }
    return {grant.shape, std::move(layers), std::move(ids), {use.head_begin, use.head_count, use.every_head}};
}

bool same_pieces(const memory::StreamPlan& a, const memory::StreamPlan& b) {
    bool same = a.layer_count() == b.layer_count();
    for (std::size_t i = 0; same && i < a.layer_count(); ++i) {
        same = a.positions(i) == b.positions(i) && a.piece_nbytes(i) == b.piece_nbytes(i);
    }
    return same;
}

}  // namespace

// Null: it is to be posted.
std::shared_ptr<DoneRead> Connection::read_now(PostArgs& args) {
    if (args.role != protocol::Role::destination || args.use == nullptr || !is_open()) {
        return nullptr;
    }
    const auto way = path();
    if (way == nullptr) {
        return nullptr;
    }
    try {
        const auto grant = way->find_grant(args.use->token);
        if (!grant) {
            return nullptr;
        }
        const std::uint64_t nbytes = plan(args).nbytes();
        const std::uint64_t most = args.queue ? kAlwaysHere : std::max(kAlwaysHere, grant->at_once_nbytes);
        if (nbytes == 0 || nbytes > most) {
            return nullptr;
        }
        return copy_now(*grant, args, way->name_of_copies());
    } catch (const protocol::Violation& violation) {
        lose(protocol::Cause::protocol_error, violation.what());
        return nullptr;
    }
}

std::shared_ptr<DoneRead> Connection::copy_now(const FoundGrant& grant, PostArgs& args, const char* backend) {
    const Time began = monotonic_ns();
    const auto from = plan_now(grant, args);
    const InUse in_use(*args.pool);
    if (!from || !in_use) {
        return nullptr;
    }
    const memory::StreamPlan& to = *args.plan;
    {
        const std::lock_guard lock(mutex_);
        if (!session_.may_take(args.use->token, grant.counted)) {
            return nullptr;
        }
    }
    Copied copied{};
    const auto copy = [&] { copied = grant.copy(*from, to); };
    engine_.while_claimed(args.key, args.plan, std::cref(copy));
    if (copied != Copied::good) {
        return nullptr;
    }
    const Time over = monotonic_ns();
    {
        const std::lock_guard lock(mutex_);
        session_.took({args.use->token, grant.mark}, to.nbytes(), grant.counted);
    }
    for (Tally* const tally : {&tally_, copies_tally_.load()}) {
        tally->record(Operation::read, protocol::Cause::ok, to.nbytes(), over - began);
    }
    const auto read = std::make_shared<DoneRead>(args.plan, backend, over - began);
    if (args.queue) {
        read->subscribe(args.queue, args.tag);
    }
    read->complete();
    if (grant.counted) {
        engine_.need_by(over, nullptr);  // the reactor says it
    }
    return read;
}

// Which layers stand for which, and that their layouts agree, is found out once: the same pools are read
// again and again.
std::optional<memory::StreamPlan> Connection::plan_now(const FoundGrant& grant, const PostArgs& args) {
    std::vector<std::uint32_t> layers;
    bool known = false;
    if (!args.layers) {
        const std::lock_guard lock(mutex_);
        known = paired_.pool == args.pool->id() && paired_.with == grant.terms;
        layers = known ? paired_.layers : layers;
    }
    const protocol::PoolTerms& ours = args.pool->terms();
    const protocol::Terms terms = known ? protocol::Terms() : terms_of(*args.plan);
    protocol::Mismatch mismatch;
    if (!known) {
        auto found = layers_for(terms, ours, *grant.terms, mismatch);
        if (!found) {
            return std::nullopt;
        }
        layers = std::move(*found);
    }
    try {
        auto plan = plan_of(grant, args, layers);
        if (!same_pieces(plan, *args.plan)) {
            return std::nullopt;
        }
        if (known) {
            return plan;
        }
        const protocol::Terms theirs = terms_of(plan);
        if (protocol::fit({grant.terms.get(), &theirs}, {&ours, &terms}, false).mismatch) {
            return std::nullopt;
        }
        if (!args.layers) {
            const std::lock_guard lock(mutex_);
            paired_ = {args.pool->id(), grant.terms, std::move(layers)};
        }
        return plan;
    } catch (const NotGranted&) {
    } catch (const std::logic_error&) {  // heads that there aren't, or blocks
    }
    return std::nullopt;
}

}  // namespace kvt::engine
