#pragma once
/// LAQ and LAQ++ (arXiv 2505.20334): the queries of a few tokens that are generated ahead, from a compressed
/// copy of the cache, vote on the whole prompt.

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "snapkv.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Two stages: `score` is SnapKV's and ranks rows for the copy, `rescore` lets the last `window` prompt
/// tokens and the pseudo tokens vote on the full cache. Nothing is evicted but by a driver, see
/// cache/lookahead.hpp. State: the last max(window, lookahead_window) query rows of the group. Cost: a vote
/// of R = window + pseudo tokens, O(G R n d), once per prompt; decoded tokens leave their queries.
struct Laq {
    static constexpr std::string_view name = "laq";
    static constexpr bool follows_logits = true;
    using State = SnapKV::State;
    /// What a row sees of n rows. causal: a prompt token what lies up to it, a pseudo token everything.
    /// shifted: row r of R the first n - R + r + 1, as if the last of them were the prompt's last token (the
    /// authors' code); if n < R, causal.
    enum class Mask : std::uint8_t { causal, shifted };
    friend constexpr auto names_of(Mask /*any*/) noexcept {
        return std::array<std::string_view, 2>{"causal", "shifted"};
    }
    /// How the copy is chosen. streaming: the first 4 and the newest rows. full: all rows.
    enum class Method : std::uint8_t { snapkv, streaming, full };
    friend constexpr auto names_of(Method /*any*/) noexcept {
        return std::array<std::string_view, 3>{"snapkv", "streaming", "full"};
    }

    std::size_t window = 0;  // prompt tokens that vote beside the pseudo tokens, and stay
    std::size_t lookahead = 8;
    std::size_t lookahead_window = 32;
    std::optional<std::size_t> lookahead_budget = {};  // rows per head of the copy; default: the budget
    Method lookahead_method = Method::snapkv;
    std::size_t kernel = 7;
    Pool pool = Pool::max;
    Group gqa = Group::mean;
    Mask mask = Mask::causal;

    static constexpr auto fields() {
        return std::tuple{Field{"window", &Laq::window},
                          Field{"lookahead", &Laq::lookahead},
                          Field{"lookahead_window", &Laq::lookahead_window},
                          Field{"lookahead_budget", &Laq::lookahead_budget},
                          Field{"lookahead_method", &Laq::lookahead_method},
                          Field{"kernel", &Laq::kernel},
                          Field{"pool", &Laq::pool},
                          Field{"gqa", &Laq::gqa},
                          Field{"mask", &Laq::mask}};
    }
    void check(std::size_t budget) const {
        using error::config_error;
        constexpr std::string_view where = "Laq";
        detail::check_kernel(where, kernel);
        detail::check<config_error>(lookahead_window >= 1, where, "lookahead_window", lookahead_window,
                                    "at least 1");
        detail::check<config_error>(lookahead > 0 || window > 0, where, "lookahead", lookahead,
                                    "at least 1, or a window");
        detail::check<config_error>(budget > window, where, "budget", budget,
                                    detail::text("more than window = ", window));
        if (lookahead == 0 || lookahead_method == Method::full) return;
        const std::size_t fewest = lookahead_method == Method::snapkv ? lookahead_window : streaming_sinks;
        detail::check<config_error>(lookahead_rows(budget) > fewest, where, "lookahead_budget",
                                    lookahead_rows(budget), detail::text("more than ", fewest));
    }
    /// Rows per head of the copy, or `unlimited`.
    [[nodiscard]] constexpr std::size_t lookahead_rows(std::size_t budget) const {
        return lookahead_method == Method::full ? unlimited : lookahead_budget.value_or(budget);
    }
    [[nodiscard]] constexpr Protected protect(std::size_t /*budget*/) const { return {0, window}; }
    [[nodiscard]] constexpr Protected protect_ahead(std::size_t /*budget*/) const {
        if (lookahead_method == Method::streaming) return {streaming_sinks, 0};
        return {0, lookahead_window};
    }
    static constexpr bool ordered() { return true; }
    [[nodiscard]] constexpr std::size_t workspace(std::size_t rows, std::size_t group,
                                                  std::size_t dim) const {
        return vote_scratch(rows) + group * std::max(lookahead_window, window + lookahead) * dim;
    }
    static constexpr bool due(const Moment& /*moment*/) { return false; }
    [[nodiscard]] constexpr Needs needs(Phase phase) const {
        return {.rows = phase == Phase::probe ? 0 : std::max(window, lookahead_window)};
    }

    void observe(State& state, const HeadStep& step) const {
        if (step.tokens > 0) state.queries.push(std::max(window, lookahead_window), step);
    }
    /// The first stage.
    void score(const State& state, const HeadStep& step, std::span<float> out) const {
        if (lookahead_method == Method::streaming)
            return std::fill(out.begin(), out.end(), 0.0F);  // of equal scores the newest stay
        SnapKV{.window = lookahead_window, .kernel = kernel, .pool = pool, .gqa = gqa}.score(state, step,
                                                                                             out);
    }
    /// The second stage. `q` [group * L, d]: the queries of L pseudo tokens.
    void rescore(const State& state, const HeadStep& step, MatrixView<const float> q,
                 std::span<float> out) const {
        votes(state, step, q, out);
        const std::size_t own = std::min(Rows(*this, state, step, q).own, out.size());
        pool_scores(pool, kernel, out.first(out.size() - own), *step.workspace);
    }
    /// The votes before pooling; out[n].
    void votes(const State& state, const HeadStep& step, MatrixView<const float> q,
               std::span<float> out) const {
        const Rows rows(*this, state, step, q);
        const std::size_t scratch = vote_scratch(step.n()), all = step.group * rows.count(),
                          dim = step.cached.k.dim();
        float* const memory = step.workspace->get(scratch + all * dim);
        const MatrixView<float> voters(memory + scratch, all, dim);
        rows.copy(0, rows.count(), voters);
        window_votes(
            step, voters, [&](std::size_t i) { return rows.position(i); },
            [&](std::size_t i) { return rows.end(i); }, gqa, out, {memory, scratch});
    }

