#pragma once
/// TRIM-KV for tests that know of no side values: log beta comes from the token's own key.

#include <cmath>
#include <cstddef>
#include <span>
#include <string_view>

#include "kvcull/policies/trimkv.hpp"

namespace kvcull::test {

struct SelfGated {
    static constexpr std::string_view name = "self_gated";
    using State = TrimKV::State;

    TrimKV inner = {};

    static constexpr auto fields() { return fields_of(&SelfGated::inner); }
    static constexpr Needs needs(Phase phase) { return TrimKV::needs(phase); }
    void check(std::size_t budget) const { inner.check(budget); }
    [[nodiscard]] bool due(const Moment& moment) const { return inner.due(moment); }
    [[nodiscard]] Protected protect(std::size_t budget) const { return inner.protect(budget); }
    static std::size_t workspace(std::size_t /*rows*/, std::size_t /*group*/, std::size_t dim) { return dim; }
    static void observe(State& state, const HeadStep& step) {
        if (step.phase == Phase::probe || !step.first_tile) return;
        const std::size_t first = step.n() - step.added;
        for_each_row(step.cached.k, first, *step.workspace, [&](std::size_t j, std::span<const float> key) {
            const float log_beta = -0.05F * std::abs(key[0]);
            TrimKV::admit(state, {.first_row = j, .log_beta = {&log_beta, 1}});
        });
    }
    void score(const State& state, const HeadStep& step, std::span<float> out) const {
        inner.score(state, step, out);
    }
};
static_assert(Policy<SelfGated> && !SideInput<SelfGated>);

}  // namespace kvcull::test
