#include "kvcull/select/head_rules.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/random.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

/// The heads of a layer: scores without ties, rows in the order of their positions.
struct Layer {
    std::vector<std::vector<float>> score;
    std::vector<std::vector<position_t>> position;
    std::vector<Candidates> heads;

    Layer(std::vector<std::vector<float>> scores, std::size_t size, Protected protect)
        : score(std::move(scores)) {
        for (const auto& head : score) {
            position.emplace_back(head.size());
            std::iota(position.back().begin(), position.back().end(), position_t{0});
        }
        for (std::size_t h = 0; h < score.size(); ++h)
            heads.push_back({score[h], PositionsView(position[h]), size, protect});
    }
};
Layer random_layer(std::uint64_t seed, std::size_t heads, std::size_t n, std::size_t size,
                   Protected protect) {
    std::vector<std::vector<float>> scores;
    for (std::size_t h = 0; h < heads; ++h) {
        scores.push_back(random_floats(n, seed * 16 + h, 1.0F + static_cast<float>(h)));
        for (float& one : scores.back()) one = std::abs(one);
    }
    return {std::move(scores), size, protect};
}
template <class Rule>
std::vector<std::size_t> divide(const Rule& rule, const Layer& layer, std::size_t mean,
                                std::size_t index = 0) {
    std::vector<std::size_t> sizes(layer.heads.size());
    rule.head_sizes(index, layer.heads, mean, sizes);
    return sizes;
}
std::size_t sum(const std::vector<std::size_t>& sizes) {
    return std::accumulate(sizes.begin(), sizes.end(), std::size_t{0});
}
/// How many of the `count` best candidates of all heads lie in each, by a full sort.
std::vector<std::size_t> best_per_head(const Layer& layer, std::size_t count, Protected protect) {
    std::vector<std::tuple<float, position_t, std::size_t>> all;
    for (std::size_t h = 0; h < layer.score.size(); ++h)
        for (std::size_t j = protect.sinks; j < layer.score[h].size() - protect.recent; ++j)
            all.emplace_back(-layer.score[h][j], -layer.position[h][j], h);
    std::sort(all.begin(), all.end());
    std::vector<std::size_t> counts(layer.score.size());
    for (std::size_t i = 0; i < count; ++i) ++counts[std::get<2>(all[i])];
    return counts;
}
std::vector<std::size_t> less(std::vector<std::size_t> sizes, std::size_t stay) {
    for (std::size_t& size : sizes) size -= stay;
    return sizes;
}

constexpr AdaMode modes[] = {AdaMode::interpolate, AdaMode::floor_fill};

}  // namespace

TEST_CASE("competing heads spend the budget exactly and keep their guaranteed share", "[property]") {
    for (std::uint64_t seed = 0; seed < 60; ++seed)
        for (const AdaMode mode : modes)
            for (const std::size_t alpha : {0U, 1U, 200U, 333U, 999U, 1000U})
                for (const bool normalize : {false, true}) {
                    if (normalize && mode == AdaMode::floor_fill) continue;
                    const std::size_t heads = 1 + seed % 5, n = 40 + seed, mean = 12 + seed % 17;
                    const Protected protect{seed % 3, 4};
                    const std::size_t stay = protect.sinks + 4, places = mean - stay;
                    const Layer layer = random_layer(seed, heads, n, mean, protect);
                    const AdaKV<> rule{.mode = mode, .alpha_permille = alpha, .normalize = normalize};
                    CAPTURE(seed, static_cast<int>(mode), alpha, normalize);
                    const auto sizes = divide(rule, layer, mean);
                    REQUIRE(sum(sizes) == heads * mean);
                    const std::size_t safe = mode == AdaMode::interpolate
                                                 ? alpha * places / 1000
                                                 : alpha * mean / 1000 - std::min(alpha * mean / 1000, stay);
                    for (const std::size_t size : sizes) {
                        REQUIRE(size >= stay + safe);
                        REQUIRE(size <= n);
                    }
                    if (alpha == 1000) REQUIRE(sizes == std::vector<std::size_t>(heads, mean));
                    if (alpha == 0 && !normalize)
                        REQUIRE(less(sizes, stay) == best_per_head(layer, heads * places, protect));
                }
}

TEST_CASE("sizes follow their heads when these change places", "[property]") {
    for (const AdaMode mode : modes) {
        const Layer layer = random_layer(3, 4, 60, 20, {0, 4});
        auto sizes = divide(AdaKV<>{.mode = mode, .alpha_permille = 0}, layer, 20);
        const Layer turned({layer.score[2], layer.score[0], layer.score[3], layer.score[1]}, 20, {0, 4});
        REQUIRE(divide(AdaKV<>{.mode = mode, .alpha_permille = 0}, turned, 20) ==
                std::vector<std::size_t>{sizes[2], sizes[0], sizes[3], sizes[1]});
    }
}

TEST_CASE("equal scores divide a layer evenly up to one row", "[property]") {
    for (const AdaMode mode : modes)
        for (const std::size_t alpha : {0U, 200U, 700U})
            for (const float same : {0.0F, 1.0F, std::numeric_limits<float>::quiet_NaN()}) {
                const Layer layer(std::vector(3, std::vector(30, same)), 10, {0, 3});
                for (const std::size_t size :
                     divide(AdaKV<>{.mode = mode, .alpha_permille = alpha}, layer, 10)) {
                    REQUIRE(size >= 9);
                    REQUIRE(size <= 11);
                }
            }
}

