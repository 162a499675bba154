#pragma once
/// Evictor: a policy, a budget and the state of one sequence. It sees views, answers with plans, and owns no
/// rows: KVCache carries the plans out on its blocks, an engine on its own buffers.

#include <algorithm>
#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "checks.hpp"
#include "decision.hpp"
#include "layer_call.hpp"
#include "query_buffer.hpp"

namespace kvcull::inline KVCULL_ABI {

/// For every layer of a call: append the new rows to your buffers, then `step` (attention if `out` is given,
/// and the layer's plan), carry the plan out before the next call; `end_step` after the last layer. A plan is
/// valid until the next call. Every call checks its arguments before anything changes: sizes and new rows
/// always, the positions of old rows, as the last plan left them, whenever rows may go.
template <Policy P, BudgetRule Rule = Uniform>
class Evictor {
  public:
    using State = typename P::State;

    /// @param reduction  for engines that cannot drop rows head by head: heads share one list of rows.
    /// @throws config_error if shape, policy, budget or their combination is not valid.
    explicit Evictor(CacheShape shape, P policy = {}, Budget budget = {}, Rule rule = {},
                     std::optional<Reduction> reduction = {})
        : decision_(shape, std::move(policy), budget, std::move(rule), reduction), live_(shape) {
        if (decision_.budget.tokens > 0) {
            decision_.resolve(live_, decision_.budget.tokens, 0);
        } else if constexpr (Checked<P>) {
            decision_.policy.check(unlimited);
        }
    }

    [[nodiscard]] const CacheShape& shape() const noexcept { return decision_.shape; }
    [[nodiscard]] const P& policy() const noexcept { return decision_.policy; }
    [[nodiscard]] const Live<P>& live() const noexcept { return live_; }
    /// Tokens of the sequence so far.
    [[nodiscard]] std::size_t seen() const noexcept { return live_.seen; }
    [[nodiscard]] position_t next_position() const noexcept { return live_.reach.next; }
    [[nodiscard]] const State& state(std::size_t layer, std::size_t head) const {
        detail::check_head("Evictor::state", shape(), layer, head);
        return live_.states[flat(layer, head)];
    }
    /// Rows that one head may keep; `unlimited` while a ratio waits for the prompt's length.
    [[nodiscard]] std::size_t size(std::size_t layer, std::size_t head) const {
        detail::check_head("Evictor::size", shape(), layer, head);
        return live_.sizes[flat(layer, head)];
    }
    /// The score that the reduction has cost so far, see `Reducer`.
    [[nodiscard]] double given_up() const noexcept { return decision_.given_up; }
    /// How rows of a layer move. In one with a window they stay ascending.
    [[nodiscard]] Compaction compaction(std::size_t layer) const {
        detail::check_layer("Evictor::compaction", shape(), layer);
        return decision_.compaction_of(layer);
    }
    /// For engines whose rows must stay ascending whatever the policy. Call it before the first token.
    void keep_ascending() {
        constexpr std::string_view where = "Evictor::keep_ascending";
        require_idle(where);
        detail::check<error::state_error>(live_.seen == 0, where, "tokens seen", live_.seen, 0);
        decision_.compaction = Compaction::ascending;
    }
    /// For views that cannot be wrong: what they say of old rows is not compared (`HeldPositions`).
    void trust_views() noexcept { live_.held.clear(); }
    /// Heads of a layer run on the caller's threads. Default: one after the other.
    void set_executor(Executor executor) { decision_.workers.executor = std::move(executor); }
    /// For differential tests and measurements; default: the best of this machine.
    void set_kernels(const simd::Kernels& kernels) noexcept { decision_.workers.kernels = &kernels; }
    /// An additive bias of the logits, from the next call on; an empty one for none. It is called on the
    /// executor's threads. @throws config_error if the policy only knows plain logits.
    void set_bias(Bias bias) {
        require_idle("Evictor::set_bias");
        require_none_waits("Evictor::set_bias");
        if (bias) decision_.require_any_logits("Evictor::set_bias", "bias");
        decision_.bias = std::move(bias);
    }
    /// For engines that attend by themselves (`step` without `out`): queries of decoded tokens wait, at most
    /// `most` per layer, until rows go or something else needs them, and then share one pass over the keys.
    /// Plans and states are those of a pass per token, bit for bit. 0, the default: none waits. Memory:
    /// q_heads * head_dim floats each.
    void buffer_queries(std::size_t most = 64) {
        require_idle("Evictor::buffer_queries");
        require_none_waits("Evictor::buffer_queries");
        buffer_ = most;
        for (auto& layer : live_.waiting) layer.reserve(most * shape().q_heads * shape().head_dim);
    }
    /// Shows the states all queries that wait: before `state`, `live`, `scores`, `commit` and `set_bias`.
    void catch_up(CacheView cached) {
        require_idle("Evictor::catch_up");
        check_all("Evictor::catch_up", cached);
        show_waiting(cached.heads, 0);
    }
    /// Tells `trace` of every row that leaves; an empty one, the default, costs nothing.
    void set_trace(EvictionTrace trace) { decision_.trace = std::move(trace); }
    /// Pauses eviction from the next call on. Rows enter and states follow as ever.
    void hold(bool on) {
        require_idle("Evictor::hold");
        live_.hold = on;
    }
    Live<P> restore(Live<P> live) noexcept {        // @returns what it takes the place of
        if (live_.held.empty()) live.held.clear();  // the views are trusted
        return std::exchange(live_, std::move(live));
    }

