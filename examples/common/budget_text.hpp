#pragma once
/// Budgets as they are typed and printed: `96` rows per KV head, or `0.25` of the prompt.

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <kvcull/base/error.hpp>
#include <kvcull/select/budget.hpp>
#include <sstream>
#include <string>
#include <system_error>
#include <vector>

namespace examples {

/// @param flag  what to call the text in the message
/// @throws kvcull::error::config_error unless `text` is a number of tokens or a ratio between 0 and 1
[[nodiscard]] inline kvcull::Budget parse_budget(const std::string& flag, const std::string& text) {
    const char *begin = text.data(), *end = begin + text.size();
    kvcull::Budget budget;
    if (const auto [at, error] = std::from_chars(begin, end, budget.tokens);
        error == std::errc() && at == end && budget.tokens > 0)
        return budget;
    budget.tokens = 0;
    if (const auto [at, error] = std::from_chars(begin, end, budget.ratio);
        error == std::errc() && at == end && budget.ratio > 0 && budget.ratio < 1)
        return budget;
    throw kvcull::error::config_error(flag + " is " + text +
                                      ", want a number of tokens or a ratio between 0 and 1");
}

[[nodiscard]] inline std::string text_of(const kvcull::Budget& budget) {
    if (budget.tokens > 0) return std::to_string(budget.tokens);
    std::ostringstream out;
    out << budget.ratio;
    return out.str();
}

/// The budget that a picture of kept tokens is drawn for: the second smallest shows the most, as the smallest
/// keeps next to nothing.
[[nodiscard]] inline kvcull::Budget telling_budget(std::vector<kvcull::Budget> budgets, std::size_t prompt) {
    std::sort(budgets.begin(), budgets.end(), [&](const kvcull::Budget& a, const kvcull::Budget& b) {
        return budget_tokens(a, prompt) < budget_tokens(b, prompt);
    });
    return budgets[budgets.size() > 1 ? 1 : 0];
}

}  // namespace examples
