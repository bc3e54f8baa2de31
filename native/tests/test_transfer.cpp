// The transfer machine's table: complete, and every state that a row leads to is one that its role knows.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "protocol/transfer.hpp"

#include <doctest/doctest.h>

#include <set>
#include <string>
#include <tuple>

#include "protocol/ranges.hpp"

using namespace kvt::protocol;

namespace {

constexpr int kStates = static_cast<int>(State::over) + 1;
constexpr int kEvents = static_cast<int>(Event::again) + 1;

std::set<State> reachable(Role role) {
    std::set<State> found{State::posted};
    for (std::size_t before = 0; before != found.size();) {
        before = found.size();
        for (const auto& row : transition_table()) {
            if (row.role == role && found.contains(row.from)) {
                found.insert(row.to);
            }
        }
    }
    return found;
}

}  // namespace

TEST_CASE("one row for each role, state and event") {
    std::set<std::tuple<Role, State, Event>> seen;
    for (const auto& row : transition_table()) {
        CHECK(seen.insert({row.role, row.from, row.event}).second);
        CHECK(&step(row.role, row.from, row.event) == &row);
    }
    CHECK(seen.size() == 2 * kStates * kEvents);
}

TEST_CASE("states that a role doesn't have are bugs, and can't be reached") {
    CHECK_FALSE(reachable(Role::source).contains(State::draining));
    CHECK_FALSE(reachable(Role::destination).contains(State::sent));
    CHECK_FALSE(reachable(Role::destination).contains(State::verdict));
    CHECK(reachable(Role::source).size() == kStates - 1);
    CHECK(reachable(Role::destination).size() == kStates - 2);
    for (const auto& row : transition_table()) {
        if (!reachable(row.role).contains(row.from)) {
            CHECK(row.action == Action::refuse_bug);
        }
        if (row.action == Action::refuse_bug || row.action == Action::violation) {
            CHECK(row.to == row.from);
        }
    }
}

TEST_CASE("what ends in every state: stop, lost and the peer's end lead out of every undecided one") {
    for (const Role role : {Role::source, Role::destination}) {
        for (const State from : {State::posted, State::matched, State::moving}) {
            for (const Event event : {Event::stop, Event::lost, Event::peer_ended}) {
                const auto& row = step(role, from, event);
                CHECK((row.to == State::stopping || row.to == State::ending));
                CHECK(row.action == Action::quiesce);
            }
        }
    }
    for (const auto& row : transition_table()) {  // over is final, and nobody is over before it is quiet
        if (row.from == State::over) CHECK(row.to == State::over);
        if (row.to == State::over && row.from != State::over) {
            const bool quiet = row.from == State::ending || row.from == State::verdict ||
                               row.from == State::draining;
            CHECK((quiet || row.event == Event::sealed ||
                   (row.from == State::sent && row.event == Event::done)));
        }
        if (row.action == Action::quiesce) CHECK((row.to == State::stopping || row.to == State::ending));
        if (row.action == Action::finish_ok) CHECK(row.event == Event::done);
        if (row.action == Action::send_done) CHECK(row.event == Event::sealed);
    }
}

TEST_CASE("names") {
    std::set<std::string> names;
    for (int i = 0; i < kStates; ++i) names.insert(name_of(static_cast<State>(i)));
    CHECK(names.size() == kStates);
    names.clear();
    for (int i = 0; i < kEvents; ++i) names.insert(name_of(static_cast<Event>(i)));
    CHECK(names.size() == kEvents);
    CHECK(std::string(name_of(Role::source)) == "source");
    CHECK(std::string(name_of(Role::destination)) == "destination");
    CHECK(std::string(name_of(Action::finish_drain)) == "finish_drain");
    CHECK(std::string(name_of(Action::none)) == "none");
}

TEST_CASE("range sets against a table of bytes") {
    std::uint32_t state = 12345;
    const auto random = [&](std::uint32_t below) {
        return (state = state * 1664525 + 1013904223) / 65536 % below;
    };
    for (int round = 0; round < 300; ++round) {
        RangeSet set;
        std::vector<bool> bytes(64);
        for (int i = 0; i < 60; ++i) {
            const std::uint64_t begin = random(63),
                                end = begin + 1 + random(static_cast<std::uint32_t>(64 - begin));
            bool any = false, all = true;
            for (std::uint64_t at = begin; at < end; ++at) {
                any = any || bytes[at];
                all = all && bytes[at];
            }
            CHECK(set.overlaps({begin, end}) == any);
            CHECK(set.contains({begin, end}) == all);
            if (!any && random(2) == 0) {
                set.add({begin, end});
                std::fill(bytes.begin() + static_cast<long>(begin), bytes.begin() + static_cast<long>(end),
                          true);
            } else if (!set.empty() && random(8) == 0) {
                const Range front = set.take_front(1 + random(9));
                for (std::uint64_t at = front.begin; at < front.end; ++at) {
                    CHECK(bytes[at]);
                    bytes[at] = false;
                }
            }
            CHECK(set.nbytes() == static_cast<std::uint64_t>(std::count(bytes.begin(), bytes.end(), true)));
            for (std::size_t k = 1; k < set.ranges().size(); ++k)
                CHECK(set.ranges()[k - 1].end < set.ranges()[k].begin);
        }
    }
}