    /// Bytes of per-row policy state.
    [[nodiscard]] std::size_t bytes() const {
        std::size_t bytes = 0;
        for (const State& state : live_.states) bytes += state_bytes(state);
        return bytes;
    }
    /// Memory for `rows` rows per head, so that later decode steps allocate nothing.
    void reserve(std::size_t rows) {
        for (State& state : live_.states) reserve_state(state, rows);
        decision_.reserve(rows);
        undivided_.reserve(live_.sizes.size());
        if constexpr (Gated<P>) log_beta_.get(shape().kv_heads);
        plan_.reserve(decides_at_end() ? shape().heads() : shape().kv_heads, rows);
    }

    /// Gives scratch and unused state memory back to the allocator. Ends the last plan.
    void trim() {
        for (State& state : live_.states) shrink_state(state);
        decision_.trim();
        plan_ = {};
        log_beta_ = {};
    }

    /// Keeps positions `begin .. end - 1` for good, before all else and within the budget.
    /// @throws config_error if pinned rows would exceed a head's budget; it states the minimum.
    void pin(position_t begin, position_t end) {
        detail::check<error::shape_error>(begin >= 0, "Evictor::pin", "begin", begin, "at least 0");
        detail::check<error::shape_error>(begin < end, "Evictor::pin", "end", end,
                                          detail::text("beyond begin = ", begin));
        std::vector<PositionRange> pinned = live_.pinned_with({begin, end});
        if (live_.resolved) decision_.check_pins(pinned, live_.sizes);
        live_.pinned = std::move(pinned);
    }

    /// A prompt follows, in one or more calls. `total`: its tokens, if known; a ratio of it then holds from
    /// the first chunk on, and layers decide as soon as their last row is in. Also for later turns.
    /// @throws config_error for a ratio of an unknown total if the policy evicts between chunks.
    void begin_prompt(std::optional<std::size_t> total = std::nullopt) {
        constexpr std::string_view where = "Evictor::begin_prompt";
        require_idle(where);
        const std::size_t end = total ? detail::check_prompt(where, live_.seen, *total) : unlimited;
        if (decision_.budget.ratio != 0.0) {
            if (total)
                decision_.resolve(live_, budget_tokens(decision_.budget, end), end);
            else
                detail::check<error::config_error>(!decision_.may_fall_due(Phase::prompt, false), where,
                                                   "total", "unknown",
                                                   "the prompt's tokens (the budget is a ratio)");
        } else if (ReadsPrompt<Rule> && total && live_.resolved) {
            decision_.resolve(live_, decision_.budget.tokens, end);
        }
        live_.phase = Phase::prompt;
        live_.prompt_end = end;
        std::fill(live_.decided.begin(), live_.decided.end(), std::uint8_t{0});
    }

