#pragma once
/// Budget rules that divide a total over layers before anything is scored.

#include <algorithm>
#include <array>
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

/// The places that rows compete for: `mean` less the rows that stay anyway. @throws config_error if none.
[[nodiscard]] inline std::size_t capacity(std::string_view rule, std::size_t mean, Protected protect) {
    const std::size_t stay = protect.sinks + protect.recent;
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
        std::vector<std::pair<double, std::size_t>> rest(out.size());
        std::size_t given = 0;
        for (std::size_t l = 0; l < out.size(); ++l) {
            const double share = static_cast<double>(total) * static_cast<double>(sensitivity[l]) / sum;
            const std::size_t whole = std::min(static_cast<std::size_t>(share), total - given);
            out[l] = stay + whole;
            given += whole;
            rest[l] = {static_cast<double>(whole) - share, l};
        }
        std::sort(rest.begin(), rest.end());  // the largest remainder first, then the lower layer
        for (std::size_t i = 0; given < total; ++i, ++given) ++out[rest[i % rest.size()].second];
    }
};
static_assert(BudgetRule<BySensitivity> && !ReadsPrompt<BySensitivity>);

}  // namespace kvcull::inline KVCULL_ABI
