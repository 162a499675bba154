#include "replay.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <kvcull/attention/attend.hpp>
#include <kvcull/cache/kv_cache.hpp>
#include <limits>
#include <string>

#include "../common/named_policies.hpp"
#include "../common/named_rules.hpp"

namespace replay {
namespace {

/// A cache that reads a trace, with the time that it takes.
template <class Policy, class Rule = kvcull::Uniform>
class Player {
  public:
    Player(const Trace& trace, std::optional<kvcull::DType> rows, Policy policy, const kvcull::Budget& budget,
           Rule rule = {})
        : trace_(trace), cache_(shape_of(trace, rows), std::move(policy), budget, pool_, std::move(rule)) {
        cache_.begin_prompt(trace.prompt);
    }

    void append(std::size_t layer, std::size_t first, std::size_t count) {
        const std::size_t heads = trace_.shape.kv_heads;
        const auto k = trace_.heads(trace_.layers[layer].k, heads, first, count);
        const auto v = trace_.heads(trace_.layers[layer].v, heads, first, count);
        const std::span positions = std::span(trace_.positions).subspan(first, count);
        timed([&] { cache_.append(layer, k, v, {.positions = positions}); });
    }
    /// @returns [q_heads, count, value_dim]
    const std::vector<float>& attend(std::size_t layer, std::size_t first, std::size_t count) {
        const std::size_t heads = trace_.shape.q_heads, dim = trace_.shape.values();
        out_.resize(heads * count * dim);
        timed([&] {
            cache_.attend(layer, trace_.heads(trace_.layers[layer].q, heads, first, count),
                          kvcull::head_major(out_.data(), heads, count, dim));
        });
        return out_;
    }
    void end_step(std::size_t first, std::size_t count) {
        kvcull::StepInputs inputs;
        if (!trace_.tokens.empty()) inputs.tokens = std::span(trace_.tokens).subspan(first, count);
        timed([&] { cache_.end_step(inputs); });
        if (first >= trace_.prompt) decoded_.push_back(time_.count());
        time_ = {};
        if (first + count == trace_.prompt) end_prompt();
    }
    [[nodiscard]] const kvcull::KVCache<Policy, Rule>& cache() const noexcept { return cache_; }
    /// Median over the decoded tokens.
    [[nodiscard]] double seconds() {
        const auto middle = decoded_.begin() + static_cast<std::ptrdiff_t>(decoded_.size() / 2);
        std::nth_element(decoded_.begin(), middle, decoded_.end());
        return *middle;
    }

  private:
    static kvcull::CacheShape shape_of(const Trace& trace, std::optional<kvcull::DType> rows) {
        kvcull::CacheShape shape = trace.shape;
        shape.dtype = rows.value_or(shape.dtype);
        return shape;
    }
    /// A trace has no model to look ahead with: the tokens that did follow are what a copy of the whole cache
    /// would have given.
    void end_prompt() {
        cache_.end_prompt();
        if constexpr (kvcull::Lookahead<Policy>) {
            const std::size_t count = std::min(cache_.policy().lookahead, trace_.size() - trace_.prompt);
            std::vector<kvcull::HeadsView<const float>> queries;
            for (const Trace::Layer& layer : trace_.layers)
                queries.push_back(trace_.heads(layer.q, trace_.shape.q_heads, trace_.prompt, count));
            cache_.rescore(queries);
        }
    }
    template <class Call>
    void timed(Call&& call) {
        const auto begin = std::chrono::steady_clock::now();
        call();
        time_ += std::chrono::steady_clock::now() - begin;
    }

    const Trace& trace_;
    kvcull::BlockPool pool_{{.block_rows = 16}};
    kvcull::KVCache<Policy, Rule> cache_;
    std::vector<float> out_;
    std::chrono::duration<double> time_{};  // of the step that runs now
    std::vector<double> decoded_;
};

/// Indices of the tokens that one KV head holds, in no order.
template <class Cache>
void find_held(const Trace& trace, const Cache& cache, std::size_t layer, std::size_t head,
               std::vector<std::size_t>& held) {
    const kvcull::PositionsView position = cache.view(layer, head).position;
    held.resize(position.size());
    for (std::size_t j = 0; j < held.size(); ++j)
        held[j] = static_cast<std::size_t>(
            std::lower_bound(trace.positions.begin(), trace.positions.end(), position[j]) -
            trace.positions.begin());
}

/// Mean and extremes of what is measured row by row.
struct Measure {
    double sum = 0, least = 1e300, most = 0;
    std::size_t count = 0;

    void add(double value) {
        sum += value;
        least = std::min(least, value);
        most = std::max(most, value);
        ++count;
    }
    [[nodiscard]] double mean() const { return sum / static_cast<double>(count); }
};

/// Infinite if `got` is not finite.
double relative_error(std::span<const float> got, std::span<const float> full) {
    double difference = 0, norm = 0;
    for (std::size_t c = 0; c < full.size(); ++c) {
        const double f = full[c], delta = got[c] - f;
        difference += delta * delta;
        norm += f * f;
    }
    if (difference == 0) return 0;
    if (!std::isfinite(difference)) return std::numeric_limits<double>::infinity();
    return norm == 0 ? 1 : std::sqrt(difference / norm);
}

/// The attention of token `t` over the full cache, and how much of it `held` has.
class MassMeter {
  public:
    MassMeter(const Trace& trace, const kvcull::KVCache<kvcull::Full>& full)
        : trace_(trace), full_(full), lse_(trace.shape.group()), visible_(trace.shape.group()) {}

