#pragma once
/// What a policy evicts: from the scores of a scope (a layer's heads, or the model's) to a plan.

#include <algorithm>
#include <array>
#include <cstddef>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../select/plan.hpp"
#include "../select/reduce.hpp"
#include "../select/topk.hpp"
#include "live.hpp"
#include "terms.hpp"
#include "tiles.hpp"
#include "trace.hpp"

namespace kvcull::inline KVCULL_ABI::detail {

/// The terms of a cache, and the memory of a decision by them.
template <Policy P, BudgetRule Rule>
class Decision : public Terms<P, Rule> {
    using Base = Terms<P, Rule>;

  public:
    using Base::budget, Base::policy, Base::reduction, Base::rule, Base::shape;
    using Base::falls_out, Base::for_each_span, Base::pools_model, Base::protection, Base::scope,
        Base::spares;
    using typename Base::Span;

    Decision(CacheShape cache, P method, Budget limits, Rule division, std::optional<Reduction> how = {})
        : Base(std::move(cache), std::move(method), limits, std::move(division), how) {
        scores_.resize(pools_model() ? shape.heads() : shape.kv_heads);
        keeps_.resize(pools_model() || scope() == Scope::layer_pooled ? scores_.size() : 1);
        if (reduction && reduction->block_rows > 1) compaction = Compaction::ascending;  // blocks stay whole
    }

    double given_up = 0.0;  // by a reduction, see Reducer, in all decisions
    Compaction compaction = is_ordered(policy) ? Compaction::ascending : Compaction::fill;
    Workers workers;
    Bias bias;
    EvictionTrace trace;

    [[nodiscard]] HeadStep head_step(const Live<P>& live, std::size_t index, const HeadView& cached,
                                     TileScratch& scratch) const {
        return {.phase = live.phase,
                .layer = index / shape.kv_heads,
                .head = index % shape.kv_heads,
                .group = shape.group(),
                .next_position = live.call_reach.next,
                .cached = cached,
                .scale = shape.logit_scale(),
                .softcap = shape.softcap,
                .bias = bias ? &bias : nullptr,
                .kernels = workers.kernels,
                .workspace = &scratch.policy,
                .wrapper_workspace = &scratch.wrapper};
    }
    /// The policy's scores of one head, or, with `queries` [q_heads, R, d] of every layer, those of its
    /// look-ahead.
    void score(Live<P>& live, std::size_t index, const HeadStep& step,
               std::span<const HeadsView<const float>> queries, TileScratch& scratch,
               std::span<float> out) const {
        if constexpr (Lookahead<P>) {
            if (!queries.empty()) {
                const HeadsView<const float>& given = queries[step.layer];
                const std::size_t rows = step.group * given.tokens;
                const MatrixView<float> q(scratch.q.get(rows * given.dim), rows, given.dim);
                for (std::size_t r = 0; r < rows; ++r) {
                    const float* row = given.row(step.head * step.group + r / given.tokens, r % given.tokens);
                    std::copy(row, row + given.dim, q[r].data());
                }
                return policy.rescore(live.states[index], step, q, out);
            }
        }
        if constexpr (Prepares<P>) policy.prepare(live.states[index], step);
        if constexpr (SequenceState<P>)
            policy.score(live.states[index], live.sequence, step, out);
        else
            policy.score(live.states[index], step, out);
    }

