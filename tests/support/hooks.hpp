#pragma once
/// Policies around a policy: one notes what decisions saw, one hides the hooks that save work.

#include <cstddef>
#include <span>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "kvcull/score/concepts.hpp"
#include "support/catch.hpp"
#include "support/conformance.hpp"

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

/// The same policy without `key_query`, `reads_values` and `forget`: it must then find all sums by itself.
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

/// Feeds a policy with and without its hooks the same 300 tokens, in calls of one and of several, with rows
/// taken away in between: both must keep the same rows for scores that `agree(hooked, alone)`.
/// @returns the engine with the hooks
template <Policy P, class Agree>
Engine<Recording<P>> check_hooks(const P& policy, const Stream& stream, std::size_t slack,
                                 std::vector<std::vector<float>>& hooked, const Agree& agree) {
    std::vector<std::vector<float>> alone;
    const Budget budget{.tokens = 14, .slack = slack};
    Engine<Recording<P>> engine(stream.shape, {policy, hooked}, budget);
    Engine<Recording<Unhooked<P>>> fresh(stream.shape, {Unhooked<P>{policy}, alone}, budget);
    const auto both = [&](const auto& call) {
        call(engine);
        call(fresh);
    };
    both([&](auto& one) { feed_prompt(one, stream, 0, 30, 11); });
    SplitMix64 random{slack};
    for (std::size_t at = 30; at + 3 < 300;) {
        const double chance = random.uniform();
        const std::size_t count = chance < 0.1 ? 3 : 1;
        both([&](auto& one) { feed(one, stream, at, count); });
        at += count;
        if (chance > 0.9) both([](auto& one) { one.make_room(2); });
        if (chance > 0.2 && chance < 0.25) both([](auto& one) { one.truncate(1); });
    }
    REQUIRE((all_positions(engine) == all_positions(fresh)));
    REQUIRE(hooked.size() == alone.size());
    CHECK(hooked.size() > 50);
    bool same = true;
    for (std::size_t i = 0; i < hooked.size(); ++i) same = same && agree(hooked[i], alone[i]);
    CHECK(same);
    return engine;
}

}  // namespace kvcull::test
