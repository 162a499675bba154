#pragma once
/// Kernels for NEON with its 16-bit conversions, which every 64-bit ARM CPU has. kernels.hpp says what each
/// one means; here is how.
///
/// The arithmetic is that of avx2.hpp, operation by operation, and so are the bits (but for the logarithm in
/// softmax, which is the C library's): a sum over channels (dot product, distance) keeps eight partial sums,
/// in two registers, of fused multiply-adds in order, and adds the lanes in one fixed tree; a weighted sum is
/// one chain of fused multiply-adds per channel. Hence tiles, chunks and splits never change a result.
/// Errors: dot at most (dim / 8 + 4) 2^-24 sum |q_c k_c|; weighted sum rows * 2^-24 sum |w_j v_j[c]|.
///
/// Nothing is fetched ahead and tiles were chosen by counting registers: no ARM CPU was at hand to measure
/// on.

#include "target.hpp"

#if KVCULL_NEON

#    include <arm_neon.h>

#    include <cmath>
#    include <cstddef>
#    include <cstdint>
#    include <cstring>

#    include "../base/types.hpp"
#    include "ahead.hpp"
#    include "exp.hpp"
#    include "scalar.hpp"
#    include "wide.hpp"

KVCULL_PRECISE_BEGIN

namespace kvcull::inline KVCULL_ABI::simd::neon {

/// Eight numbers in two registers.
struct Float8 {
    float32x4_t low, high;
};

// As in avx2.hpp, sums, products and comparisons are operators, and NaN is told by integers: the wrappers of
// arm_neon.h carry the user's -ffast-math into Clang's code even here.
[[gnu::always_inline]] inline Float8 operator+(Float8 a, Float8 b) noexcept {
    return {a.low + b.low, a.high + b.high};
}
[[gnu::always_inline]] inline Float8 operator-(Float8 a, Float8 b) noexcept {
    return {a.low - b.low, a.high - b.high};
}
[[gnu::always_inline]] inline Float8 operator*(Float8 a, Float8 b) noexcept {
    return {a.low * b.low, a.high * b.high};
}
[[gnu::always_inline]] inline float32x4_t fma(float32x4_t a, float32x4_t b, float32x4_t c) noexcept {
    return vfmaq_f32(c, a, b);
}
[[gnu::always_inline]] inline Float8 fma(Float8 a, Float8 b, Float8 c) noexcept {
    return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)};
}
[[gnu::always_inline]] inline Float8 all(const float& x) noexcept {
    const float32x4_t four = vld1q_dup_f32(&x);
    return {four, four};
}
/// max(a, b), but a where b is NaN.
[[gnu::always_inline]] inline float32x4_t larger(float32x4_t a, float32x4_t b) noexcept {
    return vbslq_f32(reinterpret_cast<uint32x4_t>(b > a), b, a);
}
[[gnu::always_inline]] inline Float8 larger(Float8 a, Float8 b) noexcept {
    return {larger(a.low, b.low), larger(a.high, b.high)};
}

[[gnu::always_inline]] inline Float8 load(const float* x) noexcept {
    return {vld1q_f32(x), vld1q_f32(x + 4)};
}
[[gnu::always_inline]] inline Float8 load(const float16* x) noexcept {
    const float16x8_t half = vreinterpretq_f16_u16(vld1q_u16(&x->bits));
    return {vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)};
}
[[gnu::always_inline]] inline Float8 load(const bfloat16* x) noexcept {
    const uint16x8_t upper = vld1q_u16(&x->bits), lower = vdupq_n_u16(0);
    return {vreinterpretq_f32_u16(vzip1q_u16(lower, upper)), vreinterpretq_f32_u16(vzip2q_u16(lower, upper))};
}
/// The first `count` < 8 lanes, `rest` in the others; memory behind them is not touched.
template <class T>
[[gnu::always_inline]] inline Float8 load_part(const T* x, std::size_t count, const T& rest = T{}) noexcept {
    T part[8] = {rest, rest, rest, rest, rest, rest, rest, rest};
    std::memcpy(part, x, count * sizeof(T));
    return load(part);
}
[[gnu::always_inline]] inline void store(float* out, Float8 x) noexcept {
    vst1q_f32(out, x.low);
    vst1q_f32(out + 4, x.high);
}
[[gnu::always_inline]] inline void store_part(float* out, std::size_t count, Float8 x) noexcept {
    float part[8];
    store(part, x);
    std::memcpy(out, part, count * sizeof(float));
}

