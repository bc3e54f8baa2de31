// Two sessions and the grants of one of them: `pair.a` owns, `pair.b` reads and writes.
//
// Lives here: a GrantHost over a GrantBook, which a test drives. Does not live here: engines, locks, clocks.
// Invariant: `uses` is what pools would count: up when something is served, down when that is over.
#pragma once

#include <functional>
#include <set>

#include "protocol/grant_book.hpp"
#include "session_pair.hpp"

namespace kvt::test {

inline constexpr std::uint64_t kPiece = 512;
inline constexpr std::uint32_t kBlocks = 4;

inline Token token_of(unsigned n) {
    Token token{};
    token[0] = static_cast<std::byte>(n);
    token[15] = static_cast<std::byte>(n >> 8);
    return token;
}

/// So many positions, all the first: what is read may repeat.
inline std::vector<std::vector<std::uint32_t>> first(std::uint32_t blocks) {
    std::vector<std::vector<std::uint32_t>> subset(1);
    subset[0].resize(blocks);
    return subset;
}

inline GrantPtr grant_of(unsigned n, GrantMode mode = GrantMode::read, unsigned readers = 1) {
    auto grant = std::make_shared<Grant>();
    grant->token = token_of(n);
    grant->mode = mode;
    grant->readers = readers;
    grant->pool_id = 7;
    grant->blocks = {{0, 1, 2, 3}};
    return grant;
}

class BookHost final : public GrantHost {
  public:
    BookHost(Party& party, const PoolTerms& pool) : party_(party), pool_(pool) {
        party.session.set_grants(this);
    }
    Service serve_read(const ReadBody& read, const PoolTerms& theirs) override {
        return serve(read.use, read.terms, theirs, Role::source);
    }
    Service serve_write(const WriteBody& write, const PoolTerms& theirs) override {
        if (busy) return {Answer::busy, nullptr, {}};
        return serve(write.use, write.terms, theirs, Role::destination);
    }
    Holding hold(const Token& token, bool mapped) override {
        const GrantPtr grant = book.hold(token, reader, mapped);
        return grant ? grant->ended : nullptr;
    }
    void release(const Token& token, const Holding& holding, bool mapped) override {
        end(book.release(token, holding, reader, 0, mapped));
    }
    void took(const TookBody& what) override {  // all is shown to whom it is open, under mark 1
        const GrantPtr grant = book.admit(what.token, reader, GrantMode::read);
        if (grant != nullptr && what.mark == 1) end(book.over(grant, reader, true));
    }
    bool await(const Token& token) override {
        awaited.insert(token);
        if (on_await) std::exchange(on_await, nullptr)();
        return book.find(token) != nullptr;
    }
    void await_no_more(const Token& token) override { CHECK(awaited.erase(token) == 1); }

    void add(const GrantPtr& grant, Time now = 0) {
        REQUIRE(book.add(grant, now));
        if (awaited.contains(grant->token)) party_.session.grant_came(grant->token, now);
        settle(now);
    }
    /// As the engine does it: the end is known first, and then what is served is stopped.
    void end(const GrantPtr& grant, Time now = 0) {
        if (grant == nullptr) return;
        book.end(grant, GrantState::revoked);
        stop(grant, now);
    }
    void stop(const GrantPtr& grant, Time now = 0) {
        for (const auto& record : served) {
            if (record->ended == grant->ended && !record->finished) {
                party_.session.stop(record, {Cause::grant_stale, Delivered::no, {}, {}}, now);
            }
        }
        party_.session.hold_ended(grant->token);
        settle(now);
    }
    void settle(Time now = 0) {
        party_.settle(now);
        for (std::size_t i = seen_; i < party_.finished.size(); ++i) {
            const auto& record = party_.finished[i];
            for (const auto& [one, grant] : granted_) {
                if (one != record) continue;
                --uses;
                book.over(grant, reader, record->outcome.cause == Cause::ok);
            }
        }
        seen_ = party_.finished.size();
    }

    GrantBook book;
    std::string reader = "b";
    std::set<Token> awaited;
    std::function<void()> on_await;
    std::vector<RecordPtr> served;
    int uses = 0;
    bool busy = false;

