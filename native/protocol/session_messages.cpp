// Messages: small payloads in order on the control stream, acknowledged when the peer's endpoint has queued
// them. What was sent and not yet taken by the peer's user is bounded by a window of charges, so that many
// empty messages cost as well.
#include <algorithm>

#include "protocol/session.hpp"

namespace kvt::protocol {

void Session::post_message(MessagePtr message, Time now) {
    message->posted_at = now;
    message->number = next_message_++;
    if (lost_) {
        message->outcome = {lost_cause_, Delivered::no, lost_reason_, {}};
        message->finished = true;
        message->over_at = now;
        finished_messages_.push_back(std::move(message));
        return;
    }
    messages_.push_back(std::move(message));
}

void Session::on_message(const Header& header, std::span<const std::byte> body) {
    if (header.transfer != received_messages_ + 1) {
        throw Violation("a MESSAGE is out of order");
    }
    const std::uint64_t charge = message_charge(body.size());
    const std::uint64_t room = config_.message_queue_nbytes -
                               std::min(inbox_bytes_, config_.message_queue_nbytes);
    if (charge > room && inbox_bytes_ != 0) {  // one alone may always come: else the longest never could
        throw Excess("the peer sends messages beyond its window");
    }
    ++received_messages_;
    ++counters_.messages_in;
    inbox_bytes_ += charge;
    untaken_.push_back(body.size());
    inbox_.emplace_back(body.begin(), body.end());
}

void Session::messages_queued(std::size_t count) {
    queued_messages_ += count;
    ack_due_ = true;
}

// One word for all that was queued and taken meanwhile: a burst of messages has no burst of answers.
void Session::acknowledge_messages() {
    if (std::exchange(ack_due_, false)) {
        send(FrameType::message_ack, 0, queued_messages_, taken_bytes_, 0);
    }
}

// The user takes messages whole and in order; an empty one goes with what was taken before it.
void Session::messages_taken(std::uint64_t nbytes) {
    taken_ahead_ += nbytes;
    std::uint64_t charges = 0;
    while (!untaken_.empty() && untaken_.front() <= taken_ahead_) {
        taken_ahead_ -= untaken_.front();
        charges += message_charge(untaken_.front());
        untaken_.pop_front();
    }
    inbox_bytes_ -= charges;
    taken_bytes_ += charges;
    ack_due_ = true;
}

void Session::on_message_ack(const Header& header, Time now) {
    const std::uint64_t unsent = messages_.empty() ? next_message_ : messages_.front()->number;
    if (header.total > message_bytes_sent_ || header.transfer >= unsent) {
        throw Violation("a MESSAGE_ACK is for what wasn't sent");
    }
    message_bytes_taken_ = std::max(message_bytes_taken_, header.total);
    while (!unacknowledged_.empty() && unacknowledged_.front()->number <= header.transfer) {
        const MessagePtr message = unacknowledged_.front();
        unacknowledged_.pop_front();
        message->outcome = {Cause::ok, Delivered::yes, {}, {}};
        message->finished = true;
        message->over_at = now;
        finished_messages_.push_back(message);
    }
}

}  // namespace kvt::protocol
