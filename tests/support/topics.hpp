#pragma once
/// A model without weights for tests of long histories: a token is a topic and a number, its key and its
/// query lie near the topic's centre, so that tokens attend to their own topic.

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "kvcull/cache/block_prefill.hpp"
#include "support/random.hpp"

namespace kvcull::test {

inline constexpr std::int32_t topic_stride = 100000;

[[nodiscard]] constexpr std::int32_t topic_token(std::size_t topic, std::size_t number) {
    return static_cast<std::int32_t>(topic) * topic_stride + static_cast<std::int32_t>(number);
}
/// Tokens that go round the topics, `run` at a time.
[[nodiscard]] inline std::vector<std::int32_t> topic_history(std::size_t tokens, std::size_t topics,
                                                             std::size_t run) {
    std::vector<std::int32_t> history;
    for (std::size_t t = 0; t < tokens; ++t) history.push_back(topic_token(t / run % topics, t));
    return history;
}

struct TopicModel {
    CacheShape shape{.layers = 1, .q_heads = 4, .kv_heads = 2, .head_dim = 16};
    float sharpness = 8.0F;
    /// Calls that are left before one throws, and what it throws.
    std::size_t calls_left = static_cast<std::size_t>(-1);
    struct Failure : std::runtime_error {
        Failure() : std::runtime_error("the model fails") {}
    };
    std::size_t probed = 0, longest_probe = 0;  // probes so far, and the longest one's tokens
    std::vector<float> last;                    // outputs of the last call, [layers, q_heads, c, d]

    template <class Cache>
    void forward(Cache& cache, std::span<const std::int32_t> tokens) {
        count();
        run(tokens, [&](std::size_t layer, auto q, auto k, auto v, auto out) {
            cache.append(layer, k, v);
            cache.attend(layer, q, out);
        });
        cache.end_step();
    }
    template <class Cache>
    void probe(Cache& cache, std::span<const std::int32_t> tokens) {
        count();
        ++probed;
        longest_probe = std::max(longest_probe, tokens.size());
        run(tokens,
            [&](std::size_t layer, auto q, auto k, auto v, auto out) { cache.probe(layer, q, k, v, out); });
    }
    /// Near the centre of the token's topic; `part` 0: key, 1: value, 2: query.
    [[nodiscard]] std::vector<float> vector_of(std::int32_t token, std::size_t layer, std::size_t head,
                                               std::size_t part) const {
        const auto seed = static_cast<std::uint64_t>(token);
        std::vector<float> one =
            random_floats(shape.head_dim, (seed * 8 + layer) * 64 + head * 4 + part, part == 1 ? 1.0F : 0.4F);
        const std::vector<float> centre =
            random_floats(shape.head_dim, 77 + seed / topic_stride * 8 + layer, part == 1 ? 0.0F : 1.0F);
        for (std::size_t c = 0; c < one.size(); ++c) {
            one[c] += centre[c];
            if (part == 2) one[c] *= sharpness / 4;
        }
        return one;
    }

  private:
    void count() {
        if (calls_left == 0) throw Failure();
        --calls_left;
    }
    template <class Use>
    void run(std::span<const std::int32_t> tokens, const Use& use) {
        const std::size_t c = tokens.size(), d = shape.head_dim, layer_size = shape.q_heads * c * d;
        last.assign(shape.layers * layer_size, 0);
        for (std::size_t layer = 0; layer < shape.layers; ++layer) {
            std::vector<float> parts[3];
            for (std::size_t part = 0; part < 3; ++part)
                for (std::size_t h = 0; h < (part == 2 ? shape.q_heads : shape.kv_heads); ++h)
                    for (const std::int32_t token : tokens) {
                        const auto row = vector_of(token, layer, h, part);
                        parts[part].insert(parts[part].end(), row.begin(), row.end());
                    }
            const auto rows = [&](std::size_t part, std::size_t heads) {
                return HeadsView<const float>(head_major<const float>(parts[part].data(), heads, c, d));
            };
            use(layer, rows(2, shape.q_heads), rows(0, shape.kv_heads), rows(1, shape.kv_heads),
                head_major(last.data() + layer * layer_size, shape.q_heads, c, d));
        }
    }
};

}  // namespace kvcull::test
