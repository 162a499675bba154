#pragma once
/// CAOTE (arXiv 2504.14051): evict what changes the attention output least. A base policy's scores take the
/// place of attention weights; score/removal.hpp has the closed form.

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../score/per_head_attention.hpp"
#include "../score/removal.hpp"
#include "../score/running_sum.hpp"
#include "../score/similarity.hpp"
#include "../select/topk.hpp"

namespace kvcull::inline KVCULL_ABI {

/// What CAOTE can wrap: scores that are not negative, at the end of each layer.
template <class P>
concept CaoteBase = Policy<P> && NonNegative<P> && !decides_late<P> && !SideInput<P> && !Selects<P> &&
                    !QueriesKeys<P> && !ReadsValues<P>;

/// CAOTE over any base policy with scores that are not negative. `fast`: measured from the plain mean of the
/// values (FastCAOTE), which is known before the step, so that the distances are taken while attention reads
/// the values. State: the base's and 4 bytes per token, `fast` 8 per channel more. Cost at an eviction:
/// O(G n d), one pass over V if the base knows its outputs, else two; `fast`: none beside attention.
template <CaoteBase Base = PerHeadAttention>
struct Caote {
    static constexpr std::string_view name = "caote";
    enum class Gqa : std::uint8_t { rss, mean, pre };
    friend constexpr auto names_of(Gqa /*any*/) noexcept {
        return std::array<std::string_view, 3>{"rss", "mean", "pre"};
    }
    enum class Order : std::uint8_t { single, greedy };
    friend constexpr auto names_of(Order /*any*/) noexcept {
        return std::array<std::string_view, 2>{"single", "greedy"};
    }
    struct State {
        typename Base::State base;
        // Squared norms; `fast`: squared distances from the mean, of the newest step that evicts.
        RowPlanes<float> squares;
        RunningSum values;        // `fast`: [value_dim]
        std::vector<float> mean;  // of this call's values, while attention reads them
        ReadAlong read;           // whether `squares` is true

        [[nodiscard]] auto arrays() noexcept { return std::tuple_cat(base.arrays(), std::tie(squares)); }
        [[nodiscard]] auto rest() noexcept {
            const auto own = std::tie(values, mean, read);
            if constexpr (requires { base.rest(); })
                return std::tuple_cat(base.rest(), own);
            else
                return own;
        }
    };

    Base base = {};
    bool fast = false;
    std::optional<Gqa> gqa = {};  // default: rss if the base has scores per query head, else pre
    Order order = Order::single;  // of several victims: all by one scoring, or one by one

    static constexpr auto fields() {
        return std::tuple_cat(std::tuple{Field{"fast", &Caote::fast}}, other_fields());
    }
    /// All but `fast`.
    static constexpr auto other_fields() {
        return std::tuple_cat(std::tuple{Field{"gqa", &Caote::gqa}, Field{"order", &Caote::order}},
                              fields_of(&Caote::base));
    }
    void check(std::size_t budget) const {
        if constexpr (Checked<Base>) base.check(budget);
        detail::check<error::config_error>(PerQueryHead<Base> || reduction() == Gqa::pre, "Caote", "gqa",
                                           names_of(reduction())[static_cast<std::size_t>(reduction())],
                                           detail::text("pre: ", Base::name, " has one score per KV head"));
    }
    [[nodiscard]] constexpr Protected protect(std::size_t budget) const {
        return protected_rows(base, budget);
    }
    [[nodiscard]] constexpr bool due(const Moment& moment) const requires Triggered<Base> {
        return base.due(moment);
    }
    [[nodiscard]] constexpr bool ordered() const { return is_ordered(base); }
    [[nodiscard]] constexpr std::size_t workspace(std::size_t rows, std::size_t group,
                                                  std::size_t dim) const {
        if constexpr (TakesWorkspace<Base>) return std::max(base.workspace(rows, group, dim), dim);
        return dim;
    }
    [[nodiscard]] constexpr std::size_t wrapper_workspace(std::size_t rows, std::size_t group,
                                                          std::size_t dim) const {
        const std::size_t own = group * (rows + dim) + removal_scratch(group, dim);
        return order == Order::greedy ? own + (group + 2) * rows : own;
    }
    [[nodiscard]] constexpr Needs needs(Phase phase) const { return base.needs(phase); }

