#pragma once
/// When a policy evicts, and what: from the scores of a scope (a layer's heads, or the model's) to a plan.

#include <algorithm>
#include <array>
#include <cstddef>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../select/budget.hpp"
#include "../select/plan.hpp"
#include "../select/reduce.hpp"
#include "../select/topk.hpp"
#include "live.hpp"
#include "shape.hpp"
#include "tiles.hpp"
#include "trace.hpp"

namespace kvcull::inline KVCULL_ABI::detail {

/// Parameters that stay (shape, policy, budget, rule) and the memory of a decision. What changes over a
/// sequence is a `Live`, given to every call. Heads are counted flat: layer * kv_heads + head.
template <Policy P, BudgetRule Rule>
class Decision {
  public:
    /// Heads `first .. first + count - 1` are ranked together or belong to one layer.
    struct Span {
        std::size_t first, count;
    };

    Decision(CacheShape cache, P method, Budget limits, Rule division, std::optional<Reduction> how = {})
        : shape(checked(std::move(cache))),
          policy(std::move(method)),
          budget(tokens_of(limits)),
          rule(std::move(division)),
          reduction(how) {
        if (reduction) check_reduction();
        if (shape.softcap > 0.0F) require_any_logits("CacheShape", "softcap");
        for (const Phase phase : {Phase::prompt, Phase::decode, Phase::probe})
            falls_due[static_cast<std::size_t>(phase)] =
                may_fall_due(phase, false) || may_fall_due(phase, true);
        never = asked_heads() == 0 ||
                (!decides_late<P> && std::find(falls_due.begin(), falls_due.end(), true) == falls_due.end());
        const bool bounded = !never && !cut_of(policy);
        if (bounded || budget.tokens > 0 || budget.ratio != 0.0) check_budget(budget);
        if constexpr (Gated<P>) policy.check_gates(shape.layers, shape.kv_heads);
        scores_.resize(pools_model() ? shape.heads() : shape.kv_heads);
        keeps_.resize(pools_model() || scope() == Scope::layer_pooled ? scores_.size() : 1);
        if (reduction && reduction->block_rows > 1) compaction = Compaction::ascending;  // blocks stay whole
    }

    const CacheShape shape;
    const P policy;
    const Budget budget;
    const Rule rule;
    const std::optional<Reduction> reduction;  // heads of a layer, or all, share one keep list
    double given_up = 0.0;                     // by that, see Reducer, in all decisions
    std::array<bool, 3> falls_due{};           // by phase: the policy may evict in it
    bool never = false;                        // the policy never evicts, whatever the rows
    Compaction compaction = is_ordered(policy) ? Compaction::ascending : Compaction::fill;
    Workers workers;
    Bias bias;
    EvictionTrace trace;

    /// Whether the policy has no say in a layer.
    [[nodiscard]] bool spares(std::size_t layer) const noexcept { return shape.layer(layer).spared(); }
    /// Heads that the policy has a say in.
    [[nodiscard]] std::size_t asked_heads() const noexcept {
        std::size_t heads = 0;
        for (std::size_t index = 0; index < shape.layers; ++index)
            heads += spares(index) ? 0 : shape.kv_heads;
        return heads;
    }
    /// @throws config_error if the policy only knows plain logits.
    void require_any_logits(std::string_view where, std::string_view name) const {
        bool plain = Lookahead<P>;
        for (const Phase phase : {Phase::prompt, Phase::decode, Phase::probe}) {
            const Needs needs = policy.needs(phase);
            plain = plain || (needs.rows > 0 && (!needs.attention || needs.logits));
        }
        check<error::config_error>(!plain || FollowsLogits<P>, where, name, "given",
                                   text("none: ", P::name, " reads plain logits"));
    }

    /// The side values that the policy wants with `tokens` new tokens.
    void check_side(std::string_view where, std::size_t tokens, const AppendInputs& inputs) const {
        if constexpr (SideInput<P>) {
            bool beta = static_cast<Side>(P::side) == Side::log_beta;
            if constexpr (Gated<P>) beta = !policy.gated() || !inputs.log_beta.empty();
            const MatrixView<const float>& given = beta ? inputs.log_beta : inputs.attention_input;
            const std::string_view name = beta ? "log_beta" : "attention_input";
            check<error::state_error>(!given.empty(), where, name, "missing",
                                      text("given with the tokens: ", P::name, " needs it"));
            check_size(where, text(name, ".rows"), given.rows, beta ? shape.kv_heads : tokens);
            if (beta) check_size(where, text(name, ".cols"), given.cols, tokens);
        }
    }

