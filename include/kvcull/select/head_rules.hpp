#pragma once
/// Budget rules that divide a layer's rows over its KV heads. Heads then differ in length.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <string_view>
#include <tuple>
#include <vector>

#include "../base/error.hpp"
#include "../base/types.hpp"
#include "../score/concepts.hpp"
#include "budget.hpp"
#include "layer_rules.hpp"
#include "topk.hpp"

namespace kvcull::inline KVCULL_ABI {

namespace detail {

/// The rows of a layer's heads that compete for places: all but the protected ones.
class Competition {
  public:
    /// @param mean  rows per head. Protected rows have their places beforehand.
    Competition(std::span<const Candidates> heads, std::size_t mean)
        : stay_(heads.size()), rows_(heads.size()), places_(heads.size() * mean) {
        Selector selector;
        std::vector<std::uint8_t> fixed;
        for (std::size_t h = 0; h < heads.size(); ++h) {
            Candidates head = heads[h];
            stay_[h] = std::min(head.protect.rows(), mean);
            places_ -= stay_[h];
            head.size = head.score.size();
            selector.fix(head, {}, fixed);
            for (std::size_t j = 0; j < fixed.size(); ++j) {
                if (fixed[j] == 0) rows_[h].push_back({value_of(head.score[j]), head.position[j], h});
            }
        }
    }

    [[nodiscard]] std::size_t heads() const noexcept { return rows_.size(); }
    /// Places for competing rows, all heads together.
    [[nodiscard]] std::size_t places() const noexcept { return places_; }
    /// Protected rows of a head.
    [[nodiscard]] std::size_t stay(std::size_t head) const noexcept { return stay_[head]; }
    /// Competing rows, all heads together.
    [[nodiscard]] std::size_t rows() const noexcept {
        std::size_t count = 0;
        for (const auto& head : rows_) count += head.size();
        return count;
    }

    /// Scales a head's scores by the share of their sum that its best `count` have: heads whose mass is not
    /// concentrated count for less. 0 if the sum is 0 or not finite.
    void damp(std::size_t count) {
        for (auto& head : rows_) {
            const auto best = head.begin() + static_cast<std::ptrdiff_t>(std::min(count, head.size()));
            std::partial_sort(head.begin(), best, head.end(), better);
            const auto sum = [](auto first, auto last) {
                return std::accumulate(first, last, 0.0, [](double total, const Row& row) {
                    return row.value == none ? total : total + row.value;
                });
            };
            const double all = sum(head.begin(), head.end());
            const bool good = all > 0 && all <= static_cast<double>(std::numeric_limits<float>::max());
            const double factor = good ? sum(head.begin(), best) / all : 0.0;
            for (Row& row : head)
                if (row.value != none) row.value *= factor;
        }
    }
    /// Every head first takes its best rows, `safe[h]` of them, then the best of all that are left follow:
    /// `won[h]`. Order: score, later position, lower head. All places are given away; those that no row wants
    /// evenly.
    void run(std::span<const std::size_t> safe, std::span<std::size_t> won) {
        std::vector<Row> left;
        std::size_t places = places_;
        for (std::size_t h = 0; h < heads(); ++h) {
            auto& head = rows_[h];
            won[h] = std::min({safe[h], head.size(), places});
            places -= won[h];
            const auto rest = head.begin() + static_cast<std::ptrdiff_t>(won[h]);
            std::nth_element(head.begin(), rest, head.end(), better);
            left.insert(left.end(), rest, head.end());
        }
        const std::size_t count = std::min(places, left.size());
        const auto end = left.begin() + static_cast<std::ptrdiff_t>(count);
        std::nth_element(left.begin(), end, left.end(), better);
        std::for_each(left.begin(), end, [&](const Row& row) { ++won[row.head]; });
        const std::size_t spare = places - count;
        for (std::size_t h = 0; h < heads(); ++h) won[h] += spare / heads() + (h < spare % heads() ? 1 : 0);
    }

  private:
    struct Row {
        double value;
        position_t position;
        std::size_t head;
    };
    static constexpr double none = std::numeric_limits<double>::lowest();  // below every score
    static double value_of(const float& score) noexcept {                  // finite, so that sums are numbers
        if (is_finite(score)) return static_cast<double>(score);
        return !is_nan(score) && score > 0 ? 2.0 * static_cast<double>(std::numeric_limits<float>::max())
                                           : none;
    }
    static bool better(const Row& a, const Row& b) noexcept {
        if (a.value != b.value) return a.value > b.value;
        return a.position != b.position ? a.position > b.position : a.head < b.head;
    }

    std::vector<std::size_t> stay_;
    std::vector<std::vector<Row>> rows_;
    std::size_t places_;
};

}  // namespace detail

/// How Ada-KV guards heads that lose. interpolate: between the outcome and an even division. floor_fill:
/// every head has a guaranteed share, the rest is competed for.
enum class AdaMode : std::uint8_t { interpolate, floor_fill };
[[nodiscard]] constexpr auto names_of(AdaMode /*any*/) noexcept {
    return std::array<std::string_view, 2>{"interpolate", "floor_fill"};
}

/// Ada-KV (arXiv 2407.11550): the heads of a layer compete, so heads with spread-out attention get more.
/// `Layers` divides over layers before. Needs scores that compare across heads. Cost: O(heads * n) at an
/// eviction of the prompt, nothing while decoding: the sizes stay. With `authors` their sum misses the budget
/// by a few rows.
template <BudgetRule Layers = Uniform>
struct AdaKV {
    static constexpr std::string_view name = ReadsPrompt<Layers> ? "ada_pyramid" : "ada";
    static constexpr bool reads_prompt = ReadsPrompt<Layers>;
    AdaMode mode = AdaMode::interpolate;
    std::size_t alpha_permille = 200;          // 0: pure competition; 1000: even
    bool normalize = false;                    // interpolate only: see detail::Competition::damp
    std::size_t skip = 0;                      // layers, from the first on, that stay even
    Rounding head_rounding = Rounding::exact;  // interpolate only
    Layers layers = {};

