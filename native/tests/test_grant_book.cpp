// The rules of grants: who is let in, who has finished, what ends them, and when.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "protocol/grant_book.hpp"

#include "grant_pair.hpp"

using namespace kvt::test;

namespace {

constexpr auto kRead = GrantMode::read;

GrantPtr added(GrantBook& book, unsigned token, unsigned readers = 1, Time ttl = kNever) {
    auto grant = grant_of(token, kRead, readers);
    grant->ttl = ttl;
    REQUIRE(book.add(grant, 0));
    return grant;
}

}  // namespace

TEST_CASE("a token names one open grant; when that has ended, another") {
    GrantBook book;
    const auto grant = added(book, 1);
    CHECK_FALSE(book.add(grant_of(1), 0));
    CHECK(book.size() == 1);
    CHECK(book.end(grant, GrantState::revoked));
    CHECK_FALSE(book.end(grant, GrantState::expired));
    CHECK(grant->state == GrantState::revoked);
    CHECK(grant->ended->load());
    CHECK(book.add(grant_of(1), 0));
}

TEST_CASE("the named reader, or the first to come, and by its mode only") {
    GrantBook book;
    const auto open = added(book, 1, 2);
    CHECK(book.admit(token_of(1), "x", GrantMode::write) == nullptr);
    CHECK(book.admit(token_of(9), "x", kRead) == nullptr);
    for (const char* reader : {"x", "y", "x"}) CHECK(book.admit(token_of(1), reader, kRead) == open);
    CHECK(book.admit(token_of(1), "z", kRead) == nullptr);
    const auto named = grant_of(2);
    named->to = "x";
    REQUIRE(book.add(named, 0));
    CHECK(book.admit(token_of(2), "y", kRead) == nullptr);
    CHECK_FALSE(book.hold(token_of(2), "y"));
    CHECK(book.admit(token_of(2), "x", kRead) == named);
}

TEST_CASE("one success finishes a reader, a failure doesn't; the last reader ends the grant") {
    GrantBook book;
    const auto grant = added(book, 1, 2);
    for (const char* reader : {"x", "y"}) book.admit(token_of(1), reader, kRead);
    CHECK(book.over(grant, "x", false) == nullptr);
    CHECK(book.admit(token_of(1), "x", kRead) == grant);
    CHECK(book.over(grant, "x", true) == nullptr);
    CHECK(book.admit(token_of(1), "x", kRead) == nullptr);
    CHECK(book.over(grant, "y", true) == grant);
    CHECK(grant->state == GrantState::read);
    CHECK(book.size() == 0);
    CHECK(book.over(grant, "y", true) == nullptr);
}

TEST_CASE("a lease keeps its reader from having finished, and the clock from running") {
    GrantBook book;
    const auto grant = added(book, 1, 1, 100);
    CHECK(book.next_deadline() == 100);
    CHECK(book.hold(token_of(1), "x"));
    CHECK(book.hold(token_of(1), "x"));
    CHECK(book.expire(1000).empty());
    CHECK(book.over(grant, "x", true) == nullptr);
    CHECK(book.release(token_of(1), grant->ended, "x", 1000) == nullptr);
    CHECK(book.expire(5000).empty());
    CHECK(book.release(token_of(1), grant->ended, "y", 6000) == nullptr);
    CHECK(book.release(token_of(1), grant->ended, "x", 6000) == grant);
    CHECK(grant->state == GrantState::read);
    CHECK(book.release(token_of(1), grant->ended, "x", 6000) == nullptr);
}

