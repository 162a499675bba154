/// cache/step/<policy>/heads:32x8/n:<budget>/slack:<rows>: one decode step of a layer of a KVCache that is at
/// its budget: append, attention, what the policy does, evictions. Between append and attention, plain
/// attention over the very rows that the step is about to read: the same number of them, in the same pages,
/// as warm. `over_attention` is what the step takes beyond it, as a share of its time; that of `full`, which
/// only appends, is part of all others.

#include <cmath>
#include <string>
#include <vector>

#include "groups.hpp"
#include "kvcull/cache/kv_cache.hpp"
#include "policies.hpp"
#include "support/attend.hpp"
#include "support/cases.hpp"
#include "support/rows.hpp"

namespace kvcull::bench {
namespace {

constexpr CacheShape shape{.layers = 1, .q_heads = 32, .kv_heads = 8, .head_dim = 128};
constexpr std::size_t budget = 4096;

/// What a model brings and takes in a call. Every call draws other rows: equal ones would tie, as hardly ever
/// in a model.
class Tokens {
  public:
    explicit Tokens(std::size_t count)
        : count_(count),
          q_(count * queries),
          k_(count * keys),
          v_(k_),
          out_(q_),
          log_beta_(count * shape.kv_heads) {}

    void draw() {
        for (std::vector<float>* rows : {&q_, &k_, &v_, &log_beta_}) fill(*rows, ++drawn_);
        for (float& x : log_beta_) x = -0.01F * std::abs(x);
    }
    [[nodiscard]] HeadsView<const float> q() const { return heads(q_, shape.q_heads); }
    [[nodiscard]] HeadsView<const float> k() const { return heads(k_, shape.kv_heads); }
    [[nodiscard]] HeadsView<const float> v() const { return heads(v_, shape.kv_heads); }
    /// For the policies that take it.
    [[nodiscard]] AppendInputs inputs() const {
        return {.log_beta = {log_beta_.data(), shape.kv_heads, count_}};
    }
    [[nodiscard]] HeadsView<float> out() {
        return token_major(out_.data(), shape.q_heads, count_, shape.head_dim);
    }

  private:
    static constexpr std::size_t queries = shape.q_heads * shape.head_dim,
                                 keys = shape.kv_heads * shape.head_dim;

    [[nodiscard]] HeadsView<const float> heads(const std::vector<float>& rows, std::size_t count) const {
        return token_major(rows.data(), count, count_, shape.head_dim);
    }

    std::size_t count_;
    std::vector<float> q_, k_, v_, out_, log_beta_;
    std::uint64_t drawn_ = 0;
};

template <class P>
void prompt(KVCache<P>& cache) {
    constexpr std::size_t chunk = 64;
    Tokens tokens(chunk);
    cache.begin_prompt(budget);
    for (std::size_t seen = 0; seen < budget; seen += chunk) {
        tokens.draw();
        cache.append(0, tokens.k(), tokens.v(), tokens.inputs());
        cache.attend(0, tokens.q(), tokens.out());
        cache.end_step();
    }
    cache.end_prompt();
}

template <class P>
void run(benchmark::State& state, const P& policy, std::size_t slack) {
    constexpr bool evicts = !std::is_same_v<P, Full>;
    KVCache<P> cache(shape, policy, Budget{.tokens = budget, .slack = slack});
    cache.reserve(budget + std::max<std::size_t>(slack + 1, 128));
    prompt(cache);
    Tokens token(1);
    detail::TileScratch scratch;
    // One step. @returns whether rows went.
    const auto step = [&](Time& mine, Time& plain) {
        const std::size_t before = cache.rows(0, 0);
        token.draw();
        const Stopwatch append;
        cache.append(0, token.k(), token.v(), token.inputs());
        mine += append.elapsed();
        const Stopwatch attention;
        attend_plainly(
            shape, [&](std::size_t h) { return cache.view(0, h); }, token.q(), token.out(), scratch);
        plain += attention.elapsed();
        const Stopwatch rest;
        cache.attend(0, token.q(), token.out());
        cache.end_step();
        mine += rest.elapsed();
        return cache.rows(0, 0) <= before;
    };
    // Steps from one eviction to the next, or several times that: a sample holds whole ones.
    std::size_t cycle = 1;
    for (Time mine, plain; evicts && !step(mine, plain);) {
    }
    for (Time mine, plain; evicts && !step(mine, plain);) ++cycle;
    cycle = std::max<std::size_t>(cycle, 16);
    Series policy_steps, plain_steps;
    Ratios share;
    for (auto _ : state) {
        Time mine, plain;
        for (std::size_t i = 0; i < cycle; ++i) step(mine, plain);
        if (!evicts) cache.truncate(cycle);
        const auto steps = static_cast<double>(cycle);
        policy_steps.add({mine.wall / steps, mine.busy / steps}, state);
        plain_steps.add({plain.wall / steps, plain.busy / steps});
        share.add(mine.busy, plain.busy);
    }
    state.counters["over_attention"] = share.middle() - 1.0;
    state.counters["attention_us"] = plain_steps.best() * 1e6;
    state.counters["spread"] = policy_steps.spread();
    state.counters["kv_bytes"] = static_cast<double>(cache.bytes());
}

}  // namespace

void add_cache() {
    for_each_policy([]<class P>(const P& policy) {
        for (const std::size_t slack : {std::size_t{0}, std::size_t{128}}) {
            if (slack > 0 && std::is_same_v<P, Full>) continue;
            const std::string name = "cache/step/" + std::string(P::name) +
                                     "/heads:32x8/n:" + std::to_string(budget) +
                                     "/slack:" + std::to_string(slack);
            add_case(name, slack > 0 ? 5 : 17,
                     [policy, slack](benchmark::State& state) { run(state, policy, slack); });
        }
    });
    add_case("cache/step/trimkv:buffer=32/heads:32x8/n:" + std::to_string(budget) + "/slack:0", 17,
             [](benchmark::State& state) { run(state, TrimKV{.buffer = 32}, 0); });
}

}  // namespace kvcull::bench
