#pragma once
/// OBCache (arXiv 2510.07651): rank a token by an estimate of how much the attention output changes if its
/// value, its key or both were zero, to second order.

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../attention/row_kernels.hpp"
#include "../score/received.hpp"
#include "../score/similarity.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Per counted query row with weight A, logit z and output o, a token with value v gets
///
///     attention A    value_l1 A |v|_1    value (A |v|)^2    key (A z)^2 |v - o|^2
///     joint A^2 |v + z (v - o)|^2        separate value + key
///
/// z is the scaled product of query and key also where the model caps or biases what softmax sees, for
/// another pass over K.
///
/// summed over rows and the group. Everything else (which rows count, smoothing, protection) is that of a
/// base. State: 4 bytes per token and KV head, 4 more for a norm that is kept (of all but `attention` and
/// `key`), 8 G more if `lagged`. Cost per counted row: O(G n) for `value`; for `key`, `joint` and `separate`
/// another pass over V, O(G n d), which `lagged` moves into the next token's attention.
struct OBCache {
    static constexpr std::string_view name = "obcache";
    static constexpr bool follows_logits = true;
    static constexpr std::size_t usual_recent = 16;
    enum class Score : std::uint8_t { attention, value_l1, value, key, joint, separate };
    friend constexpr auto names_of(Score /*any*/) noexcept {
        return std::array<std::string_view, 6>{"attention", "value_l1", "value", "key", "joint", "separate"};
    }
    /// h2o: the last `window` rows of a prompt call, and every decoded one. h2o_full: all rows. tova: the
    /// last row of a call. snapkv: as h2o, smoothed.
    enum class Base : std::uint8_t { h2o, h2o_full, tova, snapkv };
    friend constexpr auto names_of(Base /*any*/) noexcept {
        return std::array<std::string_view, 4>{"h2o", "h2o_full", "tova", "snapkv"};
    }
    /// kept: taken when a value enters. recomputed: no memory, but a pass over V where a norm is wanted.
    enum class Norms : std::uint8_t { kept, recomputed };
    friend constexpr auto names_of(Norms /*any*/) noexcept {
        return std::array<std::string_view, 2>{"kept", "recomputed"};
    }
    struct State {
        RowArray<float> sum;        // NaN where the value is not finite: such a token goes first
        RowPlanes<float> norm;      // 0 or 1: |v|^2, or |v|_1
        RowPlanes<float> late;      // `lagged`: weights, then logits, of the newest row of each query head
        std::vector<float> output;  // [group, value_dim] of those rows
        bool waits = false;         // they are still to be added to `sum`

        [[nodiscard]] auto arrays() noexcept { return std::tie(sum, norm, late); }
        [[nodiscard]] auto rest() noexcept { return std::tie(output, waits); }
    };

    Score kind = Score::key;
    Base base = Base::h2o;
    std::optional<std::size_t> recent = {};  // newest tokens that stay; default 16, tova 0
    std::size_t sinks = 0;
    std::optional<std::size_t> window = {};  // prompt rows that count, 0: all; default `recent`, h2o_full 0
    std::optional<std::size_t> kernel = {};  // default 1, snapkv 7
    std::optional<Pool> pool = {};           // default none, snapkv max
    bool decode_evict = true;                // else decoded rows do not count and the cache grows
    Norms norms = Norms::kept;
    bool lagged = false;

    static constexpr auto fields() {
        return std::tuple{Field{"score", &OBCache::kind},    Field{"base", &OBCache::base},
                          Field{"recent", &OBCache::recent}, Field{"sinks", &OBCache::sinks},
                          Field{"window", &OBCache::window}, Field{"kernel", &OBCache::kernel},
                          Field{"pool", &OBCache::pool},     Field{"decode_evict", &OBCache::decode_evict},
                          Field{"norms", &OBCache::norms},   Field{"lagged", &OBCache::lagged}};
    }
    void check(std::size_t budget) const {
        using error::config_error;
        constexpr std::string_view where = "OBCache";
        detail::check_kernel(where, smoothing());
        detail::check<config_error>(base == Base::tova || newest() < budget, where, "recent", newest(),
                                    detail::text("below the budget ", budget));
        detail::check<config_error>(!windowed() || window.has_value() || newest() > 0, where, "recent", 0,
                                    "at least 1, or a window");
        detail::check<config_error>(base != Base::tova || window.value_or(1) == 1, where, "window",
                                    window.value_or(1), "1 with base tova");
        detail::check<config_error>(!lagged || reads_outputs(), where, "lagged", "true",
                                    "false unless the score is key, joint or separate");
    }
    [[nodiscard]] constexpr Protected protect(std::size_t /*budget*/) const { return {sinks, newest()}; }
    [[nodiscard]] constexpr bool ordered() const { return smoother() != Pool::none && smoothing() > 1; }
    [[nodiscard]] constexpr std::size_t workspace(std::size_t rows, std::size_t group,
                                                  std::size_t dim) const {
        return std::max(rows, scratch(group, dim));
    }
    [[nodiscard]] constexpr bool due(const Moment& moment) const {
        return (decode_evict || moment.phase != Phase::decode) && moment.rows > moment.budget &&
               moment.rows - moment.budget > moment.slack;
    }
    [[nodiscard]] constexpr Needs needs(Phase phase) const {
        Needs needs = accumulation().needs(phase);
        if (phase == Phase::decode && !decode_evict) needs = {};
        needs.logits = needs.output = needs.rows > 0 && reads_outputs();
        return needs;
    }

