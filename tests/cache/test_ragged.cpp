// Budget rules beside policies: heads and layers of different sizes, from the prompt through decoding.

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "kvcull/cache/evictor.hpp"
#include "kvcull/cache/kv_cache.hpp"
#include "kvcull/policies.hpp"
#include "kvcull/select/head_rules.hpp"
#include "kvcull/select/layer_rules.hpp"
#include "support/catch.hpp"
#include "support/engine.hpp"
#include "support/failure.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

constexpr CacheShape shape{.layers = 3, .q_heads = 4, .kv_heads = 2, .head_dim = 8, .value_dim = 4};
constexpr std::size_t prompt = 60, end = 80;

template <class Cache>
std::vector<std::size_t> rows_of(const Cache& cache) {
    std::vector<std::size_t> rows;
    for (std::size_t layer = 0; layer < cache.shape().layers; ++layer)
        for (std::size_t h = 0; h < cache.shape().kv_heads; ++h) rows.push_back(cache.rows(layer, h));
    return rows;
}
std::size_t sum(const std::vector<std::size_t>& numbers) {
    std::size_t total = 0;
    for (const std::size_t one : numbers) total += one;
    return total;
}
template <class Cache>
std::vector<std::vector<position_t>> all_positions_of(const Cache& cache) {
    std::vector<std::vector<position_t>> all;
    for (std::size_t layer = 0; layer < cache.shape().layers; ++layer)
        for (std::size_t h = 0; h < cache.shape().kv_heads; ++h)
            all.push_back(positions_of(cache.view(layer, h)));
    return all;
}
/// Keys of head 1 are long: policies by key norm give all rows to head 0.
Stream lopsided_stream() {
    Stream stream = random_stream(shape, end, 3);
    const std::size_t head = end * shape.head_dim;
    for (std::size_t layer = 0; layer < shape.layers; ++layer)
        for (std::size_t i = 0; i < head; ++i) stream.k[(layer * 2 + 1) * head + i] *= 50.0F;
    return stream;
}

/// Key norms, at the prompt's end; in the last layer an error as long as `fails` is set.
struct Failing : KeyNorm {
    const bool* fails = nullptr;

    static constexpr bool due(const Moment& moment) { return moment.prompt_end; }
    void score(const State& state, const HeadStep& step, std::span<float> out) const {
        if (*fails && step.layer == 2) throw error::state_error("no score");
        KeyNorm::score(state, step, out);
    }
};

}  // namespace

TEST_CASE("a prompt in any calls ends with the sizes that the rule gave, and decoding keeps them",
          "[property]") {
    const Stream stream = random_stream(shape, end, 1);
    for (const std::size_t chunk : {60U, 13U})
        for (const AdaMode mode : {AdaMode::interpolate, AdaMode::floor_fill}) {
            CAPTURE(chunk, static_cast<int>(mode));
            std::vector<std::vector<position_t>> want;
            for_each_driver(
                shape, SnapKV{.window = 4, .kernel = 3, .decode_interval = 3}, {.tokens = 16},
                [&](auto& cache, const std::string& driver) {
                    CAPTURE(driver);
                    feed_prompt(cache, stream, 0, prompt, chunk, driver.starts_with("KVCache"));
                    const auto sizes = rows_of(cache);
                    REQUIRE(sum(sizes) == 6 * 16);
                    REQUIRE(sizes[0] + sizes[1] > sizes[4] + sizes[5]);  // lower layers have more
                    REQUIRE(std::adjacent_find(sizes.begin(), sizes.end(), std::not_equal_to<>()) !=
                            sizes.end());
                    for (std::size_t i = 0; i < sizes.size(); ++i)
                        REQUIRE(cache.evictor().size(i / 2, i % 2) == sizes[i]);
                    for (std::size_t token = prompt; token < end; ++token) {
                        feed(cache, stream, token, 1);
                        const auto rows = rows_of(cache);
                        for (std::size_t i = 0; i < rows.size(); ++i)
                            REQUIRE(rows[i] == sizes[i] + (token - prompt + 1) % 3);
                    }
                    const auto held = all_positions_of(cache);
                    if (want.empty()) want = held;
                    REQUIRE(held == want);
                },
                AdaKV<Pyramid>{.mode = mode});
        }
}

