#pragma once
/// Attention received, apart for every query head of a group.

#include <algorithm>
#include <array>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "../attention/attend.hpp"
#include "received.hpp"
#include "running_sum.hpp"

namespace kvcull::inline KVCULL_ABI {

/// The queries of a group's newest token, from which its attention can be had again.
class NewestQuery {
  public:
    void reset(const HeadStep& step) {
        rows_.assign(step.group * step.cached.k.dim(), 0.0F);
        held_ = false;
    }
    /// A tile of one token.
    void take(const HeadStep& step) noexcept {
        for (std::size_t g = 0; g < step.group; ++g)
            std::copy_n(step.q[g].data(), step.q.cols, &rows_[g * step.q.cols]);
        position_ = step.cached.position[step.n() - 1];
        held_ = true;
    }
    void drop() noexcept { held_ = false; }
    [[nodiscard]] bool held() const noexcept { return held_; }
    /// Its attention over all cached rows; out[group, n].
    void attend_to(const HeadStep& step, MatrixView<float> out) const {
        const std::size_t dim = step.cached.k.dim();
        for (std::size_t first = 0; first < step.group; first += together) {
            const std::size_t count = std::min(together, step.group - first);
            std::array<float, together> lse = {};
            std::array<Visible, together> visible = {};
            visible.fill({0, 0, step.n()});
            with_logit_rule(
                step, [first](std::size_t row) { return first + row; },
                [&](std::size_t /*row*/) { return position_; },
                [&](const LogitRule& rule) {
                    attend(*step.kernels, {&rows_[first * dim], count, dim}, step.cached.k, step.cached.v,
                           std::span(visible).first(count), rule,
                           {.attention = {out[first].data(), count, out.cols, out.stride},
                            .lse = std::span(lse).first(count)});
                });
        }
    }
    [[nodiscard]] auto parts() noexcept { return std::tie(rows_, position_, held_); }

  private:
    static constexpr std::size_t together = 8;  // query heads in one pass over the keys
    std::vector<float> rows_;                   // [group, head_dim]
    position_t position_ = 0;
    bool held_ = false;
};

/// Attention received from each query head's own rows: the base scores of CAOTE. As a policy of its own it
/// ranks by their sum over the group. State: 4 bytes per token and query head. With TOVA's row a step that
/// does not evict keeps its queries alone: writing what the next step replaces would cost as much memory
/// traffic as a thirtieth of its attention.
struct PerHeadAttention {
    static constexpr std::string_view name = "per_head_attention";
    static constexpr bool nonnegative = true;
    enum class Rows : std::uint8_t { tova, h2o, snapkv };
    friend constexpr auto names_of(Rows /*any*/) noexcept {
        return std::array<std::string_view, 3>{"tova", "h2o", "snapkv"};
    }
    struct State {
        RowPlanes<float> mass;  // [group]
        RunningSum output;   // [group, value_dim]: the sum of mass * value, as counted rows' outputs give it
        NewestQuery newest;  // if held, `mass` is worth nothing: the attention of these queries counts

        [[nodiscard]] auto arrays() noexcept { return std::tie(mass); }
        [[nodiscard]] auto rest() noexcept { return std::tie(output, newest); }
    };

    Rows base = Rows::tova;                  // the last row; all rows; the last `window` of a prompt call
    std::optional<std::size_t> recent = {};  // default: tova 0, h2o half the budget, snapkv `window`
    std::size_t sinks = 0;
    std::optional<std::size_t> window = {};  // prompt rows that count; default: h2o all (0), snapkv 32
    std::optional<std::size_t> kernel = {};  // default: 1, snapkv 5
    std::optional<Pool> pool = {};           // default: none, snapkv avg

    static constexpr auto fields() {
        using P = PerHeadAttention;
        return std::tuple{Field{"base", &P::base},     Field{"recent", &P::recent}, Field{"sinks", &P::sinks},
                          Field{"window", &P::window}, Field{"kernel", &P::kernel}, Field{"pool", &P::pool}};
    }
    void check(std::size_t budget) const {
        using error::config_error;
        constexpr std::string_view where = "PerHeadAttention";
        detail::check_kernel(where, smoothing());
        if (base != Rows::snapkv) return;
        detail::check<config_error>(rows() > 0, where, "window", rows(), "at least 1");
        const std::size_t newest = protect(budget).recent;
        detail::check<config_error>(newest < budget, where, "recent", newest,
                                    detail::text("below the budget ", budget));
    }
    [[nodiscard]] constexpr Protected protect(std::size_t budget) const {
        const std::size_t usual = base == Rows::tova ? 0 : base == Rows::h2o ? budget / 2 : rows();
        return {sinks, recent.value_or(usual)};
    }
    [[nodiscard]] constexpr bool ordered() const { return pools(); }
    static constexpr std::size_t workspace(std::size_t rows, std::size_t group, std::size_t dim) {
        return std::max(group * rows, dim);
    }
    [[nodiscard]] constexpr Needs needs(Phase phase) const { return accumulation().needs(phase); }

