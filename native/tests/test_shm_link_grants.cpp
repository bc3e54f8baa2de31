// Grants that one end of a link shows and the other finds: what can be read, until when, and what is kept.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "shm_link_pair.hpp"

using namespace kvt;
using namespace kvt::test;
using backends::Copied;
using backends::FoundGrant;
using backends::OpenGrant;
using backends::Standing;
using memory::Ids;

namespace {

constexpr std::size_t kSize = 1 << 20;
constexpr protocol::Token kToken{std::byte{7}}, kOther{std::byte{8}};

struct Showing {
    explicit Showing(bool shared) : memory(kSize, shared), into(kSize, true, 2) {
        std::fill(content_of_into(), content_of_into() + kSize, std::byte{0});
    }
    std::shared_ptr<backends::Publication> show(const protocol::Token& token, const std::vector<Ids>* blocks,
                                                bool counted = false) {
        auto shown = links.source.link->publication();
        shown->publish(OpenGrant{token, memory.source().pool, blocks, counted});
        return shown;
    }
    std::shared_ptr<const FoundGrant> find(const protocol::Token& token) {
        return links.sink.link->find_grant(token);
    }
    Copied copy(const FoundGrant& grant) {
        const memory::StreamPlan from(grant.shape, {0}, {std::make_shared<const Ids>(Ids{0})},
                                      memory::Heads::every());
        return grant.copy(from, *into.plan);
    }
    std::byte* content_of_into() { return reinterpret_cast<std::byte*>(into.segments[0].base); }
    bool arrived() { return std::equal(memory.content.begin(), memory.content.end(), content_of_into()); }

    Memory memory, into;
    Links links;
};

const std::vector<Ids> kBlockZero{{0}};

}  // namespace

TEST_CASE("what is shown is found and copied; nothing else is found") {
    for (const bool shared : {true, false}) {
        CAPTURE(shared);
        Showing at(shared);
        const auto shown = at.show(kToken, &kBlockZero);
        CHECK(at.find(kOther) == nullptr);
        const auto found = at.find(kToken);
        REQUIRE(found);
        CHECK(found->blocks == kBlockZero);
        CHECK_FALSE(found->every_block);
        CHECK_FALSE(found->counted);
        CHECK(found->terms->layers.size() == 1);
        CHECK(at.copy(*found) == Copied::good);
        CHECK(at.arrived());
        CHECK(at.find(kToken) == found);  // kept: not looked for again
    }
}

TEST_CASE("F14, F15: after its end it isn't found, and what was found before is stale") {
    for (const bool shared : {true, false}) {
        CAPTURE(shared);
        Showing at(shared);
        auto shown = at.show(kToken, nullptr, true);
        const auto found = at.find(kToken);
        REQUIRE(found);
        CHECK(found->every_block);
        CHECK(found->counted);
        shown->end();
        CHECK(at.copy(*found) == Copied::stale);
        CHECK(at.find(kToken) == nullptr);
        shown = at.show(kToken, nullptr);  // the same token, another grant
        CHECK(at.find(kToken) != nullptr);
        CHECK(at.copy(*found) == Copied::stale);
        shown = nullptr;  // the last who knows of it
        CHECK(at.find(kToken) == nullptr);
    }
}

TEST_CASE("how it stands is known until the link goes; its memory can be read for longer") {
    std::shared_ptr<const FoundGrant> found;
    const int before = mappings("test-pool");
    {
        Showing at(true);
        auto shown = at.show(kToken, nullptr);
        found = at.find(kToken);
        REQUIRE(found);
        CHECK(found->mapped);
        CHECK(found->standing() == Standing::good);
        shown->end();
        CHECK(found->standing() == Standing::ended);
        shown = at.show(kToken, nullptr);
        found = at.find(kToken);
        REQUIRE(found);
        CHECK(found->standing() == Standing::good);
    }
    CHECK(found->standing() == Standing::ended);
    const auto* const at = reinterpret_cast<const std::byte*>(found->shape->layers()[0].parts[0].base);
    CHECK(at[1] == std::byte{7});
    CHECK(mappings("test-pool") == before + 1);
    found.reset();
    CHECK(mappings("test-pool") == before);
}

TEST_CASE("memory that can't be mapped is no memory of ours") {
    Showing at(false);
    const auto shown = at.show(kToken, nullptr);
    REQUIRE(at.find(kToken));
    CHECK_FALSE(at.find(kToken)->mapped);
}