    /// Adds to `plan` what the heads keep, leaving room for `coming` more rows. `views` are those of the
    /// span.
    void choose(Live<P>& live, Span span, std::span<const HeadView> views, Phase phase, std::size_t coming,
                Plan& plan, std::span<const HeadsView<const float>> queries = {}) {
        const std::size_t first = span.first, count = span.count;
        const bool divides =
            phase == Phase::prompt && coming == 0 && scope() == Scope::head && divides_heads(rule);
        // A rule divides as if the heads were still alike, however it has divided earlier chunks.
        const auto size_of = [&](std::size_t i) {
            return divides ? live.layer_sizes[(first + i) / shape.kv_heads] : live.sizes[first + i];
        };
        for (std::size_t from = 0; from < count; from += shape.kv_heads)
            workers.for_each_head(shape.kv_heads, [&](std::size_t h, TileScratch& scratch) {
                const std::size_t i = from + h, n = live.rows[first + i];
                if (spares((first + i) / shape.kv_heads)) {
                    scores_[i].get(n);
                    return;
                }
                HeadStep step = head_step(live, first + i, views[i], scratch);
                step.phase = phase;
                step.protect = protection(size_of(i), coming, !queries.empty());
                score(live, first + i, step, queries, scratch, {scores_[i].get(n), n});
            });

        candidates_.clear();
        for (std::size_t i = 0; i < count; ++i) {
            const std::size_t size = size_of(i), n = live.rows[first + i];
            if (spares((first + i) / shape.kv_heads)) {  // ranked with the others, but all of it is protected
                std::fill_n(scores_[i].data(), n, 0.0F);
                candidates_.push_back({{scores_[i].data(), n}, views[i].position, n, {.recent = n}});
                continue;
            }
            candidates_.push_back({{scores_[i].data(), n},
                                   views[i].position,
                                   size - std::min(coming, size),
                                   protection(size, coming, !queries.empty())});
        }
        if constexpr (HeadBudgetRule<Rule>)
            if (divides) divide(live, span);
        const auto add = [&](std::size_t i, std::span<const index_t> keep) {
            const float* score = scores_[scope() == Scope::layer_shared ? 0 : i].data();
            report(live, first + i, views[i].position, keep, {score, live.rows[first + i]});
            plan.add((first + i) / shape.kv_heads, (first + i) % shape.kv_heads, live.rows[first + i], keep,
                     compaction);
        };
        if (reduction) {
            const std::size_t sharing = reduction->all_layers ? count : shape.kv_heads;
            given_up += reducer_(*reduction, shape.kv_heads, candidates_, live.pinned,
                                 std::span(keeps_).first(count / sharing));
            for (std::size_t i = 0; i < count; ++i) add(i, keeps_[i / sharing]);
            return;
        }
        switch (scope()) {
            case Scope::layer_pooled:
            case Scope::model_pooled:
                rank_together(live);
                for (std::size_t i = 0; i < count; ++i) add(i, keeps_[i]);
                break;
            case Scope::layer_shared:
                share(live, first, views[0]);
                for (std::size_t i = 0; i < count; ++i) add(i, keeps_[0]);
                break;
            case Scope::head:
                for (std::size_t i = 0; i < count; ++i) {
                    select(live, first + i, i, views[i]);
                    add(i, keeps_[0]);
                }
        }
    }

    /// Tells the trace which rows of a head leave: all but `keep`. @param score [rows], or empty
    void report(const Live<P>& live, std::size_t index, const PositionsView& position,
                std::span<const index_t> keep, std::span<const float> score,
                Reason reason = Reason::ranked_out) const {
        if (!trace) return;
        Eviction eviction{.seen = live.seen + live.call_tokens,
                          .layer = index / shape.kv_heads,
                          .head = index % shape.kv_heads,
                          .reason = reason};
        std::size_t next = 0;
        for (std::size_t j = 0; j < position.size(); ++j) {
            if (next < keep.size() && static_cast<std::size_t>(keep[next]) == j) {
                ++next;
                continue;
            }
            eviction.position = position[j];
            eviction.score = score.empty() ? quiet_nan() : score[j];
            trace(eviction);
        }
    }

    /// How rows of a layer move. In one with a window they stay ascending.
    [[nodiscard]] Compaction compaction_of(std::size_t layer) const noexcept {
        return shape.layer(layer).window > 0 ? Compaction::ascending : compaction;
    }
    /// Rows that no later token can see leave, if there are enough of them.
    void leave_window(Live<P>& live, std::size_t layer, LayerView cached, Plan& plan) {
        const std::size_t first = layer * shape.kv_heads;
        if (!falls_out(live, first, 0)) return;
        const TokenMask mask{.window = shape.layer(layer).window};
        keeps_[0].clear();
        for (std::size_t j = mask.first_seen(cached[0].position, live.call_reach.next); j < live.rows[first];
             ++j)
            keeps_[0].push_back(static_cast<index_t>(j));
        for (std::size_t h = 0; h < shape.kv_heads; ++h)
            leave(live, first + h, cached[h].position, Reason::out_of_window, plan);
        live.gone[layer] = shape.layer(layer).first_seen(live.call_reach.next);
    }
    /// Rows of positions from `end` on leave, and no others.
    void truncate(const Live<P>& live, CacheView cached, position_t end, Plan& plan) {
        plan.clear();
        for (std::size_t i = 0; i < cached.heads.size(); ++i) {
            keeps_[0].clear();
            for (std::size_t j = 0; j < live.rows[i]; ++j)
                if (cached.heads[i].position[j] < end) keeps_[0].push_back(static_cast<index_t>(j));
            leave(live, i, cached.heads[i].position, Reason::truncated, plan);
        }
    }