    /// New tokens of one layer enter: their state begins. `step` does it itself unless a policy takes side
    /// values.
    void admit(std::size_t layer, std::size_t tokens, const AppendInputs& inputs = {}) {
        check_admit("Evictor::admit", layer, tokens, inputs);
        MatrixView<const float> log_beta = inputs.log_beta;
        if constexpr (Gated<P>)
            if (log_beta.empty()) {
                const MatrixView<float> made(log_beta_.get(shape().kv_heads * tokens), shape().kv_heads,
                                             tokens);
                policy().log_beta(*decision_.workers.kernels, layer, inputs.attention_input, made,
                                  decision_.workers.scratch_of(0).policy);
                log_beta = made;
            }
        live_.enter(layer, tokens, [&]([[maybe_unused]] std::size_t h, [[maybe_unused]] std::size_t row) {
            if constexpr (SideInput<P>) {
                HeadInputs side{.first_row = row, .layer = layer, .head = h};
                if (!log_beta.empty()) side.log_beta = log_beta[h];
                side.attention_input = inputs.attention_input;
                policy().admit(live_.states[flat(layer, h)], side);
            }
        });
    }
    /// The checks of `admit` alone, for callers that change other things first.
    void check_admit(std::string_view where, std::size_t layer, std::size_t tokens,
                     const AppendInputs& inputs) const {
        detail::check_admit(where, decision_, live_, layer, tokens);
        decision_.check_side(where, tokens, inputs);
    }

