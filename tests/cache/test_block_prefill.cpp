#include "kvcull/cache/block_prefill.hpp"

#include <cmath>
#include <numeric>
#include <vector>

#include "kvcull/attention/attend.hpp"
#include "kvcull/policies.hpp"
#include "kvcull/select/layer_rules.hpp"
#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/topics.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

/// Attention that queries of a topic pay to the rows that `kept` still has of what `all` has, on average.
template <class Kept, class All>
double mass_kept(const TopicModel& model, const Kept& kept, const All& all, std::size_t topic) {
    double mass = 0;
    std::size_t rows = 0;
    for (std::size_t i = 0; i < 8; ++i)
        for (std::size_t h = 0; h < model.shape.q_heads; ++h, ++rows) {
            const HeadView full = all.view(0, h / model.shape.group());
            const auto q = model.vector_of(topic_token(topic, 90000 + i), 0, h, 2);
            std::vector<float> weights(full.rows());
            float lse = 0;
            const Visible visible{0, 0, full.rows()};
            attend(simd::kernels(), {q.data(), 1, q.size()}, full.k, full.v, std::span(&visible, 1),
                   model.shape.logit_scale(),
                   {.attention = {weights.data(), 1, weights.size()}, .lse = std::span(&lse, 1)});
            for (const position_t position : kept.positions(0, h / model.shape.group()))
                mass += static_cast<double>(weights[static_cast<std::size_t>(position)]);
        }
    return mass / static_cast<double>(rows);
}

std::vector<std::int32_t> about(std::size_t topic, std::size_t tokens) {
    std::vector<std::int32_t> prompt;
    for (std::size_t i = 0; i < tokens; ++i) prompt.push_back(topic_token(topic, 50000 + i));
    return prompt;
}

}  // namespace

TEST_CASE("a prompt about a topic keeps what questions about it look at, another one does not",
          "[property]") {
    TopicModel model;
    const auto history = topic_history(800, 4, 25);
    KVCache all(model.shape, Full{});
    NoPrompt none;
    block_prefill(all, model, std::span<const std::int32_t>(history), 100, none);
    const auto build = [&](std::vector<std::int32_t> tokens) {
        KVCache cache(model.shape, EpiCache{}, Budget{.tokens = 100});
        FixedPrompt prompt{std::move(tokens)};
        block_prefill(cache, model, std::span<const std::int32_t>(history), 100, prompt);
        return cache;
    };
    std::vector<std::int32_t> generic;
    for (std::size_t topic = 0; topic < 4; ++topic)
        for (const std::int32_t token : about(topic, 8)) generic.push_back(token);
    for (std::size_t topic = 0; topic < 4; ++topic) {
        const double matched = mass_kept(model, build(about(topic, 32)), all, topic),
                     wrong = mass_kept(model, build(about((topic + 1) % 4, 32)), all, topic),
                     mixed = mass_kept(model, build(generic), all, topic);
        CAPTURE(topic, matched, mixed, wrong);
        CHECK(matched > 0.7);
        CHECK(matched > mixed + 0.15);
        CHECK(mixed > wrong + 0.1);
    }
}

TEST_CASE("a cache never holds more than its budget and a block, however long the history", "[property]") {
    const std::size_t budget = 24, block = 40, row_block = 8;
    std::vector<std::size_t> peaks;
    for (const std::size_t tokens : {160U, 640U, 650U}) {
        TopicModel model;
        model.shape.layers = 3;
        BlockPool pool({.block_rows = row_block});
        KVCache cache(model.shape, EpiCache{}, Budget{.tokens = budget}, pool,
                      BySimilarity{.similarity = {1, 0.5F, 0.2F}});
        FixedPrompt prompt{about(1, 20)};
        const auto history = topic_history(tokens, 4, 10);
        block_prefill(cache, model, std::span<const std::int32_t>(history), block, prompt);
        const std::size_t heads = model.shape.heads(), rows = heads * (budget + block);
        const std::size_t block_bytes = RowLayout{16, 16, DType::f32, row_block}.block_bytes();
        const std::size_t state_bytes = rows * sizeof(float) * 2;  // a vector may have room for twice as many
        // Up to a partly filled block per head, and one for what an eviction passes on.
        CHECK(cache.peak_bytes() <= (rows / row_block + 2 * heads) * block_bytes + state_bytes);
        peaks.push_back(cache.peak_bytes());
        for (std::size_t layer = 0; layer < 3; ++layer) {
            const std::size_t size = cache.evictor().size(layer, 0);
            CHECK(cache.rows(layer, 0) + cache.rows(layer, 1) == 2 * size);
        }
        CHECK(model.longest_probe == 20);
    }
    // Heads end ragged, so partly filled blocks differ a little.
    for (const std::size_t peak : peaks) CHECK(peak < peaks[0] + peaks[0] / 50);
}

