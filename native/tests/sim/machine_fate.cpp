#include "machine.hpp"

namespace kvt::sim {

using namespace protocol;

// What befalls a side.

void Machine::catch_rogue() {
    checker_.link_cut();
    peer_->later(random_.between(0, 5 * kMs), [peer = peer_] { peer->lose(); });
    lose();
}

void Machine::break_way() {
    clock_.trace("%c can't copy any more", 'A' + static_cast<int>(index_));
    way_broke_ = true;
    guarded([&] { session_.set_pulls(false, clock_.now()); });
    settle();
}

void Machine::lose() {
    if (closed_ || crashed_) {
        return;
    }
    clock_.trace("%c has lost the other", 'A' + static_cast<int>(index_));
    closed_ = true;
    session_.lost(Cause::peer_lost, "reset", clock_.now());
    if (dialled_ != nullptr) {
        dialled_->lost(Cause::peer_lost, "reset", clock_.now());
    }
    grants_lost();
    settle();
}

void Machine::crash() {
    clock_.trace("%c crashes", 'A' + static_cast<int>(index_));
    crashed_ = true;
}

void Machine::stall(Time until) {
    clock_.trace("%c stands still for %lld ms", 'A' + static_cast<int>(index_),
                 static_cast<long long>((until - clock_.now()) / kMs));
    const bool long_one = until - clock_.now() > 500 * kMs;
    stalled_until_ = std::max(stalled_until_, until);
    checker_.stalled(clock_.now(), until);
    if (long_one) {
        clock_.at(until, [this] {
            if (!crashed_ && clock_.now() >= stalled_until_) {
                session_.resumed(clock_.now());
                if (dialled_ != nullptr) dialled_->resumed(clock_.now());
            }
        });
    }
}

}  // namespace kvt::sim
