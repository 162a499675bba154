#pragma once
/// Forward and backward pass of a retention gate, and memory for its weights.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <string_view>
#include <vector>

#include "../score/gate.hpp"
#include "products.hpp"

namespace kvcull::inline KVCULL_ABI::train {

/// Weights of a gate, or gradients, or moments of an optimiser, in one piece of memory.
template <class T>
class GateTensors {
  public:
    /// One tensor's numbers.
    struct Part {
        std::string_view name;
        std::size_t first, size;
        bool decays;  // weights do, biases do not
    };

    GateTensors(std::size_t input, std::size_t width, std::size_t kv_heads, bool deep = false)
        : input_(input),
          width_(width),
          kv_heads_(kv_heads),
          deep_(deep),
          values_(width * (input + 1) + (deep ? width * (width + 1) : 0) + kv_heads * (width + 1)) {}

    [[nodiscard]] std::span<T> values() noexcept { return values_; }
    [[nodiscard]] std::span<const T> values() const noexcept { return values_; }
    [[nodiscard]] RetentionGate<T> view() noexcept { return view_of(values_.data()); }
    [[nodiscard]] RetentionGate<const T> view() const noexcept { return view_of(values_.data()); }
    /// In the order of `values`.
    [[nodiscard]] std::vector<Part> parts() const {
        std::vector<Part> all;
        const T* const begin = values_.data();
        view().for_each_tensor([&](std::string_view name, std::span<const T> numbers, bool decays) {
            all.push_back({name, static_cast<std::size_t>(numbers.data() - begin), numbers.size(), decays});
        });
        return all;
    }

  private:
    template <class Number>
    [[nodiscard]] RetentionGate<Number> view_of(Number* next) const noexcept {
        const auto take = [&](std::size_t count) {
            Number* const here = next;
            next += count;
            return here;
        };
        RetentionGate<Number> gate;
        gate.w1 = {take(width_ * input_), width_, input_};
        gate.b1 = {take(width_), width_};
        if (deep_) {
            gate.w2 = {take(width_ * width_), width_, width_};
            gate.b2 = {take(width_), width_};
        }
        gate.w_out = {take(kv_heads_ * width_), kv_heads_, width_};
        gate.bias = {take(kv_heads_), kv_heads_};
        return gate;
    }