TEST_CASE("a head without rows frees its bytes, and attends to new tokens alone", "[property]") {
    const Stream stream = lopsided_stream();
    BlockPool pool({.block_rows = 4});
    KVCache cache(shape, KeyNorm{}, {.tokens = 8}, pool, AdaKV<>{.alpha_permille = 0});
    feed_prompt(cache, stream, 0, prompt, 60);
    REQUIRE(rows_of(cache) == std::vector<std::size_t>{16, 0, 16, 0, 16, 0});
    cache.trim();
    const std::size_t row = (shape.head_dim + shape.value_dim) * sizeof(float) + sizeof(position_t);
    REQUIRE(cache.bytes() >= sum(rows_of(cache)) * row);
    REQUIRE(cache.bytes() < 2 * sum(rows_of(cache)) * row);
    for (std::size_t token = prompt; token < end; ++token) {
        std::vector<std::vector<position_t>> before = all_positions_of(cache);
        const std::vector<float> out = feed(cache, stream, token, 1);
        for (std::size_t layer = 0; layer < shape.layers; ++layer)
            for (std::size_t h = 0; h < shape.q_heads; ++h) {
                auto& seen = before[layer * 2 + h / 2];
                if (h % 2 == 0) seen.push_back(static_cast<position_t>(token));
                std::vector<float> q(stream.queries(layer, token, 1).row(h, 0),
                                     stream.queries(layer, token, 1).row(h, 0) + shape.head_dim);
                std::vector<float> k, v;
                for (const position_t position : seen) {
                    const auto at = static_cast<std::size_t>(position);
                    const float* key = stream.keys(layer, at, 1).row(h / 2, 0);
                    const float* value = stream.values(layer, at, 1).row(h / 2, 0);
                    k.insert(k.end(), key, key + shape.head_dim);
                    v.insert(v.end(), value, value + shape.values());
                }
                const Visible all{0, 0, seen.size()};
                const ReferenceAttention want =
                    reference_attention(q, k, v, std::span(&all, 1), seen.size(), shape.head_dim,
                                        shape.values(), static_cast<double>(shape.logit_scale()));
                for (std::size_t i = 0; i < shape.values(); ++i)
                    REQUIRE(close(out[(layer * shape.q_heads + h) * shape.values() + i], want.output[i], 1e-4,
                                  1e-5));
            }
        REQUIRE(rows_of(cache) == std::vector<std::size_t>{16, 0, 16, 0, 16, 0});
    }
}

TEST_CASE("an even division through a head rule is the uniform rule, bit for bit", "[property]") {
    const Stream stream = random_stream(shape, end, 5);
    for (const AdaMode mode : {AdaMode::interpolate, AdaMode::floor_fill}) {
        KVCache plain(shape, H2O{.recent = 4}, {.tokens = 12});
        KVCache ruled(shape, H2O{.recent = 4}, {.tokens = 12}, AdaKV<>{.mode = mode, .alpha_permille = 1000});
        feed_prompt(plain, stream, 0, prompt, 17);
        feed_prompt(ruled, stream, 0, prompt, 17);
        REQUIRE(same_bits(feed_decode(plain, stream, prompt, end), feed_decode(ruled, stream, prompt, end)));
        REQUIRE(all_positions_of(plain) == all_positions_of(ruled));
    }
}

TEST_CASE("the prompt's length shapes a pyramid whenever it becomes known", "[contract]") {
    const Stream stream = random_stream(shape, end, 6);
    const SnapKV policy{.window = 4, .kernel = 3};
    for (const std::size_t length : {15U, 16U, 20U, 24U, 30U, 60U})
        for (const bool announced : {true, false})
            for (const Budget& budget : {Budget{.tokens = 16}, Budget{.ratio = 0.5}}) {
                CAPTURE(length, announced, budget.tokens);
                KVCache cache(shape, policy, budget, Pyramid{});
                std::vector<std::size_t> sizes(3), want;
                Pyramid{}.layer_sizes(budget_tokens(budget, length), length, {0, 4}, sizes);
                for (const std::size_t size : sizes) want.insert(want.end(), 2, std::min(size, length));
                feed_prompt(cache, stream, 0, length, 7, announced);
                REQUIRE(rows_of(cache) == want);
            }
}

