// Reads that ask nobody: the destination finds the grant in memory that its owner shows it, copies, and looks
// whether the grant still stood. What is left to say is TOOK, afterwards, of grants that count their readers.
//
// Where a grant counts, one read without a lease is a reader's last. The owner learns of it too late to keep
// this side from another one: so this side remembers, and asks by READ when it comes again.
#include "protocol/session.hpp"

namespace kvt::protocol {

namespace {

constexpr std::size_t kMaxTaken = 65'536;  // who comes again after so many others may find it open

}  // namespace

bool Session::may_take(const Token& token, bool counted) {
    if (!opened_ || lost_ || outbox_.size() > config_.outbox_nbytes / 2) {
        return false;
    }
    if (counted && !leased_.contains(token) && taken_.contains(token)) {
        return false;
    }
    admitted_to(token);  // what ends under our hands is stale, not denied
    return true;
}

void Session::took(const TookBody& what, std::uint64_t nbytes, bool counted) {
    if (counted) {
        taken(what.token);
        if (!lost_) {
            send({.type = FrameType::took}, encode_took(what));
        }
    }
    counters_.bytes_in += nbytes;
    ++counters_.receives_ok;
}

void Session::taken(const Token& token) {
    if (leased_.contains(token) || !taken_.insert(token).second) {
        return;
    }
    taken_in_order_.push_back(token);
    if (taken_in_order_.size() > kMaxTaken) {
        taken_.erase(taken_in_order_.front());
        taken_in_order_.pop_front();
    }
}

// Whoever gives its last lease back has finished with the grant.
void Session::no_longer_leased(const Hold& hold) {
    if (hold.state != Hold::State::held) {
        return;
    }
    if (const auto known = leased_.find(hold.token); --known->second == 0) {
        leased_.erase(known);
        taken(hold.token);
    }
}

void Session::on_took(std::span<const std::byte> body) {
    if ((config_.capabilities & kCanGrant) == 0) {
        throw Violation("a TOOK where that wasn't agreed");
    }
    const TookBody what = decode_took(body);
    if (grants_ != nullptr) {
        grants_->took(what);
    }
}

}  // namespace kvt::protocol
