#pragma once
/// Geometry of keys and values: norms, and the direction that the keys of a head share.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>

#include "../attention/row_kernels.hpp"
#include "../base/memory.hpp"
#include "../views.hpp"

namespace kvcull::inline KVCULL_ABI {

/// |row|^2 in float: not finite if the row is not, or is so large that distances from it would not be.
[[nodiscard]] inline float squared_norm(const simd::Kernels& kernels, std::span<const float> row) noexcept {
    float square = 0.0F;
    kernels.dots_f32(row.data(), row.size(), 1, row.data(), row.size(), 1, row.size(), 1.0F, &square, 1);
    return square;
}

/// Euclidean norm of a row in float. Squares that leave float's range are added up in double instead.
[[nodiscard]] inline float euclidean_norm(const simd::Kernels& kernels, std::span<const float> row) noexcept {
    const float square = squared_norm(kernels, row);
    if (is_finite(square) && square > 1e-30F) return std::sqrt(square);
    double sum = 0.0;
    for (const float x : row) sum += static_cast<double>(x) * static_cast<double>(x);
    return static_cast<float>(std::sqrt(sum));
}

/// Sum of absolute values.
[[nodiscard]] inline float l1_norm(std::span<const float> row) noexcept {
    double sum = 0.0;
    for (const float x : row) sum += static_cast<double>(x < 0.0F ? -x : x);
    return static_cast<float>(sum);
}

/// Calls `visit(row index, widened row)` for rows `first ..` in order. The span is valid during the call.
template <class Visit>
void for_each_row(const RowsView& rows, std::size_t first, Scratch<float>& workspace, Visit&& visit) {
    const std::span<float> wide(workspace.get(rows.dim()), rows.dim());
    for (std::size_t j = first; j < rows.rows(); ++j) {
        rows.widen(j, wide);
        visit(j, std::span<const float>(wide));
    }
}

/// 1 / |row|; 1e12 for a row of zeros, whose products are 0 all the same.
[[nodiscard]] inline float inverse_norm(const simd::Kernels& kernels, std::span<const float> row) noexcept {
    return 1.0F / std::max(euclidean_norm(kernels, row), 1e-12F);
}

/// Cosine of every row with the mean of all unit rows; out[n]. A zero row has cosine 0.
/// @param inverse  [n], inverse_norm of each row. Cost: two passes over the rows, O(n d). Memory: n + d
/// floats of `workspace`.
inline void cosine_to_mean(const simd::Kernels& kernels, const RowsView& rows, std::span<const float> inverse,
                           std::span<float> out, Scratch<float>& workspace) {
    const std::size_t n = rows.rows(), dim = rows.dim();
    if (n == 0) return;
    float* const product = workspace.get(n + dim);
    float* const anchor = product + n;
    std::fill(anchor, anchor + dim, 0.0F);
    detail::for_each_piece(rows, 0, n, [&](const RowsView::Run& piece, const std::byte* next) {
        detail::weighted_sum(kernels, inverse.data() + piece.first, n, 1, rows, piece, anchor, dim, next);
    });
    const float scale = inverse_norm(kernels, {anchor, dim});
    detail::for_each_piece(rows, 0, n, [&](const RowsView::Run& piece, const std::byte* next) {
        detail::dots(kernels, anchor, dim, 1, rows, piece, scale, product + piece.first, n, next);
    });
    for (std::size_t j = 0; j < n; ++j) out[j] = product[j] * inverse[j];
}

}  // namespace kvcull::inline KVCULL_ABI
