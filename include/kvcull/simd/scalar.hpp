#pragma once
/// Portable kernels: the meaning of every kernel, and what a CPU without a kernel of its own runs.
///
/// Sums are float. A sum over channels keeps `lanes` partial sums (channel c goes to lane c % lanes) and adds
/// them in a fixed tree, so its value depends on the two rows alone; error at most (dim / lanes + 4) 2^-24
/// sum |q_c k_c|.

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../base/types.hpp"
#include "exp.hpp"
#include "target.hpp"

KVCULL_PRECISE_BEGIN

namespace kvcull::inline KVCULL_ABI::simd::scalar {

inline constexpr std::size_t lanes = 8;

/// Sum over the channels of `term(query's, row's)`, in lanes.
template <class T, class Term>
[[nodiscard]] float sum_channels(const float* q, const T* k, std::size_t dim, const Term& term) noexcept {
    float sum[lanes] = {};
    std::size_t c = 0;
    for (; c + lanes <= dim; c += lanes)
        for (std::size_t lane = 0; lane < lanes; ++lane)
            sum[lane] += term(q[c + lane], to_float(k[c + lane]));
    for (std::size_t lane = 0; c + lane < dim; ++lane) sum[lane] += term(q[c + lane], to_float(k[c + lane]));
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

template <class T>
void dots(const float* q, std::size_t q_stride, std::size_t group, const T* k, std::size_t k_stride,
          std::size_t rows, std::size_t dim, float scale, float* out, std::size_t out_stride) noexcept {
    for (std::size_t j = 0; j < rows; ++j)
        for (std::size_t g = 0; g < group; ++g)
            out[g * out_stride + j] = scale * sum_channels(q + g * q_stride, k + j * k_stride, dim,
                                                           [](float a, float b) { return a * b; });
}

template <class T>
void weighted_sum(const float* w, std::size_t w_stride, std::size_t group, const T* v, std::size_t v_stride,
                  std::size_t rows, std::size_t dim, float* out, std::size_t out_stride) noexcept {
    for (std::size_t j = 0; j < rows; ++j) {
        for (std::size_t g = 0; g < group; ++g) {
            const float weight = w[g * w_stride + j];
            for (std::size_t c = 0; c < dim; ++c)
                out[g * out_stride + c] += weight * to_float(v[j * v_stride + c]);
        }
    }
}

template <class T>
void distances(const float* o, std::size_t o_stride, std::size_t group, const T* v, std::size_t v_stride,
               std::size_t rows, std::size_t dim, const float* z, std::size_t z_stride, float* out,
               std::size_t out_stride) noexcept {
    for (std::size_t j = 0; j < rows; ++j)
        for (std::size_t g = 0; g < group; ++g)
            out[g * out_stride + j] =
                sum_channels(o + g * o_stride, v + j * v_stride, dim, [&](float a, float b) {
                    const float apart = z == nullptr ? b - a : b + z[g * z_stride + j] * (b - a);
                    return apart * apart;
                });
}

inline void dots_f32(const float* q, std::size_t q_stride, std::size_t group, const float* k,
                     std::size_t k_stride, std::size_t rows, std::size_t dim, float scale, float* out,
                     std::size_t out_stride, const void*) noexcept {
    dots(q, q_stride, group, k, k_stride, rows, dim, scale, out, out_stride);
}
inline void dots_f16(const float* q, std::size_t q_stride, std::size_t group, const float16* k,
                     std::size_t k_stride, std::size_t rows, std::size_t dim, float scale, float* out,
                     std::size_t out_stride, const void*) noexcept {
    dots(q, q_stride, group, k, k_stride, rows, dim, scale, out, out_stride);
}
inline void dots_bf16(const float* q, std::size_t q_stride, std::size_t group, const bfloat16* k,
                      std::size_t k_stride, std::size_t rows, std::size_t dim, float scale, float* out,
                      std::size_t out_stride, const void*) noexcept {
    dots(q, q_stride, group, k, k_stride, rows, dim, scale, out, out_stride);
}
inline void weighted_sum_f32(const float* w, std::size_t w_stride, std::size_t group, const float* v,
                             std::size_t v_stride, std::size_t rows, std::size_t dim, float* out,
                             std::size_t out_stride, const void*) noexcept {
    weighted_sum(w, w_stride, group, v, v_stride, rows, dim, out, out_stride);
}
inline void weighted_sum_f16(const float* w, std::size_t w_stride, std::size_t group, const float16* v,
                             std::size_t v_stride, std::size_t rows, std::size_t dim, float* out,
                             std::size_t out_stride, const void*) noexcept {
    weighted_sum(w, w_stride, group, v, v_stride, rows, dim, out, out_stride);
}
inline void weighted_sum_bf16(const float* w, std::size_t w_stride, std::size_t group, const bfloat16* v,
                              std::size_t v_stride, std::size_t rows, std::size_t dim, float* out,
                              std::size_t out_stride, const void*) noexcept {
    weighted_sum(w, w_stride, group, v, v_stride, rows, dim, out, out_stride);
}

inline void distances_f32(const float* o, std::size_t o_stride, std::size_t group, const float* v,
                          std::size_t v_stride, std::size_t rows, std::size_t dim, const float* z,
                          std::size_t z_stride, float* out, std::size_t out_stride, const void*) noexcept {
    distances(o, o_stride, group, v, v_stride, rows, dim, z, z_stride, out, out_stride);
}
inline void distances_f16(const float* o, std::size_t o_stride, std::size_t group, const float16* v,
                          std::size_t v_stride, std::size_t rows, std::size_t dim, const float* z,
                          std::size_t z_stride, float* out, std::size_t out_stride, const void*) noexcept {
    distances(o, o_stride, group, v, v_stride, rows, dim, z, z_stride, out, out_stride);
}
inline void distances_bf16(const float* o, std::size_t o_stride, std::size_t group, const bfloat16* v,
                           std::size_t v_stride, std::size_t rows, std::size_t dim, const float* z,
                           std::size_t z_stride, float* out, std::size_t out_stride, const void*) noexcept {
    distances(o, o_stride, group, v, v_stride, rows, dim, z, z_stride, out, out_stride);
}

inline void softmax(float* row, std::size_t n, float* lse) noexcept {
    constexpr float lowest = negative_infinity();
    float largest = lowest;
    bool bad = false;
    for (std::size_t j = 0; j < n; ++j) {
        bad |= std::bit_cast<std::uint32_t>(row[j]) != negative_infinity_bits && !is_finite(row[j]);
        raise(largest, row[j]);
    }
    if (bad || !is_finite(largest)) {
        for (std::size_t j = 0; j < n; ++j) row[j] = 0;
        const std::uint32_t bits = bad ? quiet_nan_bits : negative_infinity_bits;
        std::memcpy(lse, &bits, sizeof bits);
        return;
    }
    double sum = 0;
    for (std::size_t j = 0; j < n; ++j) {
        row[j] = exp_non_positive(row[j] - largest);
        sum += static_cast<double>(row[j]);
    }
    const float inverse = static_cast<float>(1.0 / sum);
    for (std::size_t j = 0; j < n; ++j) row[j] *= inverse;
    *lse = static_cast<float>(static_cast<double>(largest) + std::log(sum));
}

inline void add_rows(float* out, const float* x, std::size_t x_stride, std::size_t rows,
                     std::size_t n) noexcept {
    for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t j = 0; j < n; ++j) out[j] += x[r * x_stride + j];
}

inline void add_squares(float* out, const float* a, std::size_t a_stride, const float* z,
                        std::size_t z_stride, const float* d, std::size_t d_stride, std::size_t rows,
                        std::size_t n) noexcept {
    for (std::size_t r = 0; r < rows; ++r) {
        for (std::size_t j = 0; j < n; ++j) {
            const float weight = a[r * a_stride + j];
            if ((std::bit_cast<std::uint32_t>(weight) << 1U) == 0) continue;
            const float factor = z == nullptr ? weight : weight * z[r * z_stride + j];
            out[j] += d == nullptr ? factor * factor : factor * factor * d[r * d_stride + j];
        }
    }
}

inline void summarise(const float* x, std::size_t n, float* least, float* most, double* sum) noexcept {
    *least = 0;
    *most = 0;
    *sum = 0;
    for (std::size_t j = 0; j < n; ++j) {
        if (x[j] < *least) *least = x[j];
        raise(*most, x[j]);
        *sum += static_cast<double>(x[j]);
    }
}
inline void odds(float* x, std::size_t n, float factor) noexcept {
    for (std::size_t j = 0; j < n; ++j) x[j] = factor * x[j] / (1.0F - factor * x[j]);
}
inline void square_roots(float* x, std::size_t n) noexcept {
    for (std::size_t j = 0; j < n; ++j) x[j] = std::sqrt(x[j]);
}

inline void maximum(float* out, const float* x, std::size_t n) noexcept {
    for (std::size_t j = 0; j < n; ++j) raise(out[j], x[j]);
}

inline void widen_f16(const float16* x, float* out, std::size_t n) noexcept {
    for (std::size_t j = 0; j < n; ++j) out[j] = to_float(x[j]);
}
inline void widen_bf16(const bfloat16* x, float* out, std::size_t n) noexcept {
    for (std::size_t j = 0; j < n; ++j) out[j] = to_float(x[j]);
}

inline void narrow_f16(const float* x, float16* out, std::size_t n) noexcept {
    for (std::size_t j = 0; j < n; ++j) out[j] = to_float16(x[j]);
}
inline void narrow_bf16(const float* x, bfloat16* out, std::size_t n) noexcept {
    for (std::size_t j = 0; j < n; ++j) out[j] = to_bfloat16(x[j]);
}

}  // namespace kvcull::inline KVCULL_ABI::simd::scalar

KVCULL_PRECISE_END