    /// One layer's call: c query tokens over its cached rows, the newest c of which are their own.
    /// @param cached [kv_heads], rows as left by the last plan plus the new ones at the end.
    /// @param q  [q_heads, c, head_dim], rotated like the keys. @param out  [q_heads, c, value_dim], or
    /// empty.
    /// @returns the layer's plan, empty if nothing goes.
    const Plan& step(std::size_t layer, LayerView cached, HeadsView<const float> q,
                     HeadsView<float> out = {}) {
        const LayerCall call = begin(layer, cached, q, out);
        decision_.workers.for_each_part(
            shape().kv_heads, [&](std::size_t h) { return parts(call, h); },
            [&](std::size_t h) { return call.cost(h); },
            [&](std::size_t h, detail::TileScratch& scratch) { prepare(call, h, scratch); },
            [&](std::size_t h, std::size_t part, detail::TileScratch& scratch) {
                run(call, h, part, scratch);
            },
            [&](std::size_t h, detail::TileScratch& scratch) { merge(call, h, scratch); });
        return finish(call);
    }
    /// The acts of `step`, for heads of several sequences side by side: `begin`; then every head, on any
    /// thread with scratch of its own: `run` all `parts`, if several between `prepare` and `merge`; then
    /// `finish`.
    [[nodiscard]] LayerCall begin(std::size_t layer, LayerView cached, HeadsView<const float> q,
                                  HeadsView<float> out = {}) {
        constexpr std::string_view where = "Evictor::step";
        detail::check_layer(where, shape(), layer);
        detail::check<error::state_error>(live_.stepped[layer] == 0, where, detail::text("layer ", layer),
                                          "already in this step", "end_step first");
        const bool admitted = live_.admitted[layer] != 0;
        if (!admitted) check_admit(where, layer, q.tokens, {});
        detail::check_heads(where, "q", q, shape().q_heads, admitted ? live_.call_tokens : q.tokens,
                            shape().head_dim);
        if (!out.empty()) detail::check_heads(where, "out", out, shape().q_heads, q.tokens, shape().values());
        detail::check_cached(where, shape(), cached, rows_of(layer), admitted ? 0 : q.tokens);
        const Reach reach = detail::check_new_rows(where, cached, q.tokens, live_.reach);
        if (live_.call_reach.next != live_.reach.next)  // an earlier layer of this call
            detail::check_size(where, "position of the newest row", reach.next - 1,
                               live_.call_reach.next - 1);
        const bool spared = decision_.spares(layer);
        const Moment moment = live_.moment_after(q.tokens);
        const std::size_t coming = admitted ? 0 : q.tokens;
        const bool evicts = !spared && decides_per_layer() && !decision_.pauses(live_, layer, moment) &&
                            decision_.due_now(live_, decision_.layer(layer), moment, coming);
        const bool leaves = spared && decision_.falls_out(live_, flat(layer, 0), coming);
        if (evicts || leaves) check_held(where, "cached", cached, flat(layer, 0), q.tokens);
        const Needs needs = spared ? Needs{} : needs_of(policy(), moment);
        const bool waits = buffer_ > 0 && live_.phase == Phase::decode && q.tokens == 1 && out.empty() &&
                           detail::can_wait<P>(needs);
        if (!waits) detail::show_waiting(decision_, live_, layer, cached, admitted ? q.tokens : 0, false);
        if (!admitted) admit(layer, q.tokens);
        live_.count(layer, cached, q.tokens);
        return {.layer = layer,
                .cached = cached,
                .q = q,
                .out = out,
                .needs = needs.shown(!out.empty()),
                .spared = spared,
                .evicts = evicts,
                .waits = waits,
                .reach = reach,
                .moment = moment,
                .mask = mask(layer, true)};
    }
    /// A long head's single token runs in parts, unless the policy reads along.
    [[nodiscard]] std::size_t parts(const LayerCall& call, std::size_t head) const {
        constexpr bool reads_along = QueriesKeys<P> || ReadsValues<P>;
        if (call.q.tokens > 1 || call.out.empty() || (reads_along && !call.spared)) return 1;
        return detail::PartedHead::cut(call, head).count();
    }
    void prepare(const LayerCall& call, std::size_t head, detail::TileScratch& scratch) {
        const HeadStep step = head_step(call, head, scratch);
        detail::PartedHead(step, call, scratch).prepare();
    }
    void run(const LayerCall& call, std::size_t head, std::size_t part, detail::TileScratch& scratch) {
        if (call.waits) return;
        const HeadStep step = head_step(call, head, scratch);
        if (parts(call, head) > 1) return detail::PartedHead(step, call, scratch).run(part);
        with_observer(call, head, [&](const auto& observe) {
            detail::for_each_tile(step, call.q, head * shape().group(), call.mask, call.out, call.needs,
                                  scratch, observe);
        });
    }
    void merge(const LayerCall& call, std::size_t head, detail::TileScratch& scratch) {
        const HeadStep step = head_step(call, head, scratch);
        with_observer(call, head,
                      [&](const auto& observe) { detail::PartedHead(step, call, scratch).merge(observe); });
    }
    const Plan& finish(const LayerCall& call) {
        if (call.waits && (live_.wait(call.layer, call.q) >= buffer_ || call.evicts))
            detail::show_waiting(decision_, live_, call.layer, call.cached, 0, call.evicts);
        live_.stepped[call.layer] = 1;
        live_.call_reach = call.reach;
        plan([&] {
            if (call.spared)
                decision_.leave_window(live_, call.layer, call.cached, plan_);
            else if (decides_per_layer())
                decide(decision_.layer(call.layer), call.cached, call.moment);
            decision_.forget(live_, call.cached, plan_);
        });
        if (decides_per_layer() && call.moment.prompt_end && !live_.hold) live_.decided[call.layer] = 1;
        live_.commit(plan_, call.cached, flat(call.layer, 0));
        return plan_;
    }

