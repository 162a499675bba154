#pragma once
/// Kernels for AVX-512 (F, BW, DQ, VL). kernels.hpp says what each one means; here is how.
///
/// A sum over channels (dot product, distance) keeps one vector of 16 partial sums (channel c goes to lane c
/// % 16, fused multiply-adds in order) and adds the lanes in one fixed tree, whatever the shape of the tile
/// that computes it. A weighted sum is one chain of fused multiply-adds per channel, row after row, as in
/// avx2.hpp: same bits. Tails are masked. Errors: dot at most (dim / 16 + 5) 2^-24 sum |q_c k_c|; weighted
/// sum rows * 2^-24 sum |w_j v_j[c]|.
///
/// The BF16 extension is not used: its dot product would round the query to bfloat16 first, and its
/// conversion takes subnormal numbers for zero.

#include "target.hpp"

#if KVCULL_X86

#    include <immintrin.h>

#    include <cstddef>
#    include <cstdint>
#    include <cstring>

#    include "../base/quantised.hpp"
#    include "../base/types.hpp"
#    include "ahead.hpp"
#    include "cpuid.hpp"

namespace kvcull::inline KVCULL_ABI::simd::avx512 {

/// Whether CPU and operating system have all of it.
[[nodiscard]] inline bool supported() noexcept {
    constexpr std::uint32_t features = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    constexpr std::uint32_t saved = 0xE6;
    const CpuId cpu;
    return (cpu.leaf7_ebx & features) == features && (cpu.saved_state & saved) == saved;
}

}  // namespace kvcull::inline KVCULL_ABI::simd::avx512

KVCULL_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl")
KVCULL_AVX512_WARNINGS_BEGIN

namespace kvcull::inline KVCULL_ABI::simd::avx512 {

// As in avx2.hpp, sums and products are operators where there is one, and NaN is told by integers.
[[gnu::always_inline]] inline __m512 fma(__m512 a, __m512 b, __m512 c) noexcept {
    return _mm512_fmadd_ps(a, b, c);
}
[[gnu::always_inline]] inline __m512 zero() noexcept {
    return _mm512_castsi512_ps(_mm512_set1_epi32(0));
}
/// The first `count` lanes.
[[gnu::always_inline]] inline __mmask16 mask_of(std::size_t count) noexcept {
    return static_cast<__mmask16>(count < 16 ? (1U << count) - 1U : 0xFFFFU);
}
[[gnu::always_inline]] inline __m512 widened(__m256i half, float16) noexcept {
    return _mm512_cvtph_ps(half);
}
[[gnu::always_inline]] inline __m512 widened(__m256i half, bfloat16) noexcept {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
[[gnu::always_inline]] inline __m512 load(const float* x) noexcept {
    return _mm512_loadu_ps(x);
}
template <class T>
[[gnu::always_inline]] inline __m512 load(const T* x) noexcept {
    return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), T{});
}
/// The lanes of a mask, zero in the others; memory behind them is not touched.
[[gnu::always_inline]] inline __m512 load_part(const float* x, __mmask16 mask) noexcept {
    return _mm512_maskz_loadu_ps(mask, x);
}
template <class T>
[[gnu::always_inline]] inline __m512 load_part(const T* x, __mmask16 mask) noexcept {
    return widened(_mm256_maskz_loadu_epi16(mask, x), T{});
}

/// A group of a row, its scale in all lanes.
template <class Group>
struct ScaledGroup {
    const Group* group;
    __m512 scale;
};
// How tiles read rows: `step` channels at a time, in vectors of 16, and how many channels lie in a line.
template <class T>
inline constexpr std::size_t step = 16;
template <>
inline constexpr std::size_t step<int8_group> = 32;
template <>
inline constexpr std::size_t step<int4_group> = 32;
template <class T>
inline constexpr std::size_t line = step<T> == 16    ? 64 / sizeof(T)
                                    : sizeof(T) > 32 ? 32
                                                     : 64;
