#pragma once
/// Budget rules that divide a total over layers before anything is scored.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "../base/error.hpp"
#include "../base/types.hpp"
#include "../score/concepts.hpp"
#include "budget.hpp"

namespace kvcull::inline KVCULL_ABI {

/// exact: sizes sum to the budget. authors: as the published code rounds, which misses the sum.
enum class Rounding : std::uint8_t { exact, authors };
[[nodiscard]] constexpr auto names_of(Rounding /*any*/) noexcept {
    return std::array<std::string_view, 2>{"exact", "authors"};
}

namespace detail {

/// Rules multiply sizes, and no head has more rows than its numbers count. @throws config_error
inline void check_mean(std::string_view rule, std::size_t mean) {
    check<error::config_error>(mean <= max_rows, rule, "budget", mean, text("at most ", max_rows));
}

/// The places that rows compete for: `mean` less the rows that stay anyway. @throws config_error if none.
[[nodiscard]] inline std::size_t capacity(std::string_view rule, std::size_t mean, Protected protect) {
    check_mean(rule, mean);
    const std::size_t stay = protect.rows();
    check<error::config_error>(mean > stay, rule, "budget", mean,
                               text("more than the ", stay, " protected rows"));
    return mean - stay;
}

/// Parts rest[i] / whole, each below 1, that sum to a whole number of places: those with the largest part get
/// one each. Ties: the lower index first.
inline void give_rest(std::span<const std::uint64_t> rest, std::uint64_t whole, std::span<std::size_t> out) {
    std::vector<std::size_t> rank(rest.size());
    std::iota(rank.begin(), rank.end(), std::size_t{0});
    std::stable_sort(rank.begin(), rank.end(), [&](auto a, auto b) { return rest[a] > rest[b]; });
    const std::uint64_t places = std::accumulate(rest.begin(), rest.end(), std::uint64_t{0}) / whole;
    for (std::size_t i = 0; i < places; ++i) ++out[rank[i]];
}

/// Rounds shares that sum to `total`: what their whole parts leave goes to the largest fractions, of equal
/// ones to the lower index. A share a billionth below a whole number counts as that number.
inline void round_shares(std::span<const double> share, std::size_t total, std::span<std::size_t> out) {
    std::vector<std::pair<double, std::size_t>> rest(out.size());
    std::size_t given = 0;
    for (std::size_t l = 0; l < out.size(); ++l) {
        out[l] = std::min(static_cast<std::size_t>(share[l] + 1e-9), total - given);
        given += out[l];
        rest[l] = {static_cast<double>(out[l]) - share[l], l};
    }
    std::sort(rest.begin(), rest.end());
    for (std::size_t i = 0; given < total; ++i, ++given) ++out[rest[i % rest.size()].second];
}

}  // namespace detail

/// PyramidKV (arXiv 2406.02069): sizes fall linearly from the layer nearest the input to the last one, which
/// has 1 / beta of the mean besides its protected rows. Prompts short of twice the mean are divided evenly.
struct Pyramid {
    static constexpr std::string_view name = "pyramid";
    static constexpr bool reads_prompt = true;
    std::size_t beta = 20;  // >= 1; 1 is uniform, larger is steeper
    Rounding rounding = Rounding::exact;

