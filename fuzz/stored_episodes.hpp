#pragma once
/// The conversation of the target `episodes` and of its seeds: two topics, a few tokens.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvcull/cache/episodes.hpp"
#include "saved_shape.hpp"

namespace fuzz {

/// Every token is like every other.
struct SameTokens {
    template <class Cache>
    static void forward(Cache& cache, std::span<const std::int32_t> tokens) {
        decode(cache, tokens.size());
    }
    template <class Cache>
    static void probe(Cache& cache, std::span<const std::int32_t> /*tokens*/) {
        std::array<float, 4> out{};
        cache.probe(0, query(), key(), value(), kvcull::head_major(out.data(), 2, 1, 2));
    }
};

struct Talk {
    static constexpr std::size_t topics = 2;
    const std::vector<std::int32_t> history{1, 2, 3, 4, 5, 6, 7, 8};
    const std::vector<kvcull::EpisodeSegment> segments{
        {{1, 0}, {1, 2}}, {{1, 0.5F}, {3, 4}}, {{0, 1}, {5, 6}}, {{-0.5F, 1}, {7, 8}}};

    SameTokens model;
    kvcull::MemoryBytes store;
    using Cache = kvcull::KVCache<kvcull::EpiCache>;
    kvcull::Episodes<Cache, SameTokens, kvcull::MemoryBytes> episodes{
        [] { return Cache(saved_shape, {}, kvcull::Budget{.tokens = saved_budget}); }, model, store,
        kvcull::EpisodeSettings{.episodes = topics, .representatives = 1, .block = 3}};

    /// A turn about the first segment of a topic. The second one about the same topic outgrows its cache.
    void say(std::size_t topic) {
        const kvcull::EpisodeSegment& said = segments[2 * topic];
        episodes.begin_turn(said.embedding);
        model.forward(episodes.cache(), said.tokens);
        episodes.end_turn(said.tokens, std::span(&said, 1));
    }
};

}  // namespace fuzz
