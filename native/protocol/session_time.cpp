// The clock and the end of a session: deadlines, our own pauses, loss.
#include <algorithm>

#include "protocol/session.hpp"

namespace kvt::protocol {

void Session::watch(const Transfer& transfer) noexcept {
    Cause cause{};
    watch(deadline_of(transfer, cause));
}

Time Session::deadline_of(const Transfer& transfer, Cause& cause) const noexcept {
    if (transfer.finished) {
        return kNever;
    }
    if (transfer.state == State::verdict) {
        return transfer.verdict_until;  // on_time looks at the state, not at a cause
    }
    if (!transfer.undecided()) {
        return kNever;  // its end waits for nothing but our own movers
    }
    const auto after = [](Time from, Time duration) {
        return duration >= kNever - from ? kNever : from + duration;
    };
    Time deadline = after(transfer.posted_at, transfer.limits.total);
    cause = Cause::timeout_total;
    const auto sooner = [&](Time candidate, Cause why) {
        if (candidate < deadline) {
            deadline = candidate;
            cause = why;
        }
    };
    if (transfer.state == State::posted) {
        sooner(after(transfer.waits_since, transfer.limits.match), Cause::timeout_match);
    } else if (transfer.gate_shut) {
        sooner(after(transfer.waits_since, transfer.limits.match), Cause::timeout_gate);
    } else {  // a source whose destination copies hears of it: lend() and returned(), or COPIED
        sooner(after(transfer.moved_at, transfer.limits.stall), Cause::timeout_bytes);
    }
    return deadline;
}

void Session::on_time(Time now) {
    if (now < next_deadline_ || lost_) {
        return;
    }
    next_deadline_ = kNever;
    for (const TransferPtr& transfer : all_unfinished()) {
        Cause cause{};
        const Time deadline = deadline_of(*transfer, cause);
        if (deadline > now) {
            watch(deadline);
        } else if (transfer->state == State::verdict) {
            leave_without_verdict(transfer, now);
        } else {
            stop(transfer, {cause, Delivered::no, {}, {}}, now);
        }
    }
    stop_waiting_for_grants(now);
    std::erase_if(refusals_, [&](const auto& item) { return item.second.until <= now; });
    std::erase_if(token_refusals_, [&](const auto& item) { return item.second.until <= now; });
}

// The destination's word will come, or the session will end; the user waits for neither.
void Session::leave_without_verdict(const TransferPtr& transfer, Time now) {
    transfer->outcome.delivered = Delivered::unknown;
    late_.insert(transfer->want);
    apply(transfer, Event::silent, now);
}

void Session::resumed(Time now) {
    for (const TransferPtr& transfer : all_unfinished()) {
        // What the peer said meanwhile is still unread. Only the limit of the whole is meant to count a
        // pause.
        if (transfer->state == State::verdict) {
            transfer->verdict_until = now + kVerdictGrace;
        }
        transfer->moved_at = now;
        const Time grace = std::min(transfer->limits.match, kPauseGrace);
        transfer->waits_since = std::max(transfer->waits_since, now - transfer->limits.match + grace);
    }
}

// Whether the destination may have sealed what this source offered or sent, for all that the source can know.
bool Session::may_be_sealed(const Transfer& source) const noexcept {
    return source.want != 0 && (source.located ? source.all_released : source.all_taken());
}

void Session::lose_transfer(const TransferPtr& transfer, Cause cause, const std::string& reason, Time now) {
    const State state = transfer->state;
    if (transfer->undecided()) {
        transfer->outcome = {cause, Delivered::no, reason, {}};
    }
    const bool unsure = transfer->undecided() || state == State::stopping || state == State::verdict;
    if (unsure && transfer->role == Role::source) {
        transfer->outcome.delivered = may_be_sealed(*transfer) ? Delivered::unknown : Delivered::no;
    }
    apply(transfer, Event::lost, now);
}

void Session::lost(Cause cause, const std::string& reason, Time now) {
    if (lost_) {
        return;
    }
    lost_ = true;
    lost_cause_ = cause;
    lost_reason_ = reason;
    next_deadline_ = kNever;
    std::vector<TransferPtr> all = all_unfinished();
    for (const auto& [key, transfer] : tombstones_) {
        all.push_back(transfer);
    }
    for (const TransferPtr& transfer : all) {
        lose_transfer(transfer, cause, reason, now);
        if (transfer->finished) {
            forget(transfer);
        }
    }
    for (auto* queue : {&messages_, &unacknowledged_}) {
        for (const MessagePtr& message : *queue) {
            const bool unsent = queue == &messages_;
            message->outcome = {cause, unsent ? Delivered::no : Delivered::unknown, reason, {}};
            message->finished = true;
            message->over_at = now;
            finished_messages_.push_back(message);
        }
        queue->clear();
    }
    for (const auto& [number, hold] : std::exchange(holds_, {})) {
        finish_hold(hold, {cause, Delivered::no, reason, {}});
    }
    for (const HoldPtr& hold : std::exchange(untold_holds_, {})) {
        finish_hold(hold, {cause, Delivered::no, reason, {}});
    }
    drop_everything_kept();
}

// Nothing of a lost session is matched or sent any more.
void Session::drop_everything_kept() {
    outbox_.clear();
    untold_.clear();
    unanswered_.clear();
    for (auto* queue : {&short_, &long_, &inline_, &copies_}) {
        queue->clear();
    }
    unmatched_wants_.clear();
    unmatched_want_keys_.clear();
    unmatched_offers_.clear();
    unmatched_offer_keys_.clear();
    late_.clear();
    refusals_.clear();
    token_refusals_.clear();
    waiting_reads_.clear();
    waiting_writes_.clear();
    waiting_holds_.clear();
    for (const auto& [token, waiters] : std::exchange(awaited_, {})) {
        if (grants_ != nullptr) {
            grants_->await_no_more(token);
        }
    }
    held_.clear();
    held_due_.clear();
    peer_pools_.clear();
    peer_charge_ = peer_regions_ = 0;
}

}  // namespace kvt::protocol
