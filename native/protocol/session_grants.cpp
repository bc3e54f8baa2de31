// One-sided: reads and writes by a grant that one side has made, and leases on it.
//
// A READ is a WANT that names a grant in the place of a key: the grant's side serves it without its user. A
// WRITE is an OFFER likewise, answered by a WANT. What comes before its grant waits here, for as long as it
// says, counted among what is unmatched. Whoever isn't let in gets one answer, whatever the reason; our own
// side tells by what it knows itself (was it ever let in?) what to raise.
#include <algorithm>

#include "protocol/session.hpp"

namespace kvt::protocol {

namespace {

constexpr std::size_t kMaxHolds = 65'536, kMaxAdmitted = 65'536, kMaxTokenRefusals = 65'536;
// Writes that have ended here and whose chunks, of those that the peer had begun, are still on a lane.
constexpr std::size_t kMaxServedTombstones = 4096;
constexpr Time kMs = 1'000'000;
constexpr std::uint8_t kSayHeld = 1, kSayNotHeld = 2;

// Of a transfer that is served: its user is the peer, whose own limits it is under.
constexpr Time kServedMatch = 300'000 * kMs, kServedStall = 10'000 * kMs;

}  // namespace

// ---- the user of a peer's grant

void Session::send_read(const TransferPtr& transfer) {
    ReadBody body{*transfer->use, transfer->terms, {}};
    if (transfer->nbytes != 0) {
        body.ranges.push_back({0, transfer->nbytes});
    }
    const Bytes raw = encode_read(body);
    transfer->id = transfer->want = next_want_++;
    transfer->pulls = pulls_;
    wants_.emplace(transfer->id, transfer);
    Header header;
    header.type = FrameType::read;
    header.flags = pulls_ ? kWantPulls : 0;
    header.transfer = transfer->id;
    header.total = transfer->nbytes;
    send(header, raw);
}

void Session::send_write(const TransferPtr& transfer) {
    const Bytes raw = encode_write({*transfer->use, transfer->meta, transfer->terms});
    transfer->id = next_offer_++;
    offers_.emplace(transfer->id, transfer);
    Header header;
    header.type = FrameType::write;
    header.transfer = transfer->id;
    header.total = transfer->nbytes;
    send(header, raw);
}

// The grant's side wants what we have offered to write.
void Session::on_want_of_write(const Header& header, WantBody body, Time now) {
    const auto known = offers_.find(header.arg);
    if (known != offers_.end() && known->second->use == nullptr) {
        throw Violation("a WANT answers an OFFER as if it were a WRITE");
    }
    if (known == offers_.end() || known->second->state != State::posted) {
        answering([&] { refuse_want(header.transfer, AbortCode::cancelled, {}, {}); });  // ended meanwhile
        return;
    }
    const bool pulls = (header.flags & kWantPulls) != 0;
    match_source(known->second, {header.transfer, header.total, 0, pulls, std::move(body)}, now);
}

void Session::admitted_to(const Token& token) {
    if (!admitted_.insert(token).second) {
        return;
    }
    admitted_in_order_.push_back(token);
    if (admitted_in_order_.size() > kMaxAdmitted) {
        admitted_.erase(admitted_in_order_.front());
        admitted_in_order_.pop_front();
    }
}

void Session::post_hold(HoldPtr hold) {
    if (lost_) {
        finish_hold(hold, {lost_cause_, Delivered::no, lost_reason_, {}});
        return;
    }
    if (opened_ && (config_.capabilities & kCanGrant) == 0) {
        throw LocalViolation("the peer's version knows no grants: upgrade it");
    }
    if (holds_.size() + untold_holds_.size() >= kMaxHolds) {
        throw Excess("more than 65,536 leases on one connection: release those that are no longer needed");
    }
    untold_holds_.push_back(std::move(hold));
}

void Session::pump_holds() {
    if ((config_.capabilities & kCanGrant) == 0) {
        for (const HoldPtr& hold : opened_ ? std::exchange(untold_holds_, {}) : std::deque<HoldPtr>()) {
            finish_hold(hold, {Cause::grant_denied, Delivered::no, {}, {}});
        }
        return;
    }
    while (opened_ && !lost_ && !untold_holds_.empty() && outbox_.size() <= config_.outbox_nbytes / 2) {
        const HoldPtr hold = std::move(untold_holds_.front());
        untold_holds_.pop_front();
        hold->number = next_hold_++;
        holds_.emplace(hold->number, hold);
        Header header;
        header.type = FrameType::hold;
        header.flags = hold->mapped ? kHoldMapped : 0;
        header.transfer = hold->number;
        send(header, encode_hold({hold->token, hold->wait_ms}));
    }
}

void Session::let_go(const HoldPtr& hold) {
    if (hold->state == Hold::State::over) {
        return;
    }
    if (holds_.erase(hold->number) != 0) {
        send(FrameType::hold, kLetGo, hold->number, 0, 0);
    } else {
        std::erase(untold_holds_, hold);
    }
    finish_hold(hold, {Cause::ok, Delivered::no, {}, {}});
}

void Session::finish_hold(const HoldPtr& hold, Outcome outcome) {
    no_longer_leased(*hold);
    hold->state = Hold::State::over;
    hold->outcome = std::move(outcome);
    hold->answered();
    finished_holds_.push_back(hold);
}

void Session::on_held(const Header& header) {
    if (header.transfer >= next_hold_) {
        throw Violation("a HELD for what wasn't asked for");
    }
    const auto known = holds_.find(header.transfer);
    if (known == holds_.end()) {
        return;  // let go meanwhile
    }
    const HoldPtr hold = known->second;
    if ((header.flags & kHeldNot) != 0) {
        const bool stale = admitted_.contains(hold->token);
        holds_.erase(known);
        finish_hold(hold, {stale ? Cause::grant_stale : Cause::grant_denied, Delivered::no, {}, {}});
    } else if (hold->state == Hold::State::held) {
        throw Violation("a second HELD of one lease");
    } else {
        hold->state = Hold::State::held;
        ++leased_[hold->token];
        admitted_to(hold->token);
        hold->answered();
    }
}

// ---- the grant's side

void Session::on_read(const Header& header, std::span<const std::byte> raw, Time now) {
    if ((config_.capabilities & kCanGrant) == 0) {
        throw Violation("a READ where that wasn't agreed");
    }
    if (header.transfer <= last_want_seen_) {
        throw Violation("a READ's id isn't new");
    }
    last_want_seen_ = header.transfer;
    const bool pulls = (header.flags & kWantPulls) != 0;
    if (pulls && (config_.capabilities & kCanCopy) == 0) {
        throw Violation("a READ pulls where that wasn't agreed");
    }
    WaitingRead read{header.transfer, header.total, 0, pulls, now, decode_read(raw)};
    read.charge = charge_of(charge_of_use(read.body.use), read.body.terms, read.body.ranges.size());
    const PoolTerms& theirs = peer_pool(read.body.terms);
    const std::uint64_t last = read.body.ranges.empty() ? 0 : read.body.ranges.back().end;
    if (stream_nbytes(theirs, read.body.terms) != header.total || last > header.total ||
        (last == 0) != (header.total == 0)) {
        throw Violation("a READ's bytes aren't those of its terms");
    }
    if (unmatched_wants_.size() + waiting_reads_.size() + served_reads_ >= config_.unmatched) {
        throw Excess("the peer has more than " + std::to_string(config_.unmatched) + " READs and WANTs");
    }
    charge_peer(read.charge);
    if (const auto reason = take_refusal(read.body.use.token, now)) {
        deny(read, AbortCode::refused, *reason, {});
    } else if (!serve(read, now)) {
        wait_or_deny(waiting_reads_, std::move(read), now);
    }
}

void Session::on_write(const Header& header, std::span<const std::byte> raw, Time now) {
    if ((config_.capabilities & kCanGrant) == 0) {
        throw Violation("a WRITE where that wasn't agreed");
    }
    if (header.transfer <= last_offer_seen_) {
        throw Violation("a WRITE's id isn't new");
    }
    last_offer_seen_ = header.transfer;
    WaitingWrite write{header.transfer, header.total, 0, false, now, decode_write(raw)};
    const std::size_t text = charge_of_use(write.body.use) + write.body.meta.size();
    write.charge = charge_of(text, write.body.terms, 0);
    if (stream_nbytes(peer_pool(write.body.terms), write.body.terms) != header.total) {
        throw Violation("a WRITE's bytes aren't those of its terms");
    }
    if (unmatched_offers_.size() + waiting_writes_.size() + served_writes_ >= config_.unmatched) {
        throw Excess("the peer has more than " + std::to_string(config_.unmatched) + " WRITEs and OFFERs");
    }
    if (served_tombstones_ >= kMaxServedTombstones) {
        throw Excess("the peer leaves the ends of its writes unanswered");
    }
    charge_peer(write.charge);
    if (const auto reason = take_refusal(write.body.use.token, now)) {
        deny(write, AbortCode::refused, *reason, {});
    } else if (!serve(write, now)) {
        wait_or_deny(waiting_writes_, std::move(write), now);
    }
}

// False: its grant isn't here. Else its charge is the served transfer's, or gone.
bool Session::serve(const WaitingRead& read, Time now) {
    const PoolTerms* theirs = open_pool(read.body.terms, read.total);
    if (theirs == nullptr) {
        deny(read, AbortCode::layout_mismatch, {}, {"pool", "", "closed"});
        return true;
    }
    const auto service = grants_ ? grants_->serve_read(read.body, *theirs) : GrantHost::Service{};
    if (service.answer == GrantHost::Answer::mismatch) {
        deny(read, AbortCode::layout_mismatch, {}, service.mismatch);
        return true;
    }
    if (service.answer != GrantHost::Answer::served) {
        return false;
    }
    const TransferPtr& transfer = service.transfer;
    transfer->want = read.id;
    transfer->pulls = read.pulls;
    begin_serving(transfer, read.charge, now);
    matched_.emplace(read.id, transfer);
    apply(transfer, Event::match, now);
    WantBody want;
    want.ranges = read.body.ranges;
    start_source(transfer, {read.id, read.total, 0, read.pulls, std::move(want)}, now);
    return true;
}

bool Session::serve(const WaitingWrite& write, Time now) {
    const PoolTerms* theirs = open_pool(write.body.terms, write.total);
    if (theirs == nullptr) {
        deny(write, AbortCode::layout_mismatch, {}, {"pool", "", "closed"});
        return true;
    }
    const auto service = grants_ ? grants_->serve_write(write.body, *theirs) : GrantHost::Service{};
    switch (service.answer) {
        case GrantHost::Answer::not_here: return false;
        case GrantHost::Answer::mismatch:
            deny(write, AbortCode::layout_mismatch, {}, service.mismatch);
            return true;
        case GrantHost::Answer::busy:
            deny(write, AbortCode::local_error, "another transfer writes some of these blocks", {});
            return true;
        case GrantHost::Answer::served: break;
    }
    const TransferPtr& transfer = service.transfer;
    transfer->partner = write.id;
    transfer->offer_seen = true;
    transfer->peer_meta = write.body.meta;
    begin_serving(transfer, write.charge, now);
    partners_.emplace(write.id, transfer);
    announce(transfer->terms.pool, *transfer->pool);
    send_want(transfer);
    transfer->told = true;
    return true;
}

void Session::begin_serving(const TransferPtr& transfer, std::size_t charge, Time now) {
    transfer->charge = charge;
    count_served(*transfer, true);
    transfer->limits = {kServedMatch, transfer->role == Role::source ? kNever : kServedStall, kNever};
    transfer->posted_at = transfer->waits_since = transfer->moved_at = now;
    enter_one_sided(transfer);
    watch(*transfer);
}

// Counted from its READ or WRITE until it ends here: the peer counts it for at least as long.
void Session::count_served(Transfer& transfer, bool counts) noexcept {
    if (transfer.outstanding == counts) {
        return;
    }
    transfer.outstanding = counts;
    (transfer.role == Role::source ? served_reads_ : served_writes_) += counts ? 1 : -1;
    if (!counts) {
        peer_charge_ -= transfer.charge;
    }
}

template <class Body>
void Session::wait_or_deny(std::map<std::uint64_t, Waiting<Body>>& waiting, Waiting<Body> use, Time now) {
    const std::uint32_t wait_ms = use.body.use.wait_ms;
    if (wait_ms == 0) {
        deny(use, AbortCode::grant, {}, {});
        return;
    }
    use.until = now + Time{wait_ms} * kMs;
    watch(use.until);
    const Token token = use.body.use.token;
    const std::uint64_t id = use.id;
    waiting.emplace(id, std::move(use));
    wait_for_grant(token, now);
}

// It may have been made since it was looked for.
void Session::wait_for_grant(const Token& token, Time now) {
    ++awaited_[token];
    if (grants_ != nullptr && grants_->await(token)) {
        grant_came(token, now);
    }
}

void Session::wait_no_more(const Token& token) {
    const auto known = awaited_.find(token);
    if (--known->second == 0) {
        awaited_.erase(known);
        if (grants_ != nullptr) {
            grants_->await_no_more(token);
        }
    }
}

template <class Body>
bool Session::stop_waiting(std::map<std::uint64_t, Waiting<Body>>& waiting, std::uint64_t id) {
    const auto known = waiting.find(id);
    if (known == waiting.end()) {
        return false;
    }
    const Token token = known->second.body.use.token;
    peer_charge_ -= known->second.charge;
    waiting.erase(known);
    wait_no_more(token);
    return true;
}
template bool Session::stop_waiting(std::map<std::uint64_t, WaitingRead>&, std::uint64_t);
template bool Session::stop_waiting(std::map<std::uint64_t, WaitingWrite>&, std::uint64_t);

void Session::deny(const WaitingRead& read, AbortCode code, const std::string& reason,
                   const Mismatch& mismatch) {
    peer_charge_ -= read.charge;
    answering([&] { refuse_want(read.id, code, reason, mismatch); });
}

void Session::deny(const WaitingWrite& write, AbortCode code, const std::string& reason,
                   const Mismatch& mismatch) {
    peer_charge_ -= write.charge;
    answering([&] { refuse_offer(write.id, code, reason, mismatch); });
}

void Session::on_hold(const Header& header, std::span<const std::byte> raw, Time now) {
    if ((config_.capabilities & kCanGrant) == 0) {
        throw Violation("a HOLD where that wasn't agreed");
    }
    if ((header.flags & kLetGo) != 0) {
        if (header.flags != kLetGo || !raw.empty() || header.transfer > last_hold_seen_) {
            throw Violation("a HOLD that lets go of nothing");
        }
        stop_waiting(waiting_holds_.find(header.transfer));
        held_due_.erase(header.transfer);  // it would be dropped
        if (const auto known = held_.extract(header.transfer); !known.empty() && grants_ != nullptr) {
            const Held& held = known.mapped();
            grants_->release(held.token, held.holding, held.mapped);
        }
        return;
    }
    const HoldBody body = decode_hold(raw);
    if (header.transfer <= last_hold_seen_) {
        throw Violation("a HOLD's id isn't new");
    }
    last_hold_seen_ = header.transfer;
    if (held_.size() + waiting_holds_.size() >= kMaxHolds) {
        throw Excess("the peer holds more than 65,536 leases");
    }
    if (held_due_.size() >= kMaxHolds) {
        throw Excess("the peer asks for leases faster than it reads our answers");
    }
    const bool refused = is_refused(body.token, now), mapped = (header.flags & kHoldMapped) != 0;
    if (!refused && try_hold(header.transfer, body.token, mapped)) {
        return;
    }
    if (refused || body.wait_ms == 0) {
        say_held(header.transfer, false);
    } else {
        const Time until = now + Time{body.wait_ms} * kMs;
        waiting_holds_.emplace(header.transfer, WaitingHold{body.token, until, mapped});
        watch(until);
        wait_for_grant(body.token, now);
    }
}

bool Session::try_hold(std::uint64_t number, const Token& token, bool mapped) {
    auto holding = grants_ != nullptr ? grants_->hold(token, mapped) : nullptr;
    if (holding == nullptr) {
        return false;
    }
    held_.emplace(number, Held{token, std::move(holding), mapped});
    say_held(number, true);
    return true;
}

// A lease may end before its peer has heard that it is held: then both words wait.
void Session::say_held(std::uint64_t number, bool held) {
    held_due_[number] |= held ? kSayHeld : kSayNotHeld;
    pump_held();
}

// No answers that are bounded as others: the peer may ask for as many leases as it may have, and read later.
void Session::pump_held() {
    const std::size_t before = outbox_.size();
    while (!held_due_.empty() && outbox_.size() <= config_.outbox_nbytes / 2) {
        const auto [number, words] = *held_due_.begin();
        held_due_.erase(held_due_.begin());
        if ((words & kSayHeld) != 0) {
            send(FrameType::held, 0, number, 0, 0);
        }
        if ((words & kSayNotHeld) != 0) {
            send(FrameType::held, kHeldNot, number, 0, 0);
        }
    }
    own_nbytes_ += outbox_.size() - before;
}

void Session::stop_waiting(std::map<std::uint64_t, WaitingHold>::iterator hold) {
    if (hold != waiting_holds_.end()) {
        const Token token = hold->second.token;
        waiting_holds_.erase(hold);
        wait_no_more(token);
    }
}

void Session::hold_ended(const Token& token) {
    for (auto it = held_.begin(); it != held_.end();) {
        if (it->second.token == token && it->second.holding->load(std::memory_order_acquire)) {
            say_held(it->first, false);
            it = held_.erase(it);
        } else {
            ++it;
        }
    }
}

// ---- what waits for a grant

void Session::grant_came(const Token& token, Time now) {
    const auto serve_all = [&](auto& waiting) {
        for (auto it = waiting.begin(); it != waiting.end();) {
            const auto here = it++;
            if (here->second.body.use.token != token) {
                continue;
            }
            if (serve(here->second, now)) {  // else ended again, or another's: it goes on waiting
                waiting.erase(here);
                wait_no_more(token);
            }
        }
    };
    if (lost_) {
        return;
    }
    for (auto it = waiting_holds_.begin(); it != waiting_holds_.end();) {
        const auto here = it++;
        if (here->second.token == token && try_hold(here->first, token, here->second.mapped)) {
            stop_waiting(here);
        }
    }
    serve_all(waiting_reads_);
    serve_all(waiting_writes_);
}

template <class Body>
void Session::end_waiting(std::map<std::uint64_t, Waiting<Body>>& waiting,
                          typename std::map<std::uint64_t, Waiting<Body>>::iterator use, AbortCode code,
                          const std::string& reason) {
    const Token token = use->second.body.use.token;
    deny(use->second, code, reason, {});
    waiting.erase(use);
    wait_no_more(token);
}

void Session::stop_waiting_for_grants(Time now) {
    const auto expire = [&](auto& waiting) {
        for (auto it = waiting.begin(); it != waiting.end();) {
            const auto here = it++;
            if (here->second.until > now) {
                watch(here->second.until);
                continue;
            }
            end_waiting(waiting, here, AbortCode::grant, {});
        }
    };
    expire(waiting_reads_);
    expire(waiting_writes_);
    for (auto it = waiting_holds_.begin(); it != waiting_holds_.end();) {
        const auto here = it++;
        if (here->second.until > now) {
            watch(here->second.until);
            continue;
        }
        say_held(here->first, false);
        stop_waiting(here);
    }
}

void Session::refuse(const Token& token, const std::string& reason, Time until, Time now) {
    if (lost_) {
        return;
    }
    bool told = false;
    const auto refuse_all = [&](auto& waiting) {
        for (auto it = waiting.begin(); it != waiting.end();) {
            const auto here = it++;
            if (here->second.body.use.token == token) {
                end_waiting(waiting, here, AbortCode::refused, reason);
                told = true;
            }
        }
    };
    refuse_all(waiting_reads_);
    refuse_all(waiting_writes_);
    for (auto it = waiting_holds_.begin(); it != waiting_holds_.end();) {
        const auto here = it++;
        if (here->second.token == token) {
            say_held(here->first, false);
            stop_waiting(here);
        }
    }
    if (told) {
        return;
    }
    if (token_refusals_.size() >= kMaxTokenRefusals) {
        std::erase_if(token_refusals_, [&](const auto& item) { return item.second.until <= now; });
    }
    if (token_refusals_.size() >= kMaxTokenRefusals) {
        throw Excess("more than 65,536 refusals are remembered on this connection");
    }
    token_refusals_[token] = {reason, until};
}

// A lease has no place for the reason: it stays for the READ or WRITE that the lease was for.
bool Session::is_refused(const Token& token, Time now) const {
    const auto known = token_refusals_.find(token);
    return known != token_refusals_.end() && known->second.until > now;
}

std::optional<std::string> Session::take_refusal(const Token& token, Time now) {
    auto node = token_refusals_.extract(token);
    if (node.empty() || node.mapped().until <= now) {
        return std::nullopt;
    }
    return std::move(node.mapped().reason);
}

}  // namespace kvt::protocol
