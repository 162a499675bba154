#pragma once
/// Kernels for AVX2 + FMA + F16C. kernels.hpp says what each one means; here is how.
///
/// A sum over channels (dot product, distance) keeps one vector of 8 partial sums (channel c goes to lane c %
/// 8, fused multiply-adds in order) and adds the lanes in one fixed tree, whatever the shape of the tile that
/// computes it. A weighted sum is one chain of fused multiply-adds per channel, row after row. Hence tiles,
/// chunks and splits never change a result. Errors: dot at most (dim / 8 + 4) 2^-24 sum |q_c k_c|; weighted
/// sum rows * 2^-24 sum |w_j v_j[c]|.

#include "target.hpp"

#if KVCULL_X86

#    include <immintrin.h>

#    include <cstddef>
#    include <cstdint>

#    include "../base/types.hpp"
#    include "ahead.hpp"
#    include "cpuid.hpp"

namespace kvcull::inline KVCULL_ABI::simd::avx2 {

/// Whether CPU and operating system have all three extensions.
[[nodiscard]] inline bool supported() noexcept {
    constexpr std::uint32_t features = bit_AVX | bit_FMA | bit_F16C, saved = 6;
    const CpuId cpu;
    return (cpu.leaf1_ecx & features) == features && (cpu.leaf7_ebx & bit_AVX2) != 0 &&
           (cpu.saved_state & saved) == saved;
}

/// Eight set words, then eight clear ones: loading from `8 - count` on gives a mask of the first `count`
/// lanes.
alignas(64) inline constexpr std::int32_t mask_words[16] = {-1, -1, -1, -1, -1, -1, -1, -1};

}  // namespace kvcull::inline KVCULL_ABI::simd::avx2

KVCULL_TARGET_BEGIN("avx2,fma,f16c")

