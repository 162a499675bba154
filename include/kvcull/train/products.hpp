#pragma once
/// The three matrix products of a forward and a backward pass, over views. In float by the library's kernels,
/// so sums are float; in double, for checks of gradients, by plain loops.

#include <cstddef>
#include <type_traits>
#include <vector>

#include "../base/error.hpp"
#include "../simd/kernels.hpp"
#include "../views.hpp"

namespace kvcull::inline KVCULL_ABI::train {

/// An argument that is only read; the element type follows from the others.
template <class T>
using In = MatrixView<const std::type_identity_t<T>>;

/// c[m, n] = scale * a[m, k] b[n, k]^T
template <class T>
void product_transposed(In<T> a, In<T> b, MatrixView<T> c, std::type_identity_t<T> scale = 1) {
    constexpr std::string_view where = "product_transposed";
    detail::check_size(where, "b.cols", b.cols, a.cols);
    detail::check_size(where, "c.rows", c.rows, a.rows);
    detail::check_size(where, "c.cols", c.cols, b.rows);
    if constexpr (std::is_same_v<T, float>) {
        simd::kernels().dots_f32(a.data, a.stride, a.rows, b.data, b.stride, b.rows, b.cols, scale, c.data,
                                 c.stride);
    } else {
        for (std::size_t i = 0; i < c.rows; ++i)
            for (std::size_t j = 0; j < c.cols; ++j) {
                T sum = 0;
                for (std::size_t l = 0; l < a.cols; ++l) sum += a[i][l] * b[j][l];
                c[i][j] = scale * sum;
            }
    }
}

/// c[m, n] += a[m, k] b[k, n]
template <class T>
void add_product(In<T> a, In<T> b, MatrixView<T> c) {
    constexpr std::string_view where = "add_product";
    detail::check_size(where, "b.rows", b.rows, a.cols);
    detail::check_size(where, "c.rows", c.rows, a.rows);
    detail::check_size(where, "c.cols", c.cols, b.cols);
    if constexpr (std::is_same_v<T, float>) {
        simd::kernels().weighted_sum_f32(a.data, a.stride, a.rows, b.data, b.stride, b.rows, b.cols, c.data,
                                         c.stride);
    } else {
        for (std::size_t i = 0; i < a.rows; ++i)
            for (std::size_t l = 0; l < a.cols; ++l)
                for (std::size_t j = 0; j < b.cols; ++j) c[i][j] += a[i][l] * b[l][j];
    }
}

/// c[m, n] += a[k, m]^T b[k, n]. Takes a copy of `a`.
template <class T>
void add_transposed_product(In<T> a, In<T> b, MatrixView<T> c) {
    detail::check_size("add_transposed_product", "b.rows", b.rows, a.rows);
    std::vector<T> turned(a.rows * a.cols);
    for (std::size_t l = 0; l < a.rows; ++l)
        for (std::size_t i = 0; i < a.cols; ++i) turned[i * a.rows + l] = a[l][i];
    add_product<T>(MatrixView<const T>(turned.data(), a.cols, a.rows), b, c);
}

}  // namespace kvcull::inline KVCULL_ABI::train
