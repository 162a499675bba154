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
#include <limits>

#include "../base/quantised.hpp"
#include "../base/types.hpp"
#include "exp.hpp"
#include "target.hpp"
#include "wide.hpp"

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

inline bool expand_squares(float* x, const float* norm, const float* z, float own, std::size_t n) noexcept {
    constexpr float most = std::numeric_limits<float>::max();
    bool all = true;
    for (std::size_t j = 0; j < n; ++j) {
        const float of_output = z == nullptr ? 1.0F : z[j], of_value = z == nullptr ? 1.0F : 1.0F + z[j];
        const float terms = of_value * of_value * norm[j] + of_output * of_output * own;
        const float square = terms - 2.0F * of_value * of_output * x[j];
        const bool good = square * 32.0F >= terms && terms <= most;
        x[j] = good ? square : -1.0F;
        all = all && good;
    }
    return all;
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
inline void odds(const float* x, float* out, std::size_t n, float factor) noexcept {
    for (std::size_t j = 0; j < n; ++j) out[j] = factor * x[j] / (1.0F - factor * x[j]);
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

template <class Group>
void widen_groups(const Group* x, std::size_t x_stride, std::size_t rows, std::size_t dim, float* out,
                  std::size_t out_stride) noexcept {
    for (std::size_t j = 0; j < rows; ++j) kvcull::widen_groups(x + j * x_stride, out + j * out_stride, dim);
}
inline void widen_int8(const int8_group* x, std::size_t x_stride, std::size_t rows, std::size_t dim,
                       float* out, std::size_t out_stride, const void*) noexcept {
    widen_groups(x, x_stride, rows, dim, out, out_stride);
}
inline void widen_int4(const int4_group* x, std::size_t x_stride, std::size_t rows, std::size_t dim,
                       float* out, std::size_t out_stride, const void*) noexcept {
    widen_groups(x, x_stride, rows, dim, out, out_stride);
}

/// The scale of a group x[n], such that `extreme` is `steps` of it, up to rounding. @return its inverse, or 0
/// if all integers are 0: where the scale rounds to 0, and where it is NaN because a number is not finite or
/// because it overflows, so that the whole group reads as NaN.
[[nodiscard]] inline float take_scale(const float* x, std::size_t n, float extreme, float steps,
                                      float16& scale) noexcept {
    bool finite = true;
    for (std::size_t c = 0; c < n; ++c) finite &= is_finite(x[c]);
    scale = to_float16(extreme / steps);
    if (!finite || (scale.bits & 0x7C00U) == 0x7C00U) {
        scale.bits = 0x7E00U;
        return 0;
    }
    return (scale.bits & 0x7FFFU) == 0 ? 0.0F : 1.0F / to_float(scale);
}
/// x to the nearest integer in low .. high, of two the even one; |x| < 2^22.
[[nodiscard]] inline int nearest(float x, int low, int high) noexcept {
    // One and a half times 2^23: what is added to it is rounded to an integer in its lowest bits.
    constexpr float magic = 12582912.0F;
    const float sum = x + magic;
    const int integer = std::bit_cast<std::int32_t>(sum) - std::bit_cast<std::int32_t>(magic);
    return integer < low ? low : integer > high ? high : integer;
}

/// Integers are taken of the scale as it is stored, which spares what its rounding would cost.
inline void narrow_int8(const float* x, int8_group* out, std::size_t n) noexcept {
    for (std::size_t first = 0; first < n; first += group_channels, ++out) {
        const std::size_t count = n - first < group_channels ? n - first : group_channels;
        float most = 0;
        for (std::size_t c = 0; c < count; ++c) {
            raise(most, x[first + c]);
            raise(most, -x[first + c]);
        }
        *out = {};
        const float inverse = take_scale(x + first, count, most, 127, out->scale);
        if (inverse == 0) continue;
        for (std::size_t c = 0; c < count; ++c)
            out->q[c] = static_cast<std::int8_t>(nearest(x[first + c] * inverse, -127, 127));
    }
}
inline void narrow_int4(const float* x, int4_group* out, std::size_t n) noexcept {
    for (std::size_t first = 0; first < n; first += group_channels, ++out) {
        const std::size_t count = n - first < group_channels ? n - first : group_channels;
        // The number of the largest magnitude becomes -8 steps, of two the negative one.
        float least = 0, most = 0;
        for (std::size_t c = 0; c < count; ++c) {
            raise(least, -x[first + c]);
            raise(most, x[first + c]);
        }
        *out = {};
        const float inverse = take_scale(x + first, count, least < most ? most : -least, -8, out->scale);
        for (std::size_t c = 0; c < group_channels; ++c) {
            const int q = c < count && inverse != 0 ? nearest(x[first + c] * inverse, -8, 7) : 0;
            out->q[c % 16] = static_cast<std::uint8_t>(out->q[c % 16] | (q + 8) << (c < 16 ? 0 : 4));
        }
    }
}

inline void to_codes(const float* x, std::size_t n, float least, std::uint8_t* out, float* step) noexcept {
    float most = 0;
    for (std::size_t c = 0; c < n; ++c) {
        raise(most, x[c]);
        raise(most, -x[c]);
    }
    *step = least;
    raise(*step, most / 127.0F);
    const float factor = 1.0F / *step;
    for (std::size_t c = 0; c < n; ++c)
        out[c] = static_cast<std::uint8_t>(128 + nearest(x[c] * factor, -127, 127));
}
inline void largest_products(const std::uint8_t* x, std::size_t x_stride, std::size_t rows,
                             const std::int8_t* y, const std::int32_t* start, std::size_t count,
                             std::size_t dim, std::int32_t* out) noexcept {
    for (std::size_t a = 0; a < rows; ++a) {
        for (std::size_t b = 0; b < count; ++b) {
            std::int32_t sum = start[b];
            for (std::size_t c = 0; c < dim; ++c)
                sum += x[a * x_stride + c] * y[(c / 4 * count + b) * 4 + c % 4];
            if (b == 0 || sum > out[a]) out[a] = sum;
        }
    }
}
inline constexpr bool fast_integers = false;

// int8 and int4 rows by way of floats.
inline constexpr auto& dots_int8 = dots_by<widen_int8, dots_f32, int8_group>;
inline constexpr auto& dots_int4 = dots_by<widen_int4, dots_f32, int4_group>;
inline constexpr auto& weighted_sum_int8 = weighted_sum_by<widen_int8, weighted_sum_f32, int8_group>;
inline constexpr auto& weighted_sum_int4 = weighted_sum_by<widen_int4, weighted_sum_f32, int4_group>;
inline constexpr auto& distances_int8 = distances_by<widen_int8, distances_f32, int8_group>;
inline constexpr auto& distances_int4 = distances_by<widen_int4, distances_f32, int4_group>;

}  // namespace kvcull::inline KVCULL_ABI::simd::scalar

KVCULL_PRECISE_END
