#pragma once
/// What a policy is. A policy is a small copyable value that holds parameters; its state is apart, one per KV
/// head. The evictor calls, for every layer of a call of c new tokens:
///
///   1. admit     side values enter with their tokens                      (only policies with SideInput)
///   2. observe   once per tile of the query rows that `needs(phase)` asks for, in order; once with an empty
///                tile if it asks for none
///   3. due       is it time?                                              (default: rows > budget)
///   4. prepare   what its state knows of the rows, before they are scored   (only policies that Prepare)
///      score     a number per cached row, higher = keep; changes nothing
///   5. select    which rows stay                                          (default: top-k; or the policy's
///   own)
///
/// then every array of the state is compacted with the cache. Policies with a SequenceState, with the scope
/// `model_pooled` or with Lookahead decide at the end of the step or by their driver, all others at the end
/// of each layer.
///
/// Abilities are found by the concepts below, never by a list of policies.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <optional>
#include <span>
#include <string_view>
#include <tuple>
#include <vector>

#include "../attention/logits.hpp"
#include "../base/memory.hpp"
#include "../simd/kernels.hpp"
#include "../views.hpp"
#include "state.hpp"

namespace kvcull::inline KVCULL_ABI {

/// prompt: rows enter in chunks. decode: rows are generated. probe: rows attend but are not cached.
enum class Phase : std::uint8_t { prompt, decode, probe };

/// Of two rows of different heads with equal score and position, the head that keeps its row.
enum class HeadTie : std::uint8_t { lower, later };

inline constexpr std::size_t all_rows = static_cast<std::size_t>(-1);
inline constexpr std::size_t unlimited = static_cast<std::size_t>(-1);

/// What a policy wants to see of a call's query rows. Nothing else is computed for it.
struct Needs {
    /// Query tokens observed: the last `rows` of the call (all_rows: every one; 0: none).
    std::size_t rows = 0;
    /// Their softmax weights, logits as softmax sees them, and outputs. The queries themselves and their
    /// log-sum-exp come with `attention`, `logits` or `output`; `rows` alone gives the queries.
    bool attention = false, logits = false, output = false;
    /// Weights or logits too where a call makes them for its outputs; none are made for this alone.
    bool attention_if_made = false, logits_if_made = false;
    /// A call says nothing that the next one leaves standing: of queries that wait only the newest is shown,
    /// as that of a call which brought all their tokens.
    bool replaced = false;

    /// What is shown in a call that computes outputs, or in one that does not.
    [[nodiscard]] constexpr Needs shown(bool outputs) const noexcept {
        Needs needs = *this;
        needs.attention |= attention_if_made && outputs;
        needs.logits |= logits_if_made && outputs;
        return needs;
    }
};

/// Rows that a policy keeps before any other, within its budget: the oldest `sinks` and the newest `recent`.
struct Protected {
    std::size_t sinks = 0, recent = 0;

    [[nodiscard]] constexpr std::size_t rows() const noexcept {
        return recent > unlimited - sinks ? unlimited : sinks + recent;
    }
};

/// What one KV head saw in one call. Query row `r = g * tokens + i` is token `i` of the tile under query head
/// `g` of the group. A row whose log-sum-exp is not finite has attention 0 everywhere: it votes for nothing.
struct HeadStep {
    Phase phase = Phase::prompt;
    std::size_t layer = 0, head = 0, group = 1;
    /// Position after the newest token: the number of tokens seen, unless the caller numbers them itself.
    position_t next_position = 0;
    /// Rows of this call: the last `added` of the cached rows, in order.
    std::size_t added = 0;
    HeadView cached = {};
    float scale = 1.0F, softcap = 0.0F;  // of logits; see `with_logit_rule`
    const Bias* bias = nullptr;          // nullptr: none
    /// Filled when scoring: what selection will protect in this head.
    Protected protect = {};

    /// The tile: tokens `first .. first + tokens - 1` of the call.
    std::size_t first = 0, tokens = 0;
    bool first_tile = true, last_tile = true;
    /// The layer evicts at the end of this call. Never known of policies that decide at the end of the step.
    bool evicts = false;
    MatrixView<const float> q = {};          // [group * tokens, head_dim]
    MatrixView<const float> attention = {};  // [group * tokens, n]
    MatrixView<const float> logits = {};     // [group * tokens, n], 0 where invisible
    MatrixView<const float> output = {};     // [group * tokens, value_dim]; also given if made anyway
    std::span<const float> lse = {};         // [group * tokens]
    std::span<const Visible> visible = {};   // [group * tokens]

