// Grants on the boards: the owner's shown to the peer, and the peer's found and read without asking.
//
// What was found is kept, and good as long as its generation stands: a token that is read again and again
// costs one look at it. The pool goes to the peer before the first grant on it does, by the channel, so that
// whoever finds a grant finds its pool there.
#include <algorithm>
#include <limits>
#include <system_error>
#include <utility>

#include "backends/copy.hpp"
#include "backends/shm_link.hpp"

namespace kvt::backends {

using protocol::Token;
using protocol::Violation;

namespace {

// Some 100 us of copying: what the question to the owner and the wake-up of movers would take.
constexpr std::uint64_t kMappedAtOnce = 2u << 20, kForeignAtOnce = 512u << 10;

// Kept. As many ids as a board has room for: more than that is of grants that have ended, or a lie.
constexpr std::size_t kMostFound = 1024, kMostFoundIds = kBoardIds;

// Unique on a board: a slot's generation is of one grant.
std::uint64_t mark_of(GrantPlace place) { return place.generation * kBoardGrants + place.slot; }

}  // namespace

// The link may go before the grant does: its close() has then ended whatever it showed.
class ShmLink::Published final : public Publication {
  public:
    explicit Published(std::weak_ptr<ShmLink> link) : link_(std::move(link)) {}
    ~Published() override { end(); }

    void publish(const OpenGrant& grant) override {
        const std::lock_guard lock(mutex_);  // an end meanwhile waits, and takes it back
        if (const auto link = link_.lock(); link && !over_) {
            place_ = link->publish(grant);
        }
    }
    std::uint64_t mark() const override {
        const std::lock_guard lock(mutex_);
        return place_ ? mark_of(*place_) : 0;
    }
    void end() noexcept override {
        const std::lock_guard lock(mutex_);
        over_ = true;
        if (const auto link = place_ ? link_.lock() : nullptr) {
            link->end(*place_);
        }
        place_.reset();
        OwnBoard::fence();  // where the link's close() has ended it
    }

  private:
    const std::weak_ptr<ShmLink> link_;
    mutable std::mutex mutex_;
    bool over_ = false;
    std::optional<GrantPlace> place_;
};

struct ShmLink::FoundHere final : FoundGrant {
    Copied copy(const memory::StreamPlan& from, const memory::StreamPlan& to) const override {
        return link->up() ? link->copy_granted(*this, from, to) : Copied::broke;
    }
    Standing standing() const override {
        const auto alive = keep_link.lock();
        if (alive == nullptr || !alive->peer_board_->still(place)) {
            return Standing::ended;
        }
        return alive->process_.alive() ? Standing::good : Standing::owner_gone;
    }
    const ShmLink* link = nullptr;
    std::weak_ptr<const ShmLink> keep_link;  // weak: the link keeps what it has found
    GrantPlace place{};
    std::shared_ptr<const ShmPool> pool;  // keeps its segments mapped
    std::uint32_t pool_id = 0;
    std::size_t ids = 0;
};

// ---- owner

std::shared_ptr<Publication> ShmLink::publication() { return std::make_shared<Published>(weak_from_this()); }

std::optional<GrantPlace> ShmLink::publish(const OpenGrant& grant) {
    const PoolMemory& pool = grant.pool;
    if ((!pool.mapped && !peer_reads_us()) || pool.pool > std::numeric_limits<std::uint32_t>::max()) {
        return std::nullopt;
    }
    try {
        if (!announce(pool)) {
            return std::nullopt;
        }
        const auto id = static_cast<std::uint32_t>(pool.pool);
        const std::lock_guard lock(board_mutex_);
        if (closed_.load()) {
            return std::nullopt;  // and nobody would end it
        }
        if (grant.blocks == nullptr) {
            return board_.publish_every_block(grant.token, id, grant.counted);
        }
        std::vector<GroupIds> groups;
        for (std::size_t i = 0; i < grant.blocks->size(); ++i) {
            if (const auto& ids = (*grant.blocks)[i]; !ids.empty()) {
                groups.push_back({static_cast<std::uint16_t>(i), ids});
            }
        }
        return board_.publish(grant.token, id, groups, grant.counted);
    } catch (const std::system_error&) {
        return std::nullopt;  // no descriptor left to show the pool by: its readers ask
    }
}

void ShmLink::end(GrantPlace place) noexcept {
    const std::lock_guard lock(board_mutex_);
    board_.end(place);
    OwnBoard::fence();
}

// What was read of the channel is told by the reactor: who catches up may hold the session's lock.
class ShmLink::Telling final : public Runnable {
  public:
    explicit Telling(std::weak_ptr<ShmLink> link) : link_(std::move(link)) {}
    bool run() override {
        if (const auto link = link_.lock()) {
            link->act();
        }
        return false;
    }
    void failed(const std::exception&) override {}

