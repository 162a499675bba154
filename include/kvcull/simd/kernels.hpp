#pragma once
/// The table of kernels that all upper layers call through: one entry per operation, filled once by what CPU
/// and operating system offer. Take `const Kernels& k = kernels()` once per step and call it per run of rows.
///
/// Adding an instruction set: a header with a namespace of the same functions, an enumerator and a name here,
/// a line each in `compiled`, `available` and `kernels_for`.
///
/// Compiling the kernels takes some seconds in every file that calls them. A program that is compiled with
/// KVCULL_SEPARATE_KERNELS defined everywhere, and with KVCULL_DEFINE_KERNELS too in one file that includes
/// this header, does so once. With CMake: link `kvcull::kernels`.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>

#include "../base/error.hpp"
#include "../base/quantised.hpp"
#include "../base/types.hpp"
#include "exp.hpp"
#include "target.hpp"
#include "transpose.hpp"

#if !defined(KVCULL_SEPARATE_KERNELS) || defined(KVCULL_DEFINE_KERNELS)
#    define KVCULL_KERNELS_HERE 1
#    include "avx2_rows.hpp"
#    include "avx512_rows.hpp"
#    include "neon.hpp"
#    include "scalar.hpp"
#    include "vnni.hpp"
#else
#    define KVCULL_KERNELS_HERE 0
#endif
#if defined(KVCULL_SEPARATE_KERNELS)
#    define KVCULL_KERNELS_INLINE
#else
#    define KVCULL_KERNELS_INLINE inline
#endif

namespace kvcull::inline KVCULL_ABI::simd {

/// Instruction sets; those of one architecture stand in order, each better than the one before it.
enum class Isa : std::uint8_t { scalar, avx2, avx512, neon };
inline constexpr std::array all_isas{Isa::scalar, Isa::avx2, Isa::avx512, Isa::neon};

/// out[g * out_stride + j] = scale * (q_g . k_j) for g < group, j < rows. Float sums.
/// @param next  rows that will be read after these and may be fetched meanwhile, or nullptr.
template <class T>
struct Dots {
    void (*function)(const float* q, std::size_t q_stride, std::size_t group, const T* k,
                     std::size_t k_stride, std::size_t rows, std::size_t dim, float scale, float* out,
                     std::size_t out_stride, const void* next) noexcept;

    void operator()(const float* q, std::size_t q_stride, std::size_t group, const T* k, std::size_t k_stride,
                    std::size_t rows, std::size_t dim, float scale, float* out, std::size_t out_stride,
                    const void* next = nullptr) const noexcept {
        function(q, q_stride, group, k, k_stride, rows, dim, scale, out, out_stride, next);
    }
};

/// out[g * out_stride + c] += sum_j w[g * w_stride + j] * v_j[c], rows added strictly in order. `next` as in
/// Dots.
template <class T>
struct WeightedSum {
    void (*function)(const float* w, std::size_t w_stride, std::size_t group, const T* v,
                     std::size_t v_stride, std::size_t rows, std::size_t dim, float* out,
                     std::size_t out_stride, const void* next) noexcept;

    void operator()(const float* w, std::size_t w_stride, std::size_t group, const T* v, std::size_t v_stride,
                    std::size_t rows, std::size_t dim, float* out, std::size_t out_stride,
                    const void* next = nullptr) const noexcept {
        function(w, w_stride, group, v, v_stride, rows, dim, out, out_stride, next);
    }
};

/// Squared distances of rows from a point per query head: out[g * out_stride + j] = |v_j - o_g|^2, or, with
/// `z`, |v_j + z[g * z_stride + j] (v_j - o_g)|^2. Sums of squares of differences, so nothing cancels and
/// nothing is negative. `next` as in Dots.
template <class T>
struct Distances {
    void (*function)(const float* o, std::size_t o_stride, std::size_t group, const T* v,
                     std::size_t v_stride, std::size_t rows, std::size_t dim, const float* z,
                     std::size_t z_stride, float* out, std::size_t out_stride, const void* next) noexcept;