    const simd::Kernels* kernels = nullptr;
    /// Scratch of the calling thread, free for the policy during the call; the second one for a policy that
    /// wraps another, which takes the first.
    Scratch<float>*workspace = nullptr, *wrapper_workspace = nullptr;

    [[nodiscard]] std::size_t n() const noexcept { return cached.rows(); }
};

/// Calls `run(rule)` with what becomes of the dot products of a call's query rows. `head_of(r)`: row r's
/// query head within the group; `position_of(r)`: its position.
template <class HeadOf, class PositionOf, class Run>
void with_logit_rule(const HeadStep& step, const HeadOf& head_of, const PositionOf& position_of,
                     const Run& run) {
    const auto add = [&](std::size_t row, std::size_t first, std::span<float> logits) {
        (*step.bias)({step.layer, step.head * step.group + head_of(row), position_of(row),
                      step.cached.position, first, logits});
    };
    run(LogitRule(step.scale, step.softcap, step.bias != nullptr ? RowBias(add) : RowBias()));
}

/// Side values of one KV head's new tokens.
struct HeadInputs {
    std::size_t first_row = 0;                     // of the new rows
    std::span<const float> log_beta = {};          // [c] or empty
    MatrixView<const float> attention_input = {};  // [c, D] or empty: what enters q, k, v projections
    std::size_t layer = 0, head = 0;
};
/// Which side value a policy takes with its tokens.
enum class Side : std::uint8_t { log_beta, attention_input };

/// What the end of a step brings.
struct StepInputs {
    std::span<const std::int32_t> tokens = {};  // [c] token ids
    MatrixView<const float> hidden = {};        // [c, D] final hidden states, after the model's last norm

    // What the evictor adds.
    Phase phase = Phase::decode;
    std::size_t seen = 0;   // tokens of the sequence before this call
    CacheView cached = {};  // all rows, the call's at the end; empty at the end of a prompt
    const simd::Kernels* kernels = &simd::kernels();

    /// Of token i of the c tokens.
    [[nodiscard]] position_t position(std::size_t i) const noexcept {
        const PositionsView rows = cached.heads.empty() ? PositionsView() : cached.heads[0].position;
        return rows.size() < tokens.size() ? static_cast<position_t>(seen + i)
                                           : rows[rows.size() - tokens.size() + i];
    }
};

/// When a decision may be taken.
struct Moment {
    Phase phase = Phase::decode;
    bool prompt_end = false;  // all rows of the prompt are in
    std::size_t layer = 0;    // 0 if the whole model decides together
    std::size_t seen = 0;     // tokens of the sequence, this call included
    std::size_t tokens = 0;   // of this call; 0 if it brings none
    std::size_t since = 0;    // tokens decoded since the last eviction of this layer or the prompt's end
    std::size_t rows = 0, budget = 0;  // of the head, or their sums over what is ranked together
    std::size_t slack = 0;             // rows above the budget that the user lets be, summed likewise
    std::size_t heads = 1;             // how many are ranked together
};

/// What is ranked together.
enum class Scope : std::uint8_t {
    head,          // every KV head by itself
    layer_shared,  // one keep list for all heads of a layer, by their mean score
    layer_pooled,  // one ranking over all rows of a layer; heads end ragged, some may end empty
    model_pooled,  // one ranking over all layers, at the end of the step
};

/// A named parameter: `Field{"window", &SnapKV::window}`.
template <class P, class T>
struct Field {
    std::string_view name;
    T P::*member;

    [[nodiscard]] constexpr T& of(P& policy) const { return policy.*member; }
};
template <class P, class T>
Field(const char*, T P::*) -> Field<P, T>;
/// A parameter of a part of a policy.
template <class P, class Part, class T>
struct PartField {
    std::string_view name;
    Part P::*part;
    T Part::*member;