  protected:
    static constexpr std::size_t streaming_sinks = 4;

    /// The query tokens of the second stage: the newest prompt tokens, then the pseudo tokens.
    class Rows {
      public:
        Rows(const Laq& policy, const State& state, const HeadStep& step, MatrixView<const float> q)
            : ring_(state.queries),
              cached_(step.cached.position),
              next_(step.next_position),
              q_(q),
              group_(step.group),
              first_(ring_.size_before(step.next_position)),
              shifted_(policy.mask == Mask::shifted) {
            own = std::min(policy.window, first_);
            first_ -= own;
            shifted_ = shifted_ && cached_.size() >= count();
        }
        std::size_t own;  // of the prompt

        [[nodiscard]] std::size_t count() const noexcept { return own + q_.rows / group_; }
        [[nodiscard]] position_t position(std::size_t i) const noexcept {
            return i < own ? ring_.position(first_ + i) : next_ + static_cast<position_t>(i - own);
        }
        /// Cached rows that token i sees: all before this one.
        [[nodiscard]] std::size_t end(std::size_t i) const noexcept {
            if (shifted_) return cached_.size() - count() + i + 1;
            return i < own ? rows_up_to(cached_, ring_.position(first_ + i)) : cached_.size();
        }
        /// Tokens `first .. first + tokens - 1`: out[group * tokens, d].
        void copy(std::size_t first, std::size_t tokens, MatrixView<float> out) const noexcept {
            for (std::size_t g = 0; g < group_; ++g)
                for (std::size_t i = first; i < first + tokens; ++i) {
                    const auto row = i < own ? ring_.row(first_ + i, g) : q_[g * (count() - own) + i - own];
                    std::copy(row.begin(), row.end(), out[g * tokens + i - first].begin());
                }
        }

      private:
        const QueryRing& ring_;
        PositionsView cached_;
        position_t next_;
        MatrixView<const float> q_;
        std::size_t group_, first_;
        bool shifted_;
    };
};

/// LAQ++ under a name of its own: a Laq with a window, of 8 unless given.
struct LaqPlus : Laq {
    static constexpr std::string_view name = "laq++";

    LaqPlus(Laq policy = {.window = 8}) : Laq(policy) {}
};

/// LAQ whose second stage is the ranking of another policy, which is shown the rows as those of a prompt's
/// end: `LaqThen<OBCache>`, `LaqThen<Caote<>>`. That policy's window decides how many of them count, LAQ's
/// what is protected. Cost: that policy's, once per prompt, and memory for `vote_tile` tokens' attention.
template <Policy Scorer>
requires(!decides_late<Scorer> && !SideInput<Scorer>) struct LaqThen : Laq {
    static constexpr bool follows_logits = false;
    Scorer scorer = {};

    void rescore(const State& state, const HeadStep& step, MatrixView<const float> q,
                 std::span<float> out) const {
        const Rows rows(*this, state, step, q);
        const Needs needs = scorer.needs(Phase::prompt);
        const std::size_t n = step.n(), dim = step.cached.k.dim(), values = step.cached.v.dim(),
                          count = rows.count(), start = count - std::min(needs.rows, count),
                          most = step.group * std::min(vote_tile, count - start);
        std::vector<float> memory(most * (dim + 2 * n + 1 + values));
        std::vector<Visible> visible(most);
        typename Scorer::State fresh;
        resize_state(fresh, n);
        HeadStep tile = step;
        tile.phase = Phase::prompt;
        tile.added = n;  // to that state every row is new
        tile.evicts = true;
        for (std::size_t first = start; first < count; first += tile.tokens) {
            tile.first = first;
            tile.tokens = std::min(vote_tile, count - first);
            tile.first_tile = first == start;
            tile.last_tile = first + tile.tokens == count;
            const std::size_t all = step.group * tile.tokens;
            const MatrixView<float> tile_q(memory.data(), all, dim);
            rows.copy(first, tile.tokens, tile_q);
            for (std::size_t r = 0; r < all; ++r) visible[r] = {0, 0, rows.end(first + r % tile.tokens)};
            float* next = memory.data() + most * dim;
            const AttentionRows want{.attention = {next, all, n},
                                     .lse = {next + 2 * most * n, all},
                                     .logits = {next + most * n, all, n},
                                     .output = {next + most * (2 * n + 1), all, values}};
            tile.q = tile_q;
            tile.visible = std::span(visible).first(all);
            attend(*step.kernels, tile_q, step.cached.k, step.cached.v, tile.visible, step.scale, want);
            tile.attention = want.attention;
            tile.lse = want.lse;
            tile.logits = want.logits;
            tile.output = want.output;
            scorer.observe(fresh, tile);
        }
        if (start == count) scorer.observe(fresh, tile);
        scorer.score(fresh, tile, out);
    }
};

static_assert(Policy<Laq> && ProtectsAhead<Laq> && Protects<Laq> && Triggered<Laq> && Ordered<Laq> &&
              Checked<Laq>);
static_assert(Policy<LaqPlus> && Lookahead<LaqPlus>);

}  // namespace kvcull::inline KVCULL_ABI
