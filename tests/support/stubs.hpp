#pragma once
/// One small model per kind of method that the policy contract must carry: what it is given, when, and how
/// its decisions are taken. The arithmetic is a caricature; the data flow is the method's.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <string_view>
#include <tuple>
#include <vector>

#include "kvcull/attention/attend.hpp"
#include "kvcull/base/error.hpp"
#include "kvcull/score/concepts.hpp"
#include "kvcull/score/received.hpp"
#include "kvcull/select/budget.hpp"
#include "kvcull/select/topk.hpp"

namespace kvcull::test {

/// What a stub was given, in order. Policies are copied into caches, so they hold a pointer to it.
struct Record {
    struct Tile {
        HeadStep step;  // its views are dead; what they held is below
        std::vector<float> q, attention, logits, output, lse;
        std::vector<Visible> visible;
    };
    struct Admitted {
        std::size_t layer, head, first_row, tokens;
    };
    struct Step {
        std::vector<std::int32_t> tokens;
        std::vector<float> hidden;
    };
    std::vector<Tile> tiles;
    std::vector<Admitted> admitted;
    std::vector<Step> steps;
    std::vector<HeadStep> scored;  // views are dead

    void tile(const HeadStep& step) {
        const auto copy = [](const MatrixView<const float>& view) {
            std::vector<float> all;
            for (std::size_t row = 0; row < view.rows; ++row)
                all.insert(all.end(), view[row].begin(), view[row].end());
            return all;
        };
        tiles.push_back({step, copy(step.q), copy(step.attention), copy(step.logits), copy(step.output),
                         std::vector<float>(step.lse.begin(), step.lse.end()),
                         std::vector<Visible>(step.visible.begin(), step.visible.end())});
    }
};

/// SkipKV: token ids and hidden states of the whole step, one table per sequence, eviction at the step's end
/// in all layers, every `interval` tokens and after the prompt. A token whose id comes again later goes
/// first.
struct SkipLike {
    static constexpr std::string_view name = "skip_like";
    using State = NoState;
    struct Sequence {
        std::vector<std::int32_t> tokens;  // by position
        std::vector<float> weight;         // first channel of the hidden state

        [[nodiscard]] float score(std::size_t position) const {
            if (position >= tokens.size()) return 0.0F;  // of the step that runs now
            const auto later = tokens.begin() + static_cast<std::ptrdiff_t>(position) + 1;
            const bool again = std::find(later, tokens.end(), tokens[position]) != tokens.end();
            return weight[position] - (again ? 100.0F : 0.0F);
        }
    };

    std::size_t interval = 4;
    Record* record = nullptr;

    static constexpr auto fields() { return std::tuple{Field{"interval", &SkipLike::interval}}; }
    static constexpr Needs needs(Phase /*phase*/) { return {}; }
    [[nodiscard]] constexpr bool due(const Moment& moment) const {
        if (moment.rows <= moment.budget) return false;
        return moment.phase == Phase::prompt ? moment.prompt_end : moment.seen % interval == 0;
    }
    static void observe(State& /*state*/, const HeadStep& /*step*/) {}
    void end_step(Sequence& sequence, const StepInputs& inputs) const {
        detail::check<error::state_error>(!inputs.tokens.empty(), "SkipLike", "tokens", "missing",
                                          "given to end_step");
        detail::check<error::state_error>(!inputs.hidden.empty(), "SkipLike", "hidden", "missing",
                                          "given to end_step");
        for (std::size_t i = 0; i < inputs.tokens.size(); ++i) {
            sequence.tokens.push_back(inputs.tokens[i]);
            sequence.weight.push_back(inputs.hidden[i][0]);
        }
        if (record == nullptr) return;
        Record::Step& step = record->steps.emplace_back();
        step.tokens.assign(inputs.tokens.begin(), inputs.tokens.end());
        for (std::size_t i = 0; i < inputs.hidden.rows; ++i) step.hidden.push_back(inputs.hidden[i][0]);
    }
    static void score(const State& /*state*/, const Sequence& sequence, const HeadStep& step,
                      std::span<float> out) {
        for (std::size_t j = 0; j < out.size(); ++j)
            out[j] = sequence.score(static_cast<std::size_t>(step.cached.position[j]));
    }
};

/// TRIM-KV: a retention per token comes with the token, as `log_beta`, and decays with age. Nothing is read
/// from attention.
struct TrimLike {
    static constexpr std::string_view name = "trim_like";
    static constexpr Side side = Side::log_beta;
    struct State {
        RowArray<float> log_beta;

