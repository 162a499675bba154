/// lookahead/<policy>/<compress|step|evict>/heads:32x8/n:<prompt>/budget:<rows>: the parts of a look-ahead in
/// one layer. compress: votes of the prompt's window and the copy. step: append, attention and the query
/// kept, of one pseudo token on the copy. evict: votes of the second stage on the whole prompt, selection,
/// rows moved (and copied before: the next sample starts from the same blocks). `us` is the best time.

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "groups.hpp"
#include "kvcull/cache/lookahead.hpp"
#include "kvcull/policies.hpp"
#include "support/cases.hpp"
#include "support/rows.hpp"

namespace kvcull::bench {
namespace {

constexpr CacheShape shape{.layers = 1, .q_heads = 32, .kv_heads = 8, .head_dim = 128};
constexpr std::size_t budget = 1024;
constexpr std::array<std::string_view, 3> parts{"compress", "step", "evict"};

/// Rows of a call, other ones each time.
class Call {
  public:
    explicit Call(std::size_t tokens)
        : tokens_(tokens),
          q_(tokens * shape.q_heads * shape.head_dim),
          k_(tokens * shape.kv_heads * shape.head_dim),
          v_(k_),
          out_(q_) {}

    template <class Cache>
    void run(Cache& cache) {
        cache.append(0, heads(k_, shape.kv_heads), heads(v_, shape.kv_heads));
        cache.attend(0, heads(q_, shape.q_heads),
                     token_major(out_.data(), shape.q_heads, tokens_, shape.head_dim));
        cache.end_step();
    }
    void draw() {
        for (std::vector<float>* rows : {&q_, &k_, &v_}) fill(*rows, ++drawn_);
    }

  private:
    [[nodiscard]] HeadsView<const float> heads(const std::vector<float>& rows, std::size_t count) const {
        return token_major(rows.data(), count, tokens_, shape.head_dim);
    }

    std::size_t tokens_;
    std::vector<float> q_, k_, v_, out_;
    std::uint64_t drawn_ = 0;
};

template <class P>
void run(benchmark::State& state, const P& policy, std::size_t n, std::size_t part) {
    constexpr std::size_t chunk = 64;
    KVCache<P> prompt(shape, policy, Budget{.tokens = budget});
    prompt.begin_prompt(n);
    Call many(chunk), one(1);
    for (std::size_t seen = 0; seen < n; seen += chunk) {
        many.draw();
        many.run(prompt);
    }
    const auto steps = static_cast<double>(policy.lookahead);
    Series series;
    for (auto _ : state) {
        LookaheadCache cache(prompt.fork());
        std::array<Time, 3> taken;
        const Stopwatch compress;
        const bool wanted = cache.end_prefill();
        taken[0] += compress.elapsed();
        benchmark::DoNotOptimize(wanted);
        auto ahead = cache.ahead();
        for (std::size_t i = 0; i < policy.lookahead; ++i) {
            one.draw();
            const Stopwatch step;
            one.run(ahead);
            const Time time = step.elapsed();
            taken[1] += {time.wall / steps, time.busy / steps};
        }
        const Stopwatch evict;
        cache.end_lookahead();
        taken[2] += evict.elapsed();
        series.add(taken[part], state);
    }
    state.counters["us"] = series.best() * 1e6;
    state.counters["spread"] = series.spread();
}

template <class P>
void add(const P& policy) {
    for (const std::size_t n : {std::size_t{2048}, std::size_t{8192}})
        for (std::size_t part = 0; part < parts.size(); ++part)
            add_case("lookahead/" + std::string(P::name) + "/" + std::string(parts[part]) +
                         "/heads:32x8/n:" + std::to_string(n) + "/budget:" + std::to_string(budget),
                     9, [policy, n, part](benchmark::State& state) { run(state, policy, n, part); });
}

}  // namespace

void add_lookahead() {
    add(Laq{});
    add(LaqPlus{});
}

}  // namespace kvcull::bench
