// Where the destination can reach the source's memory: the source says where (LOCATED) in the place of
// chunks, the destination copies by itself.
//
// Both match as ever, so that the source has the destination's order before it says where. RELEASED names
// what a gate lets go. COPIED tells a source that bytes move, which it can't see. When the way breaks, the
// destination stops its copies and asks for what hasn't verified AGAIN, under the next attempt: chunks then,
// and what had verified stays. It is the destination's to say, since only it knows what it has.
#include <algorithm>

#include "protocol/session.hpp"

namespace kvt::protocol {

namespace {

// Between two words that bytes are being copied: several within the source's limit, but no storm of frames.
constexpr Time kLeastReport = 5'000'000, kMostReport = 250'000'000;
constexpr Time kReportsPerStall = 4;

// What of [0, nbytes) isn't in `have`.
std::vector<Range> missing_of(const RangeSet& have, std::uint64_t nbytes) {
    std::vector<Range> missing;
    std::uint64_t at = 0;
    for (const Range& range : have.ranges()) {
        if (range.begin > at) {
            missing.push_back({at, range.begin});
        }
        at = range.end;
    }
    if (at < nbytes) {
        missing.push_back({at, nbytes});
    }
    return missing;
}

}  // namespace

// ---- source

void Session::locate(const TransferPtr& transfer) {
    auto location = transfer->locate();
    if (!location) {
        return;
    }
    transfer->located = true;
    Header header;
    header.type = FrameType::located;
    header.flags = transfer->gate != nullptr ? kBehindGate : 0;
    header.attempt = transfer->attempt;
    header.transfer = transfer->want;
    header.total = static_cast<std::uint64_t>(transfer->limits.stall);
    header.arg = transfer->told ? transfer->id : 0;
    send(header, *location);
}

// The source of a WANT that has been read; null when it has ended here meanwhile.
TransferPtr Session::source_of(std::uint64_t want) const {
    const auto known = matched_.find(want);
    if (known != matched_.end()) {
        return known->second;
    }
    if (!late_.contains(want)) {
        throw Violation("a frame names a WANT that isn't there");
    }
    return nullptr;
}

void Session::on_again(const Header& header, std::span<const std::byte> body, Time now) {
    const std::vector<Range> ranges = decode_ranges(body);
    const TransferPtr transfer = source_of(header.transfer);
    if (transfer == nullptr) {
        return;  // it learns of our end
    }
    if (!transfer->located || header.attempt != transfer->attempt + 1 || ranges.empty() ||
        ranges.back().end > transfer->nbytes) {
        throw Violation("an AGAIN that asks for what can't be had again");
    }
    apply(transfer, Event::again, now);
    if (transfer->state != State::matched) {
        return;
    }
    transfer->attempt = header.attempt;
    transfer->located = false;
    transfer->loan = nullptr;
    transfer->asked.clear();
    std::uint64_t again = 0;
    for (const Range& range : ranges) {
        transfer->asked.add(range);
        again += range.end - range.begin;
    }
    transfer->taken_nbytes = transfer->sent_nbytes = transfer->asked_nbytes - again;
    transfer->resumed_nbytes = transfer->sent_nbytes;
    transfer->moved_at = now;
    if (gated_.contains(transfer->want)) {
        std::fill(transfer->released.begin(), transfer->released.end(), false);
        release_layers(transfer, now);
    } else {
        transfer->pending = std::move(transfer->asked);
        transfer->asked.clear();
        make_ready(transfer);
    }
    watch(*transfer);
}

void Session::on_copied(const Header& header, Time now) {
    const TransferPtr transfer = source_of(header.transfer);
    if (transfer == nullptr) {
        return;
    }
    if (!transfer->located || header.total > transfer->asked_nbytes) {
        throw Violation("a COPIED for what isn't copied");
    }
    if (header.total > transfer->sent_nbytes) {  // else it would move a clock and nothing else
        transfer->sent_nbytes = header.total;
        transfer->moved_at = now;
    }
}

// ---- destination

void Session::set_pulls(bool pulls, Time now) {
    pulls_ = pulls && (config_.capabilities & kCanCopy) != 0;
    if (pulls_) {
        return;
    }
    for (const TransferPtr& transfer : all_unfinished()) {
        if (transfer->role != Role::destination || !transfer->located || !transfer->undecided()) {
            continue;
        }
        transfer->again_due = true;
        transfer->pending.clear();
        seal_if_whole(transfer, now);
    }
}

void Session::on_located(const Header& header, std::span<const std::byte> body, Time now) {
    const TransferPtr transfer = destination(header.transfer);
    if (transfer == nullptr || !transfer->undecided()) {
        return;
    }
    if (!transfer->pulls || transfer->located || transfer->moves_nothing() || transfer->chunks != 0 ||
        transfer->attempt != 1 || header.attempt != 1) {
        throw Violation("a LOCATED for what can't be copied");
    }
    const std::size_t charge = charge_of_location(body.size(), transfer->terms);
    charge_peer(charge);
    transfer->location_charge = charge;
    note_offer(*transfer, header.arg);
    transfer->located = true;
    transfer->location.assign(body.begin(), body.end());
    const Time stall = header.total > static_cast<std::uint64_t>(kNever) ? kNever
                                                                         : static_cast<Time>(header.total);
    transfer->stall_reports = std::clamp(stall / kReportsPerStall, kLeastReport, kMostReport);
    transfer->reported_at = now;
    apply(transfer, Event::match, now);
    watch(*transfer);
    if (!pulls_) {  // it was to be copied when the WANT was sent
        transfer->again_due = true;
        seal_if_whole(transfer, now);
    } else if ((header.flags & kBehindGate) == 0) {
        transfer->pending.add({0, transfer->nbytes});
        copies_.push_back(transfer);
    }
}

void Session::on_released(const Header& header, std::span<const std::byte> body, Time now) {
    const std::vector<std::uint32_t> layers = decode_released(body);
    const TransferPtr transfer = destination(header.transfer);
    if (transfer == nullptr || !transfer->undecided() || transfer->attempt > 1) {
        return;  // it has ended, or asked for chunks meanwhile
    }
    if (!transfer->located) {
        throw Violation("a RELEASED for what isn't copied");
    }
    bool fresh = false;
    for (const std::uint32_t i : layers) {
        if (i >= transfer->spans.size()) {
            throw Violation("a RELEASED names a layer that isn't there");
        }
        const Range span = transfer->spans[i].range;
        if (span.begin == span.end || transfer->again_due) {
            continue;
        }
        if (transfer->claimed.overlaps(span) || transfer->pending.overlaps(span)) {
            throw Violation("a RELEASED names a layer twice");
        }
        transfer->pending.add(span);
        fresh = true;
    }
    if (fresh) {  // a word that names nothing moves no clock: a source could hold us for ever with it
        transfer->moved_at = now;
        copies_.push_back(transfer);
    }
}

std::optional<ChunkTarget> Session::next_copy(Time now) {
    while (!copies_.empty()) {
        const TransferPtr transfer = copies_.front();
        copies_.pop_front();
        if (transfer->pending.empty() || !transfer->located ||
            (transfer->state != State::matched && transfer->state != State::moving)) {
            continue;
        }
        const Range range = transfer->pending.take_front(kMaxChunkNbytes);
        transfer->claimed.add(range);
        ++transfer->active;
        ++transfer->copies;
        apply(transfer, Event::first_bytes, now);
        if (!transfer->pending.empty()) {
            copies_.push_back(transfer);
        }
        return ChunkTarget{transfer, range, true};
    }
    return std::nullopt;
}

void Session::report_copies(Transfer& transfer, Time now) {
    if (transfer.located && now - transfer.reported_at >= transfer.stall_reports &&
        transfer.verified.nbytes() < transfer.nbytes) {
        transfer.reported_at = now;
        send(FrameType::copied, 0, transfer.want, transfer.verified.nbytes(), 0);
    }
}

void Session::copy_broke(const ChunkTarget& target, Time now) {
    const TransferPtr& transfer = target.transfer;
    --transfer->active;
    if (transfer->state == State::draining) {
        check_drained(transfer, now);
    } else if (transfer->state == State::moving) {
        transfer->again_due = true;
        transfer->pending.clear();
        seal_if_whole(transfer, now);
    }
}

// No copy of it runs any more, and something is missing.
void Session::ask_again(const TransferPtr& transfer, Time now) {
    RangeSet have = transfer->verified;
    for (const Range& range : transfer->corrupt.ranges()) {
        have.add(range);
    }
    const std::vector<Range> missing = missing_of(have, transfer->nbytes);
    if (missing.size() > kMaxRanges) {  // copies go front to back, a few at once: it takes thousands of gaps
        stop(transfer, {Cause::resource_limit, Delivered::no, "too many pieces are missing", {}}, now);
        return;
    }
    transfer->claimed = std::move(have);
    transfer->resumed_nbytes = transfer->verified.nbytes();
    transfer->located = transfer->again_due = false;
    transfer->moved_at = now;
    Header header;
    header.type = FrameType::again;
    header.attempt = ++transfer->attempt;
    header.transfer = transfer->want;
    send(header, encode_ranges(missing));
}

}  // namespace kvt::protocol
