#pragma once
/// Kernels for AVX-512 over rows of weights and scores, and conversions. kernels.hpp says what each one
/// means; how numbers are loaded and added up stands in avx512.hpp.

#include "avx512.hpp"

#if KVCULL_X86

#    include <cmath>
#    include <cstddef>
#    include <cstdint>
#    include <cstring>

#    include "exp.hpp"
#    include "scalar.hpp"
#    include "wide.hpp"

KVCULL_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl")
KVCULL_AVX512_WARNINGS_BEGIN

namespace kvcull::inline KVCULL_ABI::simd::avx512 {

/// exp_non_positive of sixteen numbers: the arithmetic of avx2.hpp, so the same bits.
[[gnu::always_inline]] inline __m512 exp_non_positive(__m512 x) noexcept {
    using C = ExpConstants;
    const __m512 smallest = _mm512_set1_ps(C::smallest);
    const __m512 clamped = _mm512_max_ps(x, smallest);
    const __m512 k = _mm512_roundscale_ps(clamped * _mm512_set1_ps(C::inverse_ln2),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 high = fma(k, _mm512_set1_ps(-C::ln2_high), clamped);
    const __m512 r = fma(k, _mm512_set1_ps(-C::ln2_low), high);
    __m512 p = _mm512_set1_ps(C::c[4]);
    p = fma(p, r, _mm512_set1_ps(C::c[3]));
    p = fma(p, r, _mm512_set1_ps(C::c[2]));
    p = fma(p, r, _mm512_set1_ps(C::c[1]));
    p = fma(p, r, _mm512_set1_ps(C::c[0]));
    const __m512 mantissa = fma(p * r, r, r) + _mm512_set1_ps(1.0F);
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, smallest, _CMP_GE_OQ), mantissa, k);
}

/// Lanes that hold NaN or +Inf: a question to the bits, which no fast-math flag touches.
[[gnu::always_inline]] inline __mmask16 is_bad(__m512 x) noexcept {
    constexpr int quiet_nan = 0x01, positive_infinity = 0x08, signalling_nan = 0x80;
    return _mm512_fpclass_ps_mask(x, quiet_nan | positive_infinity | signalling_nan);
}
/// The entries of a mask; -Inf, which counts for nothing, in the other lanes.
[[gnu::always_inline]] inline __m512 load_tail(const float* x, __mmask16 mask) noexcept {
    const __m512i infinity = _mm512_set1_epi32(static_cast<int>(negative_infinity_bits));
    return _mm512_mask_loadu_ps(_mm512_castsi512_ps(infinity), mask, x);
}

inline void softmax(float* row, std::size_t n, float* lse) noexcept {
    const std::size_t whole = n / 16 * 16;
    const __mmask16 mask = mask_of(n - whole);
    // Four maxima, so that none waits for the one before it. The lanes behind a row count as -Inf.
    __m512 largest[4];
    for (__m512& lane : largest)
        lane = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(negative_infinity_bits)));
    __mmask16 bad = 0;
    std::size_t at = 0;
    for (; at + 64 <= n; at += 64) {
#    pragma GCC unroll 4
        for (std::size_t i = 0; i < 4; ++i) {
            const __m512 x = load(row + at + 16 * i);
            bad = static_cast<__mmask16>(bad | is_bad(x));
            largest[i] = _mm512_max_ps(x, largest[i]);
        }
    }
    for (; at < n; at += 16) {
        const __m512 x = at < whole ? load(row + at) : load_tail(row + at, mask);
        bad = static_cast<__mmask16>(bad | is_bad(x));
        largest[0] = _mm512_max_ps(x, largest[0]);
    }
    alignas(64) float lane[16];
    _mm512_store_ps(
        lane, _mm512_max_ps(_mm512_max_ps(largest[0], largest[1]), _mm512_max_ps(largest[2], largest[3])));
    float top = lane[0];
    for (int i = 1; i < 16; ++i) raise(top, lane[i]);
    if (bad != 0 || !is_finite(top)) {
        for (std::size_t j = 0; j < n; ++j) row[j] = 0;
        const std::uint32_t bits = bad != 0 ? quiet_nan_bits : negative_infinity_bits;
        std::memcpy(lse, &bits, sizeof bits);
        return;
    }
    const __m512 shift = _mm512_set1_ps(top);
    double sum = 0;
    // Float sums of at most 64 terms per lane, double above them: the error does not grow with n.
    for (std::size_t begin = 0; begin < n; begin += 1024) {
        const std::size_t end = whole - begin < 1024 ? whole : begin + 1024;
        __m512 part = zero();
        for (std::size_t j = begin; j < end; j += 16) {
            const __m512 weight = exp_non_positive(load(row + j) - shift);
            _mm512_storeu_ps(row + j, weight);
            part = part + weight;
        }
        if (end == whole && mask != 0 && end - begin < 1024) {
            const __m512 weight = exp_non_positive(load_tail(row + whole, mask) - shift);
            _mm512_mask_storeu_ps(row + whole, mask, weight);
            part = part + weight;
        }
        sum += static_cast<double>(_mm_cvtss_f32(sums(part, part, part, part)));
    }
    const __m512 factor = _mm512_set1_ps(static_cast<float>(1.0 / sum));
    for (std::size_t j = 0; j < whole; j += 16) _mm512_storeu_ps(row + j, load(row + j) * factor);
    if (mask != 0) _mm512_mask_storeu_ps(row + whole, mask, load_part(row + whole, mask) * factor);
    *lse = static_cast<float>(static_cast<double>(top) + std::log(sum));
}