    static constexpr auto fields() {
        return std::tuple_cat(
            std::tuple{Field{"mode", &AdaKV::mode}, Field{"alpha_permille", &AdaKV::alpha_permille},
                       Field{"normalize", &AdaKV::normalize}, Field{"skip", &AdaKV::skip},
                       Field{"head_rounding", &AdaKV::head_rounding}},
            fields_of(&AdaKV::layers));
    }
    void layer_sizes(std::size_t mean, std::size_t prompt, Protected protect,
                     std::span<std::size_t> out) const {
        using error::config_error;
        detail::check<config_error>(alpha_permille <= 1000, name, "alpha_permille", alpha_permille,
                                    "at most 1000");
        detail::check<config_error>(mode == AdaMode::interpolate || !normalize, name, "normalize", "true",
                                    "false with floor_fill");
        (void)detail::capacity(name, mean, protect);
        layers.layer_sizes(mean, prompt, protect, out);
    }
    void head_sizes(std::size_t layer, std::span<const Candidates> heads, std::size_t mean,
                    std::span<std::size_t> out) const {
        if (layer < skip) return std::fill(out.begin(), out.end(), mean);
        detail::Competition competition(heads, mean);
        run(competition, mean, mode == AdaMode::floor_fill, out);
        if (mode == AdaMode::interpolate && competition.rows() > competition.places())
            interpolate(competition.places(), out);
        for (std::size_t h = 0; h < heads.size(); ++h) out[h] += competition.stay(h);
    }
    /// How many of the layer's best rows lie in each head: the outcome without any guard.
    void counts(std::span<const Candidates> heads, std::size_t mean, std::span<std::size_t> out) const {
        detail::Competition competition(heads, mean);
        run(competition, mean, false, out);
    }

  private:
    void run(detail::Competition& competition, std::size_t mean, bool guarded,
             std::span<std::size_t> won) const {
        const std::size_t even = competition.places() / competition.heads();
        std::vector<std::size_t> safe(competition.heads(), 0);
        if (guarded)  // the share includes the protected rows
            for (std::size_t h = 0; h < safe.size(); ++h) {
                const std::size_t share = alpha_permille * mean / 1000, stay = competition.stay(h);
                safe[h] = std::min(share - std::min(share, stay), even);
            }
        if (normalize) competition.damp(even);
        competition.run(safe, won);
    }
    void interpolate(std::size_t places, std::span<std::size_t> out) const {
        const std::uint64_t competed = 1000 - alpha_permille, count = out.size();
        if (head_rounding == Rounding::authors) {
            const std::uint64_t guard = alpha_permille * (places / count) / 1000;
            for (std::size_t& size : out) {
                const std::uint64_t whole = competed * size / 1000, rest = competed * size % 1000;
                const bool up = rest > 500 || (rest == 500 && (whole + guard) % 2 == 1);
                size = static_cast<std::size_t>(whole + guard + (up ? 1 : 0));
            }
            return;
        }
        std::vector<std::uint64_t> rest(out.size());
        const std::uint64_t whole = 1000 * count;
        for (std::size_t h = 0; h < out.size(); ++h) {
            const std::uint64_t share = competed * out[h] * count + alpha_permille * std::uint64_t{places};
            out[h] = static_cast<std::size_t>(share / whole);
            rest[h] = share % whole;
        }
        detail::give_rest(rest, whole, out);
    }
};
static_assert(HeadBudgetRule<AdaKV<>> && ReadsPrompt<AdaKV<Pyramid>> && !ReadsPrompt<AdaKV<>>);

/// A given number of rows per layer and KV head besides the protected ones, for example from profiling how
/// much each head matters, once the prompt is evicted. Until then heads have the budget each.
struct HeadTable {
    static constexpr std::string_view name = "table";
    std::vector<std::size_t> capacity;  // [layers * kv_heads]
    std::size_t kv_heads = 0;

    void layer_sizes(std::size_t mean, std::size_t /*prompt*/, Protected protect,
                     std::span<std::size_t> out) const {
        detail::check<error::config_error>(capacity.size() == out.size() * kv_heads, name,
                                           "number of capacities", capacity.size(),
                                           detail::text("layers * kv_heads = ", out.size() * kv_heads));
        (void)detail::capacity(name, mean, protect);
        std::fill(out.begin(), out.end(), mean);
    }
    void head_sizes(std::size_t layer, std::span<const Candidates> heads, std::size_t /*mean*/,
                    std::span<std::size_t> out) const {
        detail::check<error::config_error>(heads.size() == kv_heads, name, "kv_heads", kv_heads,
                                           heads.size());
        for (std::size_t h = 0; h < kv_heads; ++h) {
            const std::size_t stay = heads[h].protect.rows(), n = heads[h].score.size();
            out[h] = stay + std::min(capacity[layer * kv_heads + h], n - std::min(stay, n));
        }
    }
};
static_assert(HeadBudgetRule<HeadTable>);

}  // namespace kvcull::inline KVCULL_ABI
