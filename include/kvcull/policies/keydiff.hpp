#pragma once
/// Ranking by the geometry of keys, without any attention weight.

#include <tuple>

#include "../score/concepts.hpp"
#include "../score/similarity.hpp"

namespace kvcull::inline KVCULL_ABI {

/// |k| of every row. RoPE does not change it, so it is taken once, when the token enters. 4 bytes per token
/// and KV head.
struct KeyNorms {
    RowArray<float> norm;

    [[nodiscard]] auto arrays() noexcept { return std::tie(norm); }

    void observe(const HeadStep& step) {
        if (step.phase == Phase::probe || !step.first_tile) return;
        for_each_row(
            step.cached.k, step.n() - step.added, *step.workspace,
            [&](std::size_t j, std::span<const float> row) { norm[j] = euclidean_norm(*step.kernels, row); });
    }
};

/// KeyDiff (arXiv 2504.15364): keys unlike the others stay. score = -cos(k_j, mean of unit keys), recomputed
/// at every eviction: O(n d), two passes over the keys. State: 4 bytes per token and KV head.
struct KeyDiff {
    static constexpr std::string_view name = "keydiff";
    using State = KeyNorms;

    std::size_t sinks = 0, recent = 0;

    static constexpr auto fields() {
        return std::tuple{Field{"sinks", &KeyDiff::sinks}, Field{"recent", &KeyDiff::recent}};
    }
    static constexpr Needs needs(Phase /*phase*/) { return {}; }
    [[nodiscard]] constexpr Protected protect(std::size_t /*budget*/) const { return {sinks, recent}; }
    static constexpr std::size_t workspace(std::size_t rows, std::size_t /*group*/, std::size_t dim) {
        return rows + dim;
    }
    static void observe(State& state, const HeadStep& step) { state.observe(step); }
    static void score(const State& state, const HeadStep& step, std::span<float> out) {
        cosine_to_mean(*step.kernels, step.cached.k, state.norm.values(), out, *step.workspace);
        for (float& x : out) x = -x;
    }
};
static_assert(Policy<KeyDiff> && Protects<KeyDiff>);

/// Key norm (arXiv 2406.11430): keys of low norm stay. State: 4 bytes per token and KV head.
struct KeyNorm {
    static constexpr std::string_view name = "keynorm";
    using State = KeyNorms;

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
        return moment.layer >= skip_layers && moment.rows > prune_after && moment.rows > moment.budget &&
               moment.rows - moment.budget > moment.slack;
    }
    static void observe(State& state, const HeadStep& step) { state.observe(step); }
    static void score(const State& state, const HeadStep& /*step*/, std::span<float> out) {
        for (std::size_t j = 0; j < out.size(); ++j) out[j] = -state.norm[j];
    }
};
static_assert(Policy<KeyNorm> && Protects<KeyNorm> && Triggered<KeyNorm>);

}  // namespace kvcull::inline KVCULL_ABI