    /// After the last layer. Policies that decide here need `cached` (all layers); others may leave it out.
    const Plan& end_step(CacheView cached = {}, const StepInputs& inputs = {}) {
        constexpr std::string_view where = "Evictor::end_step";
        for (std::size_t layer = 0; layer < shape().layers; ++layer)
            detail::check<error::state_error>(live_.stepped[layer] != 0, where, detail::text("layer ", layer),
                                              "not stepped", "every layer once before end_step");
        if (!inputs.tokens.empty())
            detail::check_size(where, "inputs.tokens.size()", inputs.tokens.size(), live_.call_tokens);
        if (!inputs.hidden.empty())
            detail::check_size(where, "inputs.hidden.rows", inputs.hidden.rows, live_.call_tokens);
        if (decides_at_end()) {
            detail::check_cached(where, shape(), cached, live_.rows);
            if (decision_.may_decide(live_)) check_held(where, "cached.heads", cached.heads, 0, 0);
        }
        if constexpr (SequenceState<P>) policy().end_step(live_.sequence, completed(inputs, cached));
        const std::size_t tokens = live_.end_call();
        const bool prompt_end = live_.seen == live_.prompt_end;
        plan([&] {
            if (decides_at_end()) decide_all(cached, prompt_end, tokens);
        });
        if (decides_at_end() && prompt_end && !live_.hold)
            std::fill(live_.decided.begin(), live_.decided.end(), std::uint8_t{1});
        live_.commit(plan_, cached.heads, 0);
        return plan_;
    }

    /// The prompt is complete. Policies that act at its end do so here, unless a known total let them act
    /// before.
    const Plan& end_prompt(CacheView cached) {
        constexpr std::string_view where = "Evictor::end_prompt";
        require_idle(where);
        detail::check<error::state_error>(live_.phase == Phase::prompt, where, "phase", "not a prompt",
                                          "begin_prompt first");
        if (live_.prompt_end != unlimited)
            detail::check<error::state_error>(live_.seen == live_.prompt_end, where, "tokens seen",
                                              live_.seen, live_.prompt_end);
        check_all(where, cached);
        const bool late = live_.prompt_end == unlimited && live_.seen > 0;  // the length is known only now
        if (late && (decision_.budget.ratio != 0.0 ||
                     (ReadsPrompt<Rule> && live_.resolved && !decision_.may_fall_due(Phase::prompt, false))))
            decision_.resolve(live_, budget_tokens(decision_.budget, live_.seen), live_.seen);
        plan([&] {
            if (!Lookahead<P> && live_.seen > 0) decide_all(cached, true, 0);
            if constexpr (EndsPrompt<P>) policy().end_prompt(live_.sequence, completed({}, {}));
        });
        live_.commit(plan_, cached.heads, 0);
        live_.phase = Phase::decode;
        live_.prompt_end = unlimited;
        std::fill(live_.since.begin(), live_.since.end(), std::size_t{0});
        return plan_;
    }

    /// Evicts before the next `tokens` tokens, so that no head exceeds its budget with them.
    /// @throws shape_error if they do not fit at all, state_error under `hold`.
    const Plan& make_room(CacheView cached, std::size_t tokens) {
        constexpr std::string_view where = "Evictor::make_room";
        require_idle(where);
        check_all(where, cached);
        detail::check<error::state_error>(!live_.hold, where, "hold", "on", "off");
        for (const std::size_t size : live_.sizes)
            detail::check<error::shape_error>(tokens <= size, where, "tokens", tokens,
                                              detail::text("at most the budget ", size));
        detail::check_beside_pinned(where, cached, live_.pinned, live_.sizes, tokens);
        plan([&] {
            if (!decision_.never) choose_where_over(cached, tokens, live_.phase);
        });
        live_.commit(plan_, cached.heads, 0);
        return plan_;
    }