    void observe(State& state, const HeadStep& step) const {
        const std::size_t dim = step.cached.v.dim();
        if (state.mass.planes() == 0) {
            state.mass.set_planes(step.group, step.n());
            state.output.reset(step.group * dim);
            state.newest.reset(step);
        }
        if (step.tokens == 0) return;
        if (base == Rows::tova && !step.evicts) {
            state.newest.take(step);
            state.output.rows = RunningSum::stale;
            return;
        }
        state.newest.drop();
        const bool begins = step.first_tile && accumulation().replaces(step.phase);
        if (begins) {
            state.output.reset(step.group * dim);
            state.output.rows = step.n();
        } else if (step.first_tile) {
            state.output.grow(step);
        }
        if (step.output.empty() || pools()) state.output.rows = RunningSum::stale;
        for (std::size_t r = 0; r < step.attention.rows; ++r) {
            const std::size_t g = r / step.tokens;
            const std::span<const float> row = step.attention[r];
            if (begins && r % step.tokens == 0)
                std::copy(row.begin(), row.end(), state.mass[g].begin());
            else
                step.kernels->add(state.mass[g].data(), row.data(), step.visible[r].end);
            if (state.output.rows == step.n() && is_finite(step.lse[r]))
                state.output.add(g * dim, 1.0, step.output[r]);
        }
    }
    void score(const State& state, const HeadStep& step, std::span<float> out) const {
        std::fill(out.begin(), out.end(), 0.0F);
        if (state.newest.held()) {
            float* const weights = step.workspace->get(step.group * out.size());
            state.newest.attend_to(step, {weights, step.group, out.size()});
            step.kernels->add_rows(out.data(), weights, out.size(), step.group, out.size());
        } else {
            for (std::size_t g = 0; g < state.mass.planes(); ++g)
                step.kernels->add(out.data(), state.mass[g].data(), out.size());
        }
        if (pools()) pool_candidates(smoother(), smoothing(), step, out);
    }
    [[nodiscard]] MatrixView<const float> distribution(const State& state, const HeadStep& step,
                                                       MatrixView<float> spare) const {
        const bool observed = state.mass.planes() > 0, held = state.newest.held();
        if (observed && !held && !pools()) return state.mass.view();
        if (held) state.newest.attend_to(step, spare);
        for (std::size_t g = 0; g < spare.rows; ++g) {
            if (!observed) std::fill(spare[g].begin(), spare[g].end(), 0.0F);
            if (observed && !held) std::copy(state.mass[g].begin(), state.mass[g].end(), spare[g].begin());
            if (observed && pools()) pool_candidates(smoother(), smoothing(), step, spare[g]);
        }
        return spare;
    }
    /// out[group, value_dim] = sum of distribution * value, if that is known without reading the values.
    [[nodiscard]] bool weighted_values(const State& state, const HeadStep& step,
                                       MatrixView<float> out) const {
        if (!state.output.knows(step.n())) return false;
        for (std::size_t i = 0; i < state.output.sum.size(); ++i)
            out[i / out.cols][i % out.cols] = static_cast<float>(state.output.sum[i]);
        return true;
    }
    /// Rows that leave take their share of the outputs along. What is not known is summed over what stays.
    void forget(State& state, const HeadStep& step, std::span<const index_t> keep) const {
        if (pools() || base == Rows::tova) return;  // never known; forgotten anyway
        const std::size_t dim = step.cached.v.dim();
        state.output.shrink(step.cached.v, *step.workspace, keep,
                            [&](std::size_t j, double sign, std::span<const float> value) {
                                for (std::size_t g = 0; g < step.group; ++g)
                                    state.output.add(g * dim, sign * static_cast<double>(state.mass[g][j]),
                                                     value);
                            });
    }

  private:
    [[nodiscard]] constexpr std::size_t rows() const {
        return window.value_or(base == Rows::snapkv ? 32 : 0);
    }
    [[nodiscard]] constexpr std::size_t smoothing() const {
        return kernel.value_or(base == Rows::snapkv ? 5 : 1);
    }
    [[nodiscard]] constexpr Pool smoother() const {
        return pool.value_or(base == Rows::snapkv ? Pool::avg : Pool::none);
    }
    [[nodiscard]] constexpr bool pools() const { return smoother() != Pool::none && smoothing() > 1; }
    [[nodiscard]] constexpr Accumulation accumulation() const {
        using Mode = Accumulation::Mode;
        if (base == Rows::tova) return {Mode::replace};
        return {rows() > 0 ? Mode::window : Mode::sum, rows()};
    }
};
static_assert(Policy<PerHeadAttention> && PerQueryHead<PerHeadAttention> && Forgets<PerHeadAttention>);

}  // namespace kvcull::inline KVCULL_ABI