    /// Shows every head the rows that it is about to lose.
    void forget(Live<P>& live, std::span<const HeadView> cached, const Plan& plan) {
        if constexpr (Forgets<P>)
            for (std::size_t i = 0; i < plan.size(); ++i) {
                const HeadPlan head = plan[i];
                if (spares(head.layer)) continue;
                const std::size_t index = head.layer * shape.kv_heads + head.head;
                policy.forget(live.states[index],
                              head_step(live, index, cached[head.head], workers.scratch[0]), head.keep);
            }
    }

    void reserve(std::size_t rows) {
        for (auto& keep : keeps_) keep.reserve(rows);
        for (auto& scores : scores_) scores.get(rows);
        if (reduction) reducer_.reserve(shape.layers, rows);
        selector_.reserve(rows * (scope() == Scope::head ? 1 : scores_.size()));
        candidates_.reserve(scores_.size());
        fixed_.reserve(rows);
        const std::size_t dim = std::max(shape.head_dim, shape.values());
        std::size_t workspace = 0, wrapper_workspace = 0;
        if constexpr (TakesWorkspace<P>) workspace = policy.workspace(rows, shape.group(), dim);
        if constexpr (TakesWrapperWorkspace<P>)
            wrapper_workspace = policy.wrapper_workspace(rows, shape.group(), dim);
        workers.reserve(shape, policy.needs(Phase::decode).shown(true), rows, workspace, wrapper_workspace);
    }
    /// Gives all scratch back.
    void trim() {
        scores_ = std::vector<Scratch<float>>(scores_.size());
        keeps_ = std::vector<std::vector<index_t>>(keeps_.size());
        selector_ = {};
        reducer_ = {};
        candidates_ = {};
        fixed_ = {};
        workers.scratch = {};
    }

