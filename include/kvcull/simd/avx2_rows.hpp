#pragma once
/// Kernels for AVX2 over rows of weights and scores, and conversions. kernels.hpp says what each one means;
/// how numbers are loaded and added up stands in avx2.hpp.

#include "avx2.hpp"

#if KVCULL_X86

#    include <cmath>
#    include <cstddef>
#    include <cstdint>
#    include <cstring>

#    include "exp.hpp"
#    include "scalar.hpp"
#    include "wide.hpp"

KVCULL_TARGET_BEGIN("avx2,fma,f16c")

namespace kvcull::inline KVCULL_ABI::simd::avx2 {

/// exp_non_positive of eight numbers, with fused multiply-adds: error below 1 ulp of the result.
[[gnu::always_inline]] inline __m256 exp_non_positive(__m256 x) noexcept {
    using C = ExpConstants;
    const __m256 smallest = _mm256_set1_ps(C::smallest);
    const __m256 clamped = _mm256_max_ps(x, smallest);
    const __m256 k = _mm256_round_ps(clamped * _mm256_set1_ps(C::inverse_ln2),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 high = fma(k, _mm256_set1_ps(-C::ln2_high), clamped);
    const __m256 r = fma(k, _mm256_set1_ps(-C::ln2_low), high);
    __m256 p = _mm256_set1_ps(C::c[4]);
    p = fma(p, r, _mm256_set1_ps(C::c[3]));
    p = fma(p, r, _mm256_set1_ps(C::c[2]));
    p = fma(p, r, _mm256_set1_ps(C::c[1]));
    p = fma(p, r, _mm256_set1_ps(C::c[0]));
    const __m256 mantissa = fma(p * r, r, r) + _mm256_set1_ps(1.0F);
    const __m256i exponent =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(k), _mm256_set1_epi32(127)), 23);
    const __m256 value = mantissa * _mm256_castsi256_ps(exponent);
    return _mm256_and_ps(value, _mm256_cmp_ps(x, smallest, _CMP_GE_OQ));
}

/// All ones where an entry is NaN or +Inf: told by integers, which no fast-math flag touches.
[[gnu::always_inline]] inline __m256i is_bad(__m256 x) noexcept {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
    const __m256i not_finite = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7F7FFFFF));
    const __m256i negative_infinities =
        _mm256_cmpeq_epi32(bits, _mm256_set1_epi32(static_cast<int>(negative_infinity_bits)));
    return _mm256_andnot_si256(negative_infinities, not_finite);
}

/// The last `count` < 8 entries of a row; -Inf, which counts for nothing, in the other lanes.
[[gnu::always_inline]] inline __m256 load_tail(const float* x, std::size_t count) noexcept {
    const __m256i absent =
        _mm256_andnot_si256(mask_of(count), _mm256_set1_epi32(static_cast<int>(negative_infinity_bits)));
    return _mm256_or_ps(load_part(x, count), _mm256_castsi256_ps(absent));
}

inline void softmax(float* row, std::size_t n, float* lse) noexcept {
    const std::size_t whole = n / 8 * 8, rest = n - whole;
    const __m256i mask = mask_of(rest);
    __m256 largest = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(negative_infinity_bits)));
    __m256i bad = _mm256_setzero_si256();
    for (std::size_t j = 0; j < whole; j += 8) {
        const __m256 x = load(row + j);
        bad = _mm256_or_si256(bad, is_bad(x));
        largest = _mm256_max_ps(x, largest);
    }
    if (rest != 0) {
        const __m256 x = load_tail(row + whole, rest);
        bad = _mm256_or_si256(bad, is_bad(x));
        largest = _mm256_max_ps(x, largest);
    }
    alignas(32) float lane[8];
    _mm256_store_ps(lane, largest);
    float top = lane[0];
    for (int i = 1; i < 8; ++i) raise(top, lane[i]);
    const bool is_bad_row = _mm256_testz_si256(bad, bad) == 0;
    if (is_bad_row || !is_finite(top)) {
        for (std::size_t j = 0; j < n; ++j) row[j] = 0;
        const std::uint32_t bits = is_bad_row ? quiet_nan_bits : negative_infinity_bits;
        std::memcpy(lse, &bits, sizeof bits);
        return;
    }
    const __m256 shift = _mm256_set1_ps(top);
    double sum = 0;
    // Float sums of at most 64 terms per lane, double above them: the error does not grow with n.
    for (std::size_t begin = 0; begin < n; begin += 512) {
        const std::size_t end = whole - begin < 512 ? whole : begin + 512;
        __m256 part = _mm256_setzero_ps();
        for (std::size_t j = begin; j < end; j += 8) {
            const __m256 weight = exp_non_positive(load(row + j) - shift);
            _mm256_storeu_ps(row + j, weight);
            part = part + weight;
        }
        if (end == whole && rest != 0 && end - begin < 512) {
            const __m256 weight = exp_non_positive(load_tail(row + whole, rest) - shift);
            _mm256_maskstore_ps(row + whole, mask, weight);
            part = part + weight;
        }
        sum += static_cast<double>(_mm_cvtss_f32(sums(part, part, part, part)));
    }
    const float inverse = static_cast<float>(1.0 / sum);
    const __m256 factor = _mm256_set1_ps(inverse);
    for (std::size_t j = 0; j < whole; j += 8) _mm256_storeu_ps(row + j, load(row + j) * factor);
    if (rest != 0) _mm256_maskstore_ps(row + whole, mask, load_part(row + whole, rest) * factor);
    *lse = static_cast<float>(static_cast<double>(top) + std::log(sum));
}

