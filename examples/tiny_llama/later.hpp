#pragma once
/// How the tokens after a prompt attend to the prompt, and how much of that a smaller cache still has.

#include <cstddef>
#include <kvcull/attention/attend.hpp>
#include <kvcull/cache/kv_cache.hpp>
#include <kvcull/policies/streaming.hpp>
#include <kvcull/simd/kernels.hpp>
#include <vector>

namespace tiny_llama {

/// A full cache that sums up how the tokens after its prompt attend to the prompt, per KV head: every row of
/// theirs gives the prompt's tokens one in all.
class Later {
  public:
    Later(kvcull::KVCache<kvcull::Full>& cache, std::size_t prompt)
        : cache_(cache), prompt_(prompt), mass_(cache.shape().heads(), std::vector<float>(prompt)) {}

    [[nodiscard]] std::size_t seen() const { return cache_.seen(); }
    void append(std::size_t layer, kvcull::HeadsView<const float> k, kvcull::HeadsView<const float> v,
                const kvcull::AppendInputs& inputs) {
        cache_.append(layer, k, v, inputs);
    }
    void attend(std::size_t layer, kvcull::HeadsView<const float> q, kvcull::HeadsView<float> out) {
        cache_.attend(layer, q, out);
        const kvcull::CacheShape& shape = cache_.shape();
        const kvcull::Visible the_prompt[]{{0, 0, prompt_}};
        float lse = 0;
        for (std::size_t h = 0; h < shape.q_heads; ++h) {
            const std::size_t head = h / shape.group();
            const kvcull::HeadView rows = cache_.view(layer, head);  // slot = position: nothing left
            std::vector<float> weights(rows.rows());
            for (std::size_t i = 0; i < q.tokens; ++i) {
                kvcull::attend(kvcull::simd::kernels(), {q.row(h, i), 1, q.dim}, rows.k, rows.v, the_prompt,
                               shape.logit_scale(),
                               {.attention = {weights.data(), 1, weights.size()}, .lse = {&lse, 1}});
                for (std::size_t j = 0; j < prompt_; ++j)
                    mass_[layer * shape.kv_heads + head][j] += weights[j];
            }
        }
    }
    void end_step(const kvcull::StepInputs& inputs) { cache_.end_step(inputs); }

    /// Share of it that lies on tokens which `kept`, a cache after the same prompt, holds. @param counted
    /// [prompt]: only attention to these counts; empty: all of it
    template <class Cache>
    [[nodiscard]] double share(const Cache& kept, const std::vector<bool>& counted = {}) const {
        double held = 0, all = 0;
        const auto weight = [&](std::size_t head, std::size_t token) {
            return counted.empty() || counted[token] ? static_cast<double>(mass_[head][token]) : 0.0;
        };
        for (std::size_t i = 0; i < mass_.size(); ++i) {
            for (std::size_t j = 0; j < prompt_; ++j) all += weight(i, j);
            const std::size_t heads = kept.shape().kv_heads;
            for (const auto position : kept.positions(i / heads, i % heads))
                held += weight(i, static_cast<std::size_t>(position));
        }
        return held / all;
    }

  private:
    kvcull::KVCache<kvcull::Full>& cache_;
    std::size_t prompt_;
    std::vector<std::vector<float>> mass_;  ///< [layers * kv_heads][prompt]
};

}  // namespace tiny_llama
