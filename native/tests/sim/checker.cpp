#include "checker.hpp"

#include <algorithm>

namespace kvt::sim {

using namespace protocol;

std::string Checker::name(const History& h) {
    return std::string(name_of(h.role)) + " '" + h.key + "' #" + std::to_string(h.uid) + " of " +
           static_cast<char>('A' + h.machine);
}

void Checker::posted(Record& record, Memory& memory) {
    History& h = *record.history;
    h.uid = all_.size();
    h.key = record.key;
    h.meta = record.meta;
    h.gated = record.gate != nullptr;
    h.limits = record.limits;
    h.posted_at = clock_.now();
    if (h.role == Role::source) {
        for (const Row& row : h.rows) {
            for (std::size_t i = 0; i < row.blocks.size(); ++i) {
                const std::byte* piece = memory.piece(row.layer, row.blocks[i]);
                auto& content = h.content[{row.layer, i}];
                content.assign(piece, piece + memory.piece_nbytes(row.layer));
                if (h.gated) {  // what the memory will hold once the layer is released
                    std::reverse(content.begin(), content.end());
                    content[0] = ~*piece;
                }
            }
        }
    }
    clock_.trace("%c posts %s, %llu bytes%s%s", 'A' + static_cast<int>(h.machine), name(h).c_str(),
                 static_cast<unsigned long long>(record.nbytes), h.gated ? ", gated" : "",
                 h.mismatching ? ", mismatching" : "");
    all_.push_back({record.history, record.weak_from_this(), {}});
}

void Checker::over(Record& record, Memory& memory) {
    History& h = *record.history;
    ++h.outcomes;
    h.over_at = clock_.now();
    h.outcome = record.outcome;
    h.peer_meta = record.peer_meta;
    clock_.trace("%c over: %s cause %d delivered %d %s", 'A' + static_cast<int>(h.machine), name(h).c_str(),
                 static_cast<int>(h.outcome.cause), static_cast<int>(h.outcome.delivered),
                 h.outcome.reason.c_str());
    if (h.outcomes != 1) {
        broken("two outcomes: " + name(h));
    }
    ok_ += h.outcome.cause == Cause::ok ? 1 : 0;
    check_cause(h);
    check_times(h);
    if (h.role == Role::destination) {
        check_destination(record, all_[h.uid], memory);
        check_taken(h);
    }
}

void Checker::check_cause(const History& h) const {
    const auto key_had = [&](auto what) {
        return std::any_of(all_.begin(), all_.end(),
                           [&](const Entry& e) { return e.history->key == h.key && what(*e.history); });
    };
    const bool gate_failed = std::find(failed_gates_.begin(), failed_gates_.end(), h.key) !=
                             failed_gates_.end();
    switch (h.outcome.cause) {
        case Cause::protocol_error:
        case Cause::resource_limit: broken("an honest peer is accused: " + name(h)); break;
        case Cause::layout_mismatch:
            if (!key_had([](const History& other) { return other.mismatching; }))
                broken("a mismatch of what fits: " + name(h));
            break;
        case Cause::integrity:
            if (corruptions_ == 0) broken("a digest fails without cause: " + name(h));
            break;
        case Cause::cancelled:
            if (!h.asked_to_stop && !gate_failed) broken("cancelled by nobody: " + name(h));
            break;
        case Cause::peer_lost:
            if (cut_at_ < 0 && !crashed_[0] && !crashed_[1]) broken("lost without a loss: " + name(h));
            break;
        case Cause::timeout_gate:
            if (!key_had([](const History& other) { return other.gated; }))
                broken("a gate that isn't there: " + name(h));
            break;
        default: break;
    }
}

void Checker::check_times(const History& h) const {
    const Time lived = h.over_at - h.posted_at;
    if (h.limits.total != kNever && lived > h.limits.total + late()) {
        broken("the total limit is passed by " + std::to_string((lived - h.limits.total) / kMs) +
               " ms: " + name(h));
    }
    const Cause cause = h.outcome.cause;
    const bool may_be_gated = std::any_of(all_.begin(), all_.end(), [&](const Entry& e) {
        return e.history->key == h.key && e.history->gated;
    });
    if (cause == Cause::timeout_bytes && h.moved_at >= 0 && !may_be_gated &&
        h.over_at > h.moved_at + bytes_limit(h) + late()) {
        broken("the limit without bytes is passed: " + name(h));
    }
    const bool early = (cause == Cause::timeout_match && lived < h.limits.match) ||
                       (cause == Cause::timeout_bytes && lived < h.limits.stall) ||
                       (cause == Cause::timeout_gate && lived < h.limits.match) ||
                       (cause == Cause::timeout_total && lived < h.limits.total);
    if (early) {
        broken("a deadline before its time: " + name(h));
    }
}

bool Checker::could_meet(const History& one, const History& other) const {
    return one.key == other.key && one.machine != other.machine && one.role != other.role &&
           (other.over_at < 0 || other.over_at >= one.posted_at) &&
           (one.over_at < 0 || one.over_at >= other.posted_at);
}

bool Checker::same_bytes(const History& destination, const History& source, const std::vector<Range>& ranges,
                         Memory& memory) const {
    std::uint64_t at = 0;
    for (const Row& row : destination.rows) {
        const std::size_t piece = memory.piece_nbytes(row.layer);
        for (std::size_t i = 0; i < row.blocks.size(); ++i, at += piece) {
            for (const Range& range : ranges) {
                const std::uint64_t from = std::max(range.begin, at),
                                    to = std::min<std::uint64_t>(range.end, at + piece);
                if (from >= to) {
                    continue;
                }
                const auto known = source.content.find({row.layer, i});
                if (known == source.content.end() || known->second.size() != piece ||
                    !std::equal(known->second.begin() + static_cast<long>(from - at),
                                known->second.begin() + static_cast<long>(to - at),
                                memory.piece(row.layer, row.blocks[i]) + (from - at))) {
                    return false;
                }
            }
        }
    }
    return true;
}

void Checker::check_destination(Record& record, Entry& entry, Memory& memory) {
    const History& h = *entry.history;
    const bool ok = h.outcome.cause == Cause::ok;
    std::vector<Range> sealed = record.verified.ranges();
    if (ok && record.nbytes != 0) {
        sealed = {{0, record.nbytes}};
    }
    for (const Entry& other : all_) {
        if (h.taken ? other.history.get() != h.partner : other.history->shown) {
            continue;
        }
        // An empty receive may meet the offer of a source that left without knowing.
        const bool met = could_meet(h, *other.history) ||
                         (ok && h.empty && other.history->key == h.key &&
                          other.history->role == Role::source &&
                          other.history->outcome.delivered == Delivered::unknown);
        if (met && same_bytes(h, *other.history, sealed, memory) &&
            (!ok || !other.history->mismatching || h.mismatching)) {
            entry.candidates.push_back(other.history.get());
        }
    }
    if (entry.candidates.empty() && (ok || !sealed.empty())) {
        broken("sealed what no source meant: " + name(h));
    }
    const bool meta_known = std::any_of(entry.candidates.begin(), entry.candidates.end(),
                                        [&](const History* s) { return s->meta == h.peer_meta; });
    if (ok && !meta_known) {
        broken("a meta that its source didn't give: " + name(h));
    }
}

// One read without a lease is all that a grant which counts its readers has for each; whoever gave its last
// lease back has had it. Two at once are one.
void Checker::check_taken(const History& h) const {
    if (!h.taken || !h.counted || h.leased) {
        return;
    }
    for (const Entry& entry : all_) {
        const History& before = *entry.history;
        if (before.key == h.key && before.machine == h.machine && before.role == h.role &&
            before.outcomes != 0 && before.outcome.cause == Cause::ok && before.over_at < h.posted_at) {
            broken("read twice by one reader, and nobody was asked: " + name(h));
        }
    }
}

void Checker::check_told(unsigned owner, bool all) const {
    const auto& counted = counted_[1 - owner];
    const auto& told = told_[owner];
    if (told.size() > counted.size() || (all && told.size() != counted.size()) ||
        !std::equal(told.begin(), told.end(), counted.begin())) {
        broken("an owner isn't told who has read");
    }
}

void Checker::check_source(const History& s) const {
    bool sealed = false, surely = false, meta = false;
    for (const Entry& entry : all_) {
        const History& d = *entry.history;
        const auto record = entry.record.lock();
        // A machine that crashed may have decided without having told its user.
        const bool ok = d.outcome.cause == Cause::ok && d.outcomes == 1;
        const bool decided = ok || (crashed_[d.machine] && record != nullptr &&
                                    record->state == State::over && record->outcome.cause == Cause::ok);
        if (d.role != Role::destination || d.taken || !decided || !could_meet(s, d)) {
            continue;
        }
        const bool maybe = !ok || std::find(entry.candidates.begin(), entry.candidates.end(), &s) !=
                                      entry.candidates.end();
        sealed = sealed || maybe;
        meta = meta || (maybe && d.meta == s.peer_meta);
        surely = surely || (ok && entry.candidates.size() == 1 && entry.candidates[0] == &s);
    }
    if (s.outcome.cause == Cause::ok && !sealed) {
        broken("the source succeeded, no destination has sealed: " + name(s));
    }
    if (s.outcome.cause == Cause::ok && !meta) {
        broken("a meta that its destination didn't give: " + name(s));
    }
    if (s.outcome.cause != Cause::ok && s.outcome.delivered == Delivered::no && surely) {
        broken("said not to be delivered, and sealed: " + name(s));
    }
    if (calm_ && cut_at_ < 0 && stalled_ == 0 && surely && s.outcome.cause != Cause::ok) {
        broken("sealed, and the source doesn't know: " + name(s));
    }
    if ((s.outcome.cause == Cause::ok) != (s.outcome.delivered == Delivered::yes)) {
        broken("outcome and delivered disagree: " + name(s));
    }
}

void Checker::finish() const {
    for (const Entry& entry : all_) {
        const History& h = *entry.history;
        if (crashed_[h.machine] || h.shown) {
            continue;
        }
        if (h.outcomes != 1) {
            const auto record = entry.record.lock();
            broken(std::to_string(h.outcomes) + " outcomes in the end: " + name(h) +
                   (record ? std::string(", ") + name_of(record->state) : ""));
        }
        if (h.role == Role::source) {
            check_source(h);
        }
        const bool alone = std::none_of(all_.begin(), all_.end(), [&](const Entry& other) {
            // A peer that has left may still be heard of, on a slow link long after.
            const History& o = *other.history;
            return !o.shown && o.key == h.key && o.machine != h.machine && o.role != h.role &&
                   o.posted_at <= h.over_at;
        });
        if (alone && h.over_at > h.posted_at + h.limits.match + late()) {
            broken("waited too long for nobody: " + name(h));
        }
        if (cut_at_ >= 0 &&
            h.over_at > std::max(cut_at_, h.posted_at) + 2 * h.limits.match + bytes_limit(h) + late()) {
            broken("outlives a dead link: " + name(h));
        }
    }
}

void Checker::message_over(const Message& message) const {
    if (message.outcome.cause == Cause::ok ? message.outcome.delivered != Delivered::yes
                                           : cut_at_ < 0 && !crashed_[0] && !crashed_[1]) {
        broken("a message failed on a whole link");
    }
}

void Checker::check_messages(unsigned machine, const std::vector<Bytes>& received, bool all) const {
    const auto& sent = sent_[1 - machine];
    if (received.size() > sent.size() || (all && received.size() != sent.size()) ||
        !std::equal(received.begin(), received.end(), sent.begin())) {
        broken("messages are lost, doubled or out of order");
    }
}

}  // namespace kvt::sim