    void operator()(const float* o, std::size_t o_stride, std::size_t group, const T* v, std::size_t v_stride,
                    std::size_t rows, std::size_t dim, const float* z, std::size_t z_stride, float* out,
                    std::size_t out_stride, const void* next = nullptr) const noexcept {
        function(o, o_stride, group, v, v_stride, rows, dim, z, z_stride, out, out_stride, next);
    }
};

/// One entry per operation. Pointers and lengths only; strides count elements; nothing aliases; any
/// alignment. No kernel reads or writes past the last channel of a row. The result of one (query, row) pair
/// depends on neither the other queries and rows of the call nor on how rows are split into calls.
struct Kernels {
    Isa isa;
    Dots<float> dots_f32;
    Dots<float16> dots_f16;
    Dots<bfloat16> dots_bf16;
    Dots<int8_group> dots_int8;
    Dots<int4_group> dots_int4;
    WeightedSum<float> weighted_sum_f32;
    WeightedSum<float16> weighted_sum_f16;
    WeightedSum<bfloat16> weighted_sum_bf16;
    WeightedSum<int8_group> weighted_sum_int8;
    WeightedSum<int4_group> weighted_sum_int4;
    Distances<float> distances_f32;
    Distances<float16> distances_f16;
    Distances<bfloat16> distances_bf16;
    Distances<int8_group> distances_int8;
    Distances<int4_group> distances_int4;
    /// Softmax of row[n] in place, and its log-sum-exp in *lse. -Inf entries get weight 0. n = 0 or all -Inf:
    /// zeros and -Inf. A NaN or +Inf anywhere: zeros and NaN, so that a bad row votes for nothing. The
    /// log-sum-exp is no return value because Clang's -ffast-math lets no NaN through one.
    void (*softmax)(float* row, std::size_t n, float* lse) noexcept;
    /// out[j] += x[r * x_stride + j] for r < rows, row after row: the bits of `rows` calls of `add`.
    void (*add_rows)(float* out, const float* x, std::size_t x_stride, std::size_t rows,
                     std::size_t n) noexcept;
    /// out[j] += (a z)^2 d, row after row, with a[r * a_stride + j], z and d alike, for r < rows. Without `z`
    /// or `d` (nullptr) that factor is 1. Where a is 0 nothing is added, whatever z and d are.
    void (*add_squares)(float* out, const float* a, std::size_t a_stride, const float* z,
                        std::size_t z_stride, const float* d, std::size_t d_stride, std::size_t rows,
                        std::size_t n) noexcept;
    /// In place of products x[j] = v_j . o: |v_j - o|^2 = |v_j|^2 - 2 x[j] + |o|^2, or, with `z`,
    /// |v_j + z[j] (v_j - o)|^2 = a^2 |v_j|^2 - 2 a z[j] x[j] + z[j]^2 |o|^2 with a = 1 + z[j]. -1 where the
    /// terms cancel by more than five bits or are not finite. norm[j] = |v_j|^2, own = |o|^2.
    /// @returns whether there is no such -1.
    bool (*expand_squares)(float* x, const float* norm, const float* z, float own, std::size_t n) noexcept;
    /// Least and largest entry, 0 included, and the sum: floats over at most 64 terms per lane, double above
    /// them. A NaN makes the sum NaN and is passed over otherwise.
    void (*summarise)(const float* x, std::size_t n, float* least, float* most, double* sum) noexcept;
    /// out[j] = w / (1 - w) with w = factor * x[j]; `out` may be `x`.
    void (*odds)(const float* x, float* out, std::size_t n, float factor) noexcept;
    /// x[j] = sqrt(x[j])
    void (*square_roots)(float* x, std::size_t n) noexcept;
    /// out[j] = max(out[j], x[j])
    void (*maximum)(float* out, const float* x, std::size_t n) noexcept;
    void (*widen_f16)(const float16* x, float* out, std::size_t n) noexcept;
    void (*widen_bf16)(const bfloat16* x, float* out, std::size_t n) noexcept;
    /// Round to nearest even, the same bits as to_float16 and to_bfloat16; NaN stays NaN.
    void (*narrow_f16)(const float* x, float16* out, std::size_t n) noexcept;
    void (*narrow_bf16)(const float* x, bfloat16* out, std::size_t n) noexcept;
    /// out[j * out_stride + c] = channel c < dim of row j < rows, exactly. `next` as in Dots.
    void (*widen_int8)(const int8_group* x, std::size_t x_stride, std::size_t rows, std::size_t dim,
                       float* out, std::size_t out_stride, const void* next) noexcept;
    void (*widen_int4)(const int4_group* x, std::size_t x_stride, std::size_t rows, std::size_t dim,
                       float* out, std::size_t out_stride, const void* next) noexcept;
    /// The row x[n] in groups, the same bits everywhere: a scale of max |x| / 127, or the number of largest
    /// magnitude (of two the negative one) / -8, rounded to float16; then x / scale to the nearest integer,
    /// of two the even one. A group with a number that is not finite, or whose scale overflows, reads as NaN.
    void (*narrow_int8)(const float* x, int8_group* out, std::size_t n) noexcept;
    void (*narrow_int4)(const float* x, int4_group* out, std::size_t n) noexcept;
    /// The finite row x[n] in whole steps, the same bits everywhere: *step = max(least, max |x| / 127), and
    /// out[c] = 128 + x[c] / *step to the nearest integer, which *step times is off by no more than 0.501
    /// steps. `least` is a normal number above 0.
    void (*to_codes)(const float* x, std::size_t n, float least, std::uint8_t* out, float* step) noexcept;
    /// out[a] = the largest of start[b] + sum_c x[a * x_stride + c] y_b[c] over b < count, for a < rows. Four
    /// channels of a row of y lie together, the rows side by side: channel c of row b is y[(c / 4 * count +
    /// b) * 4 + c % 4]. dim is a multiple of 4, count one of 16, neither is 0; every sum must fit.
    void (*largest_products)(const std::uint8_t* x, std::size_t x_stride, std::size_t rows,
                             const std::int8_t* y, const std::int32_t* start, std::size_t count,
                             std::size_t dim, std::int32_t* out) noexcept;
    /// Whether largest_products takes a fraction of the time of as many products of floats.
    bool fast_integers;