    [[nodiscard]] constexpr T& of(P& policy) const { return policy.*part.*member; }
};
template <class P, class Part, class T>
PartField(std::string_view, Part P::*, T Part::*) -> PartField<P, Part, T>;
/// The parameters of a policy inside a policy, as parameters of the outer one.
template <class P, class Part>
[[nodiscard]] constexpr auto fields_of(Part P::*part) {
    return std::apply(
        [part](const auto&... field) {
            return std::tuple{PartField{field.name, part, field.member}...};
        },
        Part::fields());
}

/// One per sequence beside the per-head states: `end_step` is fed after all layers; evictions wait for it.
template <class P>
concept SequenceState = std::copyable<typename P::Sequence> &&
    requires(const P policy, typename P::Sequence sequence, const typename P::Sequence& now,
             const typename P::State& state, const HeadStep& step, std::span<float> out) {
    policy.end_step(sequence, StepInputs{});
    policy.score(state, now, step, out);
};

/// Takes notice of the end of a prompt, after the decision there.
template <class P>
concept EndsPrompt = requires(const P policy, typename P::Sequence sequence, const StepInputs& inputs) {
    policy.end_prompt(sequence, inputs);
};

/// Delays an eviction that is due for as long as the sequence says so.
template <class P>
concept Waits = SequenceState<P> &&
    requires(const P policy, const typename P::Sequence& sequence, const Moment& moment) {
    { policy.ready(sequence, moment) } -> std::same_as<bool>;
};

template <class P>
concept Policy = std::copyable<P> && std::default_initializable<typename P::State> &&
    std::copyable<typename P::State> &&
    requires(const P policy, typename P::State state, const typename P::State& now, const HeadStep& step,
             std::span<float> out) {
    { P::name } -> std::convertible_to<std::string_view>;
    P::fields();
    { policy.needs(Phase::decode) } -> std::same_as<Needs>;
    state.arrays();
    policy.observe(state, step);
    requires SequenceState<P> || requires {
        policy.score(now, step, out);
    };
};

/// Says of a single call what it wants to see in it: no more than `needs(phase)` announces.
template <class P>
concept NeedsByCall = requires(const P policy, const Moment& moment) {
    { policy.needs(moment) } -> std::same_as<Needs>;
};
/// Says itself when to evict.
template <class P>
concept Triggered = requires(const P policy, const Moment& moment) {
    { policy.due(moment) } -> std::same_as<bool>;
};
/// Keeps the oldest and newest rows; `budget` is that of one KV head.
template <class P>
concept Protects = requires(const P policy, std::size_t budget) {
    { policy.protect(budget) } -> std::same_as<Protected>;
};
template <class P>
concept Scoped = requires(const P policy) {
    { policy.scope() } -> std::same_as<Scope>;
};
/// Has the last word on the mean of a layer's scores (scope `layer_shared`): what does not commute with that
/// mean, such as pooling by maximum.
template <class P>
concept Finishes = requires(const P policy, const HeadStep& step, std::span<float> score) {
    policy.finish(step, score);
};
/// Says how many floats of `HeadStep::workspace` it takes at most over `rows` rows, so that `reserve` fetches
/// them. `dim`: the larger one of head_dim and value_dim.
template <class P>
concept TakesWorkspace = requires(const P policy, std::size_t rows, std::size_t group, std::size_t dim) {
    { policy.workspace(rows, group, dim) } -> std::same_as<std::size_t>;
};
/// The same of `HeadStep::wrapper_workspace`.
template <class P>
concept TakesWrapperWorkspace = requires(const P policy, std::size_t rows, std::size_t group,
                                         std::size_t dim) {
    { policy.wrapper_workspace(rows, group, dim) } -> std::same_as<std::size_t>;
};
/// Looks at neighbours in the cache, so rows must stay ascending by position.
template <class P>
concept Ordered = requires(const P policy) {
    { policy.ordered() } -> std::same_as<bool>;
};
/// Checks its parameters against each other and the budget (`unlimited` while it is not known): config_error.
template <class P>
concept Checked = requires(const P policy, std::size_t budget) {
    policy.check(budget);
};
/// Takes a side value with every token.
template <class P>
concept SideInput = requires(const P policy, typename P::State state, const HeadInputs& inputs) {
    { P::side } -> std::convertible_to<Side>;
    policy.admit(state, inputs);
};
/// Makes log_beta of the layer's attention input, for all heads at once, wherever it is `gated()` and only
/// that is given. x[c, D], out[kv_heads, c].
template <class P>
concept Gated = SideInput<P> &&
    requires(const P policy, const simd::Kernels& kernels, std::size_t number, MatrixView<const float> x,
             MatrixView<float> out, Scratch<float>& workspace) {
    { policy.gated() } -> std::same_as<bool>;
    policy.check_gates(number, number);                   // layers, kv_heads: config_error
    policy.log_beta(kernels, number, x, out, workspace);  // number: the layer
};
/// Reads the output projection of every layer: config_error if there is not one each, of these rows.
template <class P>
concept Projects = requires(const P policy, std::size_t number) {
    policy.check_projection(number, number);  // layers, q_heads * value_dim
};
/// Ranks heads together and, where `cut()` gives a score, keeps every row that reaches it, and no other but
/// protected ones, whatever the budget: none need be given.
template <class P>
concept Cuts = requires(const P policy) {
    { policy.cut() } -> std::same_as<std::optional<float>>;
};
/// Chooses the set itself, or does so if there is a `selects()` and that says so. `fixed[n]` marks rows that
/// must stay; `keep` receives `count` ascending rows.
template <class P>
concept Selects = requires(const P policy, const typename P::State& state, const HeadStep& step,
                           std::span<const std::uint8_t> fixed, std::size_t count,
                           std::vector<index_t>& keep) {
    policy.select(state, step, fixed, count, keep);
};
/// Has scores that are never negative, so that they can stand for attention weights.
template <class P>
concept NonNegative = P::nonnegative;
/// Gives a non-negative score per query head, before any reduction: [group, n], which may be its state's own
/// or lie in `spare`.
template <class P>
concept PerQueryHead = NonNegative<P> &&
    requires(const P policy, const typename P::State& state, const HeadStep& step, MatrixView<float> spare) {
    { policy.distribution(state, step, spare) } -> std::same_as<MatrixView<const float>>;
};
/// Has a query of its own multiplied with all keys along with those of the one token that attends, so that
/// nobody reads the keys again: `key_query` [head_dim], or nothing if it has none this time; then
/// `take_products` gets its products [n] with the keys, times `step.scale`; `observe` follows.
template <class P>
concept QueriesKeys = requires(const P policy, typename P::State& state, const HeadStep& step,
                               std::span<const float> products) {
    { policy.key_query(state, step) } -> std::same_as<std::span<const float>>;
    policy.take_products(state, step, products);
};
/// Takes part in the pass over the values that the attention of one token makes: gets every piece of them
/// once, in order, right after attention has read it, while it is still in cache; `observe` follows.
template <class P>
concept ReadsValues = requires(const P policy, typename P::State& state, const HeadStep& step,
                               const RowsView::Run& piece) {
    { policy.reads_values(state, step) } -> std::same_as<bool>;
    policy.read_values(state, step, piece);
};
/// Brings what its state knows of the cached rows up to date right before they are scored. What it then says
/// of them is no other than without it, only sooner said. Proposals and questions for scores prepare too.
template <class P>
concept Prepares = requires(const P policy, typename P::State& state, const HeadStep& step) {
    policy.prepare(state, step);
};
/// Is shown the rows of a head that leave at the end of a layer's call, while the cache still holds them:
/// all but `keep`, ascending. Rows may leave unseen in other ways (`make_room`, `truncate`, ..).
template <class P>
concept Forgets = requires(const P policy, typename P::State& state, const HeadStep& step,
                           std::span<const index_t> keep) {
    policy.forget(state, step, keep);
};
/// Scores from query rows that are given later, those of tokens after all cached ones. `q[R, head_dim]` with
/// `R = group * rows`, grouped like a tile.
template <class P>
concept Lookahead = requires(const P policy, const typename P::State& state, const HeadStep& step,
                             MatrixView<const float> q, std::span<float> out) {
    policy.rescore(state, step, q, out);
};
/// Keeps other rows in the copy that looks ahead than in the end; `budget` is that of the copy's heads.
template <class P>
concept ProtectsAhead = Lookahead<P> && requires(const P policy, std::size_t budget) {
    { policy.protect_ahead(budget) } -> std::same_as<Protected>;
};

/// Computes attention from query rows by itself, and does so by `with_logit_rule`, or wants plain products
/// and makes them itself where logits are not. Who asks for query rows without their attention, for logits or
/// for look-ahead queries and does not say so is refused where logits are capped or biased.
template <class P>
concept FollowsLogits = P::follows_logits;

template <class P>
inline constexpr bool decides_late = SequenceState<P> || Lookahead<P>;

/// `moment`: of the call's end.
template <class P>
[[nodiscard]] constexpr Needs needs_of(const P& policy, const Moment& moment) {
    if constexpr (NeedsByCall<P>)
        return policy.needs(moment);
    else
        return policy.needs(moment.phase);
}
template <class P>
[[nodiscard]] constexpr Scope scope_of(const P& policy) {
    if constexpr (Scoped<P>) return policy.scope();
    return Scope::head;
}
/// The score that decides instead of a budget, if one does.
template <class P>
[[nodiscard]] std::optional<float> cut_of(const P& policy) {
    if constexpr (Cuts<P>) return policy.cut();
    return std::nullopt;
}
template <class P>
[[nodiscard]] constexpr bool is_ordered(const P& policy) {
    if constexpr (Ordered<P>) return policy.ordered();
    return false;
}
template <class P>
[[nodiscard]] constexpr Protected protected_rows(const P& policy, std::size_t budget) {
    if constexpr (Protects<P>) return policy.protect(budget);
    return {};
}

}  // namespace kvcull::inline KVCULL_ABI