/// Elements and bytes from a row's start to channel `c`.
template <class T>
[[nodiscard]] constexpr std::size_t elements_to(std::size_t c) noexcept {
    return step<T> == 16 ? c : c / step<T>;
}
template <class T>
[[nodiscard]] constexpr std::size_t bytes_to(std::size_t c) noexcept {
    return elements_to<T>(c) * sizeof(T);
}
/// The `step` channels of a row that begin at an element.
template <class T>
[[gnu::always_inline]] inline const T* part_at(const T* element) noexcept {
    return element;
}
template <class Group>
[[gnu::always_inline]] inline ScaledGroup<Group> scaled(const Group* group) noexcept {
    return {group, _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(group->scale.bits)))};
}
[[gnu::always_inline]] inline ScaledGroup<int8_group> part_at(const int8_group* element) noexcept {
    return scaled(element);
}
[[gnu::always_inline]] inline ScaledGroup<int4_group> part_at(const int4_group* element) noexcept {
    return scaled(element);
}
/// The first or second 16 channels of a part.
template <class T>
[[gnu::always_inline]] inline __m512 channels(const T* part, std::size_t) noexcept {
    return load(part);
}
[[gnu::always_inline]] inline __m512 channels(ScaledGroup<int8_group> part, std::size_t half) noexcept {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(part.group->q + 16 * half));
    return part.scale * _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
/// Looked up among the 16 numbers that a scale allows; an index counts modulo 16.
[[gnu::always_inline]] inline __m512 channels(ScaledGroup<int4_group> part, std::size_t half) noexcept {
    const __m512 steps = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(part.group->q));
    const __m512i both = _mm512_cvtepu8_epi32(bytes);
    return _mm512_permutexvar_ps(half == 0 ? both : _mm512_srli_epi32(both, 4), part.scale * steps);
}
/// The lanes of a mask, zero in the others.
template <class T>
[[gnu::always_inline]] inline __m512 channels_part(const T* part, std::size_t, __mmask16 mask) noexcept {
    return load_part(part, mask);
}
template <class Group>
[[gnu::always_inline]] inline __m512 channels_part(ScaledGroup<Group> part, std::size_t half,
                                                   __mmask16 mask) noexcept {
    return _mm512_maskz_mov_ps(mask, channels(part, half));
}
/// Pins a value that several multiply-adds use in a register: GCC would load it again for each of them.
[[gnu::always_inline]] inline __m512 pinned(__m512 x) noexcept {
    __asm__("" : "+v"(x));
    return x;
}

/// [a's upper and lower half added | b's]
[[gnu::always_inline]] inline __m512 halves(__m512 a, __m512 b) noexcept {
    return _mm512_mask_blend_ps(0xFF00, a, b) + _mm512_shuffle_f32x4(a, b, 0x4E);
}
/// [a's quarters added (0 + 2) + (1 + 3) | b's | c's | d's]
[[gnu::always_inline]] inline __m512 quarters(__m512 a, __m512 b, __m512 c, __m512 d) noexcept {
    const __m512 ab = halves(a, b), cd = halves(c, d);
    return _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xDD);
}
/// The sums of four vectors: quarters as above, then the lanes of that quarter (0 + 2) + (1 + 3).
[[gnu::always_inline]] inline __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) noexcept {
    __m512 all = quarters(a, b, c, d);
    all = all + _mm512_permute_ps(all, 0x4E);
    all = all + _mm512_permute_ps(all, 0xB1);
    const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    return _mm512_castps512_ps128(_mm512_permutexvar_ps(first, all));
}
/// The same of sixteen.
[[gnu::always_inline]] inline __m512 sums(const __m512* x) noexcept {
    const __m512 a = quarters(x[0], x[4], x[8], x[12]), b = quarters(x[1], x[5], x[9], x[13]);
    const __m512 c = quarters(x[2], x[6], x[10], x[14]), d = quarters(x[3], x[7], x[11], x[15]);
    const __m512d even = _mm512_castps_pd(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
    const __m512d odd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
    return _mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)) + _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd));
}