    [[nodiscard]] bool reads_values(State& state, const HeadStep& step) const {
        return state.waits && !accumulation().replaces(step.phase);
    }
    void read_values(State& state, const HeadStep& step, const RowsView::Run& piece) const {
        add_late(state, step, piece.first, piece.first + piece.rows, state.sum.values());
        if (piece.first + piece.rows == step.n()) state.waits = false;
    }
    void observe(State& state, const HeadStep& step) const {
        if (step.phase == Phase::probe) return;
        if (step.first_tile) enter(state, step);
        if (step.tokens == 0) return;
        if (step.first_tile && accumulation().replaces(step.phase)) {
            state.waits = false;
            for (float& x : state.sum.values())
                if (!is_nan(x)) x = 0.0F;
        }
        if (state.waits) {
            add_late(state, step, 0, step.n(), state.sum.values());
            state.waits = false;
        }
        if (lagged && step.added == 1 && !step.evicts) return keep_late(state, step);
        if (kind == Score::attention || kind == Score::value_l1) {
            for (std::size_t r = 0; r < step.attention.rows; ++r)
                step.kernels->add(state.sum.values().data(), step.attention[r].data(), step.visible[r].end);
            return;
        }
        const auto weights = [&](std::size_t r) { return step.attention[r].data(); };
        const auto logits = [&](std::size_t r, std::size_t begin, std::size_t end, float* spare) {
            return logits_of(step, r, begin, end, spare);
        };
        const bool whole = !reads_outputs() && norms == Norms::kept;  // V is not read
        const std::size_t n = step.n(), stretch = whole ? n : detail::distance_rows;
        for (std::size_t begin = 0; begin < n; begin += stretch)
            for (std::size_t first = 0; first < step.attention.rows; first += step.group)
                add_rows(
                    state, step, begin, std::min(n, begin + stretch), first, step.group, weights, logits,
                    step.output, [&](std::size_t r) { return !reads_outputs() || counts(step, r); },
                    state.sum.values());
    }
    void score(const State& state, const HeadStep& step, std::span<float> out) const {
        std::copy(state.sum.values().begin(), state.sum.values().end(), out.begin());
        if (state.waits) add_late(state, step, 0, step.n(), out);
        const bool observed = norms == Norms::recomputed || state.norm.planes() > 0;
        if (kind == Score::value_l1 && observed) {
            if (norms == Norms::kept)
                for (std::size_t j = 0; j < out.size(); ++j) out[j] *= state.norm[0][j];
            else
                for_each_row(step.cached.v, 0, *step.workspace,
                             [&](std::size_t j, std::span<const float> value) { out[j] *= l1_norm(value); });
        }
        pool_candidates(smoother(), smoothing(), step, out);
    }

  private:
    [[nodiscard]] static constexpr std::size_t scratch(std::size_t count, std::size_t dim) noexcept {
        return 3 * count * detail::distance_rows + dim;
    }
    [[nodiscard]] constexpr bool reads_outputs() const {
        return kind == Score::key || kind == Score::joint || kind == Score::separate;
    }
    [[nodiscard]] constexpr bool wants_norm() const {
        return kind == Score::value_l1 || kind == Score::value || kind == Score::separate ||
               (kind == Score::joint && norms == Norms::kept);
    }
    [[nodiscard]] constexpr std::size_t newest() const {
        return recent.value_or(base == Base::tova ? 0 : usual_recent);
    }
    [[nodiscard]] constexpr std::size_t smoothing() const {
        return kernel.value_or(base == Base::snapkv ? 7 : 1);
    }
    [[nodiscard]] constexpr Pool smoother() const {
        return pool.value_or(base == Base::snapkv ? Pool::max : Pool::none);
    }
    /// Whether only the last rows of a prompt call count.
    [[nodiscard]] constexpr bool windowed() const {
        return base != Base::tova && window.value_or(base == Base::h2o_full ? 0 : 1) > 0;
    }
    [[nodiscard]] constexpr Accumulation accumulation() const {
        using Mode = Accumulation::Mode;
        if (base == Base::tova) return {Mode::replace};
        if (!windowed()) return {Mode::sum};
        return {Mode::window, window.value_or(newest())};
    }