// The owner's connection is lost first, its reader finds out later; from then on nobody could tell it.
TEST_CASE("F14: what the owner's link showed has ended when the link is closed, for good") {
    Showing at(true);
    const auto shown = at.show(kToken, nullptr), late = at.links.source.link->publication();
    const auto found = at.find(kToken);
    REQUIRE(found);
    at.links.source.link->close();
    CHECK(found->standing() == Standing::ended);
    CHECK(at.copy(*found) != Copied::good);
    late->publish(OpenGrant{kOther, at.memory.source().pool, nullptr, false});
    CHECK(at.find(kOther) == nullptr);
    shown->end();
}

TEST_CASE("who asks for a publication before the reactor has read the channel gets one") {
    auto ends = channel();
    End source(std::move(ends.first)), sink(std::move(ends.second));
    sink.link->start();  // its board is in the socket
    CHECK_FALSE(source.link->up());
    source.link->catch_up();
    CHECK(source.link->up());
    until([&] { return source.host->came_up.load() == 1; });  // and the connection hears of it
}

TEST_CASE("a grant that ends before it is shown never is") {
    Showing at(true);
    const auto shown = at.links.source.link->publication();
    shown->end();
    shown->publish(OpenGrant{kToken, at.memory.source().pool, nullptr, false});
    CHECK(at.find(kToken) == nullptr);
}

TEST_CASE("an end waits for the showing that is under way, at any moment of it") {
    Showing at(true);
    std::vector<Ids> blocks{Ids(20'000)};
    for (int i = 0; i < 300; ++i) {
        const auto shown = at.links.source.link->publication();
        std::atomic<bool> begun{false};
        std::thread owner([&] {
            begun.store(true);
            shown->publish(OpenGrant{kToken, at.memory.source().pool, &blocks, false});
        });
        while (!begun.load()) {
        }
        for (int spin = 0; spin < i * 40; ++spin) std::atomic_signal_fence(std::memory_order_seq_cst);
        shown->end();
        CHECK(at.find(kToken) == nullptr);  // from here on its blocks may be rewritten
        owner.join();
        CHECK(at.find(kToken) == nullptr);
    }
}

TEST_CASE("what the board has no room for isn't shown") {
    Showing at(true);
    const std::vector<Ids> many{Ids(backends::kBoardIds + 1)};
    const auto shown = at.show(kToken, &many);
    CHECK(at.find(kToken) == nullptr);
    const auto other = at.show(kOther, &kBlockZero, true);
    const auto found = at.find(kOther);
    REQUIRE(found);
    CHECK(found->counted);
}

TEST_CASE("M17: a grant on a group that its pool hasn't is a violation") {
    Showing at(true);
    const std::vector<Ids> blocks{{}, {0}};
    const auto shown = at.show(kToken, &blocks);
    CHECK_THROWS_AS(at.find(kToken), protocol::Violation);
}

TEST_CASE("a pool that is closed is let go of, also by what was found of it") {
    Showing at(true);
    const auto shown = at.show(kToken, &kBlockZero);
    {
        const auto found = at.find(kToken);
        REQUIRE(found);
        CHECK(at.copy(*found) == Copied::good);
    }
    const int before = mappings("test-pool");
    shown->end();
    at.links.source.link->forget_pool(1);
    until([&] { return mappings("test-pool") == before - 1; });
    CHECK(at.find(kToken) == nullptr);
}

TEST_CASE("as many as come are found, though not all are kept") {
    Showing at(true);
    std::vector<std::shared_ptr<backends::Publication>> shown;
    for (unsigned i = 0; i < 2'000; ++i) {
        protocol::Token token{};
        token[0] = static_cast<std::byte>(i);  // its place on the board
        token[1] = static_cast<std::byte>(i >> 8);
        shown.push_back(at.show(token, &kBlockZero));
        CHECK(at.find(token) != nullptr);
    }
    CHECK(at.copy(*at.find(protocol::Token{})) == Copied::good);
}

TEST_CASE("a link that breaks shows nothing any more, and an end still works") {
    Showing at(true);
    const auto shown = at.show(kToken, &kBlockZero);
    const auto found = at.find(kToken);
    REQUIRE(found);
    at.links.sink.link->close();
    CHECK(at.copy(*found) == Copied::broke);
    until([&] { return at.links.source.host->broke.load() == 1; });
    shown->end();
}
