#pragma once
/// int8 and int4 rows as floats, some at a time, for the kernels of floats: what these give over a row is,
/// bit for bit, what they give over its widened copy. Widening costs little beside several queries that share
/// a row, and the floats stay in first-level cache.

#include <algorithm>
#include <cstddef>

#include "../base/quantised.hpp"
#include "../simd/kernels.hpp"
#include "../views.hpp"

namespace kvcull::inline KVCULL_ABI::detail {

[[nodiscard]] constexpr bool is_grouped(DType type) noexcept {
    return channels_of(type) > 1;
}

/// Floats on the stack.
inline constexpr std::size_t wide_floats = 4096;

/// Channels `channel .. channel + channels - 1` of rows `row .. row + rows - 1` of a run.
struct WideRows {
    const float* data;
    std::size_t stride, row, rows, channel, channels;
};

/// Calls `visit(WideRows)` so that all of the run is covered, rows in order and channels in order within a
/// row. Rows of more than `wide_floats` channels come one by one, in several parts.
template <class Visit>
void for_each_wide(const simd::Kernels& kernels, const RowsView& rows, const RowsView::Run& run,
                   const std::byte* next, const Visit& visit) noexcept {
    alignas(64) float wide[wide_floats];
    const std::size_t dim = rows.dim(), part = std::min(dim, wide_floats), stride = (part + 15) / 16 * 16;
    const std::size_t most = wide_floats / stride, step = rows.stride() * size_of(rows.dtype());
    for (std::size_t row = 0; row < run.rows; row += most) {
        const std::size_t count = std::min(most, run.rows - row);
        for (std::size_t c = 0; c < dim; c += part) {
            const std::size_t channels = std::min(part, dim - c);
            const std::byte* const from = run.data + row * step + row_bytes(rows.dtype(), c);
            const void* const then = next == nullptr ? nullptr : next + (from - run.data);
            if (rows.dtype() == DType::int8)
                kernels.widen_int8(reinterpret_cast<const int8_group*>(from), rows.stride(), count, channels,
                                   wide, stride, then);
            else
                kernels.widen_int4(reinterpret_cast<const int4_group*>(from), rows.stride(), count, channels,
                                   wide, stride, then);
            visit(WideRows{wide, stride, row, count, c, channels});
        }
    }
}

/// The same for what sums over channels. `kernel(first query, queries, WideRows, out, out_stride)` gives the
/// sums of some of the `group` queries; those over the parts of a long row are added in order.
template <class Kernel>
void sum_wide(const simd::Kernels& kernels, std::size_t group, const RowsView& rows, const RowsView::Run& run,
              float* out, std::size_t out_stride, const std::byte* next, const Kernel& kernel) noexcept {
    for_each_wide(kernels, rows, run, next, [&](const WideRows& wide) {
        float* const to = out + wide.row;
        if (wide.channel == 0) return kernel(std::size_t{0}, group, wide, to, out_stride);
        for (std::size_t g = 0; g < group; ++g) {
            float part = 0;
            kernel(g, std::size_t{1}, wide, &part, out_stride);
            to[g * out_stride] += part;
        }
    });
}

}  // namespace kvcull::inline KVCULL_ABI::detail
