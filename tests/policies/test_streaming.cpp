#include "kvcull/policies/streaming.hpp"

#include <cmath>
#include <set>
#include <span>
#include <vector>

#include "kvcull/attention/rope.hpp"
#include "kvcull/policies/h2o.hpp"
#include "kvcull/policies/keydiff.hpp"
#include "support/catch.hpp"
#include "support/conformance.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

const CacheShape small{.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 16};

/// 0 .. sinks - 1 and the last `recent` of `seen`.
std::vector<position_t> window(std::size_t sinks, std::size_t recent, std::size_t seen) {
    std::vector<position_t> positions;
    for (std::size_t j = 0; j < seen; ++j)
        if (j < sinks || j + recent >= seen) positions.push_back(static_cast<position_t>(j));
    return positions;
}

}  // namespace

TEST_CASE("Full, Streaming and Random keep the contract of a policy", "[property]") {
    SECTION("Full") {
        policy_conformance(Full{}, {.evictions = 0, .chunks_do_not_matter = true});
    }
    SECTION("Streaming") {
        policy_conformance(Streaming{}, {.chunks_do_not_matter = true});
    }
    SECTION("Streaming without sinks") {
        policy_conformance(Streaming{.sinks = 0}, {.chunks_do_not_matter = true});
    }
    SECTION("Streaming of sinks only") {
        policy_conformance(Streaming{.sinks = 99}, {.chunks_do_not_matter = true});
    }
    SECTION("Random") {
        policy_conformance(Random{.seed = 3}, {.chunks_do_not_matter = true, .heads_are_alike = false});
    }
}

TEST_CASE("Streaming holds the sinks and the newest tokens after every call", "[property]") {
    const Stream stream = random_stream(small, 60, 1);
    for (const std::size_t sinks : {0U, 1U, 4U, 11U, 12U, 40U}) {
        CAPTURE(sinks);
        const std::size_t fixed = std::min<std::size_t>(sinks, 12);
        for_each_driver(small, Streaming{.sinks = sinks}, {.tokens = 12},
                        [&](auto& cache, const std::string&) {
                            for (std::size_t at = 0; at < 60; ++at) {
                                feed(cache, stream, at, 1);
                                CHECK((positions_of(cache.view(1, 1)) == window(fixed, 12 - fixed, at + 1)));
                            }
                        });
    }
}

TEST_CASE("a scored policy whose recent rows fill the budget keeps what Streaming keeps", "[property]") {
    const Stream stream = random_stream(small, 60, 2);
    const std::size_t tokens = 15, sinks = 4, recent = 11;
    KVCache streaming(small, Streaming{.sinks = sinks}, Budget{.tokens = tokens});
    KVCache h2o(small, H2O{.recent = recent, .sinks = sinks}, Budget{.tokens = tokens});
    KVCache keydiff(small, KeyDiff{.sinks = sinks, .recent = recent}, Budget{.tokens = tokens});
    KVCache random(small, Random{}, Budget{.tokens = tokens, .sinks = sinks, .recent = recent});
    for (std::size_t at = 0; at < 60; at += 3) {
        feed(streaming, stream, at, 3);
        feed(h2o, stream, at, 3);
        feed(keydiff, stream, at, 3);
        feed(random, stream, at, 3);
        CHECK((all_positions(h2o) == all_positions(streaming)));
        CHECK((all_positions(keydiff) == all_positions(streaming)));
        CHECK((all_positions(random) == all_positions(streaming)));
    }
}

TEST_CASE("recent rows win when they and the sinks do not both fit", "[property]") {
    const Stream stream = random_stream(small, 40, 3);
    KVCache cache(small, Random{}, Budget{.tokens = 10, .sinks = 6, .recent = 7});
    KVCache recent(small, Random{}, Budget{.tokens = 10, .sinks = 6, .recent = 25});
    feed_prompt(cache, stream, 0, 40, 40);
    feed_prompt(recent, stream, 0, 40, 40);
    CHECK((cache.positions(0, 0) == window(3, 7, 40)));
    CHECK((recent.positions(0, 0) == window(0, 10, 40)));
}