/// The sums of four vectors, each ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).
[[gnu::always_inline]] inline float32x4_t sums(Float8 a, Float8 b, Float8 c, Float8 d) noexcept {
    const float32x4_t low = vpaddq_f32(vpaddq_f32(a.low, b.low), vpaddq_f32(c.low, d.low));
    const float32x4_t high = vpaddq_f32(vpaddq_f32(a.high, b.high), vpaddq_f32(c.high, d.high));
    return low + high;
}

// What a pair of a query and a row sums over their channels; kernels.hpp says why. `at` moves to a later
// pair.
struct Product {
    [[nodiscard]] Product at(std::size_t, std::size_t) const noexcept { return {}; }
    [[gnu::always_inline]] Float8 add(Float8 query, Float8 row, Float8 sum, std::size_t,
                                      std::size_t) const noexcept {
        return fma(query, row, sum);
    }
};
struct Distance {
    [[nodiscard]] Distance at(std::size_t, std::size_t) const noexcept { return {}; }
    [[gnu::always_inline]] Float8 add(Float8 query, Float8 row, Float8 sum, std::size_t,
                                      std::size_t) const noexcept {
        const Float8 apart = row - query;
        return fma(apart, apart, sum);
    }
};
struct StretchedDistance {
    const float* z;
    std::size_t stride;

    [[nodiscard]] StretchedDistance at(std::size_t query, std::size_t row) const noexcept {
        return {z + query * stride + row, stride};
    }
    [[gnu::always_inline]] Float8 add(Float8 query, Float8 row, Float8 sum, std::size_t g,
                                      std::size_t r) const noexcept {
        const Float8 apart = fma(all(z[g * stride + r]), row - query, row);
        return fma(apart, apart, sum);
    }
};

/// Q queries times R rows in registers.
template <std::size_t Q, std::size_t R, class Term, class T>
[[gnu::always_inline]] inline void pair_tile(Term term, const float* q, std::size_t q_stride, const T* k,
                                             std::size_t k_stride, std::size_t dim, float scale, float* out,
                                             std::size_t out_stride) noexcept {
    constexpr std::size_t count = Q * R, last = count - 1;
    Float8 sum[count];
#    pragma GCC unroll 8
    for (std::size_t i = 0; i < count; ++i) sum[i] = all(0.0F);
    std::size_t c = 0;
    for (; c + 8 <= dim; c += 8) {
        Float8 row[R];
#    pragma GCC unroll 8
        for (std::size_t r = 0; r < R; ++r) row[r] = load(k + r * k_stride + c);
#    pragma GCC unroll 8
        for (std::size_t g = 0; g < Q; ++g) {
            const Float8 query = load(q + g * q_stride + c);
#    pragma GCC unroll 8
            for (std::size_t r = 0; r < R; ++r)
                sum[g * R + r] = term.add(query, row[r], sum[g * R + r], g, r);
        }
    }
    if (c < dim) {
#    pragma GCC unroll 8
        for (std::size_t g = 0; g < Q; ++g) {
            const Float8 query = load_part(q + g * q_stride + c, dim - c);
#    pragma GCC unroll 8
            for (std::size_t r = 0; r < R; ++r)
                sum[g * R + r] =
                    term.add(query, load_part(k + r * k_stride + c, dim - c), sum[g * R + r], g, r);
        }
    }
    float result[8];
#    pragma GCC unroll 2
    for (std::size_t i = 0; i < count; i += 4) {
        const float32x4_t four = sums(sum[i], sum[i + 1 < last ? i + 1 : last],
                                      sum[i + 2 < last ? i + 2 : last], sum[i + 3 < last ? i + 3 : last]);
        vst1q_f32(result + i, four * vdupq_n_f32(scale));
    }
#    pragma GCC unroll 8
    for (std::size_t i = 0; i < count; ++i) out[i / R * out_stride + i % R] = result[i];
}