    /// Query rows that attend to the cached rows and to their own keys before them, and are not kept.
    /// @param k, v [kv_heads, c, dim]; v {} if values are latent. @param out as in `step`. A policy whose
    /// `needs(Phase::probe).rows` is not 0 observes every row, with attention over the cached rows alone, and
    /// may evict here.
    const Plan& probe(std::size_t layer, LayerView cached, HeadsView<const float> q, HeadsView<const float> k,
                      HeadsView<const float> v, HeadsView<float> out) {
        constexpr std::string_view where = "Evictor::probe";
        require_idle(where);
        detail::check_layer(where, shape(), layer);
        detail::check<error::shape_error>(q.tokens > 0, where, "q.tokens", q.tokens, "at least 1");
        detail::check_heads(where, "q", q, shape().q_heads, q.tokens, shape().head_dim);
        const HeadsView<const float> values = detail::check_keys_values(where, shape(), k, v, q.tokens);
        detail::check_heads(where, "out", out, shape().q_heads, q.tokens, shape().values());
        detail::check_cached(where, shape(), cached, rows_of(layer), 0);
        check_held(where, "cached", cached, flat(layer, 0), 0);
        detail::show_waiting(decision_, live_, layer, cached, 0, false);
        const Needs asked = policy().needs(Phase::probe);
        const Needs all{.rows = all_rows, .attention = true, .logits = asked.logits, .output = true};
        decision_.workers.for_each_head(shape().kv_heads, [&](std::size_t h, detail::TileScratch& scratch) {
            HeadStep head = decision_.head_step(live_, flat(layer, h), cached[h], scratch);
            head.phase = Phase::probe;
            detail::for_each_tile(head, q, h * shape().group(), mask(layer, false), {}, all, scratch,
                                  [&](const HeadStep& tile) {
                                      detail::add_own_rows(tile, mask(layer, false), k, values, out, scratch);
                                      if (asked.rows > 0 && !decision_.spares(layer))
                                          policy().observe(live_.states[flat(layer, h)], tile);
                                  });
        });
        plan_.clear();
        if (decides_per_layer() && !decision_.spares(layer))
            decide(decision_.layer(layer), cached, {.phase = Phase::probe, .seen = live_.seen});
        live_.commit(plan_, cached, flat(layer, 0));
        return plan_;
    }

    /// Takes back the last `tokens` tokens. Rows and their state go; what the taken rows gave others stays
    /// (`mark` and `rollback` of a cache restore that too). If `ready` throws over the plan, nothing changes.
    /// @throws shape_error for tokens from before the last gap in positions: rows tell no token from a gap.
    const Plan& truncate(CacheView cached, std::size_t tokens, const PlanCheck& ready = {}) {
        constexpr std::string_view where = "Evictor::truncate";
        require_idle(where);
        check_all(where, cached);
        detail::check<error::shape_error>(
            tokens <= live_.reach.unbroken, where, "tokens", tokens,
            detail::text("at most the ", live_.reach.unbroken, " seen since the last gap in positions"));
        const position_t end = live_.reach.next - static_cast<position_t>(tokens);
        for (std::size_t layer = 0; layer < shape().layers; ++layer)
            detail::check<error::shape_error>(
                live_.gone[layer] <= std::max<position_t>(0, shape().layer(layer).first_seen(end)), where,
                "tokens", tokens,
                detail::text("few enough for the rows that left the window of layer ", layer));
        show_waiting(cached.heads, 0);
        decision_.truncate(live_, cached, end, plan_);
        if (ready) ready(plan_);
        live_.take_back(plan_, cached.heads, tokens);
        return plan_;
    }

    /// What a decision would do now with `size` rows per head, without doing it: for forks.
    const Plan& propose(CacheView cached, std::size_t size) {
        constexpr std::string_view where = "Evictor::propose";
        require_idle(where);
        check_all(where, cached);
        plan_.clear();
        const detail::Trial trial(decision_, live_, size);
        detail::check_beside_pinned(where, cached, live_.pinned, live_.sizes, 0);
        choose_where_over(cached, 0, live_.phase);
        return plan_;
    }
    /// The states follow a plan that `propose` or the caller made. Positions are then taken on trust once.
    /// @throws shape_error if it is none for the rows held now, state_error while queries wait.
    void commit(const Plan& plan) {
        require_none_waits("Evictor::commit");
        detail::check_plan("Evictor::commit", shape(), plan, live_.rows);
        live_.commit(plan);
    }

