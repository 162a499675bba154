#pragma once
/// Squared distances of a head's rows from the outputs of its group: what scores that ask for the effect on
/// an output spend their time on.

#include <cstddef>

#include "../attention/row_kernels.hpp"
#include "../views.hpp"

namespace kvcull::inline KVCULL_ABI::detail {

/// Rows whose distances are taken before anybody looks at them: enough to pay for the calls, few enough for
/// the rows to stay in second-level cache while more query rows go over them.
inline constexpr std::size_t distance_rows = 256;

/// Outputs of a group, and what their products with rows become distances by.
struct Outputs {
    MatrixView<const float> points = {};  ///< [G, d]
    const float* squares = nullptr;       ///< [G]: |o_g|^2; needed with norms
};

/// square[g * distance_rows + j - begin] = |v_j - o_g|^2, or with z[g, j - begin] |v_j + z (v_j - o_g)|^2,
/// for rows `begin .. end - 1`, at most `distance_rows` of them. With norms, by way of products, which take
/// half the arithmetic of differences, or a third with `z`; in blocks where some cancel, by differences.
/// @param norm  |v_j|^2 of those rows, or nullptr @param spare  G * distance_rows floats, used with norms
inline void squared_distances(const simd::Kernels& kernels, const Outputs& outputs, const RowsView& v,
                              std::size_t begin, std::size_t end, const float* norm,
                              MatrixView<const float> z, float* square, float* spare) noexcept {
    const MatrixView<const float>& points = outputs.points;
    const std::byte* const after = end < v.rows() ? v.run_at(end).data : nullptr;
    const auto for_pieces = [&](const auto& visit) { for_each_piece(v, begin, end, visit, after); };
    const auto by_differences = [&](float* out) {
        for_pieces([&](const RowsView::Run& piece, const std::byte* next) {
            const std::size_t at = piece.first - begin;
            distances(kernels, points.data, points.stride, points.rows, v, piece,
                      z.data == nullptr ? nullptr : z.data + at, z.stride, out + at, distance_rows, next);
        });
    };
    if (norm == nullptr) return by_differences(square);
    for_pieces([&](const RowsView::Run& piece, const std::byte* next) {
        dots(kernels, points.data, points.stride, points.rows, v, piece, 1.0F, square + (piece.first - begin),
             distance_rows, next);
    });
    bool all = true;
    for (std::size_t g = 0; g < points.rows; ++g)
        all &= kernels.expand_squares(square + g * distance_rows, norm,
                                      z.data == nullptr ? nullptr : z.data + g * z.stride, outputs.squares[g],
                                      end - begin);
    if (all) return;
    by_differences(spare);
    for (std::size_t g = 0; g < points.rows; ++g)
        for (std::size_t i = g * distance_rows; i < g * distance_rows + (end - begin); ++i)
            if (square[i] < 0.0F) square[i] = spare[i];
}

}  // namespace kvcull::inline KVCULL_ABI::detail