/// Q queries over all rows, R at a time.
template <std::size_t Q, std::size_t R, class Term, class T>
[[gnu::always_inline]] inline void pair_rows(Term term, const float* q, std::size_t q_stride, const T* k,
                                             std::size_t k_stride, std::size_t rows, std::size_t dim,
                                             float scale, float* out, std::size_t out_stride) noexcept {
    std::size_t j = 0;
    for (; j + R <= rows; j += R)
        pair_tile<Q, R>(term.at(0, j), q, q_stride, k + j * k_stride, k_stride, dim, scale, out + j,
                        out_stride);
    for (; j < rows; ++j)
        pair_tile<Q, 1>(term.at(0, j), q, q_stride, k + j * k_stride, k_stride, dim, scale, out + j,
                        out_stride);
}

/// All queries over all rows: four at a time, the rest one by one. Rows that are gone over more than once are
/// taken in chunks.
template <class Term, class T>
[[gnu::always_inline]] inline void pairs(Term term, const float* q, std::size_t q_stride, std::size_t group,
                                         const T* k, std::size_t k_stride, std::size_t rows, std::size_t dim,
                                         float scale, float* out, std::size_t out_stride) noexcept {
    const std::size_t chunk = group == 1 || group == 4 ? rows : chunk_rows(dim * sizeof(T));
    for (std::size_t j = 0; j < rows; j += chunk) {
        const std::size_t count = rows - j < chunk ? rows - j : chunk;
        const T* row = k + j * k_stride;
        std::size_t g = 0;
        for (; g + 4 <= group; g += 4)
            pair_rows<4, 2>(term.at(g, j), q + g * q_stride, q_stride, row, k_stride, count, dim, scale,
                            out + g * out_stride + j, out_stride);
        for (; g < group; ++g)
            pair_rows<1, 4>(term.at(g, j), q + g * q_stride, q_stride, row, k_stride, count, dim, scale,
                            out + g * out_stride + j, out_stride);
    }
}

inline void dots_f32(const float* q, std::size_t q_stride, std::size_t group, const float* k,
                     std::size_t k_stride, std::size_t rows, std::size_t dim, float scale, float* out,
                     std::size_t out_stride, const void*) noexcept {
    pairs(Product{}, q, q_stride, group, k, k_stride, rows, dim, scale, out, out_stride);
}
inline void dots_f16(const float* q, std::size_t q_stride, std::size_t group, const float16* k,
                     std::size_t k_stride, std::size_t rows, std::size_t dim, float scale, float* out,
                     std::size_t out_stride, const void*) noexcept {
    pairs(Product{}, q, q_stride, group, k, k_stride, rows, dim, scale, out, out_stride);
}
inline void dots_bf16(const float* q, std::size_t q_stride, std::size_t group, const bfloat16* k,
                      std::size_t k_stride, std::size_t rows, std::size_t dim, float scale, float* out,
                      std::size_t out_stride, const void*) noexcept {
    pairs(Product{}, q, q_stride, group, k, k_stride, rows, dim, scale, out, out_stride);
}

