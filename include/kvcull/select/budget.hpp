#pragma once
/// Budgets are values beside the policy: how many rows may stay, and how a total is divided.

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>

#include "../base/error.hpp"
#include "../score/concepts.hpp"
#include "topk.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Rows per KV head after an eviction, as a number, as a share of the prompt or as memory: exactly one of
/// them.
struct Budget {
    std::size_t tokens = 0;  // >= 1
    double ratio = 0.0;      // in (0, 1]: tokens = floor(ratio * tokens seen at the prompt's end), at least 1
    /// Of keys, values and positions of all layers and heads: tokens = floor(bytes / (heads * row bytes)).
    /// What a block's last rows leave empty, and the policy's state, come on top.
    std::size_t bytes = 0;
    /// Rows above the budget that are let be before a default policy evicts (a high watermark): evictions
    /// come `slack + 1` tokens apart and the longest head has `budget + slack` rows between steps.
    std::size_t slack = 0;
    /// Oldest and newest rows that stay besides those that the policy protects.
    std::size_t sinks = 0, recent = 0;
};

namespace detail {
inline void check_budget(const Budget& budget) {
    check<error::config_error>(budget.tokens == 0 || budget.ratio == 0.0, "Budget", "tokens and ratio",
                               "both given", "one of them");
    check<error::config_error>(budget.tokens > 0 || budget.ratio != 0.0, "Budget", "tokens", budget.tokens,
                               "at least 1 (or a ratio, or bytes)");
    check<error::config_error>(budget.tokens > 0 || (budget.ratio > 0.0 && budget.ratio <= 1.0), "Budget",
                               "ratio", budget.ratio, "in (0, 1]");
}
/// A budget of memory as one of tokens; others are left alone.
[[nodiscard]] inline Budget in_tokens(Budget budget, std::size_t heads, std::size_t row_bytes) {
    if (budget.bytes == 0) return budget;
    check<error::config_error>(budget.tokens == 0 && budget.ratio == 0.0, "Budget", "bytes",
                               "given beside tokens or a ratio", "one of them");
    check<error::config_error>(budget.bytes >= heads * row_bytes, "Budget", "bytes", budget.bytes,
                               text("at least ", heads * row_bytes, " for a row per head"));
    budget.tokens = budget.bytes / (heads * row_bytes);
    budget.bytes = 0;
    return budget;
}
}  // namespace detail

/// Tokens per KV head when `prompt` tokens will have been seen at the prompt's end. The product is nudged by
/// 1e-9 before it is cut, so that 0.29 of 100 is 29 whatever its binary form.
[[nodiscard]] inline std::size_t budget_tokens(const Budget& budget, std::size_t prompt) {
    if (budget.tokens > 0) return budget.tokens;
    const auto tokens =
        static_cast<std::size_t>(std::floor(budget.ratio * static_cast<double>(prompt) + 1e-9));
    return std::max<std::size_t>(tokens, 1);
}

/// Divides `mean` rows per KV head over layers: writes rows per KV head of each layer. `prompt`: tokens at
/// the prompt's end, 0 while that is not known. @throws config_error, as its parameters are checked here.
template <class R>
concept BudgetRule = std::copyable<R> &&
    requires(const R rule, std::size_t number, std::span<std::size_t> out) {
    rule.layer_sizes(number, number, Protected{}, out);  // mean, prompt, protected rows, out[layers]
};
/// Divides otherwise for another length of the prompt: asked again for every prompt.
template <class R>
concept ReadsPrompt = BudgetRule<R> && R::reads_prompt;
/// Divides a layer's rows over its KV heads by the policy's scores when the prompt is evicted; the sizes
/// stay. Policies that rank heads together have no sizes per head: they are not asked.
template <class R>
concept HeadBudgetRule = BudgetRule<R> &&
    requires(const R rule, std::size_t layer, std::span<const Candidates> heads, std::size_t size,
             std::span<std::size_t> out) {
    rule.head_sizes(layer, heads, size, out);  // size: mean rows per head; out[heads]
};

/// Whether `rule` divides over heads: one chosen at run time says so by `divides_heads()`.
template <BudgetRule R>
[[nodiscard]] constexpr bool divides_heads(const R& rule) {
    if constexpr (requires { rule.divides_heads(); }) return rule.divides_heads();
    return HeadBudgetRule<R>;
}

/// The same for every layer and head.
struct Uniform {
    static constexpr std::string_view name = "uniform";

    static constexpr auto fields() { return std::tuple{}; }
    static void layer_sizes(std::size_t mean, std::size_t /*prompt*/, Protected /*policy*/,
                            std::span<std::size_t> out) noexcept {
        std::fill(out.begin(), out.end(), mean);
    }
};

}  // namespace kvcull::inline KVCULL_ABI
