#include "kvcull/select/layer_rules.hpp"

#include <numeric>
#include <vector>

#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/random.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

template <BudgetRule Rule>
std::vector<std::size_t> sizes_of(const Rule& rule, std::size_t layers, std::size_t mean, std::size_t prompt,
                                  Protected protect) {
    std::vector<std::size_t> sizes(layers);
    rule.layer_sizes(mean, prompt, protect, sizes);
    return sizes;
}
std::size_t sum(const std::vector<std::size_t>& sizes) {
    return std::accumulate(sizes.begin(), sizes.end(), std::size_t{0});
}

}  // namespace

TEST_CASE("a pyramid falls from layer to layer and spends the budget exactly", "[property]") {
    for (const std::size_t layers : {1U, 2U, 3U, 7U, 32U})
        for (const std::size_t mean : {9U, 40U, 128U, 501U})
            for (const std::size_t window : {0U, 1U, 8U})
                for (const std::size_t beta : {1U, 2U, 20U, 1000U})
                    for (std::size_t prompt = 1; prompt < 4 * mean; prompt += 1 + mean / 7) {
                        CAPTURE(layers, mean, window, beta, prompt);
                        const auto sizes = sizes_of(Pyramid{.beta = beta}, layers, mean, prompt, {0, window});
                        REQUIRE(sum(sizes) == layers * mean);
                        REQUIRE(std::is_sorted(sizes.rbegin(), sizes.rend()));
                        REQUIRE(sizes.back() >= window);
                        REQUIRE(sizes.front() <= std::max(mean, prompt));
                        if (beta == 1 || prompt < 2 * (mean - window)) REQUIRE(sizes.front() == mean);
                        for (std::size_t l = 0; l < layers; ++l) {
                            const std::size_t mirrored = sizes[l] + sizes[layers - 1 - l];
                            REQUIRE(mirrored + 1 >= 2 * mean);
                            REQUIRE(mirrored <= 2 * mean + 1);
                        }
                    }
}

TEST_CASE("a pyramid counts sinks among the rows that stay", "[property]") {
    const Pyramid pyramid;
    REQUIRE(sizes_of(pyramid, 4, 40, 500, {3, 5}) == sizes_of(pyramid, 4, 40, 500, {0, 8}));
}

TEST_CASE("an unknown prompt counts as a long one", "[contract]") {
    const Pyramid pyramid;
    REQUIRE(sizes_of(pyramid, 4, 40, 0, {0, 8}) == sizes_of(pyramid, 4, 40, 100000, {0, 8}));
}

TEST_CASE("a pyramid that rounds as its authors do spends more", "[property]") {
    const auto sizes = sizes_of(Pyramid{.rounding = Rounding::authors}, 64, 64, 4000, {0, 8});
    REQUIRE(sum(sizes) == 64 * 64 + 32 * (108 % 63));  // high - low = 110 - 2
    REQUIRE(std::is_sorted(sizes.rbegin(), sizes.rend()));
}

TEST_CASE("layers share in proportion to their sensitivity, to the last row", "[property]") {
    for (std::uint64_t seed = 0; seed < 50; ++seed) {
        const std::size_t layers = 1 + seed % 9, mean = 5 + seed;
        std::vector<float> sensitivity = random_floats(layers, seed);
        double total = 0;
        for (float& one : sensitivity) total += static_cast<double>(one = one * one);
        const auto sizes = sizes_of(BySensitivity{sensitivity}, layers, mean, 0, {1, 3});
        CAPTURE(seed);
        REQUIRE(sum(sizes) == layers * mean);
        for (std::size_t l = 0; l < layers; ++l) {
            const double share =
                static_cast<double>(layers * (mean - 4)) * static_cast<double>(sensitivity[l]) / total;
            REQUIRE(std::abs(static_cast<double>(sizes[l] - 4) - share) <= 1.0);
        }
    }
    REQUIRE(sizes_of(BySensitivity{{1, 1, 1}}, 3, 10, 0, {}) == std::vector<std::size_t>{10, 10, 10});
    REQUIRE(sizes_of(BySensitivity{{0, 1, 3}}, 3, 10, 0, {0, 6}) == std::vector<std::size_t>{6, 9, 15});
    REQUIRE(sizes_of(BySensitivity{{1, 1}}, 2, 3, 0, {0, 2}) == std::vector<std::size_t>{3, 3});
}

TEST_CASE("rules refuse what they cannot divide", "[contract]") {
    using error::config_error;
    const auto refusal = [](const auto& rule, std::size_t mean, Protected protect) {
        return failure<config_error>([&] { (void)sizes_of(rule, 3, mean, 0, protect); });
    };
    CHECK(refusal(Pyramid{.beta = 0}, 10, {}) == "pyramid: beta is 0, want at least 1");
    CHECK(refusal(Pyramid{}, 8, {3, 5}) == "pyramid: budget is 8, want more than the 8 protected rows");
    CHECK(refusal(BySensitivity{{1, 2}}, 10, {}) == "sensitivity: number of layers is 2, want 3");
    for (const auto& bad : {std::vector<float>{1, -1, 1},
                            {0, 0, 0},
                            {1, std::numeric_limits<float>::infinity(), 1},
                            {1, std::numeric_limits<float>::quiet_NaN(), 1}})
        CHECK_THROWS_AS(sizes_of(BySensitivity{bad}, 3, 10, 0, {}), config_error);
}
