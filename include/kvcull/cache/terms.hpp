#pragma once
/// What a cache was made with, and when it evicts by that.

#include <algorithm>
#include <array>
#include <cstddef>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../select/budget.hpp"
#include "../select/reduce.hpp"
#include "live.hpp"
#include "shape.hpp"

namespace kvcull::inline KVCULL_ABI::detail {

/// Shape, policy, budget and rule, which stay. What changes over a sequence is a `Live`, given to every call.
/// Heads are counted flat: layer * kv_heads + head.
template <Policy P, BudgetRule Rule>
class Terms {
  public:
    /// Heads `first .. first + count - 1` are ranked together or belong to one layer.
    struct Span {
        std::size_t first, count;
    };

    Terms(CacheShape cache, P method, Budget limits, Rule division, std::optional<Reduction> how)
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
        if constexpr (Projects<P>) policy.check_projection(shape.layers, shape.q_heads * shape.values());
    }

    const CacheShape shape;
    const P policy;
    const Budget budget;
    const Rule rule;
    const std::optional<Reduction> reduction;  // heads of a layer, or all, share one keep list
    std::array<bool, 3> falls_due{};           // by phase: the policy may evict in it
    bool never = false;                        // the policy never evicts, whatever the rows

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
        for (std::size_t index = 0; index < shape.layers; ++index)
            if (spares(index)) layers[index] = unlimited;
        for (std::size_t i = 0; i < sizes.size(); ++i) sizes[i] = layers[i / shape.kv_heads];
        if (pools_model() && reduction) {  // then no layer is spared
            const std::size_t total = std::accumulate(sizes.begin(), sizes.end(), std::size_t{0});
            std::fill(sizes.begin(), sizes.end(),
                      reduction->equal_counts ? *std::min_element(sizes.begin(), sizes.end())
                                              : total / sizes.size());
        }
        check_pins(live.pinned, sizes);
        live.sizes = std::move(sizes);
        live.layer_sizes = std::move(layers);
        live.resolved = true;
    }
    void check_pins(std::span<const PositionRange> pinned, std::span<const std::size_t> sizes) const {
        check<error::config_error>(pinned.empty() || !reduction || reduction->block_rows == 1, "pin", "range",
                                   "given", "none: rows go in whole blocks");
        std::size_t total = 0;
        for (const PositionRange& range : pinned) total += range.size();
        for (const std::size_t size : sizes)
            check<error::config_error>(total <= size, "pin", "budget", size,
                                       text("at least the pinned ", total));
    }

    /// Whether the policy would evict at all at such a moment in a layer, however many rows there are. Zero
    /// is tried too, as it is a multiple of every interval.
    [[nodiscard]] bool may_fall_due(std::size_t layer, Phase phase, bool prompt_end) const {
        constexpr std::size_t many = unlimited / 4;
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
        return false;
    }
    /// The same in some layer.
    [[nodiscard]] bool may_fall_due(Phase phase, bool prompt_end) const {
        bool may = false;
        for (std::size_t layer = 0; layer < shape.layers; ++layer)
            may = may || (!spares(layer) && may_fall_due(layer, phase, prompt_end));
        return may;
    }
    /// Whether the policy ever evicts from the heads, as it does not from layers that it skips.
    [[nodiscard]] bool ever_evicts(Span span) const {
        bool may = decides_late<P> || pools_model();
        for (const Phase phase : {Phase::prompt, Phase::decode, Phase::probe})
            for (const bool prompt_end : {false, true})
                may = may || may_fall_due(span.first / shape.kv_heads, phase, prompt_end);
        return may;
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
    /// Whether head `index` of a layer with a window is cut once `coming` rows have joined.
    [[nodiscard]] bool falls_out(const Live<P>& live, std::size_t index, std::size_t coming) const noexcept {
        const LayerTraits traits = shape.layer(index / shape.kv_heads);
        return traits.window > 0 && live.rows[index] + coming > traits.most_rows();
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
    /// The budget in tokens, no more than a head can hold, so that sums over heads do not wrap around. One of
    /// memory is that of all layers: those with a window take theirs first.
    [[nodiscard]] Budget tokens_of(Budget limits) const {
        limits.tokens = std::min(limits.tokens, max_rows);
        limits.slack = std::min(limits.slack, max_rows);
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
};

}  // namespace kvcull::inline KVCULL_ABI::detail