    [[nodiscard]] bool reads_values(State& state, const HeadStep& step) const {
        if (!fast || !step.evicts) return false;
        enter(state, step);
        state.read.begin();
        if (!state.values.knows(step.n())) return false;
        write_mean(state.values, step.n(), state.mean);
        return true;
    }
    void read_values(State& state, const HeadStep& step, const RowsView::Run& piece) const {
        detail::distances(*step.kernels, state.mean.data(), 0, 1, step.cached.v, piece, nullptr, 0,
                          state.squares[0].data() + piece.first, 0);
        state.read.read(piece, step.n());
    }
    void observe(State& state, const HeadStep& step) const {
        const bool brings_rows = step.phase != Phase::probe && step.first_tile;
        if (brings_rows && !fast) take_norms(state, step);
        if (brings_rows && fast && state.read.missed()) enter(state, step);
        base.observe(state.base, step);
    }
    void score(const State& state, const HeadStep& step, std::span<float> out) const {
        const std::size_t n = step.n(), dim = step.cached.v.dim(), heads = scored_heads(step);
        float* memory = step.wrapper_workspace->get(wrapper_workspace(n, step.group, dim));
        const MatrixView<float> weights(memory, heads, n);
        const MatrixView<float> points(memory += heads * n, heads, dim);
        Centre centre = around(state, points);
        bool known = fast;
        if (fast) centre = mean_of_all(state, step, points[0], weights[0]);
        MatrixView<const float> scores = scores_of(state, step, weights);
        if constexpr (requires { base.weighted_values(state.base, step, points); }) {
            if (!fast && reduction() != Gqa::pre) known = base.weighted_values(state.base, step, points);
            for (std::size_t g = 0; !fast && known && g < heads; ++g) {
                const double sum = detail::Summary(*step.kernels, scores[g]).sum;
                known = sum > 0.0;
                for (float& x : points[g]) x = static_cast<float>(static_cast<double>(x) / sum);
            }
        }
        if (!known) {
            detail::normalise(*step.kernels, name, scores, weights);
            scores = weights;
            detail::weighted_mean(*step.kernels, weights, step.cached.v, points);
        }
        removal_errors(*step.kernels, name, scores, weights, step.cached.v, centre, changes(), out,
                       memory + heads * dim);
    }
    [[nodiscard]] constexpr bool selects() const { return order == Order::greedy; }
    void select(const State& state, const HeadStep& step, std::span<const std::uint8_t> fixed,
                std::size_t count, std::vector<index_t>& keep) const {
        const std::size_t n = step.n();
        remove(state, step, fixed, n - count, keep);
        const std::span<float> left(step.wrapper_workspace->get(n), n);
        std::fill(left.begin(), left.end(), 1.0F);
        for (const index_t row : keep) left[static_cast<std::size_t>(row)] = 0.0F;
        keep.clear();
        for (std::size_t j = 0; j < n; ++j)
            if (left[j] > 0.0F) keep.push_back(static_cast<index_t>(j));
    }
    /// Greedy removal, whatever `order` says: the row whose absence changes least, then the same of the rows
    /// that are left, `count` times. `victims` in that order. `fixed[n]`: rows that must stay; at least one
    /// row must. Cost: that of `score` per victim.
    void remove(const State& state, const HeadStep& step, std::span<const std::uint8_t> fixed,
                std::size_t count, std::vector<index_t>& victims) const {
        const std::size_t n = step.n(), dim = step.cached.v.dim(), heads = scored_heads(step);
        const std::size_t scratch = removal_scratch(step.group, dim);
        float* memory = step.wrapper_workspace->get((2 * heads + 2) * n + heads * dim + scratch);
        const MatrixView<float> scores(memory, heads, n), weights(memory += heads * n, heads, n);
        const MatrixView<float> points(memory += heads * n, fast ? 1 : heads, dim);
        const std::span<float> error(memory += heads * dim, n), left(memory += n, n);
        memory += n;
        std::fill(left.begin(), left.end(), 1.0F);
        const MatrixView<const float> given = scores_of(state, step, scores);
        for (std::size_t g = 0; g < heads; ++g)
            if (given[g].data() != scores[g].data())
                std::copy(given[g].begin(), given[g].end(), scores[g].begin());
        bool poisoned = false;  // a victim's value is not finite: no weight takes it out of a sum
        const auto take_means = [&](MatrixView<const float> of) {
            if (!poisoned) return detail::weighted_mean(*step.kernels, of, step.cached.v, points);
            for (std::size_t g = 0; g < points.rows; ++g) std::fill(points[g].begin(), points[g].end(), 0.0F);
            for_each_row(step.cached.v, 0, *step.workspace, [&](std::size_t j, std::span<const float> value) {
                for (std::size_t g = 0; left[j] > 0.0F && g < points.rows; ++g)
                    for (std::size_t c = 0; c < dim; ++c) points[g][c] += of[g][j] * value[c];
            });
        };
        for (victims.clear(); victims.size() < count;) {
            if (fast) {
                std::copy(left.begin(), left.end(), weights[0].begin());
                const MatrixView<float> uniform(weights.data, 1, n);
                detail::normalise(*step.kernels, name, uniform, uniform);
                take_means(uniform);
            }
            for (std::size_t g = 0; g < heads; ++g) {
                const bool some = detail::Summary(*step.kernels, scores[g]).most > 0.0F;
                std::copy_n(some ? scores[g].data() : left.data(), n, weights[g].data());
            }
            detail::normalise(*step.kernels, name, weights, weights);
            if (!fast) take_means(weights);
            removal_errors(*step.kernels, name, weights, weights, step.cached.v, around(state, points),
                           changes(), error, memory);
            const auto goes_before = [&](std::size_t a, std::size_t b) {
                const std::uint32_t first = score_order(error[a]), second = score_order(error[b]);
                return first != second ? first < second : step.cached.position[a] < step.cached.position[b];
            };
            std::size_t victim = n;
            for (std::size_t j = 0; j < n; ++j)
                if (left[j] > 0.0F && fixed[j] == 0 && (victim == n || goes_before(j, victim))) victim = j;
            left[victim] = 0.0F;
            const std::span<float> value(step.workspace->get(dim), dim);
            step.cached.v.widen(victim, value);
            poisoned = poisoned || !all_finite(value);
            for (std::size_t g = 0; g < heads; ++g) scores[g][victim] = 0.0F;
            victims.push_back(static_cast<index_t>(victim));
        }
    }
    void forget(State& state, const HeadStep& step, std::span<const index_t> keep) const {
        if constexpr (Forgets<Base>) base.forget(state.base, step, keep);
        if (!fast) return;
        state.values.shrink(step.cached.v, *step.workspace, keep,
                            [&](std::size_t, double sign, std::span<const float> value) {
                                state.values.add(0, sign, value);
                            });
    }

