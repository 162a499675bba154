#pragma once
/// Kernels over int8 and int4 rows by the kernels over floats: rows are widened some at a time into floats
/// that stay in first-level cache. What comes out is, bit for bit, what the kernels over floats make of the
/// widened rows; sums over more than `wide_floats` channels are those of parts of the row, added in order.

#include <cstddef>

#include "../base/config.hpp"
#include "../base/quantised.hpp"

namespace kvcull::inline KVCULL_ABI::simd {

/// Floats on the stack.
inline constexpr std::size_t wide_floats = 4096;

/// Channels `channel .. channel + channels - 1` of rows `row .. row + rows - 1`.
struct WideRows {
    const float* data;
    std::size_t stride, row, rows, channel, channels;
};

/// Calls `visit(WideRows)` so that all rows are covered in order, and the channels of a row in order. A row
/// of more than `wide_floats` channels comes alone, in parts. `Widen` is a widen_int8 or widen_int4.
template <auto Widen, class Group, class Visit>
void for_each_wide(const Group* x, std::size_t x_stride, std::size_t rows, std::size_t dim, const void* next,
                   const Visit& visit) noexcept {
    static_assert(wide_floats % group_channels == 0);
    alignas(64) float wide[wide_floats];
    const std::size_t part = dim < wide_floats ? dim : wide_floats, stride = (part + 15) / 16 * 16;
    const std::size_t most = wide_floats / (stride == 0 ? 1 : stride);
    for (std::size_t row = 0; row < rows; row += most) {
        const std::size_t count = rows - row < most ? rows - row : most;
        for (std::size_t c = 0; c < dim; c += part) {
            const std::size_t channels = dim - c < part ? dim - c : part,
                              at = row * x_stride + c / group_channels;
            Widen(x + at, x_stride, count, channels, wide, stride,
                  next == nullptr ? nullptr : static_cast<const Group*>(next) + at);
            visit(WideRows{wide, stride, row, count, c, channels});
        }
    }
}

/// The same for what sums over channels: `kernel(first query, queries, WideRows, out, out_stride)` gives the
/// sums of some queries.
template <auto Widen, class Group, class Kernel>
void sum_wide(std::size_t group, const Group* x, std::size_t x_stride, std::size_t rows, std::size_t dim,
              float* out, std::size_t out_stride, const void* next, const Kernel& kernel) noexcept {
    for_each_wide<Widen>(x, x_stride, rows, dim, next, [&](const WideRows& wide) {
        float* const to = out + wide.row;
        if (wide.channel == 0) return kernel(std::size_t{0}, group, wide, to, out_stride);
        for (std::size_t g = 0; g < group; ++g) {
            float part = 0;
            kernel(g, std::size_t{1}, wide, &part, out_stride);
            to[g * out_stride] += part;
        }
    });
}

/// The kernels of kernels.hpp by those of floats.
template <auto Widen, auto Floats, class Group>
void dots_by(const float* q, std::size_t q_stride, std::size_t group, const Group* k, std::size_t k_stride,
             std::size_t rows, std::size_t dim, float scale, float* out, std::size_t out_stride,
             const void* next) noexcept {
    sum_wide<Widen>(
        group, k, k_stride, rows, dim, out, out_stride, next,
        [&](std::size_t g, std::size_t queries, const WideRows& wide, float* to, std::size_t to_stride) {
            Floats(q + g * q_stride + wide.channel, q_stride, queries, wide.data, wide.stride, wide.rows,
                   wide.channels, scale, to, to_stride, nullptr);
        });
}
template <auto Widen, auto Floats, class Group>
void weighted_sum_by(const float* w, std::size_t w_stride, std::size_t group, const Group* v,
                     std::size_t v_stride, std::size_t rows, std::size_t dim, float* out,
                     std::size_t out_stride, const void* next) noexcept {
    for_each_wide<Widen>(v, v_stride, rows, dim, next, [&](const WideRows& wide) {
        Floats(w + wide.row, w_stride, group, wide.data, wide.stride, wide.rows, wide.channels,
               out + wide.channel, out_stride, nullptr);
    });
}
template <auto Widen, auto Floats, class Group>
void distances_by(const float* o, std::size_t o_stride, std::size_t group, const Group* v,
                  std::size_t v_stride, std::size_t rows, std::size_t dim, const float* z,
                  std::size_t z_stride, float* out, std::size_t out_stride, const void* next) noexcept {
    sum_wide<Widen>(
        group, v, v_stride, rows, dim, out, out_stride, next,
        [&](std::size_t g, std::size_t queries, const WideRows& wide, float* to, std::size_t to_stride) {
            Floats(o + g * o_stride + wide.channel, o_stride, queries, wide.data, wide.stride, wide.rows,
                   wide.channels, z == nullptr ? nullptr : z + g * z_stride + wide.row, z_stride, to,
                   to_stride, nullptr);
        });
}

}  // namespace kvcull::inline KVCULL_ABI::simd
