// What two pools agree on: each field, both ways round, by name and by position.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "protocol/terms.hpp"

#include <doctest/doctest.h>

using namespace kvt::protocol;

namespace {

PoolTerms pool(bool named = true) {
    return {"kv",
            named,
            {{"full", false, "bf16", "HND", "packed", 16}, {"window", false, "bf16", "HND", "packed", 16}},
            {{"a", 0}, {"b", 0}, {"c", 1}}};
}
Terms terms() { return {1, {{0, 2}, {1, 3}}, {{0, 10}, {1, 20}, {2, 30}}}; }

// Both sides compare, and must say the same from their own point of view.
std::string path_of(const PoolTerms& source, const Terms& from, const PoolTerms& destination,
                    const Terms& to) {
    const Fit theirs = fit({&source, &from}, {&destination, &to}, true);
    const Fit ours = fit({&source, &from}, {&destination, &to}, false);
    REQUIRE(theirs.mismatch.has_value() == ours.mismatch.has_value());
    CHECK(theirs.order == ours.order);
    if (!ours.mismatch) {
        return "";
    }
    CHECK(theirs.mismatch->path == ours.mismatch->path);
    CHECK(theirs.mismatch->ours == ours.mismatch->theirs);
    CHECK(theirs.mismatch->theirs == ours.mismatch->ours);
    return ours.mismatch->path;
}

}  // namespace

TEST_CASE("each field that must agree is named") {
    CHECK(path_of(pool(), terms(), pool(), terms()) == "");
    struct Case {
        const char* path;
        void (*change)(PoolTerms&, Terms&);
    };
    const Case cases[] = {
        {"dtype", [](PoolTerms& p, Terms&) { p.groups[0].dtype = "fp8"; }},
        {"order", [](PoolTerms& p, Terms&) { p.groups[0].order = "NHD"; }},
        {"kv", [](PoolTerms& p, Terms&) { p.groups[1].kv = "split"; }},
        {"tokens_per_block", [](PoolTerms& p, Terms&) { p.groups[1].tokens_per_block = 32; }},
        {"groups", [](PoolTerms& p, Terms&) { p.groups[1].name = "sliding"; }},
        {"blocks", [](PoolTerms&, Terms& t) { t.groups[1].blocks = 4; }},
        {"piece_nbytes", [](PoolTerms&, Terms& t) { t.layers[2].piece_nbytes = 31; }},
        {"layers", [](PoolTerms&, Terms& t) { t.layers.pop_back(); }},
        {"layers", [](PoolTerms& p, Terms&) { p.layers[2].name = "d"; }},
    };
    for (const Case& one : cases) {
        CAPTURE(one.path);
        PoolTerms other = pool();
        Terms others = terms();
        one.change(other, others);
        CHECK(path_of(pool(), terms(), other, others) == one.path);
        CHECK(path_of(other, others, pool(), terms()) == one.path);
    }
}

TEST_CASE("layers pair by name if both have names, else by position; opaque pools ask for bytes alone") {
    Terms turned = terms();
    std::swap(turned.layers[0], turned.layers[2]);
    const PoolTerms both = pool();
    const Fit found = fit({&both, &turned}, {&both, &turned}, true);
    CHECK(found.in_order);
    const Terms straight = terms();
    const Fit reordered = fit({&both, &turned}, {&both, &straight}, false);
    CHECK_FALSE(reordered.in_order);
    CHECK(reordered.order == std::vector<std::uint32_t>{2, 1, 0});
    PoolTerms plain = pool(false);
    for (auto& layer : plain.layers) layer.name += "'";
    CHECK(path_of(plain, terms(), pool(), terms()) == "");
    PoolTerms opaque = pool();
    for (auto& group : opaque.groups) group = {group.name, true, "", "", "", 0};
    CHECK(path_of(opaque, terms(), pool(), terms()) == "");
}

TEST_CASE("terms are checked against their pool, without overflow") {
    CHECK(check_terms(pool(), terms()).empty());
    CHECK(stream_nbytes(pool(), terms()) == 2 * 10 + 2 * 20 + 3 * 30);
    const auto wrong = [](void (*change)(Terms&)) {
        Terms bent = terms();
        change(bent);
        return !check_terms(pool(), bent).empty();
    };
    CHECK(wrong([](Terms& t) { t.groups[1].index = 2; }));
    CHECK(wrong([](Terms& t) { t.groups[1].index = 0; }));
    CHECK(wrong([](Terms& t) { t.layers[0].index = 3; }));
    CHECK(wrong([](Terms& t) { t.layers[1].index = 0; }));
    CHECK(wrong([](Terms& t) { t.layers[0].piece_nbytes = ~std::uint64_t{0}; }));
    CHECK(wrong([](Terms& t) { t.layers[0].piece_nbytes = std::uint64_t{1} << 61; }));
    CHECK(wrong([](Terms& t) {
        t.groups[0].blocks = 0xffffffff, t.layers[0].piece_nbytes = std::uint64_t{1} << 31;
    }));
}
