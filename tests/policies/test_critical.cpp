#include "kvcull/policies/critical.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <vector>

#include "kvcull/cache/kv_cache.hpp"
#include "kvcull/policies/h2o.hpp"
#include "kvcull/policies/snapkv.hpp"
#include "kvcull/select/head_rules.hpp"
#include "support/catch.hpp"
#include "support/engine.hpp"
#include "support/failure.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

constexpr CacheShape shape{.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 8, .value_dim = 5};
constexpr std::size_t width = 19, rows_of_wo = 4 * 5, prompt = 50, end = 70;

/// A projection per layer.
struct Weights {
    std::vector<float> numbers;
    std::vector<MatrixView<const float>> layers;

    explicit Weights(std::vector<float> all) : numbers(std::move(all)) {
        for (std::size_t layer = 0; layer < shape.layers; ++layer)
            layers.emplace_back(numbers.data() + layer * rows_of_wo * width, rows_of_wo, width, width);
    }
};
Weights random_weights() {
    return Weights(random_floats(shape.layers * rows_of_wo * width, 9));
}

/// A row's key is its score; the newest row stays.
struct Table {
    static constexpr std::string_view name = "table";
    using State = NoState;
    static constexpr auto fields() { return std::tuple{}; }
    static constexpr Needs needs(Phase /*phase*/) { return {}; }
    static Protected protect(std::size_t /*budget*/) { return {0, 1}; }
    static void observe(State& /*state*/, const HeadStep& /*step*/) {}
    static void score(const State& /*state*/, const HeadStep& step, std::span<float> out) {
        for (std::size_t j = 0; j < out.size(); ++j) step.cached.k.widen(j, out.subspan(j, 1));
    }
};

template <class P, class Rule = Uniform>
std::vector<std::vector<position_t>> positions_after(const P& policy, const Stream& stream,
                                                     std::size_t tokens, std::size_t budget, Rule rule = {}) {
    KVCache cache(shape, policy, {.tokens = budget}, rule);
    feed_prompt(cache, stream, 0, prompt, 13);
    feed_decode(cache, stream, prompt, tokens);
    std::vector<std::vector<position_t>> all;
    for (std::size_t layer = 0; layer < shape.layers; ++layer)
        for (std::size_t h = 0; h < shape.kv_heads; ++h) all.push_back(cache.positions(layer, h));
    return all;
}

}  // namespace

TEST_CASE("norms of projected values are those of naive loops on every instruction set", "[differential]") {
    const std::size_t n = 37, dim = 5, group = 2;
    const auto v = random_floats(n * dim, 1), wo = random_floats(group * dim * width, 2);
    for (const simd::Isa isa : simd::all_isas) {
        if (!simd::available(isa)) continue;
        std::vector<float> norms(n), scratch(projected_scratch(dim, width));
        projected_norms(simd::kernels_for(isa), {v.data(), n, dim, dim},
                        {wo.data(), group * dim, width, width}, group, norms, scratch.data());
        for (std::size_t j = 0; j < n; ++j) {
            double want = 0;
            for (std::size_t g = 0; g < group; ++g)
                for (std::size_t c = 0; c < width; ++c) {
                    double sum = 0;
                    for (std::size_t i = 0; i < dim; ++i)
                        sum += static_cast<double>(v[j * dim + i]) *
                               static_cast<double>(wo[(g * dim + i) * width + c]);
                    want += std::abs(sum);
                }
            REQUIRE(close(norms[j], want / 2, 1e-5, 0));
        }
    }
}

TEST_CASE("with equal norms the second stage keeps what the score keeps", "[property]") {
    Stream stream = random_stream(shape, end, 4);
    std::fill(stream.v.begin(), stream.v.end(), 0.5F);
    const Weights weights = random_weights();
    const H2O base{.recent = 3};
    for (const std::size_t half : {0U, 300U, 500U, 1000U})
        REQUIRE(positions_after(Critical<H2O>{base, weights.layers, half}, stream, end, 12) ==
                positions_after(base, stream, end, 12));
}

