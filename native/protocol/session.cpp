#include "protocol/session.hpp"

#include <algorithm>

#include "protocol/chunking.hpp"

namespace kvt::protocol {

namespace {

// A source that has told the destination of its end waits so long for the verdict before it reports "unknown". The peer
// answers natively, so a round trip suffices; the deadline of a transfer may be passed by 100 ms in all.
constexpr Time kVerdictGrace = 80'000'000;
constexpr std::size_t kMaxRefusals = 65'536;

AbortCode code_for(Cause cause) noexcept {
    switch (cause) {
        case Cause::timeout_match:
        case Cause::timeout_gate:
        case Cause::timeout_bytes:
        case Cause::timeout_total: return AbortCode::timeout;
        case Cause::layout_mismatch: return AbortCode::layout_mismatch;
        case Cause::integrity: return AbortCode::integrity;
        case Cause::cancelled: return AbortCode::cancelled;
        default: return AbortCode::local_error;
    }
}

}  // namespace

// ---- output

void Session::send(Header header, const Bytes& body) {
    if (!lost_) {
        append_frame(outbox_, header, body);
    }
}

void Session::send(FrameType type, std::uint8_t flags, std::uint64_t transfer, std::uint64_t total, std::uint64_t arg) {
    Header header;
    header.type = type;
    header.flags = flags;
    header.transfer = transfer;
    header.total = total;
    header.arg = arg;
    send(header, {});
}

void Session::ping(Time) { send(FrameType::ping, 0, 0, 0, 0); }

void Session::say_close(CloseCode code) { send(FrameType::close, 0, 0, 0, static_cast<std::uint64_t>(code)); }

void Session::announce(std::uint64_t pool_id, const PoolTerms& pool) {
    if (announced_.insert(pool_id).second) {
        Header header;
        header.type = FrameType::pool;
        header.transfer = pool_id;
        send(header, encode_pool(pool));
    }
}

void Session::forget_pool(std::uint64_t pool_id) {
    if (announced_.erase(pool_id) != 0) {
        send(FrameType::pool, kPoolClosed, pool_id, 0, 0);
    }
}

void Session::send_abort(const Transfer& transfer) {
    Header header;
    header.type = FrameType::abort;
    const bool source = transfer.role == Role::source;
    header.flags = source ? kFromSource : 0;
    header.arg = transfer.chunks;
    header.transfer = transfer.want;
    if (source && transfer.want == 0) {
        header.flags |= kOfferId;
        header.transfer = transfer.id;
    }
    AbortBody body;
    body.code = code_for(transfer.outcome.cause);
    body.reason = transfer.outcome.reason;
    body.mismatch = transfer.outcome.mismatch;
    send(header, encode_abort(body));
}

// ---- posting and telling

void Session::open(SessionConfig config, Time now) {
    config_ = config;
    opened_ = true;
    heard_at_ = spoke_at_ = now;
}

void Session::post(TransferPtr transfer, std::uint64_t pool_id, Time now) {
    const bool source = transfer->role == Role::source;
    auto& keys = source ? source_keys_ : destination_keys_;
    if (!keys.emplace(transfer->key, transfer).second) {
        throw LocalViolation("key '" + transfer->key + "' already names an unfinished " + (source ? "send" : "receive") +
                             " on this connection: wait for it or choose another");
    }
    refusals_.erase(transfer->key);    // who refuses and then posts means the post
    transfer->terms.pool = pool_id;
    transfer->posted_at = transfer->waits_since = now;
    enter(transfer, now);
}

// Gives a post its place and, if its partner waits here, its match.
void Session::enter(const TransferPtr& transfer, Time now) {
    const bool source = transfer->role == Role::source;
    transfer->id = source ? next_offer_++ : next_want_++;
    if (source) {
        offers_.emplace(transfer->id, transfer);
    } else {
        transfer->want = transfer->id;
        wants_.emplace(transfer->id, transfer);
    }
    if (lost_) {
        apply(transfer, Event::lost, now);
        return;
    }
    Cause cause{};
    watch(deadline_of(*transfer, cause));
    if (source) {
        if (const auto waiting = unmatched_wants_.find(transfer->key); waiting != unmatched_wants_.end()) {
            UnmatchedWant want = std::move(waiting->second);
            unmatched_wants_.erase(waiting);
            unmatched_want_keys_.erase(want.want);
            match_source(transfer, want.want, std::move(want.body), config_.memory_backend, now);
            return;
        }
    } else if (const auto offered = unmatched_offers_.find(transfer->key); offered != unmatched_offers_.end()) {
        UnmatchedOffer offer = std::move(offered->second);
        unmatched_offers_.erase(offered);
        unmatched_offer_keys_.erase(offer.offer);
        match_destination(transfer, offer.offer, std::move(offer.body), now);
        return;
    }
    tell_or_queue(transfer);
}

std::vector<TransferPtr> Session::give_up_posts() {
    std::vector<TransferPtr> posts;
    for (auto* keys : {&source_keys_, &destination_keys_}) {
        for (const auto& [key, transfer] : *keys) {
            if (transfer->state == State::posted) {
                posts.push_back(transfer);
            }
        }
    }
    std::sort(posts.begin(), posts.end(), [](const auto& a, const auto& b) { return a->posted_at < b->posted_at; });
    for (const TransferPtr& transfer : posts) {
        forget(transfer);
        wants_.erase(transfer->id);
    }
    untold_.clear();
    return posts;
}

void Session::take_over(TransferPtr transfer, Time now) {
    auto& keys = transfer->role == Role::source ? source_keys_ : destination_keys_;
    if (!keys.emplace(transfer->key, transfer).second) {
        throw LocalViolation("key '" + transfer->key + "' is in use on the connection that took this one's place");
    }
    enter(transfer, now);
}

void Session::tell_or_queue(const TransferPtr& transfer) {
    if (!opened_ || !untold_.empty() || outstanding_ >= config_.unmatched || outbox_.size() > config_.outbox_nbytes / 2) {
        untold_.push_back(transfer);
        return;
    }
    transfer->outstanding = true;
    ++outstanding_;
    tell(transfer);
}

void Session::tell(const TransferPtr& transfer) {
    announce(transfer->terms.pool, *transfer->pool);
    transfer->told = true;
    Header header;
    header.transfer = transfer->id;
    header.total = transfer->nbytes;
    if (transfer->role == Role::source) {
        header.type = FrameType::offer;
        send(header, encode_offer({transfer->key, transfer->meta, transfer->location, transfer->gate != nullptr, transfer->terms}));
        return;
    }
    header.type = FrameType::want;
    header.flags = config_.memory_backend ? kWantPulls : 0;
    std::vector<Range> ranges;
    if (transfer->nbytes != 0) {
        ranges.push_back({0, transfer->nbytes});
    }
    send(header, encode_want({transfer->key, transfer->meta, transfer->terms, std::move(ranges)}));
}

void Session::pump(Time) {
    if (!opened_) {
        return;
    }
    while (!untold_.empty() && outbox_.size() <= config_.outbox_nbytes / 2) {
        const TransferPtr next = untold_.front();
        if (next->told || next->state != State::posted) {
            untold_.pop_front();    // it matched or ended while it waited
            continue;
        }
        if (outstanding_ >= config_.unmatched) {
            break;
        }
        untold_.pop_front();
        next->outstanding = true;
        ++outstanding_;
        tell(next);
    }
    while (!messages_.empty() && outbox_.size() <= config_.outbox_nbytes / 2) {
        const MessagePtr& next = messages_.front();
        if (message_bytes_sent_ - message_bytes_taken_ + next->data.size() > config_.message_window_nbytes) {
            break;
        }
        message_bytes_sent_ += next->data.size();
        Header header;
        header.type = FrameType::message;
        header.transfer = next->number;
        send(header, next->data);
        ++counters_.messages_out;
        next->data = Bytes();
        unacknowledged_.push_back(next);
        messages_.pop_front();
    }
}

// ---- the machines

void Session::stop(const TransferPtr& transfer, Outcome why, Time now) {
    if (transfer->finished || transfer->done_early) {
        return;    // a DONE that was read before we asked decides
    }
    const State state = transfer->state;
    if (state == State::posted || state == State::matched || state == State::moving || state == State::sent) {
        transfer->outcome = std::move(why);
    }
    if (config_.memory_backend && transfer->role == Role::source && state == State::posted && transfer->told) {
        apply(transfer, Event::match, now);    // the destination may be copying already: its verdict is needed
    }
    apply(transfer, Event::stop, now);
}

void Session::apply(const TransferPtr& transfer, Event event, Time now) {
    const Transition& row = step(transfer->role, transfer->state, event);
    if (row.action == Action::refuse_bug) {
        throw std::logic_error(std::string("transfer machine: ") + name_of(transfer->role) + " in " + name_of(row.from) +
                               " can't take " + name_of(event));
    }
    if (row.action == Action::violation) {
        throw Violation(std::string("a ") + name_of(event) + " for a " + name_of(transfer->role) + " that is " + name_of(row.from));
    }
    transfer->state = row.to;
    if (event == Event::match || event == Event::first_bytes) {
        transfer->moved_at = now;
        if (transfer->matched_at == 0) {
            transfer->matched_at = now;
        }
        if (event == Event::first_bytes && transfer->first_byte_at == 0) {
            transfer->first_byte_at = now;
        }
        if (transfer->outstanding) {
            transfer->outstanding = false;
            --outstanding_;
        }
    }
    act(transfer, row.action, now);
}

void Session::act(const TransferPtr& transfer, Action action, Time now) {
    switch (action) {
        case Action::quiesce:
            transfer->pending.clear();
            gated_.erase(transfer);
            quiescing_.push_back(transfer);
            break;
        case Action::finish_ok:
            transfer->outcome = {Cause::ok, Delivered::yes, {}, {}};
            if (transfer->state == State::over) {
                finish(transfer, now);
            }
            break;
        case Action::finish: finish(transfer, now); break;
        case Action::send_done:
            transfer->outcome = {Cause::ok, Delivered::yes, {}, {}};
            send(FrameType::done, 0, transfer->want, transfer->verified.nbytes(), transfer->chunks);
            finish(transfer, now);
            break;
        case Action::send_abort:
            send_abort(*transfer);
            if (transfer->role == Role::source) {
                transfer->verdict_until = now + kVerdictGrace;
                watch(transfer->verdict_until);
            } else {
                finish(transfer, now);
            }
            break;
        case Action::finish_drain:
            if (transfer->told) {
                send(FrameType::aborted, 0, transfer->want, 0, 0);
            }
            finish(transfer, now);
            break;
        case Action::none:
        case Action::refuse_bug:
        case Action::violation: break;
    }
}

void Session::quiesced(const TransferPtr& transfer, Time now) {
    if (transfer->state != State::stopping && transfer->state != State::ending) {
        return;
    }
    if (transfer->role == Role::destination && !transfer->told) {
        transfer->state = State::draining;    // nobody was told: nothing to say, nothing to drain
        finish(transfer, now);
        apply(transfer, Event::drained, now);
        forget(transfer);
        return;
    }
    const bool answer = transfer->state == State::ending && transfer->role == Role::source;
    apply(transfer, Event::quiesced, now);
    if (answer) {
        after_quiesce(transfer, now);
    } else if (transfer->role == Role::destination) {
        if (lost_) {
            apply(transfer, Event::lost, now);
            forget(transfer);
        } else {
            check_drained(transfer, now);
        }
    }
}

// A source that ended without needing a verdict still owes the peer a word.
void Session::after_quiesce(const TransferPtr& transfer, Time) {
    if (lost_ || transfer->outcome.cause == Cause::ok) {
        return;
    }
    if (transfer->peer_ended) {
        if (transfer->want != 0) {
            send(FrameType::aborted, kFromSource, transfer->want, 0, transfer->chunks);
        }
    } else if (transfer->told || transfer->want != 0) {
        send_abort(*transfer);
    }
}

void Session::finish(const TransferPtr& transfer, Time now) {
    if (transfer->finished) {
        return;
    }
    transfer->finished = true;
    transfer->over_at = now;
    const bool ok = transfer->outcome.cause == Cause::ok;
    if (transfer->role == Role::source) {
        ++(ok ? counters_.sends_ok : counters_.sends_failed);
    } else {
        ++(ok ? counters_.receives_ok : counters_.receives_failed);
    }
    finished_.push_back(transfer);
    forget(transfer);
}

// Takes a finished transfer out of every index; a destination that drains stays known by its id.
void Session::forget(const TransferPtr& transfer) {
    if (transfer->outstanding) {
        transfer->outstanding = false;
        --outstanding_;
    }
    gated_.erase(transfer);
    if (transfer->role == Role::source) {
        if (const auto mine = source_keys_.find(transfer->key); mine != source_keys_.end() && mine->second == transfer) {
            source_keys_.erase(mine);
        }
        offers_.erase(transfer->id);
        matched_.erase(transfer->want);
        return;
    }
    if (const auto mine = destination_keys_.find(transfer->key); mine != destination_keys_.end() && mine->second == transfer) {
        destination_keys_.erase(mine);
    }
    if (transfer->state == State::over) {
        wants_.erase(transfer->id);
    }
}

// ---- time

Time Session::deadline_of(const Transfer& transfer, Cause& cause) const noexcept {
    if (transfer.finished) {
        return kNever;
    }
    if (transfer.state == State::verdict) {
        cause = Cause::peer_lost;    // unused: on_time looks at the state
        return transfer.verdict_until;
    }
    const auto after = [](Time from, Time duration) { return duration >= kNever - from ? kNever : from + duration; };
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
    } else if (transfer.state == State::matched || transfer.state == State::moving || transfer.state == State::sent) {
        // A source whose destination copies sees no byte: the destination's clock counts for both.
        if (!(config_.memory_backend && transfer.role == Role::source)) {
            sooner(after(transfer.moved_at, transfer.limits.stall), Cause::timeout_bytes);
        }
    }
    return deadline;
}

