#pragma once
/// A conversation in episodes, with a store of the test's choice.

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "kvcull/cache/episodes.hpp"
#include "kvcull/policies/epicache.hpp"
#include "support/random.hpp"
#include "support/topics.hpp"

namespace kvcull::test::talk {

inline constexpr std::size_t topics = 3, run = 20, budget = 30, block = 25, dim = 6;

[[nodiscard]] inline std::vector<float> embedding(std::size_t topic, std::uint64_t seed) {
    std::vector<float> one = random_floats(dim, 1000 + seed, 0.1F);
    one[topic % dim] += 1;
    return one;
}
/// Segment i is run i of `topic_history`; its topic is i modulo `topics`.
[[nodiscard]] inline std::vector<EpisodeSegment> segments_of(const std::vector<std::int32_t>& history) {
    std::vector<EpisodeSegment> segments;
    for (std::size_t first = 0; first < history.size(); first += run) {
        const auto from = history.begin() + static_cast<std::ptrdiff_t>(first);
        segments.push_back({embedding(first / run % topics, first), {from, from + run}});
    }
    return segments;
}

[[nodiscard]] inline EpisodeSettings settings() {
    return {.episodes = topics, .representatives = 2, .block = block};
}

/// A conversation of three topics: its model, its store, its episodes.
template <class Store>
struct TalkOver {
    TopicModel model;
    Store store;
    BlockPool pool{{.block_rows = 8}};
    std::vector<std::int32_t> history = topic_history(240, topics, run);
    std::vector<EpisodeSegment> segments = segments_of(history);

    auto make() {
        return [this] { return KVCache(model.shape, EpiCache{}, Budget{.tokens = budget}, pool); };
    }
    Episodes<KVCache<EpiCache>, TopicModel, Store> episodes;

    explicit TalkOver(const EpisodeSettings& with = settings(), bool build = true, Store from = {})
        : store(std::move(from)), episodes(make(), model, store, with) {
        if (build) episodes.build(history, segments);
    }
    /// A turn of `count` tokens about a topic. @returns the model's outputs
    std::vector<float> say(std::size_t topic, std::size_t number, std::size_t count) {
        std::vector<std::int32_t> tokens;
        for (std::size_t i = 0; i < count; ++i) tokens.push_back(topic_token(topic, number + i));
        episodes.begin_turn(embedding(topic, number));
        model.forward(episodes.cache(), tokens);
        const std::vector<float> outputs = model.last;
        const EpisodeSegment own{embedding(topic, number + 7), tokens};
        episodes.end_turn(tokens, std::span(&own, 1));
        return outputs;
    }
    [[nodiscard]] std::vector<std::byte> bytes() const { return save(episodes.cache()); }
};

}  // namespace kvcull::test::talk