  private:
    /// All but the rows in keeps_[0] leave a head, whatever their scores.
    void leave(const Live<P>& live, std::size_t index, const PositionsView& position, Reason reason,
               Plan& plan) const {
        const std::size_t layer = index / shape.kv_heads;
        report(live, index, position, keeps_[0], {}, reason);
        plan.add(layer, index % shape.kv_heads, live.rows[index], keeps_[0], compaction_of(layer));
    }
    /// The rule's sizes of a layer's heads. Pinned rows always fit, at the cost of the largest heads while
    /// these have more.
    void divide(Live<P>& live, Span span) {
        const std::size_t layer_of = span.first / shape.kv_heads;
        std::size_t pinned = 0;
        for (const PositionRange& range : live.pinned) pinned += range.size();
        std::vector<std::size_t> sizes(span.count);
        rule.head_sizes(layer_of, candidates_, live.layer_sizes[layer_of], sizes);
        for (std::size_t& size : sizes)
            for (; size < pinned; ++size) {
                std::size_t& largest = *std::max_element(sizes.begin(), sizes.end());
                if (largest > pinned) --largest;
            }
        for (std::size_t i = 0; i < span.count; ++i)
            live.sizes[span.first + i] = candidates_[i].size = sizes[i];
    }
    /// What one head keeps, by itself; in keeps_[0].
    void select(const Live<P>& live, std::size_t index, std::size_t i, const HeadView& cached) {
        const Candidates& head = candidates_[i];
        std::vector<index_t>& keep = keeps_[0];
        if constexpr (Selects<P>) {
            bool itself = true;
            if constexpr (requires { policy.selects(); }) itself = policy.selects();
            if (itself && head.score.size() > head.size) {
                selector_.fix(head, live.pinned, fixed_);
                HeadStep step = head_step(live, index, cached, workers.scratch[0]);
                step.protect = head.protect;
                keep.clear();
                policy.select(live.states[index], step, fixed_, head.size, keep);
                check<error::state_error>(keep.size() == head.size, P::name, "number of rows selected",
                                          keep.size(), head.size);
                return;
            }
        }
        selector_.head(head, live.pinned, keep);
    }
    /// One keep list for all heads of the layer, by the mean of their scores; in keeps_[0].
    void share(const Live<P>& live, std::size_t index, const HeadView& cached) {
        const std::size_t n = candidates_[0].score.size();
        float* const mean = scores_[0].data();
        for (std::size_t i = 1; i < candidates_.size(); ++i) {
            check<error::state_error>(candidates_[i].score.size() == n, P::name, text("rows of head ", i),
                                      candidates_[i].score.size(), n);
            workers.kernels->add(mean, scores_[i].data(), n);
        }
        for (std::size_t j = 0; j < n; ++j) mean[j] /= static_cast<float>(candidates_.size());
        if constexpr (Finishes<P>) {
            HeadStep step = head_step(live, index, cached, workers.scratch[0]);
            step.protect = candidates_[0].protect;
            policy.finish(step, {mean, n});
        }
        selector_.head(candidates_[0], live.pinned, keeps_[0]);
    }
    /// What each of several heads keeps; in keeps_. With rows of its own, a head keeps as many more of its
    /// best as it has in one ranking for the rest of the budget.
    void rank_together(const Live<P>& live) {
        if (const std::optional<float> least = cut_of(policy)) {
            for (std::size_t i = 0; i < candidates_.size(); ++i)
                selector_.reaching(candidates_[i], *least, live.pinned, keeps_[i]);
            return;
        }
        std::size_t own = 0, total = 0, held = 0;
        if constexpr (requires { policy.own_rows(); }) own = policy.own_rows();
        for (const Candidates& head : candidates_) {
            const bool whole = head.protect.recent >= head.score.size();  // as where the policy has no say
            total += head.size - (whole ? 0 : std::min(own, head.size));
            held += head.score.size();
        }
        HeadTie tie = HeadTie::lower;
        if constexpr (requires { policy.tie(); }) tie = policy.tie();
        selector_.pooled(candidates_, std::min(total, held), live.pinned, tie, keeps_);
        for (std::size_t i = 0; i < candidates_.size() && own > 0; ++i) {
            candidates_[i].size = keeps_[i].size() + own;
            selector_.head(candidates_[i], live.pinned, keeps_[i]);
        }
    }

    Selector selector_;
    Reducer reducer_;
    std::vector<Scratch<float>> scores_;
    std::vector<std::vector<index_t>> keeps_;  // of heads that are ranked together, else of one after another
    std::vector<Candidates> candidates_;
    std::vector<std::uint8_t> fixed_;
};

/// While it lives, decisions are for `size` rows per head and leave nothing behind.
template <Policy P, BudgetRule Rule>
class Trial {
  public:
    Trial(Decision<P, Rule>& decision, Live<P>& live, std::size_t size)
        : decision_(decision),
          live_(live),
          sizes_(live.sizes.size(), size),
          layer_sizes_(live.layer_sizes.size(), size) {
        for (std::size_t i = 0; i < sizes_.size(); ++i)
            if (decision.spares(i / decision.shape.kv_heads)) sizes_[i] = unlimited;
        swap();
    }
    Trial(const Trial&) = delete;
    Trial& operator=(const Trial&) = delete;
    ~Trial() { swap(); }

  private:
    void swap() noexcept {
        live_.sizes.swap(sizes_);
        live_.layer_sizes.swap(layer_sizes_);
        decision_.trace.swap(silent_);
        std::swap(decision_.given_up, given_up_);
    }

    Decision<P, Rule>& decision_;
    Live<P>& live_;
    std::vector<std::size_t> sizes_, layer_sizes_;
    EvictionTrace silent_;  // as nothing leaves
    double given_up_ = 0.0;
};

}  // namespace kvcull::inline KVCULL_ABI::detail
