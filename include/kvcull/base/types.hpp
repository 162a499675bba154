#pragma once
/// Number types that cross the public interface, and exact conversions of the 16-bit ones.

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>

#include "config.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Index of a row of one KV head's cache (a slot).
using index_t = std::int32_t;
/// Most rows of a head that `index_t` can number.
inline constexpr std::size_t max_rows = std::numeric_limits<index_t>::max();
/// Position of a token in the original sequence.
using position_t = std::int64_t;

/// A row of a cache goes from one slot to another; the source becomes free.
struct Move {
    index_t from = 0, to = 0;
};

/// IEEE binary16 in storage. Arithmetic happens in float.
struct float16 {
    std::uint16_t bits = 0;
};
/// Upper half of a binary32.
struct bfloat16 {
    std::uint16_t bits = 0;
};

/// Element type of cached rows. An element of int8 and int4 rows is a group of 32 channels with a scale of
/// their own (base/quantised.hpp); of the others it is one channel. Strides count elements.
enum class DType : std::uint8_t { f32, f16, bf16, int8, int4 };
inline constexpr std::array all_dtypes{DType::f32, DType::f16, DType::bf16, DType::int8, DType::int4};

namespace detail {

struct ElementOf {
    std::string_view name;
    std::size_t bytes, channels;
};
inline constexpr std::array<ElementOf, all_dtypes.size()> elements_of{
    {{"f32", 4, 1}, {"f16", 2, 1}, {"bf16", 2, 1}, {"int8", 34, 32}, {"int4", 18, 32}}};

}  // namespace detail

[[nodiscard]] constexpr std::string_view name_of(DType type) noexcept {
    return detail::elements_of[static_cast<std::size_t>(type)].name;
}
/// Bytes of an element.
[[nodiscard]] constexpr std::size_t size_of(DType type) noexcept {
    return detail::elements_of[static_cast<std::size_t>(type)].bytes;
}
/// Channels of an element.
[[nodiscard]] constexpr std::size_t channels_of(DType type) noexcept {
    return detail::elements_of[static_cast<std::size_t>(type)].channels;
}
/// Elements of a row of `dim` channels; the last one may be partly used.
[[nodiscard]] constexpr std::size_t elements(DType type, std::size_t dim) noexcept {
    const std::size_t channels = channels_of(type);
    return dim / channels + (dim % channels != 0 ? 1 : 0);
}
/// Bytes of a row of `dim` channels.
[[nodiscard]] constexpr std::size_t row_bytes(DType type, std::size_t dim) noexcept {
    return elements(type, dim) * size_of(type);
}

/// NaN or infinity, told by bits: std::isfinite is folded away under -ffast-math. By reference, and so are
/// the constants below: newer Clang takes a float that is passed or returned by value for a finite one there.
[[nodiscard]] constexpr bool is_finite(const float& x) noexcept {
    return (std::bit_cast<std::uint32_t>(x) & 0x7F800000U) != 0x7F800000U;
}
[[nodiscard]] constexpr bool all_finite(std::span<const float> numbers) noexcept {
    return std::all_of(numbers.begin(), numbers.end(), [](const float& x) { return is_finite(x); });
}
[[nodiscard]] constexpr bool is_nan(const float& x) noexcept {
    return (std::bit_cast<std::uint32_t>(x) & 0x7FFFFFFFU) > 0x7F800000U;
}
inline constexpr std::uint32_t negative_infinity_bits = 0xFF800000U;
inline constexpr std::uint32_t positive_infinity_bits = 0x7F800000U;
inline constexpr std::uint32_t quiet_nan_bits = 0x7FC00000U;
inline constexpr float negative_infinity_value = std::bit_cast<float>(negative_infinity_bits);
inline constexpr float positive_infinity_value = std::bit_cast<float>(positive_infinity_bits);
inline constexpr float quiet_nan_value = std::bit_cast<float>(quiet_nan_bits);
[[nodiscard]] constexpr const float& negative_infinity() noexcept {
    return negative_infinity_value;
}
[[nodiscard]] constexpr const float& positive_infinity() noexcept {
    return positive_infinity_value;
}
[[nodiscard]] constexpr const float& quiet_nan() noexcept {
    return quiet_nan_value;
}

[[nodiscard]] constexpr float to_float(float x) noexcept {
    return x;
}
[[nodiscard]] constexpr float to_float(bfloat16 x) noexcept {
    return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16U);
}
/// Exact for every input, subnormals included.
[[nodiscard]] constexpr float to_float(float16 x) noexcept {
    const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000U) << 16U;
    std::uint32_t exponent = (x.bits >> 10U) & 0x1FU;
    std::uint32_t mantissa = x.bits & 0x3FFU;
    if (exponent == 0x1F) return std::bit_cast<float>(sign | 0x7F800000U | (mantissa << 13U));
    if (exponent == 0) {
        if (mantissa == 0) return std::bit_cast<float>(sign);
        exponent = 1;
        while ((mantissa & 0x400U) == 0) {
            mantissa <<= 1U;
            --exponent;  // wraps below zero on purpose: the bias added next brings it back
        }
        mantissa &= 0x3FFU;
    }
    return std::bit_cast<float>(sign | ((exponent + 112U) << 23U) | (mantissa << 13U));
}

/// Round to nearest even; overflow gives infinity; NaN stays NaN (quiet).
[[nodiscard]] constexpr float16 to_float16(float value) noexcept {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = (bits >> 16U) & 0x8000U;
    const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
    std::uint32_t half = 0;
    if (magnitude > 0x7F800000U) {
        half = 0x7E00U | ((magnitude >> 13U) & 0x3FFU);
    } else if (magnitude >= 0x47800000U) {  // 2^16 and above, infinity included
        half = 0x7C00U;
    } else if (magnitude >= 0x38800000U) {  // normal; a carry out of the mantissa is the right next exponent
        const std::uint32_t rounded = magnitude + 0xFFFU + ((magnitude >> 13U) & 1U);
        half = (rounded - 0x38000000U) >> 13U;
    } else if (magnitude >= 0x33000000U) {  // subnormal
        const std::uint32_t shift = 126U - (magnitude >> 23U);
        const std::uint32_t mantissa = (magnitude & 0x7FFFFFU) | 0x800000U;
        const std::uint32_t low = mantissa & ((1U << shift) - 1U);
        const std::uint32_t middle = 1U << (shift - 1U);
        half = mantissa >> shift;
        if (low > middle || (low == middle && (half & 1U) != 0)) ++half;
    }
    return {static_cast<std::uint16_t>(sign | half)};
}
[[nodiscard]] constexpr bfloat16 to_bfloat16(float value) noexcept {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    if (is_nan(value)) return {static_cast<std::uint16_t>((bits >> 16U) | 0x40U)};
    return {static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U)};
}

}  // namespace kvcull::inline KVCULL_ABI