TEST_CASE("a head of NaNs and a head of zeros get no more than they are guaranteed", "[property]") {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const Layer layer({std::vector(30, nan), std::vector(30, 1.0F), std::vector(30, 0.0F)}, 9, {0, 1});
    REQUIRE(divide(AdaKV<>{.alpha_permille = 0}, layer, 9) == std::vector<std::size_t>{1, 25, 1});
    REQUIRE(divide(AdaKV<>{.alpha_permille = 500}, layer, 9) == std::vector<std::size_t>{5, 17, 5});
    REQUIRE(divide(AdaKV<>{.alpha_permille = 500, .normalize = true}, layer, 9) ==
            std::vector<std::size_t>{5, 17, 5});
    REQUIRE(divide(AdaKV<>{.mode = AdaMode::floor_fill, .alpha_permille = 500}, layer, 9) ==
            std::vector<std::size_t>{4, 19, 4});
}

TEST_CASE("normalizing damps heads whose mass is not concentrated", "[property]") {
    std::vector<float> sharp(40, 0.0F), flat(40, 1.0F);
    std::fill(sharp.begin(), sharp.begin() + 10, 0.9F);
    const Layer layer({sharp, flat}, 10, {});
    REQUIRE(divide(AdaKV<>{.alpha_permille = 0}, layer, 10) == std::vector<std::size_t>{0, 20});
    // The flat head's best ten hold a quarter of its mass.
    REQUIRE(divide(AdaKV<>{.alpha_permille = 0, .normalize = true}, layer, 10) ==
            std::vector<std::size_t>{10, 10});
}

TEST_CASE("ragged heads keep their total, whatever is cached of each", "[property]") {
    for (const AdaMode mode : modes)
        for (std::uint64_t seed = 0; seed < 40; ++seed) {
            std::vector<std::vector<float>> scores;
            for (std::size_t h = 0; h < 4; ++h)
                scores.push_back(random_floats((seed * 7 + h * 13) % 50, seed + h));
            const Layer layer(std::move(scores), 15, {1, 3});
            CAPTURE(seed);
            REQUIRE(sum(divide(AdaKV<>{.mode = mode}, layer, 15)) == 4 * 15);
        }
}

TEST_CASE("of equal scores the later position wins, then the lower head", "[contract]") {
    const Layer layer({std::vector(5, 1.0F), std::vector(6, 1.0F)}, 4, {});
    // Eight places: 5, then 4, 3 and 2 of both heads, then one of the two rows at 1.
    REQUIRE(divide(AdaKV<>{.alpha_permille = 0}, layer, 4) == std::vector<std::size_t>{4, 4});
}

TEST_CASE("places that no row wants are shared evenly", "[contract]") {
    const Layer layer({{3, 2, 1}, {9, 8, 7}}, 10, {0, 1});
    for (const AdaMode mode : modes)
        REQUIRE(divide(AdaKV<>{.mode = mode}, layer, 10) == std::vector<std::size_t>{10, 10});
}

TEST_CASE("heads rounded as the authors do round a half to the even number", "[contract]") {
    const auto sizes = [](std::size_t mean, std::size_t second_head_wins) {
        std::vector<float> second(20, 0.0F);
        std::fill_n(second.begin(), second_head_wins, 5.0F);
        const Layer layer({std::vector(20, 1.0F), second}, mean, {});
        return divide(AdaKV<>{.alpha_permille = 500, .head_rounding = Rounding::authors}, layer, mean);
    };
    REQUIRE(sizes(3, 1) == std::vector<std::size_t>{4, 2});  // 3.5 and 1.5
    REQUIRE(sizes(4, 1) == std::vector<std::size_t>{6, 2});  // 5.5 and 2.5
    REQUIRE(sizes(3, 0) == std::vector<std::size_t>{4, 1});  // one short
}

TEST_CASE("layers that are skipped stay even", "[contract]") {
    const Layer layer = random_layer(5, 3, 50, 10, {});
    const AdaKV<> rule{.skip = 2};
    REQUIRE(divide(rule, layer, 10, 1) == std::vector<std::size_t>{10, 10, 10});
    REQUIRE(divide(rule, layer, 10, 2) != std::vector<std::size_t>{10, 10, 10});
}

TEST_CASE("a table gives every head its own number of rows", "[contract]") {
    const Layer layer = random_layer(6, 2, 20, 10, {1, 2});
    const HeadTable table{{7, 7, 0, 100}, 2};
    REQUIRE(divide(table, layer, 10, 0) == std::vector<std::size_t>{10, 10});
    REQUIRE(divide(table, layer, 10, 1) == std::vector<std::size_t>{3, 20});
}

TEST_CASE("head rules refuse what they cannot divide", "[contract]") {
    using error::config_error;
    const auto refusal = [](const auto& rule, std::size_t mean, Protected protect) {
        return failure<config_error>([&] {
            std::vector<std::size_t> sizes(3);
            rule.layer_sizes(mean, 0, protect, sizes);
        });
    };
    CHECK(refusal(AdaKV<>{.alpha_permille = 1001}, 10, {}) ==
          "ada: alpha_permille is 1001, want at most 1000");
    CHECK(refusal(AdaKV<>{}, 10, {0, 10}) == "ada: budget is 10, want more than the 10 protected rows");
    CHECK(refusal(AdaKV<Pyramid>{.layers = {.beta = 0}}, 10, {}) == "pyramid: beta is 0, want at least 1");
    CHECK(refusal(AdaKV<>{.mode = AdaMode::floor_fill, .normalize = true}, 10, {}) ==
          "ada: normalize is true, want false with floor_fill");
    CHECK(refusal(HeadTable{{1, 2, 3}, 2}, 10, {}) ==
          "table: number of capacities is 3, want layers * kv_heads = 6");
}