TEST_CASE("a stream that makes room before every call never exceeds the budget", "[property]") {
    const Stream stream = random_stream(small, 60, 4);
    const std::size_t tokens = 12, sinks = 4;
    for (const std::size_t c : {1U, 3U, 8U}) {
        CAPTURE(c);
        for_each_driver(
            small, Streaming{.sinks = sinks}, {.tokens = tokens}, [&](auto& cache, const std::string&) {
                for (std::size_t at = 0; at + c <= 60; at += c) {
                    cache.make_room(c);
                    CHECK((positions_of(cache.view(0, 1)) ==
                           (at + c > tokens ? window(sinks, tokens - sinks - c, at) : window(0, at, at))));
                    feed(cache, stream, at, c);
                    CHECK(cache.rows(0, 1) <= tokens);
                }
                CHECK_THROWS_AS(cache.make_room(tokens + 1), error::shape_error);
                CHECK(cache.rows(0, 1) <= tokens);
            });
    }
}

TEST_CASE("keys turned from their position to their slot are raw keys turned to the slot", "[property]") {
    const std::size_t dim = 16, tokens = 50, kept = 20;
    const CacheShape shape{.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = dim};
    for (const Pairing pairing : {Pairing::half_split, Pairing::interleaved}) {
        const Rope turns = rope(dim, 10000.0, pairing);
        Stream stream = random_stream(shape, tokens, 5);
        const std::vector<float> raw = stream.k;
        for (std::size_t j = 0; j < tokens; ++j)
            rotate(turns, static_cast<position_t>(j), std::span(stream.k).subspan(j * dim, dim));
        KVCache cache(shape, Streaming{}, Budget{.tokens = kept});
        feed_prompt(cache, stream, 0, tokens, tokens);
        const HeadView held = cache.view(0, 0);
        const std::vector<float> rows = rows_by_position(held.k, held);
        const std::vector<position_t> positions = positions_of(held);
        REQUIRE(positions.size() == kept);
        for (std::size_t slot = 0; slot < kept; ++slot) {
            std::vector<float> turned(rows.begin() + static_cast<std::ptrdiff_t>(slot * dim),
                                      rows.begin() + static_cast<std::ptrdiff_t>((slot + 1) * dim));
            rotate(turns, static_cast<position_t>(slot) - positions[slot], turned);
            std::vector<float> want(raw.begin() + positions[slot] * static_cast<std::ptrdiff_t>(dim),
                                    raw.begin() + (positions[slot] + 1) * static_cast<std::ptrdiff_t>(dim));
            rotate(turns, static_cast<position_t>(slot), want);
            for (std::size_t c = 0; c < dim; ++c)
                CHECK(close(turned[c], static_cast<double>(want[c]), 1e-5, 1e-6));
        }
    }
}

TEST_CASE("Random draws by seed, layer, head and position alone", "[property]") {
    const CacheShape shape{.layers = 8, .q_heads = 8, .kv_heads = 8, .head_dim = 2};
    const std::size_t tokens = 200, kept = 50;
    const Stream stream = random_stream(shape, tokens, 6), other = random_stream(shape, tokens, 7);
    const auto positions = [&](std::size_t seed, const Stream& numbers, std::size_t chunk) {
        KVCache cache(shape, Random{.seed = seed}, Budget{.tokens = kept});
        feed_prompt(cache, numbers, 0, tokens, chunk);
        return all_positions(cache);
    };
    const auto first = positions(1, stream, tokens);
    CHECK((positions(1, other, 7) == first));
    CHECK_FALSE((positions(2, stream, tokens) == first));
    const std::set<std::vector<position_t>> different(first.begin(), first.end());
    CHECK(different.size() == shape.heads());
    double sum = 0;
    for (const auto& head : first)
        for (const position_t position : head) sum += static_cast<double>(position);
    // 3200 draws of 0 .. 199: the mean is 99.5 with a deviation of about 1.
    CHECK(std::abs(sum / static_cast<double>(shape.heads() * kept) - 99.5) < 5.0);
}
