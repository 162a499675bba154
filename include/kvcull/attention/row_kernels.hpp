#pragma once
/// The kernels that read cached rows, chosen by the rows' element type, and the walk along paged rows
/// that tells them what comes next.

#include <algorithm>
#include <cstddef>

#include "../simd/kernels.hpp"
#include "../views.hpp"
#include "columns.hpp"

namespace kvcull::inline KVCULL_ABI::detail {

inline constexpr std::size_t piece_bytes = 8192;

/// Rows of a piece of `for_each_piece`, from the bytes between rows.
[[nodiscard]] constexpr std::size_t rows_per_piece(std::size_t row_bytes) noexcept {
    return std::max<std::size_t>(piece_bytes / std::max<std::size_t>(row_bytes, 1) / 8 * 8, 8);
}
/// Calls `visit(Run, next)` for pieces of about 8 KiB that cover rows `begin .. end - 1`, in order; `next` is
/// where the piece after it starts, `after` at the end. A kernel that fetches `next` while it computes keeps
/// memory busy; the hardware's own prefetch stops at every block and is too timid when several queries share
/// a row.
template <class Visit>
void for_each_piece(const RowsView& rows, std::size_t begin, std::size_t end, const Visit& visit,
                    const std::byte* after = nullptr) {
    const std::size_t piece_rows = rows.are_columns()
                                       ? std::max<std::size_t>(column_bytes / rows.row_bytes(), 1)
                                       : rows_per_piece(rows.stride() * size_of(rows.dtype()));
    const auto piece_at = [&](std::size_t first) {
        RowsView::Run run = rows.run_at(first);
        run.rows = std::min({run.rows, piece_rows, end - first});
        return run;
    };
    if (begin >= end) return;
    RowsView::Run piece = piece_at(begin);
    for (std::size_t next = begin + piece.rows; next < end;) {
        const RowsView::Run following = piece_at(next);
        visit(piece, following.data);
        piece = following;
        next += piece.rows;
    }
    visit(piece, after);
}

/// out[g * out_stride + j] = scale * (q_g . row j of the run), g < group.
inline void dots(const simd::Kernels& kernels, const float* q, std::size_t q_stride, std::size_t group,
                 const RowsView& rows, const RowsView::Run& run, float scale, float* out,
                 std::size_t out_stride, const std::byte* next = nullptr) noexcept {
    for_each_stored(rows, run, next,
                    [&](const std::byte* data, std::size_t stride, std::size_t first, std::size_t count,
                        const std::byte* ahead) {
                        const auto run_on = [&]<class T>(const auto& kernel, const T* k) {
                            kernel(q, q_stride, group, k, stride, count, rows.dim(), scale, out + first,
                                   out_stride, ahead);
                        };
                        switch (rows.dtype()) {
                            case DType::f32:
                                return run_on(kernels.dots_f32, reinterpret_cast<const float*>(data));
                            case DType::f16:
                                return run_on(kernels.dots_f16, reinterpret_cast<const float16*>(data));
                            case DType::bf16:
                                return run_on(kernels.dots_bf16, reinterpret_cast<const bfloat16*>(data));
                            case DType::int8:
                                return run_on(kernels.dots_int8, reinterpret_cast<const int8_group*>(data));
                            case DType::int4:
                                return run_on(kernels.dots_int4, reinterpret_cast<const int4_group*>(data));
                        }
                    });
}

/// out[g * out_stride + c] += sum over the run's rows j of w[g * w_stride + j] * row j [c].
inline void weighted_sum(const simd::Kernels& kernels, const float* w, std::size_t w_stride,
                         std::size_t group, const RowsView& rows, const RowsView::Run& run, float* out,
                         std::size_t out_stride, const std::byte* next = nullptr) noexcept {
    for_each_stored(
        rows, run, next,
        [&](const std::byte* data, std::size_t stride, std::size_t first, std::size_t count,
            const std::byte* ahead) {
            const auto run_on = [&]<class T>(const auto& kernel, const T* v) {
                kernel(w + first, w_stride, group, v, stride, count, rows.dim(), out, out_stride, ahead);
            };
            switch (rows.dtype()) {
                case DType::f32:
                    return run_on(kernels.weighted_sum_f32, reinterpret_cast<const float*>(data));
                case DType::f16:
                    return run_on(kernels.weighted_sum_f16, reinterpret_cast<const float16*>(data));
                case DType::bf16:
                    return run_on(kernels.weighted_sum_bf16, reinterpret_cast<const bfloat16*>(data));
                case DType::int8:
                    return run_on(kernels.weighted_sum_int8, reinterpret_cast<const int8_group*>(data));
                case DType::int4:
                    return run_on(kernels.weighted_sum_int4, reinterpret_cast<const int4_group*>(data));
            }
        });
}

/// out[g * out_stride + j] = |row j of the run - o_g|^2, or |row j + z[g * z_stride + j] (row j - o_g)|^2.
inline void distances(const simd::Kernels& kernels, const float* o, std::size_t o_stride, std::size_t group,
                      const RowsView& rows, const RowsView::Run& run, const float* z, std::size_t z_stride,
                      float* out, std::size_t out_stride, const std::byte* next = nullptr) noexcept {
    for_each_stored(
        rows, run, next,
        [&](const std::byte* data, std::size_t stride, std::size_t first, std::size_t count,
            const std::byte* ahead) {
            const auto run_on = [&]<class T>(const auto& kernel, const T* v) {
                kernel(o, o_stride, group, v, stride, count, rows.dim(), z == nullptr ? nullptr : z + first,
                       z_stride, out + first, out_stride, ahead);
            };
            switch (rows.dtype()) {
                case DType::f32:
                    return run_on(kernels.distances_f32, reinterpret_cast<const float*>(data));
                case DType::f16:
                    return run_on(kernels.distances_f16, reinterpret_cast<const float16*>(data));
                case DType::bf16:
                    return run_on(kernels.distances_bf16, reinterpret_cast<const bfloat16*>(data));
                case DType::int8:
                    return run_on(kernels.distances_int8, reinterpret_cast<const int8_group*>(data));
                case DType::int4:
                    return run_on(kernels.distances_int4, reinterpret_cast<const int4_group*>(data));
            }
        });
}

}  // namespace kvcull::inline KVCULL_ABI::detail