template <class T>
[[gnu::always_inline]] inline void distances(const float* o, std::size_t o_stride, std::size_t group,
                                             const T* v, std::size_t v_stride, std::size_t rows,
                                             std::size_t dim, const float* z, std::size_t z_stride,
                                             float* out, std::size_t out_stride) noexcept {
    if (z == nullptr)
        pairs(Distance{}, o, o_stride, group, v, v_stride, rows, dim, 1.0F, out, out_stride);
    else
        pairs(StretchedDistance{z, z_stride}, o, o_stride, group, v, v_stride, rows, dim, 1.0F, out,
              out_stride);
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

/// Q outputs times C vectors of channels in registers, over `rows` rows.
template <std::size_t Q, std::size_t C, class T>
[[gnu::always_inline]] inline void sum_tile(const float* w, std::size_t w_stride, const T* v,
                                            std::size_t v_stride, std::size_t rows, float* out,
                                            std::size_t out_stride) noexcept {
    Float8 sum[Q * C];
#    pragma GCC unroll 8
    for (std::size_t i = 0; i < Q * C; ++i) sum[i] = load(out + i / C * out_stride + i % C * 8);
    for (std::size_t j = 0; j < rows; ++j) {
        Float8 row[C];
#    pragma GCC unroll 8
        for (std::size_t c = 0; c < C; ++c) row[c] = load(v + j * v_stride + c * 8);
#    pragma GCC unroll 8
        for (std::size_t g = 0; g < Q; ++g) {
            const Float8 weight = all(w[g * w_stride + j]);
#    pragma GCC unroll 8
            for (std::size_t c = 0; c < C; ++c) sum[g * C + c] = fma(weight, row[c], sum[g * C + c]);
        }
    }
#    pragma GCC unroll 8
    for (std::size_t i = 0; i < Q * C; ++i) store(out + i / C * out_stride + i % C * 8, sum[i]);
}

/// The last `count` < 8 channels.
template <std::size_t Q, class T>
[[gnu::always_inline]] inline void sum_tail(const float* w, std::size_t w_stride, const T* v,
                                            std::size_t v_stride, std::size_t rows, std::size_t count,
                                            float* out, std::size_t out_stride) noexcept {
    Float8 sum[Q];
#    pragma GCC unroll 8
    for (std::size_t g = 0; g < Q; ++g) sum[g] = load_part(out + g * out_stride, count);
    for (std::size_t j = 0; j < rows; ++j) {
        const Float8 row = load_part(v + j * v_stride, count);
#    pragma GCC unroll 8
        for (std::size_t g = 0; g < Q; ++g) sum[g] = fma(all(w[g * w_stride + j]), row, sum[g]);
    }
#    pragma GCC unroll 8
    for (std::size_t g = 0; g < Q; ++g) store_part(out + g * out_stride, count, sum[g]);
}

/// Q outputs over all rows, in blocks of 8 rows: the partial sums are loaded and stored once per eight
/// multiply-adds.
template <std::size_t Q, std::size_t C, class T>
[[gnu::always_inline]] inline void sum_rows(const float* w, std::size_t w_stride, const T* v,
                                            std::size_t v_stride, std::size_t rows, std::size_t dim,
                                            float* out, std::size_t out_stride) noexcept {
    for (std::size_t j = 0; j < rows; j += 8) {
        const std::size_t count = rows - j < 8 ? rows - j : 8;
        const float* weight = w + j;
        const T* row = v + j * v_stride;
        std::size_t c = 0;
        for (; c + 8 * C <= dim; c += 8 * C)
            sum_tile<Q, C>(weight, w_stride, row + c, v_stride, count, out + c, out_stride);
        for (; c + 8 <= dim; c += 8)
            sum_tile<Q, 1>(weight, w_stride, row + c, v_stride, count, out + c, out_stride);
        if (c < dim) sum_tail<Q>(weight, w_stride, row + c, v_stride, count, dim - c, out + c, out_stride);
    }
}

/// All outputs over all rows, in the same order as `pairs`.
template <class T>
[[gnu::always_inline]] inline void weighted_sum(const float* w, std::size_t w_stride, std::size_t group,
                                                const T* v, std::size_t v_stride, std::size_t rows,
                                                std::size_t dim, float* out,
                                                std::size_t out_stride) noexcept {
    const std::size_t chunk = group == 1 || group == 4 ? rows : chunk_rows(dim * sizeof(T));
    for (std::size_t j = 0; j < rows; j += chunk) {
        const std::size_t count = rows - j < chunk ? rows - j : chunk;
        const T* row = v + j * v_stride;
        std::size_t g = 0;
        for (; g + 4 <= group; g += 4)
            sum_rows<4, 2>(w + g * w_stride + j, w_stride, row, v_stride, count, dim, out + g * out_stride,
                           out_stride);
        for (; g < group; ++g)
            sum_rows<1, 4>(w + g * w_stride + j, w_stride, row, v_stride, count, dim, out + g * out_stride,
                           out_stride);
    }
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

/// exp_non_positive of four numbers, with fused multiply-adds: error below 1 ulp of the result.
[[gnu::always_inline]] inline float32x4_t exp_non_positive(float32x4_t x) noexcept {
    using C = ExpConstants;
    const float32x4_t smallest = vdupq_n_f32(C::smallest);
    const float32x4_t clamped = larger(smallest, x);
    const float32x4_t k = vrndnq_f32(clamped * vdupq_n_f32(C::inverse_ln2));
    const float32x4_t high = fma(k, vdupq_n_f32(-C::ln2_high), clamped);
    const float32x4_t r = fma(k, vdupq_n_f32(-C::ln2_low), high);
    float32x4_t p = vdupq_n_f32(C::c[4]);
    p = fma(p, r, vdupq_n_f32(C::c[3]));
    p = fma(p, r, vdupq_n_f32(C::c[2]));
    p = fma(p, r, vdupq_n_f32(C::c[1]));
    p = fma(p, r, vdupq_n_f32(C::c[0]));
    const float32x4_t mantissa = fma(p * r, r, r) + vdupq_n_f32(1.0F);
    const int32x4_t exponent = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(k), vdupq_n_s32(127)), 23);
    const float32x4_t value = mantissa * vreinterpretq_f32_s32(exponent);
    const uint32x4_t normal = reinterpret_cast<uint32x4_t>(x >= smallest);
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(value), normal));
}
/// exp_non_positive(x - shift)
[[gnu::always_inline]] inline Float8 exp_below(Float8 x, Float8 shift) noexcept {
    return {exp_non_positive(x.low - shift.low), exp_non_positive(x.high - shift.high)};
}

