#pragma once
/// Which pages of a KV head a decode step should read: bounds of each page's keys, and the choice by them.

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "../base/config.hpp"
#include "../base/error.hpp"
#include "../base/types.hpp"
#include "../views.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Element-wise min and max of the keys of each page of one KV head, pages numbered by position: 2 `head_dim`
/// floats per page. They bound every q . k in the page from above (Quest, arXiv 2406.10774).
///
/// A page with a key that is NaN or infinite cannot be bounded: its score is +infinity, so that attention
/// sees it. A page without keys has -infinity.
class PageBounds {
  public:
    /// @throws config_error if `head_dim` is 0.
    explicit PageBounds(std::size_t head_dim) : head_dim_(head_dim) {
        detail::check<error::config_error>(head_dim >= 1, "PageBounds", "head_dim", head_dim, "at least 1");
    }

    /// The page holds these keys too. Pages up to it come to be. O(rows d).
    /// @param keys  [rows, d], as attention reads them (rotated).
    /// @throws shape_error if their dim is not `head_dim` or the page's number is 2^31 - 1 or more,
    /// std::bad_alloc; nothing has changed then.
    void add(std::size_t page, const RowsView& keys) {
        detail::check_size("PageBounds::add", "dim of keys", keys.dim(), head_dim_);
        constexpr std::size_t most = std::numeric_limits<index_t>::max();
        detail::check<error::shape_error>(page < most, "PageBounds::add", "page", page,
                                          detail::text("below ", most));
        row_.resize(head_dim_);
        if (page >= pages()) grow(page + 1);
        float* low = low_.data() + page * head_dim_;
        float* high = high_.data() + page * head_dim_;
        for (std::size_t r = 0; r < keys.rows(); ++r) {
            keys.widen(r, row_);
            std::uint32_t odd = 0;
            for (std::size_t c = 0; c < head_dim_; ++c) {
                odd |= is_finite(row_[c]) ? 0U : 1U;
                low[c] = std::min(low[c], row_[c]);
                high[c] = std::max(high[c], row_[c]);
            }
            state_[page] = odd != 0 || state_[page] == State::unbounded ? State::unbounded : State::bounded;
        }
    }
    /// The page has no keys any more, and gets others or stays empty. No-op beyond the last page.
    void reset(std::size_t page) {
        if (page >= pages()) return;
        std::fill_n(low_.begin() + at(page), head_dim_, highest);
        std::fill_n(high_.begin() + at(page), head_dim_, -highest);
        state_[page] = State::empty;
    }

    /// max over query heads of sum_i max(q_i min_i, q_i max_i). Summed in float in an order that depends on
    /// `head_dim` only, so rounding keeps it at or above the same sum of q_i k_i for each key of the page.
    /// NaN if every query head's sum is; else NaN sums do not count. O(G d).
    /// @param queries  [G, d]: the query heads of the KV head.
    /// @throws shape_error if there is no such page, no query, or another dim.
    [[nodiscard]] float score(std::size_t page, MatrixView<const float> queries) const {
        check(queries);
        detail::check<error::shape_error>(page < pages(), "PageBounds::score", "page", page,
                                          detail::text("less than ", pages()));
        return score_of(page, queries);
    }
    /// Scores of all pages. @param out  [pages], overwritten. @throws shape_error
    void scores(MatrixView<const float> queries, std::span<float> out) const {
        check(queries);
        detail::check_size("PageBounds::scores", "size of out", out.size(), pages());
        for (std::size_t page = 0; page < out.size(); ++page) out[page] = score_of(page, queries);
    }

    /// [d] each; of use while the page has keys, all of them finite. `page` is below `pages()`.
    [[nodiscard]] std::span<const float> low(std::size_t page) const noexcept {
        return {low_.data() + page * head_dim_, head_dim_};
    }
    [[nodiscard]] std::span<const float> high(std::size_t page) const noexcept {
        return {high_.data() + page * head_dim_, head_dim_};
    }
    [[nodiscard]] std::size_t pages() const noexcept { return state_.size(); }
    [[nodiscard]] std::size_t head_dim() const noexcept { return head_dim_; }

  private:
    enum class State : std::uint8_t { empty, bounded, unbounded };
    static constexpr float highest = 0x1.fffffep127F;