void Session::on_time(Time now) {
    if (now < next_deadline_ || lost_) {
        return;
    }
    next_deadline_ = kNever;
    std::vector<TransferPtr> all;
    for (const auto* keys : {&source_keys_, &destination_keys_}) {
        for (const auto& [key, transfer] : *keys) {
            all.push_back(transfer);
        }
    }
    for (const TransferPtr& transfer : all) {
        Cause cause{};
        const Time deadline = deadline_of(*transfer, cause);
        if (deadline > now) {
            watch(deadline);
        } else if (transfer->state == State::verdict) {
            transfer->outcome.delivered = Delivered::unknown;
            late_.insert(transfer->want);
            apply(transfer, Event::silent, now);
        } else {
            stop(transfer, {cause, Delivered::no, {}, {}}, now);
        }
    }
    std::erase_if(refusals_, [&](const auto& item) { return item.second.until <= now; });
}

void Session::resumed(Time now) {
    heard_at_ = now;
    for (const auto* keys : {&source_keys_, &destination_keys_}) {
        for (const auto& [key, transfer] : *keys) {
            transfer->moved_at = now;
        }
    }
}

void Session::lost(Cause cause, const std::string& reason, Time now) {
    if (lost_) {
        return;
    }
    lost_ = true;
    outbox_.clear();
    untold_.clear();
    std::vector<TransferPtr> all;
    for (const auto* keys : {&source_keys_, &destination_keys_}) {
        for (const auto& [key, transfer] : *keys) {
            all.push_back(transfer);
        }
    }
    for (const TransferPtr& transfer : all) {
        const State state = transfer->state;
        const bool undecided = state == State::posted || state == State::matched || state == State::moving || state == State::sent;
        if (undecided || state == State::stopping || state == State::verdict) {
            // The destination may have sealed what a source had wholly sent: nobody can know.
            const bool unknown = transfer->role == Role::source && (state == State::sent || state == State::verdict);
            if (transfer->done_early) {
                transfer->outcome = {Cause::ok, Delivered::yes, {}, {}};    // its DONE was read
            } else {
                if (undecided) {
                    transfer->outcome = {cause, Delivered::no, reason, {}};
                }
                transfer->outcome.delivered = unknown ? Delivered::unknown : Delivered::no;
            }
        }
        apply(transfer, Event::lost, now);
    }
    std::erase_if(wants_, [](const auto& item) { return item.second->state == State::draining; });
    for (auto* queue : {&messages_, &unacknowledged_}) {
        for (const MessagePtr& message : *queue) {
            message->outcome = {cause, Delivered::unknown, reason, {}};
            message->finished = true;
            message->over_at = now;
            finished_messages_.push_back(message);
        }
        queue->clear();
    }
}