        [[nodiscard]] auto arrays() noexcept { return std::tie(log_beta); }
    };

    Record* record = nullptr;

    static constexpr auto fields() { return std::tuple{}; }
    static constexpr Needs needs(Phase /*phase*/) { return {}; }
    void admit(State& state, const HeadInputs& inputs) const {
        std::copy(inputs.log_beta.begin(), inputs.log_beta.end(), &state.log_beta[inputs.first_row]);
        if (record != nullptr)
            record->admitted.push_back({inputs.layer, inputs.head, inputs.first_row, inputs.log_beta.size()});
    }
    static void observe(State& /*state*/, const HeadStep& /*step*/) {}
    static void score(const State& state, const HeadStep& step, std::span<float> out) {
        for (std::size_t j = 0; j < out.size(); ++j)
            out[j] = static_cast<float>(step.next_position - step.cached.position[j]) * state.log_beta[j];
    }
};
/// TRIM-KV whose gate the policy computes itself from what enters the projections: `gate . x`.
struct TrimGateLike : TrimLike {
    static constexpr std::string_view name = "trim_gate_like";
    static constexpr Side side = Side::attention_input;
    std::vector<float> gate = {};  // [D]

    static constexpr auto fields() { return std::tuple{}; }
    void admit(State& state, const HeadInputs& inputs) const {
        detail::check_size("TrimGateLike", "attention_input.cols", inputs.attention_input.cols, gate.size());
        for (std::size_t i = 0; i < inputs.attention_input.rows; ++i) {
            const auto x = inputs.attention_input[i];
            state.log_beta[inputs.first_row + i] =
                -std::inner_product(x.begin(), x.end(), gate.begin(), static_cast<float>(inputs.head));
        }
    }
};
/// TRIM-KV with a dynamic budget: one ranking over the whole model, ties to the later layer and head.
struct TrimDynamicLike : TrimLike {
    static constexpr std::string_view name = "trim_dynamic_like";

    static constexpr auto fields() { return std::tuple{}; }
    static constexpr Scope scope() { return Scope::model_pooled; }
    static constexpr HeadTie tie() { return HeadTie::later; }
};

/// LAQ: the prompt is kept whole until query rows of pseudo tokens are given. Before, its last row proposes.
struct LaqLike {
    static constexpr std::string_view name = "laq_like";
    using State = ReceivedAttention;

    static constexpr auto fields() { return std::tuple{}; }
    static constexpr Needs needs(Phase phase) {
        return {.rows = phase == Phase::prompt ? std::size_t{1} : 0, .attention = true};
    }
    static void observe(State& state, const HeadStep& step) {
        if (step.phase == Phase::prompt) state.observe({Accumulation::Mode::replace}, step);
    }
    static void score(const State& state, const HeadStep& step, std::span<float> out) {
        state.write(step, out);
    }
    /// Attention of all given rows over all cached rows, summed.
    static void rescore(const State& /*state*/, const HeadStep& step, MatrixView<const float> q,
                        std::span<float> out) {
        const std::size_t n = out.size();
        float* const memory = step.workspace->get(q.rows * (n + 1));
        const std::vector<Visible> visible(q.rows, Visible{0, 0, n});
        std::fill(out.begin(), out.end(), 0.0F);
        attend(*step.kernels, q, step.cached.k, step.cached.v, visible, step.scale,
               {.attention = {memory, q.rows, n}, .lse = {memory + q.rows * n, q.rows}, .column_sum = out});
    }
};

/// EpiCache: rows of a probe score what is cached, by their largest attention; a layer ranks all its heads in
/// one list and evicts after the probe.
struct EpiLike {
    static constexpr std::string_view name = "epi_like";
    struct State {
        RowArray<float> largest;

        [[nodiscard]] auto arrays() noexcept { return std::tie(largest); }
    };

    Record* record = nullptr;

