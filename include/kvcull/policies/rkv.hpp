#pragma once
/// R-KV: what the newest tokens look at, less what is said elsewhere too.

#include <tuple>

#include "../score/concepts.hpp"
#include "../score/heard_window.hpp"
#include "../score/pool.hpp"
#include "../score/redundancy.hpp"
#include "snapkv.hpp"

namespace kvcull::inline KVCULL_ABI {

/// R-KV (arXiv 2505.24133), for long generation: after every `interval` tokens, and at the end of a prompt,
/// a head that holds more than its budget keeps the last `window` tokens and the best by sigma * importance -
/// (1 - sigma) * redundancy, so it never exceeds budget + interval. State: the last `window` query rows of
/// the group, 20 bytes per token. Cost at an eviction: for the importance O(G w n d), or O(G w n) spread over
/// the steps of its window where these make attention, see `HeardWindow`; for the redundancy each new key
/// times every key, n^2 d / 2 multiply-adds at the first; nothing else.
struct RKV {
    static constexpr std::string_view name = "rkv";
    static constexpr bool bounded = true;  // scores lie within [-1, 1]
    static constexpr bool follows_logits = true;
    struct State {
        QueryRing queries;
        KeyLinks links;
        HeardWindow heard;  // sums of importance

        [[nodiscard]] auto arrays() noexcept { return std::tuple_cat(links.arrays(), heard.arrays()); }
        [[nodiscard]] auto rest() noexcept { return std::tie(queries, links, heard); }
    };

    std::size_t window = 8;
    std::size_t interval = 128;
    std::size_t kernel = 7;
    float sigma = 0.1F;          // importance against redundancy
    float key_threshold = 0.5F;  // cosine above which keys are alike
    Retain retain = Retain::last;

    static constexpr auto fields() {
        return std::tuple{Field{"window", &RKV::window},
                          Field{"interval", &RKV::interval},
                          Field{"kernel", &RKV::kernel},
                          Field{"sigma", &RKV::sigma},
                          Field{"key_threshold", &RKV::key_threshold},
                          Field{"retain", &RKV::retain}};
    }
    void check(std::size_t budget) const {
        using error::config_error;
        detail::check_kernel("RKV", kernel);
        detail::check<config_error>(window >= 1, "RKV", "window", window, "at least 1");
        detail::check<config_error>(interval >= 1, "RKV", "interval", interval, "at least 1");
        detail::check<config_error>(is_finite(sigma) && sigma >= 0.0F && sigma <= 1.0F, "RKV", "sigma", sigma,
                                    "0 to 1");
        detail::check<config_error>(
            is_finite(key_threshold) && key_threshold >= -1.0F && key_threshold <= 1.0F, "RKV",
            "key_threshold", key_threshold, "-1 to 1");
        detail::check<config_error>(budget > window, "RKV", "budget", budget,
                                    detail::text("more than window = ", window));
    }
    [[nodiscard]] constexpr Protected protect(std::size_t /*budget*/) const { return {0, window}; }
    static constexpr bool ordered() { return true; }
    [[nodiscard]] constexpr std::size_t workspace(std::size_t rows, std::size_t group,
                                                  std::size_t dim) const {
        return std::max(importance_scratch(rows) + group * window * dim, rows + redundancy_memory(rows, dim));
    }
    /// A call of several decoded tokens may step over a multiple of `interval`.
    [[nodiscard]] constexpr bool due(const Moment& moment) const {
        if (moment.rows <= moment.budget) return false;
        if (moment.phase == Phase::prompt) return moment.prompt_end;
        return moment.phase == Phase::decode && interval > 0 && moment.seen % interval < moment.tokens;
    }
    [[nodiscard]] constexpr Needs needs(Phase phase) const {
        return {.rows = phase == Phase::probe ? 0 : window,
                .logits_if_made = phase == Phase::decode && interval >= window};
    }
    /// Logits are heard in the last steps of an interval.
    [[nodiscard]] constexpr Needs needs(const Moment& moment) const {
        Needs needs = this->needs(moment.phase);
        needs.logits_if_made &= (moment.seen + window - 1) % interval < window + moment.tokens - 1;
        return needs;
    }

