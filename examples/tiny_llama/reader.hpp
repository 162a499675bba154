#pragma once
/// Reads prompts into caches, with the look-ahead of those policies that want one.

#include <algorithm>
#include <cstddef>
#include <kvcull/cache/lookahead.hpp>
#include <span>
#include <utility>
#include <vector>

#include "llama.hpp"
#include "tasks.hpp"

namespace tiny_llama {

[[nodiscard]] inline kvcull::CacheShape shape_of(const Llama& model) {
    const Config& c = model.config();
    return {.layers = c.layers, .q_heads = c.q_heads, .kv_heads = c.kv_heads, .head_dim = c.head_dim};
}
[[nodiscard]] inline int argmax(const RowMajorMatrix& logits) {
    Eigen::Index best = 0;
    logits.row(logits.rows() - 1).maxCoeff(&best);
    return static_cast<int>(best);
}

/// A cache for tokens that ask and leave no trace: see KVCache::probe.
template <class Cache>
struct Probed {
    Cache& cache;
    kvcull::HeadsView<const float> k = {}, v = {};  // of the layer that is attended to next

    [[nodiscard]] std::size_t seen() const { return cache.seen(); }
    void append(std::size_t /*layer*/, kvcull::HeadsView<const float> keys,
                kvcull::HeadsView<const float> values, const kvcull::AppendInputs& /*inputs*/) {
        k = keys;
        v = values;
    }
    void attend(std::size_t layer, kvcull::HeadsView<const float> q, kvcull::HeadsView<float> out) {
        cache.probe(layer, q, k, v, out);
    }
    void end_step(const kvcull::StepInputs& /*inputs*/) {}
};

/// A model with the logits of its last call, and a count of the tokens it has read: a kvcull::CachedModel. A
/// copy of it goes on alone, also with what the hook remembers.
struct Reader {
    const Llama& model;
    Hook hook = {};
    RowMajorMatrix logits = {};
    std::size_t tokens = 0;

    template <class Cache>
    void forward(Cache& cache, std::span<const int> text) {
        read(text, cache);
    }
    template <class Cache>
    void probe(Cache& cache, std::span<const int> text) {
        Probed<Cache> probed{cache};
        read(text, probed);
    }

    template <class Cache>
    void read(std::span<const int> text, Cache& cache) {
        model.forward(text, cache, logits, Llama::Logits::last, hook);
        tokens += text.size();
    }
};

/// Share of all KV heads that hold each of the first `tokens`.
template <class Cache>
[[nodiscard]] std::vector<float> kept_by(const Cache& cache, std::size_t tokens) {
    std::vector<float> share(tokens);
    const auto& shape = cache.shape();
    for (std::size_t layer = 0; layer < shape.layers; ++layer)
        for (std::size_t head = 0; head < shape.kv_heads; ++head)
            for (const auto position : cache.positions(layer, head))
                share[static_cast<std::size_t>(position)] += 1.0F / static_cast<float>(shape.heads());
    return share;
}

/// Whether the model answers a question rightly. It goes on from its own tokens as long as they are right;
/// then nothing counts. The question stays in the cache.
template <class Cache>
[[nodiscard]] bool answers(Reader& reader, const Question& question, Cache& cache) {
    std::span<const int> next = question.ask;
    bool right = true;
    for (const int& answer : question.answer) {
        reader.read(next, cache);
        right = right && argmax(reader.logits) == answer;
        next = {&answer, 1};
    }
    return right;
}

/// Lets the model go on by itself for a few tokens, on a compressed copy of the cache: their queries decide
/// what stays of the prompt, and nothing else of them does. @returns the bytes of both caches
template <class Policy, class Rule>
std::size_t look_ahead(const Reader& prompt, kvcull::LookaheadCache<Policy, Rule>& cache) {
    Reader reader = prompt;
    auto ahead = cache.ahead();
    for (std::size_t i = 0; i < cache.cache().policy().lookahead; ++i) {
        const int token = argmax(reader.logits);
        reader.read({&token, 1}, ahead);
    }
    const std::size_t bytes = cache.cache().bytes() + cache.fork().bytes();
    cache.end_lookahead();
    return bytes;
}

/// Reads a prompt and calls `use(cache, bytes)` with the cache after it; bytes: the most that a look-ahead
/// took, else 0. @param chunk  tokens of a call; 0: the whole prompt at once
template <class Policy, class Rule, class Use>
void after_prompt(Reader& reader, std::span<const int> prompt, std::size_t chunk,
                  kvcull::KVCache<Policy, Rule> cache, const Use& use) {
    const auto read = [&](auto& into) {
        const std::size_t step = chunk == 0 ? prompt.size() : chunk;
        into.begin_prompt(prompt.size());
        for (std::size_t i = 0; i < prompt.size(); i += step)
            reader.read(prompt.subspan(i, std::min(step, prompt.size() - i)), into);
    };
    if constexpr (kvcull::Lookahead<Policy>) {
        kvcull::LookaheadCache both(std::move(cache));
        read(both);
        const std::size_t bytes = both.end_prefill() ? look_ahead(reader, both) : 0;
        use(both.writable(), bytes);
    } else {
        read(cache);
        cache.end_prompt();
        use(cache, 0);
    }
}

}  // namespace tiny_llama
