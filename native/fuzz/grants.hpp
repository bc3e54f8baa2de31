// Four grants of our own side, which a fuzzing peer may name, and our side's use of the peer's.
//
// Lives here: a GrantHost that lets in and ends as the input says. Does not live here: the rules of real
// grants (grant_book.hpp). Invariant: what it has served it knows until the end, so that outcomes are
// counted.
#pragma once

#include <array>
#include <memory>
#include <set>
#include <vector>

#include "fuzz/record.hpp"

namespace kvt::fuzz {

inline protocol::Token token_of(unsigned n) {
    protocol::Token token{};
    token[0] = static_cast<std::byte>(n % 6);
    return token;
}

class Grants final : public protocol::GrantHost {
  public:
    using RecordPtr = std::shared_ptr<Record>;

    Service serve_read(const protocol::ReadBody& read, const protocol::PoolTerms& theirs) override {
        return serve(read.use, read.terms, theirs, protocol::Role::source);
    }
    Service serve_write(const protocol::WriteBody& write, const protocol::PoolTerms& theirs) override {
        return serve(write.use, write.terms, theirs, protocol::Role::destination);
    }
    Holding hold(const protocol::Token& token, bool) override {
        if (!open(token)) return nullptr;
        ++leases;
        return made_[slot_of(token)];
    }
    void release(const protocol::Token&, const Holding&, bool) override {
        demand(leases > 0, "a lease is given back twice");
        --leases;
    }
    void took(const protocol::TookBody&) override { ++takes; }
    bool await(const protocol::Token& token) override {
        awaited.insert(token);
        return open(token);
    }
    void await_no_more(const protocol::Token& token) override {
        demand(awaited.erase(token) == 1, "a wait ends that hadn't begun");
    }

    bool open(const protocol::Token& token) const { return made_[slot_of(token)] != nullptr; }
    void make(unsigned n) {
        auto& there = made_[slot_of(token_of(n))];
        if (there == nullptr) there = std::make_shared<std::atomic<bool>>(false);
    }
    /// What it served and is to be stopped.
    std::vector<RecordPtr> end(unsigned n) {
        const auto ended = std::exchange(made_[slot_of(token_of(n))], nullptr);
        std::vector<RecordPtr> stale;
        if (ended == nullptr) return stale;
        ended->store(true);
        for (const RecordPtr& record : served) {
            if (record->ended == ended && record->outcomes == 0) stale.push_back(record);
        }
        return stale;
    }

    std::vector<RecordPtr> served;
    std::set<protocol::Token> awaited;
    std::size_t leases = 0, takes = 0;

  private:
    static std::size_t slot_of(const protocol::Token& token) {
        return std::to_integer<std::size_t>(token[0]) % 6;
    }
    Service serve(const protocol::GrantUse& use, const protocol::Terms& terms,
                  const protocol::PoolTerms& theirs, protocol::Role role) {
        const auto& grant = made_[slot_of(use.token)];
        if (grant == nullptr || use.token != token_of(std::to_integer<unsigned>(use.token[0]))) return {};
        const LocalPool& pool = local_pools()[slot_of(use.token) % local_pools().size()];
        protocol::Terms ours = terms;
        for (auto& layer : ours.layers) {
            if (layer.index >= pool.terms.layers.size())
                return {Answer::mismatch, nullptr, {"layers", "", ""}};
            layer.piece_nbytes = pool.piece_nbytes[layer.index];
        }
        ours.groups.resize(pool.terms.groups.size());
        for (std::uint16_t g = 0; g < ours.groups.size(); ++g) {
            ours.groups[g].index = g;
            if (ours.groups[g].blocks > 16) return {};
        }
        const protocol::Side mine{&pool.terms, &ours}, other{&theirs, &terms};
        auto fits = role == protocol::Role::source ? fit(mine, other, true) : fit(other, mine, false);
        if (fits.mismatch) return {Answer::mismatch, nullptr, *fits.mismatch};
        auto record = std::make_shared<Record>(role, "served", pool, ours);
        if (role == protocol::Role::source && !fits.in_order) return {Answer::busy, nullptr, {}};
        record->ended = grant;
        record->terms.pool = 1 + slot_of(use.token) % local_pools().size();
        served.push_back(record);
        return {Answer::served, record, {}};
    }

    std::array<std::shared_ptr<std::atomic<bool>>, 6> made_;
};

}  // namespace kvt::fuzz