    /// Scores all layers by query rows given now and evicts down to the budget: the last act of a look-ahead.
    /// @param q [layers] of [q_heads, R, head_dim]
    const Plan& rescore(CacheView cached, std::span<const HeadsView<const float>> q) requires Lookahead<P> {
        constexpr std::string_view where = "Evictor::rescore";
        require_idle(where);
        check_all(where, cached);
        detail::check_queries(where, shape(), q);
        plan([&] {
            if (!live_.hold) choose_where_over(cached, 0, Phase::prompt, q);
        });
        live_.commit(plan_, cached.heads, 0);
        return plan_;
    }

    /// The policy's score of every row of one head, as the next decision would see it; out[n].
    void scores(std::size_t layer, std::size_t head, const HeadView& cached, std::span<float> out) {
        detail::check_head("Evictor::scores", shape(), layer, head);
        detail::check_size("Evictor::scores", "out.size()", out.size(), live_.rows[flat(layer, head)]);
        detail::check_size("Evictor::scores", "cached.rows()", cached.rows(), out.size());
        detail::check<error::state_error>(!decision_.spares(layer), "Evictor::scores",
                                          detail::text("layer ", layer), "spared from eviction",
                                          "a layer that the policy has a say in");
        require_none_waits("Evictor::scores");
        check_held("Evictor::scores", "cached", {&cached, 1}, flat(layer, head), 0);
        detail::TileScratch& scratch = decision_.workers.scratch_of(0);
        HeadStep step = decision_.head_step(live_, flat(layer, head), cached, scratch);
        step.protect = decision_.protection(live_.sizes[flat(layer, head)], 0, true);
        decision_.score(live_, flat(layer, head), step, {}, scratch, out);
    }

    /// Whether `end_step` takes the decisions, so that it needs views of all layers.
    [[nodiscard]] bool decides_at_end() const {
        return !Lookahead<P> && (SequenceState<P> || decision_.pools_model());
    }
    /// Whether head `index` (layer * kv_heads + head) might evict in a call that brings `coming` rows.
    [[nodiscard]] bool may_evict(std::size_t index, std::size_t coming) const {
        return decision_.may_evict(live_, index, coming);
    }
    /// Rows that head `index` will hold once its layer has made the step that brings `coming` rows.
    [[nodiscard]] std::size_t rows_after(std::size_t index, std::size_t coming) const {
        return decision_.rows_after(live_, index, coming);
    }

  private:
    [[nodiscard]] std::size_t flat(std::size_t layer, std::size_t head) const noexcept {
        return layer * shape().kv_heads + head;
    }
    void require_idle(std::string_view where) const {
        detail::check<error::state_error>(live_.call_tokens == 0, where, "call", "inside a step",
                                          "after end_step");
    }
    void require_none_waits(std::string_view where) const {
        detail::check<error::state_error>(!live_.any_waits(), where, "queries", "waiting", "catch_up first");
    }
    /// Of whole layers, from head `first` on.
    void show_waiting(std::span<const HeadView> cached, std::size_t first) {
        for (std::size_t i = 0, heads = shape().kv_heads; i < cached.size(); i += heads)
            detail::show_waiting(decision_, live_, (first + i) / heads, cached.subspan(i, heads), 0, false);
    }
    [[nodiscard]] std::span<const std::size_t> rows_of(std::size_t layer) const noexcept {
        return std::span(live_.rows).subspan(flat(layer, 0), shape().kv_heads);
    }
    void check_all(std::string_view where, CacheView cached) const {
        detail::check_cached(where, shape(), cached, live_.rows);
        check_held(where, "cached.heads", cached.heads, 0, 0);
    }
    /// The views of heads `first ..` and what their rows must be, but for the newest `added`.
    void check_held(std::string_view where, std::string_view name, std::span<const HeadView> cached,
                    std::size_t first, std::size_t added) const {
        if (live_.held.empty()) return;
        detail::check_positions(where, name, cached, std::span(live_.held).subspan(first), added,
                                decision_.compaction_of(first / shape().kv_heads) == Compaction::ascending);
    }
    [[nodiscard]] HeadStep head_step(const LayerCall& call, std::size_t head,
                                     detail::TileScratch& scratch) const {
        HeadStep step = decision_.head_step(live_, flat(call.layer, head), call.cached[head], scratch);
        step.added = call.q.tokens;
        step.next_position = call.reach.next;
        step.evicts = call.evicts;
        return step;
    }
    /// Calls `use` with what observes the tiles of a head.
    template <class Use>
    void with_observer(const LayerCall& call, std::size_t head, const Use& use) {
        if (call.spared)
            use([](const HeadStep& /*tile*/) {});
        else
            use(detail::Observer<P>{policy(), live_.states[flat(call.layer, head)]});
    }

