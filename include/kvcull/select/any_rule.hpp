#pragma once
/// A budget rule chosen when the program runs: caches then compile once for all that may be chosen.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <span>
#include <utility>
#include <variant>

#include "budget.hpp"

namespace kvcull::inline KVCULL_ABI {

/// One of `Rules`, the first of them to begin with: `AnyRule<Uniform, Pyramid> rule = Pyramid{.beta = 4};`.
/// What it does is what that rule does; a prompt's length counts if any of `Rules` asks for it.
template <BudgetRule... Rules>
class AnyRule {
  public:
    static constexpr bool reads_prompt = (ReadsPrompt<Rules> || ...);

    AnyRule() = default;
    template <class R>
    requires(std::same_as<R, Rules> || ...) AnyRule(R rule) : rule_(std::move(rule)) {}

    void layer_sizes(std::size_t mean, std::size_t prompt, Protected protect,
                     std::span<std::size_t> out) const {
        std::visit([&](const auto& rule) { rule.layer_sizes(mean, prompt, protect, out); }, rule_);
    }
    void head_sizes(std::size_t layer, std::span<const Candidates> heads, std::size_t mean,
                    std::span<std::size_t> out) const {
        std::visit(
            [&]<class R>(const R& rule) {
                if constexpr (HeadBudgetRule<R>)
                    rule.head_sizes(layer, heads, mean, out);
                else
                    std::fill(out.begin(), out.end(), mean);
            },
            rule_);
    }
    /// Whether the rule at hand does.
    [[nodiscard]] bool divides_heads() const {
        return std::visit([](const auto& rule) { return kvcull::divides_heads(rule); }, rule_);
    }

  private:
    std::variant<Rules...> rule_;
};
static_assert(HeadBudgetRule<AnyRule<Uniform>> && !ReadsPrompt<AnyRule<Uniform>>);

}  // namespace kvcull::inline KVCULL_ABI