namespace kvcull::inline KVCULL_ABI::simd::avx2 {

// Sums and products are written with operators: the wrappers of immintrin.h carry the user's -ffast-math into
// Clang's code even here. FMA, maskload, hadd and the like have no operator; of them Clang can only fold
// constants. Whether a number is NaN is asked of loaded bits, never of a result.
[[gnu::always_inline]] inline __m256 fma(__m256 a, __m256 b, __m256 c) noexcept {
    return _mm256_fmadd_ps(a, b, c);
}
[[gnu::always_inline]] inline __m256i mask_of(std::size_t count) noexcept {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask_words + (8 - count)));
}
[[gnu::always_inline]] inline __m256 load(const float* x) noexcept {
    return _mm256_loadu_ps(x);
}
[[gnu::always_inline]] inline __m256 load(const float16* x) noexcept {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
[[gnu::always_inline]] inline __m256 load(const bfloat16* x) noexcept {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
/// The first `count` < 8 lanes, zero in the others; memory behind them is not touched.
[[gnu::always_inline]] inline __m256 load_part(const float* x, std::size_t count) noexcept {
    return _mm256_maskload_ps(x, mask_of(count));
}
template <class T>
[[gnu::always_inline]] inline __m256 load_part(const T* x, std::size_t count) noexcept {
    alignas(16) T part[8] = {};
    for (std::size_t lane = 0; lane < count; ++lane) part[lane] = x[lane];
    return load(part);
}

/// Pins a value that several multiply-adds use in a register: GCC would load it again for each of them.
[[gnu::always_inline]] inline __m256 pinned(__m256 x) noexcept {
    __asm__("" : "+x"(x));
    return x;
}
/// The sums of four vectors, each ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).
[[gnu::always_inline]] inline __m128 sums(__m256 a, __m256 b, __m256 c, __m256 d) noexcept {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm256_castps256_ps128(all) + _mm256_extractf128_ps(all, 1);
}

// What a pair of a query and a row sums over their channels; kernels.hpp says why. `at` moves to a later
// pair. What is summed `often` has tiles for two and three queries too, for which the others save the code.
struct Product {
    static constexpr bool often = true;
    [[nodiscard]] Product at(std::size_t, std::size_t) const noexcept { return {}; }
    [[gnu::always_inline]] __m256 add(__m256 query, __m256 row, __m256 sum, std::size_t,
                                      std::size_t) const noexcept {
        return fma(query, row, sum);
    }
};
struct Distance {
    static constexpr bool often = false;
    [[nodiscard]] Distance at(std::size_t, std::size_t) const noexcept { return {}; }
    [[gnu::always_inline]] __m256 add(__m256 query, __m256 row, __m256 sum, std::size_t,
                                      std::size_t) const noexcept {
        const __m256 apart = row - query;
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
    [[gnu::always_inline]] __m256 add(__m256 query, __m256 row, __m256 sum, std::size_t g,
                                      std::size_t r) const noexcept {
        const __m256 apart = fma(_mm256_set1_ps(z[g * stride + r]), row - query, row);
        return fma(apart, apart, sum);
    }
};

/// 8 channels of Q queries and R rows.
template <std::size_t Q, std::size_t R, class Term, class T>
[[gnu::always_inline]] inline void pair_step(Term term, const float* q, std::size_t q_stride, const T* k,
                                             std::size_t k_stride, __m256* sum) noexcept {
    __m256 row[R];
#    pragma GCC unroll 8
    for (std::size_t r = 0; r < R; ++r) row[r] = load(k + r * k_stride);
#    pragma GCC unroll 8
    for (std::size_t g = 0; g < Q; ++g) {
        const __m256 query = pinned(load(q + g * q_stride));
#    pragma GCC unroll 8
        for (std::size_t r = 0; r < R; ++r) sum[g * R + r] = term.add(query, row[r], sum[g * R + r], g, r);
    }
}

/// Q queries times R rows in registers. Fetches the R rows that lie `ahead`.
template <std::size_t Q, std::size_t R, class Term, class T>
[[gnu::always_inline]] inline void pair_tile(Term term, const float* q, std::size_t q_stride, const T* k,
                                             std::size_t k_stride, std::size_t dim, float scale, float* out,
                                             std::size_t out_stride, std::uintptr_t ahead) noexcept {
    constexpr std::size_t count = Q * R, line = 64 / sizeof(T);
    Fetch fetch(k, ahead, R, dim, k_stride);
    __m256 sum[count];
#    pragma GCC unroll 8
    for (std::size_t i = 0; i < count; ++i) sum[i] = _mm256_setzero_ps();
    std::size_t c = 0;
    for (; c + 8 <= dim; c += 8) {
        if (c % line == 0) fetch.next<R>();
        pair_step<Q, R>(term, q + c, q_stride, k + c, k_stride, sum);
    }
    if (c < dim) {
#    pragma GCC unroll 8
        for (std::size_t g = 0; g < Q; ++g) {
            const __m256 query = load_part(q + g * q_stride + c, dim - c);
#    pragma GCC unroll 8
            for (std::size_t r = 0; r < R; ++r)
                sum[g * R + r] =
                    term.add(query, load_part(k + r * k_stride + c, dim - c), sum[g * R + r], g, r);
        }
    }
    alignas(16) float result[8];
#    pragma GCC unroll 2
    for (std::size_t i = 0; i < count; i += 4) {
        constexpr std::size_t last = count - 1;
        const __m128 four = sums(sum[i], sum[i + 1 < last ? i + 1 : last], sum[i + 2 < last ? i + 2 : last],
                                 sum[i + 3 < last ? i + 3 : last]);
        _mm_store_ps(result + i, four * _mm_set1_ps(scale));
    }
#    pragma GCC unroll 8
    for (std::size_t i = 0; i < count; ++i) out[i / R * out_stride + i % R] = result[i];
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
    const bool once = group == 1 || group == 4 || (Term::often && group < 4);
    const std::size_t chunk = once ? rows : chunk_rows(dim * sizeof(T));
    for (std::size_t j = 0; j < rows; j += chunk) {
        const std::size_t count = rows - j < chunk ? rows - j : chunk;
        for (std::size_t g = 0; g < group;) {
            const Term pair = term.at(g, j);
            const float* query = q + g * q_stride;
            const T* row = k + j * k_stride;
            float* to = out + g * out_stride + j;
            const std::size_t left = group - g;
            if (left >= 4) {
                pair_rows<4, 2>(pair, query, q_stride, row, k_stride, count, dim, scale, to, out_stride,
                                ahead);
                g += 4;
            } else if constexpr (Term::often) {
                if (left == 3)
                    pair_rows<3, 2>(pair, query, q_stride, row, k_stride, count, dim, scale, to, out_stride,
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
                                            std::size_t v_stride, std::size_t rows, float* out,
                                            std::size_t out_stride, std::uintptr_t fetch,
                                            std::size_t fetch_row) noexcept {
    __m256 sum[Q * C];
#    pragma GCC unroll 8
    for (std::size_t i = 0; i < Q * C; ++i) sum[i] = load(out + i / C * out_stride + i % C * 8);
    for (std::size_t j = 0; j < rows; ++j) {
        __m256 row[C];
#    pragma GCC unroll 8
        for (std::size_t c = 0; c < C; ++c) {
            row[c] = load(v + j * v_stride + c * 8);
            if (c * 8 * sizeof(T) % 64 == 0) prefetch(fetch + j * fetch_row + c * 8 * sizeof(T));
        }
#    pragma GCC unroll 8
        for (std::size_t g = 0; g < Q; ++g) {
            const __m256 weight = _mm256_set1_ps(w[g * w_stride + j]);
#    pragma GCC unroll 8
            for (std::size_t c = 0; c < C; ++c) sum[g * C + c] = fma(weight, row[c], sum[g * C + c]);
        }
    }
#    pragma GCC unroll 8
    for (std::size_t i = 0; i < Q * C; ++i) _mm256_storeu_ps(out + i / C * out_stride + i % C * 8, sum[i]);
}

/// The last `count` < 8 channels.
template <std::size_t Q, class T>
[[gnu::always_inline]] inline void sum_tail(const float* w, std::size_t w_stride, const T* v,
                                            std::size_t v_stride, std::size_t rows, std::size_t count,
                                            float* out, std::size_t out_stride) noexcept {
    __m256 sum[Q];
#    pragma GCC unroll 8
    for (std::size_t g = 0; g < Q; ++g) sum[g] = load_part(out + g * out_stride, count);
    for (std::size_t j = 0; j < rows; ++j) {
        const __m256 row = load_part(v + j * v_stride, count);
#    pragma GCC unroll 8
        for (std::size_t g = 0; g < Q; ++g) sum[g] = fma(_mm256_set1_ps(w[g * w_stride + j]), row, sum[g]);
    }
#    pragma GCC unroll 8
    for (std::size_t g = 0; g < Q; ++g) _mm256_maskstore_ps(out + g * out_stride, mask_of(count), sum[g]);
}

/// Q outputs over all rows, in blocks of 8 rows: eight streams through memory, and the partial sums are
/// loaded and stored once per eight multiply-adds.
template <std::size_t Q, std::size_t C, class T>
[[gnu::always_inline]] inline void sum_rows(const float* w, std::size_t w_stride, const T* v,
                                            std::size_t v_stride, std::size_t rows, std::size_t dim,
                                            float* out, std::size_t out_stride,
                                            std::uintptr_t ahead) noexcept {
    for (std::size_t j = 0; j < rows; j += 8) {
        const std::size_t count = rows - j < 8 ? rows - j : 8;
        const float* weight = w + j;
        const T* row = v + j * v_stride;
        const std::uintptr_t fetch = reinterpret_cast<std::uintptr_t>(row) + ahead;
        const bool dense = v_stride == dim;
        const std::size_t fetch_row = (dense ? 8 * C : v_stride) * sizeof(T), fetch_part = dense ? count : 1;
        std::size_t c = 0;
        for (; c + 8 * C <= dim; c += 8 * C)
            sum_tile<Q, C>(weight, w_stride, row + c, v_stride, count, out + c, out_stride,
                           fetch + c * fetch_part * sizeof(T), fetch_row);
        for (; c + 8 <= dim; c += 8)
            sum_tile<Q, 1>(weight, w_stride, row + c, v_stride, count, out + c, out_stride,
                           fetch + c * fetch_part * sizeof(T), dense ? 8 * sizeof(T) : fetch_row);
        if (c < dim) sum_tail<Q>(weight, w_stride, row + c, v_stride, count, dim - c, out + c, out_stride);
    }
}

template <class T>
[[gnu::always_inline]] inline void weighted_sum(const float* w, std::size_t w_stride, std::size_t group,
                                                const T* v, std::size_t v_stride, std::size_t rows,
                                                std::size_t dim, float* out, std::size_t out_stride,
                                                const void* next) noexcept {
    const std::uintptr_t ahead = distance(v, rows * v_stride, next);
    const std::size_t chunk = group <= 4 ? rows : chunk_rows(dim * sizeof(T));
    for (std::size_t j = 0; j < rows; j += chunk) {
        const std::size_t count = rows - j < chunk ? rows - j : chunk;
        for (std::size_t g = 0; g < group; g += 4) {
            const float* weight = w + g * w_stride + j;
            const T* row = v + j * v_stride;
            float* to = out + g * out_stride;
            switch (group - g) {
                case 1:
                    sum_rows<1, 4>(weight, w_stride, row, v_stride, count, dim, to, out_stride, ahead);
                    break;
                case 2:
                    sum_rows<2, 4>(weight, w_stride, row, v_stride, count, dim, to, out_stride, ahead);
                    break;
                case 3:
                    sum_rows<3, 2>(weight, w_stride, row, v_stride, count, dim, to, out_stride, ahead);
                    break;
                default:
                    sum_rows<4, 2>(weight, w_stride, row, v_stride, count, dim, to, out_stride, ahead);
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

}  // namespace kvcull::inline KVCULL_ABI::simd::avx2

KVCULL_TARGET_END

#endif
