#pragma once
/// A budget rule that is known when the test runs, so that a cache compiles once for all of them.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <span>
#include <utility>
#include <variant>

#include "kvcull/select/head_rules.hpp"
#include "kvcull/select/layer_rules.hpp"

namespace kvcull::test {

class AnyRule {
  public:
    static constexpr bool reads_prompt = true;  // some do

    AnyRule() = default;
    template <class R>
    requires(!std::same_as<R, AnyRule>) AnyRule(R rule) : rule_(std::move(rule)) {}

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
    [[nodiscard]] bool divides_heads() const {
        return std::visit([](const auto& rule) { return kvcull::divides_heads(rule); }, rule_);
    }

  private:
    std::variant<Uniform, Pyramid, BySensitivity, AdaKV<>, AdaKV<Pyramid>, HeadTable> rule_;
};

}  // namespace kvcull::test
