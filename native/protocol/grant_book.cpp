#include "protocol/grant_book.hpp"

#include <algorithm>

namespace kvt::protocol {

bool GrantBook::add(const GrantPtr& grant, Time now) {
    if (!grants_.emplace(grant->token, grant).second) {
        return false;
    }
    index(*grant, true);
    let_time_run(*grant, now);
    return true;
}

void GrantBook::let_time_run(Grant& grant, Time now) {
    grant.deadline = grant.ttl >= kNever - now ? kNever : now + grant.ttl;
    next_deadline_ = std::min(next_deadline_, grant.deadline);
}

void GrantBook::index(Grant& grant, bool in) {
    auto& groups = pools_[grant.pool_id];
    groups.resize(std::max(groups.size(), grant.blocks.size()));
    for (std::size_t g = 0; g < grant.blocks.size(); ++g) {
        for (const std::uint32_t id : grant.blocks[g]) {
            auto& there = groups[g][id];
            const auto mine = std::find(there.begin(), there.end(), &grant);
            if (in && mine == there.end()) {
                there.push_back(&grant);
            } else if (!in && mine != there.end()) {
                there.erase(mine);
            }
            if (there.empty()) {
                groups[g].erase(id);
            }
        }
    }
}

GrantPtr GrantBook::find(const Token& token) const {
    const auto known = grants_.find(token);
    return known == grants_.end() ? nullptr : known->second;
}

GrantPtr GrantBook::admit(const Token& token, const std::string& reader, GrantMode mode) {
    GrantPtr grant = find(token);
    if (grant == nullptr || grant->mode != mode || (!grant->to.empty() && grant->to != reader) ||
        grant->finished.contains(reader)) {
        return nullptr;
    }
    if (grant->readers != 0 && !grant->admitted.contains(reader)) {
        if (grant->admitted.size() >= grant->readers) {
            return nullptr;
        }
        grant->admitted.insert(reader);
    }
    return grant;
}

GrantPtr GrantBook::hold(const Token& token, const std::string& reader, bool mapped) {
    const GrantPtr known = find(token);
    GrantPtr grant = known ? admit(token, reader, mapped ? GrantMode::read : known->mode) : nullptr;
    if (grant != nullptr) {
        ++grant->leases[reader];
        if (mapped) {
            ++grant->mapped[reader];
        }
        grant->deadline = kNever;
    }
    return grant;
}

GrantPtr GrantBook::release(const Token& token, const std::shared_ptr<const std::atomic<bool>>& ended,
                            const std::string& reader, Time now, bool mapped) {
    const GrantPtr grant = find(token);
    if (grant == nullptr || grant->ended != ended) {
        return nullptr;
    }
    const auto mine = grant->leases.find(reader);
    if (mine == grant->leases.end()) {
        return nullptr;
    }
    if (const auto map = grant->mapped.find(reader);
        mapped && map != grant->mapped.end() && --map->second == 0) {
        grant->mapped.erase(map);
    }
    if (--mine->second != 0) {
        return nullptr;
    }
    grant->leases.erase(mine);
    if (grant->leases.empty()) {
        let_time_run(*grant, now);
    }
    if (grant->readers != 0) {  // else it serves whoever comes, also who was here before
        grant->finished.insert(reader);
    }
    return end_if_finished(grant);
}

GrantPtr GrantBook::over(const GrantPtr& grant, const std::string& reader, bool succeeded) {
    if (!succeeded || grant->state != GrantState::open || grant->leases.contains(reader)) {
        return nullptr;
    }
    if (grant->readers != 0) {
        grant->finished.insert(reader);
    }
    return end_if_finished(grant);
}

unsigned GrantBook::times_mapped(const Grant& grant) {
    unsigned times = 0;
    for (const auto& [reader, leases] : grant.mapped) {
        times += grant.state == GrantState::open ? leases : 0;
    }
    return times;
}

bool GrantBook::open_to(const Grant& grant, const std::string& reader) {
    return grant.state == GrantState::open && !grant.finished.contains(reader) &&
           (grant.to == reader || grant.readers == 0 || grant.leases.contains(reader));
}

GrantPtr GrantBook::end_if_finished(const GrantPtr& grant) {
    const bool finished = grant->readers != 0 && grant->finished.size() >= grant->readers;
    return finished && end(grant, GrantState::read) ? grant : nullptr;
}

bool GrantBook::end(const GrantPtr& grant, GrantState state) {
    if (grant->state != GrantState::open) {
        return false;
    }
    grant->state = state;
    grant->ended->store(true, std::memory_order_release);
    index(*grant, false);
    grants_.erase(grant->token);
    return true;
}

std::vector<GrantPtr> GrantBook::end_blocks(std::uint64_t pool, std::size_t group,
                                            const std::vector<std::uint32_t>& ids) {
    std::vector<GrantPtr> ended;
    const auto known = pools_.find(pool);
    if (known == pools_.end() || group >= known->second.size()) {
        return ended;
    }
    ByBlock& blocks = known->second[group];
    for (const std::uint32_t id : ids) {
        for (auto there = blocks.find(id); there != blocks.end(); there = blocks.find(id)) {
            const GrantPtr grant = find(there->second.front()->token);
            end(grant, GrantState::revoked);
            ended.push_back(grant);
        }
        if (blocks.empty()) {
            break;
        }
    }
    return ended;
}

std::vector<GrantPtr> GrantBook::end_pool(std::uint64_t pool) {
    std::vector<GrantPtr> ended;
    for (const auto& [token, grant] : grants_) {
        if (grant->pool_id == pool) {
            ended.push_back(grant);
        }
    }
    for (const GrantPtr& grant : ended) {
        end(grant, GrantState::revoked);
    }
    pools_.erase(pool);
    return ended;
}

std::vector<GrantPtr> GrantBook::end_all() {
    std::vector<GrantPtr> ended;
    for (const auto& [token, grant] : grants_) {
        ended.push_back(grant);
    }
    for (const GrantPtr& grant : ended) {
        end(grant, GrantState::revoked);
    }
    return ended;
}

std::vector<GrantPtr> GrantBook::expire(Time now) {
    std::vector<GrantPtr> ended;
    if (now < next_deadline_) {
        return ended;
    }
    next_deadline_ = kNever;
    for (const auto& [token, grant] : grants_) {
        if (grant->deadline <= now) {
            ended.push_back(grant);
        } else {
            next_deadline_ = std::min(next_deadline_, grant->deadline);
        }
    }
    for (const GrantPtr& grant : ended) {
        end(grant, GrantState::expired);
    }
    return ended;
}

std::vector<GrantPtr> GrantBook::reader_gone(const std::string& reader, bool dead, Time now) {
    std::vector<GrantPtr> ended;
    for (const auto& [token, grant] : grants_) {
        const bool held = grant->leases.erase(reader) != 0;
        grant->mapped.erase(reader);
        if (held && grant->leases.empty()) {
            let_time_run(*grant, now);
        }
        if (dead && !reader.empty() && grant->to == reader) {
            ended.push_back(grant);
        }
    }
    for (const GrantPtr& grant : ended) {
        end(grant, GrantState::revoked);
    }
    return ended;
}

std::vector<GrantPtr> GrantBook::all_for(const std::string& reader) const {
    std::vector<GrantPtr> all;
    for (const auto& [token, grant] : grants_) {
        if (!reader.empty() && grant->to == reader) {
            all.push_back(grant);
        }
    }
    return all;
}

bool GrantBook::has_for(const std::string& reader) const {
    return !reader.empty() && std::any_of(grants_.begin(), grants_.end(),
                                          [&](const auto& known) { return known.second->to == reader; });
}

}  // namespace kvt::protocol