    /// |row|^2: not finite if the row is not, or is so large that distances from it would not be.
    [[nodiscard]] static float square_of(const HeadStep& step, std::span<const float> row) {
        float square = 0.0F;
        step.kernels->dots_f32(row.data(), row.size(), 1, row.data(), row.size(), 1, row.size(), 1.0F,
                               &square, 1);
        return square;
    }
    [[nodiscard]] static bool counts(const HeadStep& step, std::size_t r) {
        return is_finite(square_of(step, step.output[r]));
    }

    /// Norms of the call's values. A value that is not finite marks its row.
    void enter(State& state, const HeadStep& step) const {
        if (kind == Score::attention) return;
        if (lagged && state.late.planes() == 0) {
            state.late.set_planes(2 * step.group, step.n());
            state.output.resize(step.group * step.cached.v.dim());
        }
        if (wants_norm() && norms == Norms::kept && state.norm.planes() == 0)
            state.norm.set_planes(1, step.n());
        for_each_row(step.cached.v, step.n() - step.added, *step.workspace,
                     [&](std::size_t j, std::span<const float> value) {
                         const float square = square_of(step, value);
                         if (!is_finite(square)) state.sum[j] = quiet_nan();
                         if (state.norm.planes() > 0)
                             state.norm[0][j] = kind == Score::value_l1 ? l1_norm(value) : square;
                     });
    }
    /// out[begin .. end - 1] += what query rows `first .. first + count - 1` give those rows of the cache.
    /// weights(r): [n] of a query row; logits(r, begin, end, spare): those of the rows, perhaps in `spare`;
    /// `takes_part(r)`: whether it counts. At most `distance_rows` rows unless V is not read.
    template <class Weights, class Logits, class Counts>
    void add_rows(const State& state, const HeadStep& step, std::size_t begin, std::size_t end,
                  std::size_t first, std::size_t count, const Weights& weights, const Logits& logits,
                  MatrixView<const float> output, const Counts& takes_part, std::span<float> out) const {
        constexpr std::size_t stride = detail::distance_rows;
        const std::size_t dim = step.cached.v.dim();
        const RowsView& v = step.cached.v;
        float* const square = step.workspace->get(scratch(count, dim));
        float* const z = square + count * stride;
        const float* norm = nullptr;
        if (wants_norm() && norms == Norms::kept) norm = state.norm[0].data() + begin;
        if (wants_norm() && norms == Norms::recomputed) {
            float* const own = z + count * stride;
            float* const origin = own + stride;
            std::fill_n(origin, dim, 0.0F);
            detail::distances(*step.kernels, origin, dim, 1, v, begin, end, nullptr, own);
            norm = own;
        }
        for (std::size_t r = 0; kind == Score::joint && r < count; ++r) {
            float* const own = z + r * stride;
            if (const float* given = logits(first + r, begin, end, own); given != own)
                std::copy_n(given, end - begin, own);
        }
        if (kind == Score::joint && norm != nullptr) {
            const MatrixView<const float> points(output[first].data(), count, dim, output.stride);
            joint_squares(step, begin, end, points, norm, z, square, z + count * stride);
        } else if (reads_outputs()) {
            detail::distances(*step.kernels, output[first].data(), output.stride, count, v, begin, end,
                              kind == Score::joint ? z : nullptr, square);
        }
        const auto add = [&](std::size_t r, const float* factor_z, const float* factor_d) {
            step.kernels->add_squares(out.data() + begin, weights(r) + begin, 0, factor_z, 0, factor_d, 0, 1,
                                      end - begin);
        };
        for (std::size_t r = first; r < first + count; ++r) {
            if (!takes_part(r)) continue;
            if (norm != nullptr && kind != Score::joint) add(r, nullptr, norm);
            if (kind == Score::joint)
                add(r, nullptr, square + (r - first) * stride);
            else if (reads_outputs())
                add(r, logits(r, begin, end, z), square + (r - first) * stride);
        }
    }