// What a pair of a query and a row sums over their channels; kernels.hpp says why. `at` moves to a later
// pair. What is summed `often` has tiles for two, three and five queries too, for which the others save the
// code.
struct Product {
    static constexpr bool often = true;
    [[nodiscard]] Product at(std::size_t, std::size_t) const noexcept { return {}; }
    [[gnu::always_inline]] __m512 add(__m512 query, __m512 row, __m512 sum, std::size_t,
                                      std::size_t) const noexcept {
        return fma(query, row, sum);
    }
};
struct Distance {
    static constexpr bool often = false;
    [[nodiscard]] Distance at(std::size_t, std::size_t) const noexcept { return {}; }
    [[gnu::always_inline]] __m512 add(__m512 query, __m512 row, __m512 sum, std::size_t,
                                      std::size_t) const noexcept {
        const __m512 apart = row - query;
        return fma(apart, apart, sum);
    }
};
struct StretchedDistance {
    static constexpr bool often = false;
    const float* z;
    std::size_t stride;

    [[nodiscard]] StretchedDistance at(std::size_t query, std::size_t row) const noexcept {
        return {z + query * stride + row, stride};
    }
    [[gnu::always_inline]] __m512 add(__m512 query, __m512 row, __m512 sum, std::size_t g,
                                      std::size_t r) const noexcept {
        const __m512 apart = fma(_mm512_set1_ps(z[g * stride + r]), row - query, row);
        return fma(apart, apart, sum);
    }
};

/// `step` channels of Q queries and R rows.
template <std::size_t Q, std::size_t R, class Term, class T>
[[gnu::always_inline]] inline void pair_step(Term term, const float* q, std::size_t q_stride, const T* k,
                                             std::size_t k_stride, __m512* sum) noexcept {
    decltype(part_at(k)) part[R];
#    pragma GCC unroll 16
    for (std::size_t r = 0; r < R; ++r) part[r] = part_at(k + r * k_stride);
#    pragma GCC unroll 2
    for (std::size_t half = 0; half < step<T> / 16; ++half) {
        __m512 row[R];
#    pragma GCC unroll 16
        for (std::size_t r = 0; r < R; ++r) row[r] = channels(part[r], half);
#    pragma GCC unroll 16
        for (std::size_t g = 0; g < Q; ++g) {
            const __m512 query = pinned(load(q + g * q_stride + 16 * half));
#    pragma GCC unroll 16
            for (std::size_t r = 0; r < R; ++r)
                sum[g * R + r] = term.add(query, row[r], sum[g * R + r], g, r);
        }
    }
}

/// Q queries times R rows in registers. Fetches the R rows that lie `ahead`.
template <std::size_t Q, std::size_t R, class Term, class T>
[[gnu::always_inline]] inline void pair_tile(Term term, const float* q, std::size_t q_stride, const T* k,
                                             std::size_t k_stride, std::size_t dim, float scale, float* out,
                                             std::size_t out_stride, std::uintptr_t ahead) noexcept {
    constexpr std::size_t count = Q * R;
    Fetch fetch(k, ahead, R, step<T> == 16 ? dim : 0, k_stride, bytes_to<T>(line<T>));
    __m512 sum[count];
#    pragma GCC unroll 20
    for (std::size_t i = 0; i < count; ++i) sum[i] = zero();
    std::size_t c = 0;
    for (; c + step<T> <= dim; c += step<T>, k += elements_to<T>(step<T>)) {
        if (c % line<T> == 0) fetch.template next<R>();
        pair_step<Q, R>(term, q + c, q_stride, k, k_stride, sum);
    }
    for (std::size_t half = 0; c < dim; c += 16, ++half) {
        const __mmask16 mask = mask_of(dim - c);
#    pragma GCC unroll 16
        for (std::size_t g = 0; g < Q; ++g) {
            const __m512 query = load_part(q + g * q_stride + c, mask);
#    pragma GCC unroll 16
            for (std::size_t r = 0; r < R; ++r)
                sum[g * R + r] = term.add(query, channels_part(part_at(k + r * k_stride), half, mask),
                                          sum[g * R + r], g, r);
        }
    }
    alignas(64) float result[(count + 3) / 4 * 4];
    if constexpr (count == 16) {
        _mm512_store_ps(result, sums(sum) * _mm512_set1_ps(scale));
    } else {
        constexpr std::size_t last = count - 1;
#    pragma GCC unroll 5
        for (std::size_t i = 0; i < count; i += 4) {
            const __m128 four = sums(sum[i], sum[i + 1 < last ? i + 1 : last],
                                     sum[i + 2 < last ? i + 2 : last], sum[i + 3 < last ? i + 3 : last]);
            _mm_store_ps(result + i, four * _mm_set1_ps(scale));
        }
    }
#    pragma GCC unroll 5
    for (std::size_t g = 0; g < Q; ++g) std::memcpy(out + g * out_stride, result + g * R, R * sizeof(float));
}