inline void add_rows(float* out, const float* x, std::size_t x_stride, std::size_t rows,
                     std::size_t n) noexcept {
    for (std::size_t first = 0; first < rows; first += 8) {
        const std::size_t count = rows - first < 8 ? rows - first : 8;
        const float* row = x + first * x_stride;
        std::size_t j = 0;
        for (; j + 32 <= n; j += 32) {
            __m256 sum[4];
#    pragma GCC unroll 4
            for (std::size_t i = 0; i < 4; ++i) sum[i] = load(out + j + 8 * i);
            for (std::size_t r = 0; r < count; ++r)
#    pragma GCC unroll 4
                for (std::size_t i = 0; i < 4; ++i) sum[i] = sum[i] + load(row + r * x_stride + j + 8 * i);
#    pragma GCC unroll 4
            for (std::size_t i = 0; i < 4; ++i) _mm256_storeu_ps(out + j + 8 * i, sum[i]);
        }
        for (; j < n; j += 8) {
            const std::size_t part = n - j < 8 ? n - j : 8;
            __m256 sum = load_part(out + j, part);
            for (std::size_t r = 0; r < count; ++r) sum = sum + load_part(row + r * x_stride + j, part);
            _mm256_maskstore_ps(out + j, mask_of(part), sum);
        }
    }
}

/// All ones where an entry is neither +0 nor -0.
[[gnu::always_inline]] inline __m256 is_not_zero(__m256 x) noexcept {
    const __m256i magnitude = _mm256_slli_epi32(_mm256_castps_si256(x), 1);
    const __m256i zero = _mm256_cmpeq_epi32(magnitude, _mm256_setzero_si256());
    return _mm256_castsi256_ps(_mm256_xor_si256(zero, _mm256_set1_epi32(-1)));
}
inline void add_squares(float* out, const float* a, std::size_t a_stride, const float* z,
                        std::size_t z_stride, const float* d, std::size_t d_stride, std::size_t rows,
                        std::size_t n) noexcept {
    for (std::size_t j = 0; j < n; j += 8) {
        const std::size_t part = n - j < 8 ? n - j : 8;
        const auto at = [&](const float* x) { return part == 8 ? load(x + j) : load_part(x + j, part); };
        __m256 sum = at(out);
        for (std::size_t r = 0; r < rows; ++r) {
            const __m256 weight = at(a + r * a_stride);
            const __m256 factor = z == nullptr ? weight : weight * at(z + r * z_stride);
            const __m256 square = factor * factor;
            const __m256 term = d == nullptr ? square : square * at(d + r * d_stride);
            sum = sum + _mm256_and_ps(term, is_not_zero(weight));
        }
        if (part == 8)
            _mm256_storeu_ps(out + j, sum);
        else
            _mm256_maskstore_ps(out + j, mask_of(part), sum);
    }
}