    static constexpr auto fields() { return std::tuple{}; }
    static constexpr Needs needs(Phase phase) {
        if (phase != Phase::probe) return {};
        return {.rows = all_rows, .attention = true};
    }
    static constexpr Scope scope() { return Scope::layer_pooled; }
    static constexpr bool due(const Moment& moment) {
        return moment.phase == Phase::probe && moment.rows > moment.budget;
    }
    void observe(State& state, const HeadStep& step) const {
        if (step.phase != Phase::probe) return;
        if (record != nullptr) record->tile(step);
        const auto largest = state.largest.values();
        if (step.first_tile) std::fill(largest.begin(), largest.end(), 0.0F);
        for (std::size_t row = 0; row < step.attention.rows; ++row)
            step.kernels->maximum(largest.data(), step.attention[row].data(), largest.size());
    }
    static void score(const State& state, const HeadStep& /*step*/, std::span<float> out) {
        std::copy(state.largest.values().begin(), state.largest.values().end(), out.begin());
    }
};

/// Greedy CAOTE, CriticalKV: the policy chooses the set itself. Here: what must stay, then every other row
/// from the oldest slot on, then the rest. `miscount` is added to the number of rows it returns.
struct GreedyLike {
    static constexpr std::string_view name = "greedy_like";
    using State = NoState;

    std::size_t sinks = 1, recent = 2;
    int miscount = 0;
    std::vector<std::size_t>* counts = nullptr;  // of rows asked for

    static constexpr auto fields() { return std::tuple{Field{"sinks", &GreedyLike::sinks}}; }
    static constexpr Needs needs(Phase /*phase*/) { return {}; }
    [[nodiscard]] constexpr Protected protect(std::size_t /*budget*/) const { return {sinks, recent}; }
    static void observe(State& /*state*/, const HeadStep& /*step*/) {}
    static void score(const State& /*state*/, const HeadStep& /*step*/, std::span<float> out) {
        std::fill(out.begin(), out.end(), 0.0F);
    }
    void select(const State& /*state*/, const HeadStep& /*step*/, std::span<const std::uint8_t> fixed,
                std::size_t count, std::vector<index_t>& keep) const {
        if (counts != nullptr) counts->push_back(count);
        const auto wanted = static_cast<std::size_t>(static_cast<int>(count) + miscount);
        std::vector<std::size_t> order(fixed.size());
        std::iota(order.begin(), order.end(), std::size_t{0});
        std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
            return std::tuple(fixed[a] == 0, a % 2) < std::tuple(fixed[b] == 0, b % 2);
        });
        order.resize(wanted);
        std::sort(order.begin(), order.end());
        for (const std::size_t row : order) keep.push_back(static_cast<index_t>(row));
    }
};

/// A base that can say what each query head of the group thinks: the last row's attention, [group, n]. A
/// state does not know its group when it is made, so the array gets its width when the first row is seen.
struct LastRowLike {
    static constexpr std::string_view name = "last_row_like";
    static constexpr bool nonnegative = true;
    struct State {
        RowArray<float> weight;

        [[nodiscard]] auto arrays() noexcept { return std::tie(weight); }
    };

    static constexpr auto fields() { return std::tuple{}; }
    static constexpr Needs needs(Phase /*phase*/) { return {.rows = 1, .attention = true}; }
    static void observe(State& state, const HeadStep& step) {
        if (step.phase == Phase::probe || step.tokens == 0) return;
        if (state.weight.width() != step.group) {
            state.weight = RowArray<float>(step.group);
            state.weight.resize(step.n());
        }
        for (std::size_t j = 0; j < step.n(); ++j)
            for (std::size_t g = 0; g < step.group; ++g)
                (&state.weight[j])[g] = step.attention[(g + 1) * step.tokens - 1][j];
    }
    static MatrixView<const float> distribution(const State& state, const HeadStep& step,
                                                MatrixView<float> spare) {
        for (std::size_t g = 0; g < spare.rows; ++g)
            for (std::size_t j = 0; j < step.n(); ++j) spare[g][j] = (&state.weight[j])[g];
        return spare;
    }
    static void score(const State& state, const HeadStep& step, std::span<float> out) {
        for (std::size_t j = 0; j < out.size(); ++j)
            out[j] = std::accumulate(&state.weight[j], &state.weight[j] + step.group, 0.0F);
    }
};
/// CAOTE: turns the base's distributions into the error of the output if a row went: here a / (1 - a) |v|_1.
template <class Inner>
requires Policy<Inner> && PerQueryHead<Inner>
struct CaoteLike {
    static constexpr std::string_view name = "caote_like";
    using State = typename Inner::State;
    Inner inner = {};