/// Q queries over all rows, R at a time.
template <std::size_t Q, std::size_t R, class Term, class T>
[[gnu::always_inline]] inline void pair_rows(Term term, const float* q, std::size_t q_stride, const T* k,
                                             std::size_t k_stride, std::size_t rows, std::size_t dim,
                                             float scale, float* out, std::size_t out_stride,
                                             std::uintptr_t ahead) noexcept {
    std::size_t j = 0;
    for (; j + R <= rows; j += R)
        pair_tile<Q, R>(term.at(0, j), q, q_stride, k + j * k_stride, k_stride, dim, scale, out + j,
                        out_stride, ahead);
    for (; j < rows; ++j)
        pair_tile<Q, 1>(term.at(0, j), q, q_stride, k + j * k_stride, k_stride, dim, scale, out + j,
                        out_stride, ahead);
}

template <class Term, class T>
[[gnu::always_inline]] inline void pairs(Term term, const float* q, std::size_t q_stride, std::size_t group,
                                         const T* k, std::size_t k_stride, std::size_t rows, std::size_t dim,
                                         float scale, float* out, std::size_t out_stride,
                                         const void* next) noexcept {
    const std::uintptr_t ahead = distance(k, rows * k_stride, next);
    const bool once = group == 1 || group == 4 || (Term::often && group < 6);
    const std::size_t chunk = once ? rows : chunk_rows(bytes_to<T>(dim));
    for (std::size_t j = 0; j < rows; j += chunk) {
        const std::size_t count = rows - j < chunk ? rows - j : chunk;
        for (std::size_t g = 0; g < group;) {
            const Term pair = term.at(g, j);
            const float* query = q + g * q_stride;
            const T* row = k + j * k_stride;
            float* to = out + g * out_stride + j;
            const std::size_t left = group - g;
            if (Term::often && left == 5) {
                pair_rows<5, 4>(pair, query, q_stride, row, k_stride, count, dim, scale, to, out_stride,
                                ahead);
                g = group;
            } else if (left >= 4) {
                pair_rows<4, 4>(pair, query, q_stride, row, k_stride, count, dim, scale, to, out_stride,
                                ahead);
                g += 4;
            } else if constexpr (Term::often) {
                if (left == 3)
                    pair_rows<3, 4>(pair, query, q_stride, row, k_stride, count, dim, scale, to, out_stride,
                                    ahead);
                else if (left == 2)
                    pair_rows<2, 4>(pair, query, q_stride, row, k_stride, count, dim, scale, to, out_stride,
                                    ahead);
                else
                    pair_rows<1, 4>(pair, query, q_stride, row, k_stride, count, dim, scale, to, out_stride,
                                    ahead);
                g = group;
            } else {
                pair_rows<1, 4>(pair, query, q_stride, row, k_stride, count, dim, scale, to, out_stride,
                                ahead);
                ++g;
            }
        }
    }
}

