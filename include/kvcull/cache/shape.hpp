#pragma once
/// The shape of a cache, and what a call may bring beside keys and values.

#include <cmath>
#include <cstddef>
#include <functional>
#include <span>
#include <vector>

#include "../base/error.hpp"
#include "../views.hpp"

namespace kvcull::inline KVCULL_ABI {

/// What sets one layer apart. The policy has no say in a layer with a window, nor in one that it shall spare.
struct LayerTraits {
    /// > 0: a token sees itself and the `window - 1` positions before it. Rows that no later token can see
    /// leave, every `window / 8` rows at once: the layer holds at most so many more than its window.
    std::size_t window = 0;
    bool evicts = true;  // false: all rows stay

    [[nodiscard]] constexpr bool spared() const noexcept { return window > 0 || !evicts; }
    /// Rows of a layer with a window beyond which it is cut down to it.
    [[nodiscard]] constexpr std::size_t most_rows() const noexcept { return window + window / 8; }
    /// The first position that a token at `query` may see.
    [[nodiscard]] constexpr position_t first_seen(position_t query) const noexcept {
        return window == 0 ? 0 : query - static_cast<position_t>(window) + 1;
    }
};

/// What all layers share, and what does not. Query head h reads KV head h / (q_heads / kv_heads).
struct CacheShape {
    std::size_t layers = 0, q_heads = 0, kv_heads = 0, head_dim = 0;
    std::size_t value_dim = 0;  // 0: head_dim
    DType dtype = DType::f32;   // of cached rows
    float scale = 0.0F;         // of logits; 0: 1 / sqrt(head_dim)
    float softcap = 0.0F;       // > 0: logits become softcap * tanh(logit / softcap)
    /// Values are the first `value_dim` channels of their keys, as in multi-head latent attention: stored
    /// once.
    bool latent = false;
    std::vector<LayerTraits> traits = {};  // [layers], or empty: all layers are alike

    [[nodiscard]] constexpr std::size_t group() const noexcept { return q_heads / kv_heads; }
    [[nodiscard]] constexpr std::size_t heads() const noexcept { return layers * kv_heads; }
    [[nodiscard]] constexpr std::size_t values() const noexcept {
        return value_dim == 0 ? head_dim : value_dim;
    }
    /// Bytes of one row of one head: key, value and position.
    [[nodiscard]] constexpr std::size_t row_bytes() const noexcept {
        return kvcull::row_bytes(dtype, head_dim) + (latent ? 0 : kvcull::row_bytes(dtype, values())) +
               sizeof(position_t);
    }
    [[nodiscard]] constexpr LayerTraits layer(std::size_t index) const noexcept {
        return traits.empty() ? LayerTraits{} : traits[index];
    }
    [[nodiscard]] float logit_scale() const noexcept {
        return scale != 0.0F ? scale : 1.0F / std::sqrt(static_cast<float>(head_dim));
    }
};

/// What may come with the tokens of an append. All of it is optional unless a policy asks.
struct AppendInputs {
    std::span<const position_t> positions = {};    // [c] ascending, beyond all before; default: tokens seen
    MatrixView<const float> log_beta = {};         // [kv_heads, c] (TRIM-KV)
    MatrixView<const float> attention_input = {};  // [c, D]: what enters the q, k, v projections
};

/// Runs `body(0) .. body(count - 1)`, in any order and on any threads, and returns when all are done. What
/// takes longest comes first: a thread that is free should take the next index, not a share fixed before.
using Executor = std::function<void(std::size_t count, const std::function<void(std::size_t)>& body)>;

namespace detail {

inline CacheShape checked(CacheShape shape) {
    using error::config_error;
    constexpr std::string_view where = "CacheShape";
    constexpr std::size_t most_heads = std::size_t{1} << 31U;
    check<config_error>(shape.layers > 0, where, "layers", shape.layers, "at least 1");
    check<config_error>(shape.kv_heads > 0, where, "kv_heads", shape.kv_heads, "at least 1");
    check<config_error>(shape.layers <= most_heads / shape.kv_heads, where, "layers", shape.layers,
                        text("at most ", most_heads / shape.kv_heads, ", with kv_heads = ", shape.kv_heads));
    check<config_error>(shape.head_dim > 0, where, "head_dim", shape.head_dim, "at least 1");
    check<config_error>(shape.q_heads > 0 && shape.q_heads % shape.kv_heads == 0, where, "q_heads",
                        shape.q_heads, text("a multiple of kv_heads = ", shape.kv_heads));
    check<config_error>(is_finite(shape.scale), where, "scale", shape.scale, "a finite number");
    check<config_error>(!shape.latent || shape.values() <= shape.head_dim, where, "value_dim", shape.values(),
                        text("at most head_dim = ", shape.head_dim, ", as values are latent"));
    check<config_error>(is_finite(shape.softcap) && shape.softcap >= 0.0F, where, "softcap", shape.softcap,
                        "a positive number, or 0 for none");
    check<config_error>(shape.traits.empty() || shape.traits.size() == shape.layers, where, "traits.size()",
                        shape.traits.size(), text("layers = ", shape.layers, ", or 0"));
    for (std::size_t layer = 0; layer < shape.traits.size(); ++layer)
        check<config_error>(shape.traits[layer].window <= max_rows, where, text("traits[", layer, "].window"),
                            shape.traits[layer].window, text("at most ", max_rows, ", or 0 for none"));
    return shape;
}

template <class T>
void check_heads(std::string_view where, std::string_view name, const HeadsView<T>& view, std::size_t heads,
                 std::size_t tokens, std::size_t dim) {
    check_size(where, text(name, ".heads"), view.heads, heads);
    check_size(where, text(name, ".tokens"), view.tokens, tokens);
    check_size(where, text(name, ".dim"), view.dim, dim);
    check<error::shape_error>(view.data != nullptr, where, text(name, ".data"), "null", "a pointer");
}
/// Keys and values of new tokens. @returns the values: latent ones are the front of their keys.
inline HeadsView<const float> check_keys_values(std::string_view where, const CacheShape& shape,
                                                HeadsView<const float> k, const HeadsView<const float>& v,
                                                std::size_t tokens) {
    check_heads(where, "k", k, shape.kv_heads, tokens, shape.head_dim);
    if (!shape.latent) {
        check_heads(where, "v", v, shape.kv_heads, tokens, shape.values());
        return v;
    }
    check<error::shape_error>(v.empty(), where, "v", "given", "none: values are latent in k");
    k.dim = shape.values();
    return k;
}

}  // namespace detail

}  // namespace kvcull::inline KVCULL_ABI
