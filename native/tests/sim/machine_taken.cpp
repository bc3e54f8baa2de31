#include "machine.hpp"

namespace kvt::sim {

using namespace protocol;

// Reads that ask nobody, as the engine does them on the thread that posts: the grant is found in what the
// other side shows, its blocks are copied while the other side does what it likes, and what was copied is
// good if the grant still stood after the last byte. Whatever else there is to say, the owner says: the read
// is posted as any other.

struct Machine::Taking {
    RecordPtr to, from;
    bool counted = false;
};

// The thread may be off its core for a while.
Time Machine::while_copying() {
    return random_.chance(50) ? 0 : random_.between(0, random_.pick({10 * kUs, kMs}));
}

bool Machine::take(const RecordPtr& record) {
    if (!setup_.finds || closed_ || peer_->crashed() || record->use == nullptr || record->nbytes == 0 ||
        record->role != Role::destination || &home_of(record) != &session_ || random_.chance(10)) {
        return false;
    }
    const auto shown = peer_->shown(*record->use, record->terms);
    bool may = false;
    if (shown) {
        guarded([&] { may = session_.may_take(record->use->token, shown->counted); });
    }
    if (!may) {
        return false;
    }
    clock_.trace("%c takes '%s' #%llu by itself", 'A' + static_cast<int>(index_), record->key.c_str(),
                 static_cast<unsigned long long>(record->history->uid));
    for (const HoldPtr& lease : leases_) {
        const bool mine = lease->token == record->use->token && lease->state == Hold::State::held;
        record->history->leased = record->history->leased || mine;
    }
    record->history->partner = shown->source->history.get();
    record->history->counted = shown->counted;
    taking_.insert(record.get());
    const auto taking = std::make_shared<Taking>(Taking{record, shown->source, shown->counted});
    later(while_copying(), [this, taking] { take_bytes(taking, 0); });
    return true;
}

void Machine::take_bytes(const std::shared_ptr<Taking>& taking, std::uint64_t begin) {
    const std::uint64_t end = taking->to->nbytes;
    const std::uint64_t reached = random_.chance(30) ? end : begin + 1 + random_.below(end - begin);
    if (!peer_->crashed()) {
        copy_bytes(*taking->from, *taking->to, begin, reached);
    }
    later(while_copying(), [this, taking, reached] {
        if (reached < taking->to->nbytes) {
            take_bytes(taking, reached);
        } else {
            look_again(taking);
        }
    });
}

// A crash is seen, too: of what is read then nobody says whether it may be rewritten.
void Machine::look_again(const std::shared_ptr<Taking>& taking) {
    const bool good = taking->from->still_granted() && !peer_->crashed();
    later(while_copying(), [this, taking, good] {
        const RecordPtr& record = taking->to;
        taking_.erase(record.get());
        if (!good) {
            record->history->partner = nullptr;
            record->history->counted = false;
            record->history->moved_at = -1;
            guarded([&] { session_.post(record, pool_id_, clock_.now()); });
            settle();
            return;
        }
        ++taken_;
        record->history->taken = true;
        if (taking->counted && !closed_) {
            checker_.counted(index_, record->use->token);
        }
        guarded([&] { session_.took({record->use->token, 0}, record->nbytes, taking->counted); });
        record->outcome = {Cause::ok, Delivered::yes, {}, {}};
        record->finished = true;
        over(record);
        settle();
    });
}

}  // namespace kvt::sim