inline void dots_f32(const float* q, std::size_t q_stride, std::size_t group, const float* k,
                     std::size_t k_stride, std::size_t rows, std::size_t dim, float scale, float* out,
                     std::size_t out_stride, const void* next) noexcept {
    pairs(Product{}, q, q_stride, group, k, k_stride, rows, dim, scale, out, out_stride, next);
}
inline void dots_f16(const float* q, std::size_t q_stride, std::size_t group, const float16* k,
                     std::size_t k_stride, std::size_t rows, std::size_t dim, float scale, float* out,
                     std::size_t out_stride, const void* next) noexcept {
    pairs(Product{}, q, q_stride, group, k, k_stride, rows, dim, scale, out, out_stride, next);
}
inline void dots_bf16(const float* q, std::size_t q_stride, std::size_t group, const bfloat16* k,
                      std::size_t k_stride, std::size_t rows, std::size_t dim, float scale, float* out,
                      std::size_t out_stride, const void* next) noexcept {
    pairs(Product{}, q, q_stride, group, k, k_stride, rows, dim, scale, out, out_stride, next);
}
inline void dots_int8(const float* q, std::size_t q_stride, std::size_t group, const int8_group* k,
                      std::size_t k_stride, std::size_t rows, std::size_t dim, float scale, float* out,
                      std::size_t out_stride, const void* next) noexcept {
    pairs(Product{}, q, q_stride, group, k, k_stride, rows, dim, scale, out, out_stride, next);
}
inline void dots_int4(const float* q, std::size_t q_stride, std::size_t group, const int4_group* k,
                      std::size_t k_stride, std::size_t rows, std::size_t dim, float scale, float* out,
                      std::size_t out_stride, const void* next) noexcept {
    pairs(Product{}, q, q_stride, group, k, k_stride, rows, dim, scale, out, out_stride, next);
}

template <class T>
[[gnu::always_inline]] inline void distances(const float* o, std::size_t o_stride, std::size_t group,
                                             const T* v, std::size_t v_stride, std::size_t rows,
                                             std::size_t dim, const float* z, std::size_t z_stride,
                                             float* out, std::size_t out_stride, const void* next) noexcept {
    if (z == nullptr)
        pairs(Distance{}, o, o_stride, group, v, v_stride, rows, dim, 1.0F, out, out_stride, next);
    else
        pairs(StretchedDistance{z, z_stride}, o, o_stride, group, v, v_stride, rows, dim, 1.0F, out,
              out_stride, next);
}
inline void distances_f32(const float* o, std::size_t o_stride, std::size_t group, const float* v,
                          std::size_t v_stride, std::size_t rows, std::size_t dim, const float* z,
                          std::size_t z_stride, float* out, std::size_t out_stride,
                          const void* next) noexcept {
    distances(o, o_stride, group, v, v_stride, rows, dim, z, z_stride, out, out_stride, next);
}
inline void distances_f16(const float* o, std::size_t o_stride, std::size_t group, const float16* v,
                          std::size_t v_stride, std::size_t rows, std::size_t dim, const float* z,
                          std::size_t z_stride, float* out, std::size_t out_stride,
                          const void* next) noexcept {
    distances(o, o_stride, group, v, v_stride, rows, dim, z, z_stride, out, out_stride, next);
}
inline void distances_bf16(const float* o, std::size_t o_stride, std::size_t group, const bfloat16* v,
                           std::size_t v_stride, std::size_t rows, std::size_t dim, const float* z,
                           std::size_t z_stride, float* out, std::size_t out_stride,
                           const void* next) noexcept {
    distances(o, o_stride, group, v, v_stride, rows, dim, z, z_stride, out, out_stride, next);
}

