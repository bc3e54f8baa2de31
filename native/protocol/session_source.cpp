// The source's half of a session: WANT starts bytes, gates hold them back, DONE ends them.
#include <algorithm>

#include "protocol/chunking.hpp"
#include "protocol/session.hpp"

namespace kvt::protocol {

void Session::on_want(const Header& header, std::span<const std::byte> raw, Time now) {
    if (header.transfer <= last_want_seen_) {
        throw Violation("a WANT's id isn't new");
    }
    last_want_seen_ = header.transfer;
    WantBody body = decode_want(raw);
    const PoolTerms& theirs = peer_pool(body.terms);
    const bool pulls = (header.flags & kWantPulls) != 0;
    if (pulls && (config_.capabilities & kCanCopy) == 0) {
        throw Violation("a WANT pulls where that wasn't agreed");
    }
    const std::uint64_t last = body.ranges.empty() ? 0 : body.ranges.back().end;
    if (stream_nbytes(theirs, body.terms) != header.total || last > header.total ||
        (last == 0) != (header.total == 0)) {
        throw Violation("a WANT's bytes aren't those of its terms");
    }
    if (header.arg >= next_offer_) {
        throw Violation("a WANT answers an OFFER that wasn't made");
    }
    if ((header.flags & kWantOfWrite) != 0) {
        if ((config_.capabilities & kCanGrant) == 0) {
            throw Violation("a WANT answers a WRITE where that wasn't agreed");
        }
        on_want_of_write(header, std::move(body), now);
        return;
    }
    const auto known = source_keys_.find(body.key);
    const TransferPtr mine = known == source_keys_.end() ? nullptr : known->second;
    if (mine != nullptr && mine->state == State::posted) {
        match_source(mine, {header.transfer, header.total, 0, pulls, std::move(body)}, now);
    } else if (const auto reason = take_refusal(body.key, now)) {
        refuse_want(header.transfer, AbortCode::refused, *reason, {});
    } else {
        keep({header.transfer, header.total, 0, pulls, std::move(body)}, header.arg != 0);
    }
}

void Session::match_source(const TransferPtr& transfer, UnmatchedWant want, Time now) {
    const PoolTerms* theirs = open_pool(want.body.terms, want.total);
    Fit result;
    if (theirs == nullptr) {
        result.mismatch = Mismatch{"pool", transfer->pool->name, "closed"};
    } else {
        result = fit({transfer->pool, &transfer->terms}, {theirs, &want.body.terms}, true);
    }
    if (result.mismatch) {
        // The destination compares alike, so that no verdict is needed.
        refuse_want(want.id, AbortCode::layout_mismatch, {}, *result.mismatch);
        stop(transfer, {Cause::layout_mismatch, Delivered::no, {}, *result.mismatch}, now);
        return;
    }
    transfer->want = want.id;
    transfer->pulls = want.pulls;
    transfer->peer_meta = want.body.meta;
    matched_.emplace(want.id, transfer);
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
    watch(*transfer);
    start_source(transfer, want, now);
}

void Session::start_source(const TransferPtr& transfer, const UnmatchedWant& want, Time now) {
    if (!transfer->told && !transfer->meta.empty()) {
        tell(transfer);
    }
    for (const Range& range : want.body.ranges) {
        transfer->asked.add(range);
        transfer->asked_nbytes += range.end - range.begin;
    }
    const bool gated = transfer->gate != nullptr && !transfer->moves_nothing();
    transfer->all_released = !gated;
    if (transfer->moves_nothing()) {  // the word of a match that nothing else will show
        send(FrameType::gated, 0, transfer->want, 0, transfer->told ? transfer->id : 0);
    } else if (want.pulls) {
        locate(transfer);
    }
    if (gated) {
        transfer->released.assign(transfer->spans.size(), false);
        gated_.emplace(transfer->want, transfer);
        release_layers(transfer, now);
    } else if (transfer->located || transfer->moves_nothing()) {
        apply(transfer, Event::all_bytes, now);
    } else {
        transfer->pending = std::move(transfer->asked);
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

// ---- gates

// Moves what the gate has released from `asked` to `pending` (or names it in `fresh`); true when nothing is
// held back.
bool Session::take_released(Transfer& transfer, std::vector<std::uint32_t>& fresh) const {
    bool all = true;
    for (std::size_t i = 0; i < transfer.spans.size(); ++i) {
        const Range span = transfer.spans[i].range;
        if (transfer.released[i] || span.begin == span.end) {
            continue;
        }
        if (!transfer.gate->released(transfer.spans[i].layer)) {
            all = false;
            continue;
        }
        transfer.released[i] = true;
        fresh.push_back(static_cast<std::uint32_t>(i));
        for (const Range& asked : transfer.asked.ranges()) {
            const Range both{std::max(asked.begin, span.begin), std::min(asked.end, span.end)};
            if (both.begin < both.end && !transfer.located) {
                transfer.pending.add(both);
            }
        }
    }
    return all;
}

void Session::release_layers(const TransferPtr& transfer, Time now) {
    if (transfer->gate->failed()) {
        stop(transfer, {Cause::cancelled, Delivered::no, transfer->gate->reason(), {}}, now);
        return;
    }
    std::vector<std::uint32_t> fresh;
    const bool all = take_released(*transfer, fresh);
    if (!fresh.empty() && transfer->located) {
        Header header;
        header.type = FrameType::released;
        header.transfer = transfer->want;
        send(header, encode_released(fresh));
    }
    if (all) {
        gated_.erase(transfer->want);
        transfer->asked.clear();
        transfer->all_released = true;
    }
    const bool unsent = !transfer->pending.empty() || transfer->active != 0;
    set_gate(transfer, !all && (transfer->located ? fresh.empty() : !unsent), now);
    make_ready(transfer);
    if (all && (transfer->located || !unsent)) {
        apply(transfer, Event::all_bytes, now);
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
    send(FrameType::gated, shut ? kGateShut : 0, transfer->want, 0, transfer->told ? transfer->id : 0);
    watch(*transfer);
}

void Session::fail_gates(Time now) {
    std::vector<TransferPtr> failed;
    for (const TransferPtr& transfer : all_unfinished()) {
        if (transfer->role == Role::source && transfer->gate != nullptr && transfer->gate->failed() &&
            !transfer->all_released) {
            failed.push_back(transfer);
        }
    }
    for (const TransferPtr& transfer : failed) {
        stop(transfer, {Cause::cancelled, Delivered::no, transfer->gate->reason(), {}}, now);
    }
}

bool Session::poll_gates(Time now) {
    std::vector<TransferPtr> waiting;
    for (const auto& [want, transfer] : gated_) {
        waiting.push_back(transfer);
    }
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
        if (transfer->pending.empty() ||
            (transfer->state != State::matched && transfer->state != State::moving)) {
            continue;
        }
        const std::uint64_t chunk = std::min(most, chunk_nbytes_for(transfer->nbytes, config_.chunk_nbytes));
        ChunkJob job{transfer, transfer->pending.take_front(chunk), {}};
        job.header.type = FrameType::chunk;
        job.header.attempt = transfer->attempt;
        job.header.body_nbytes = static_cast<std::uint32_t>(job.range.end - job.range.begin);
        job.header.transfer = transfer->want;
        job.header.offset = job.range.begin;
        job.header.total = transfer->nbytes;
        job.header.arg = transfer->told ? transfer->id : 0;
        ++transfer->active;
        ++transfer->chunks;
        transfer->taken_nbytes += job.header.body_nbytes;
        apply(transfer, Event::first_bytes, now);
        make_ready(transfer);
        return job;
    }
    return std::nullopt;
}

std::optional<ChunkJob> Session::next_inline(Time now) {
    if (outbox_.size() > config_.outbox_nbytes / 2) {
        return std::nullopt;  // a control stream that is behind takes no payload
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
    const std::uint64_t nbytes = job.range.end - job.range.begin;
    --transfer->active;
    if (!begun) {
        --transfer->chunks;
        transfer->taken_nbytes -= nbytes;
        return;  // only an ending transfer's chunk is given back
    }
    transfer->moved_at = now;
    ++counters_.chunks_out;
    if (!whole) {
        return;
    }
    counters_.bytes_out += nbytes;
    transfer->sent_nbytes += nbytes;
    if (transfer->active != 0 || !transfer->pending.empty() || transfer->state != State::moving) {
        return;
    }
    if (gated_.contains(transfer->want)) {
        release_layers(transfer, now);  // nothing to send: the gate may be shut
    } else {
        apply(transfer, Event::all_bytes, now);
    }
}

TransferPtr Session::lend(std::uint64_t want, Time now) {
    const auto known = matched_.find(want);
    if (lost_ || known == matched_.end() || !known->second->undecided()) {
        return nullptr;
    }
    Transfer& transfer = *known->second;
    ++transfer.active;
    transfer.moved_at = now;
    if (transfer.first_byte_at == 0) {
        transfer.first_byte_at = now;
    }
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
    const bool copied = transfer->located || transfer->attempt > 1;  // only the destination has counted these
    if (header.total != transfer->asked_nbytes || header.arg < transfer->chunks ||
        (header.arg != transfer->chunks && !copied)) {
        throw Violation("a DONE counts other bytes or chunks than were sent");
    }
    if (transfer->located ? !transfer->all_released : !transfer->all_taken()) {
        throw Violation("a DONE before all bytes were sent");
    }
    if (transfer->state == State::verdict && !transfer->located &&
        transfer->sent_nbytes != transfer->asked_nbytes) {
        throw Violation("a DONE for bytes that were never sent");
    }
    if (transfer->state == State::moving) {
        // The last bytes have left and were verified before the mover could note it. Its note is awaited by
        // quiescing.
        transfer->outcome = {Cause::ok, Delivered::yes, {}, {}};
    }
    transfer->copies = header.arg - transfer->chunks;
    if (transfer->first_byte_at == 0 && !transfer->moves_nothing()) {
        transfer->first_byte_at = transfer->matched_at;  // copies of another process aren't seen
    }
    apply(transfer, Event::done, now);
}

// The source that a destination's ABORT is about. Null when it ended here meanwhile, with what is owed for
// that said.
TransferPtr Session::find_source(const Header& header) {
    if ((header.flags & kOfferId) != 0) {
        if (header.transfer >= next_offer_) {
            throw Violation("an ABORT for an offer that wasn't made");
        }
        const auto known = offers_.find(header.transfer);
        if (known != offers_.end()) {
            return known->second;
        }
        return nullptr;
    }
    if (const auto known = matched_.find(header.transfer); known != matched_.end()) {
        return known->second;
    }
    if (const auto waiting = unmatched_want_keys_.find(header.transfer);
        waiting != unmatched_want_keys_.end()) {
        take_want(std::string(waiting->second));
        send(FrameType::aborted, kFromSource, header.transfer, 0, 0);
    } else if (stop_waiting(waiting_reads_, header.transfer)) {
        send(FrameType::aborted, kFromSource, header.transfer, 0, 0);
    } else if (late_.erase(header.transfer) == 0) {  // else our own ABORT has crossed it
        throw Violation("an ABORT for a transfer that isn't there");
    }
    return nullptr;
}

void Session::on_abort_for_source(const Header& header, const AbortBody& body, Time now) {
    const TransferPtr transfer = find_source(header);
    if (transfer == nullptr) {
        return;
    }
    transfer->peer_ended = true;
    if (transfer->undecided()) {
        transfer->outcome = outcome_by(body, *transfer);
    }
    if (transfer->outcome.cause == Cause::ok) {
        throw Violation("an ABORT after a DONE");
    }
    transfer->outcome.delivered = Delivered::no;
    apply(transfer, Event::peer_ended, now);
}

void Session::on_aborted_for_source(const Header& header, Time now) {
    if ((header.flags & kOfferId) != 0) {
        throw Violation("an ABORTED names an OFFER");
    }
    const auto known = matched_.find(header.transfer);
    if (known == matched_.end()) {
        if (late_.erase(header.transfer) == 0) {
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