  private:
    const std::weak_ptr<ShmLink> link_;
};

void ShmLink::catch_up() {
    {
        const std::lock_guard lock(rx_mutex_);
        read_channel();
    }
    reactor_.enqueue(std::make_shared<Telling>(weak_from_this()));
}

// ---- reader

std::shared_ptr<const FoundGrant> ShmLink::find_grant(const Token& token) {
    {
        const std::lock_guard lock(peer_mutex_);
        if (const auto known = found_.find(token); known != found_.end()) {
            if (peer_board_->live(known->second->place)) {
                return known->second;
            }
            found_ids_ -= known->second->ids;
            found_.erase(known);
        }
    }
    auto found = find_on_board(token);
    if (found && !found->counted) {  // else it is read once
        keep(token, found);
    }
    return found;
}

std::shared_ptr<const ShmLink::FoundHere> ShmLink::find_on_board(const Token& token) {
    GrantCopy copy{};
    if (!peer_board_->find(token, copy)) {
        return nullptr;
    }
    auto pool = peer_pool(copy.pool);
    if (!pool) {
        return nullptr;  // closed meanwhile
    }
    auto found = std::make_shared<FoundHere>();
    found->link = this;
    found->keep_link = weak_from_this();
    found->mapped = pool->mapped;
    found->shape = pool->shape;
    found->terms = pool->terms;
    found->every_block = copy.every_block;
    found->counted = copy.counted;
    found->place = copy.place;
    found->mark = mark_of(copy.place);
    found->at_once_nbytes = pool->mapped ? kMappedAtOnce : kForeignAtOnce;
    found->pool_id = copy.pool;
    found->ids = copy.ids.size();
    if (!copy.every_block) {
        found->blocks.resize(pool->shape->groups().size());
    }
    for (const auto& group : copy.groups) {
        if (group.group >= found->blocks.size()) {
            throw Violation("a grant on the peer's board names a group that its pool hasn't");
        }
        const auto begin = copy.ids.begin() + group.begin;
        found->blocks[group.group].assign(begin, begin + group.count);
    }
    found->pool = std::move(pool);
    return found;
}

void ShmLink::keep(const Token& token, std::shared_ptr<const FoundHere> grant) {
    const std::lock_guard lock(peer_mutex_);
    const auto known = peer_pools_.find(grant->pool_id);
    if (known == peer_pools_.end() || known->second != grant->pool) {
        return;  // closed meanwhile: nobody would take it out
    }
    if (found_.size() >= kMostFound || found_ids_ + grant->ids > kMostFoundIds) {
        found_.clear();
        found_ids_ = 0;
    }
    found_ids_ += grant->ids;
    const auto [place, fresh] = found_.emplace(token, grant);
    if (!fresh) {
        found_ids_ -= std::exchange(place->second, std::move(grant))->ids;
    }
}

// Under peer_mutex_.
void ShmLink::forget_found(const ShmPool* pool) {
    std::erase_if(found_, [&](const auto& known) {
        const bool its = known.second->pool.get() == pool;
        found_ids_ -= its ? known.second->ids : 0;
        return its;
    });
}

Copied ShmLink::copy_granted(const FoundHere& here, const memory::StreamPlan& from,
                             const memory::StreamPlan& to) const {
    if (here.pool->mapped) {
        // Whether the owner lives isn't asked: what it mapped is nobody else's to rewrite, and that it was
        // about to stands on the board, which outlives it as the blocks do. The question is a system call,
        // and costs 0.35 us of 4 KiB's 2.
        copy_runs(from, to, 0, to.nbytes());
        return peer_board_->still(here.place) ? Copied::good : Copied::stale;
    }
    if (const auto error = read_runs(process_.pid(), from, to, 0, to.nbytes())) {
        return judge(error);
    }
    return peer_board_->still(here.place) && process_.alive() ? Copied::good : Copied::stale;
}

}  // namespace kvt::backends
