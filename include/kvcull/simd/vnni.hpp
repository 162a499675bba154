#pragma once
/// Integer kernels for AVX-512 with the VNNI extension, whose multiply-adds take 64 pairs of bytes at a time.
/// kernels.hpp says what each one means; integers have the same bits in whatever order they are summed.

#include "avx512.hpp"

#if KVCULL_X86

#    include <cstddef>
#    include <cstdint>
#    include <cstring>
#    include <limits>

#    include "exp.hpp"

namespace kvcull::inline KVCULL_ABI::simd::vnni {

/// Whether the CPU has the extension; that it has the rest is asked of avx512.hpp.
[[nodiscard]] inline bool supported() noexcept {
    return (CpuId().leaf7_ecx & bit_AVX512VNNI) != 0;
}

}  // namespace kvcull::inline KVCULL_ABI::simd::vnni

KVCULL_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
KVCULL_AVX512_WARNINGS_BEGIN

namespace kvcull::inline KVCULL_ABI::simd::vnni {

using avx512::load;
using avx512::load_part;
using avx512::mask_of;

/// Channels in steps, to the nearest integers.
[[gnu::always_inline]] inline __m512i steps_of(__m512 channels, __m512 factor) noexcept {
    return _mm512_cvt_roundps_epi32(channels * factor, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
[[gnu::always_inline]] inline __m128i codes(__m512 channels, __m512 factor) noexcept {
    return _mm_xor_si128(_mm512_cvtepi32_epi8(steps_of(channels, factor)),
                         _mm_set1_epi8(static_cast<char>(0x80)));
}
/// Of 64 channels: two numbers are packed into one register at a time, lane by lane, and put in order last.
[[gnu::always_inline]] inline __m512i codes_64(const float* x, __m512 factor) noexcept {
    const __m512i low = _mm512_packs_epi32(steps_of(load(x), factor), steps_of(load(x + 16), factor)),
                  high = _mm512_packs_epi32(steps_of(load(x + 32), factor), steps_of(load(x + 48), factor));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_xor_si512(_mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)),
                            _mm512_set1_epi8(static_cast<char>(0x80)));
}
inline void to_codes(const float* x, std::size_t n, float least, std::uint8_t* out, float* step) noexcept {
    const std::size_t whole = n / 16 * 16;
    const __mmask16 mask = mask_of(n - whole);
    __m512 most = _mm512_abs_ps(load_part(x + whole, mask));
    for (std::size_t c = 0; c < whole; c += 16) most = _mm512_max_ps(_mm512_abs_ps(load(x + c)), most);
    *step = least;
    raise(*step, _mm512_reduce_max_ps(most) / 127.0F);
    const __m512 factor = _mm512_set1_ps(1.0F / *step);
    std::size_t c = 0;
    for (; c + 64 <= whole; c += 64) _mm512_storeu_si512(out + c, codes_64(x + c, factor));
    for (; c < whole; c += 16)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + c), codes(load(x + c), factor));
    if (mask != 0) _mm_mask_storeu_epi8(out + whole, mask, codes(load_part(x + whole, mask), factor));
}

/// sum + row * column, four bytes to a lane. The pin is for GCC 12, which would copy every sum twice.
[[gnu::always_inline]] inline __m512i multiply_add(__m512i sum, __m512i row, __m512i column) noexcept {
    sum = _mm512_dpbusd_epi32(sum, row, column);
    __asm__("" : "+v"(sum));
    return sum;
}
/// R rows times 16 C rows of y, all sums in registers.
template <std::size_t R, std::size_t C>
[[gnu::always_inline]] inline void product_tile(const std::uint8_t* x, std::size_t x_stride,
                                                const std::int8_t* y, std::size_t y_stride,
                                                const std::int32_t* start, std::size_t dim,
                                                std::int32_t* out) noexcept {
    __m512i sum[R][C];
#    pragma GCC unroll 4
    for (std::size_t i = 0; i < C; ++i) {
        const __m512i from = _mm512_loadu_si512(start + 16 * i);
#    pragma GCC unroll 4
        for (std::size_t r = 0; r < R; ++r) sum[r][i] = from;
    }
    for (std::size_t c = 0; c < dim; c += 4, y += y_stride) {
        __m512i column[C];
#    pragma GCC unroll 4
        for (std::size_t i = 0; i < C; ++i) column[i] = _mm512_loadu_si512(y + 64 * i);
#    pragma GCC unroll 4
        for (std::size_t r = 0; r < R; ++r) {
            std::int32_t four;
            std::memcpy(&four, x + r * x_stride + c, sizeof four);
            const __m512i row = _mm512_set1_epi32(four);
#    pragma GCC unroll 4
            for (std::size_t i = 0; i < C; ++i) sum[r][i] = multiply_add(sum[r][i], row, column[i]);
        }
    }
#    pragma GCC unroll 4
    for (std::size_t r = 0; r < R; ++r) {
        __m512i largest = sum[r][0];
#    pragma GCC unroll 4
        for (std::size_t i = 1; i < C; ++i) largest = _mm512_max_epi32(largest, sum[r][i]);
        const std::int32_t found = _mm512_reduce_max_epi32(largest);
        if (found > out[r]) out[r] = found;
    }
}

/// A block of y stays in the first-level cache while all rows go over it.
template <std::size_t C>
[[gnu::always_inline]] inline void product_rows(const std::uint8_t* x, std::size_t x_stride, std::size_t rows,
                                                const std::int8_t* y, std::size_t y_stride,
                                                const std::int32_t* start, std::size_t dim,
                                                std::int32_t* out) noexcept {
    std::size_t a = 0;
    for (; a + 4 <= rows; a += 4)
        product_tile<4, C>(x + a * x_stride, x_stride, y, y_stride, start, dim, out + a);
    for (; a < rows; ++a) product_tile<1, C>(x + a * x_stride, x_stride, y, y_stride, start, dim, out + a);
}

inline void largest_products(const std::uint8_t* x, std::size_t x_stride, std::size_t rows,
                             const std::int8_t* y, const std::int32_t* start, std::size_t count,
                             std::size_t dim, std::int32_t* out) noexcept {
    for (std::size_t a = 0; a < rows; ++a) out[a] = std::numeric_limits<std::int32_t>::min();
    std::size_t b = 0;
    for (; b + 64 <= count; b += 64)
        product_rows<4>(x, x_stride, rows, y + 4 * b, 4 * count, start + b, dim, out);
    for (; b < count; b += 16) product_rows<1>(x, x_stride, rows, y + 4 * b, 4 * count, start + b, dim, out);
}

}  // namespace kvcull::inline KVCULL_ABI::simd::vnni

KVCULL_AVX512_WARNINGS_END
KVCULL_TARGET_END

#endif