    /// square[r, j] = |v_j + z (v_j - o_r)|^2 = (1 + z)^2 |v_j|^2 - 2 z (1 + z) v_j . o_r + z^2 |o_r|^2: a
    /// third of the arithmetic. Where the terms cancel by more than five bits, by the distance itself.
    /// @param norm  |v_j|^2 @param spare  as long as `square`
    static void joint_squares(const HeadStep& step, std::size_t begin, std::size_t end,
                              MatrixView<const float> output, const float* norm, const float* z,
                              float* square, float* spare) {
        constexpr std::size_t stride = detail::distance_rows;
        const RowsView& v = step.cached.v;
        detail::for_each_piece(v, begin, end, [&](const RowsView::Run& piece, const std::byte* next) {
            detail::dots(*step.kernels, output.data, output.stride, output.rows, v, piece, 1.0F,
                         square + (piece.first - begin), stride, next);
        });
        std::size_t cancelled = 0;
        for (std::size_t r = 0; r < output.rows; ++r) {
            const float own = square_of(step, output[r]);
            for (std::size_t i = r * stride, j = 0; j < end - begin; ++i, ++j) {
                const float of_output = z[i], of_value = 1.0F + of_output;
                const float parts = of_value * of_value * norm[j] + of_output * of_output * own;
                const float sum = parts - 2.0F * of_output * of_value * square[i];
                const bool good = sum * 32.0F >= parts;
                square[i] = good ? sum : -1.0F;
                cancelled += good ? 0 : 1;
            }
        }
        if (cancelled == 0) return;
        detail::distances(*step.kernels, output.data, output.stride, output.rows, v, begin, end, z, spare);
        for (std::size_t r = 0; r < output.rows; ++r)
            for (std::size_t i = r * stride, j = 0; j < end - begin; ++i, ++j)
                if (square[i] < 0.0F) square[i] = spare[i];
    }

    /// Scaled products of query row r and the keys of rows `begin .. end - 1`, 0 where it sees none: those
    /// that softmax saw, unless they were capped or biased; then computed in `spare`.
    [[nodiscard]] static const float* logits_of(const HeadStep& step, std::size_t r, std::size_t begin,
                                                std::size_t end, float* spare) {
        if (step.bias == nullptr && !(step.softcap > 0.0F)) return step.logits[r].data() + begin;
        detail::for_each_piece(step.cached.k, begin, end,
                               [&](const RowsView::Run& piece, const std::byte* next) {
                                   detail::dots(*step.kernels, step.q[r].data(), 0, 1, step.cached.k, piece,
                                                step.scale, spare + (piece.first - begin), 0, next);
                               });
        const Visible& visible = step.visible[r];
        for (std::size_t j = begin; j < end; ++j)
            if (j >= visible.end || (j >= visible.sinks && j < visible.begin)) spare[j - begin] = 0.0F;
        return spare;
    }

    /// The newest query rows, one of each head, wait for a pass over the values.
    void keep_late(State& state, const HeadStep& step) const {
        const std::size_t group = step.group, dim = step.cached.v.dim();
        for (std::size_t g = 0; g < group; ++g) {
            const std::span<float> weights = state.late[g];
            std::copy(step.attention[g].begin(), step.attention[g].end(), weights.begin());
            if (!counts(step, g)) std::fill(weights.begin(), weights.end(), 0.0F);
            float* const late = state.late[group + g].data();
            if (const float* given = logits_of(step, g, 0, step.n(), late); given != late)
                std::copy_n(given, step.n(), late);
            std::copy(step.output[g].begin(), step.output[g].end(), &state.output[g * dim]);
        }
        state.waits = true;
    }
    void add_late(const State& state, const HeadStep& step, std::size_t begin, std::size_t end,
                  std::span<float> out) const {
        for (std::size_t first = begin; first < end; first += detail::distance_rows)
            add_rows(
                state, step, first, std::min(end, first + detail::distance_rows), 0, step.group,
                [&](std::size_t g) { return state.late[g].data(); },
                [&](std::size_t g, std::size_t begin_of, std::size_t, float*) {
                    return state.late[step.group + g].data() + begin_of;
                },
                {state.output.data(), step.group, step.cached.v.dim()}, [](std::size_t) { return true; },
                out);
    }
};
static_assert(Policy<OBCache> && Protects<OBCache> && Triggered<OBCache> && Ordered<OBCache>);
static_assert(ReadsValues<OBCache> && Checked<OBCache> && FollowsLogits<OBCache>);

}  // namespace kvcull::inline KVCULL_ABI
