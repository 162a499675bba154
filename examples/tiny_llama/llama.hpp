#pragma once
/// A Llama model that keeps its keys and values in a cache of the caller. Matrix work by Eigen.

#include <cstddef>
#include <filesystem>
#include <functional>
#include <kvcull/cache/shape.hpp>
#include <kvcull/score/concepts.hpp>
#include <kvcull/views.hpp>
#include <span>
#include <vector>

#include "checkpoint.hpp"
#include "config.hpp"

namespace tiny_llama {

/// What enters a layer, a row per token of the call.
struct LayerInput {
    std::size_t layer;            ///< the number of layers: what leaves the final norm
    kvcull::position_t position;  ///< of the first row
    std::span<const int> tokens;
    kvcull::MatrixView<float> hidden;  ///< [tokens, hidden], to be read or changed
};
/// Called at the input of every layer and after the final norm; an empty one costs nothing.
using Hook = std::function<void(const LayerInput&)>;

/// Weights only: const, and usable from any number of threads, each with its own cache.
class Llama {
  public:
    /// Which tokens of a call get logits.
    enum class Logits { last, all };

    /// Loads a checkpoint folder: config.json and weights.
    /// @throws kvcull::error::format_error for a wrong or missing key, tensor, type or shape;
    /// std::system_error
    explicit Llama(const std::filesystem::path& folder);

    [[nodiscard]] const Config& config() const noexcept { return config_; }
    struct Layer {
        RowVector attention_norm, mlp_norm;
        RowMajorMatrix qkv, output, gate_up, down;  ///< [out, in]
    };
    [[nodiscard]] const std::vector<Layer>& layers() const noexcept { return layers_; }
    [[nodiscard]] const RowMajorMatrix& embedding() const noexcept { return embedding_; }
    [[nodiscard]] const RowVector& norm() const noexcept { return norm_; }
    /// From the normed hidden state to logits, [vocabulary, hidden].
    [[nodiscard]] const RowMajorMatrix& head() const noexcept {
        return config_.tied_head ? embedding_ : head_;
    }

    /// Appends `tokens` to the sequence in `cache`: a prompt, a chunk of one, or a single token.
    /// @param cache   append(layer, k, v, inputs), attend(layer, q, out), end_step(inputs) with the tokens
    /// and their final hidden states, and seen() for the next position; kvcull::KVCache, or anything else
    /// with these members
    /// @param logits  [1 or tokens.size(), vocabulary], overwritten
    /// @param hook    sees the hidden states on their way, and may change them
    /// @throws std::invalid_argument for no tokens, std::out_of_range for one beyond the vocabulary; what the
    /// cache throws
    template <class Cache>
    void forward(std::span<const int> tokens, Cache& cache, RowMajorMatrix& logits,
                 Logits which = Logits::last, const Hook& hook = {}) const {
        const std::size_t n = tokens.size(), d = config_.head_dim, q_heads = config_.q_heads,
                          kv_heads = config_.kv_heads;
        const auto position = static_cast<kvcull::position_t>(cache.seen());
        Activations a = embed(tokens);
        const auto show = [&](std::size_t layer, RowMajorMatrix& rows) {
            if (hook) hook({layer, position, tokens, {rows.data(), n, config_.hidden}});
        };
        for (std::size_t layer = 0; layer < config_.layers; ++layer) {
            show(layer, a.hidden);
            project(layer, position, a);
            const auto heads = [&](std::size_t first, std::size_t count) {
                return kvcull::HeadsView<const float>{
                    a.qkv.data() + first * d, count, n, d, d, static_cast<std::size_t>(a.qkv.cols())};
            };
            cache.append(layer, heads(q_heads, kv_heads), heads(q_heads + kv_heads, kv_heads),
                         {.attention_input = {a.normed.data(), n, config_.hidden}});
            cache.attend(layer, heads(0, q_heads), kvcull::token_major(a.attended.data(), q_heads, n, d));
            finish(layer, a);
        }
        normalise(a.hidden, norm_, a.normed);
        show(config_.layers, a.normed);
        cache.end_step(kvcull::StepInputs{.tokens = tokens, .hidden = {a.normed.data(), n, config_.hidden}});
        head(which == Logits::all ? n : 1, a, logits);
    }

  private:
    /// What a call carries from layer to layer, a row per token.
    struct Activations {
        RowMajorMatrix hidden, normed, qkv, attended, gate_up, product;
    };
    [[nodiscard]] Activations embed(std::span<const int> tokens) const;
    /// hidden -> q, k, v, with q and k rotated to the positions of the tokens.
    void project(std::size_t layer, kvcull::position_t position, Activations& a) const;
    /// Adds attention and the SwiGLU block to hidden.
    void finish(std::size_t layer, Activations& a) const;
    /// Logits of the last rows from final hidden states.
    void head(std::size_t rows, const Activations& a, RowMajorMatrix& logits) const;
    void normalise(const RowMajorMatrix& x, const RowVector& weight, RowMajorMatrix& out) const;

    Config config_;
    std::vector<Layer> layers_;
    RowMajorMatrix embedding_, head_;  ///< [vocabulary, hidden]; no head_ if it is the embedding
    RowVector norm_;
};

}  // namespace tiny_llama