    static constexpr auto fields() { return std::tuple{}; }
    [[nodiscard]] constexpr Needs needs(Phase phase) const { return inner.needs(phase); }
    static constexpr std::size_t workspace(std::size_t rows, std::size_t group, std::size_t dim) {
        return group * rows + dim;
    }
    void observe(State& state, const HeadStep& step) const { inner.observe(state, step); }
    void score(const State& state, const HeadStep& step, std::span<float> out) const {
        const std::size_t n = step.n(), dim = step.cached.v.dim();
        float* const memory = step.workspace->get(step.group * n + dim);
        const std::span<float> value(memory + step.group * n, dim);
        const MatrixView<const float> weights = inner.distribution(state, step, {memory, step.group, n});
        for (std::size_t j = 0; j < n; ++j) {
            step.cached.v.widen(j, value);
            double norm = 0.0, error = 0.0;
            for (const float x : value) norm += static_cast<double>(x < 0.0F ? -x : x);
            for (std::size_t g = 0; g < step.group; ++g) {
                const double a = std::min(static_cast<double>(weights[g][j]), 0.999);
                error += a / (1.0 - a);
            }
            out[j] = static_cast<float>(error * norm);
        }
    }
};

/// OBCache: attention, logits, outputs and log-sum-exp of the last `window` rows, in tiles.
struct ObcLike {
    static constexpr std::string_view name = "obc_like";
    using State = ReceivedAttention;

    std::size_t window = 4;
    Record* record = nullptr;

    static constexpr auto fields() { return std::tuple{Field{"window", &ObcLike::window}}; }
    [[nodiscard]] constexpr Needs needs(Phase phase) const {
        if (phase == Phase::probe) return {};
        return {.rows = window, .attention = true, .logits = true, .output = true};
    }
    void observe(State& state, const HeadStep& step) const {
        if (record != nullptr) record->tile(step);
        state.observe({Accumulation::Mode::window, window}, step);
    }
    void score(const State& state, const HeadStep& step, std::span<float> out) const {
        if (record != nullptr) record->scored.push_back(step);
        state.write(step, out);
    }
};

/// R-KV without sentences: evicts every `interval` tokens of the sequence, within the layer.
struct EveryLike {
    static constexpr std::string_view name = "every_like";
    using State = NoState;

    std::size_t interval = 5;

    static constexpr auto fields() { return std::tuple{Field{"interval", &EveryLike::interval}}; }
    static constexpr Needs needs(Phase /*phase*/) { return {}; }
    [[nodiscard]] constexpr bool due(const Moment& moment) const {
        return moment.phase == Phase::decode && moment.seen % interval == 0 && moment.rows > moment.budget;
    }
    static void observe(State& /*state*/, const HeadStep& /*step*/) {}
    static void score(const State& /*state*/, const HeadStep& step, std::span<float> out) {
        for (std::size_t j = 0; j < out.size(); ++j) out[j] = static_cast<float>(step.cached.position[j]);
    }
};

/// Ada-KV: a layer's rows go to its heads by how many of the layer's best scores each of them has.
struct AdaLike {
    std::vector<std::size_t>* asked = nullptr;  // rows per head that were to be divided

    static void layer_sizes(std::size_t mean, std::size_t /*prompt*/, Protected /*policy*/,
                            std::span<std::size_t> out) {
        std::fill(out.begin(), out.end(), mean);
    }
    void head_sizes(std::size_t /*layer*/, std::span<const Candidates> heads, std::size_t size,
                    std::span<std::size_t> out) const {
        if (asked != nullptr) asked->push_back(size);
        std::vector<std::tuple<float, std::size_t>> all;
        for (std::size_t h = 0; h < heads.size(); ++h)
            for (const float score : heads[h].score) all.emplace_back(-score, h);
        std::sort(all.begin(), all.end());
        std::fill(out.begin(), out.end(), std::size_t{0});
        for (std::size_t i = 0; i < std::min(size * heads.size(), all.size()); ++i)
            ++out[std::get<1>(all[i])];
    }
};
/// PyramidKV: lower layers get more, the mean stays.
struct PyramidLike {
    std::size_t step = 2;

    void layer_sizes(std::size_t mean, std::size_t /*prompt*/, Protected /*policy*/,
                     std::span<std::size_t> out) const {
        for (std::size_t layer = 0; layer < out.size(); ++layer)
            out[layer] = mean + step * (out.size() - 1) / 2 - step * layer;
    }
};

}  // namespace kvcull::test
