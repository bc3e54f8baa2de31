#include <algorithm>

#include "world.hpp"

namespace kvt::sim {

using namespace protocol;

// What the users do by grants: one makes them and ends them, the other reads, writes and holds, before, while
// and after they are there.

namespace {

constexpr Time kCleanUp = 20 * kSecond;

}  // namespace

void World::plan_grants() {
    for (std::uint8_t n = 1; n <= random_.between(1, 4); ++n) {
        GrantFlow flow;
        flow.n = n;
        flow.owner = static_cast<unsigned>(random_.below(2));
        flow.mode = random_.chance(60) ? GrantMode::read : GrantMode::write;
        flow.blocks[0] = random_.below(4);
        flow.blocks[1] = random_.below(3);
        plan_owner(flow);
        Machine& user = *machines_[1 - flow.owner];
        for (std::int64_t i = random_.between(0, 5); i > 0; --i) {
            const Time at = random_.between(0, span_);
            user.later(at, [this, flow] { use_grant(flow); });
            if (random_.chance(30)) {  // again, while word of the first is on its way
                user.later(at + random_.between(0, 2 * kMs), [this, flow] { use_grant(flow); });
            }
        }
        for (std::int64_t i = random_.chance(50) ? random_.between(1, 3) : 0; i > 0; --i) {
            const auto wait = random_.pick({0u, 5u, 200u});
            const Time keep = random_.chance(80) ? random_.between(0, span_) : kCleanUp;
            user.later(random_.between(0, span_), [&user, n, wait, keep] { user.hold(n, wait, keep); });
        }
    }
}

void World::plan_owner(const GrantFlow& flow) {
    Machine& owner = *machines_[flow.owner];
    const auto readers = random_.pick({0u, 1u, 2u});
    const Time ttl = random_.pick({3 * kMs, 300 * kMs, kNever});
    if (random_.chance(92)) {
        owner.later(random_.chance(50) ? 0 : random_.between(0, span_),
                    [this, flow, readers, ttl] { make_grant(flow, readers, ttl, 5); });
    }
    for (std::int64_t i = random_.chance(60) ? random_.between(1, 3) : 0; i > 0; --i) {
        plan_end(flow, random_.between(0, span_));
    }
    if (random_.chance(15)) {
        owner.later(random_.between(0, span_), [&owner, n = flow.n] {
            if (owner.live()) owner.refuse_grant(n);
        });
    }
    owner.later(kCleanUp, [&owner, n = flow.n] { owner.revoke(n, false); });
}

void World::plan_end(const GrantFlow& flow, Time in) {
    Machine& owner = *machines_[flow.owner];
    const bool reuse = random_.chance(50);
    owner.later(in, [&owner, n = flow.n, reuse] { owner.revoke(n, reuse); });
}

void World::make_grant(const GrantFlow& flow, unsigned readers, Time ttl, int tries) {
    Machine& owner = *machines_[flow.owner];
    Flow all;
    for (std::uint32_t layer = 0; layer < owner.memory().layers(); ++layer) all.layers.push_back(layer);
    std::copy(std::begin(flow.blocks), std::end(flow.blocks), std::begin(all.blocks));
    const Role role = flow.mode == GrantMode::read ? Role::source : Role::destination;
    const std::vector<Row> rows = choose(owner, all, role, false, false);
    if (rows.empty()) {
        if (tries > 0) {
            owner.later(3 * kMs,
                        [this, flow, readers, ttl, tries] { make_grant(flow, readers, ttl, tries - 1); });
        }
        return;
    }
    std::vector<std::vector<std::uint32_t>> blocks(2);
    for (const Row& row : rows) blocks[owner.group_of(row.layer)] = row.blocks;
    owner.grant(flow.n, flow.mode, readers, ttl, std::move(blocks), random_.chance(50));
}

void World::use_grant(const GrantFlow& flow) {
    Machine& user = *machines_[1 - flow.owner];
    Flow part;
    for (std::uint32_t layer = 0; layer < user.memory().layers(); ++layer) {
        if (random_.chance(80)) part.layers.push_back(layer);
    }
    auto use = std::make_shared<GrantUse>();
    use->token[0] = static_cast<std::byte>(flow.n);
    use->wait_ms = random_.pick({0u, 5u, 200u});
    use->subset.emplace(2);
    for (std::size_t group = 0; group < 2; ++group) {
        for (std::uint32_t i = 0; i < flow.blocks[group]; ++i) {
            if (random_.chance(70)) (*use->subset)[group].push_back(random_.chance(1) ? i + 1 : i);
        }
        part.blocks[group] = (*use->subset)[group].size();
    }
    const Role role = flow.mode == GrantMode::read ? Role::destination : Role::source;
    std::vector<Row> rows = choose(user, part, role, false, false);
    if (rows.size() != part.layers.size() || user.crashed()) {
        return;
    }
    const RecordPtr record = user.make(role, std::move(rows));
    for (const auto& group : record->terms.groups) {
        if (group.blocks == 0) (*use->subset)[group.index].clear();  // no layer of it
    }
    record->use = std::move(use);
    dress(*record, part);
    record->key = "grant " + std::to_string(flow.n);
    if (role == Role::destination) record->meta.clear();
    records_.push_back(record);
    if (random_.chance(busy_percent_ / 2)) {
        user.later(random_.pick({random_.between(0, 200 * kUs), random_.between(0, span_)}),
                   [&user, weak = std::weak_ptr(record)] {
                       if (const auto alive = weak.lock(); alive && user.live()) user.cancel(alive);
                   });
    }
    user.post(record);
    if (random_.chance(20)) plan_end(flow, random_.between(0, kMs));  // while its bytes are read
}

}  // namespace kvt::sim