    void observe(State& state, const HeadStep& step) const {
        if (step.tokens == 0) return;
        state.queries.push(window, step);
        state.heard.follow(step, interval < window ? 0 : 1);
        if (step.phase != Phase::decode || interval < window) return;
        const std::size_t held = step.n() - step.added + step.first,
                          before = static_cast<std::size_t>(step.cached.position[held]) % interval;
        const auto add = [&](RowPlanes<float>& sums, std::size_t first, std::size_t count) {
            // All rows before the window are candidates, none of its own.
            const std::size_t own = before + first - (interval - window);
            return held + first > own &&
                   add_importance(step, first, count, sums[0].first(held + first - own));
        };
        state.heard.hear(window, interval, before, !step.logits.empty(), step, add);
    }
    void prepare(State& state, const HeadStep& step) const {
        const RowsView& keys = step.cached.k;
        find_links(*step.kernels, keys, step.cached.position, rule(), state.links,
                   step.workspace->get(link_scratch(keys.rows(), keys.dim())));
    }
    /// The window scores 1, above all others. A NaN or infinity among the keys or queries of a head makes all
    /// its scores NaN, so that the newest rows stay.
    void score(const State& state, const HeadStep& step, std::span<float> out) const {
        const std::size_t candidates = out.size() - std::min(window, out.size());
        const bool known = importance(state, step, out.first(candidates));
        float* const memory =
            step.workspace->get(out.size() + redundancy_memory(out.size(), step.cached.k.dim()));
        const std::span<float> repeated(memory, out.size());
        redundancy(state, step, repeated, memory + out.size());
        if (!known || (!out.empty() && is_nan(repeated[0])))
            return std::fill(out.begin(), out.end(), quiet_nan());
        for (std::size_t j = 0; j < candidates; ++j) out[j] = sigma * out[j] - (1.0F - sigma) * repeated[j];
        std::fill(out.begin() + static_cast<std::ptrdiff_t>(candidates), out.end(), 1.0F);
    }

    /// Attention of the ring's tokens over the first c = out.size() rows alone, softmax of the largest logit
    /// of the group; mean over the tokens, pooled over neighbours. @returns false if a query
    /// or logit is not finite: all of it is NaN then.
    [[nodiscard]] bool importance(const State& state, const HeadStep& step, std::span<float> out) const {
        const std::size_t rows = state.queries.size_before(step.next_position);
        bool known = state.heard.knows(rows, step.n());
        if (known)
            std::copy_n(state.heard.sums()[0].begin(), out.size(), out.begin());
        else
            known = sum_importance(state, step, rows, out);
        for (float& x : out) x /= static_cast<float>(std::max<std::size_t>(rows, 1));
        pool_scores(Pool::max, kernel, out, *step.workspace);
        if (!known) std::fill(out.begin(), out.end(), quiet_nan());
        return known;
    }
    /// How much each of the n rows repeats others; out[n], sums to 1, or all NaN. Of rows that were not
    /// prepared the links are found for the moment. @param memory  `redundancy_memory(n, head_dim)` floats.
    void redundancy(const State& state, const HeadStep& step, std::span<float> out, float* memory) const {
        const simd::Kernels& kernels = *step.kernels;
        const auto& [k, v, position] = step.cached;
        if (kvcull::redundancy(kernels, k, position, state.links, out, memory)) return;
        KeyLinks links = state.links;
        std::apply([&](auto&... array) { (array.resize(out.size()), ...); }, links.arrays());
        if (!find_links(kernels, k, position, rule(), links, memory) ||
            !kvcull::redundancy(kernels, k, position, links, out, memory))
            std::fill(out.begin(), out.end(), quiet_nan());
    }
    [[nodiscard]] static constexpr std::size_t redundancy_memory(std::size_t rows, std::size_t dim) noexcept {
        return std::max(redundancy_scratch(rows, dim), link_scratch(rows, dim));
    }

