#pragma once
/// Attention received: the scheme behind H2O, TOVA and VATP. Which rows count is an `Accumulation`; what a
/// row gives each token is its softmax weight; the group of a KV head is averaged when a score is taken.

#include <algorithm>
#include <cstddef>
#include <span>
#include <tuple>

#include "concepts.hpp"
#include "pool.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Which query rows count, and how a call's rows join the past ones.
struct Accumulation {
    enum class Mode : std::uint8_t {
        sum,      // all rows, added
        window,   // prompt call: replace by its last `window` rows; decode call: add its rows
        replace,  // the last row of any call replaces all
    };
    Mode mode = Mode::sum;
    std::size_t window = 0;

    [[nodiscard]] constexpr Needs needs(Phase phase) const noexcept {
        if (phase == Phase::probe) return {};
        Needs needs{.rows = all_rows, .attention = true};
        if (mode == Mode::replace) needs = {.rows = 1, .attention = true, .replaced = true};
        if (mode == Mode::window && phase == Phase::prompt) needs.rows = window;
        return needs;
    }
    [[nodiscard]] constexpr bool replaces(Phase phase) const noexcept {
        return mode == Mode::replace || (mode == Mode::window && phase == Phase::prompt);
    }
};

/// mass[n]: attention received, summed over counted rows and the group. 4 bytes per token and KV head.
struct ReceivedAttention {
    RowArray<float> mass;

    [[nodiscard]] auto arrays() noexcept { return std::tie(mass); }

    /// Adds a tile. Rows whose log-sum-exp is not finite carry zeros, so they add nothing. O(rows * n).
    void observe(const Accumulation& rule, const HeadStep& step) {
        if (step.first_tile && step.tokens > 0 && rule.replaces(step.phase))
            std::fill(mass.values().begin(), mass.values().end(), 0.0F);
        for (std::size_t row = 0; row < step.attention.rows; ++row)
            step.kernels->add(mass.values().data(), step.attention[row].data(), step.visible[row].end);
    }
    /// Mean over the group. out[n].
    void write(const HeadStep& step, std::span<float> out) const {
        const float share = 1.0F / static_cast<float>(step.group);
        for (std::size_t j = 0; j < out.size(); ++j) out[j] = mass[j] * share;
    }
};

/// Smooths what competes: the rows before the protected newest ones, so nothing leaks across that border.
inline void pool_candidates(Pool pool, std::size_t kernel, const HeadStep& step, std::span<float> score) {
    const std::size_t recent = std::min(step.protect.recent, score.size());
    pool_scores(pool, kernel, score.first(score.size() - recent), *step.workspace);
}

}  // namespace kvcull::inline KVCULL_ABI