    static constexpr auto fields() {
        return std::tuple{Field{"beta", &Pyramid::beta}, Field{"rounding", &Pyramid::rounding}};
    }
    /// `prompt`: 0 while its length is unknown; it then counts as long. @throws config_error
    void layer_sizes(std::size_t mean, std::size_t prompt, Protected protect,
                     std::span<std::size_t> out) const {
        detail::check<error::config_error>(beta >= 1, name, "beta", beta, "at least 1");
        const std::size_t places = detail::capacity(name, mean, protect), stay = mean - places;
        const std::size_t n = prompt == 0 ? unlimited : prompt;
        if (n <= mean || out.size() == 1 || n < 2 * places) return std::fill(out.begin(), out.end(), mean);
        std::size_t low = places / beta, high = 2 * places - low;
        if (high >= n - stay) {  // no layer can hold more than there is
            high = n - stay;
            low = 2 * places - high;
        }
        const std::size_t gaps = out.size() - 1;
        if (rounding == Rounding::authors) {
            for (std::size_t l = 0; l < out.size(); ++l) out[l] = stay + high - l * ((high - low) / gaps);
            return;
        }
        std::vector<std::uint64_t> rest(out.size());
        for (std::size_t l = 0; l < out.size(); ++l) {
            const std::uint64_t line = std::uint64_t{high} * gaps - std::uint64_t{l} * (high - low);
            out[l] = stay + static_cast<std::size_t>(line / gaps);
            rest[l] = line % gaps;
        }
        detail::give_rest(rest, gaps, out);
    }
};
static_assert(BudgetRule<Pyramid> && ReadsPrompt<Pyramid>);

/// Divides in proportion to a number per layer, however it was measured: what a layer gets besides its
/// protected rows. A layer that gets more than the prompt has keeps all of it.
struct BySensitivity {
    static constexpr std::string_view name = "sensitivity";
    std::vector<float> sensitivity;  // [layers], finite, >= 0, not all 0

    static constexpr auto fields() { return std::tuple{}; }
    /// @throws config_error
    void layer_sizes(std::size_t mean, std::size_t /*prompt*/, Protected protect,
                     std::span<std::size_t> out) const {
        using error::config_error;
        detail::check<config_error>(sensitivity.size() == out.size(), name, "number of layers",
                                    sensitivity.size(), out.size());
        double sum = 0;
        for (const float& one : sensitivity) {
            detail::check<config_error>(is_finite(one) && one >= 0, name, "sensitivity", one,
                                        "a finite number, not negative");
            sum += static_cast<double>(one);
        }
        detail::check<config_error>(sum > 0, name, "sum of sensitivities", sum, "above 0");
        const std::size_t places = detail::capacity(name, mean, protect), stay = mean - places;
        const std::size_t total = places * out.size();
        std::vector<double> share(out.size());
        for (std::size_t l = 0; l < out.size(); ++l)
            share[l] = static_cast<double>(total) * static_cast<double>(sensitivity[l]) / sum;
        detail::round_shares(share, total, out);
        for (std::size_t& size : out) size += stay;
    }
};
static_assert(BudgetRule<BySensitivity> && !ReadsPrompt<BySensitivity>);

/// EpiCache (arXiv 2509.17396): a layer whose keys change more when its tokens see less (low similarity, see
/// select/layer_profile.hpp) gets more rows. Sizes count protected rows, which every layer must have room
/// for.
struct BySimilarity {
    static constexpr std::string_view name = "similarity";
    enum class Weights : std::uint8_t {
        bounded,  // (1 - similarity)^alpha, no layer below `min_fraction` of the mean nor without a row
        paper,    // (1 - similarity)^alpha: the first layer, whose similarity is 1, gets nothing
        repo,     // as the published code: stretched to 0 .. 1, at least a quarter each; the total grows
    };
    friend constexpr auto names_of(Weights /*any*/) noexcept {
        return std::array<std::string_view, 3>{"bounded", "paper", "repo"};
    }

    std::vector<float> similarity = {};  // [layers], not NaN; none: the same for every layer
    Weights weights = Weights::bounded;
    double alpha = 2;            // >= 0; 0: the same for every layer
    double min_fraction = 0.25;  // in [0, 1]; of `bounded`

