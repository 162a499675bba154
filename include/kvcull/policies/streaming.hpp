#pragma once
/// The two ends of the scale: keep everything, or sinks and a sliding window. And chance, the yardstick.

#include <tuple>

#include "../score/concepts.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Never evicts: the ordinary cache. Takes no budget.
struct Full {
    static constexpr std::string_view name = "full";
    using State = NoState;

    static constexpr auto fields() { return std::tuple{}; }
    static constexpr Needs needs(Phase /*phase*/) { return {}; }
    static constexpr bool due(const Moment& /*moment*/) { return false; }
    static void observe(State& /*state*/, const HeadStep& /*step*/) {}
    static void score(const State& /*state*/, const HeadStep& /*step*/, std::span<float> out) {
        std::fill(out.begin(), out.end(), 0.0F);
    }
};
static_assert(Policy<Full> && Triggered<Full>);

/// StreamingLLM (arXiv 2309.17453): the first `sinks` and the last `B - sinks` tokens. Costs nothing; cannot
/// recall what it evicted. Positions stay absolute.
struct Streaming {
    static constexpr std::string_view name = "streaming";
    using State = NoState;

    std::size_t sinks = 4;

    static constexpr auto fields() { return std::tuple{Field{"sinks", &Streaming::sinks}}; }
    static constexpr Needs needs(Phase /*phase*/) { return {}; }
    [[nodiscard]] constexpr Protected protect(std::size_t budget) const {
        return {sinks, budget - std::min(sinks, budget)};
    }
    static void observe(State& /*state*/, const HeadStep& /*step*/) {}
    static void score(const State& /*state*/, const HeadStep& /*step*/, std::span<float> out) {
        std::fill(out.begin(), out.end(), 0.0F);
    }
};
static_assert(Policy<Streaming> && Protects<Streaming>);

/// Keeps a uniform random sample. The draw is a function of seed, layer, head and position, so a token's fate
/// does not depend on chunks, threads or earlier evictions.
struct Random {
    static constexpr std::string_view name = "random";
    using State = NoState;

    std::size_t seed = 0;

    static constexpr auto fields() { return std::tuple{Field{"seed", &Random::seed}}; }
    static constexpr Needs needs(Phase /*phase*/) { return {}; }
    static void observe(State& /*state*/, const HeadStep& /*step*/) {}
    void score(const State& /*state*/, const HeadStep& step, std::span<float> out) const {
        const std::uint64_t stream = SplitMix64{SplitMix64{seed}() ^ (step.layer << 20U) ^ step.head}();
        step.cached.position.for_each_run([&](std::size_t first, std::span<const position_t> run) {
            for (std::size_t j = 0; j < run.size(); ++j) {
                SplitMix64 draw{stream ^ static_cast<std::uint64_t>(run[j])};
                out[first + j] = static_cast<float>(draw.uniform());
            }
        });
    }
};
static_assert(Policy<Random>);

}  // namespace kvcull::inline KVCULL_ABI
