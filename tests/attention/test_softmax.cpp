#include "kvcull/attention/softmax.hpp"

#include <cmath>
#include <cstddef>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

TEST_CASE("a merge weighs both sides by the exponential of their log-sum-exp", "[differential]") {
    for (const float shift : {0.0F, 80.0F, -5000.0F, 1e30F}) {
        std::vector<float> out = random_floats(13, 1);
        const std::vector<float> mine = out, theirs = random_floats(13, 2);
        const float a = shift + 0.5F, b = shift - 1.25F;
        float lse = a;
        merge(out, lse, theirs, b);
        const double x = std::exp(static_cast<double>(a) - static_cast<double>(b)), weight = x / (x + 1.0);
        for (std::size_t c = 0; c < 13; ++c)
            REQUIRE(
                close(out[c],
                      weight * static_cast<double>(mine[c]) + (1.0 - weight) * static_cast<double>(theirs[c]),
                      1e-6, 1e-7));
        REQUIRE(close(lse, static_cast<double>(b) + std::log1p(x), 1e-6, 1e-6));
    }
}

TEST_CASE("a side that saw nothing does not count, whatever its output holds", "[property]") {
    const std::vector<float> values = random_floats(5, 3);
    const std::vector<float> garbage(5, quiet_nan());

    std::vector<float> out = values;
    float lse = 1.5F;
    merge(out, lse, garbage, negative_infinity());
    REQUIRE(same_bits(out, values));
    REQUIRE(lse == 1.5F);

    out = garbage;
    lse = negative_infinity();
    merge(out, lse, values, 1.5F);
    REQUIRE(same_bits(out, values));
    REQUIRE(lse == 1.5F);

    out = std::vector<float>(5, 0.0F);
    lse = negative_infinity();
    merge(out, lse, std::vector<float>(5, 0.0F), negative_infinity());
    REQUIRE(same_bits(out, std::vector<float>(5, 0.0F)));
    REQUIRE(same_bits(lse, negative_infinity()));
}

TEST_CASE("a bad side makes the result bad", "[property]") {
    const float positive_infinity = std::bit_cast<float>(0x7F800000U);
    for (const float& bad : {quiet_nan(), positive_infinity}) {
        for (const float& other : {0.5F, negative_infinity(), quiet_nan()}) {
            for (const bool mine : {true, false}) {
                std::vector<float> out = random_floats(4, 4);
                float lse = mine ? bad : other;
                merge(out, lse, random_floats(4, 5), mine ? other : bad);
                REQUIRE(is_nan(lse));
                for (const float& x : out) REQUIRE(is_nan(x));
            }
        }
    }
}

TEST_CASE("outputs of different sizes are an error and nothing changes", "[contract]") {
    std::vector<float> out = random_floats(4, 6);
    const std::vector<float> before = out;
    float lse = 1.0F;
    REQUIRE_THROWS_AS(merge(out, lse, random_floats(3, 7), 1.0F), error::shape_error);
    REQUIRE(same_bits(out, before));
    REQUIRE(lse == 1.0F);
}
