/// cache/step/<policy>/heads:32x8/n:<budget>/slack:<rows>: one decode step of a layer of a KVCache that is at
/// its budget: append, attention, what the policy does, evictions. Beside it, step by step, a cache of the
/// same rows that never evicts; `over_attention` is what the policy adds as a share of that one's time.

#include <string>
#include <vector>

#include "groups.hpp"
#include "kvcull/cache/kv_cache.hpp"
#include "policies.hpp"
#include "support/cases.hpp"
#include "support/rows.hpp"

namespace kvcull::bench {
namespace {

constexpr CacheShape shape{.layers = 1, .q_heads = 32, .kv_heads = 8, .head_dim = 128};
constexpr std::size_t budget = 4096, chunk = 64;

struct Token {
    std::vector<float> q = random_row(chunk * shape.q_heads * shape.head_dim, 3),
                       k = random_row(chunk * shape.kv_heads * shape.head_dim, 4),
                       v = random_row(chunk * shape.kv_heads * shape.head_dim, 5), out = q;
};

template <class P>
void step(KVCache<P>& cache, Token& token, std::size_t tokens) {
    cache.append(0, token_major<const float>(token.k.data(), shape.kv_heads, tokens, shape.head_dim),
                 token_major<const float>(token.v.data(), shape.kv_heads, tokens, shape.head_dim));
    cache.attend(0, token_major<const float>(token.q.data(), shape.q_heads, tokens, shape.head_dim),
                 token_major<float>(token.out.data(), shape.q_heads, tokens, shape.head_dim));
    cache.end_step();
}
template <class P>
void prompt(KVCache<P>& cache, Token& token, std::size_t tokens) {
    cache.reserve(tokens + chunk);
    cache.begin_prompt(tokens);
    for (std::size_t seen = 0; seen < tokens; seen += chunk)
        step(cache, token, std::min(chunk, tokens - seen));
    cache.end_prompt();
}

/// A cache of the whole prompt, made once.
const KVCache<Full>& full_prompt(Token& token) {
    static const KVCache<Full> cache = [&] {
        KVCache<Full> made(shape);
        prompt(made, token, budget);
        return made;
    }();
    return cache;
}

template <class P>
void run(benchmark::State& state, const P& policy, std::size_t slack) {
    Token token;
    KVCache<P> cache(shape, policy, Budget{.tokens = budget, .slack = slack});
    cache.reserve(budget + slack + chunk);
    prompt(cache, token, budget);
    KVCache<Full> full = full_prompt(token).fork();
    full.reserve(budget + slack + chunk);
    const std::size_t cycle = std::max<std::size_t>(slack + 1, 16);  // steps from one eviction to the next
    for (std::size_t i = 0; i < cycle; ++i) step(cache, token, 1);
    Series policy_steps, full_steps;
    Ratios share;
    for (auto _ : state) {
        Time mine, plain;
        for (std::size_t i = 0; i < cycle; ++i) {
            const Stopwatch watch;
            step(cache, token, 1);
            mine += watch.elapsed();
            const Stopwatch full_watch;
            step(full, token, 1);
            plain += full_watch.elapsed();
        }
        full.truncate(cycle);  // both caches grow alike between two evictions
        const auto steps = static_cast<double>(cycle);
        policy_steps.add({mine.wall / steps, mine.busy / steps}, state);
        full_steps.add({plain.wall / steps, plain.busy / steps});
        share.add(mine.busy, plain.busy);
    }
    state.counters["over_attention"] = share.middle() - 1.0;
    state.counters["attention_us"] = full_steps.best() * 1e6;
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
}

}  // namespace kvcull::bench