TEST_CASE("a history within the budget is never probed and answers like the full cache", "[property]") {
    TopicModel model;
    const auto history = topic_history(50, 4, 10);
    KVCache full(model.shape, Full{});
    KVCache cache(model.shape, EpiCache{}, Budget{.tokens = 50});
    NoPrompt none;
    block_prefill(full, model, std::span<const std::int32_t>(history), 1000, none);
    block_prefill(cache, model, std::span<const std::int32_t>(history), 7, none);
    CHECK(model.probed == 0);
    const std::vector<std::int32_t> next{topic_token(2, 60000)};
    model.forward(full, next);
    const auto wanted = model.last;
    cache.hold(true);
    model.forward(cache, next);
    for (std::size_t i = 0; i < wanted.size(); ++i) CHECK(std::abs(model.last[i] - wanted[i]) < 1e-5F);
}

TEST_CASE("blocks of one token, blocks beyond the history and blocks beyond the budget are ordinary",
          "[property]") {
    for (const std::size_t block : {1U, 7U, 30U, 31U, 1000U}) {
        TopicModel model;
        KVCache cache(model.shape, EpiCache{.heads = HeadBudget::uniform}, Budget{.tokens = 9});
        FixedPrompt prompt{about(0, 3)};
        const auto history = topic_history(31, 4, 5);
        block_prefill(cache, model, std::span<const std::int32_t>(history), block, prompt);
        CHECK(cache.rows(0, 0) == 9);
        CHECK(cache.rows(0, 1) == 9);
        CHECK(cache.seen() == 31);
        CHECK(model.probed == (block == 1 ? 22 : block == 7 ? 4 : block == 30 ? 2 : 1));
    }
}

TEST_CASE("a budget that is a ratio is one of the whole history", "[property]") {
    TopicModel model;
    const auto history = topic_history(100, 4, 10);
    KVCache cache(model.shape, EpiCache{}, Budget{.ratio = 0.25});
    FixedPrompt prompt{about(0, 3)};
    block_prefill(cache, model, std::span<const std::int32_t>(history), 30, prompt);
    CHECK(cache.rows(0, 0) + cache.rows(0, 1) == 50);
    CHECK(model.probed == 4);
}

TEST_CASE("the methods that the paper compares run in the same loop", "[property]") {
    TopicModel model;
    const auto history = topic_history(100, 4, 10);
    const auto run = [&](auto policy, auto prompt) {
        KVCache cache(model.shape, policy, Budget{.tokens = 20});
        model.probed = model.longest_probe = 0;
        block_prefill(cache, model, std::span<const std::int32_t>(history), 40, prompt);
        CHECK(cache.rows(0, 0) + cache.rows(0, 1) == 40);
        return cache.positions(0, 0);
    };
    run(EpiCache{}, RepeatBlock{{topic_token(0, 1), topic_token(0, 2)}});
    CHECK(model.longest_probe == 42);
    CHECK(model.probed == 3);
    run(EpiCache{}, EndOfBlock{.window = 16});
    CHECK(model.longest_probe == 16);
    run(EpiCache{}, EndOfBlock{.window = 64});
    CHECK(model.longest_probe == 40);
    run(KeyDiff{}, NoPrompt{});
    CHECK(model.probed == 0);
    const auto positions = run(Streaming{.sinks = 8}, NoPrompt{});
    CHECK(positions.front() == 0);
    CHECK(positions[7] == 7);
    CHECK(positions[8] == 88);
}

TEST_CASE("an empty prompt is refused before the first block if a layer must evict", "[contract]") {
    TopicModel model;
    KVCache cache(model.shape, EpiCache{}, Budget{.tokens = 20});
    NoPrompt none;
    const auto history = topic_history(21, 4, 10);
    const auto attempt = [&](std::size_t tokens, std::size_t block) {
        block_prefill(cache, model, std::span<const std::int32_t>(history).first(tokens), block, none);
    };
    CHECK(failure<error::state_error>([&] { attempt(21, 5); }) ==
          "block_prefill: prompt is empty, want tokens: a layer must evict");
    CHECK(cache.seen() == 0);
    CHECK(failure<error::config_error>([&] { attempt(20, 0); }) ==
          "block_prefill: block is 0, want at least 1");
    cache.hold(true);
    CHECK(failure<error::state_error>([&] { attempt(20, 5); }) == "block_prefill: hold is on, want off");
    cache.hold(false);
    CHECK_NOTHROW(attempt(0, 5));
    CHECK_NOTHROW(attempt(20, 5));
    CHECK(cache.seen() == 20);
}
