#include <algorithm>

#include "machine.hpp"

namespace kvt::sim {

using namespace protocol;

// Grants of a side: what its user makes and ends, what the other side is served by them. As in the engine,
// what is read may be rewritten when the end is known, what is written when its stores have stopped.

namespace {

const std::string kReader = "the other side";

}  // namespace

struct Machine::Granted final : Grant {
    std::vector<RecordPtr> serving;
    bool given_back = false;
    bool shown = false;  // where the other side finds it
};

class Machine::Owner final : public GrantHost {
  public:
    explicit Owner(Machine& machine) : machine_(machine) {}
    Service serve_read(const ReadBody& read, const PoolTerms& theirs) override {
        return machine_.serve(read.use, read.terms, theirs, Role::source);
    }
    Service serve_write(const WriteBody& write, const PoolTerms& theirs) override {
        return machine_.serve(write.use, write.terms, theirs, Role::destination);
    }
    Holding hold(const Token& token, bool mapped) override {
        const GrantPtr grant = machine_.book_.hold(token, kReader, mapped);
        if (grant == nullptr) return nullptr;
        machine_.show(static_cast<Granted&>(*grant));
        return grant->ended;
    }
    void release(const Token& token, const Holding& holding, bool mapped) override {
        machine_.ended(machine_.book_.release(token, holding, kReader, machine_.clock_.now(), mapped));
        machine_.watch_grants();
    }
    void took(const TookBody& what) override {
        const GrantPtr grant = machine_.book_.admit(what.token, kReader, GrantMode::read);
        if (grant != nullptr) machine_.ended(machine_.book_.over(grant, kReader, true));
    }
    bool await(const Token& token) override {
        machine_.awaited_.insert(token);
        return machine_.book_.find(token) != nullptr;
    }
    void await_no_more(const Token& token) override {
        if (machine_.awaited_.erase(token) != 1) machine_.checker_.broken("a wait ends that didn't begin");
    }