    /// out[j] += x[j]
    void add(float* out, const float* x, std::size_t n) const noexcept { add_rows(out, x, n, 1, n); }
};

/// The row x[n] as cached rows of type `type` keep it: row_bytes(type, n) bytes at `out`.
inline void narrow(const Kernels& kernels, DType type, const float* x, std::size_t n,
                   std::byte* out) noexcept {
    switch (type) {
        case DType::f32:
            std::memcpy(out, x, n * sizeof(float));
            break;
        case DType::f16:
            return kernels.narrow_f16(x, reinterpret_cast<float16*>(out), n);
        case DType::bf16:
            return kernels.narrow_bf16(x, reinterpret_cast<bfloat16*>(out), n);
        case DType::int8:
            return kernels.narrow_int8(x, reinterpret_cast<int8_group*>(out), n);
        case DType::int4:
            return kernels.narrow_int4(x, reinterpret_cast<int4_group*>(out), n);
    }
}

[[nodiscard]] constexpr std::string_view name_of(Isa isa) noexcept {
    constexpr std::array<std::string_view, all_isas.size()> names{"scalar", "avx2", "avx512", "neon"};
    return names[static_cast<std::size_t>(isa)];
}

/// @throws config_error that lists the known names.
[[nodiscard]] inline Isa parse_isa(std::string_view name) {
    std::string known = "one of";
    for (const Isa isa : all_isas) {
        if (name == name_of(isa)) return isa;
        known.append(1, ' ').append(name_of(isa));
    }
    detail::fail<error::config_error>("parse_isa", "name", name, known);
}

/// Whether this build has kernels for `isa`: scalar and those of its architecture.
[[nodiscard]] constexpr bool compiled(Isa isa) noexcept {
    return isa == Isa::scalar || (isa == Isa::neon ? KVCULL_NEON : KVCULL_X86) != 0;
}

/// Whether this build, this CPU and its operating system can run `isa`.
[[nodiscard]] KVCULL_KERNELS_INLINE bool available(Isa isa) noexcept;
/// @throws config_error if it is not available here.
[[nodiscard]] KVCULL_KERNELS_INLINE const Kernels& kernels_for(Isa isa);

/// The best available instruction set, whatever KVCULL_ISA says.
[[nodiscard]] inline Isa detect() noexcept {
    Isa best = Isa::scalar;
    for (const Isa isa : all_isas)
        if (available(isa)) best = isa;
    return best;
}

#if KVCULL_KERNELS_HERE
KVCULL_KERNELS_INLINE bool available(Isa isa) noexcept {
#    if KVCULL_X86
    if (isa == Isa::avx512) return avx512::supported();
    if (isa == Isa::avx2) return avx2::supported();
#    endif
    return compiled(isa);
}

/// The table of an instruction set: the functions of its namespace.
#    define KVCULL_KERNELS_OF(isa)                                                                           \
        Kernels {                                                                                            \
            Isa::isa, {isa::dots_f32}, {isa::dots_f16}, {isa::dots_bf16}, {isa::dots_int8},                  \
                {isa::dots_int4}, {isa::weighted_sum_f32}, {isa::weighted_sum_f16},                          \
                {isa::weighted_sum_bf16}, {isa::weighted_sum_int8}, {isa::weighted_sum_int4},                \
                {isa::distances_f32}, {isa::distances_f16}, {isa::distances_bf16}, {isa::distances_int8},    \
                {isa::distances_int4}, isa::softmax, isa::add_rows, isa::add_squares, isa::expand_squares,   \
                isa::summarise, isa::odds, isa::square_roots, isa::maximum, isa::widen_f16, isa::widen_bf16, \
                isa::narrow_f16, isa::narrow_bf16, isa::widen_int8, isa::widen_int4, isa::narrow_int8,       \
                isa::narrow_int4, isa::to_codes, isa::largest_products, isa::fast_integers                   \
        }

KVCULL_KERNELS_INLINE const Kernels& kernels_for(Isa isa) {
    detail::check<error::config_error>(available(isa), "kernels_for", "isa", name_of(isa),
                                       "one that this machine has");
#    if KVCULL_X86
    static constexpr Kernels of_avx2 = KVCULL_KERNELS_OF(avx2), of_avx512 = KVCULL_KERNELS_OF(avx512);
    static constexpr Kernels with_vnni = [] {
        Kernels kernels = of_avx512;
        kernels.to_codes = vnni::to_codes;
        kernels.largest_products = vnni::largest_products;
        kernels.fast_integers = true;
        return kernels;
    }();
    if (isa == Isa::avx2) return of_avx2;
    if (isa == Isa::avx512) return vnni::supported() ? with_vnni : of_avx512;
#    elif KVCULL_NEON
    static constexpr Kernels of_neon = KVCULL_KERNELS_OF(neon);
    if (isa == Isa::neon) return of_neon;
#    endif
    static constexpr Kernels of_scalar = KVCULL_KERNELS_OF(scalar);
    return of_scalar;
}

#    undef KVCULL_KERNELS_OF
#endif
#undef KVCULL_KERNELS_HERE
#undef KVCULL_KERNELS_INLINE

/// `best`, or the instruction set named `cap` if that is a lesser one, or one of another architecture, which
/// `kernels_for` refuses. No cap: nullptr or "".
/// @throws config_error if `cap` is an unknown name.
[[nodiscard]] inline Isa capped(Isa best, const char* cap) {
    if (cap == nullptr || *cap == '\0') return best;
    const Isa wanted = parse_isa(cap);
    return compiled(wanted) ? std::min(best, wanted) : wanted;
}

/// The best kernels, chosen at the first call; the environment variable KVCULL_ISA (scalar, avx2, avx512,
/// neon) caps the choice.
/// @throws config_error if the variable holds an unknown name or one of another architecture.
[[nodiscard]] inline const Kernels& kernels() {
    static const Kernels& chosen = kernels_for(capped(detect(), std::getenv("KVCULL_ISA")));
    return chosen;
}

}  // namespace kvcull::inline KVCULL_ABI::simd