/// Q outputs times C vectors of channels in registers, over `rows` rows. Row j fetches what lies at
/// `fetch + j * fetch_row`.
template <std::size_t Q, std::size_t C, class T>
[[gnu::always_inline]] inline void sum_tile(const float* w, std::size_t w_stride, const T* v,
                                            std::size_t v_stride, std::size_t first, std::size_t rows,
                                            float* out, std::size_t out_stride, std::uintptr_t fetch,
                                            std::size_t fetch_row) noexcept {
    v += elements_to<T>(first);
    __m512 sum[Q * C];
#    pragma GCC unroll 16
    for (std::size_t i = 0; i < Q * C; ++i) sum[i] = load(out + i / C * out_stride + i % C * 16);
    for (std::size_t j = 0; j < rows; ++j) {
        __m512 row[C];
#    pragma GCC unroll 8
        for (std::size_t c = 0; c < C; ++c) {
            const std::size_t half = C == 1 ? first / 16 % 2 : c % 2;
            row[c] = channels(part_at(v + elements_to<T>(c * 16) + j * v_stride), half);
            if (c * 16 % line<T> == 0) prefetch(fetch + j * fetch_row + bytes_to<T>(c * 16));
        }
#    pragma GCC unroll 8
        for (std::size_t g = 0; g < Q; ++g) {
            const __m512 weight = pinned(_mm512_set1_ps(w[g * w_stride + j]));
#    pragma GCC unroll 8
            for (std::size_t c = 0; c < C; ++c) sum[g * C + c] = fma(weight, row[c], sum[g * C + c]);
        }
    }
#    pragma GCC unroll 16
    for (std::size_t i = 0; i < Q * C; ++i) _mm512_storeu_ps(out + i / C * out_stride + i % C * 16, sum[i]);
}

/// The last channels, fewer than 16.
template <std::size_t Q, class T>
[[gnu::always_inline]] inline void sum_tail(const float* w, std::size_t w_stride, const T* v,
                                            std::size_t v_stride, std::size_t first, std::size_t rows,
                                            __mmask16 mask, float* out, std::size_t out_stride) noexcept {
    __m512 sum[Q];
#    pragma GCC unroll 8
    for (std::size_t g = 0; g < Q; ++g) sum[g] = load_part(out + g * out_stride, mask);
    for (std::size_t j = 0; j < rows; ++j) {
        const __m512 row =
            channels_part(part_at(v + elements_to<T>(first) + j * v_stride), first / 16 % 2, mask);
#    pragma GCC unroll 8
        for (std::size_t g = 0; g < Q; ++g) sum[g] = fma(_mm512_set1_ps(w[g * w_stride + j]), row, sum[g]);
    }
#    pragma GCC unroll 8
    for (std::size_t g = 0; g < Q; ++g) _mm512_mask_storeu_ps(out + g * out_stride, mask, sum[g]);
}

/// Q outputs over all rows, in blocks of 16 rows, so that a block stays in the first-level cache while all
/// its channels are summed, and the partial sums are loaded and stored once per sixteen multiply-adds.
template <std::size_t Q, std::size_t C, class T>
[[gnu::always_inline]] inline void sum_rows(const float* w, std::size_t w_stride, const T* v,
                                            std::size_t v_stride, std::size_t rows, std::size_t dim,
                                            float* out, std::size_t out_stride,
                                            std::uintptr_t ahead) noexcept {
    for (std::size_t j = 0; j < rows; j += 16) {
        const std::size_t count = rows - j < 16 ? rows - j : 16;
        const float* weight = w + j;
        const T* row = v + j * v_stride;
        const std::uintptr_t fetch = reinterpret_cast<std::uintptr_t>(row) + ahead;
        const bool dense = step<T> == 16 && v_stride == dim;
        const std::size_t fetch_row = (dense ? 16 * C : v_stride) * sizeof(T), fetch_part = dense ? count : 1;
        std::size_t c = 0;
        for (; c + 16 * C <= dim; c += 16 * C)
            sum_tile<Q, C>(weight, w_stride, row, v_stride, c, count, out + c, out_stride,
                           fetch + bytes_to<T>(c) * fetch_part, fetch_row);
        for (; c + 16 <= dim; c += 16)
            sum_tile<Q, 1>(weight, w_stride, row, v_stride, c, count, out + c, out_stride,
                           fetch + bytes_to<T>(c) * fetch_part, dense ? 16 * sizeof(T) : fetch_row);
        if (c < dim)
            sum_tail<Q>(weight, w_stride, row, v_stride, c, count, mask_of(dim - c), out + c, out_stride);
    }
}