  private:
    Machine& machine_;
};

void Machine::own_grants() {
    owner_ = std::make_shared<Owner>(*this);
    session_.set_grants(owner_.get());
}

GrantHost::Service Machine::serve(const GrantUse& use, const Terms& terms, const PoolTerms& theirs,
                                  Role role) {
    const auto mode = role == Role::source ? GrantMode::read : GrantMode::write;
    const auto grant = std::static_pointer_cast<Granted>(book_.admit(use.token, kReader, mode));
    if (grant == nullptr) {
        return {};
    }
    show(*grant);
    auto rows = rows_of(*grant, use, terms);
    if (!rows) {
        return {};
    }
    for (const RecordPtr& other : role == Role::destination ? grant->serving : std::vector<RecordPtr>()) {
        if (overlap(*rows, other->history->rows)) return {GrantHost::Answer::busy, nullptr, {}};
    }
    const RecordPtr record = make(role, std::move(*rows));
    record->terms.pool = pool_id_;
    const Side mine{&setup_.pool, &record->terms}, other{&theirs, &terms};
    if (auto fits = role == Role::source ? fit(mine, other, true) : fit(other, mine, false); fits.mismatch) {
        checker_.broken("what is served doesn't fit: " + fits.mismatch->path);
    }
    record->key = "grant " + std::to_string(static_cast<unsigned>(use.token[0]));
    record->limits = {300 * kSecond, 10 * kSecond, kNever};
    record->ended = grant->ended;
    grant->serving.push_back(record);
    ++served_;
    checker_.posted(*record, memory_);
    return {GrantHost::Answer::served, record, {}};
}

// Nothing: it hasn't some of that, or would be written twice.
std::optional<std::vector<Row>> Machine::rows_of(const Granted& grant, const GrantUse& use,
                                                 const Terms& terms) const {
    std::vector<Row> rows;
    for (const auto& layer : terms.layers) {
        Row& row = rows.emplace_back();
        row.layer = layer.index;
        const std::size_t group = group_of(row.layer);
        for (const std::uint32_t position : use.subset->at(group)) {
            if (position >= grant.blocks[group].size()) return std::nullopt;
            const std::uint32_t block = grant.blocks[group][position];
            const bool twice = std::find(row.blocks.begin(), row.blocks.end(), block) != row.blocks.end();
            if (twice && grant.mode == GrantMode::write) return std::nullopt;
            row.blocks.push_back(block);
        }
    }
    return rows;
}

void Machine::show(Granted& grant) {
    grant.shown = grant.shown || (grant.mode == GrantMode::read && GrantBook::open_to(grant, kReader));
}

// What the other side finds, as it stands.
std::optional<Machine::Shown> Machine::shown(const GrantUse& use, const Terms& terms) {
    const auto grant = std::static_pointer_cast<Granted>(book_.find(use.token));
    if (grant == nullptr || !grant->shown || grant->finished.contains(kReader)) {
        return std::nullopt;
    }
    auto rows = rows_of(*grant, use, terms);
    if (!rows) {
        return std::nullopt;
    }
    const RecordPtr record = make(Role::source, std::move(*rows));
    record->key = "grant " + std::to_string(static_cast<unsigned>(use.token[0]));
    record->ended = grant->ended;
    record->history->shown = true;
    checker_.posted(*record, memory_);
    return Shown{record, grant->readers != 0};
}

// The other side has finished with it, unless it holds a lease: one that has no other reader is over.
void Machine::check_took(const Bytes& body) {
    const Token token = decode_took(body).token;
    checker_.told(index_, token);
    for (const auto& grant : grants_) {
        const bool over = grant->readers == 1 && !grant->leases.contains(kReader);
        if (grant->token == token && over && grant->state == GrantState::open) {
            checker_.broken("its only reader has finished, and the grant goes on");
        }
    }
}

bool Machine::overlap(const std::vector<Row>& one, const std::vector<Row>& other) {
    return std::any_of(one.begin(), one.end(), [&](const Row& row) {
        return std::any_of(other.begin(), other.end(), [&](const Row& there) {
            return row.layer == there.layer &&
                   std::find_first_of(row.blocks.begin(), row.blocks.end(), there.blocks.begin(),
                                      there.blocks.end()) != row.blocks.end();
        });
    });
}

// ---- the owner

template <class What>
void Machine::each_block(const Grant& grant, What what) {
    for (std::uint32_t layer = 0; layer < memory_.layers(); ++layer) {
        for (const std::uint32_t block : grant.blocks[group_of(layer)]) {
            what(layer, block);
        }
    }
}

void Machine::grant(std::uint8_t n, GrantMode mode, unsigned readers, Time ttl,
                    std::vector<std::vector<std::uint32_t>> blocks, bool named) {
    const auto made = std::make_shared<Granted>();
    made->token[0] = static_cast<std::byte>(n);
    made->mode = mode;
    made->to = named ? kReader : "";
    made->readers = readers;
    made->ttl = ttl;
    made->blocks = std::move(blocks);
    clock_.trace("%c grants %u, to %s", 'A' + static_cast<int>(index_), n,
                 mode == GrantMode::read ? "read" : "write");
    each_block(*made, [&](std::uint32_t layer, std::uint32_t block) {
        mode == GrantMode::read ? memory_.read(layer, block) : memory_.own(layer, block);
    });
    grants_.push_back(made);
    if (!book_.add(made, clock_.now())) checker_.broken("a token is in use");
    if (named) show(*made);
    if (awaited_.contains(made->token)) {
        guarded([&] { session_.grant_came(made->token, clock_.now()); });
    }
    watch_grants();
    settle();
}

void Machine::revoke(std::uint8_t n, bool by_reuse) {
    Token token{};
    token[0] = static_cast<std::byte>(n);
    const GrantPtr grant = book_.find(token);
    if (grant == nullptr) {
        return;
    }
    clock_.trace("%c %s %u", 'A' + static_cast<int>(index_), by_reuse ? "reuses" : "revokes", n);
    if (by_reuse && !grant->blocks[0].empty()) {
        for (const GrantPtr& one : book_.end_blocks(0, 0, {grant->blocks[0].front()})) ended(one);
    } else if (book_.end(grant, GrantState::revoked)) {
        ended(grant);
    }
    settle();
}

void Machine::ended(const GrantPtr& grant) {
    if (grant == nullptr) {
        return;
    }
    const auto mine = std::static_pointer_cast<Granted>(grant);
    ended_.push_back(mine);
    give_back(*mine);
    later(while_unlocked(), [this, mine] {
        for (const RecordPtr& record : std::vector(mine->serving)) {
            guarded([&] {
                if (!record->finished) {
                    session_.stop(record, {Cause::grant_stale, Delivered::no, {}, {}}, clock_.now());
                }
            });
        }
        session_.hold_ended(mine->token);
        std::erase(ended_, mine);
        settle();
    });
}

// The owner rewrites them at once.
void Machine::give_back(Granted& grant) {
    const bool lands = grant.mode == GrantMode::write;
    if (grant.state == GrantState::open || (lands && !grant.serving.empty()) ||
        std::exchange(grant.given_back, true)) {
        return;
    }
    each_block(grant, [&](std::uint32_t layer, std::uint32_t block) {
        lands ? memory_.disown(layer, block) : memory_.unread(layer, block);
    });
}

void Machine::served_is_over(const RecordPtr& record) {
    --served_;
    for (const auto& grant : std::vector(grants_)) {
        if (std::erase(grant->serving, record) == 0) continue;
        ended(book_.over(grant, kReader, record->outcome.cause == Cause::ok));
        give_back(*grant);
    }
}

void Machine::watch_grants() {
    const Time next = book_.next_deadline();
    if (next == kNever) {
        return;
    }
    later(std::max<Time>(next - clock_.now(), 0), [this] {
        const auto over = book_.expire(clock_.now());
        for (const GrantPtr& grant : over) ended(grant);
        if (!over.empty()) settle();
        watch_grants();
    });
}

void Machine::grants_lost() {
    for (const GrantPtr& grant : book_.reader_gone(kReader, false, clock_.now())) ended(grant);
    watch_grants();
}

void Machine::refuse_grant(std::uint8_t n) {
    Token token{};
    token[0] = static_cast<std::byte>(n);
    guarded([&] { session_.refuse(token, "refused", clock_.now() + 50 * kMs, clock_.now()); });
    settle();
}

// ---- the user

void Machine::hold(std::uint8_t n, std::uint32_t wait_ms, Time keep) {
    const auto lease = std::make_shared<Hold>();
    lease->token[0] = static_cast<std::byte>(n);
    lease->wait_ms = wait_ms;
    leases_.push_back(lease);
    guarded([&] { session_.post_hold(lease); });
    settle();
    later(keep, [this, lease] {
        guarded([&] { session_.let_go(lease); });
        settle();
    });
}

void Machine::collect_leases() {
    for (const HoldPtr& lease : session_.take_finished_holds()) {
        if (std::erase(leases_, lease) != 1) checker_.broken("a lease ends twice");
    }
}

bool Machine::grants_left() const {
    return served_ != 0 || !awaited_.empty() || !leases_.empty() || !ended_.empty() || book_.size() != 0;
}

}  // namespace kvt::sim
