// The destination's half of a session: it says what it wants, knows what must come, and decides.
#include <algorithm>

#include "protocol/session.hpp"

namespace kvt::protocol {

namespace {

// Chunks come nearly in order over a few lanes, gated layers in any order: more pieces of a stream than this
// are a peer's attempt to make us keep and search them.
constexpr std::size_t kMaxFragments = 8192;

}  // namespace

TransferPtr Session::destination(std::uint64_t want) const {
    if (want >= next_want_) {
        throw Violation("a frame names a WANT that wasn't sent");
    }
    const auto known = wants_.find(want);
    return known == wants_.end() ? nullptr : known->second;
}

// ---- matching

// The WANT that the source reads first after an OFFER with this floor: that one is the OFFER's, also when it
// has ended here.
TransferPtr Session::partner_of(const std::string& key, std::uint64_t floor) const {
    TransferPtr first;
    const auto consider = [&](const TransferPtr& transfer) {
        if (transfer->told && transfer->id > floor && transfer->partner == 0 &&
            (first == nullptr || transfer->id < first->id)) {
            first = transfer;
        }
    };
    const auto [begin, end] = tombstones_.equal_range(key);
    std::for_each(begin, end, [&](const auto& item) { consider(item.second); });
    const auto live = destination_keys_.find(key);
    if (live != destination_keys_.end()) {
        consider(live->second);
        if (first == nullptr && !live->second->told && live->second->state == State::posted) {
            return live->second;
        }
    }
    return first;
}

void Session::on_offer(const Header& header, std::span<const std::byte> raw, Time now) {
    if (header.transfer <= last_offer_seen_) {
        throw Violation("an OFFER's id isn't new");
    }
    last_offer_seen_ = header.transfer;
    if (header.arg >= next_want_) {
        throw Violation("an OFFER's floor is a WANT that wasn't sent");
    }
    OfferBody body = decode_offer(raw);
    const PoolTerms& theirs = peer_pool(body.terms);
    if (stream_nbytes(theirs, body.terms) != header.total) {
        throw Violation("an OFFER's bytes aren't those of its terms");
    }
    const TransferPtr mine = partner_of(body.key, header.arg);
    if (mine != nullptr && (mine->told || room_to_answer(*mine))) {
        match_destination(mine, {header.transfer, header.total, 0, false, std::move(body)}, now);
    } else if (const auto reason = take_refusal(body.key, now)) {
        refuse_offer(header.transfer, AbortCode::refused, *reason, {});
    } else {
        keep({header.transfer, header.total, 0, false, std::move(body)});
        if (mine != nullptr) {
            unanswered_.push_back(mine);
        }
    }
}

void Session::match_destination(const TransferPtr& transfer, UnmatchedOffer offer, Time now) {
    transfer->offer_seen = true;
    transfer->partner = offer.id;
    if (transfer->told) {
        partners_.emplace(offer.id, transfer);
    }
    if (!transfer->undecided()) {
        return;  // the source learns of the end by what is said of the WANT
    }
    const PoolTerms* theirs = open_pool(offer.body.terms, offer.total);
    Fit result;
    if (theirs == nullptr) {
        result.mismatch = Mismatch{"pool", transfer->pool->name, "closed"};
    } else {
        result = fit({theirs, &offer.body.terms}, {transfer->pool, &transfer->terms}, false);
    }
    if (result.mismatch) {
        if (!transfer->told) {
            refuse_offer(offer.id, AbortCode::layout_mismatch, {}, *result.mismatch);
        }
        stop(transfer, {Cause::layout_mismatch, Delivered::no, {}, *result.mismatch}, now);
        return;
    }
    partners_.emplace(offer.id, transfer);
    transfer->peer_meta = std::move(offer.body.meta);
    if (!transfer->told) {
        count_outstanding(*transfer, true);  // the offer may be withdrawn: then the WANT waits like any other
        tell(transfer);
    }
    seal_if_whole(transfer, now);
}

// The source's word on which OFFER of it this transfer is; what another one had said is void.
void Session::note_offer(Transfer& transfer, std::uint64_t offer) const {
    if (transfer.offer_known) {
        if (transfer.offer_due != offer) {
            throw Violation("a transfer's frames name different OFFERs");
        }
        return;
    }
    if (offer != 0 && offer != transfer.partner && offer <= last_offer_seen_) {
        throw Violation("a transfer's frame names another's OFFER");
    }
    transfer.offer_known = true;
    transfer.offer_due = offer;
}

// ---- chunks

ChunkTarget Session::chunk_begin(const Header& header, Time now) {
    if (!lie_.empty()) {
        throw Violation(lie_);
    }
    const TransferPtr transfer = destination(header.transfer);
    if (transfer == nullptr || transfer->located) {
        throw Violation("a CHUNK for a transfer that isn't there, or that is copied");
    }
    if (header.total != transfer->nbytes || header.offset > transfer->nbytes ||
        header.body_nbytes > transfer->nbytes - header.offset) {
        throw Violation("a CHUNK reaches beyond its transfer");
    }
    if (header.attempt != transfer->attempt) {
        throw Violation("a CHUNK is of another attempt");
    }
    const Range range{header.offset, header.offset + header.body_nbytes};
    const bool store = transfer->undecided();
    if (store) {
        claim_chunk(transfer, header, range, now);
    } else {
        ++counters_.drained_chunks;
        counters_.drained_bytes += header.body_nbytes;
        if (transfer->peer_count_known && transfer->chunks >= transfer->peer_chunks) {
            throw Violation("more chunks than the source said it had begun");
        }
    }
    ++transfer->chunks;
    ++transfer->active;
    return {transfer, range, store};
}

void Session::claim_chunk(const TransferPtr& transfer, const Header& header, Range range, Time now) {
    if (transfer->claimed.overlaps(range)) {
        throw Violation("a CHUNK's bytes have come before");
    }
    if (transfer->claimed.ranges().size() >= kMaxFragments ||
        transfer->verified.ranges().size() >= kMaxFragments) {
        throw Excess("a transfer's chunks come in too many pieces");
    }
    note_offer(*transfer, header.arg);
    transfer->claimed.add(range);
    apply(transfer, Event::first_bytes, now);
    watch(*transfer);
}

void Session::chunk_end(const ChunkTarget& target, const Trailer& trailer, bool verified, Time now) {
    const TransferPtr& transfer = target.transfer;
    --transfer->active;
    ++counters_.chunks_in;
    if (transfer->state == State::draining) {
        check_drained(transfer, now);
        return;
    }
    if (!target.store || transfer->state != State::moving) {
        return;
    }
    transfer->moved_at = now;
    if (trailer.status == ChunkStatus::aborted) {
        return;  // never sealed: the source's ABORT follows on control
    }
    if (!transfer->located && trailer.kind != config_.digest) {
        throw Violation("a chunk's digest isn't of the kind agreed");
    }
    counters_.bytes_in += target.range.end - target.range.begin;
    if (verified) {
        transfer->verified.add(target.range);
    } else {
        ++counters_.corrupt_chunks;
        transfer->corrupt.add(target.range);
    }
    report_copies(*transfer, now);
    seal_if_whole(transfer, now);
}

void Session::seal_if_whole(const TransferPtr& transfer, Time now) {
    const bool started = transfer->state == State::matched || transfer->state == State::moving;
    if (!started || transfer->active != 0) {
        return;
    }
    if (!transfer->offer_known || (transfer->offer_due != 0 && transfer->offer_due != transfer->partner)) {
        return;  // its OFFER, with the meta, is still under way
    }
    if (transfer->verified.nbytes() == transfer->nbytes) {
        if (transfer->offer_due == 0) {
            transfer->peer_meta.clear();  // of an OFFER that was withdrawn
        }
        apply(transfer, Event::sealed, now);
        return;
    }
    const bool whole = transfer->verified.nbytes() + transfer->corrupt.nbytes() == transfer->nbytes;
    if (!transfer->corrupt.empty() && (whole || transfer->corrupt.ranges().size() >= kMaxFragments / 2)) {
        // Everything else was let through, so that the caller needs to ask only for the blocks that are bad.
        stop(transfer, {Cause::integrity, Delivered::no, "the digest of landed bytes doesn't agree", {}},
             now);
    } else if (transfer->again_due) {
        ask_again(transfer, now);
    }
}

// ---- the end

void Session::check_drained(const TransferPtr& transfer, Time now) {
    if (transfer->state != State::draining || transfer->active != 0 || !transfer->peer_count_known) {
        return;
    }
    if (transfer->chunks >= transfer->peer_chunks) {
        apply(transfer, Event::drained, now);
        forget(transfer);
    }
}

// What a peer's ABORT is to our user.
Outcome Session::outcome_by(const AbortBody& body, const Transfer& transfer) const {
    const Mismatch ours{body.mismatch.path, body.mismatch.theirs, body.mismatch.ours};
    Cause cause = Cause::peer_aborted;
    if (body.code == AbortCode::layout_mismatch) {
        cause = Cause::layout_mismatch;
    } else if (body.code == AbortCode::grant && transfer.use != nullptr) {
        cause = admitted_.contains(transfer.use->token) ? Cause::grant_stale : Cause::grant_denied;
    }
    return {cause, Delivered::no, body.reason, ours};
}

void Session::end_by_peer(const TransferPtr& transfer, const AbortBody& body, Time now) {
    if (transfer->undecided()) {
        transfer->peer_ended = true;
        transfer->outcome = outcome_by(body, *transfer);
    }
    apply(transfer, Event::peer_ended, now);
    check_drained(transfer, now);
}

void Session::on_abort_for_destination(const Header& header, const AbortBody& body, Time now) {
    if ((header.flags & kOfferId) != 0) {
        on_withdrawn(header.transfer, body, now);
        return;
    }
    const TransferPtr transfer = destination(header.transfer);
    if (transfer == nullptr) {
        return;  // over here, and DONE is on its way
    }
    if (transfer->peer_count_known) {
        throw Violation("a second ABORT of one transfer");
    }
    if (header.arg < transfer->chunks) {
        throw Violation("an ABORT counts fewer chunks than have come");
    }
    transfer->peer_count_known = true;
    transfer->peer_chunks = header.arg;
    end_by_peer(transfer, body, now);
}

// An offer is taken back: a destination that it had met waits on as if it had never come.
void Session::on_withdrawn(std::uint64_t offer, const AbortBody& body, Time now) {
    if (offer > last_offer_seen_) {
        throw Violation("an ABORT for an offer that wasn't made");
    }
    if (const auto waiting = unmatched_offer_keys_.find(offer); waiting != unmatched_offer_keys_.end()) {
        take_offer(std::string(waiting->second));
        return;
    }
    if (stop_waiting(waiting_writes_, offer)) {
        return;
    }
    const auto met = partners_.find(offer);
    if (met == partners_.end()) {
        return;  // refused, or over
    }
    const TransferPtr transfer = met->second;
    if (!transfer->two_sided()) {  // its WANT is under way, and the answer to that will end the tombstone
        if (transfer->undecided()) {
            end_by_peer(transfer, body, now);
        }
        return;
    }
    partners_.erase(met);
    transfer->partner = 0;
    transfer->offer_seen = false;
    transfer->peer_meta.clear();
}

void Session::on_aborted_for_destination(const Header& header, Time now) {
    if ((header.flags & kOfferId) != 0) {
        throw Violation("an ABORTED of a source names an OFFER");
    }
    const TransferPtr transfer = destination(header.transfer);
    if (transfer == nullptr) {
        return;
    }
    if (transfer->state != State::draining || transfer->peer_count_known) {
        throw Violation("an ABORTED that answers nothing");
    }
    if (header.arg < transfer->chunks) {
        throw Violation("an ABORTED counts fewer chunks than have come");
    }
    transfer->peer_count_known = true;
    transfer->peer_chunks = header.arg;
    check_drained(transfer, now);
}

// ---- gates

void Session::on_gated(const Header& header, Time now) {
    const TransferPtr transfer = destination(header.transfer);
    if (transfer == nullptr || transfer->state == State::sent || !transfer->undecided()) {
        return;
    }
    note_offer(*transfer, header.arg);
    const bool shut = (header.flags & kGateShut) != 0;
    // A word that only repeats what is known moves no clock: a source could hold us for ever with it.
    if (transfer->state == State::posted) {
        apply(transfer, Event::match, now);
    }
    if (transfer->gate_shut != shut) {
        transfer->gate_shut = shut;
        if (shut) {
            transfer->waits_since = now;
        } else {
            transfer->moved_at = now;
        }
    }
    watch(*transfer);
    seal_if_whole(transfer, now);
}

}  // namespace kvt::protocol