template <class T>
[[gnu::always_inline]] inline void weighted_sum(const float* w, std::size_t w_stride, std::size_t group,
                                                const T* v, std::size_t v_stride, std::size_t rows,
                                                std::size_t dim, float* out, std::size_t out_stride,
                                                const void* next) noexcept {
    const std::uintptr_t ahead = distance(v, rows * v_stride, next);
    const std::size_t chunk = group <= 4 ? rows : chunk_rows(bytes_to<T>(dim));
    for (std::size_t j = 0; j < rows; j += chunk) {
        const std::size_t count = rows - j < chunk ? rows - j : chunk;
        for (std::size_t g = 0; g < group; g += 4) {
            const float* weight = w + g * w_stride + j;
            const T* row = v + j * v_stride;
            float* to = out + g * out_stride;
            switch (group - g) {
                case 1:
                    sum_rows<1, 8>(weight, w_stride, row, v_stride, count, dim, to, out_stride, ahead);
                    break;
                case 2:
                    sum_rows<2, 8>(weight, w_stride, row, v_stride, count, dim, to, out_stride, ahead);
                    break;
                case 3:
                    sum_rows<3, 4>(weight, w_stride, row, v_stride, count, dim, to, out_stride, ahead);
                    break;
                default:
                    sum_rows<4, 4>(weight, w_stride, row, v_stride, count, dim, to, out_stride, ahead);
            }
        }
    }
}

inline void weighted_sum_f32(const float* w, std::size_t w_stride, std::size_t group, const float* v,
                             std::size_t v_stride, std::size_t rows, std::size_t dim, float* out,
                             std::size_t out_stride, const void* next) noexcept {
    weighted_sum(w, w_stride, group, v, v_stride, rows, dim, out, out_stride, next);
}
inline void weighted_sum_f16(const float* w, std::size_t w_stride, std::size_t group, const float16* v,
                             std::size_t v_stride, std::size_t rows, std::size_t dim, float* out,
                             std::size_t out_stride, const void* next) noexcept {
    weighted_sum(w, w_stride, group, v, v_stride, rows, dim, out, out_stride, next);
}
inline void weighted_sum_bf16(const float* w, std::size_t w_stride, std::size_t group, const bfloat16* v,
                              std::size_t v_stride, std::size_t rows, std::size_t dim, float* out,
                              std::size_t out_stride, const void* next) noexcept {
    weighted_sum(w, w_stride, group, v, v_stride, rows, dim, out, out_stride, next);
}
inline void weighted_sum_int8(const float* w, std::size_t w_stride, std::size_t group, const int8_group* v,
                              std::size_t v_stride, std::size_t rows, std::size_t dim, float* out,
                              std::size_t out_stride, const void* next) noexcept {
    weighted_sum(w, w_stride, group, v, v_stride, rows, dim, out, out_stride, next);
}
inline void weighted_sum_int4(const float* w, std::size_t w_stride, std::size_t group, const int4_group* v,
                              std::size_t v_stride, std::size_t rows, std::size_t dim, float* out,
                              std::size_t out_stride, const void* next) noexcept {
    weighted_sum(w, w_stride, group, v, v_stride, rows, dim, out, out_stride, next);
}

}  // namespace kvcull::inline KVCULL_ABI::simd::avx512

KVCULL_AVX512_WARNINGS_END
KVCULL_TARGET_END

#endif