    std::size_t input_, width_, kv_heads_;
    bool deep_;
    std::vector<T> values_;
};

/// What the forward pass over T tokens leaves for the backward pass.
template <class T>
struct GateTrace {
    std::vector<T> a1, u1, a2, u2;  // [T, F]: before and after the activation; the second pair for rg10
    std::vector<T> z;               // [T, kv_heads]
};

/// out[T, n] = in[T, m] weight[n, m]^T + bias[n]
template <class T>
void affine(In<T> in, In<T> weight, std::span<const T> bias, std::vector<T>& out) {
    out.resize(in.rows * weight.rows);
    const MatrixView<T> view(out.data(), in.rows, weight.rows);
    product_transposed<T>(in, weight, view);
    for (std::size_t t = 0; t < view.rows; ++t)
        for (std::size_t j = 0; j < view.cols; ++j) view[t][j] += bias[j];
}
/// Adds the gradients; that of `in` only if d_in is not empty.
template <class T>
void affine_backward(In<T> in, In<T> weight, In<T> d_out, MatrixView<T> d_weight, std::span<T> d_bias,
                     MatrixView<T> d_in) {
    add_transposed_product<T>(d_out, in, d_weight);
    for (std::size_t t = 0; t < d_out.rows; ++t)
        for (std::size_t j = 0; j < d_out.cols; ++j) d_bias[j] += d_out[t][j];
    if (!d_in.empty()) add_product<T>(d_out, weight, d_in);
}
/// u = silu(a)
template <class T>
void activate(const std::vector<T>& a, std::vector<T>& u) {
    u.resize(a.size());
    for (std::size_t i = 0; i < a.size(); ++i) u[i] = silu(a[i]);
}
/// du -> da, in place.
template <class T>
void silu_backward(const std::vector<T>& a, std::vector<T>& d) {
    for (std::size_t i = 0; i < a.size(); ++i) {
        const T s = sigmoid(a[i]);
        d[i] *= s * (T{1} + a[i] * (T{1} - s));
    }
}

/// log_beta[kv_heads, T] of x[T, D]. @throws shape_error
template <class T>
void gate_forward(const RetentionGate<const std::type_identity_t<T>>& gate, In<T> x, GateTrace<T>& trace,
                  MatrixView<T> log_beta) {
    constexpr std::string_view where = "gate_forward";
    detail::check_gate(where, gate);
    detail::check_size(where, "x.cols", x.cols, gate.input());
    detail::check_size(where, "log_beta.rows", log_beta.rows, gate.kv_heads());
    detail::check_size(where, "log_beta.cols", log_beta.cols, x.rows);
    affine<T>(x, gate.w1, gate.b1, trace.a1);
    activate(trace.a1, trace.u1);
    MatrixView<const T> hidden(trace.u1.data(), x.rows, gate.width());
    if (gate.deep()) {
        affine<T>(hidden, gate.w2, gate.b2, trace.a2);
        activate(trace.a2, trace.u2);
        hidden = {trace.u2.data(), x.rows, gate.width()};
    }
    affine<T>(hidden, gate.w_out, gate.bias, trace.z);
    for (std::size_t h = 0; h < log_beta.rows; ++h)
        for (std::size_t t = 0; t < x.rows; ++t) log_beta[h][t] = log_sigmoid(trace.z[t * log_beta.rows + h]);
}

/// Adds to `d_gate`, and to d_x[T, D] unless it is empty, what d_log_beta[kv_heads, T] makes of them.
/// 1 - beta is sigmoid(-z), which does not vanish where beta rounds to 1. @throws shape_error
template <class T>
void gate_backward(const RetentionGate<const std::type_identity_t<T>>& gate, In<T> x,
                   const GateTrace<T>& trace, In<T> d_log_beta, const RetentionGate<T>& d_gate,
                   MatrixView<T> d_x) {
    constexpr std::string_view where = "gate_backward";
    const std::size_t tokens = x.rows, heads = gate.kv_heads(), width = gate.width();
    detail::check_gate(where, d_gate);
    detail::check_size(where, "d_gate.w1.rows", d_gate.width(), width);
    detail::check_size(where, "d_gate.w1.cols", d_gate.input(), gate.input());
    detail::check_size(where, "d_gate.w2.rows", d_gate.w2.rows, gate.w2.rows);
    detail::check_size(where, "d_gate.w_out.rows", d_gate.kv_heads(), heads);
    detail::check_size(where, "trace.z.size()", trace.z.size(), tokens * heads);
    detail::check_size(where, "d_log_beta.rows", d_log_beta.rows, heads);
    detail::check_size(where, "d_log_beta.cols", d_log_beta.cols, tokens);
    std::vector<T> dz(trace.z.size()), d2(gate.deep() ? tokens * width : 0), d1(tokens * width);
    for (std::size_t t = 0; t < tokens; ++t)
        for (std::size_t h = 0; h < heads; ++h)
            dz[t * heads + h] = d_log_beta[h][t] * sigmoid(-trace.z[t * heads + h]);
    const auto wide = [&](auto& values) { return MatrixView(values.data(), tokens, width); };
    affine_backward<T>(wide(gate.deep() ? trace.u2 : trace.u1), gate.w_out, {dz.data(), tokens, heads},
                       d_gate.w_out, d_gate.bias, wide(gate.deep() ? d2 : d1));
    if (gate.deep()) {
        silu_backward(trace.a2, d2);
        affine_backward<T>(wide(trace.u1), gate.w2, wide(d2), d_gate.w2, d_gate.b2, wide(d1));
    }
    silu_backward(trace.a1, d1);
    affine_backward<T>(x, gate.w1, wide(d1), d_gate.w1, d_gate.b1, d_x);
}

}  // namespace kvcull::inline KVCULL_ABI::train