  private:
    [[nodiscard]] constexpr Gqa reduction() const {
        return gqa.value_or(PerQueryHead<Base> ? Gqa::rss : Gqa::pre);
    }
    [[nodiscard]] constexpr Changes changes() const {
        return reduction() == Gqa::mean ? Changes::mean : Changes::norm;
    }
    [[nodiscard]] constexpr std::size_t scored_heads(const HeadStep& step) const {
        return reduction() == Gqa::pre ? 1 : step.group;
    }
    /// Scores of the base, [1, n] or [group, n], its state's own or in `spare`.
    [[nodiscard]] MatrixView<const float> scores_of(const State& state, const HeadStep& step,
                                                    MatrixView<float> spare) const {
        if constexpr (PerQueryHead<Base>)
            if (reduction() != Gqa::pre) return base.distribution(state.base, step, spare);
        base.score(state.base, step, spare[0]);
        return spare;
    }
    /// Distances are to be taken from points.
    [[nodiscard]] Centre around(const State& state, MatrixView<const float> points) const {
        Centre centre{.points = points, .plain = fast};
        if (!fast && state.squares.planes() > 0) centre.norms = state.squares[0];
        return centre;
    }
    static void take_norms(State& state, const HeadStep& step) {
        const bool anew = state.squares.planes() == 0;
        if (anew) state.squares.set_planes(1, step.n());
        for_each_row(step.cached.v, anew ? 0 : step.n() - step.added, *step.workspace,
                     [&](std::size_t j, std::span<const float> value) {
                         state.squares[0][j] = squared_norm(*step.kernels, value);
                     });
    }
    /// The call's values join the sum, if it is true for the rows before them.
    void enter(State& state, const HeadStep& step) const {
        if (state.squares.planes() == 0) {
            state.squares.set_planes(1, step.n());
            state.values.reset(step.cached.v.dim());
            state.mean.resize(step.cached.v.dim());
        }
        if (state.values.grow(step))
            for_each_row(step.cached.v, step.n() - step.added, *step.workspace,
                         [&](std::size_t, std::span<const float> value) { state.values.add(0, 1.0, value); });
    }
    static void write_mean(const RunningSum& values, std::size_t n, std::span<float> out) {
        for (std::size_t c = 0; c < out.size(); ++c)
            out[c] = static_cast<float>(values.sum[c] / static_cast<double>(n));
    }
    /// The plain mean of the values, or the distances from it. `spare`: [n], overwritten.
    [[nodiscard]] Centre mean_of_all(const State& state, const HeadStep& step, std::span<float> mean,
                                     std::span<float> spare) const {
        const std::size_t n = step.n();
        Centre centre{.points = {mean.data(), 1, mean.size()}, .plain = true};
        if (state.read.knows(n)) {
            centre.squares = state.squares[0];
        } else if (state.values.knows(n)) {
            write_mean(state.values, n, mean);
        } else {
            std::fill(spare.begin(), spare.end(), 1.0F / static_cast<float>(n));
            detail::weighted_mean(*step.kernels, {spare.data(), 1, n}, step.cached.v,
                                  {mean.data(), 1, mean.size()});
        }
        return centre;
    }
};

/// FastCAOTE under a name of its own: a Caote whose `fast` is on.
template <CaoteBase Base = PerHeadAttention>
struct FastCaote : Caote<Base> {
    static constexpr std::string_view name = "fastcaote";

    static constexpr auto fields() { return Caote<Base>::other_fields(); }

    FastCaote(Caote<Base> policy = {}) : Caote<Base>(std::move(policy)) { this->fast = true; }
};

static_assert(Policy<FastCaote<>> && Policy<Caote<>> && Protects<Caote<>> && !Triggered<Caote<>> &&
              Ordered<Caote<>>);
static_assert(ReadsValues<Caote<>> && Forgets<Caote<>> && Selects<Caote<>>);

}  // namespace kvcull::inline KVCULL_ABI