    [[nodiscard]] Scope scope() const { return scope_of(policy); }
    /// Whether all heads of the model are decided on at once.
    [[nodiscard]] bool pools_model() const {
        return scope() == Scope::model_pooled ||
               (reduction && (reduction->all_layers || reduction->equal_counts));
    }
    [[nodiscard]] Span layer(std::size_t index) const noexcept {
        return {index * shape.kv_heads, shape.kv_heads};
    }
    template <class Visit>
    void for_each_span(Visit&& visit) const {
        if (pools_model()) return visit(Span{0, shape.heads()});
        for (std::size_t index = 0; index < shape.layers; ++index)
            if (!spares(index)) visit(layer(index));
    }

    /// The budget is known: sizes of all heads. @throws config_error; `live` is then unchanged.
    void resolve(Live<P>& live, std::size_t tokens, std::size_t prompt) const {
        if constexpr (Checked<P>) policy.check(tokens);
        std::vector<std::size_t> layers(shape.layers), sizes(shape.heads());
        rule.layer_sizes(tokens, prompt, protection(tokens, 0, true), layers);
        for (std::size_t i = 0; i < sizes.size(); ++i) {
            const std::size_t index = i / shape.kv_heads;
            sizes[i] = spares(index) ? unlimited : layers[index];
        }
        if (pools_model() && reduction) {  // then no layer is spared
            const std::size_t total = std::accumulate(sizes.begin(), sizes.end(), std::size_t{0});
            std::fill(sizes.begin(), sizes.end(),
                      reduction->equal_counts ? *std::min_element(sizes.begin(), sizes.end())
                                              : total / sizes.size());
        }
        check_pins(live.pinned, sizes);
        live.sizes = std::move(sizes);
        live.resolved = true;
    }
    void check_pins(std::span<const PositionRange> pinned, std::span<const std::size_t> sizes) const {
        check<error::config_error>(pinned.empty() || !reduction || reduction->block_rows == 1, "pin", "range",
                                   "given", "none: rows go in whole blocks");
        position_t total = 0;
        for (const PositionRange& range : pinned) total += range.end - range.begin;
        for (const std::size_t size : sizes)
            check<error::config_error>(static_cast<std::size_t>(total) <= size, "pin", "budget", size,
                                       text("at least the pinned ", total));
    }

    /// Whether the policy would evict at all at such a moment in some layer, however many rows there are.
    /// Zero is tried too, as it is a multiple of every interval.
    [[nodiscard]] bool may_fall_due(Phase phase, bool prompt_end) const {
        constexpr std::size_t many = unlimited / 4;
        for (std::size_t layer = 0; layer < shape.layers; ++layer) {
            if (spares(layer)) continue;
            for (const std::size_t seen : {std::size_t{0}, many})
                for (const std::size_t since : {std::size_t{0}, many})
                    if (due({.phase = phase,
                             .prompt_end = prompt_end,
                             .layer = layer,
                             .seen = seen,
                             .tokens = 1,
                             .since = since,
                             .rows = many,
                             .budget = 1},
                            1))
                        return true;
        }
        return false;
    }
    /// Whether the heads hold more than they may once `coming` rows have joined.
    [[nodiscard]] bool over(const Live<P>& live, Span span, std::size_t coming) const {
        for (std::size_t i = span.first; i < span.first + span.count; ++i)
            if (live.sizes[i] != unlimited && live.rows[i] + coming > live.sizes[i]) return true;
        return false;
    }
    /// Whether the heads evict now. `coming`: rows per head that will have joined by then.
    [[nodiscard]] bool due_now(const Live<P>& live, Span span, Moment moment, std::size_t coming = 0) const {
        if constexpr (Waits<P>) {
            moment.layer = span.first / shape.kv_heads;
            moment.since = since(live, moment, coming);
            if (!policy.ready(live.sequence, moment)) return false;
        }
        return rows_due(live, span, moment, coming);
    }
    /// Whether they would, but for a policy that waits. Pooled heads by their sums, others as soon as one of
    /// them is due.
    [[nodiscard]] bool rows_due(const Live<P>& live, Span span, Moment moment, std::size_t coming = 0) const {
        const bool pooled = scope() == Scope::layer_pooled || pools_model();
        moment.layer = span.first / shape.kv_heads;
        moment.since = since(live, moment, coming);
        std::size_t heads = 0;
        for (std::size_t i = span.first; i < span.first + span.count; ++i) {
            if (spares(i / shape.kv_heads)) continue;
            ++heads;
            moment.rows = live.rows[i] + coming + (pooled ? moment.rows : 0);
            moment.budget = live.sizes[i] + (pooled ? moment.budget : 0);
            if (!pooled && due(moment, 1)) return true;
        }
        return pooled && heads > 0 && due(moment, heads);
    }

