#include "kvcull/score/pool.hpp"

#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

std::vector<float> pooled(Pool pool, std::size_t kernel, std::vector<float> score) {
    Scratch<float> workspace;
    pool_scores(pool, kernel, score, workspace);
    return score;
}

}  // namespace

TEST_CASE("pooling agrees with a naive loop, kernels longer than the scores included", "[differential]") {
    const auto count = GENERATE(std::size_t{0}, 1, 2, 3, 8, 31);
    const auto kernel = GENERATE(std::size_t{1}, 3, 5, 7, 63);
    const std::vector<float> score = random_floats(count, 7 * count + kernel);
    const std::vector<float> largest = pooled(Pool::max, kernel, score),
                             mean = pooled(Pool::avg, kernel, score);
    REQUIRE(largest.size() == count);
    const auto reach = static_cast<std::ptrdiff_t>(kernel / 2);
    for (std::ptrdiff_t j = 0; j < static_cast<std::ptrdiff_t>(count); ++j) {
        double sum = 0, most = -1e30;
        for (std::ptrdiff_t i = j - reach; i <= j + reach; ++i) {
            if (i < 0 || i >= static_cast<std::ptrdiff_t>(count)) continue;
            const auto x = static_cast<double>(score[static_cast<std::size_t>(i)]);
            sum += x;
            most = std::max(most, x);
        }
        CHECK(same_bits(largest[static_cast<std::size_t>(j)], static_cast<float>(most)));
        CHECK(close(mean[static_cast<std::size_t>(j)], sum / static_cast<double>(kernel), 1e-6, 1e-7));
    }
    CHECK(same_bits(pooled(Pool::none, kernel, score), score));
}

TEST_CASE("the mean of a constant is lower at both ends, its maximum is not", "[property]") {
    const std::vector<float> constant(20, 2.0F);
    const std::vector<float> mean = pooled(Pool::avg, 5, constant);
    CHECK(same_bits(pooled(Pool::max, 5, constant), constant));
    CHECK(close(mean[0], 2.0 * 3 / 5, 1e-6, 0));
    CHECK(close(mean[1], 2.0 * 4 / 5, 1e-6, 0));
    for (std::size_t j = 2; j < 18; ++j) CHECK(same_bits(mean[j], 2.0F));
    CHECK(close(mean[18], 2.0 * 4 / 5, 1e-6, 0));
    CHECK(close(mean[19], 2.0 * 3 / 5, 1e-6, 0));
}

TEST_CASE("maximum pooling gives neighbours one exact number and works below zero", "[property]") {
    const std::vector<float> score{-5, -4, -1.25F, -6, -7, -8};
    const std::vector<float> want{-1.25F, -1.25F, -1.25F, -1.25F, -1.25F, -6};
    CHECK(same_bits(pooled(Pool::max, 5, score), want));
}

TEST_CASE("the maximum passes over NaN, the mean does not", "[property]") {
    std::vector<float> score(9, 1.0F);
    score[4] = quiet_nan();
    CHECK(same_bits(pooled(Pool::max, 3, score), std::vector<float>(9, 1.0F)));
    const std::vector<float> mean = pooled(Pool::avg, 3, score);
    for (std::size_t j = 0; j < 9; ++j) CHECK(is_nan(mean[j]) == (j >= 3 && j <= 5));
    CHECK(same_bits(pooled(Pool::max, 3, {quiet_nan(), quiet_nan()})[0], negative_infinity()));
}

TEST_CASE("an even kernel is refused and nothing changed", "[contract]") {
    std::vector<float> score{1, 2, 3};
    const std::vector<float> before = score;
    Scratch<float> workspace;
    for (const std::size_t kernel : {0U, 2U, 8U})
        for (const Pool pool : {Pool::none, Pool::max, Pool::avg})
            CHECK_THROWS_AS(pool_scores(pool, kernel, score, workspace), error::config_error);
    CHECK(same_bits(score, before));
}
