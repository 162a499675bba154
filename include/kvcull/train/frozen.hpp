#pragma once
/// The parts of a frozen Llama layer that a gradient passes through on its way to earlier gates. Weights get
/// none.

#include <cmath>
#include <cstddef>
#include <span>
#include <string_view>

#include "../score/gate.hpp"
#include "products.hpp"

namespace kvcull::inline KVCULL_ABI::train {

/// out = x * weight / sqrt(mean(x^2) + eps), row by row.
template <class T>
void rms_norm(In<T> x, std::span<const std::type_identity_t<T>> weight, double eps, MatrixView<T> out) {
    constexpr std::string_view where = "rms_norm";
    detail::check_size(where, "weight.size()", weight.size(), x.cols);
    detail::check_size(where, "out.rows", out.rows, x.rows);
    detail::check_size(where, "out.cols", out.cols, x.cols);
    for (std::size_t t = 0; t < x.rows; ++t) {
        const auto row = x[t];
        double square = 0.0;
        for (const T r : row) square += static_cast<double>(r) * static_cast<double>(r);
        const auto m = static_cast<T>(1.0 / std::sqrt(square / static_cast<double>(x.cols) + eps));
        for (std::size_t c = 0; c < x.cols; ++c) out[t][c] = row[c] * weight[c] * m;
    }
}
/// Adds to d_x what d_out makes of it.
template <class T>
void rms_norm_backward(In<T> x, std::span<const std::type_identity_t<T>> weight, double eps, In<T> d_out,
                       MatrixView<T> d_x) {
    constexpr std::string_view where = "rms_norm_backward";
    detail::check_size(where, "weight.size()", weight.size(), x.cols);
    detail::check_size(where, "d_out.rows", d_out.rows, x.rows);
    detail::check_size(where, "d_out.cols", d_out.cols, x.cols);
    detail::check_size(where, "d_x.rows", d_x.rows, x.rows);
    detail::check_size(where, "d_x.cols", d_x.cols, x.cols);
    const auto width = static_cast<double>(x.cols);
    for (std::size_t t = 0; t < x.rows; ++t) {
        double square = 0.0, along = 0.0;
        for (std::size_t c = 0; c < x.cols; ++c) {
            const auto r = static_cast<double>(x[t][c]);
            square += r * r;
            along += static_cast<double>(d_out[t][c]) * static_cast<double>(weight[c]) * r;
        }
        const double m = 1.0 / std::sqrt(square / width + eps), back = m * m * m * along / width;
        for (std::size_t c = 0; c < x.cols; ++c)
            d_x[t][c] +=
                static_cast<T>(m * static_cast<double>(d_out[t][c]) * static_cast<double>(weight[c]) -
                               back * static_cast<double>(x[t][c]));
    }
}

/// out = silu(gate) * up
template <class T>
void swiglu(In<T> gate, In<T> up, MatrixView<T> out) {
    for (std::size_t t = 0; t < out.rows; ++t)
        for (std::size_t c = 0; c < out.cols; ++c) out[t][c] = silu(gate[t][c]) * up[t][c];
}
/// Gradients of its two inputs, overwritten; they may be the inputs themselves.
template <class T>
void swiglu_backward(In<T> gate, In<T> up, In<T> d_out, MatrixView<T> d_gate, MatrixView<T> d_up) {
    for (std::size_t t = 0; t < d_out.rows; ++t)
        for (std::size_t c = 0; c < d_out.cols; ++c) {
            const T g = gate[t][c], u = up[t][c], s = sigmoid(g), e = d_out[t][c];
            d_gate[t][c] = e * u * s * (T{1} + g * (T{1} - s));
            d_up[t][c] = e * g * s;
        }
}

}  // namespace kvcull::inline KVCULL_ABI::train