TEST_CASE("heads hold their pinned rows whatever a rule gives them", "[contract]") {
    const Stream stream = lopsided_stream();
    KVCache cache(shape, KeyNorm{}, {.tokens = 8}, AdaKV<>{.alpha_permille = 0});
    cache.pin(10, 13);
    feed_prompt(cache, stream, 0, prompt, 60);
    for (std::size_t layer = 0; layer < 3; ++layer) {
        REQUIRE(cache.rows(layer, 0) == 13);
        REQUIRE(cache.positions(layer, 1) == std::vector<position_t>{10, 11, 12});
    }
}

TEST_CASE("heads hold their pinned rows also where a rule has no room for them", "[contract]") {
    const Stream stream = random_stream(shape, end, 4);
    KVCache cache(shape, H2O{.recent = 0}, {.tokens = 8}, HeadTable{{1, 1, 7, 1, 0, 9}, 2});
    cache.pin(0, 4);
    feed_prompt(cache, stream, 0, prompt, 60);
    REQUIRE(rows_of(cache) == std::vector<std::size_t>{4, 4, 4, 4, 4, 5});
    feed_decode(cache, stream, prompt, end);
    for (const auto& held : all_positions_of(cache))
        for (const position_t pinned : {0, 1, 2, 3})
            REQUIRE(std::find(held.begin(), held.end(), pinned) != held.end());
}

TEST_CASE("room for new tokens is made beside pinned rows, or not at all", "[contract]") {
    const Stream stream = random_stream(shape, end, 9);
    const auto check = [&](const auto& policy, const auto& rule) {
        KVCache cache(shape, policy, {.tokens = 8}, rule);
        cache.pin(0, 6);
        feed_prompt(cache, stream, 0, 12, 12);
        const auto before = all_positions_of(cache);
        const auto refused = [&](const std::string& where, std::size_t tokens, std::size_t size) {
            return "Evictor::" + where + ": tokens is " + std::to_string(tokens) +
                   ", want at most the budget " + std::to_string(size) + " less the 6 pinned rows of a head";
        };
        CHECK(failure<error::shape_error>([&] { cache.make_room(4); }) == refused("make_room", 4, 8));
        CHECK(failure<error::shape_error>([&] { (void)cache.propose(5); }) == refused("propose", 0, 5));
        CHECK(all_positions_of(cache) == before);
        CHECK(cache.fork(cache.propose(6)).positions(2, 1) == std::vector<position_t>{0, 1, 2, 3, 4, 5});
        cache.make_room(2);
        for (const auto& held : all_positions_of(cache))
            CHECK(held == std::vector<position_t>{0, 1, 2, 3, 4, 5});
    };
    check(H2O{.recent = 2}, Uniform{});
    check(Tova{}, Uniform{});
    check(EpiCache{.sinks = 0, .recent = 0}, Uniform{});
    check(H2O{.recent = 2}, AdaKV<>{.alpha_permille = 1000});
}

TEST_CASE("no room is made in layers that a policy skips", "[contract]") {
    const Stream stream = random_stream(shape, end, 11);
    KVCache cache(shape, KeyNorm{.skip_layers = 1}, {.tokens = 8});
    feed_prompt(cache, stream, 0, 20, 20);
    CHECK(rows_of(cache.fork(cache.propose(5))) == std::vector<std::size_t>{20, 20, 5, 5, 5, 5});
    cache.make_room(2);
    REQUIRE(rows_of(cache) == std::vector<std::size_t>{20, 20, 6, 6, 6, 6});
}