// ---- frames

void Session::receive(const Header& header, std::span<const std::byte> body, Time now) {
    heard_at_ = now;
    switch (header.type) {
        case FrameType::pool: on_pool(header, body); break;
        case FrameType::offer: on_offer(header, body, now); break;
        case FrameType::want: on_want(header, body, now); break;
        case FrameType::done: on_done(header, now); break;
        case FrameType::abort: {
            const AbortBody told = decode_abort(body);
            if ((header.flags & kFromSource) != 0) {
                on_abort_for_destination(header, told, now);
            } else {
                on_abort_for_source(header, told, now);
            }
            break;
        }
        case FrameType::aborted:
            if ((header.flags & kFromSource) != 0) {
                on_aborted_for_destination(header, now);
            } else {
                on_aborted_for_source(header, now);
            }
            break;
        case FrameType::gated: on_gated(header, now); break;
        case FrameType::released: on_released(header, body, now); break;
        case FrameType::message: on_message(header, body); break;
        case FrameType::message_ack: on_message_ack(header, now); break;
        case FrameType::ping: break;
        case FrameType::close:
            if (header.arg < 1 || header.arg > 3) {
                throw Violation("a CLOSE's code is unknown");
            }
            peer_closed_ = static_cast<CloseCode>(header.arg);
            break;
        case FrameType::chunk: throw std::logic_error("chunks go through chunk_begin");
    }
    if (outbox_.size() > 2 * config_.outbox_nbytes) {
        throw Excess("the peer asks faster than it reads our answers");
    }
}