    [[nodiscard]] detail::TokenMask mask(std::size_t layer, bool causal) const noexcept {
        return {causal, shape().layer(layer).window};
    }
    /// Whether a layer decides at the end of its own call.
    [[nodiscard]] bool decides_per_layer() const { return !decides_late<P> && !decision_.pools_model(); }
    /// Makes the plan by `choose`. If that throws, sizes that a rule has divided are as before.
    template <class Choose>
    void plan(const Choose& choose) {
        plan_.clear();
        if (!divides_heads(decision_.rule)) return choose();
        undivided_ = live_.sizes;
        try {
            choose();
        } catch (...) {
            live_.sizes.swap(undivided_);
            throw;
        }
    }
    /// Adds what one span keeps to the plan, if it is time.
    void decide(typename detail::Decision<P, Rule>::Span span, std::span<const HeadView> views,
                const Moment& moment) {
        const std::size_t layer = span.first / shape().kv_heads;
        if (decision_.pauses(live_, layer, moment)) return;
        if (decision_.due_now(live_, span, moment)) choose(span, views, moment.phase, 0);
    }
    /// What the caller says of a step, and what it need not say.
    [[nodiscard]] StepInputs completed(StepInputs inputs, CacheView cached) const {
        inputs.phase = live_.phase;
        inputs.seen = live_.seen;
        inputs.cached = cached;
        inputs.kernels = decision_.workers.kernels;
        return inputs;
    }
    /// `tokens`: of the call that ended.
    void decide_all(CacheView cached, bool prompt_end, std::size_t tokens) {
        const Moment moment{
            .phase = live_.phase, .prompt_end = prompt_end, .seen = live_.seen, .tokens = tokens};
        decision_.for_each_span(
            [&](auto span) { decide(span, cached.heads.subspan(span.first, span.count), moment); });
    }
    /// Also for a policy that never evicts, but not from layers that one skips.
    void choose_where_over(CacheView cached, std::size_t coming, Phase phase,
                           std::span<const HeadsView<const float>> queries = {}) {
        decision_.for_each_span([&](auto span) {
            if (decision_.over(live_, span, coming) && (decision_.never || decision_.ever_evicts(span)))
                choose(span, cached.heads.subspan(span.first, span.count), phase, coming, queries);
        });
    }
    /// Adds what a span keeps to the plan, by states that have seen all queries.
    void choose(typename detail::Decision<P, Rule>::Span span, std::span<const HeadView> views, Phase phase,
                std::size_t coming, std::span<const HeadsView<const float>> queries = {}) {
        show_waiting(views, span.first);
        decision_.choose(live_, span, views, phase, coming, plan_, queries);
    }

    detail::Decision<P, Rule> decision_;
    Live<P> live_;
    Plan plan_;
    std::vector<std::size_t> undivided_;  // sizes, while a plan is made
    Scratch<float> log_beta_;             // [kv_heads, c] that gates made
    std::size_t buffer_ = 0;              // queries that may wait in a layer
};

}  // namespace kvcull::inline KVCULL_ABI