    /// Whether nothing is decided at such a moment, however many rows there are.
    [[nodiscard]] bool pauses(const Live<P>& live, std::size_t layer, const Moment& moment) const {
        return never || live.hold || (moment.phase == Phase::prompt && live.decided[layer] != 0);
    }
    /// Whether the step that ends now may find rows to evict.
    [[nodiscard]] bool may_decide(const Live<P>& live) const {
        const Moment moment = live.moment_after(live.call_tokens);
        bool found = false;
        for_each_span([&](Span span) {
            found =
                found || (!pauses(live, span.first / shape.kv_heads, moment) && rows_due(live, span, moment));
        });
        return found;
    }
    /// Whether head `index` might evict in a call that brings `coming` rows.
    [[nodiscard]] bool may_evict(const Live<P>& live, std::size_t index, std::size_t coming) const {
        if (spares(index / shape.kv_heads)) return falls_out(live, index, coming);
        if (Lookahead<P> || live.hold || !falls_due[static_cast<std::size_t>(live.phase)]) return false;
        if (divides_heads(rule) && live.phase == Phase::prompt) return true;  // its size may become smaller
        return scope() == Scope::layer_pooled || pools_model() ||
               live.rows[index] + coming > live.sizes[index];
    }
    /// Rows that head `index` will hold once its layer has made the step that brings `coming` rows.
    [[nodiscard]] std::size_t rows_after(const Live<P>& live, std::size_t index, std::size_t coming) const {
        const std::size_t rows = live.rows[index] + coming, layer_of = index / shape.kv_heads;
        if (spares(layer_of))
            return falls_out(live, index, coming) ? std::min(rows, shape.layer(layer_of).window) : rows;
        const bool by_itself = scope() == Scope::head || scope() == Scope::layer_shared;
        if (!by_itself || divides_heads(rule) || decides_late<P> || rows <= live.sizes[index]) return rows;
        const Moment moment = live.moment_after(coming);
        const bool stays = pauses(live, layer_of, moment) || !due_now(live, layer(layer_of), moment, coming);
        return stays ? rows : live.sizes[index];
    }

