// Messages: small payloads in order on the control stream, acknowledged when the peer's endpoint has queued them.
#include <algorithm>

#include "protocol/session.hpp"

namespace kvt::protocol {

void Session::post_message(MessagePtr message, Time now) {
    message->posted_at = now;
    message->number = next_message_++;
    if (lost_) {
        message->outcome = {Cause::peer_lost, Delivered::no, "the connection is lost", {}};
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
    if (body.size() > config_.message_queue_nbytes - std::min(inbox_bytes_, config_.message_queue_nbytes)) {
        throw Excess("the peer sends messages beyond its window");
    }
    ++received_messages_;
    ++counters_.messages_in;
    inbox_bytes_ += body.size();
    inbox_.emplace_back(body.begin(), body.end());
    send(FrameType::message_ack, 0, received_messages_, taken_bytes_, 0);
}

void Session::messages_taken(std::uint64_t nbytes) {
    inbox_bytes_ -= std::min(nbytes, inbox_bytes_);
    taken_bytes_ += nbytes;
    send(FrameType::message_ack, 0, received_messages_, taken_bytes_, 0);
}

void Session::on_message_ack(const Header& header, Time now) {
    if (header.total > message_bytes_sent_ || header.transfer >= next_message_) {
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
