#pragma once
/// Ranking by the geometry of keys, without any attention weight.

#include <algorithm>
#include <tuple>
#include <vector>

#include "../score/concepts.hpp"
#include "../score/running_sum.hpp"
#include "../score/similarity.hpp"

namespace kvcull::inline KVCULL_ABI {

/// KeyDiff (arXiv 2504.15364): keys unlike the others stay. score = -cos(k_j, mean of unit keys). The sum of
/// unit keys follows the cache, so the mean is known before a step and goes over the keys as one query more
/// of attention's. State: 8 bytes per token and KV head, 8 per channel. Cost at an eviction: O(n d), one
/// query head's; a pass of its own over the keys where several tokens came at once.
struct KeyDiff {
    static constexpr std::string_view name = "keydiff";
    struct State {
        RowArray<float> inverse;    // 1 / |k|
        RowArray<float> product;    // key * direction of the mean, of the newest step that evicts
        RunningSum units;           // [head_dim]
        std::vector<float> anchor;  // [head_dim]: that direction / the scale, while attention reads the keys
        ReadAlong read;             // whether `product` is true

        [[nodiscard]] auto arrays() noexcept { return std::tie(inverse, product); }
        [[nodiscard]] auto rest() noexcept { return std::tie(units, anchor, read); }
    };

    std::size_t sinks = 0, recent = 0;

    static constexpr auto fields() {
        return std::tuple{Field{"sinks", &KeyDiff::sinks}, Field{"recent", &KeyDiff::recent}};
    }
    static constexpr Needs needs(Phase /*phase*/) { return {}; }
    [[nodiscard]] constexpr Protected protect(std::size_t /*budget*/) const { return {sinks, recent}; }
    static constexpr std::size_t workspace(std::size_t rows, std::size_t /*group*/, std::size_t dim) {
        return rows + dim;
    }

    static std::span<const float> key_query(State& state, const HeadStep& step) {
        if (!step.evicts) return {};
        enter(state, step);
        state.read.begin();
        if (!find_anchor(state.units, step, state.anchor)) return {};
        return state.anchor;
    }
    static void take_products(State& state, const HeadStep& step, std::span<const float> products) {
        std::copy(products.begin(), products.end(), state.product.values().begin());
        state.read.finish(step.n());
    }
    static void observe(State& state, const HeadStep& step) {
        if (step.phase != Phase::probe && step.first_tile && state.read.missed()) enter(state, step);
    }
    static void score(const State& state, const HeadStep& step, std::span<float> out) {
        const std::span<const float> inverse = state.inverse.values();
        const std::size_t dim = step.cached.k.dim();
        if (state.read.knows(step.n())) {
            for (std::size_t j = 0; j < out.size(); ++j) out[j] = -state.product[j] * inverse[j];
            return;
        }
        float* const anchor = step.workspace->get(dim);
        if (!find_anchor(state.units, step, {anchor, dim})) {
            cosine_to_mean(*step.kernels, step.cached.k, inverse, out, *step.workspace);
            for (float& x : out) x = -x;
            return;
        }
        detail::for_each_piece(step.cached.k, 0, step.n(),
                               [&](const RowsView::Run& piece, const std::byte* next) {
                                   detail::dots(*step.kernels, anchor, 0, 1, step.cached.k, piece,
                                                -step.scale, out.data() + piece.first, 0, next);
                               });
        for (std::size_t j = 0; j < out.size(); ++j) out[j] *= inverse[j];
    }
    static void forget(State& state, const HeadStep& step, std::span<const index_t> keep) {
        state.units.shrink(step.cached.k, *step.workspace, keep,
                           [&](std::size_t j, double sign, std::span<const float> key) {
                               state.units.add(0, sign * static_cast<double>(state.inverse[j]), key);
                           });
    }

  private:
    /// Norms of the call's keys; they join the sum, if it is true for the rows before them.
    static void enter(State& state, const HeadStep& step) {
        if (state.anchor.empty()) {
            state.units.reset(step.cached.k.dim());
            state.anchor.resize(step.cached.k.dim());
        }
        const bool known = state.units.grow(step);
        for_each_row(step.cached.k, step.n() - step.added, *step.workspace,
                     [&](std::size_t j, std::span<const float> key) {
                         state.inverse[j] = inverse_norm(*step.kernels, key);
                         if (known) state.units.add(0, static_cast<double>(state.inverse[j]), key);
                     });
    }
    /// Direction of the mean of unit keys, if that is known, to be multiplied by the scale of logits.
    static bool find_anchor(const RunningSum& units, const HeadStep& step, std::span<float> out) {
        if (!units.knows(step.n())) return false;
        for (std::size_t c = 0; c < out.size(); ++c)
            out[c] = static_cast<float>(units.sum[c] / static_cast<double>(step.n()));
        const float factor = inverse_norm(*step.kernels, out) / step.scale;
        for (float& x : out) x *= factor;
        return is_finite(factor);
    }
};
static_assert(Policy<KeyDiff> && Protects<KeyDiff> && QueriesKeys<KeyDiff> && Forgets<KeyDiff>);

/// Key norm (arXiv 2406.11430): keys of low norm stay. State: 4 bytes per token and KV head.
struct KeyNorm {
    static constexpr std::string_view name = "keynorm";
    struct State {
        RowArray<float> norm;  // |k|: rotation does not change it, so it is taken when the token enters

        [[nodiscard]] auto arrays() noexcept { return std::tie(norm); }
    };

    std::size_t sinks = 0, recent = 0;
    std::size_t skip_layers = 0;  // the first layers that never evict
    std::size_t prune_after = 0;  // below that many tokens nothing is evicted

    static constexpr auto fields() {
        return std::tuple{Field{"sinks", &KeyNorm::sinks}, Field{"recent", &KeyNorm::recent},
                          Field{"skip_layers", &KeyNorm::skip_layers},
                          Field{"prune_after", &KeyNorm::prune_after}};
    }
    static constexpr Needs needs(Phase /*phase*/) { return {}; }
    [[nodiscard]] constexpr Protected protect(std::size_t /*budget*/) const { return {sinks, recent}; }
    static constexpr std::size_t workspace(std::size_t /*rows*/, std::size_t /*group*/, std::size_t dim) {
        return dim;
    }
    [[nodiscard]] constexpr bool due(const Moment& moment) const {
        return moment.layer >= skip_layers && moment.rows >= prune_after && moment.rows > moment.budget &&
               moment.rows - moment.budget > moment.slack;
    }
    static void observe(State& state, const HeadStep& step) {
        if (step.phase == Phase::probe || !step.first_tile) return;
        for_each_row(step.cached.k, step.n() - step.added, *step.workspace,
                     [&](std::size_t j, std::span<const float> row) {
                         state.norm[j] = euclidean_norm(*step.kernels, row);
                     });
    }
    static void score(const State& state, const HeadStep& /*step*/, std::span<float> out) {
        for (std::size_t j = 0; j < out.size(); ++j) out[j] = -state.norm[j];
    }
};
static_assert(Policy<KeyNorm> && Protects<KeyNorm> && Triggered<KeyNorm>);

}  // namespace kvcull::inline KVCULL_ABI