  private:
    Service serve(const GrantUse& use, const Terms& terms, const PoolTerms& theirs, Role role) {
        const auto mode = role == Role::source ? GrantMode::read : GrantMode::write;
        const GrantPtr grant = book.admit(use.token, reader, mode);
        if (grant == nullptr) return {};
        if (use.subset) {
            for (const std::uint32_t position : use.subset->at(0)) {
                if (position >= grant->blocks[0].size()) return {};
            }
        }
        const auto blocks = static_cast<std::uint32_t>(use.subset ? use.subset->at(0).size() : kBlocks);
        auto record = party_.make(role, "served", pool_, {0}, blocks, kPiece);
        record->terms.pool = 7;
        record->ended = grant->ended;
        const protocol::Side mine{&pool_, &record->terms}, other{&theirs, &terms};
        const auto fits = role == Role::source ? fit(mine, other, true) : fit(other, mine, false);
        if (fits.mismatch) return {Answer::mismatch, nullptr, *fits.mismatch};
        fill(*record, role == Role::source ? use.token[0] == std::byte{0} ? 1 : 5 : 0);
        granted_.emplace_back(record, grant);
        served.push_back(record);
        ++uses;
        return {Answer::served, record, {}};
    }

    Party& party_;
    const PoolTerms& pool_;
    std::vector<std::pair<TransferPtr, GrantPtr>> granted_;
    std::size_t seen_ = 0;
};

inline SessionConfig granting(std::uint64_t more = 0) {
    SessionConfig config;
    config.capabilities = kCanGrant | more;
    config.pulls = (more & kCanCopy) != 0;
    return config;
}

struct Granting {
    explicit Granting(SessionConfig config = granting()) : pair(config) {}

    RecordPtr make(Role role, unsigned token, std::uint32_t wait_ms = 0, std::uint32_t blocks = kBlocks) {
        auto record = pair.b.make(role, "t" + std::to_string(token), pool, {0}, blocks, kPiece);
        auto use = std::make_shared<GrantUse>();
        use->token = token_of(token);
        use->wait_ms = wait_ms;
        if (blocks != kBlocks) use->subset = first(blocks);
        record->use = std::move(use);
        if (role == Role::source) fill(*record, 9);
        return record;
    }
    RecordPtr read(unsigned token, std::uint32_t wait_ms = 0) {
        return pair.b.post(make(Role::destination, token, wait_ms), pair.now);
    }
    RecordPtr write(unsigned token, std::uint32_t wait_ms = 0) {
        return pair.b.post(make(Role::source, token, wait_ms), pair.now);
    }
    HoldPtr hold(unsigned token, std::uint32_t wait_ms = 0, bool mapped = false) {
        auto hold = std::make_shared<Hold>();
        hold->token = token_of(token);
        hold->wait_ms = wait_ms;
        hold->mapped = mapped;
        pair.b.session.post_hold(hold);
        pair.b.settle(pair.now);
        return hold;
    }
    void let_go(const HoldPtr& hold) {
        pair.b.session.let_go(hold);
        pair.b.settle(pair.now);
    }
    void cancel(const RecordPtr& record) {
        pair.b.session.stop(record, {Cause::cancelled, Delivered::no, "", {}}, pair.now);
        pair.b.settle(pair.now);
    }
    void pass(Time time) {
        pair.now += time;
        for (Party* side : {&pair.a, &pair.b}) {
            side->session.on_time(pair.now);
            side->settle(pair.now);
        }
        host.settle(pair.now);
    }
    void run() {
        pair.run();
        host.settle(pair.now);
    }
    void lose() {
        for (Party* side : {&pair.a, &pair.b}) {
            side->said.clear();
            side->session.lost(Cause::peer_lost, "reset", pair.now);
            side->settle(pair.now);
        }
        host.settle(pair.now);
    }
    /// Nothing is kept of anything, and no pool is in use.
    void expect_nothing_left() {
        pair.expect_idle();
        CHECK(host.uses == 0);
        CHECK(host.awaited.empty());
    }

    PoolTerms pool = pool_of(2);
    Pair pair;
    BookHost host{pair.a, pool};
};

}  // namespace kvt::test