TEST_CASE("a first stage that takes every place is the base", "[property]") {
    const Stream stream = random_stream(shape, end, 5);
    const Weights weights = random_weights();
    const SnapKV base{.window = 4, .kernel = 3, .decode_interval = 5};
    const auto want = positions_after(base, stream, end, 12);
    REQUIRE(positions_after(Critical<SnapKV>{base, weights.layers, 1000}, stream, end, 12) == want);
    REQUIRE(positions_after(Critical<SnapKV>{base, weights.layers, 0, 12}, stream, end, 12) == want);
    REQUIRE(positions_after(Critical<SnapKV>{base, weights.layers, 0}, stream, end, 12) != want);
    REQUIRE(positions_after(Critical<SnapKV>{base, weights.layers, 1000}, stream, end, 12, AdaKV<>{}) ==
            positions_after(base, stream, end, 12, AdaKV<>{}));
}

TEST_CASE("stages choose in turn among what is left", "[contract]") {
    // The second stage ranks by (score + eps) * |v|, as Wo is one row of ones.
    const CacheShape one{.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 1};
    const std::vector<float> wo{1.0F};
    const MatrixView<const float> projection[] = {{wo.data(), 1, 1, 1}};
    const Stream stream{.shape = one,
                        .tokens = 8,
                        .q = std::vector<float>(8),
                        .k = {5, 4, 3, 2, 1, 0, 0, 0},
                        .v = {0, 0, 1, 1, 10, 1000, 1, 1}};
    const auto kept = [&](std::size_t half, std::size_t safe, float eps) {
        KVCache cache(one, Critical<Table>{{}, projection, half, safe, eps}, {.tokens = 4});
        feed_prompt(cache, stream, 0, 8, 8);
        return cache.positions(0, 0);
    };
    using Positions = std::vector<position_t>;
    CHECK(kept(500, 0, 0.0F) == Positions{0, 2, 4, 7});  // first stage: one besides the window
    CHECK(kept(750, 0, 0.0F) == Positions{0, 1, 4, 7});
    CHECK(kept(500, 3, 0.0F) == Positions{0, 1, 4, 7});
    CHECK(kept(250, 0, 0.0F) == Positions{2, 3, 4, 7});  // the window alone fills the first stage
    CHECK(kept(500, 0, 0.1F) == Positions{0, 4, 5, 7});  // eps lets a great value in without a score
    CHECK(kept(1000, 0, 0.0F) == Positions{0, 1, 2, 7});
}

TEST_CASE("parameters and projections that do not fit are refused", "[contract]") {
    using error::config_error;
    const Weights weights = random_weights();
    const auto make = [&](Critical<H2O> policy) { KVCache(shape, policy, {.tokens = 9}); };
    CHECK(failure<config_error>([&] { make({}); }) == "critical: number of projections is 0, want 2");
    CHECK_THROWS_AS(make({H2O{}, weights.layers, 1001}), config_error);
    CHECK_THROWS_AS(make({H2O{}, weights.layers, 500, 0, -1.0F}), config_error);
    CHECK_THROWS_AS(make({H2O{}, weights.layers, 500, 0, std::numeric_limits<float>::quiet_NaN()}),
                    config_error);
    CHECK_THROWS_AS(KVCache(shape, Critical<SnapKV>{SnapKV{.window = 9}, weights.layers}, {.tokens = 9}),
                    config_error);  // the base's own check
    CHECK(failure<config_error>([&] {
              make({H2O{}, std::span(weights.layers).first(1)});
          }) == "critical: number of projections is 1, want 2");
    std::vector<MatrixView<const float>> narrow = weights.layers;
    narrow[1].rows = 19;
    CHECK(failure<config_error>([&] {
              make({H2O{}, narrow});
          }) == "critical: rows of a projection is 19, want q_heads * value_dim = 20");
}