void Session::on_pool(const Header& header, std::span<const std::byte> body) {
    if ((header.flags & kPoolClosed) != 0) {
        if (!body.empty()) {
            throw Violation("a POOL that closes has a body");
        }
        if (const auto known = peer_pools_.find(header.transfer); known != peer_pools_.end()) {
            peer_regions_ -= std::max<std::size_t>(known->second.layers.size(), 1);
            peer_pools_.erase(known);
        }
        return;
    }
    PoolTerms pool = decode_pool(body);
    if (pool.layers.size() > config_.regions - std::min<std::size_t>(peer_regions_, config_.regions)) {
        throw Excess("the peer announces more than " + std::to_string(config_.regions) + " regions");
    }
    const std::size_t regions = std::max<std::size_t>(pool.layers.size(), 1);
    if (peer_pools_.size() >= config_.regions || !peer_pools_.emplace(header.transfer, std::move(pool)).second) {
        throw Violation("a POOL is announced twice, or too many are");
    }
    peer_regions_ += regions;
}

const PoolTerms& Session::peer_pool(const Terms& terms) const {
    const auto known = peer_pools_.find(terms.pool);
    if (known == peer_pools_.end()) {
        throw Violation("a transfer names a pool that wasn't announced");
    }
    if (const std::string wrong = check_terms(known->second, terms); !wrong.empty()) {
        throw Violation(wrong);
    }
    return known->second;
}

void Session::refuse(const std::string& key, const std::string& reason, Time until, Time now) {
    if (const auto want = unmatched_wants_.find(key); want != unmatched_wants_.end()) {
        refuse_want(want->second.want, AbortCode::refused, reason, {});
        unmatched_want_keys_.erase(want->second.want);
        unmatched_wants_.erase(want);
        return;
    }
    if (const auto offer = unmatched_offers_.find(key); offer != unmatched_offers_.end()) {
        Header header;
        header.type = FrameType::abort;
        header.flags = kOfferId;
        header.transfer = offer->second.offer;
        send(header, encode_abort({AbortCode::refused, reason, {}}));
        unmatched_offer_keys_.erase(offer->second.offer);
        unmatched_offers_.erase(offer);
        return;
    }
    if (refusals_.size() >= kMaxRefusals) {
        std::erase_if(refusals_, [&](const auto& item) { return item.second.until <= now; });
    }
    if (refusals_.size() >= kMaxRefusals) {
        throw Excess("more than 65,536 refusals are remembered on this connection");
    }
    refusals_[key] = {reason, until};
}

}  // namespace kvt::protocol
