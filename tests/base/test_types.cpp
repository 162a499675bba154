#include "kvcull/base/types.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "kvcull/base/memory.hpp"
#include "support/catch.hpp"

using namespace kvcull;

namespace {

/// A binary floating-point format of 16 bits: 1 sign, `exponent` and `mantissa` bits.
struct Format {
    int exponent, mantissa;

    int bias() const { return (1 << (exponent - 1)) - 1; }
    std::uint32_t infinity() const { return ((1U << exponent) - 1U) << mantissa; }
};
constexpr Format binary16{5, 10}, brain16{8, 7};

/// The value of a finite float by integers and ldexp: no float arithmetic, whose subnormals a user's flags
/// may flush.
double exact(std::uint32_t bits) {
    const int exponent = static_cast<int>(bits >> 23U & 0xFFU);
    const std::uint32_t mantissa = bits & 0x7FFFFFU;
    const double magnitude =
        exponent == 0 ? std::ldexp(mantissa, -149) : std::ldexp(mantissa + 0x800000U, exponent - 150);
    return bits >> 31U != 0 ? -magnitude : magnitude;
}

/// What the conversion instructions give (VCVTPS2PH, rounding to nearest even): scale by the spacing of the
/// target format around x, round to an integer, write it down.
std::uint16_t reference(std::uint32_t bits, Format format) {
    const std::uint32_t sign = bits >> 31U << 15U;
    const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
    if (magnitude > 0x7F800000U) {  // quiet, upper payload bits kept
        const std::uint32_t payload = (magnitude & 0x7FFFFFU) >> (23 - format.mantissa);
        return static_cast<std::uint16_t>(sign | format.infinity() | 1U << (format.mantissa - 1) | payload);
    }
    if (magnitude == 0x7F800000U) return static_cast<std::uint16_t>(sign | format.infinity());
    const double x = exact(magnitude);
    const int lowest = 1 - format.bias();
    const int exponent = x == 0 ? lowest : std::max(std::ilogb(x), lowest);
    const double scaled = std::ldexp(x, format.mantissa - exponent);
    double whole = std::floor(scaled);
    const double rest = scaled - whole;
    if (rest > 0.5 || (rest == 0.5 && std::fmod(whole, 2) == 1)) whole += 1;
    // whole < 2^mantissa only for subnormals, whose exponent field is 0; a carry lands in the next exponent.
    const double field = whole + std::ldexp(exponent + format.bias() - 1, format.mantissa);
    const std::uint32_t half = static_cast<std::uint32_t>(std::min(field, double(format.infinity())));
    return static_cast<std::uint16_t>(sign | half);
}

float from_bits(std::uint32_t bits) {
    return std::bit_cast<float>(bits);
}
std::uint32_t to_bits(float x) {
    return std::bit_cast<std::uint32_t>(x);
}

/// Floats at which a conversion to 16 bits can go wrong: every value of the format, the middle between
/// neighbours, and one step to each side of both.
template <class Visit>
void for_each_boundary(Format format, Visit visit) {
    for (std::uint32_t half = 0; half < format.infinity(); ++half) {
        const auto value = [&](std::uint32_t h) {
            const int exponent = static_cast<int>(h >> format.mantissa);
            const double mantissa = h & ((1U << format.mantissa) - 1U);
            const double one = exponent == 0 ? 0 : std::ldexp(1, format.mantissa);
            return std::ldexp(mantissa + one, std::max(exponent, 1) - format.bias() - format.mantissa);
        };
        const double here = value(half), middle = (here + value(half + 1)) / 2;
        for (const double x : {here, middle}) {
            const int exponent = x == 0 ? -126 : std::max(std::ilogb(x), -126);
            const auto field = static_cast<std::uint32_t>(std::ldexp(x, 23 - exponent));
            const std::uint32_t bits = field + (static_cast<std::uint32_t>(exponent + 126) << 23U);
            for (const std::uint32_t near : {bits - 1, bits, bits + 1}) {
                if (near == 0xFFFFFFFFU) continue;  // below zero
                visit(near);
                visit(near | 0x80000000U);
            }
        }
    }
}

}  // namespace

TEST_CASE("every float16 widens to the value it stands for", "[differential]") {
    std::size_t wrong = 0;
    for (std::uint32_t h = 0; h < 0x10000U; ++h) {
        const std::uint32_t bits = to_bits(to_float(float16{static_cast<std::uint16_t>(h)}));
        const std::uint32_t exponent = h >> 10U & 0x1FU, mantissa = h & 0x3FFU;
        if (bits >> 31U != h >> 15U) ++wrong;
        if (exponent == 31) {  // infinity and NaN keep their bits
            if ((bits & 0x7FFFFFFFU) != (0x7F800000U | mantissa << 13U)) ++wrong;
            continue;
        }
        const double value = exponent == 0 ? std::ldexp(mantissa, -24)
                                           : std::ldexp(1024.0 + mantissa, static_cast<int>(exponent) - 25);
        if (std::abs(exact(bits)) != value) ++wrong;
    }
    REQUIRE(wrong == 0);
}

