#include "kvcull/select/layer_rules.hpp"

#include <algorithm>
#include <cmath>
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

TEST_CASE("a rule by similarity spends the budget exactly, except as published", "[property]") {
    using Weights = BySimilarity::Weights;
    for (std::uint64_t seed = 0; seed < 200; ++seed) {
        SplitMix64 random{seed};
        const std::size_t layers = 1 + seed % 13, mean = 1 + seed % 37;
        const double alpha = 4 * random.uniform(), fraction = random.uniform();
        std::vector<float> similarity;
        for (std::size_t l = 0; l < layers; ++l)
            similarity.push_back(l == 0 ? 1.0F : static_cast<float>(random.uniform()));
        const BySimilarity bounded{.similarity = similarity, .alpha = alpha, .min_fraction = fraction};
        BySimilarity paper = bounded, repo = bounded;
        paper.weights = Weights::paper;
        repo.weights = Weights::repo;
        const auto bounded_sizes = sizes_of(bounded, layers, mean, 0, {}),
                   paper_sizes = sizes_of(paper, layers, mean, 0, {}),
                   repo_sizes = sizes_of(repo, layers, mean, 0, {});
        const auto low =
            static_cast<std::size_t>(std::max(1.0, std::floor(fraction * static_cast<double>(mean))));
        CAPTURE(seed, layers, mean, alpha, fraction);
        REQUIRE(sum(bounded_sizes) == layers * mean);
        REQUIRE(sum(paper_sizes) == layers * mean);
        REQUIRE(*std::min_element(bounded_sizes.begin(), bounded_sizes.end()) >= low);
        REQUIRE(*std::min_element(repo_sizes.begin(), repo_sizes.end()) >=
                std::max<std::size_t>(mean / 4, 1));
        if (*std::min_element(paper_sizes.begin(), paper_sizes.end()) > low)
            REQUIRE(bounded_sizes == paper_sizes);
        for (std::size_t a = 0; a < layers; ++a)
            for (std::size_t b = 0; b < layers; ++b)
                if (similarity[a] > similarity[b]) {
                    REQUIRE(bounded_sizes[a] <= bounded_sizes[b]);
                    REQUIRE(paper_sizes[a] <= paper_sizes[b]);
                    REQUIRE(repo_sizes[a] <= repo_sizes[b]);
                }
    }
}

TEST_CASE("the first layer gets nothing by the paper's formula, and its least share by the default",
          "[property]") {
    const std::vector<float> similarity{1.0F, 0.5F, 1.0F + 1e-6F, 0.0F};
    const auto sizes = [&](BySimilarity::Weights weights, double alpha) {
        return sizes_of(BySimilarity{similarity, weights, alpha}, 4, 40, 0, {});
    };
    using Weights = BySimilarity::Weights;
    CHECK(sizes(Weights::paper, 2) == std::vector<std::size_t>{0, 32, 0, 128});
    CHECK(sizes(Weights::bounded, 2) == std::vector<std::size_t>{10, 28, 10, 112});
    for (const Weights weights : {Weights::bounded, Weights::paper, Weights::repo}) {
        CHECK(sizes(weights, 0) == std::vector<std::size_t>(4, 40));
        CHECK(sizes_of(BySimilarity{{}, weights}, 4, 40, 0, {}) == std::vector<std::size_t>(4, 40));
        CHECK(sizes_of(BySimilarity{{.5F, .5F, .5F, .5F}, weights}, 4, 40, 0, {}) ==
              std::vector<std::size_t>(4, 40));
        CHECK(sizes_of(BySimilarity{{1, 1, 1, 1}, weights}, 4, 40, 0, {}) == std::vector<std::size_t>(4, 40));
        CHECK(sizes(weights, 1e30).back() >= 120);  // all that the others need not have; no overflow
    }
    CHECK(sizes_of(BySimilarity{.similarity = similarity, .min_fraction = 0}, 4, 40, 0, {}).front() == 1);
    CHECK(sizes_of(BySimilarity{.similarity = similarity, .min_fraction = 1}, 4, 40, 0, {}) ==
          std::vector<std::size_t>(4, 40));
}

TEST_CASE("a rule by similarity refuses numbers that mean nothing and layers too small for protected rows",
          "[contract]") {
    using error::config_error;
    const auto refusal = [](const BySimilarity& rule, Protected protect = {}) {
        return failure<config_error>([&] { (void)sizes_of(rule, 2, 8, 0, protect); });
    };
    CHECK(refusal({.similarity = {1, 0, 0}}) == "similarity: number of layers is 3, want 2");
    CHECK_THROWS_AS(sizes_of(BySimilarity{.similarity = {1, quiet_nan()}}, 2, 8, 0, {}), config_error);
    CHECK_THROWS_AS(sizes_of(BySimilarity{.similarity = {1, -positive_infinity()}}, 2, 8, 0, {}),
                    config_error);
    CHECK(refusal({.alpha = -1}) == "similarity: alpha is -1.000000, want a finite number, not negative");
    CHECK(refusal({.min_fraction = 1.5}) == "similarity: min_fraction is 1.500000, want in [0, 1]");
    CHECK(refusal({.similarity = {1, 0}}, {1, 2}) ==
          "similarity: rows of the smallest layer is 2, want at least the 3 protected rows");
    CHECK_NOTHROW(sizes_of(BySimilarity{.similarity = {1, 0}}, 2, 8, 0, {1, 1}));
}

TEST_CASE("rules refuse what they cannot divide", "[contract]") {
    using error::config_error;
    const auto refusal = [](const auto& rule, std::size_t mean, Protected protect) {
        return failure<config_error>([&] { (void)sizes_of(rule, 3, mean, 0, protect); });
    };
    CHECK(refusal(Pyramid{.beta = 0}, 10, {}) == "pyramid: beta is 0, want at least 1");
    CHECK(refusal(Pyramid{}, 8, {3, 5}) == "pyramid: budget is 8, want more than the 8 protected rows");
    const std::size_t endless = std::numeric_limits<std::size_t>::max(), most = 2147483647;
    const std::string rows = std::to_string(endless);
    CHECK(refusal(Pyramid{}, 8, {endless, 5}) ==
          "pyramid: budget is 8, want more than the " + rows + " protected rows");
    CHECK(refusal(BySimilarity{}, 8, {endless, 5}) ==
          "similarity: rows of the smallest layer is 8, want at least the " + rows + " protected rows");
    CHECK(refusal(Pyramid{}, most, {}) == "no error");
    for (const std::size_t mean : {most + 1, endless / 2 + 1, endless}) {
        const std::string beyond = ": budget is " + std::to_string(mean) + ", want at most 2147483647";
        CHECK(refusal(Pyramid{}, mean, {}) == "pyramid" + beyond);
        CHECK(refusal(BySensitivity{{1, 2, 3}}, mean, {}) == "sensitivity" + beyond);
        CHECK(refusal(BySimilarity{.similarity = {1, 0, 0}}, mean, {}) == "similarity" + beyond);
    }
    CHECK(refusal(BySensitivity{{1, 2}}, 10, {}) == "sensitivity: number of layers is 2, want 3");
    for (const auto& bad : {std::vector<float>{1, -1, 1},
                            {0, 0, 0},
                            {1, std::numeric_limits<float>::infinity(), 1},
                            {1, std::numeric_limits<float>::quiet_NaN(), 1}})
        CHECK_THROWS_AS(sizes_of(BySensitivity{bad}, 3, 10, 0, {}), config_error);
}