/// All ones where an entry is NaN or +Inf.
[[gnu::always_inline]] inline uint32x4_t is_bad(float32x4_t x) noexcept {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t magnitude = vandq_u32(bits, vdupq_n_u32(0x7FFFFFFF));
    const uint32x4_t not_finite = vcgtq_u32(magnitude, vdupq_n_u32(0x7F7FFFFF));
    return vbicq_u32(not_finite, vceqq_u32(bits, vdupq_n_u32(negative_infinity_bits)));
}
[[gnu::always_inline]] inline uint32x4_t is_bad(Float8 x) noexcept {
    return vorrq_u32(is_bad(x.low), is_bad(x.high));
}

inline void softmax(float* row, std::size_t n, float* lse) noexcept {
    const std::size_t whole = n / 8 * 8, rest = n - whole;
    Float8 largest = all(negative_infinity());
    uint32x4_t bad = vdupq_n_u32(0);
    for (std::size_t j = 0; j < whole; j += 8) {
        const Float8 x = load(row + j);
        bad = vorrq_u32(bad, is_bad(x));
        largest = larger(largest, x);
    }
    if (rest != 0) {
        const Float8 x = load_part(row + whole, rest, negative_infinity());
        bad = vorrq_u32(bad, is_bad(x));
        largest = larger(largest, x);
    }
    float lane[8];
    store(lane, largest);
    float top = lane[0];
    for (int i = 1; i < 8; ++i) raise(top, lane[i]);
    const bool is_bad_row = vmaxvq_u32(bad) != 0;
    if (is_bad_row || !is_finite(top)) {
        for (std::size_t j = 0; j < n; ++j) row[j] = 0;
        const std::uint32_t bits = is_bad_row ? quiet_nan_bits : negative_infinity_bits;
        std::memcpy(lse, &bits, sizeof bits);
        return;
    }
    const Float8 shift = all(top);
    double sum = 0;
    // Float sums of at most 64 terms per lane, double above them: the error does not grow with n.
    for (std::size_t begin = 0; begin < n; begin += 512) {
        const std::size_t end = whole - begin < 512 ? whole : begin + 512;
        Float8 part = all(0.0F);
        for (std::size_t j = begin; j < end; j += 8) {
            const Float8 weight = exp_below(load(row + j), shift);
            store(row + j, weight);
            part = part + weight;
        }
        if (end == whole && rest != 0 && end - begin < 512) {
            const Float8 weight = exp_below(load_part(row + whole, rest, negative_infinity()), shift);
            store_part(row + whole, rest, weight);
            part = part + weight;
        }
        sum += static_cast<double>(vgetq_lane_f32(sums(part, part, part, part), 0));
    }
    const float inverse = static_cast<float>(1.0 / sum);
    for (std::size_t j = 0; j < whole; j += 8) store(row + j, load(row + j) * all(inverse));
    for (std::size_t j = whole; j < n; ++j) row[j] *= inverse;
    *lse = static_cast<float>(static_cast<double>(top) + std::log(sum));
}

