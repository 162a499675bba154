#pragma once
/// The retention gate of TRIM-KV (arXiv 2512.03324): a small network per layer that reads a token once and
/// gives every KV head log beta <= 0, the logarithm of what each later step leaves of the token's worth.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <string_view>

#include "../base/error.hpp"
#include "../base/memory.hpp"
#include "../simd/kernels.hpp"
#include "../views.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Weights of one layer, `[out, in]`, or gradients of the same shapes. Variant rg: z = w_out silu(w1 x + b1)
/// + bias. Variant rg10 has a second hidden layer, silu(w2 u + b2); `w2` and `b2` are empty without it.
template <class T>
struct RetentionGate {
    MatrixView<T> w1;     // [F, D]
    std::span<T> b1;      // [F]
    MatrixView<T> w2;     // [F, F]
    std::span<T> b2;      // [F]
    MatrixView<T> w_out;  // [kv_heads, F]
    std::span<T> bias;    // [kv_heads]

    constexpr operator RetentionGate<const T>() const noexcept { return {w1, b1, w2, b2, w_out, bias}; }
    [[nodiscard]] constexpr std::size_t input() const noexcept { return w1.cols; }
    [[nodiscard]] constexpr std::size_t width() const noexcept { return w1.rows; }
    [[nodiscard]] constexpr std::size_t kv_heads() const noexcept { return w_out.rows; }
    [[nodiscard]] constexpr bool deep() const noexcept { return !w2.empty(); }
    /// Calls `visit(name, numbers, decays)` for every tensor whose rows lie together; weights decay, biases
    /// do not.
    template <class Visit>
    constexpr void for_each_tensor(const Visit& visit) const {
        visit(std::string_view("w1"), whole(w1), true);
        visit(std::string_view("b1"), b1, false);
        if (deep()) {
            visit(std::string_view("w2"), whole(w2), true);
            visit(std::string_view("b2"), b2, false);
        }
        visit(std::string_view("w_out"), whole(w_out), true);
        visit(std::string_view("bias"), bias, false);
    }

  private:
    static constexpr std::span<T> whole(const MatrixView<T>& matrix) noexcept {
        return {matrix.data, matrix.rows * matrix.cols};
    }
};

namespace detail {
/// @throws shape_error that names the tensor.
template <class T>
void check_gate(std::string_view where, const RetentionGate<T>& gate) {
    const auto matrix = [&](std::string_view name, const MatrixView<T>& got, std::size_t rows,
                            std::size_t cols) {
        check_size(where, text(name, ".rows"), got.rows, rows);
        check_size(where, text(name, ".cols"), got.cols, cols);
    };
    check<error::shape_error>(!gate.w1.empty(), where, "w1", "empty", "[F, D]");
    check_size(where, "b1.size()", gate.b1.size(), gate.width());
    if (gate.deep()) matrix("w2", gate.w2, gate.width(), gate.width());
    check_size(where, "b2.size()", gate.b2.size(), gate.deep() ? gate.width() : std::size_t{0});
    matrix("w_out", gate.w_out, gate.kv_heads(), gate.width());
    check<error::shape_error>(!gate.w_out.empty(), where, "w_out", "empty", "[kv_heads, F]");
    check_size(where, "bias.size()", gate.bias.size(), gate.kv_heads());
}
}  // namespace detail

/// 1 / (1 + e^-x), without an infinity on the way.
template <class T>
[[nodiscard]] T sigmoid(T x) noexcept {
    const T e = std::exp(x < 0 ? x : -x);
    return (x < 0 ? e : T{1}) / (T{1} + e);
}
template <class T>
[[nodiscard]] T silu(T x) noexcept {
    return x * sigmoid(x);
}
/// log(1 / (1 + e^-z)): exact where the sigmoid itself would round to 1.
template <class T>
[[nodiscard]] T log_sigmoid(T z) noexcept {
    return std::min(z, T{0}) - std::log1p(std::exp(z < 0 ? z : -z));
}

/// Tokens that the gate takes at a time.
inline constexpr std::size_t gate_tile = 16;
/// Floats of scratch that `gate_logits` takes.
[[nodiscard]] constexpr std::size_t gate_scratch(std::size_t width, std::size_t kv_heads) noexcept {
    return gate_tile * (2 * width + kv_heads);
}

/// z of every head and token: log beta is its log_sigmoid. Float sums. Cost: 2 F (D + kv_heads) operations
/// per token, 2 F^2 more for rg10. @param x [c, D] @param z [kv_heads, c]
/// @throws shape_error
inline void gate_logits(const simd::Kernels& kernels, const RetentionGate<const float>& gate,
                        MatrixView<const float> x, MatrixView<float> z, Scratch<float>& workspace) {
    constexpr std::string_view where = "gate_logits";
    detail::check_size(where, "x.cols", x.cols, gate.input());
    detail::check_size(where, "z.rows", z.rows, gate.kv_heads());
    detail::check_size(where, "z.cols", z.cols, x.rows);
    const std::size_t width = gate.width(), heads = gate.kv_heads();
    float* const first = workspace.get(gate_scratch(width, heads));
    float* const second = first + gate_tile * width;
    float* const last = second + gate_tile * width;
    const auto layer = [&](MatrixView<const float> in, const MatrixView<const float>& weight,
                           std::span<const float> bias, float* out) {
        kernels.dots_f32(in.data, in.stride, in.rows, weight.data, weight.stride, weight.rows, weight.cols,
                         1.0F, out, weight.rows);
        for (std::size_t i = 0; i < in.rows; ++i)
            for (std::size_t j = 0; j < weight.rows; ++j) out[i * weight.rows + j] += bias[j];
    };
    const auto activate = [](float* u, std::size_t n) {
        for (std::size_t i = 0; i < n; ++i) u[i] = silu(u[i]);
    };
    for (std::size_t at = 0; at < x.rows; at += gate_tile) {
        const std::size_t tokens = std::min(gate_tile, x.rows - at);
        const float* hidden = first;
        layer({x[at].data(), tokens, x.cols, x.stride}, gate.w1, gate.b1, first);
        activate(first, tokens * width);
        if (gate.deep()) {
            layer({first, tokens, width}, gate.w2, gate.b2, second);
            activate(second, tokens * width);
            hidden = second;
        }
        layer({hidden, tokens, width}, gate.w_out, gate.bias, last);
        for (std::size_t i = 0; i < tokens; ++i)
            for (std::size_t h = 0; h < heads; ++h) z[h][at + i] = last[i * heads + h];
    }
}

}  // namespace kvcull::inline KVCULL_ABI