inline bool expand_squares(float* x, const float* norm, const float* z, float own, std::size_t n) noexcept {
    const __m256 most = _mm256_castsi256_ps(_mm256_set1_epi32(0x7F7FFFFF)), one = _mm256_set1_ps(1.0F);
    int bad = 0;
    for (std::size_t j = 0; j < n; j += 8) {
        const std::size_t part = n - j < 8 ? n - j : 8;
        const auto at = [&](const float* row) {
            return part == 8 ? load(row + j) : load_part(row + j, part);
        };
        const __m256 of_output = z == nullptr ? one : at(z), of_value = z == nullptr ? one : one + of_output;
        const __m256 terms = fma(of_value * of_value, at(norm), of_output * of_output * _mm256_set1_ps(own));
        const __m256 square = fma(_mm256_set1_ps(-2.0F) * of_value * of_output, at(x), terms);
        const __m256 enough = _mm256_cmp_ps(square * _mm256_set1_ps(32.0F), terms, _CMP_GE_OQ);
        const __m256 good = _mm256_and_ps(enough, _mm256_cmp_ps(terms, most, _CMP_LE_OQ));
        const __m256 out = _mm256_blendv_ps(_mm256_set1_ps(-1.0F), square, good);
        bad |= ~_mm256_movemask_ps(good) & ((1 << part) - 1);
        if (part == 8)
            _mm256_storeu_ps(x + j, out);
        else
            _mm256_maskstore_ps(x + j, mask_of(part), out);
    }
    return bad == 0;
}

inline void summarise(const float* x, std::size_t n, float* least, float* most, double* sum) noexcept {
    __m256 low = _mm256_setzero_ps(), high = low;
    double total = 0;
    for (std::size_t begin = 0; begin < n; begin += 512) {
        const std::size_t end = n - begin < 512 ? n : begin + 512;
        __m256 part = _mm256_setzero_ps();
        for (std::size_t j = begin; j < end; j += 8) {
            const __m256 entry = end - j < 8 ? load_part(x + j, end - j) : load(x + j);
            low = _mm256_min_ps(entry, low);
            high = _mm256_max_ps(entry, high);
            part = part + entry;
        }
        total += static_cast<double>(_mm_cvtss_f32(sums(part, part, part, part)));
    }
    alignas(32) float lows[8], highs[8];
    _mm256_store_ps(lows, low);
    _mm256_store_ps(highs, high);
    *least = 0;
    *most = 0;
    for (std::size_t lane = 0; lane < 8; ++lane) {
        if (lows[lane] < *least) *least = lows[lane];
        raise(*most, highs[lane]);
    }
    std::memcpy(sum, &total, sizeof total);
}
/// out[j] = change(x[j]), eight at a time.
template <class Change>
[[gnu::always_inline]] inline void change_row(const float* x, float* out, std::size_t n,
                                              const Change& change) noexcept {
    std::size_t j = 0;
    for (; j + 8 <= n; j += 8) _mm256_storeu_ps(out + j, change(load(x + j)));
    if (j < n) _mm256_maskstore_ps(out + j, mask_of(n - j), change(load_part(x + j, n - j)));
}
struct Odds {
    float factor;
    [[gnu::always_inline]] __m256 operator()(__m256 entry) const noexcept {
        const __m256 weight = _mm256_set1_ps(factor) * entry;
        return weight / (_mm256_set1_ps(1.0F) - weight);
    }
};
inline void odds(const float* x, float* out, std::size_t n, float factor) noexcept {
    change_row(x, out, n, Odds{factor});
}
struct SquareRoot {
    [[gnu::always_inline]] __m256 operator()(__m256 entry) const noexcept { return _mm256_sqrt_ps(entry); }
};
inline void square_roots(float* x, std::size_t n) noexcept {
    change_row(x, x, n, SquareRoot{});
}

inline void maximum(float* out, const float* x, std::size_t n) noexcept {
    std::size_t j = 0;
    for (; j + 8 <= n; j += 8) _mm256_storeu_ps(out + j, _mm256_max_ps(load(x + j), load(out + j)));
    for (; j < n; ++j) raise(out[j], x[j]);
}

template <class T>
[[gnu::always_inline]] inline void widen_row(const T* x, float* out, std::size_t n) noexcept {
    std::size_t j = 0;
    for (; j + 8 <= n; j += 8) _mm256_storeu_ps(out + j, load(x + j));
    if (j < n) _mm256_maskstore_ps(out + j, mask_of(n - j), load_part(x + j, n - j));
}
inline void widen_f16(const float16* x, float* out, std::size_t n) noexcept {
    widen_row(x, out, n);
}
inline void widen_bf16(const bfloat16* x, float* out, std::size_t n) noexcept {
    widen_row(x, out, n);
}

