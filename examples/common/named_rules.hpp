#pragma once
/// The budget rules that a command line can name: `pyramid`, or `ada:alpha_permille=500`.

#include <algorithm>
#include <cstddef>
#include <kvcull/integrations/registry.hpp>
#include <kvcull/select/head_rules.hpp>
#include <kvcull/select/layer_rules.hpp>
#include <span>
#include <string>
#include <variant>

namespace examples {

/// One of the rules, known when the program runs: caches are then compiled once for all of them.
class NamedRule {
  public:
    static constexpr bool reads_prompt = true;

    /// `text` empty: uniform.
    /// @throws kvcull::error::config_error for an unknown name, key or value; it lists what exists
    explicit NamedRule(const std::string& text) {
        using namespace kvcull;
        if (text.empty()) return;
        with_rule<Uniform, Pyramid, AdaKV<>, AdaKV<Pyramid>>(text, [&](auto rule) { rule_ = rule; });
    }

    void layer_sizes(std::size_t mean, std::size_t prompt, kvcull::Protected protect,
                     std::span<std::size_t> out) const {
        std::visit([&](const auto& rule) { rule.layer_sizes(mean, prompt, protect, out); }, rule_);
    }
    void head_sizes(std::size_t layer, std::span<const kvcull::Candidates> heads, std::size_t mean,
                    std::span<std::size_t> out) const {
        std::visit(
            [&]<class Rule>(const Rule& rule) {
                if constexpr (kvcull::HeadBudgetRule<Rule>)
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
    std::variant<kvcull::Uniform, kvcull::Pyramid, kvcull::AdaKV<>, kvcull::AdaKV<kvcull::Pyramid>> rule_;
};

}  // namespace examples
