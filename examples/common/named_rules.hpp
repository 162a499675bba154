#pragma once
/// The budget rules that a command line can name: `pyramid`, or `ada:alpha_permille=500`.

#include <kvcull/integrations/registry.hpp>
#include <kvcull/select/any_rule.hpp>
#include <kvcull/select/head_rules.hpp>
#include <kvcull/select/layer_rules.hpp>
#include <string>

namespace examples {

using NamedRule =
    kvcull::AnyRule<kvcull::Uniform, kvcull::Pyramid, kvcull::AdaKV<>, kvcull::AdaKV<kvcull::Pyramid>>;

/// `text` empty: uniform.
/// @throws kvcull::error::config_error for an unknown name, key or value; it lists what exists
[[nodiscard]] inline NamedRule named_rule(const std::string& text) {
    using namespace kvcull;
    NamedRule named;
    if (!text.empty())
        with_rule<Uniform, Pyramid, AdaKV<>, AdaKV<Pyramid>>(text, [&](auto rule) { named = rule; });
    return named;
}

}  // namespace examples
