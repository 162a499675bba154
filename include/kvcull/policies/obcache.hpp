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
#include "../score/squared_distances.hpp"

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
/// base. State: 4 bytes per token and KV head, 4 more for a norm that is kept (of all but `attention`), 8 G
/// more if `lagged`. Cost per counted row: O(G n) for `value`; for `key`, `joint` and `separate`
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
    /// kept: taken when a value enters. recomputed: no memory, but a pass over V where a score is made of
    /// norms, and distances by differences, which take twice the arithmetic of products.
    enum class Norms : std::uint8_t { kept, recomputed };
    friend constexpr auto names_of(Norms /*any*/) noexcept {
        return std::array<std::string_view, 2>{"kept", "recomputed"};
    }
    struct State {
        RowArray<float> sum;         // NaN where the value is not finite: such a token goes first
        RowPlanes<float> norm;       // 0 or 1: |v|^2, or |v|_1
        RowPlanes<float> late;       // `lagged`: weights, then logits, of the newest row of each query head
        std::vector<float> output;   // [group, value_dim] of those rows
        std::vector<float> squares;  // [group] of the output
        bool waits = false;          // they are still to be added to `sum`
        std::size_t added = 0;       // rows for which that is done, within a pass over the values

        [[nodiscard]] auto arrays() noexcept { return std::tie(sum, norm, late); }
        [[nodiscard]] auto rest() noexcept { return std::tie(output, squares, waits); }
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
        return std::max(rows, group + scratch(group, dim));
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
        // Whole blocks, which second-level cache still has: a piece is too short to pay for the calls.
        const std::size_t end = piece.first + piece.rows;
        add_late(state, step, end == step.n() ? end : end / detail::distance_rows * detail::distance_rows);
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
        add_late(state, step, step.n());
        if (lagged && step.added == 1 && !step.evicts) return keep_late(state, step);
        if (kind == Score::attention || kind == Score::value_l1) {
            for (std::size_t r = 0; r < step.attention.rows; ++r)
                step.kernels->add(state.sum.values().data(), step.attention[r].data(), step.visible[r].end);
            return;
        }
        const std::size_t n = step.n(), rows = step.attention.rows, group = step.group;
        const bool whole = !reads_outputs() && norms == Norms::kept;  // V is not read
        const std::size_t stretch = whole ? n : detail::distance_rows;
        float* const memory = step.workspace->get(rows + scratch(group, step.cached.v.dim()));
        const std::span<float> squares(memory, rows);
        for (std::size_t r = 0; r < rows; ++r)
            squares[r] = reads_outputs() ? squared_norm(*step.kernels, step.output[r]) : 0.0F;
        for (std::size_t begin = 0; begin < n; begin += stretch)
            for (std::size_t first = 0; first < rows; first += group) {
                const std::size_t end = std::min(n, begin + stretch);
                Counted counted{.begin = begin, .end = end, .squares = &squares[first]};
                counted.weights = {step.attention[first].data() + begin, group, end - begin,
                                   step.attention.stride};
                if (reads_outputs()) {
                    counted.logits = logits_of(step, first, group, begin, end, memory + rows);
                    counted.output = {step.output[first].data(), group, step.output.cols, step.output.stride};
                }
                add_rows(state, step, counted, memory + rows + group * detail::distance_rows,
                         state.sum.values());
            }
    }
    void score(const State& state, const HeadStep& step, std::span<float> out) const {
        std::copy(state.sum.values().begin(), state.sum.values().end(), out.begin());
        if (state.waits) add_late(state, step, state.added, step.n(), out);
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
    /// Floats for `group` query rows: logits, distances and as many to spare, norms, a point.
    [[nodiscard]] static constexpr std::size_t scratch(std::size_t group, std::size_t dim) noexcept {
        return (3 * group + 1) * detail::distance_rows + dim;
    }
    [[nodiscard]] constexpr bool reads_outputs() const {
        return kind == Score::key || kind == Score::joint || kind == Score::separate;
    }
    [[nodiscard]] constexpr bool wants_norm() const {
        const bool spares_arithmetic = kind == Score::key || kind == Score::joint;
        return kind != Score::attention && (!spares_arithmetic || norms == Norms::kept);
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

    /// Norms of the call's values. A value that is not finite marks its row.
    void enter(State& state, const HeadStep& step) const {
        if (kind == Score::attention) return;
        if (lagged && state.late.planes() == 0) {
            state.late.set_planes(2 * step.group, step.n());
            state.output.resize(step.group * step.cached.v.dim());
            state.squares.resize(step.group);
        }
        if (wants_norm() && norms == Norms::kept && state.norm.planes() == 0)
            state.norm.set_planes(1, step.n());
        for_each_row(step.cached.v, step.n() - step.added, *step.workspace,
                     [&](std::size_t j, std::span<const float> value) {
                         const float square = squared_norm(*step.kernels, value);
                         if (!is_finite(square)) state.sum[j] = quiet_nan();
                         if (state.norm.planes() > 0)
                             state.norm[0][j] = kind == Score::value_l1 ? l1_norm(value) : square;
                     });
    }
    /// Query rows of a group, and what they made of rows `begin .. end - 1` of the cache.
    struct Counted {
        std::size_t begin = 0, end = 0;                     // at most `distance_rows` apart if V is read
        MatrixView<const float> weights = {}, logits = {};  // [group, from `begin` on]
        MatrixView<const float> output = {};                // [group, value_dim]
        const float* squares = nullptr;  // [group] of the output: if not finite, a row has no say
    };
    /// out[begin .. end - 1] += what they give those rows.
    void add_rows(const State& state, const HeadStep& step, const Counted& counted, float* memory,
                  std::span<float> out) const {
        constexpr std::size_t stride = detail::distance_rows;
        const simd::Kernels& kernels = *step.kernels;
        const std::size_t begin = counted.begin, end = counted.end;
        const MatrixView<const float> weights = counted.weights, logits = counted.logits;
        const float* const squares = counted.squares;
        const RowsView& v = step.cached.v;
        float* const square = memory;
        float* const spare = square + weights.rows * stride;
        const float* norm = nullptr;
        if (wants_norm() && norms == Norms::kept) norm = state.norm[0].data() + begin;
        if (wants_norm() && norms == Norms::recomputed) {
            float* const own = spare + weights.rows * stride;
            float* const origin = own + stride;
            std::fill_n(origin, v.dim(), 0.0F);
            detail::squared_distances(kernels, {{origin, 1, v.dim()}}, v, begin, end, nullptr, {}, own,
                                      nullptr);
            norm = own;
        }
        const bool joint = kind == Score::joint;
        if (reads_outputs())
            detail::squared_distances(kernels, {counted.output, squares}, v, begin, end, norm,
                                      joint ? logits : MatrixView<const float>{}, square, spare);
        for (std::size_t r = 0, next = 0; r < weights.rows; r = next + 1) {
            for (next = r; next < weights.rows && is_finite(squares[next]);) ++next;
            const auto add = [&](const float* z, const float* d, std::size_t d_stride) {
                kernels.add_squares(out.data() + begin, weights.data + r * weights.stride, weights.stride, z,
                                    logits.stride, d, d_stride, next - r, end - begin);
            };
            if (kind == Score::value || kind == Score::separate) add(nullptr, norm, 0);
            if (reads_outputs())
                add(joint ? nullptr : logits.data + r * logits.stride, square + r * stride, stride);
        }
    }

    /// Scaled products of query rows `first .. first + count - 1` and the keys of rows `begin .. end - 1`, 0
    /// where a query sees none: those that softmax saw, unless they were capped or biased; then computed in
    /// `spare` [count * (end - begin)].
    [[nodiscard]] static MatrixView<const float> logits_of(const HeadStep& step, std::size_t first,
                                                           std::size_t count, std::size_t begin,
                                                           std::size_t end, float* spare) {
        const std::size_t rows = end - begin;
        if (step.bias == nullptr && !(step.softcap > 0.0F))
            return {step.logits[first].data() + begin, count, rows, step.logits.stride};
        const MatrixView<float> own(spare, count, rows);
        detail::for_each_piece(
            step.cached.k, begin, end, [&](const RowsView::Run& piece, const std::byte* next) {
                detail::dots(*step.kernels, step.q[first].data(), step.q.stride, count, step.cached.k, piece,
                             step.scale, own.data + (piece.first - begin), rows, next);
            });
        for (std::size_t r = 0; r < count; ++r) {
            const Visible& visible = step.visible[first + r];
            for (std::size_t j = begin; j < end; ++j)
                if (j >= visible.end || (j >= visible.sinks && j < visible.begin)) own[r][j - begin] = 0.0F;
        }
        return own;
    }

    /// The newest query rows, one of each head, wait for a pass over the values.
    void keep_late(State& state, const HeadStep& step) const {
        const std::size_t group = step.group, dim = step.cached.v.dim();
        for (std::size_t g = 0; g < group; ++g) {
            std::copy(step.attention[g].begin(), step.attention[g].end(), state.late[g].begin());
            float* const late = state.late[group + g].data();
            const std::span<const float> logits = logits_of(step, g, 1, 0, step.n(), late)[0];
            if (logits.data() != late) std::copy(logits.begin(), logits.end(), late);
            std::copy(step.output[g].begin(), step.output[g].end(), &state.output[g * dim]);
            state.squares[g] = squared_norm(*step.kernels, step.output[g]);
        }
        state.waits = true;
        state.added = 0;
    }
    /// What waits is added for rows up to `end`, if any of them is still without it.
    void add_late(State& state, const HeadStep& step, std::size_t end) const {
        if (!state.waits || end <= state.added) return;
        add_late(state, step, std::exchange(state.added, end), end, state.sum.values());
        state.waits = end < step.n();
    }
    void add_late(const State& state, const HeadStep& step, std::size_t begin, std::size_t end,
                  std::span<float> out) const {
        const std::size_t group = step.group, dim = step.cached.v.dim();
        float* const memory = step.workspace->get(scratch(group, dim));
        const auto late = [&](std::size_t first) {
            const MatrixView<const float> all = state.late.view();
            return MatrixView<const float>(all[first].data() + begin, group, all.cols - begin, all.stride);
        };
        for (std::size_t next; begin < end; begin = next) {
            next = std::min(end, begin + detail::distance_rows);
            add_rows(state, step,
                     {.begin = begin,
                      .end = next,
                      .weights = late(0),
                      .logits = late(group),
                      .output = {state.output.data(), group, dim},
                      .squares = state.squares.data()},
                     memory, out);
        }
    }
};
static_assert(Policy<OBCache> && Protects<OBCache> && Triggered<OBCache> && Ordered<OBCache>);
static_assert(ReadsValues<OBCache> && Checked<OBCache> && FollowsLogits<OBCache>);

}  // namespace kvcull::inline KVCULL_ABI
