#pragma once
/// Policies around a policy: one notes what decisions saw, one hides the hooks that save work.

#include <cstddef>
#include <span>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "kvcull/score/concepts.hpp"

namespace kvcull::test {

/// Notes the scores of every decision, and of every call of `scores`.
template <Policy P>
struct Recording : P {
    std::vector<std::vector<float>>* log;

    Recording(P policy, std::vector<std::vector<float>>& to) : P(std::move(policy)), log(&to) {}
    void score(const typename P::State& state, const HeadStep& step, std::span<float> out) const {
        P::score(state, step, out);
        log->emplace_back(out.begin(), out.end());
    }
};

/// The same policy without `reads_keys`, `reads_values` and `forget`: it must then find all sums by itself.
template <Policy P>
struct Unhooked {
    static constexpr std::string_view name = "unhooked";
    using State = typename P::State;
    P inner = {};

    static constexpr auto fields() { return std::tuple{}; }
    [[nodiscard]] Protected protect(std::size_t budget) const { return protected_rows(inner, budget); }
    [[nodiscard]] bool ordered() const { return is_ordered(inner); }
    [[nodiscard]] Needs needs(Phase phase) const { return inner.needs(phase); }
    void observe(State& state, const HeadStep& step) const { inner.observe(state, step); }
    void score(const State& state, const HeadStep& step, std::span<float> out) const {
        inner.score(state, step, out);
    }
};

}  // namespace kvcull::test
