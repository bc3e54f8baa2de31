// The source's half of a session: WANT starts bytes, gates hold them back, DONE ends them.
#include <algorithm>

#include "protocol/chunking.hpp"
#include "protocol/session.hpp"

namespace kvt::protocol {

void Session::refuse_want(std::uint64_t want, AbortCode code, const std::string& reason, const Mismatch& mismatch) {
    Header header;
    header.type = FrameType::abort;
    header.flags = kFromSource;
    header.transfer = want;
    late_.insert(want);    // the destination's own ABORT may cross this one
    send(header, encode_abort({code, reason, mismatch}));
}

void Session::on_want(const Header& header, std::span<const std::byte> raw, Time now) {
    if (header.transfer <= last_want_seen_) {
        throw Violation("a WANT's id isn't new");
    }
    last_want_seen_ = header.transfer;
    WantBody body = decode_want(raw);
    const PoolTerms& theirs = peer_pool(body.terms);
    const bool pulls = (header.flags & kWantPulls) != 0;
    if (pulls != config_.memory_backend) {
        throw Violation("a WANT pulls where the backend doesn't, or the reverse");
    }
    if (stream_nbytes(theirs, body.terms) != header.total || (!body.ranges.empty() && body.ranges.back().end > header.total)) {
        throw Violation("a WANT's bytes aren't those of its terms");
    }
    if (const auto refused = refusals_.find(body.key); refused != refusals_.end() && refused->second.until > now) {
        refuse_want(header.transfer, AbortCode::refused, refused->second.reason, {});
        refusals_.erase(refused);
        return;
    }
    const auto mine = source_keys_.find(body.key);
    if (mine != source_keys_.end() && mine->second->state == State::posted) {
        const TransferPtr transfer = mine->second;
        match_source(transfer, header.transfer, std::move(body), pulls, now);
        return;
    }
    if (mine != source_keys_.end() && config_.memory_backend && mine->second->want == 0) {
        mine->second->want = header.transfer;    // its end is being told: the verdict comes under this id
        matched_.emplace(header.transfer, mine->second);
        return;
    }
    if (unmatched_wants_.size() >= config_.unmatched) {
        throw Excess("the peer has more than " + std::to_string(config_.unmatched) + " unmatched WANTs");
    }
    std::string key = body.key;
    if (!unmatched_wants_.emplace(key, UnmatchedWant{header.transfer, std::move(body)}).second) {
        throw Violation("two WANTs wait under one key");
    }
    unmatched_want_keys_.emplace(header.transfer, std::move(key));
}

void Session::match_source(const TransferPtr& transfer, std::uint64_t want, WantBody body, bool pulls, Time now) {
    const auto pool = peer_pools_.find(body.terms.pool);
    const Side source{transfer->pool, &transfer->terms};
    Fit result;
    if (pool == peer_pools_.end()) {
        result.mismatch = Mismatch{"pool", transfer->pool->name, "closed"};
    } else {
        result = fit(source, {&pool->second, &body.terms}, true);
    }
    if (result.mismatch) {
        refuse_want(want, AbortCode::layout_mismatch, {}, *result.mismatch);
        stop(transfer, {Cause::layout_mismatch, Delivered::no, {}, *result.mismatch}, now);
        return;
    }
    transfer->want = want;
    transfer->peer_meta = std::move(body.meta);
    matched_.emplace(want, transfer);
    if (!result.in_order) {
        std::vector<LayerSpan> spans;
        std::uint64_t at = 0;
        for (const std::uint32_t position : result.order) {
            const LayerSpan& old = transfer->spans[position];
            const std::uint64_t nbytes = old.range.end - old.range.begin;
            spans.push_back({{at, at + nbytes}, old.layer});
            at += nbytes;
        }
        transfer->spans = std::move(spans);
        transfer->reorder(result.order);
    }
    apply(transfer, Event::match, now);
    Cause cause{};
    watch(deadline_of(*transfer, cause));
    if (!transfer->told && (!transfer->meta.empty() || transfer->moves_nothing() || config_.memory_backend)) {
        tell(transfer);
    }
    for (const Range& range : body.ranges) {
        transfer->asked.add(range);
    }
    if (transfer->moves_nothing()) {
        apply(transfer, Event::all_bytes, now);
    } else if (transfer->gate != nullptr) {
        transfer->released.assign(transfer->spans.size(), false);
        gated_.insert(transfer);
        release_layers(transfer, now);
    } else if (pulls) {
        apply(transfer, Event::all_bytes, now);
    } else {
        transfer->pending = transfer->asked;
        transfer->asked.clear();
        make_ready(transfer);
    }
}

void Session::make_ready(const TransferPtr& transfer) {
    if (transfer->queued || transfer->pending.empty()) {
        return;
    }
    transfer->queued = true;
    if (transfer->nbytes <= kMaxInlineNbytes) {
        inline_.push_back(transfer);
    } else if (transfer->nbytes <= kShortNbytes) {
        short_.push_back(transfer);
    } else {
        long_.push_back(transfer);
    }
}

// Moves what the gate has released from `asked` to `pending` (or tells a destination that copies), and the clocks with it.
void Session::release_layers(const TransferPtr& transfer, Time now) {
    if (transfer->gate->failed()) {
        gated_.erase(transfer);
        stop(transfer, {Cause::cancelled, Delivered::no, transfer->gate->reason(), {}}, now);
        return;
    }
    std::vector<std::uint32_t> fresh;
    bool all = true;
    for (std::size_t i = 0; i < transfer->spans.size(); ++i) {
        const Range span = transfer->spans[i].range;
        if (transfer->released[i] || span.begin == span.end) {
            continue;
        }
        if (!transfer->gate->released(transfer->spans[i].layer)) {
            all = false;
            continue;
        }
        transfer->released[i] = true;
        fresh.push_back(static_cast<std::uint32_t>(i));
        for (const Range& asked : transfer->asked.ranges()) {
            const Range both{std::max(asked.begin, span.begin), std::min(asked.end, span.end)};
            if (both.begin < both.end && !config_.memory_backend) {
                transfer->pending.add(both);
            }
        }
    }
    if (!fresh.empty() && config_.memory_backend) {
        Header header;
        header.type = FrameType::released;
        header.transfer = transfer->want;
        send(header, encode_released(fresh));
    }
    if (all) {
        gated_.erase(transfer);
        transfer->asked.clear();
    }
    const bool idle = config_.memory_backend ? fresh.empty() : transfer->pending.empty() && transfer->active == 0;
    set_gate(transfer, !all && idle, now);
    if (config_.memory_backend && all) {
        apply(transfer, Event::all_bytes, now);
    } else if (!config_.memory_backend) {
        make_ready(transfer);
        if (all && transfer->pending.empty() && transfer->active == 0 && transfer->chunks > 0) {
            apply(transfer, Event::all_bytes, now);
        }
    }
}

void Session::set_gate(const TransferPtr& transfer, bool shut, Time now) {
    if (transfer->gate_shut == shut) {
        return;
    }
    transfer->gate_shut = shut;
    if (shut) {
        transfer->waits_since = now;
    } else {
        transfer->moved_at = now;
    }
    send(FrameType::gated, shut ? kGateShut : 0, transfer->want, 0, 0);
    Cause cause{};
    watch(deadline_of(*transfer, cause));
}

bool Session::poll_gates(Time now) {
    const std::vector<TransferPtr> waiting(gated_.begin(), gated_.end());
    for (const TransferPtr& transfer : waiting) {
        release_layers(transfer, now);
    }
    return !gated_.empty();
}

// ---- chunks

std::optional<ChunkJob> Session::cut(std::deque<TransferPtr>& queue, std::uint64_t most, Time now) {
    while (!queue.empty()) {
        const TransferPtr transfer = std::move(queue.front());
        queue.pop_front();
        transfer->queued = false;
        if (transfer->pending.empty() || (transfer->state != State::matched && transfer->state != State::moving)) {
            continue;
        }
        const bool digests = config_.digest != DigestKind::none;
        const std::uint64_t chunk = std::min(most, chunk_nbytes_for(transfer->nbytes, digests, config_.chunk_nbytes));
        ChunkJob job{transfer, transfer->pending.take_front(chunk), {}};
        job.header.type = FrameType::chunk;
        job.header.flags = transfer->meta.empty() ? 0 : kChunkOfferDue;
        job.header.attempt = transfer->attempt;
        job.header.body_nbytes = static_cast<std::uint32_t>(job.range.end - job.range.begin);
        job.header.transfer = transfer->want;
        job.header.offset = job.range.begin;
        job.header.total = transfer->nbytes;
        ++transfer->active;
        ++transfer->chunks;
        apply(transfer, Event::first_bytes, now);
        make_ready(transfer);
        return job;
    }
    return std::nullopt;
}

std::optional<ChunkJob> Session::next_inline(Time now) {
    if (outbox_.size() > config_.outbox_nbytes / 2) {
        return std::nullopt;    // a control stream that is behind takes no payload
    }
    return cut(inline_, kMaxInlineNbytes, now);
}

std::optional<ChunkJob> Session::next_chunk(Time now) {
    const bool prefer_long = short_in_a_row_ >= kShortInARow && !long_.empty();
    if (!prefer_long) {
        if (auto job = cut(short_, kMaxChunkNbytes, now)) {
            ++short_in_a_row_;
            return job;
        }
    }
    short_in_a_row_ = 0;
    if (auto job = cut(long_, kMaxChunkNbytes, now)) {
        return job;
    }
    return prefer_long ? cut(short_, kMaxChunkNbytes, now) : std::nullopt;
}

void Session::chunk_left(const ChunkJob& job, bool whole, bool begun, Time now) {
    const TransferPtr& transfer = job.transfer;
    --transfer->active;
    if (!begun) {
        --transfer->chunks;
    }
    transfer->moved_at = now;
    ++counters_.chunks_out;
    if (!whole) {
        return;
    }
    counters_.bytes_out += job.range.end - job.range.begin;
    transfer->sent_nbytes += job.range.end - job.range.begin;
    if (transfer->active != 0 || !transfer->pending.empty() || transfer->finished) {
        return;
    }
    if (gated_.contains(transfer)) {
        release_layers(transfer, now);    // nothing to send: the gate may be shut
        return;
    }
    if (transfer->state == State::moving) {
        apply(transfer, Event::all_bytes, now);
        if (transfer->done_early) {
            apply(transfer, Event::done, now);
        }
    }
}

TransferPtr Session::lend(std::uint64_t offer) {
    const auto known = offers_.find(offer);
    if (lost_ || known == offers_.end()) {
        return nullptr;
    }
    const State state = known->second->state;
    if (state != State::posted && state != State::matched && state != State::moving && state != State::sent) {
        return nullptr;
    }
    ++known->second->active;
    return known->second;
}

void Session::returned(const TransferPtr& transfer, Time now) {
    --transfer->active;
    transfer->moved_at = now;
}

// ---- the destination's word

void Session::on_done(const Header& header, Time now) {
    const auto known = matched_.find(header.transfer);
    if (known == matched_.end()) {
        if (late_.erase(header.transfer) == 0) {
            throw Violation("a DONE for a transfer that isn't there");
        }
        return;
    }
    const TransferPtr transfer = known->second;
    if (header.total != transfer->nbytes || (!config_.memory_backend && header.arg != transfer->chunks)) {
        throw Violation("a DONE counts other bytes or chunks than were sent");
    }
    if ((transfer->state == State::moving || transfer->state == State::stopping) && transfer->active != 0 && transfer->pending.empty() &&
        !gated_.contains(transfer)) {
        // The last bytes have left and were verified before the mover could note it: its note comes next.
        transfer->done_early = true;
        if (transfer->state == State::stopping) {
            apply(transfer, Event::done, now);
        }
        return;
    }
    apply(transfer, Event::done, now);
}

void Session::on_abort_for_source(const Header& header, const AbortBody& body, Time now) {
    TransferPtr transfer;
    if ((header.flags & kOfferId) != 0) {
        const auto known = offers_.find(header.transfer);
        if (known == offers_.end()) {
            if (header.transfer >= next_offer_) {
                throw Violation("an ABORT for an offer that isn't there");
            }
            return;    // it ended here meanwhile
        }
        transfer = known->second;
    } else if (const auto known = matched_.find(header.transfer); known != matched_.end()) {
        transfer = known->second;
    } else if (const auto waiting = unmatched_want_keys_.find(header.transfer); waiting != unmatched_want_keys_.end()) {
        unmatched_wants_.erase(waiting->second);
        unmatched_want_keys_.erase(waiting);
        send(FrameType::aborted, kFromSource, header.transfer, 0, 0);
        return;
    } else if (late_.erase(header.transfer) != 0) {
        send(FrameType::aborted, kFromSource, header.transfer, 0, 0);
        return;
    } else {
        throw Violation("an ABORT for a transfer that isn't there");
    }
    const State state = transfer->state;
    transfer->peer_ended = true;
    if (state == State::posted || state == State::matched || state == State::moving || state == State::sent) {
        const bool mismatch = body.code == AbortCode::layout_mismatch;
        const Mismatch ours{body.mismatch.path, body.mismatch.theirs, body.mismatch.ours};
        transfer->outcome = {mismatch ? Cause::layout_mismatch : Cause::peer_aborted, Delivered::no, body.reason, ours};
    }
    transfer->outcome.delivered = Delivered::no;
    apply(transfer, Event::peer_ended, now);
}

void Session::on_aborted_for_source(const Header& header, Time now) {
    const bool by_offer = (header.flags & kOfferId) != 0;
    const auto& index = by_offer ? offers_ : matched_;
    const auto known = index.find(header.transfer);
    if (known == index.end()) {
        if (by_offer) {
            return;
        }
        late_.erase(header.transfer);
        if (header.transfer > last_want_seen_) {
            throw Violation("an ABORTED for a transfer that isn't there");
        }
        return;
    }
    const TransferPtr transfer = known->second;
    if (transfer->state != State::verdict) {
        throw Violation("an ABORTED that answers nothing");
    }
    transfer->outcome.delivered = Delivered::no;
    apply(transfer, Event::peer_ended, now);
}

}  // namespace kvt::protocol