inline void add_rows(float* out, const float* x, std::size_t x_stride, std::size_t rows,
                     std::size_t n) noexcept {
    for (std::size_t first = 0; first < rows; first += 8) {
        const std::size_t count = rows - first < 8 ? rows - first : 8;
        const float* row = x + first * x_stride;
        std::size_t j = 0;
        for (; j + 32 <= n; j += 32) {
            Float8 sum[4];
#    pragma GCC unroll 4
            for (std::size_t i = 0; i < 4; ++i) sum[i] = load(out + j + 8 * i);
            for (std::size_t r = 0; r < count; ++r)
#    pragma GCC unroll 4
                for (std::size_t i = 0; i < 4; ++i) sum[i] = sum[i] + load(row + r * x_stride + j + 8 * i);
#    pragma GCC unroll 4
            for (std::size_t i = 0; i < 4; ++i) store(out + j + 8 * i, sum[i]);
        }
        for (; j < n; ++j)
            for (std::size_t r = 0; r < count; ++r) out[j] += row[r * x_stride + j];
    }
}

// Simple loops over one row, which compilers turn into NEON code themselves.
using scalar::add_squares;
using scalar::expand_squares;
using scalar::odds;
using scalar::square_roots;
using scalar::summarise;

inline void maximum(float* out, const float* x, std::size_t n) noexcept {
    std::size_t j = 0;
    for (; j + 8 <= n; j += 8) store(out + j, larger(load(out + j), load(x + j)));
    for (; j < n; ++j) raise(out[j], x[j]);
}

template <class T>
[[gnu::always_inline]] inline void widen_row(const T* x, float* out, std::size_t n) noexcept {
    std::size_t j = 0;
    for (; j + 8 <= n; j += 8) store(out + j, load(x + j));
    for (; j < n; ++j) out[j] = to_float(x[j]);
}
inline void widen_f16(const float16* x, float* out, std::size_t n) noexcept {
    widen_row(x, out, n);
}
inline void widen_bf16(const bfloat16* x, float* out, std::size_t n) noexcept {
    widen_row(x, out, n);
}

inline void narrow_f16(const float* x, float16* out, std::size_t n) noexcept {
    std::size_t j = 0;
    for (; j + 8 <= n; j += 8) {
        const Float8 wide = load(x + j);
        const float16x8_t half = vcvt_high_f16_f32(vcvt_f16_f32(wide.low), wide.high);
        vst1q_u16(&out[j].bits, vreinterpretq_u16_f16(half));
    }
    for (; j < n; ++j) out[j] = to_float16(x[j]);
}

/// to_bfloat16, bit by bit.
[[gnu::always_inline]] inline uint16x4_t rounded_bf16(float32x4_t x) noexcept {
    const uint32x4_t bits = vreinterpretq_u32_f32(x), high = vshrq_n_u32(bits, 16);
    const uint32x4_t magnitude = vandq_u32(bits, vdupq_n_u32(0x7FFFFFFF));
    const uint32x4_t nan = vcgtq_u32(magnitude, vdupq_n_u32(0x7F800000));
    const uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    const uint32x4_t quiet = vorrq_u32(high, vdupq_n_u32(0x40));
    return vmovn_u32(vbslq_u32(nan, quiet, vshrq_n_u32(rounded, 16)));
}
inline void narrow_bf16(const float* x, bfloat16* out, std::size_t n) noexcept {
    std::size_t j = 0;
    for (; j + 8 <= n; j += 8) {
        const Float8 wide = load(x + j);
        vst1q_u16(&out[j].bits, vcombine_u16(rounded_bf16(wide.low), rounded_bf16(wide.high)));
    }
    for (; j < n; ++j) out[j] = to_bfloat16(x[j]);
}

using scalar::fast_integers;
using scalar::largest_products;
using scalar::narrow_int4;
using scalar::narrow_int8;
using scalar::to_codes;
using scalar::widen_int4;
using scalar::widen_int8;

// int8 and int4 rows by way of floats.
inline constexpr auto& dots_int8 = dots_by<widen_int8, dots_f32, int8_group>;
inline constexpr auto& dots_int4 = dots_by<widen_int4, dots_f32, int4_group>;
inline constexpr auto& weighted_sum_int8 = weighted_sum_by<widen_int8, weighted_sum_f32, int8_group>;
inline constexpr auto& weighted_sum_int4 = weighted_sum_by<widen_int4, weighted_sum_f32, int4_group>;
inline constexpr auto& distances_int8 = distances_by<widen_int8, distances_f32, int8_group>;
inline constexpr auto& distances_int4 = distances_by<widen_int4, distances_f32, int4_group>;

}  // namespace kvcull::inline KVCULL_ABI::simd::neon

KVCULL_PRECISE_END

#endif