inline void add_rows(float* out, const float* x, std::size_t x_stride, std::size_t rows,
                     std::size_t n) noexcept {
    for (std::size_t first = 0; first < rows; first += 8) {
        const std::size_t count = rows - first < 8 ? rows - first : 8;
        const float* row = x + first * x_stride;
        std::size_t j = 0;
        for (; j + 64 <= n; j += 64) {
            __m512 sum[4];
#    pragma GCC unroll 4
            for (std::size_t i = 0; i < 4; ++i) sum[i] = load(out + j + 16 * i);
            for (std::size_t r = 0; r < count; ++r)
#    pragma GCC unroll 4
                for (std::size_t i = 0; i < 4; ++i) sum[i] = sum[i] + load(row + r * x_stride + j + 16 * i);
#    pragma GCC unroll 4
            for (std::size_t i = 0; i < 4; ++i) _mm512_storeu_ps(out + j + 16 * i, sum[i]);
        }
        for (; j < n; j += 16) {
            const __mmask16 mask = n - j < 16 ? mask_of(n - j) : static_cast<__mmask16>(0xFFFF);
            __m512 sum = load_part(out + j, mask);
            for (std::size_t r = 0; r < count; ++r) sum = sum + load_part(row + r * x_stride + j, mask);
            _mm512_mask_storeu_ps(out + j, mask, sum);
        }
    }
}

inline void add_squares(float* out, const float* a, std::size_t a_stride, const float* z,
                        std::size_t z_stride, const float* d, std::size_t d_stride, std::size_t rows,
                        std::size_t n) noexcept {
    for (std::size_t j = 0; j < n; j += 16) {
        const __mmask16 mask = n - j < 16 ? mask_of(n - j) : static_cast<__mmask16>(0xFFFF);
        const auto at = [&](const float* x) { return load_part(x + j, mask); };
        __m512 sum = at(out);
        for (std::size_t r = 0; r < rows; ++r) {
            const __m512 weight = at(a + r * a_stride);
            const __m512 factor = z == nullptr ? weight : weight * at(z + r * z_stride);
            const __m512 square = factor * factor;
            const __m512 term = d == nullptr ? square : square * at(d + r * d_stride);
            const __m512i magnitude = _mm512_slli_epi32(_mm512_castps_si512(weight), 1);
            const __mmask16 counts = _mm512_test_epi32_mask(magnitude, magnitude);
            sum = _mm512_mask_add_ps(sum, counts, sum, term);
        }
        _mm512_mask_storeu_ps(out + j, mask, sum);
    }
}