TEST_CASE("a table of rows holds whatever the chunks of a prompt", "[property]") {
    const Stream stream = random_stream(shape, end, 10);
    for (const std::size_t chunk : {60U, 20U, 7U, 1U}) {
        KVCache cache(shape, H2O{}, {.tokens = 16}, HeadTable{{30, 2, 0, 0, 8, 8}, 2});  // 8 rows are recent
        feed_prompt(cache, stream, 0, prompt, chunk);
        REQUIRE(rows_of(cache) == std::vector<std::size_t>{38, 10, 8, 8, 16, 16});
    }
}

TEST_CASE("a decision that throws leaves sizes and rows as they were, and is taken anew", "[contract]") {
    const Stream stream = lopsided_stream();
    bool throws = true;
    const auto feed_whole = [&](auto& cache) {
        cache.begin_prompt();
        feed(cache, stream, 0, prompt);
    };
    Failing policy;
    policy.fails = &throws;
    KVCache cache(shape, policy, {.tokens = 8}, AdaKV<>{.alpha_permille = 0});
    feed_whole(cache);
    const auto before = all_positions_of(cache);
    REQUIRE_THROWS_AS(cache.end_prompt(), error::state_error);
    CHECK(all_positions_of(cache) == before);
    for (std::size_t i = 0; i < 6; ++i) CHECK(cache.evictor().size(i / 2, i % 2) == 8);
    throws = false;
    cache.end_prompt();
    CHECK(rows_of(cache) == std::vector<std::size_t>{16, 0, 16, 0, 16, 0});
}

TEST_CASE("a rule that does not fit policy and budget is refused when the cache is made", "[contract]") {
    using error::config_error;
    CHECK_THROWS_AS(KVCache(shape, Streaming{.sinks = 2}, {.tokens = 8}, Pyramid{}), config_error);
    CHECK_THROWS_AS(KVCache(shape, H2O{.recent = 2}, {.tokens = 8}, AdaKV<>{.alpha_permille = 1001}),
                    config_error);
    CHECK_THROWS_AS(KVCache(shape, H2O{.recent = 2}, {.tokens = 8}, HeadTable{{1, 2}, 2}), config_error);
    CHECK(failure<config_error>([&] {
              KVCache(shape, H2O{.recent = 2}, {.tokens = 8, .sinks = 6}, AdaKV<>{});
          }) == "ada: budget is 8, want more than the 8 protected rows");
}

TEST_CASE("a budget of memory holds for the rows of all layers and heads, whatever divides it",
          "[property]") {
    const Stream stream = random_stream(shape, end, 7);
    const std::size_t row = (shape.head_dim + shape.value_dim) * sizeof(float) + sizeof(position_t);
    const Budget budget{.bytes = 6 * 12 * row + 11};
    KVCache even(shape, H2O{.recent = 4}, budget);
    KVCache ruled(shape, H2O{.recent = 4}, budget, AdaKV<Pyramid>{});
    for (std::size_t i = 0; i < 6; ++i) REQUIRE(even.evictor().size(i / 2, i % 2) == 12);
    feed_prompt(ruled, stream, 0, prompt, 60);
    REQUIRE(sum(rows_of(ruled)) == 6 * 12);
    CHECK_THROWS_AS(KVCache(shape, H2O{}, {.tokens = 8, .bytes = 10000}), error::config_error);
    CHECK_THROWS_AS(KVCache(shape, H2O{}, {.bytes = 6 * row - 1}), error::config_error);
}

TEST_CASE("heads that keep the same rows are not divided", "[contract]") {
    const Stream stream = random_stream(shape, end, 8);
    KVCache cache(shape, Tova{}, {.tokens = 12}, AdaKV<>{.alpha_permille = 0});
    feed_prompt(cache, stream, 0, prompt, 13);
    feed_decode(cache, stream, prompt, end);
    for (std::size_t i = 0; i < 6; ++i) {
        REQUIRE(cache.rows(i / 2, i % 2) == 12);
        REQUIRE(cache.evictor().size(i / 2, i % 2) == 12);
    }
}
