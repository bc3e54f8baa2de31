// The destination's half of a session: it says what it wants, knows what must come, and decides.
#include <algorithm>

#include "protocol/session.hpp"

namespace kvt::protocol {

TransferPtr Session::destination(std::uint64_t want) const {
    const auto known = wants_.find(want);
    return known == wants_.end() ? nullptr : known->second;
}

void Session::on_offer(const Header& header, std::span<const std::byte> raw, Time now) {
    if (header.transfer <= last_offer_seen_) {
        throw Violation("an OFFER's id isn't new");
    }
    last_offer_seen_ = header.transfer;
    OfferBody body = decode_offer(raw);
    const PoolTerms& theirs = peer_pool(body.terms);
    if (stream_nbytes(theirs, body.terms) != header.total) {
        throw Violation("an OFFER's bytes aren't those of its terms");
    }
    if (const auto refused = refusals_.find(body.key); refused != refusals_.end() && refused->second.until > now) {
        Header answer;
        answer.type = FrameType::abort;
        answer.flags = kOfferId;
        answer.transfer = header.transfer;
        send(answer, encode_abort({AbortCode::refused, refused->second.reason, {}}));
        refusals_.erase(refused);
        return;
    }
    const auto mine = destination_keys_.find(body.key);
    if (mine != destination_keys_.end() && !mine->second->offer_seen && mine->second->state != State::stopping &&
        mine->second->state != State::ending && mine->second->state != State::draining) {
        const TransferPtr transfer = mine->second;
        match_destination(transfer, header.transfer, std::move(body), now);
        return;
    }
    if (unmatched_offers_.size() >= config_.unmatched) {
        throw Excess("the peer has more than " + std::to_string(config_.unmatched) + " unmatched OFFERs");
    }
    std::string key = body.key;
    if (!unmatched_offers_.emplace(key, UnmatchedOffer{header.transfer, std::move(body)}).second) {
        throw Violation("two OFFERs wait under one key");
    }
    unmatched_offer_keys_.emplace(header.transfer, std::move(key));
}

void Session::match_destination(const TransferPtr& transfer, std::uint64_t offer, OfferBody body, Time now) {
    const auto pool = peer_pools_.find(body.terms.pool);
    Fit result;
    if (pool == peer_pools_.end()) {
        result.mismatch = Mismatch{"pool", transfer->pool->name, "closed"};
    } else {
        result = fit({&pool->second, &body.terms}, {transfer->pool, &transfer->terms}, false);
    }
    if (result.mismatch) {
        if (!transfer->told) {
            Header header;
            header.type = FrameType::abort;
            header.flags = kOfferId;
            header.transfer = offer;
            send(header, encode_abort({AbortCode::layout_mismatch, {}, *result.mismatch}));
        }
        stop(transfer, {Cause::layout_mismatch, Delivered::no, {}, *result.mismatch}, now);
        return;
    }
    transfer->offer_seen = true;
    transfer->partner = offer;
    transfer->peer_meta = std::move(body.meta);
    transfer->peer_location = std::move(body.location);
    if (!transfer->told) {
        tell(transfer);
    }
    if (transfer->outstanding) {
        transfer->outstanding = false;
        --outstanding_;
    }
    if (config_.memory_backend) {
        apply(transfer, Event::match, now);
        Cause cause{};
        watch(deadline_of(*transfer, cause));
        if (!body.gated && !transfer->moves_nothing()) {    // else RELEASED names the layers
            transfer->pending.add({0, transfer->nbytes});
            copies_.push_back(transfer);
        }
    }
    // Over a stream the offer is a hint that may be withdrawn: only GATED or a chunk is a match.
    seal_if_whole(transfer, now);
}

ChunkTarget Session::chunk_begin(const Header& header, Time now) {
    heard_at_ = now;
    const TransferPtr transfer = destination(header.transfer);
    if (transfer == nullptr || config_.memory_backend) {
        throw Violation("a CHUNK for a transfer that isn't there");
    }
    const Range range{header.offset, header.offset + header.body_nbytes};
    if (header.total != transfer->nbytes || header.offset > transfer->nbytes || header.body_nbytes > transfer->nbytes - header.offset) {
        throw Violation("a CHUNK reaches beyond its transfer");
    }
    if (!transfer->told) {
        throw Violation("a CHUNK before its WANT");
    }
    ++transfer->chunks;
    ++transfer->active;
    const State state = transfer->state;
    if (state != State::posted && state != State::matched && state != State::moving) {
        ++counters_.drained_chunks;
        counters_.drained_bytes += header.body_nbytes;
        if (transfer->peer_count_known && transfer->chunks > transfer->peer_chunks) {
            throw Violation("more chunks than the source said it had begun");
        }
        return {transfer, range, false};
    }
    if (header.attempt != transfer->attempt || transfer->claimed.overlaps(range)) {
        throw Violation("a CHUNK's bytes have come before");
    }
    transfer->claimed.add(range);
    transfer->offer_due = transfer->offer_due || (header.flags & kChunkOfferDue) != 0;
    if (transfer->gate_shut) {
        transfer->gate_shut = false;    // the bytes overtook GATED(open)
    }
    apply(transfer, Event::first_bytes, now);
    Cause cause{};
    watch(deadline_of(*transfer, cause));
    return {transfer, range, true};
}

void Session::chunk_end(const ChunkTarget& target, const Trailer& trailer, bool verified, Time now) {
    const TransferPtr& transfer = target.transfer;
    --transfer->active;
    ++counters_.chunks_in;
    heard_at_ = now;
    const State state = transfer->state;
    if (state == State::draining) {
        check_drained(transfer, now);
        return;
    }
    if (!target.store || (state != State::moving && state != State::matched)) {
        return;
    }
    transfer->moved_at = now;
    if (trailer.status == ChunkStatus::aborted) {
        return;    // never sealed: the source's ABORT follows on control
    }
    if (!config_.memory_backend && trailer.kind != config_.digest) {
        throw Violation("a chunk's digest isn't of the kind agreed");
    }
    counters_.bytes_in += target.range.end - target.range.begin;
    if (verified) {
        transfer->verified.add(target.range);
    } else {
        ++counters_.corrupt_chunks;
        transfer->corrupt.add(target.range);
    }
    seal_if_whole(transfer, now);
}

void Session::seal_if_whole(const TransferPtr& transfer, Time now) {
    if (transfer->active != 0 || (transfer->offer_due && !transfer->offer_seen)) {
        return;
    }
    if (transfer->moves_nothing()) {
        if (transfer->offer_seen && !transfer->finished) {
            apply(transfer, Event::sealed, now);
        }
        return;
    }
    if (transfer->verified.nbytes() == transfer->nbytes) {
        apply(transfer, Event::sealed, now);
    } else if (!transfer->corrupt.empty() && transfer->verified.nbytes() + transfer->corrupt.nbytes() == transfer->nbytes) {
        // Everything else was let through, so that the caller needs to ask only for the blocks that are bad.
        stop(transfer, {Cause::integrity, Delivered::no, "the digest of landed bytes doesn't agree", {}}, now);
    }
}

std::optional<ChunkTarget> Session::next_copy(Time now) {
    while (!copies_.empty()) {
        const TransferPtr transfer = copies_.front();
        copies_.pop_front();
        if (transfer->pending.empty() || (transfer->state != State::matched && transfer->state != State::moving)) {
            continue;
        }
        const Range range = transfer->pending.take_front(kMaxChunkNbytes);
        transfer->claimed.add(range);
        ++transfer->active;
        ++transfer->chunks;
        apply(transfer, Event::first_bytes, now);
        if (!transfer->pending.empty()) {
            copies_.push_back(transfer);
        }
        return ChunkTarget{transfer, range, true};
    }
    return std::nullopt;
}

void Session::check_drained(const TransferPtr& transfer, Time now) {
    if (transfer->state != State::draining || transfer->active != 0) {
        return;
    }
    if (config_.memory_backend || (transfer->peer_count_known && transfer->chunks >= transfer->peer_chunks)) {
        apply(transfer, Event::drained, now);
        forget(transfer);
    }
}

void Session::on_abort_for_destination(const Header& header, const AbortBody& body, Time now) {
    if ((header.flags & kOfferId) != 0) {
        if (const auto waiting = unmatched_offer_keys_.find(header.transfer); waiting != unmatched_offer_keys_.end()) {
            unmatched_offers_.erase(waiting->second);
            unmatched_offer_keys_.erase(waiting);
            if (config_.memory_backend) {
                send(FrameType::aborted, kOfferId, header.transfer, 0, 0);
            }
            return;
        }
        if (header.transfer > last_offer_seen_) {
            throw Violation("an ABORT for an offer that isn't there");
        }
        withdraw_offer(header.transfer, body, now);
        return;
    }
    const TransferPtr transfer = destination(header.transfer);
    if (transfer == nullptr) {
        if (header.transfer >= next_want_) {
            throw Violation("an ABORT for a WANT that wasn't sent");
        }
        return;    // over here, and DONE is on its way
    }
    if (header.arg < transfer->chunks) {
        throw Violation("an ABORT counts fewer chunks than have come");
    }
    transfer->peer_count_known = true;
    transfer->peer_chunks = header.arg;
    const State state = transfer->state;
    if (state == State::posted || state == State::matched || state == State::moving) {
        transfer->peer_ended = true;
        const bool mismatch = body.code == AbortCode::layout_mismatch;
        const Mismatch ours{body.mismatch.path, body.mismatch.theirs, body.mismatch.ours};
        transfer->outcome = {mismatch ? Cause::layout_mismatch : Cause::peer_aborted, Delivered::no, body.reason, ours};
    }
    apply(transfer, Event::peer_ended, now);
    check_drained(transfer, now);
}

// The offer had met its partner here. Over a stream that one waits on as if the offer had never come; a destination that
// copies is told that there is nothing to copy any more.
void Session::withdraw_offer(std::uint64_t offer, const AbortBody& body, Time now) {
    for (const auto& [key, transfer] : destination_keys_) {
        if (transfer->partner != offer) {
            continue;
        }
        const TransferPtr found = transfer;
        if (!config_.memory_backend) {
            found->offer_seen = false;
            found->partner = 0;
            return;
        }
        if (!found->finished) {
            found->outcome = {Cause::peer_aborted, Delivered::no, body.reason, {}};
            apply(found, Event::peer_ended, now);
        }
        return;
    }
}

void Session::on_aborted_for_destination(const Header& header, Time now) {
    const TransferPtr transfer = destination(header.transfer);
    if (transfer == nullptr) {
        if (header.transfer >= next_want_) {
            throw Violation("an ABORTED for a WANT that wasn't sent");
        }
        return;
    }
    if (transfer->state != State::draining) {
        throw Violation("an ABORTED that answers nothing");
    }
    if (!config_.memory_backend && header.arg < transfer->chunks) {
        throw Violation("an ABORTED counts fewer chunks than have come");
    }
    transfer->peer_count_known = true;
    transfer->peer_chunks = header.arg;
    check_drained(transfer, now);
}

void Session::on_gated(const Header& header, Time now) {
    const TransferPtr transfer = destination(header.transfer);
    if (transfer == nullptr) {
        if (header.transfer >= next_want_) {
            throw Violation("a GATED for a WANT that wasn't sent");
        }
        return;
    }
    const State state = transfer->state;
    if (state != State::posted && state != State::matched && state != State::moving) {
        return;
    }
    transfer->gate_shut = (header.flags & kGateShut) != 0;
    if (transfer->gate_shut) {
        transfer->waits_since = now;
    } else {
        transfer->moved_at = now;
    }
    apply(transfer, Event::match, now);
    Cause cause{};
    watch(deadline_of(*transfer, cause));
}

void Session::on_released(const Header& header, std::span<const std::byte> body, Time now) {
    const std::vector<std::uint32_t> layers = decode_released(body);
    if (!config_.memory_backend) {
        throw Violation("a RELEASED on a stream backend");
    }
    const TransferPtr transfer = destination(header.transfer);
    if (transfer == nullptr || (transfer->state != State::posted && transfer->state != State::matched && transfer->state != State::moving)) {
        return;
    }
    for (const std::uint32_t i : layers) {
        if (i >= transfer->spans.size()) {
            throw Violation("a RELEASED names a layer that isn't there");
        }
        const Range span = transfer->spans[i].range;
        if (span.begin == span.end) {
            continue;
        }
        if (transfer->claimed.overlaps(span) || transfer->pending.overlaps(span)) {
            throw Violation("a RELEASED names a layer twice");
        }
        transfer->pending.add(span);
    }
    transfer->moved_at = now;
    if (transfer->offer_seen) {
        copies_.push_back(transfer);
    }
}

}  // namespace kvt::protocol
