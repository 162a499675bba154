#pragma once
/// A long history into a small cache: block by block, and after each block a prompt that asks what may go.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "../base/error.hpp"
#include "kv_cache.hpp"

namespace kvcull::inline KVCULL_ABI {

/// The caller's model. `forward` runs tokens through all layers: `append`, `attend` and, at the end,
/// `end_step`. `probe` runs them with `KVCache::probe` in every layer in place of that: nothing of them
/// stays. Both give the first token the position `cache.seen()`.
template <class M, class Cache>
concept CachedModel = requires(M& model, Cache& cache, std::span<const std::int32_t> tokens) {
    model.forward(cache, tokens);
    model.probe(cache, tokens);
};

/// What is asked after a block: `prompt(block)` gives the tokens of the probe, valid until the next call.
template <class Prompt>
concept BlockPrompt = requires(Prompt& prompt, std::span<const std::int32_t> block) {
    { prompt(block) } -> std::convertible_to<std::span<const std::int32_t>>;
};

/// The same prompt after every block: an episode's segments (EpiCache), an instruction to summarise
/// (InfiniPot), the question itself (an oracle).
struct FixedPrompt {
    std::vector<std::int32_t> tokens;

    [[nodiscard]] std::span<const std::int32_t> operator()(
        std::span<const std::int32_t> /*block*/) const noexcept {
        return tokens;
    }
};
/// An instruction and the block once more (KVzip in blocks).
struct RepeatBlock {
    std::vector<std::int32_t> instruction, tokens = {};

    [[nodiscard]] std::span<const std::int32_t> operator()(std::span<const std::int32_t> block) {
        tokens = instruction;
        tokens.insert(tokens.end(), block.begin(), block.end());
        return tokens;
    }
};
/// The last tokens of the block once more (SnapKV in blocks).
struct EndOfBlock {
    std::size_t window = 64;

    [[nodiscard]] std::span<const std::int32_t> operator()(
        std::span<const std::int32_t> block) const noexcept {
        return block.last(std::min(window, block.size()));
    }
};
/// No prompt: for policies that need none (KeyDiff, Streaming).
using NoPrompt = FixedPrompt;

namespace detail {
/// Whether some layer holds more rows than it may once each of its heads has `coming` more.
template <class Cache>
[[nodiscard]] bool any_layer_over(const Cache& cache, std::size_t coming = 0) {
    const std::size_t kv_heads = cache.shape().kv_heads;
    for (std::size_t layer = 0; layer < cache.shape().layers; ++layer) {
        std::size_t rows = 0, size = 0;
        for (std::size_t h = 0; h < kv_heads; ++h) {
            rows += cache.rows(layer, h) + coming;
            size += cache.evictor().size(layer, h);
        }
        if (rows > size) return true;
    }
    return false;
}
}  // namespace detail

/// Feeds `history` in blocks of at most `block` tokens. After each, the last included, the prompt is probed
/// if a layer is over its budget, so that the policy scores all rows afresh and evicts. Every layer l holds
/// at most M_l + block rows per head, on average over its heads where these share a budget; the prompt's own
/// keys are the model's and come on top. Policies that ask for no probe rows evict in the forward pass. What
/// `model` throws leaves the cache with the blocks so far, in the middle of a prompt: roll it back or drop
/// it.
/// @throws config_error if `block` is 0; state_error under `hold`, and if the prompt is empty and a layer
/// must evict
template <Policy P, BudgetRule Rule, CachedModel<KVCache<P, Rule>> Model, BlockPrompt Prompt>
void block_prefill(KVCache<P, Rule>& cache, Model& model, std::span<const std::int32_t> history,
                   std::size_t block, Prompt& prompt) {
    constexpr std::string_view where = "block_prefill";
    detail::check<error::config_error>(block >= 1, where, "block", block, "at least 1");
    detail::check<error::state_error>(!cache.evictor().live().hold, where, "hold", "on", "off");
    const bool probes = cache.policy().needs(Phase::probe).rows > 0;
    const auto check_prompt = [&](std::span<const std::int32_t> tokens) {
        detail::check<error::state_error>(!tokens.empty(), where, "prompt", "empty",
                                          "tokens: a layer must evict");
    };
    if (probes && !history.empty() && detail::any_layer_over(cache, history.size()))
        check_prompt(prompt(history.first(std::min(block, history.size()))));
    if (history.empty()) return;
    cache.begin_prompt(history.size());
    for (std::size_t first = 0; first < history.size(); first += block) {
        const auto tokens = history.subspan(first, std::min(block, history.size() - first));
        model.forward(cache, tokens);
        if (!probes || !detail::any_layer_over(cache)) continue;
        const std::span<const std::int32_t> asked = prompt(tokens);
        check_prompt(asked);
        model.probe(cache, asked);
    }
    cache.end_prompt();
}

}  // namespace kvcull::inline KVCULL_ABI
