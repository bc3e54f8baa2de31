#include "machine.hpp"

namespace kvt::sim {

using namespace protocol;

// What the users of a side do.

RecordPtr Machine::make(Role role, std::vector<Row> rows) {
    auto record = std::make_shared<Record>(memory_, rows);
    record->role = role;
    record->pool = &setup_.pool;
    std::uint64_t blocks[2] = {0, 0};
    for (const Row& row : rows) {
        const std::uint64_t size = row.blocks.size() * memory_.piece_nbytes(row.layer);
        blocks[setup_.pool.layers[row.layer].group] = row.blocks.size();
        record->terms.layers.push_back(
            {static_cast<std::uint16_t>(row.layer), memory_.piece_nbytes(row.layer)});
        record->spans.push_back({{record->nbytes, record->nbytes + size}, row.layer});
        record->nbytes += size;
    }
    for (std::uint16_t group = 0; group < 2; ++group) {
        record->terms.groups.push_back({group, static_cast<std::uint32_t>(blocks[group])});
    }
    record->history = std::make_shared<History>();
    record->history->machine = index_;
    record->history->role = role;
    record->history->rows = std::move(rows);
    record->history->empty = record->nbytes == 0;
    return record;
}

void Machine::post(const RecordPtr& record) {
    for (const Row& row : record->history->rows) {
        for (const std::uint32_t block : row.blocks) {
            record->role == Role::source ? memory_.read(row.layer, block) : memory_.own(row.layer, block);
            if (record->gate != nullptr) memory_.write_late(row.layer, block);
        }
    }
    checker_.posted(*record, memory_);
    ++unfinished_;
    if (dialled_ != nullptr && !adopted_ && random_.chance(60)) {
        dialled_posts_.insert(record.get());
    }
    if (take(record)) {
        return;
    }
    guarded([&] { home_of(record).post(record, pool_id_, clock_.now()); });
    settle();
}

// As when two endpoints dial each other: one connection stays, and what was posted on the other goes there.
void Machine::adopt() {
    if (dialled_ == nullptr || std::exchange(adopted_, true) || closed_) {
        return;
    }
    clock_.trace("%c takes over what waits on its other session", 'A' + static_cast<int>(index_));
    guarded([&] {
        for (TransferPtr& transfer : dialled_->give_up_posts()) {
            dialled_posts_.erase(transfer.get());
            session_.take_over(std::move(transfer), clock_.now());
        }
        for (MessagePtr& message : dialled_->give_up_messages()) {
            session_.post_message(std::move(message), clock_.now());
        }
        dialled_->lost(Cause::connection_closed, "another took its place", clock_.now());
    });
    settle();
}

void Machine::close_pool() {
    if (unfinished_ + served_ != 0 || closed_) {
        return;
    }
    clock_.trace("%c closes its pool", 'A' + static_cast<int>(index_));
    session_.forget_pool(pool_id_);
    pool_id_ += random_.below(2);  // an id may come again
    settle();
}

void Machine::fail_gates() {
    guarded([&] {
        session_.fail_gates(clock_.now());
        if (dialled_ != nullptr) dialled_->fail_gates(clock_.now());
    });
    settle();
}

void Machine::cancel(const RecordPtr& record) {
    if (taking_.contains(record.get())) {  // nobody has its handle yet
        later(20 * kUs, [this, weak = std::weak_ptr(record)] {
            if (const auto alive = weak.lock(); alive && live()) cancel(alive);
        });
        return;
    }
    record->history->asked_to_stop = true;
    clock_.trace("%c cancels %s '%s'", 'A' + static_cast<int>(index_), name_of(record->role),
                 record->key.c_str());
    guarded([&] {
        home_of(record).stop(record, {Cause::cancelled, Delivered::no, "cancelled", {}}, clock_.now());
    });
    settle();
}

void Machine::refuse(const std::string& key) {
    clock_.trace("%c refuses '%s'", 'A' + static_cast<int>(index_), key.c_str());
    guarded([&] { session_.refuse(key, "refused", clock_.now() + 50 * kMs, clock_.now()); });
    settle();
}

void Machine::send_message(std::size_t nbytes) {
    auto message = std::make_shared<Message>();
    message->data.assign(nbytes, static_cast<std::byte>(messages_.size()));
    checker_.message_posted(index_, *message);
    messages_.push_back(message);
    Session& session = dialled_ != nullptr && !adopted_ ? *dialled_
                                                        : session_;  // all, so that they keep order
    session.post_message(message, clock_.now());
    settle();
}

void Machine::take_messages() {
    if (const std::uint64_t nbytes = std::exchange(untaken_, 0); !closed_) {
        session_.messages_taken(nbytes);
        settle();
    }
}

}  // namespace kvt::sim
