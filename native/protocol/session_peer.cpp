// What a peer says that isn't one role's, and what is kept of it: pools, unmatched WANTs and OFFERs,
// refusals. All of it is counted, and what goes beyond the limits ends the session.
#include <algorithm>
#include <utility>

#include "protocol/session.hpp"

namespace kvt::protocol {

namespace {

// Words that we wait for, about transfers that have ended here.
constexpr std::size_t kMaxLate = 65'536;
constexpr std::size_t kMaxRefusals = 65'536;

}  // namespace

void Session::receive(const Header& header, std::span<const std::byte> body, Time now) {
    if (lost_) {
        return;
    }
    const std::size_t before = outbox_.size(), own_before = own_nbytes_;
    switch (header.type) {
        case FrameType::pool: on_pool(header, body); break;
        case FrameType::offer: on_offer(header, body, now); break;
        case FrameType::want: on_want(header, body, now); break;
        case FrameType::done: on_done(header, now); break;
        case FrameType::abort: on_abort(header, body, now); break;
        case FrameType::aborted:
            (header.flags & kFromSource) != 0 ? on_aborted_for_destination(header, now)
                                              : on_aborted_for_source(header, now);
            break;
        case FrameType::gated: on_gated(header, now); break;
        case FrameType::released: on_released(header, body, now); break;
        case FrameType::message: on_message(header, body); break;
        case FrameType::message_ack: on_message_ack(header, now); break;
        case FrameType::ping: break;
        case FrameType::located: on_located(header, body, now); break;
        case FrameType::again: on_again(header, body, now); break;
        case FrameType::copied: on_copied(header, now); break;
        case FrameType::read: on_read(header, body, now); break;
        case FrameType::write: on_write(header, body, now); break;
        case FrameType::hold: on_hold(header, body, now); break;
        case FrameType::held: on_held(header); break;
        case FrameType::took: on_took(body); break;
        case FrameType::close:
            if (header.arg < 1 || header.arg > 3) {
                throw Violation("a CLOSE's code is unknown");
            }
            peer_closed_ = static_cast<CloseCode>(header.arg);
            break;
        case FrameType::chunk: throw std::logic_error("chunks go through chunk_begin");
    }
    if (before == 0) {
        answered_nbytes_ = 0;
    }
    check_bounds((outbox_.size() - before) - (own_nbytes_ - own_before));
}

// What the local user asks for is not the peer's excess, also where a match makes us say it: only answers
// count.
void Session::check_bounds(std::size_t answered_nbytes) {
    answered_nbytes_ += answered_nbytes;
    if (answered_nbytes_ > config_.answers_nbytes) {
        throw Excess("the peer asks faster than it reads our answers");
    }
    if (late_.size() > kMaxLate) {
        throw Excess("the peer leaves our last words on its transfers unanswered");
    }
    if (!lie_.empty()) {
        throw Violation(lie_);
    }
}

void Session::on_abort(const Header& header, std::span<const std::byte> body, Time now) {
    const AbortBody told = decode_abort(body);
    if ((header.flags & kFromSource) != 0) {
        on_abort_for_destination(header, told, now);
    } else {
        on_abort_for_source(header, told, now);
    }
}

// ---- pools

void Session::on_pool(const Header& header, std::span<const std::byte> body) {
    if ((header.flags & kPoolClosed) != 0) {
        if (!body.empty()) {
            throw Violation("a POOL that closes has a body");
        }
        if (const auto known = peer_pools_.find(header.transfer); known != peer_pools_.end()) {
            peer_regions_ -= regions_of(known->second.terms);
            peer_charge_ -= known->second.charge;
            peer_pools_.erase(known);
        }
        return;
    }
    PoolTerms pool = decode_pool(body);
    const std::size_t regions = regions_of(pool);
    if (regions > config_.regions - std::min<std::size_t>(peer_regions_, config_.regions)) {
        throw Excess("the peer announces more than " + std::to_string(config_.regions) + " regions");
    }
    const std::size_t charge = charge_of_pool(pool, body.size());
    charge_peer(charge);
    if (!peer_pools_.emplace(header.transfer, PeerPool{std::move(pool), charge}).second) {
        throw Violation("a POOL is announced twice");
    }
    peer_regions_ += regions;
}

const PoolTerms& Session::peer_pool(const Terms& terms) const {
    const auto known = peer_pools_.find(terms.pool);
    if (known == peer_pools_.end()) {
        throw Violation("a transfer names a pool that wasn't announced");
    }
    if (const std::string wrong = check_terms(known->second.terms, terms); !wrong.empty()) {
        throw Violation(wrong);
    }
    return known->second.terms;
}

// The pool of a WANT or OFFER that has waited: null when it was closed meanwhile, or another has taken its
// id.
const PoolTerms* Session::open_pool(const Terms& terms, std::uint64_t total) const {
    const auto known = peer_pools_.find(terms.pool);
    if (known == peer_pools_.end() || !check_terms(known->second.terms, terms).empty() ||
        stream_nbytes(known->second.terms, terms) != total) {
        return nullptr;
    }
    return &known->second.terms;
}

// ---- what waits for our user

void Session::charge_peer(std::size_t nbytes) {
    if (nbytes > config_.peer_state_nbytes - std::min(peer_charge_, config_.peer_state_nbytes)) {
        throw Excess("the peer's pools, unmatched transfers and locations exceed " +
                     std::to_string(config_.peer_state_nbytes) + " bytes");
    }
    peer_charge_ += nbytes;
}

// A WANT that answers an OFFER of ours is beyond the peer's own limit: it couldn't know that the OFFER is
// withdrawn.
void Session::keep(UnmatchedWant want, bool answers_offer) {
    if (unmatched_wants_.size() + waiting_reads_.size() + served_reads_ >=
        (answers_offer ? 2 : 1) * std::size_t{config_.unmatched}) {
        throw Excess("the peer has more than " + std::to_string(config_.unmatched) + " unmatched WANTs");
    }
    want.charge = charge_of(want.body.key.size() + want.body.meta.size(), want.body.terms,
                            want.body.ranges.size());
    charge_peer(want.charge);
    const std::string key = want.body.key;
    const std::uint64_t id = want.id;
    if (!unmatched_wants_.emplace(key, std::move(want)).second) {
        throw Violation("two WANTs wait under one key");
    }
    unmatched_want_keys_.emplace(id, key);
}

void Session::keep(UnmatchedOffer offer) {
    if (unmatched_offers_.size() + waiting_writes_.size() + served_writes_ >= config_.unmatched) {
        throw Excess("the peer has more than " + std::to_string(config_.unmatched) + " unmatched OFFERs");
    }
    offer.charge = charge_of(offer.body.key.size() + offer.body.meta.size(), offer.body.terms, 0);
    charge_peer(offer.charge);
    const std::string key = offer.body.key;
    const std::uint64_t id = offer.id;
    if (!unmatched_offers_.emplace(key, std::move(offer)).second) {
        throw Violation("two OFFERs wait under one key");
    }
    unmatched_offer_keys_.emplace(id, key);
}

std::optional<Session::UnmatchedWant> Session::take_want(const std::string& key) {
    auto node = unmatched_wants_.extract(key);
    if (node.empty()) {
        return std::nullopt;
    }
    peer_charge_ -= node.mapped().charge;
    unmatched_want_keys_.erase(node.mapped().id);
    return std::move(node.mapped());
}

std::optional<Session::UnmatchedOffer> Session::take_offer(const std::string& key) {
    auto node = unmatched_offers_.extract(key);
    if (node.empty()) {
        return std::nullopt;
    }
    peer_charge_ -= node.mapped().charge;
    unmatched_offer_keys_.erase(node.mapped().id);
    return std::move(node.mapped());
}

// ---- refusals

void Session::refuse_want(std::uint64_t want, AbortCode code, const std::string& reason,
                          const Mismatch& mismatch) {
    Header header;
    header.type = FrameType::abort;
    header.flags = kFromSource;
    header.transfer = want;
    late_.insert(want);  // the destination answers this ABORT, or its own crosses it
    send_refusal(header, {code, reason, mismatch});
}

void Session::refuse_offer(std::uint64_t offer, AbortCode code, const std::string& reason,
                           const Mismatch& mismatch) {
    Header header;
    header.type = FrameType::abort;
    header.flags = kOfferId;
    header.transfer = offer;
    send_refusal(header, {code, reason, mismatch});
}

// Each uses up a post or a refusal of our own user's, so it is no answer to the peer: see check_bounds().
void Session::send_refusal(const Header& header, const AbortBody& body) {
    const std::size_t before = outbox_.size();
    send(header, encode_abort(body));
    own_nbytes_ += outbox_.size() - before;
}

void Session::refuse(const std::string& key, const std::string& reason, Time until, Time now) {
    if (lost_) {
        return;
    }
    const auto want = take_want(key);
    const auto offer = take_offer(key);  // a key may be in use in both directions
    if (want) {
        refuse_want(want->id, AbortCode::refused, reason, {});
    }
    if (offer) {
        refuse_offer(offer->id, AbortCode::refused, reason, {});
    }
    if (want || offer) {
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

void Session::take_over_refusals(Session& before, Time now) {
    const auto take = [&](auto& refused) {
        for (const auto& [name, refusal] : std::exchange(refused, {})) {
            if (refusal.until <= now) {
                continue;
            }
            try {
                refuse(name, refusal.reason, refusal.until, now);
            } catch (const Excess&) {
                return;  // nobody is in the call that could be told: who waits finds out by its own limit
            }
        }
    };
    take(before.refusals_);
    take(before.token_refusals_);
}

std::optional<std::string> Session::take_refusal(const std::string& key, Time now) {
    auto node = refusals_.extract(key);
    if (node.empty() || node.mapped().until <= now) {
        return std::nullopt;
    }
    return std::move(node.mapped().reason);
}

}  // namespace kvt::protocol
