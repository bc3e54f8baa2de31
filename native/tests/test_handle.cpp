// What a handle keeps of its transfer when it is over.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <numeric>

#include "engine/connection.hpp"
#include "engine/handle.hpp"

using namespace kvt;

TEST_CASE("a peer that corrupts a block in many places makes it one id, and the ids are listed once") {
    constexpr std::uint32_t kBlocks = 100'000, kPiece = 64;
    const auto shape = std::make_shared<const memory::PoolShape>(
        std::vector<memory::Group>{{"g", kBlocks, 0, true, "", "", "", 0}},
        std::vector<memory::Layer>{{"layer0", 0, {{std::uintptr_t{1} << 32, kPiece, {}, kPiece, -1}}}},
        false);
    auto ids = std::make_shared<memory::Ids>(kBlocks);
    std::iota(ids->begin(), ids->end(), 0u);
    const auto plan = std::make_shared<const memory::StreamPlan>(
        shape, std::vector<std::uint32_t>{0}, std::vector<std::shared_ptr<const memory::Ids>>{ids},
        memory::Heads::every());
    const auto pool = std::make_shared<engine::Pool>(1, "kv", shape, true);
    engine::TransferHandle handle(nullptr, pool, plan);
    handle.role = protocol::Role::destination;
    handle.outcome.cause = protocol::Cause::integrity;
    for (std::uint64_t i = 0; i < 4096; ++i) {  // 32 ranges in each of 128 blocks
        handle.corrupt.add({2 * i, 2 * i + 1});
    }
    handle.snapshot("tcp");
    REQUIRE(handle.result.corrupt.size() == 1);
    memory::Ids expected(128);
    std::iota(expected.begin(), expected.end(), 0u);
    CHECK(handle.result.corrupt[0].ids == expected);
    CHECK(handle.result.block_outcomes[0].poisoned.size() == kBlocks);  // nothing has verified
}