inline void narrow_f16(const float* x, float16* out, std::size_t n) noexcept {
    std::size_t j = 0;
    for (; j + 8 <= n; j += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j),
                         _mm256_cvtps_ph(load(x + j), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    for (; j < n; ++j) out[j] = to_float16(x[j]);
}
/// to_bfloat16, bit by bit.
inline void narrow_bf16(const float* x, bfloat16* out, std::size_t n) noexcept {
    std::size_t j = 0;
    for (; j + 8 <= n; j += 8) {
        const __m256i bits = _mm256_castps_si256(load(x + j)), high = _mm256_srli_epi32(bits, 16);
        const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
        const __m256i nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7F800000));
        const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
        const __m256i rounded =
            _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7FFF), odd)), 16);
        const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
        const __m256i words = _mm256_blendv_epi8(rounded, quiet, nan);
        // packs within halves: the halves' first quarters belong together
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j), _mm256_castsi256_si128(packed));
    }
    for (; j < n; ++j) out[j] = to_bfloat16(x[j]);
}

template <class Group>
[[gnu::always_inline]] inline __m256 scale_of(const Group* x) noexcept {
    return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<short>(x->scale.bits)));
}
/// 8 channels of a group, from channel 8 * quarter on; `scale` in all lanes.
[[gnu::always_inline]] inline __m256 channels(const int8_group* x, __m256 scale,
                                              std::size_t quarter) noexcept {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x->q + 8 * quarter));
    return scale * _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
[[gnu::always_inline]] inline __m256 channels(const int4_group* x, __m256 scale,
                                              std::size_t quarter) noexcept {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x->q + 8 * (quarter % 2)));
    const __m256i both = _mm256_cvtepu8_epi32(bytes);
    const __m256i own =
        quarter < 2 ? _mm256_and_si256(both, _mm256_set1_epi32(15)) : _mm256_srli_epi32(both, 4);
    return scale * _mm256_cvtepi32_ps(_mm256_sub_epi32(own, _mm256_set1_epi32(8)));
}
template <class Group>
[[gnu::always_inline]] inline void widen_groups(const Group* x, std::size_t x_stride, std::size_t rows,
                                                std::size_t dim, float* out, std::size_t out_stride,
                                                const void* next) noexcept {
    const std::uintptr_t ahead = distance(x, rows * x_stride, next);
    for (std::size_t j = 0; j < rows; ++j, x += x_stride, out += out_stride) {
        const std::uintptr_t row = reinterpret_cast<std::uintptr_t>(x) + ahead;
        for (std::size_t byte = 0; byte < x_stride * sizeof(Group); byte += 64) prefetch(row + byte);
        const Group* group = x;
        std::size_t c = 0;
        for (; c + 32 <= dim; c += 32, ++group) {
            const __m256 scale = scale_of(group);
#    pragma GCC unroll 4
            for (std::size_t i = 0; i < 4; ++i) _mm256_storeu_ps(out + c + 8 * i, channels(group, scale, i));
        }
        for (std::size_t quarter = 0; c < dim; ++quarter, c += 8) {
            const __m256i mask = dim - c < 8 ? mask_of(dim - c) : _mm256_set1_epi32(-1);
            _mm256_maskstore_ps(out + c, mask, channels(group, scale_of(group), quarter));
        }
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
// Without VNNI sums of products of bytes take as many instructions as those of floats.
using scalar::fast_integers;
using scalar::largest_products;
using scalar::to_codes;

// int8 and int4 rows by way of floats.
inline constexpr auto& dots_int8 = dots_by<widen_int8, dots_f32, int8_group>;
inline constexpr auto& dots_int4 = dots_by<widen_int4, dots_f32, int4_group>;
inline constexpr auto& weighted_sum_int8 = weighted_sum_by<widen_int8, weighted_sum_f32, int8_group>;
inline constexpr auto& weighted_sum_int4 = weighted_sum_by<widen_int4, weighted_sum_f32, int4_group>;
inline constexpr auto& distances_int8 = distances_by<widen_int8, distances_f32, int8_group>;
inline constexpr auto& distances_int4 = distances_by<widen_int4, distances_f32, int4_group>;

}  // namespace kvcull::inline KVCULL_ABI::simd::avx2

KVCULL_TARGET_END

#endif
