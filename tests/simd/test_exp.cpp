#include "kvcull/simd/exp.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "kvcull/base/types.hpp"
#include "support/catch.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using kvcull::test::close;
using kvcull::test::same_bits;

TEST_CASE("the shared exponential stays below 2 ulp from 0 down to the smallest normal result",
          "[differential]") {
    constexpr int count = 200000;
    double worst = 0;
    for (int i = 0; i <= count; ++i) {
        const float x = simd::ExpConstants::smallest * static_cast<float>(i) / static_cast<float>(count);
        const double wanted = std::exp(static_cast<double>(x));
        const double ulp = std::ldexp(1.0, std::ilogb(wanted) - 23);
        worst = std::max(worst, std::abs(static_cast<double>(simd::exp_non_positive(x)) - wanted) / ulp);
    }
    REQUIRE(worst < 2.0);
}

TEST_CASE("the shared exponential is 1 at 0, and 0 below its range", "[property]") {
    REQUIRE(simd::exp_non_positive(0.0F) == 1.0F);
    REQUIRE(simd::exp_non_positive(-0.0F) == 1.0F);
    REQUIRE(simd::exp_non_positive(simd::ExpConstants::smallest) > 0.0F);
    REQUIRE(simd::exp_non_positive(-87.34F) == 0.0F);
    REQUIRE(simd::exp_non_positive(-1e30F) == 0.0F);
    REQUIRE(same_bits(simd::exp_non_positive(negative_infinity()), 0.0F));
}

TEST_CASE("raise keeps the larger number and ignores a NaN that comes in", "[property]") {
    float x = 1.0F;
    simd::raise(x, 2.0F);
    REQUIRE(x == 2.0F);
    simd::raise(x, 1.0F);
    REQUIRE(x == 2.0F);
    simd::raise(x, quiet_nan());
    REQUIRE(x == 2.0F);
    x = negative_infinity();
    simd::raise(x, -3.0F);
    REQUIRE(x == -3.0F);
}
