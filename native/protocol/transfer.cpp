#include "protocol/transfer.hpp"

#include <array>
#include <cstddef>

namespace kvt::protocol {

namespace {

using enum State;
using E = Event;
using A = Action;
constexpr Role S = Role::source;
constexpr Role D = Role::destination;

// One row for each role, state and event; the test counts them. Read it by state.
constexpr Transition kTable[] = {
    // source
    {S, posted, E::match, matched, A::none},
    {S, posted, E::first_bytes, posted, A::refuse_bug},
    {S, posted, E::all_bytes, posted, A::refuse_bug},
    {S, posted, E::sealed, posted, A::refuse_bug},
    {S, posted, E::done, posted, A::violation},
    {S, posted, E::stop, ending, A::quiesce},
    {S, posted, E::peer_ended, ending, A::quiesce},
    {S, posted, E::quiesced, posted, A::refuse_bug},
    {S, posted, E::drained, posted, A::refuse_bug},
    {S, posted, E::silent, posted, A::refuse_bug},
    {S, posted, E::lost, ending, A::quiesce},
    {S, posted, E::again, posted, A::violation},

    {S, matched, E::match, matched, A::violation},
    {S, matched, E::first_bytes, moving, A::none},
    {S, matched, E::all_bytes, sent, A::none},
    {S, matched, E::sealed, matched, A::refuse_bug},
    {S, matched, E::done, matched, A::violation},
    {S, matched, E::stop, stopping, A::quiesce},
    {S, matched, E::peer_ended, ending, A::quiesce},
    {S, matched, E::quiesced, matched, A::refuse_bug},
    {S, matched, E::drained, matched, A::refuse_bug},
    {S, matched, E::silent, matched, A::refuse_bug},
    {S, matched, E::lost, ending, A::quiesce},
    {S, matched, E::again, matched, A::none},

    {S, moving, E::match, moving, A::violation},
    {S, moving, E::first_bytes, moving, A::none},
    {S, moving, E::all_bytes, sent, A::none},
    {S, moving, E::sealed, moving, A::refuse_bug},
    {S, moving, E::done, ending, A::quiesce},  // all has left; a mover's note of it is on its way
    {S, moving, E::stop, stopping, A::quiesce},
    {S, moving, E::peer_ended, ending, A::quiesce},
    {S, moving, E::quiesced, moving, A::refuse_bug},
    {S, moving, E::drained, moving, A::refuse_bug},
    {S, moving, E::silent, moving, A::refuse_bug},
    {S, moving, E::lost, ending, A::quiesce},
    {S, moving, E::again, moving, A::violation},

    {S, sent, E::match, sent, A::violation},
    {S, sent, E::first_bytes, sent, A::refuse_bug},
    {S, sent, E::all_bytes, sent, A::none},
    {S, sent, E::sealed, sent, A::refuse_bug},
    {S, sent, E::done, over, A::finish_ok},
    {S, sent, E::stop, stopping, A::quiesce},
    {S, sent, E::peer_ended, ending, A::quiesce},
    {S, sent, E::quiesced, sent, A::refuse_bug},
    {S, sent, E::drained, sent, A::refuse_bug},
    {S, sent, E::silent, sent, A::refuse_bug},
    {S, sent, E::lost, ending, A::quiesce},
    {S, sent, E::again, matched, A::none},

    {S, stopping, E::match, stopping, A::violation},
    {S, stopping, E::first_bytes, stopping, A::refuse_bug},
    {S, stopping, E::all_bytes, stopping, A::none},
    {S, stopping, E::sealed, stopping, A::refuse_bug},
    {S, stopping, E::done, ending, A::finish_ok},
    {S, stopping, E::stop, stopping, A::none},
    {S, stopping, E::peer_ended, ending, A::none},
    {S, stopping, E::quiesced, verdict, A::send_abort},
    {S, stopping, E::drained, stopping, A::refuse_bug},
    {S, stopping, E::silent, stopping, A::none},
    {S, stopping, E::lost, ending, A::none},
    {S, stopping, E::again, stopping, A::none},

    {S, verdict, E::match, verdict, A::violation},
    {S, verdict, E::first_bytes, verdict, A::refuse_bug},
    {S, verdict, E::all_bytes, verdict, A::refuse_bug},
    {S, verdict, E::sealed, verdict, A::refuse_bug},
    {S, verdict, E::done, over, A::finish_ok},
    {S, verdict, E::stop, verdict, A::none},
    {S, verdict, E::peer_ended, over, A::finish},
    {S, verdict, E::quiesced, verdict, A::none},
    {S, verdict, E::drained, verdict, A::refuse_bug},
    {S, verdict, E::silent, over, A::finish},
    {S, verdict, E::lost, over, A::finish},
    {S, verdict, E::again, verdict, A::none},

    {S, ending, E::match, ending, A::violation},
    {S, ending, E::first_bytes, ending, A::refuse_bug},
    {S, ending, E::all_bytes, ending, A::none},
    {S, ending, E::sealed, ending, A::refuse_bug},
    {S, ending, E::done, ending, A::violation},
    {S, ending, E::stop, ending, A::none},
    {S, ending, E::peer_ended, ending, A::none},
    {S, ending, E::quiesced, over, A::finish},
    {S, ending, E::drained, ending, A::refuse_bug},
    {S, ending, E::silent, ending, A::none},
    {S, ending, E::lost, ending, A::none},
    {S, ending, E::again, ending, A::none},

    {S, draining, E::match, draining, A::refuse_bug},
    {S, draining, E::first_bytes, draining, A::refuse_bug},
    {S, draining, E::all_bytes, draining, A::refuse_bug},
    {S, draining, E::sealed, draining, A::refuse_bug},
    {S, draining, E::done, draining, A::refuse_bug},
    {S, draining, E::stop, draining, A::refuse_bug},
    {S, draining, E::peer_ended, draining, A::refuse_bug},
    {S, draining, E::quiesced, draining, A::refuse_bug},
    {S, draining, E::drained, draining, A::refuse_bug},
    {S, draining, E::silent, draining, A::refuse_bug},
    {S, draining, E::lost, draining, A::refuse_bug},
    {S, draining, E::again, draining, A::refuse_bug},

    {S, over, E::match, over, A::violation},
    {S, over, E::first_bytes, over, A::refuse_bug},
    {S, over, E::all_bytes, over, A::refuse_bug},
    {S, over, E::sealed, over, A::refuse_bug},
    {S, over, E::done, over, A::none},
    {S, over, E::stop, over, A::none},
    {S, over, E::peer_ended, over, A::none},
    {S, over, E::quiesced, over, A::none},
    {S, over, E::drained, over, A::none},
    {S, over, E::silent, over, A::none},
    {S, over, E::lost, over, A::none},
    {S, over, E::again, over, A::none},

    // destination
    {D, posted, E::match, matched, A::none},
    {D, posted, E::first_bytes, moving, A::none},
    {D, posted, E::all_bytes, posted, A::refuse_bug},
    {D, posted, E::sealed, over, A::send_done},
    {D, posted, E::done, posted, A::violation},
    {D, posted, E::stop, stopping, A::quiesce},
    {D, posted, E::peer_ended, ending, A::quiesce},
    {D, posted, E::quiesced, posted, A::refuse_bug},
    {D, posted, E::drained, posted, A::refuse_bug},
    {D, posted, E::silent, posted, A::refuse_bug},
    {D, posted, E::lost, ending, A::quiesce},
    {D, posted, E::again, posted, A::refuse_bug},

    {D, matched, E::match, matched, A::none},
    {D, matched, E::first_bytes, moving, A::none},
    {D, matched, E::all_bytes, matched, A::refuse_bug},
    {D, matched, E::sealed, over, A::send_done},
    {D, matched, E::done, matched, A::violation},
    {D, matched, E::stop, stopping, A::quiesce},
    {D, matched, E::peer_ended, ending, A::quiesce},
    {D, matched, E::quiesced, matched, A::refuse_bug},
    {D, matched, E::drained, matched, A::refuse_bug},
    {D, matched, E::silent, matched, A::refuse_bug},
    {D, matched, E::lost, ending, A::quiesce},
    {D, matched, E::again, matched, A::refuse_bug},

    {D, moving, E::match, moving, A::none},
    {D, moving, E::first_bytes, moving, A::none},
    {D, moving, E::all_bytes, moving, A::refuse_bug},
    {D, moving, E::sealed, over, A::send_done},
    {D, moving, E::done, moving, A::violation},
    {D, moving, E::stop, stopping, A::quiesce},
    {D, moving, E::peer_ended, ending, A::quiesce},
    {D, moving, E::quiesced, moving, A::refuse_bug},
    {D, moving, E::drained, moving, A::refuse_bug},
    {D, moving, E::silent, moving, A::refuse_bug},
    {D, moving, E::lost, ending, A::quiesce},
    {D, moving, E::again, moving, A::refuse_bug},

    {D, sent, E::match, sent, A::refuse_bug},
    {D, sent, E::first_bytes, sent, A::refuse_bug},
    {D, sent, E::all_bytes, sent, A::refuse_bug},
    {D, sent, E::sealed, sent, A::refuse_bug},
    {D, sent, E::done, sent, A::refuse_bug},
    {D, sent, E::stop, sent, A::refuse_bug},
    {D, sent, E::peer_ended, sent, A::refuse_bug},
    {D, sent, E::quiesced, sent, A::refuse_bug},
    {D, sent, E::drained, sent, A::refuse_bug},
    {D, sent, E::silent, sent, A::refuse_bug},
    {D, sent, E::lost, sent, A::refuse_bug},
    {D, sent, E::again, sent, A::refuse_bug},

    {D, stopping, E::match, stopping, A::none},
    {D, stopping, E::first_bytes, stopping, A::refuse_bug},
    {D, stopping, E::all_bytes, stopping, A::refuse_bug},
    {D, stopping, E::sealed, stopping, A::none},
    {D, stopping, E::done, stopping, A::violation},
    {D, stopping, E::stop, stopping, A::none},
    {D, stopping, E::peer_ended, stopping, A::none},
    {D, stopping, E::quiesced, draining, A::send_abort},
    {D, stopping, E::drained, stopping, A::none},
    {D, stopping, E::silent, stopping, A::refuse_bug},
    {D, stopping, E::lost, ending, A::none},
    {D, stopping, E::again, stopping, A::refuse_bug},

    {D, verdict, E::match, verdict, A::refuse_bug},
    {D, verdict, E::first_bytes, verdict, A::refuse_bug},
    {D, verdict, E::all_bytes, verdict, A::refuse_bug},
    {D, verdict, E::sealed, verdict, A::refuse_bug},
    {D, verdict, E::done, verdict, A::refuse_bug},
    {D, verdict, E::stop, verdict, A::refuse_bug},
    {D, verdict, E::peer_ended, verdict, A::refuse_bug},
    {D, verdict, E::quiesced, verdict, A::refuse_bug},
    {D, verdict, E::drained, verdict, A::refuse_bug},
    {D, verdict, E::silent, verdict, A::refuse_bug},
    {D, verdict, E::lost, verdict, A::refuse_bug},
    {D, verdict, E::again, verdict, A::refuse_bug},

    {D, ending, E::match, ending, A::none},
    {D, ending, E::first_bytes, ending, A::refuse_bug},
    {D, ending, E::all_bytes, ending, A::refuse_bug},
    {D, ending, E::sealed, ending, A::none},
    {D, ending, E::done, ending, A::violation},
    {D, ending, E::stop, ending, A::none},
    {D, ending, E::peer_ended, ending, A::none},
    {D, ending, E::quiesced, draining, A::finish_drain},
    {D, ending, E::drained, ending, A::none},
    {D, ending, E::silent, ending, A::refuse_bug},
    {D, ending, E::lost, ending, A::none},
    {D, ending, E::again, ending, A::refuse_bug},

    {D, draining, E::match, draining, A::none},
    {D, draining, E::first_bytes, draining, A::none},
    {D, draining, E::all_bytes, draining, A::refuse_bug},
    {D, draining, E::sealed, draining, A::refuse_bug},
    {D, draining, E::done, draining, A::violation},
    {D, draining, E::stop, draining, A::none},
    {D, draining, E::peer_ended, draining, A::none},
    {D, draining, E::quiesced, draining, A::none},
    {D, draining, E::drained, over, A::none},
    {D, draining, E::silent, draining, A::refuse_bug},
    {D, draining, E::lost, over, A::none},
    {D, draining, E::again, draining, A::refuse_bug},

    {D, over, E::match, over, A::none},
    {D, over, E::first_bytes, over, A::violation},
    {D, over, E::all_bytes, over, A::refuse_bug},
    {D, over, E::sealed, over, A::refuse_bug},
    {D, over, E::done, over, A::violation},
    {D, over, E::stop, over, A::none},
    {D, over, E::peer_ended, over, A::none},
    {D, over, E::quiesced, over, A::none},
    {D, over, E::drained, over, A::none},
    {D, over, E::silent, over, A::refuse_bug},
    {D, over, E::lost, over, A::none},
    {D, over, E::again, over, A::refuse_bug},
};

constexpr std::size_t kStates = 9;
constexpr std::size_t kEvents = 12;
static_assert(std::size(kTable) == 2 * kStates * kEvents, "a state or an event has no row");

constexpr bool in_order() {
    for (std::size_t i = 0; i < std::size(kTable); ++i) {
        if (static_cast<std::size_t>(kTable[i].event) != i % kEvents) {
            return false;
        }
    }
    return true;
}
static_assert(in_order(), "rows stand by event, so that none is there twice");

// Where each role's block of rows for a state begins: the table above is written in the order that reads
// best.
constexpr std::array<std::array<std::size_t, kStates>, 2> index_rows() {
    std::array<std::array<std::size_t, kStates>, 2> index{};
    for (std::size_t i = 0; i < std::size(kTable); i += kEvents) {
        index[static_cast<std::size_t>(kTable[i].role)][static_cast<std::size_t>(kTable[i].from)] = i;
    }
    return index;
}
constexpr auto kIndex = index_rows();

}  // namespace

std::span<const Transition> transition_table() noexcept { return kTable; }

const Transition& step(Role role, State from, Event event) noexcept {
    return kTable[kIndex[static_cast<std::size_t>(role)][static_cast<std::size_t>(from)] +
                  static_cast<std::size_t>(event)];
}

const char* name_of(Role role) noexcept { return role == Role::source ? "source" : "destination"; }

const char* name_of(State state) noexcept {
    constexpr const char* kNames[] = {"posted", "matched", "moving",   "sent", "stopping",
                                      "ending", "verdict", "draining", "over"};
    return kNames[static_cast<std::size_t>(state)];
}

const char* name_of(Event event) noexcept {
    constexpr const char* kNames[] = {"match",      "first_bytes", "all_bytes", "sealed", "done", "stop",
                                      "peer_ended", "quiesced",    "drained",   "silent", "lost", "again"};
    return kNames[static_cast<std::size_t>(event)];
}

const char* name_of(Action action) noexcept {
    constexpr const char* kNames[] = {"none",   "refuse_bug", "violation", "quiesce",     "finish_ok",
                                      "finish", "send_abort", "send_done", "finish_drain"};
    return kNames[static_cast<std::size_t>(action)];
}

}  // namespace kvt::protocol