    void add(std::size_t layer, std::size_t head, std::size_t t, std::span<const std::size_t> held,
             Measure& mass) {
        const kvcull::HeadView view = full_.view(layer, head);
        const std::size_t group = trace_.shape.group(), n = view.rows();
        const auto q = trace_.heads(trace_.layers[layer].q, trace_.shape.q_heads, t, 1);
        weights_.resize(group * n);
        std::fill(visible_.begin(), visible_.end(), kvcull::Visible{0, 0, n});
        const kvcull::MatrixView<float> weights(weights_.data(), group, n);
        kvcull::attend(kvcull::simd::kernels(), {q.row(head * group, 0), group, q.dim, q.head_stride}, view.k,
                       view.v, visible_, trace_.shape.logit_scale(), {.attention = weights, .lse = lse_});
        for (std::size_t g = 0; g < group; ++g) {
            double sum = 0;
            for (const std::size_t index : held) sum += weights[g][index];  // slot = token: nothing left
            mass.add(sum);
        }
    }

  private:
    const Trace& trace_;
    const kvcull::KVCache<kvcull::Full>& full_;
    std::vector<float> weights_, lse_;
    std::vector<kvcull::Visible> visible_;
};

template <class Policy>
Outcome run(const Trace& trace, Policy policy, const Setting& setting, std::size_t chunk) {
    const kvcull::CacheShape& shape = trace.shape;
    Player some(trace, setting.rows, std::move(policy), setting.budget, examples::named_rule(setting.rule));
    Player full(trace, std::nullopt, kvcull::Full{}, {.tokens = 1});
    MassMeter meter(trace, full.cache());
    Measure error, mass;
    Outcome outcome{.setting = setting};
    outcome.until.resize(shape.heads() * trace.size());
    std::vector<std::size_t> held;

    for (std::size_t first = 0, count = 0; first < trace.size(); first += count) {
        const bool decoding = first >= trace.prompt;
        count = decoding ? 1 : trace.prompt - first;
        if (!decoding && chunk != 0) count = std::min(count, chunk);
        for (std::size_t layer = 0; layer < shape.layers; ++layer) {
            some.append(layer, first, count);
            full.append(layer, first, count);
            for (std::size_t head = 0; head < shape.kv_heads; ++head) {
                outcome.peak_rows = std::max(outcome.peak_rows, some.cache().rows(layer, head));
                if (!decoding) continue;
                find_held(trace, some.cache(), layer, head, held);
                meter.add(layer, head, first, held, mass);
            }
            const std::span got(some.attend(layer, first, count)), want(full.attend(layer, first, count));
            const std::size_t dim = shape.values();
            if (!std::all_of(want.begin(), want.end(), [](float x) { return std::isfinite(x); }))
                throw kvcull::error::format_error(
                    "replay: attention of layer " + std::to_string(layer) + " at token " +
                    std::to_string(first) + " over the full cache holds a NaN or infinity, want numbers");
            for (std::size_t head = 0; decoding && head < shape.q_heads; ++head)
                error.add(relative_error(got.subspan(head * dim, dim), want.subspan(head * dim, dim)));
        }
        some.end_step(first, count);
        full.end_step(first, count);
        const auto seen = static_cast<std::int64_t>(first + count);
        outcome.seen.push_back(seen);
        for (std::size_t i = 0; i < shape.heads(); ++i) {
            find_held(trace, some.cache(), i / shape.kv_heads, i % shape.kv_heads, held);
            for (const std::size_t index : held) outcome.until[i * trace.size() + index] = seen;
        }
    }

    outcome.mean_error = error.mean();
    outcome.worst_error = error.most;
    outcome.mean_mass = mass.mean();
    outcome.least_mass = mass.least;
    for (std::size_t i = 0; i < shape.heads(); ++i)
        outcome.rows += static_cast<double>(some.cache().rows(i / shape.kv_heads, i % shape.kv_heads)) /
                        static_cast<double>(shape.heads());
    outcome.bytes = some.cache().bytes();
    outcome.peak_bytes = some.cache().peak_bytes();
    outcome.full_bytes = full.cache().bytes();
    outcome.seconds = some.seconds();
    outcome.full_seconds = full.seconds();
    return outcome;
}

}  // namespace

void check(const Trace& trace, const Setting& setting) {
    examples::NamedPolicies::with(setting.policy, [&](auto policy) {
        if constexpr (kvcull::SideInput<decltype(policy)>)
            throw kvcull::error::config_error(std::string(policy.name) +
                                              ": takes a number with every token that a trace does not hold");
        Player(trace, setting.rows, std::move(policy), setting.budget, examples::named_rule(setting.rule));
    });
}

Outcome run(const Trace& trace, const Setting& setting, std::size_t chunk) {
    Outcome outcome;
    examples::NamedPolicies::with(
        setting.policy, [&](auto policy) { outcome = run(trace, std::move(policy), setting, chunk); });
    return outcome;
}

}  // namespace replay
