#pragma once
/// The policies that a command line can name: `snapkv`, `snapkv:window=16,kernel=5`, `trimkv:gates=FILE`.

#include <kvcull/integrations/registry.hpp>
#include <kvcull/policies.hpp>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace examples {

template <kvcull::Policy... Ps>
struct PolicyList {
    /// The same policies inside a template.
    template <template <class> class Wrapped>
    using Each = PolicyList<Wrapped<Ps>...>;

    /// Those that run without more than the tokens bring: all but the ones that wait for a side value.
    [[nodiscard]] static std::vector<std::string> names() {
        std::vector<std::string> names;
        const auto add = [&]<class P>(std::type_identity<P>) {
            if constexpr (!kvcull::SideInput<P>) names.emplace_back(P::name);
        };
        (add(std::type_identity<Ps>{}), ...);
        return names;
    }

    /// Calls `use(policy)` with the policy that `text` names.
    /// @throws kvcull::error::config_error for an unknown name, key or value; it lists what exists
    template <class Use>
    static void with(const std::string& text, Use&& use) {
        kvcull::with_policy<Ps...>(text, std::forward<Use>(use));
    }
};

/// To let your own policy be named by all programs here, add it.
using NamedPolicies =
    PolicyList<kvcull::Full, kvcull::Streaming, kvcull::Random, kvcull::H2O, kvcull::Tova, kvcull::KeyDiff,
               kvcull::KeyNorm, kvcull::Vatp, kvcull::SnapKV, kvcull::RKV, kvcull::SkipKV<>, kvcull::Laq,
               kvcull::LaqPlus, kvcull::OBCache, kvcull::Caote<>, kvcull::FastCaote<>, kvcull::TrimKV>;

}  // namespace examples
