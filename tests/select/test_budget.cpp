#include "kvcull/select/budget.hpp"

#include <array>

#include "support/catch.hpp"
#include "support/failure.hpp"

using namespace kvcull;

TEST_CASE("a budget in tokens is itself whatever the prompt", "[property]") {
    for (const std::size_t prompt : {0U, 1U, 5000U}) CHECK(budget_tokens({.tokens = 77}, prompt) == 77);
}

TEST_CASE("a ratio of the prompt is cut to whole tokens, not by the rounding of its binary form",
          "[property]") {
    // The same in whole numbers: floor(percent * prompt / 100), at least 1.
    for (std::size_t percent = 1; percent <= 100; ++percent)
        for (const std::size_t prompt : {0U, 1U, 3U, 10U, 99U, 100U, 101U, 300U, 1000U, 4096U, 131072U}) {
            CAPTURE(percent, prompt);
            REQUIRE(budget_tokens({.ratio = static_cast<double>(percent) / 100}, prompt) ==
                    std::max<std::size_t>(percent * prompt / 100, 1));
        }
    CHECK(budget_tokens({.ratio = 0.29}, 100) == 29);
    CHECK(budget_tokens({.ratio = 1.0 / 3}, 300) == 100);
    CHECK(budget_tokens({.ratio = 1.0}, 12345) == 12345);
    CHECK(budget_tokens({.ratio = 1e-9}, 10) == 1);
}

TEST_CASE("a budget is tokens or a ratio, in range", "[contract]") {
    using error::config_error;
    CHECK_NOTHROW(detail::check_budget({.tokens = 1}));
    CHECK_NOTHROW(detail::check_budget({.ratio = 1.0}));
    CHECK_NOTHROW(detail::check_budget({.ratio = 1e-6}));
    CHECK_THROWS_AS(detail::check_budget({}), config_error);
    CHECK_THROWS_AS(detail::check_budget({.tokens = 1, .ratio = 0.5}), config_error);
    CHECK_THROWS_AS(detail::check_budget({.ratio = -0.5}), config_error);
    CHECK_THROWS_AS(detail::check_budget({.ratio = 1.0001}), config_error);
}

TEST_CASE("a budget of memory is as many rows as fit, the same for all heads", "[contract]") {
    CHECK(detail::in_tokens({.bytes = 6 * 40 * 7, .slack = 3}, 6, 40).tokens == 7);
    CHECK(detail::in_tokens({.bytes = 6 * 40 * 7 - 1}, 6, 40).tokens == 6);
    CHECK(detail::in_tokens({.bytes = 6 * 40 * 7, .slack = 3}, 6, 40).slack == 3);
    CHECK(detail::in_tokens({.ratio = 0.5}, 6, 40).tokens == 0);
    const auto refusal = [](const Budget& budget) {
        return test::failure<error::config_error>([&] { (void)detail::in_tokens(budget, 6, 40); });
    };
    CHECK(refusal({.bytes = 239}) == "Budget: bytes is 239, want at least 240 for a row per head");
    CHECK(refusal({.tokens = 1, .bytes = 240}) ==
          "Budget: bytes is given beside tokens or a ratio, want one of them");
    CHECK(refusal({.ratio = 0.1, .bytes = 240}) ==
          "Budget: bytes is given beside tokens or a ratio, want one of them");
}

TEST_CASE("the uniform rule gives every layer the mean", "[property]") {
    std::array<std::size_t, 5> sizes{};
    Uniform::layer_sizes(17, 100, {2, 3}, sizes);
    for (const std::size_t size : sizes) CHECK(size == 17);
    static_assert(BudgetRule<Uniform> && !HeadBudgetRule<Uniform>);
}