TEST_CASE(
    "how often it is mapped: by leases that say so, until they are given back or their reader has gone") {
    GrantBook book;
    const auto grant = added(book, 1, 0, 100);
    const auto times = [&] { return GrantBook::times_mapped(*grant); };
    CHECK(book.hold(token_of(1), "x"));
    CHECK(times() == 0);
    for (const char* reader : {"x", "x", "y"}) CHECK(book.hold(token_of(1), reader, true));
    CHECK(times() == 3);
    book.release(token_of(1), grant->ended, "x", 0);  // the one that isn't
    CHECK(times() == 3);
    book.release(token_of(1), grant->ended, "x", 0, true);
    CHECK(times() == 2);
    CHECK(book.expire(1000).empty());
    book.reader_gone("y", false, 0);
    CHECK(times() == 1);
    book.end(grant, GrantState::revoked);
    CHECK(times() == 0);  // nobody's way is barred any more
}

TEST_CASE("a grant for writing can't be mapped") {
    GrantBook book;
    REQUIRE(book.add(grant_of(1, GrantMode::write), 0));
    CHECK_FALSE(book.hold(token_of(1), "x", true));
    CHECK(book.hold(token_of(1), "x"));
}

TEST_CASE("the clock of a grant has a whole ttl again when the last lease goes") {
    GrantBook book;
    const auto grant = added(book, 1, 2, 100);
    CHECK(book.hold(token_of(1), "x"));
    CHECK(book.release(token_of(1), grant->ended, "x", 5000) == nullptr);
    CHECK(book.next_deadline() <= 5100);
    CHECK(book.expire(5099).empty());
    CHECK(book.expire(5100) == std::vector{grant});
    CHECK(grant->state == GrantState::expired);
    CHECK(book.next_deadline() == kNever);
}

TEST_CASE("a standing grant serves who was here before, with a lease or without") {
    GrantBook book;
    const auto grant = added(book, 1, 0);
    for (int i = 0; i < 3; ++i) {
        CHECK(book.admit(token_of(1), "x", kRead) == grant);
        CHECK(book.over(grant, "x", true) == nullptr);
        CHECK(book.hold(token_of(1), "x"));
        CHECK(book.release(token_of(1), grant->ended, "x", 0) == nullptr);
    }
    CHECK(grant->finished.empty());
    CHECK(grant->admitted.empty());
}

TEST_CASE("reuse ends every grant on a block, and no other") {
    GrantBook book;
    const auto both = grant_of(1), first = grant_of(2), other_pool = grant_of(3), second = grant_of(4);
    first->blocks = {{1, 1}};
    second->blocks = {{}, {1}};
    other_pool->pool_id = 8;
    for (const auto& grant : {both, first, other_pool, second}) REQUIRE(book.add(grant, 0));
    CHECK(book.end_blocks(7, 0, {9}).empty());
    CHECK(book.end_blocks(7, 5, {1}).empty());
    CHECK(book.end_blocks(6, 0, {1}).empty());
    CHECK(book.end_blocks(7, 0, {3, 1}).size() == 2);
    CHECK(both->state == GrantState::revoked);
    CHECK(first->state == GrantState::revoked);
    CHECK(second->state == GrantState::open);
    CHECK(book.end_blocks(7, 0, {0, 1, 2, 3}).empty());
    CHECK(book.end_pool(8) == std::vector{other_pool});
    CHECK(book.end_pool(7) == std::vector{second});
    CHECK(book.size() == 0);
}

TEST_CASE("a reader that has gone leaves its leases; one that is dead, what was for it alone") {
    GrantBook book;
    const auto named = grant_of(1), open = grant_of(2);
    named->to = "x";
    named->ttl = open->ttl = 100;
    for (const auto& grant : {named, open}) {
        REQUIRE(book.add(grant, 0));
        REQUIRE(book.hold(grant->token, "x"));
    }
    CHECK(book.reader_gone("y", true, 500).empty());
    CHECK(book.reader_gone("", true, 500).empty());
    CHECK(open->state == GrantState::open);
    CHECK(book.reader_gone("x", false, 500).empty());
    CHECK(named->deadline == 600);
    CHECK(book.reader_gone("x", true, 500) == std::vector{named});
    CHECK(book.expire(600) == std::vector{open});
}