inline bool expand_squares(float* x, const float* norm, const float* z, float own, std::size_t n) noexcept {
    const __m512 most = _mm512_castsi512_ps(_mm512_set1_epi32(0x7F7FFFFF)), one = _mm512_set1_ps(1.0F);
    __mmask16 good = 0xFFFF;
    const auto squares = [&](std::size_t j, __mmask16 mask) {
        const __m512 of_output = z == nullptr ? one : load_part(z + j, mask);
        const __m512 of_value = z == nullptr ? one : one + of_output;
        const __m512 own_term = of_output * of_output * _mm512_set1_ps(own);
        const __m512 terms = fma(of_value * of_value, load_part(norm + j, mask), own_term);
        const __m512 square =
            fma(_mm512_set1_ps(-2.0F) * of_value * of_output, load_part(x + j, mask), terms);
        const __mmask16 finite = _mm512_cmp_ps_mask(terms, most, _CMP_LE_OQ);
        const __mmask16 fit =
            _mm512_mask_cmp_ps_mask(finite, square * _mm512_set1_ps(32.0F), terms, _CMP_GE_OQ);
        good = static_cast<__mmask16>(good & (fit | ~mask));
        return _mm512_mask_mov_ps(_mm512_set1_ps(-1.0F), fit, square);
    };
    std::size_t j = 0;
    // Masked stores of whole vectors would not be forwarded to the loads that follow.
    for (; j + 16 <= n; j += 16) _mm512_storeu_ps(x + j, squares(j, 0xFFFF));
    const __mmask16 mask = mask_of(n - j);
    if (mask != 0) _mm512_mask_storeu_ps(x + j, mask, squares(j, mask));
    return good == 0xFFFF;
}

inline void summarise(const float* x, std::size_t n, float* least, float* most, double* sum) noexcept {
    __m512 low = zero(), high = low;
    double total = 0;
    for (std::size_t begin = 0; begin < n; begin += 1024) {
        const std::size_t end = n - begin < 1024 ? n : begin + 1024;
        __m512 part = zero();
        for (std::size_t j = begin; j < end; j += 16) {
            const __m512 entry = end - j < 16 ? load_part(x + j, mask_of(end - j)) : load(x + j);
            low = _mm512_min_ps(entry, low);
            high = _mm512_max_ps(entry, high);
            part = part + entry;
        }
        total += static_cast<double>(_mm_cvtss_f32(sums(part, part, part, part)));
    }
    alignas(64) float lows[16], highs[16];
    _mm512_store_ps(lows, low);
    _mm512_store_ps(highs, high);
    *least = 0;
    *most = 0;
    for (std::size_t lane = 0; lane < 16; ++lane) {
        if (lows[lane] < *least) *least = lows[lane];
        raise(*most, highs[lane]);
    }
    std::memcpy(sum, &total, sizeof total);
}
/// out[j] = change(x[j]), sixteen at a time.
template <class Change>
[[gnu::always_inline]] inline void change_row(const float* x, float* out, std::size_t n,
                                              const Change& change) noexcept {
    std::size_t j = 0;
    for (; j + 16 <= n; j += 16) _mm512_storeu_ps(out + j, change(load(x + j)));
    const __mmask16 mask = mask_of(n - j);
    if (mask != 0) _mm512_mask_storeu_ps(out + j, mask, change(load_part(x + j, mask)));
}
struct Odds {
    float factor;
    [[gnu::always_inline]] __m512 operator()(__m512 entry) const noexcept {
        const __m512 weight = _mm512_set1_ps(factor) * entry;
        return weight / (_mm512_set1_ps(1.0F) - weight);
    }
};
inline void odds(const float* x, float* out, std::size_t n, float factor) noexcept {
    change_row(x, out, n, Odds{factor});
}
struct SquareRoot {
    [[gnu::always_inline]] __m512 operator()(__m512 entry) const noexcept { return _mm512_sqrt_ps(entry); }
};
inline void square_roots(float* x, std::size_t n) noexcept {
    change_row(x, x, n, SquareRoot{});
}

inline void maximum(float* out, const float* x, std::size_t n) noexcept {
    std::size_t j = 0;
    for (; j + 16 <= n; j += 16) _mm512_storeu_ps(out + j, _mm512_max_ps(load(x + j), load(out + j)));
    const __mmask16 mask = mask_of(n - j);
    if (mask != 0)
        _mm512_mask_storeu_ps(out + j, mask, _mm512_max_ps(load_part(x + j, mask), load_part(out + j, mask)));
}

