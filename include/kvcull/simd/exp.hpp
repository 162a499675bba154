#pragma once
/// What all softmax kernels share: the exponential (same range reduction, same polynomial, one table of
/// constants) and a maximum.

#include <bit>
#include <cstdint>

#include "../base/config.hpp"
#include "target.hpp"

namespace kvcull::inline KVCULL_ABI::simd {

/// exp(x) = 2^k exp(r) with k = round(x / ln 2) and |r| <= ln 2 / 2; exp(r) is a polynomial of degree 6.
/// Below `smallest` the result would be subnormal and is 0.
struct ExpConstants {
    static constexpr float smallest = -87.33654F;      // ln 2^-126, rounded up
    static constexpr float inverse_ln2 = 1.44269502F;  // 1 / ln 2
    static constexpr float ln2_high = 0.693359375F;    // 9 bits, so k * ln2_high is exact
    static constexpr float ln2_low = -2.12194440e-4F;  // ln 2 - ln2_high
    static constexpr float rounder = 12582912.0F;      // 1.5 * 2^23: adding it rounds to an integer
    // exp(r) = 1 + r + r^2 (c[0] + c[1] r + c[2] r^2 + ..): minimax fit, relative error below 0.07 * 2^-24
    static constexpr float c[5] = {0.5F, 0.166665345F, 0.0416672379F, 0.00836750958F, 0.00138637563F};
};

KVCULL_PRECISE_BEGIN

/// out = max(out, x); a NaN in x is ignored. Chosen by bits and passed by reference: with -ffast-math Clang
/// takes
/// `?:` between floats, float parameters and float results for finite numbers, even in a precise region.
inline void raise(float& out, const float& x) noexcept {
    out = std::bit_cast<float>(x > out ? std::bit_cast<std::uint32_t>(x) : std::bit_cast<std::uint32_t>(out));
}

/// exp(x) for x <= 0; x = -Inf gives 0. Error below 2 ulp for x >= ExpConstants::smallest, 2^-126 below it.
[[nodiscard]] inline float exp_non_positive(const float& x) noexcept {
    using C = ExpConstants;
    float clamped = C::smallest;
    raise(clamped, x);
    const float shifted = clamped * C::inverse_ln2 + C::rounder;
    const float k = shifted - C::rounder;
    const float r = (clamped - k * C::ln2_high) - k * C::ln2_low;
    const float p = (((C::c[4] * r + C::c[3]) * r + C::c[2]) * r + C::c[1]) * r + C::c[0];
    const float mantissa = ((p * r) * r + r) + 1.0F;
    // The low bits of `shifted` hold k; 127 is the exponent's bias.
    const std::uint32_t exponent = (std::bit_cast<std::uint32_t>(shifted) + 127U) << 23U;
    return x < C::smallest ? 0.0F : mantissa * std::bit_cast<float>(exponent);
}

KVCULL_PRECISE_END

}  // namespace kvcull::inline KVCULL_ABI::simd
