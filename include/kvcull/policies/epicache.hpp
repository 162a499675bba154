#pragma once
/// EpiCache's score: what a prompt about one topic looks at.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <tuple>

#include "../attention/row_kernels.hpp"
#include "../score/concepts.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Whether the heads of a layer share their rows or have the same number each.
enum class HeadBudget : std::uint8_t { pooled, uniform };
[[nodiscard]] constexpr auto names_of(HeadBudget /*any*/) noexcept {
    return std::array<std::string_view, 2>{"pooled", "uniform"};
}

/// EpiCache (arXiv 2509.17396): probe rows, which are never cached, attend to all cached rows, and the
/// largest weight that any of them under any query head of the group gives a token is its score. Every probe
/// scores afresh, and evicts if a layer is over its budget; nothing else does. cache/block_prefill.hpp probes
/// after every block of a history. Nothing is protected by default: sinks and recent rows compete. State: 4
/// bytes per token and KV head. Cost: a pass over the attention of the probe rows, which is computed anyway.
struct EpiCache {
    static constexpr std::string_view name = "epicache";
    static constexpr bool nonnegative = true;
    struct State {
        RowArray<float> largest;  // weight of the latest probe; rows that came later have 0

        [[nodiscard]] auto arrays() noexcept { return std::tie(largest); }
    };

    HeadBudget heads = HeadBudget::pooled;
    std::size_t sinks = 0, recent = 0;

    static constexpr auto fields() {
        return std::tuple{Field{"heads", &EpiCache::heads}, Field{"sinks", &EpiCache::sinks},
                          Field{"recent", &EpiCache::recent}};
    }
    void check(std::size_t budget) const {
        const std::size_t stay = protect(budget).rows();
        detail::check<error::config_error>(stay <= budget, name, "budget", budget,
                                           detail::text("at least sinks + recent = ", stay));
    }
    [[nodiscard]] constexpr Scope scope() const {
        return heads == HeadBudget::pooled ? Scope::layer_pooled : Scope::head;
    }
    [[nodiscard]] constexpr Protected protect(std::size_t /*budget*/) const { return {sinks, recent}; }
    static constexpr Needs needs(Phase phase) {
        return {.rows = phase == Phase::probe ? all_rows : 0, .attention = phase == Phase::probe};
    }
    static constexpr bool due(const Moment& moment) {
        return moment.phase == Phase::probe && moment.rows > moment.budget;
    }
    static constexpr std::size_t workspace(std::size_t rows, std::size_t /*group*/, std::size_t /*dim*/) {
        return rows;
    }
    static void observe(State& state, const HeadStep& step) {
        if (step.phase != Phase::probe) return;
        const std::span<float> largest = state.largest.values();
        if (step.first_tile) std::fill(largest.begin(), largest.end(), 0.0F);
        for (std::size_t row = 0; row < step.attention.rows; ++row) {
            const float* weights = step.attention[row].data();
            if (!is_finite(step.lse[row])) weights = finite_weights(step, row);
            step.kernels->maximum(largest.data(), weights, largest.size());
        }
    }
    static void score(const State& state, const HeadStep& /*step*/, std::span<float> out) {
        const std::span<const float> largest = state.largest.values();
        std::copy(largest.begin(), largest.end(), out.begin());
    }

  private:
    /// Softmax of a row over its finite logits, where others spoil its sum; all 0 if none is finite.
    static const float* finite_weights(const HeadStep& step, std::size_t row) {
        const std::size_t n = step.n();
        float* const weights = step.workspace->get(n);
        if (n == 0) return weights;
        detail::for_each_piece(step.cached.k, 0, n, [&](const RowsView::Run& piece, const std::byte* next) {
            detail::dots(*step.kernels, step.q[row].data(), step.q.stride, 1, step.cached.k, piece,
                         step.scale, weights + piece.first, n, next);
        });
        for (std::size_t j = 0; j < n; ++j)
            if (!is_finite(weights[j])) weights[j] = negative_infinity();
        float lse = 0;
        step.kernels->softmax(weights, n, &lse);
        return weights;
    }
};
static_assert(Policy<EpiCache> && Triggered<EpiCache> && Protects<EpiCache> && Scoped<EpiCache> &&
              Checked<EpiCache> && NonNegative<EpiCache>);

}  // namespace kvcull::inline KVCULL_ABI