template <class T>
[[gnu::always_inline]] inline void widen_row(const T* x, float* out, std::size_t n) noexcept {
    std::size_t j = 0;
    for (; j + 16 <= n; j += 16) _mm512_storeu_ps(out + j, load(x + j));
    const __mmask16 mask = mask_of(n - j);
    if (mask != 0) _mm512_mask_storeu_ps(out + j, mask, load_part(x + j, mask));
}
inline void widen_f16(const float16* x, float* out, std::size_t n) noexcept {
    widen_row(x, out, n);
}
inline void widen_bf16(const bfloat16* x, float* out, std::size_t n) noexcept {
    widen_row(x, out, n);
}

[[gnu::always_inline]] inline __m256i narrowed(__m512 x, float16) noexcept {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/// to_bfloat16, bit by bit.
[[gnu::always_inline]] inline __m256i narrowed(__m512 x, bfloat16) noexcept {
    const __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
    const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7F800000));
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7FFF), odd));
    const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, quiet));
}
template <class T>
[[gnu::always_inline]] inline void narrow_row(const float* x, T* out, std::size_t n) noexcept {
    std::size_t j = 0;
    for (; j + 16 <= n; j += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j), narrowed(load(x + j), T{}));
    const __mmask16 mask = mask_of(n - j);
    if (mask != 0) _mm256_mask_storeu_epi16(out + j, mask, narrowed(load_part(x + j, mask), T{}));
}
inline void narrow_f16(const float* x, float16* out, std::size_t n) noexcept {
    narrow_row(x, out, n);
}
inline void narrow_bf16(const float* x, bfloat16* out, std::size_t n) noexcept {
    narrow_row(x, out, n);
}

template <class Group>
[[gnu::always_inline]] inline void widen_groups(const Group* x, std::size_t x_stride, std::size_t rows,
                                                std::size_t dim, float* out, std::size_t out_stride,
                                                const void* next) noexcept {
    const std::uintptr_t ahead = distance(x, rows * x_stride, next);
    for (std::size_t j = 0; j < rows; ++j, x += x_stride, out += out_stride) {
        const std::uintptr_t row = reinterpret_cast<std::uintptr_t>(x) + ahead;
        for (std::size_t byte = 0; byte < x_stride * sizeof(Group); byte += 64) prefetch(row + byte);
        std::size_t c = 0;
        for (; c + 32 <= dim; c += 32) {
            const ScaledGroup<Group> group = part_at(x + c / 32);
            _mm512_storeu_ps(out + c, channels(group, 0));
            _mm512_storeu_ps(out + c + 16, channels(group, 1));
        }
        for (std::size_t half = 0; c < dim; ++half, c += 16)
            _mm512_mask_storeu_ps(out + c, mask_of(dim - c), channels(part_at(x + c / 32), half));
    }
}
inline void widen_int8(const int8_group* x, std::size_t x_stride, std::size_t rows, std::size_t dim,
                       float* out, std::size_t out_stride, const void* next) noexcept {
    widen_groups(x, x_stride, rows, dim, out, out_stride, next);
}
inline void widen_int4(const int4_group* x, std::size_t x_stride, std::size_t rows, std::size_t dim,
                       float* out, std::size_t out_stride, const void* next) noexcept {
    widen_groups(x, x_stride, rows, dim, out, out_stride, next);
}
// Rows are narrowed once, when they come.
using scalar::narrow_int4;
using scalar::narrow_int8;
// Of CPUs without VNNI; kernels.hpp puts those of vnni.hpp in their place.
using scalar::fast_integers;
using scalar::largest_products;
using scalar::to_codes;

// int8 and int4 rows by way of floats.
inline constexpr auto& distances_int8 = distances_by<widen_int8, distances_f32, int8_group>;
inline constexpr auto& distances_int4 = distances_by<widen_int4, distances_f32, int4_group>;

}  // namespace kvcull::inline KVCULL_ABI::simd::avx512

KVCULL_AVX512_WARNINGS_END
KVCULL_TARGET_END

#endif