TEST_CASE("every float16 and bfloat16 survives the way through float", "[property]") {
    std::size_t wrong = 0;
    for (std::uint32_t h = 0; h < 0x10000U; ++h) {
        const auto bits = static_cast<std::uint16_t>(h);
        const std::uint16_t quiet16 = (h & 0x7FFFU) > 0x7C00U ? 0x200 : 0;  // a signalling NaN becomes quiet
        const std::uint16_t quiet_b = (h & 0x7FFFU) > 0x7F80U ? 0x40 : 0;
        if (to_float16(to_float(float16{bits})).bits != (bits | quiet16)) ++wrong;
        if (to_bfloat16(to_float(bfloat16{bits})).bits != (bits | quiet_b)) ++wrong;
        if (to_bits(to_float(bfloat16{bits})) != h << 16U) ++wrong;
    }
    REQUIRE(wrong == 0);
}

TEST_CASE("float16 rounds to nearest even at every boundary", "[differential]") {
    std::size_t wrong = 0, count = 0;
    std::uint32_t first = 0;
    for_each_boundary(binary16, [&](std::uint32_t bits) {
        ++count;
        if (to_float16(from_bits(bits)).bits == reference(bits, binary16)) return;
        if (wrong++ == 0) first = bits;
    });
    CAPTURE(first);
    REQUIRE(wrong == 0);
    REQUIRE(count > 380000);
}

TEST_CASE("bfloat16 rounds to nearest even at every boundary", "[differential]") {
    std::size_t wrong = 0;
    std::uint32_t first = 0;
    for_each_boundary(brain16, [&](std::uint32_t bits) {
        if (to_bfloat16(from_bits(bits)).bits == reference(bits, brain16)) return;
        if (wrong++ == 0) first = bits;
    });
    CAPTURE(first);
    REQUIRE(wrong == 0);
}

TEST_CASE("random bit patterns, NaN and infinity included, convert as the instructions do",
          "[differential]") {
    SplitMix64 random{3};
    std::size_t wrong = 0;
    for (int i = 0; i < 300000; ++i) {
        std::uint32_t bits = static_cast<std::uint32_t>(random());
        if (i % 3 == 1) bits |= 0x7F800000U;                        // NaN
        if (i % 3 == 2) bits = (bits & 0x8FFFFFFFU) | 0x30000000U;  // around float16's range
        if (to_float16(from_bits(bits)).bits != reference(bits, binary16)) ++wrong;
        if (to_bfloat16(from_bits(bits)).bits != reference(bits, brain16)) ++wrong;
    }
    REQUIRE(wrong == 0);
}

TEST_CASE("the known corners of float16", "[golden]") {
    static_assert(to_float16(1.0F).bits == 0x3C00);
    static_assert(to_float16(-2.0F).bits == 0xC000);
    static_assert(to_float16(65504.0F).bits == 0x7BFF);
    static_assert(to_float16(65519.0F).bits == 0x7BFF);
    static_assert(to_float16(65520.0F).bits == 0x7C00);  // half way to 2^16: even is infinity
    static_assert(to_float16(0x1p-24F).bits == 0x0001);
    static_assert(to_float16(0x1p-25F).bits == 0x0000);  // half way to zero: even is zero
    static_assert(to_float16(0x1.000002p-25F).bits == 0x0001);
    static_assert(to_float16(-0.0F).bits == 0x8000);
    static_assert(to_float(float16{0x0001}) == 0x1p-24F);
    static_assert(to_bfloat16(1.0F).bits == 0x3F80);
    REQUIRE(to_float16(from_bits(0x7F800001U)).bits == 0x7E00);  // payload in the lost bits only: still NaN
    REQUIRE(to_bfloat16(from_bits(0x7F800001U)).bits == 0x7FC0);
    REQUIRE(to_bfloat16(from_bits(0x7F7FFFFFU)).bits == 0x7F80);  // rounds up to infinity
}

TEST_CASE("NaN and infinity are told by bits", "[contract]") {
    for (const std::uint32_t sign : {0U, 0x80000000U}) {
        for (const std::uint32_t finite : {0U, 1U, 0x7FFFFFU, 0x3F800000U, 0x7F7FFFFFU}) {
            REQUIRE(is_finite(from_bits(finite | sign)));
            REQUIRE_FALSE(is_nan(from_bits(finite | sign)));
        }
        REQUIRE_FALSE(is_finite(from_bits(0x7F800000U | sign)));
        REQUIRE_FALSE(is_nan(from_bits(0x7F800000U | sign)));
        for (const std::uint32_t nan : {0x7F800001U, 0x7FC00000U, 0x7FFFFFFFU}) {
            REQUIRE_FALSE(is_finite(from_bits(nan | sign)));
            REQUIRE(is_nan(from_bits(nan | sign)));
        }
    }
    REQUIRE(to_bits(negative_infinity()) == 0xFF800000U);
    REQUIRE(is_nan(quiet_nan()));
}

TEST_CASE("element types know their size and name", "[contract]") {
    STATIC_REQUIRE(size_of(DType::f32) == sizeof(float));
    STATIC_REQUIRE(size_of(DType::f16) == sizeof(float16));
    STATIC_REQUIRE(size_of(DType::bf16) == sizeof(bfloat16));
    REQUIRE(name_of(DType::f32) == "f32");
    REQUIRE(name_of(DType::f16) == "f16");
    REQUIRE(name_of(DType::bf16) == "bf16");
}
