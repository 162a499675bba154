#include "kvcull/select/layer_profile.hpp"

#include <cmath>
#include <vector>

#include "kvcull/attention/rope.hpp"
#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/random.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

/// Keys of `heads` heads with `n` rows each, as a cache of one KV head per layer.
struct Keys {
    std::vector<float> values;
    std::vector<HeadView> views;

    Keys(std::vector<float> numbers, std::size_t heads, std::size_t n, std::size_t dim)
        : values(std::move(numbers)) {
        for (std::size_t i = 0; i < heads; ++i)
            views.push_back({.k = {values.data() + i * n * dim, n, dim, dim}, .v = {}, .position = {}});
    }
    [[nodiscard]] CacheView view(std::size_t kv_heads = 1) const { return {views, kv_heads}; }
};

}  // namespace

TEST_CASE("the block mask is the published condition on every pair", "[differential]") {
    for (const BlockMask mask : {BlockMask{4, 1, 2}, BlockMask{5, 5, 0}, BlockMask{3, 0, 3},
                                 BlockMask{1, 0, 1}, BlockMask{6, 2, 100}})
        for (std::size_t i = 0; i < 30; ++i)
            for (std::size_t j = 0; j < 30; ++j) {
                const std::size_t b = mask.block, overlap = std::min(mask.overlap, b);
                const bool wanted = j <= i && (j < mask.sinks || j / b == i / b ||
                                               (j / b + 1 == i / b && j >= (j / b + 1) * b - overlap));
                const Visible row = mask.row(i);
                CAPTURE(b, mask.sinks, overlap, i, j);
                REQUIRE((j < row.end && (j < row.sinks || j >= row.begin)) == wanted);
            }
    CHECK(failure<error::config_error>([] { (void)BlockMask{.block = 3, .sinks = 4}.row(0); }) ==
          "BlockMask: block is 3, want at least 1 and the 4 sinks");
}

TEST_CASE("similarity is 1 for equal keys and in the first layer, and no rotation changes it", "[property]") {
    const std::size_t layers = 3, n = 11, dim = 8;
    std::vector<float> a = random_floats(layers * n * dim, 1), b = random_floats(layers * n * dim, 2);
    const Keys full(a, layers, n, dim), masked(b, layers, n, dim);
    const Rope turn = rope(dim);
    for (std::size_t i = 0; i < layers * n; ++i)
        for (auto* keys : {&a, &b})
            rotate(turn, static_cast<position_t>(i % n), std::span(*keys).subspan(i * dim, dim));
    const Keys turned(a, layers, n, dim), turned_masked(b, layers, n, dim);
    for (const KeySimilarity measure : {KeySimilarity::token, KeySimilarity::window}) {
        CHECK(layer_similarity(full.view(), full.view(), measure, 4) == std::vector<float>{1, 1, 1});
        const auto plain = layer_similarity(full.view(), masked.view(), measure, 4),
                   rotated = layer_similarity(turned.view(), turned_masked.view(), measure, 4);
        CHECK(plain[0] == 1.0F);
        for (std::size_t l = 1; l < layers; ++l) {
            CHECK(plain[l] < 0.9F);
            CHECK(std::abs(plain[l] - rotated[l]) < 1e-5F);
        }
    }
}

TEST_CASE("a last window counts as much as the others, and keys of zeros are alike", "[property]") {
    // Tokens 0 and 1 agree, token 2 is opposite: windows of two give (1 - 1) / 2, tokens (1 + 1 - 1) / 3.
    const Keys full({1, 1, 1, 1, 2, 3}, 2, 3, 1), masked({1, 1, 1, 1, 2, -3}, 2, 3, 1);
    CHECK(std::abs(layer_similarity(full.view(), masked.view(), KeySimilarity::window, 2)[1]) < 1e-7F);
    CHECK(std::abs(layer_similarity(full.view(), masked.view())[1] - 1.0F / 3) < 1e-7F);
    const Keys zeros({0, 0, 0, 0}, 2, 2, 1), half({0, 0, 0, 5}, 2, 2, 1);
    CHECK(layer_similarity(zeros.view(), zeros.view())[1] == 1.0F);
    CHECK(layer_similarity(zeros.view(), half.view())[1] == 0.5F);
}

TEST_CASE("caches that do not fit each other have no similarity", "[contract]") {
    const Keys two({1, 2, 3, 4}, 2, 2, 1), one({1, 2}, 2, 1, 1), none({}, 1, 0, 1);
    CHECK(failure<error::shape_error>([&] { (void)layer_similarity(two.view(), one.view()); }) ==
          "layer_similarity: masked.heads[0].k.rows() is 1, want 2");
    CHECK(failure<error::shape_error>([&] { (void)layer_similarity(none.view(), none.view()); }) ==
          "layer_similarity: full.heads[0].k.rows() is 0, want at least 1");
    CHECK(failure<error::config_error>([&] {
              (void)layer_similarity(two.view(), two.view(), KeySimilarity::window, 0);
          }) == "layer_similarity: window is 0, want at least 1");
}