  private:
    /// Adds what tokens `first .. first + count - 1` of a tile say to sums[c], over the first c rows.
    /// @returns false if a query or logit is not finite
    [[nodiscard]] static bool add_importance(const HeadStep& step, std::size_t first, std::size_t count,
                                             std::span<float> sums) {
        float* const largest = step.workspace->get(sums.size());
        for (std::size_t i = first; i < first + count; ++i) {
            for (std::size_t g = 0; g < step.group; ++g) {
                const std::size_t row = g * step.tokens + i;
                const std::span<const float> q = step.q[row];
                if (!all_finite(q)) return false;
                if (g == 0)
                    std::copy_n(step.logits[row].begin(), sums.size(), largest);
                else
                    step.kernels->maximum(largest, step.logits[row].data(), sums.size());
            }
            float lse = 0.0F;
            step.kernels->softmax(largest, sums.size(), &lse);
            if (!is_finite(lse)) return false;
            step.kernels->add(sums.data(), largest, sums.size());
        }
        return true;
    }
    /// The sums of the ring's `rows` tokens, from their queries. @returns false as `add_importance`
    [[nodiscard]] static bool sum_importance(const State& state, const HeadStep& step, std::size_t rows,
                                             std::span<float> out) {
        const std::size_t dim = step.cached.k.dim(), count = out.size(), scratch = importance_scratch(count);
        float* const memory = step.workspace->get(scratch + step.group * rows * dim);
        const float* const q = memory + scratch;
        state.queries.copy_to(0, rows, memory + scratch);
        std::fill(out.begin(), out.end(), 0.0F);
        bool known = all_finite({q, step.group * rows * dim});
        float *const largest = memory, *const logits = memory + vote_tile * count;
        for (std::size_t first = 0; first < rows; first += vote_tile) {
            const std::size_t tokens = std::min(vote_tile, rows - first);
            // All heads of the group go over a block of keys while it is in cache.
            for (std::size_t begin = 0; begin < count; begin += vote_block) {
                const std::size_t end = std::min(begin + vote_block, count);
                for (std::size_t g = 0; g < step.group; ++g) {
                    float* const own = g == 0 ? largest + begin : logits;
                    const std::size_t stride = g == 0 ? count : vote_block;
                    detail::for_each_piece(step.cached.k, begin, end,
                                           [&](const RowsView::Run& piece, const std::byte* next) {
                                               detail::dots(*step.kernels, q + (g * rows + first) * dim, dim,
                                                            tokens, step.cached.k, piece, step.scale,
                                                            own + (piece.first - begin), stride, next);
                                           });
                    with_logit_rule(
                        step, [g](std::size_t /*row*/) { return g; },
                        [&](std::size_t row) { return state.queries.position(first + row); },
                        [&](const LogitRule& rule) {
                            for (std::size_t i = 0; i < tokens; ++i)
                                detail::finish_logits(rule, i, begin, {own + i * stride, end - begin});
                        });
                    for (std::size_t i = 0; g > 0 && i < tokens; ++i)
                        step.kernels->maximum(largest + i * count + begin, logits + i * stride, end - begin);
                }
            }
            for (std::size_t i = 0; i < tokens; ++i) {
                float lse = 0.0F;
                step.kernels->softmax(largest + i * count, count, &lse);
                known = known && !is_nan(lse);
            }
            step.kernels->add_rows(out.data(), largest, count, tokens, count);
        }
        return known;
    }
    [[nodiscard]] constexpr LinkRule rule() const noexcept { return {key_threshold, retain}; }
    static constexpr std::size_t vote_block = 256;  // rows
    [[nodiscard]] static constexpr std::size_t importance_scratch(std::size_t rows) noexcept {
        return vote_tile * (rows + vote_block);
    }
};
static_assert(Policy<RKV> && Prepares<RKV> && Protects<RKV> && Triggered<RKV> && Ordered<RKV> &&
              Checked<RKV>);

}  // namespace kvcull::inline KVCULL_ABI
