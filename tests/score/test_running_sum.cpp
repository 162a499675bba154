#include "kvcull/score/running_sum.hpp"

#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

TEST_CASE("a running sum is known for exactly the rows that it was made of", "[property]") {
    RunningSum sum;
    CHECK_FALSE(sum.knows(0));  // nothing was ever summed
    sum.reset(4);
    CHECK(sum.knows(0));
    CHECK_FALSE(sum.knows(1));
    const std::vector<float> row{1.0F, 2.0F};
    sum.add(2, -3.0, row);
    sum.rows = 7;
    CHECK(sum.knows(7));
    CHECK_FALSE(sum.knows(6));
    CHECK((sum.sum == std::vector<double>{0, 0, -3, -6}));
    sum.rows = RunningSum::stale;
    for (const std::size_t rows : {0U, 1U, 7U}) CHECK_FALSE(sum.knows(rows));
    sum.reset(2);
    CHECK(sum.knows(0));
    CHECK((sum.sum == std::vector<double>{0, 0}));
}

TEST_CASE("a sum that is no finite float is not known", "[property]") {
    for (const float& bad : {quiet_nan(), positive_infinity(), negative_infinity(), 3e38F}) {
        RunningSum sum;
        sum.reset(3);
        const std::vector<float> row{0.0F, bad, 0.0F};
        sum.add(0, 2.0, row);
        CHECK_FALSE(sum.knows(0));
    }
}

TEST_CASE("small numbers are not lost in a large sum", "[property]") {
    RunningSum sum;
    sum.reset(1);
    const std::vector<float> large{1e7F}, one{0.125F};
    sum.add(0, 1.0, large);
    for (int i = 0; i < 1000; ++i) sum.add(0, 1.0, one);
    sum.add(0, -1.0, large);
    CHECK(sum.sum[0] == 125.0);
}

TEST_CASE("the values of rows that go, or of those that stay, are visited in order", "[contract]") {
    constexpr std::size_t n = 7, dim = 5;
    const std::vector<float16> half = to_float16s(random_floats(n * dim, 1));
    Scratch<float> workspace;
    HeadStep step;
    step.cached.v = RowsView(half.data(), DType::f16, n, dim, dim);
    step.workspace = &workspace;
    const auto visited = [&](const std::vector<index_t>& keep, bool kept) {
        std::vector<std::size_t> rows;
        for_each_row_of(step.cached.v, *step.workspace, keep, kept,
                        [&](std::size_t j, std::span<const float> value) {
                            rows.push_back(j);
                            REQUIRE(value.size() == dim);
                            for (std::size_t c = 0; c < dim; ++c)
                                CHECK(same_bits(value[c], to_float(half[j * dim + c])));
                        });
        return rows;
    };
    using List = std::vector<std::size_t>;
    CHECK((visited({0, 2, 3, 6}, true) == List{0, 2, 3, 6}));
    CHECK((visited({0, 2, 3, 6}, false) == List{1, 4, 5}));
    CHECK((visited({}, false) == List{0, 1, 2, 3, 4, 5, 6}));
    CHECK((visited({}, true).empty()));
    CHECK((visited({0, 1, 2, 3, 4, 5, 6}, false).empty()));
}