    static constexpr auto fields() {
        return std::tuple{Field{"weights", &BySimilarity::weights}, Field{"alpha", &BySimilarity::alpha},
                          Field{"min_fraction", &BySimilarity::min_fraction}};
    }
    /// @throws config_error
    void layer_sizes(std::size_t mean, std::size_t /*prompt*/, Protected protect,
                     std::span<std::size_t> out) const {
        check(out.size());
        detail::check_mean(name, mean);
        std::vector<std::size_t> sizes(out.size(), mean);
        if (!similarity.empty() && alpha > 0) {
            if (weights == Weights::repo)
                divide_as_published(mean, sizes);
            else
                divide(mean, sizes);
        }
        const std::size_t least = *std::min_element(sizes.begin(), sizes.end());
        detail::check<error::config_error>(protect.rows() <= least, name, "rows of the smallest layer", least,
                                           detail::text("at least the ", protect.rows(), " protected rows"));
        std::copy(sizes.begin(), sizes.end(), out.begin());
    }

  private:
    void check(std::size_t layers) const {
        using error::config_error;
        if (!similarity.empty())
            detail::check<config_error>(similarity.size() == layers, name, "number of layers",
                                        similarity.size(), layers);
        for (const float& one : similarity)
            detail::check<config_error>(is_finite(one), name, "similarity", one, "a finite number");
        const float shape = static_cast<float>(alpha), least = static_cast<float>(min_fraction);
        detail::check<config_error>(is_finite(shape) && shape >= 0, name, "alpha", alpha,
                                    "a finite number, not negative");
        detail::check<config_error>(is_finite(least) && least >= 0 && least <= 1, name, "min_fraction",
                                    min_fraction, "in [0, 1]");
    }
    /// `paper`; with a lowest size, `bounded`: layers whose share falls below it are set to it, and the
    /// others share what is left, until none falls below.
    void divide(std::size_t mean, std::span<std::size_t> out) const {
        const std::size_t layers = out.size(), total = mean * layers;
        const double low = weights == Weights::paper
                               ? 0.0
                               : std::max(1.0, std::floor(min_fraction * static_cast<double>(mean)));
        std::vector<double> weight(layers), share(layers);
        for (std::size_t l = 0; l < layers; ++l)
            weight[l] = std::max(0.0, 1.0 - static_cast<double>(similarity[l]));
        if (const double largest = *std::max_element(weight.begin(), weight.end()); largest > 0)
            for (double& one : weight) one = std::pow(one / largest, alpha);  // no alpha overflows
        std::vector<bool> fixed(layers);
        for (bool again = true; again;) {
            again = false;
            double sum = 0, rest = static_cast<double>(total);
            std::size_t free = 0;
            for (std::size_t l = 0; l < layers; ++l) {
                rest -= fixed[l] ? low : 0.0;
                sum += fixed[l] ? 0.0 : weight[l];
                free += fixed[l] ? 0 : 1;
            }
            for (std::size_t l = 0; l < layers; ++l) {
                share[l] = low;
                if (!fixed[l]) share[l] = sum > 0 ? rest * weight[l] / sum : rest / static_cast<double>(free);
            }
            for (std::size_t l = 0; l < layers; ++l) {
                if (fixed[l] || share[l] >= low) continue;
                fixed[l] = again = true;
                share[l] = low;
            }
        }
        detail::round_shares(share, total, out);
    }
    void divide_as_published(std::size_t mean, std::span<std::size_t> out) const {
        const auto [low, high] = std::minmax_element(similarity.begin(), similarity.end());
        const double least = static_cast<double>(*low), width = static_cast<double>(*high) - least;
        if (!(width > 0)) return;
        double sum = 0;
        std::vector<double> weight;
        for (const float one : similarity)
            sum += weight.emplace_back(std::pow(1.0 - (static_cast<double>(one) - least) / width, alpha));
        const double total = static_cast<double>(mean * out.size());
        for (std::size_t l = 0; l < out.size(); ++l)
            out[l] = std::max({static_cast<std::size_t>(total * weight[l] / sum), mean / 4, std::size_t{1}});
    }
};
static_assert(BudgetRule<BySimilarity> && !ReadsPrompt<BySimilarity>);

}  // namespace kvcull::inline KVCULL_ABI