    [[nodiscard]] HeadStep head_step(const Live<P>& live, std::size_t index, const HeadView& cached,
                                     TileScratch& scratch) const {
        return {.phase = live.phase,
                .layer = index / shape.kv_heads,
                .head = index % shape.kv_heads,
                .group = shape.group(),
                .next_position = live.call_next,
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
    void score(Live<P>& live, std::size_t index, HeadStep step,
               std::span<const HeadsView<const float>> queries, std::size_t coming, TileScratch& scratch,
               std::span<float> out) const {
        step.protect = protection(live.sizes[index], coming, !queries.empty());
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
        for (std::size_t from = 0; from < count; from += shape.kv_heads)
            workers.for_each_head(shape.kv_heads, [&](std::size_t h, TileScratch& scratch) {
                const std::size_t i = from + h, n = live.rows[first + i];
                if (spares((first + i) / shape.kv_heads)) {
                    scores_[i].get(n);
                    return;
                }
                HeadStep step = head_step(live, first + i, views[i], scratch);
                step.phase = phase;
                score(live, first + i, step, queries, coming, scratch, {scores_[i].get(n), n});
            });

        candidates_.clear();
        for (std::size_t i = 0; i < count; ++i) {
            const std::size_t size = live.sizes[first + i], n = live.rows[first + i];
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
            if (divides_heads(rule) && phase == Phase::prompt && coming == 0 && scope() == Scope::head)
                divide(live, span);
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
    /// Whether head `index` of a layer with a window is cut once `coming` rows have joined.
    [[nodiscard]] bool falls_out(const Live<P>& live, std::size_t index, std::size_t coming) const noexcept {
        const LayerTraits traits = shape.layer(index / shape.kv_heads);
        return traits.window > 0 && live.rows[index] + coming > traits.most_rows();
    }
    /// Rows that no later token can see leave, if there are enough of them.
    void leave_window(Live<P>& live, std::size_t layer, LayerView cached, Plan& plan) {
        const std::size_t first = layer * shape.kv_heads;
        if (!falls_out(live, first, 0)) return;
        const TokenMask mask{.window = shape.layer(layer).window};
        keeps_[0].clear();
        for (std::size_t j = mask.first_seen(cached[0].position, live.call_next); j < live.rows[first]; ++j)
            keeps_[0].push_back(static_cast<index_t>(j));
        for (std::size_t h = 0; h < shape.kv_heads; ++h)
            leave(live, first + h, cached[h].position, Reason::out_of_window, plan);
        live.gone[layer] = shape.layer(layer).first_seen(live.call_next);
    }
    /// Rows of positions from `end` on leave.
    void truncate(const Live<P>& live, CacheView cached, position_t end, Plan& plan) {
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
    /// @throws config_error where one list for several heads makes no sense.
    void check_reduction() const {
        using error::config_error;
        constexpr std::string_view where = "Reduction";
        const auto fits = [&](bool good, std::string_view wanted) {
            check<config_error>(good, where, "policy", P::name, wanted);
        };
        check<config_error>(reduction->block_rows > 0, where, "block_rows", reduction->block_rows,
                            "at least 1");
        fits(scope() == Scope::head, "one that ranks every head by itself");
        fits(!cut_of(policy), "one that keeps a number of rows");
        fits(!Lookahead<P>, "one without a look-ahead");
        bool selects = Selects<P>;
        if constexpr (requires { policy.selects(); }) selects = policy.selects();
        fits(!selects, "one that leaves the choice to its scores");
        check<config_error>(!divides_heads(rule), where, "rule", "one that divides a layer over its heads",
                            "none: they share one list");
        for (std::size_t index = 0; index < shape.layers; ++index)
            check<config_error>(!pools_model() || !spares(index), where, text("layer ", index),
                                "spared from eviction", "one like the others, as layers agree on their rows");
    }
    /// The budget in tokens. One of memory is that of all layers: those with a window take theirs first.
    [[nodiscard]] Budget tokens_of(Budget limits) const {
        if (limits.bytes == 0) return limits;
        constexpr std::string_view where = "Budget";
        std::size_t windows = 0;
        for (std::size_t index = 0; index < shape.layers; ++index) {
            const LayerTraits traits = shape.layer(index);
            check<error::config_error>(traits.evicts || traits.window > 0, where, "bytes", limits.bytes,
                                       text("a number of tokens: layer ", index, " keeps all its rows"));
            if (traits.window > 0) windows += traits.most_rows() * shape.kv_heads * shape.row_bytes();
        }
        check<error::config_error>(asked_heads() > 0 && limits.bytes > windows, where, "bytes", limits.bytes,
                                   text("more than the ", windows, " of layers with a window"));
        limits.bytes -= windows;
        return in_tokens(limits, asked_heads(), shape.row_bytes());
    }
    /// All but the rows in keeps_[0] leave a head, whatever their scores.
    void leave(const Live<P>& live, std::size_t index, const PositionsView& position, Reason reason,
               Plan& plan) const {
        const std::size_t layer = index / shape.kv_heads;
        report(live, index, position, keeps_[0], {}, reason);
        plan.add(layer, index % shape.kv_heads, live.rows[index], keeps_[0], compaction_of(layer));
    }
    /// Tokens decoded since the last eviction of the moment's layer.
    [[nodiscard]] static std::size_t since(const Live<P>& live, const Moment& moment, std::size_t coming) {
        return live.since[moment.layer] + (moment.phase == Phase::decode ? coming : 0);
    }
    [[nodiscard]] bool due(Moment moment, std::size_t heads) const {
        moment.slack = budget.slack * heads;
        moment.heads = heads;
        if constexpr (Triggered<P>) return policy.due(moment);
        return moment.rows > moment.budget && moment.rows - moment.budget > moment.slack;
    }
    /// What selection protects in a head: the policy's rows and the user's, less those that are still to
    /// come. `last`: what is evicted is gone, not only left out of the copy that looks ahead.
    [[nodiscard]] Protected protection(std::size_t size, std::size_t coming, bool last) const {
        Protected rows = protected_rows(policy, size);
        if constexpr (ProtectsAhead<P>)
            if (!last) rows = policy.protect_ahead(size);
        rows.sinks = std::max(rows.sinks, budget.sinks);
        rows.recent = std::max(rows.recent, budget.recent);
        rows.recent -= std::min(rows.recent, coming);
        return rows;
    }

    /// The rule's sizes of a layer's heads. The total stays: after an earlier division the heads' own sizes
    /// differ. Pinned rows always fit.
    void divide(Live<P>& live, Span span) {
        std::size_t total = 0, pinned = 0;
        for (const Candidates& head : candidates_) total += head.size;
        for (const PositionRange& range : live.pinned)
            pinned += static_cast<std::size_t>(range.end - range.begin);
        std::vector<std::size_t> sizes(span.count);
        rule.head_sizes(span.first / shape.kv_heads, candidates_, total / span.count, sizes);
        for (std::size_t& size : sizes)
            for (; size < pinned; ++size) {
                std::size_t& largest = *std::max_element(sizes.begin(), sizes.end());
                if (largest <= pinned) break;
                --largest;
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

}  // namespace kvcull::inline KVCULL_ABI::detail