    [[nodiscard]] std::ptrdiff_t at(std::size_t page) const noexcept {
        return static_cast<std::ptrdiff_t>(page * head_dim_);
    }
    void grow(std::size_t pages) {
        low_.reserve(pages * head_dim_);
        high_.reserve(pages * head_dim_);
        state_.resize(pages);
        low_.resize(pages * head_dim_, highest);
        high_.resize(pages * head_dim_, -highest);
    }
    void check(const MatrixView<const float>& queries) const {
        detail::check_size("PageBounds", "dim of queries", queries.cols, head_dim_);
        detail::check<error::shape_error>(queries.rows >= 1, "PageBounds", "number of query heads",
                                          queries.rows, "at least 1");
    }
    [[nodiscard]] float score_of(std::size_t page, const MatrixView<const float>& queries) const noexcept {
        if (state_[page] == State::empty) return negative_infinity();
        if (state_[page] == State::unbounded) return positive_infinity();
        float best = bound(queries[0].data(), page);
        for (std::size_t g = 1; g < queries.rows; ++g) {
            const float other = bound(queries[g].data(), page);
            if (is_nan(best) || (!is_nan(other) && other > best)) best = other;
        }
        return best;
    }
    /// Sixteen sums side by side, which compilers turn into vectors.
    [[nodiscard]] float bound(const float* q, std::size_t page) const noexcept {
        constexpr std::size_t lanes = 16;
        const float* low = low_.data() + page * head_dim_;
        const float* high = high_.data() + page * head_dim_;
        float sums[lanes] = {};
        const auto add = [&](std::size_t c, std::size_t lane) {
            const float up = q[c] * high[c], down = q[c] * low[c];
            sums[lane] += up > down ? up : down;
        };
        std::size_t c = 0;
        for (; c + lanes <= head_dim_; c += lanes)
            for (std::size_t lane = 0; lane < lanes; ++lane) add(c + lane, lane);
        for (std::size_t lane = 0; c + lane < head_dim_; ++lane) add(c + lane, lane);
        for (std::size_t half = lanes / 2; half > 0; half /= 2)
            for (std::size_t i = 0; i < half; ++i) sums[i] += sums[i + half];
        return sums[0];
    }

    std::size_t head_dim_;
    std::vector<float> low_, high_;  // [pages, d]
    std::vector<State> state_;
    std::vector<float> row_;
};

/// How many pages a step reads, and which of them whatever their score.
struct PageChoice {
    std::size_t count = 0;   ///< at most so many pages in all
    std::size_t sinks = 1;   ///< first pages
    std::size_t recent = 1;  ///< newest pages
};

namespace detail {

/// Orders scores as integers, which infinities survive under -ffast-math.
[[nodiscard]] constexpr std::int32_t page_order(const float& score) noexcept {
    const std::uint32_t bits = is_nan(score) ? negative_infinity_bits : std::bit_cast<std::uint32_t>(score);
    const auto magnitude = static_cast<std::int32_t>(bits & 0x7FFFFFFFU);
    return (bits >> 31U) != 0 ? -magnitude : magnitude;
}

}  // namespace detail

/// The first `sinks` pages, the newest `recent` and the best of the others; of equal scores the lower page.
/// -0 equals +0, and NaN counts as -infinity. O(pages).
/// @param scores  [pages], ascending in position.
/// @return page numbers, ascending: min(count, pages) of them.
/// @throws config_error if `sinks` + `recent` exceed `count`.
[[nodiscard]] inline std::vector<std::size_t> choose_pages(std::span<const float> scores,
                                                           const PageChoice& choice) {
    detail::check<error::config_error>(
        choice.sinks <= choice.count && choice.recent <= choice.count - choice.sinks, "choose_pages",
        "sinks + recent", detail::text(choice.sinks, " + ", choice.recent),
        detail::text("at most count = ", choice.count));
    const std::size_t pages = scores.size();
    const std::size_t sinks = std::min(choice.sinks, pages);
    const std::size_t recent = std::min(choice.recent, pages - sinks);
    std::vector<std::size_t> chosen(pages);
    for (std::size_t page = 0; page < pages; ++page) chosen[page] = page;
    if (choice.count >= pages) return chosen;

    const auto begin = chosen.begin() + static_cast<std::ptrdiff_t>(sinks);
    const auto end = chosen.end() - static_cast<std::ptrdiff_t>(recent);
    const auto middle = begin + static_cast<std::ptrdiff_t>(choice.count - sinks - recent);
    const auto better = [&](std::size_t a, std::size_t b) {
        const std::int32_t key_a = detail::page_order(scores[a]), key_b = detail::page_order(scores[b]);
        return key_a != key_b ? key_a > key_b : a < b;
    };
    if (middle != end) std::nth_element(begin, middle, end, better);
    std::sort(begin, middle);
    chosen.erase(middle, end);
    return chosen;
}

}  // namespace kvcull::inline KVCULL_ABI
