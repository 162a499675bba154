// What models do to attention beyond a scale: softcap, bias, sliding windows, layers that are left alone.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include "kvcull/cache/evictor.hpp"
#include "kvcull/cache/kv_cache.hpp"
#include "kvcull/policies.hpp"
#include "support/catch.hpp"
#include "support/engine.hpp"
#include "support/failure.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

constexpr std::size_t tokens = 70, prompt = 45;

/// What the model computes for one token of one layer, over all tokens before it: naive double loops.
std::vector<double> full_attention(const Stream& stream, std::size_t layer, std::size_t head,
                                   std::size_t token, const std::vector<float>& slopes) {
    const CacheShape& shape = stream.shape;
    const std::size_t kv = head / shape.group(), window = shape.layer(layer).window;
    const std::size_t first = window == 0 || token + 1 < window ? 0 : token + 1 - window;
    const float* q = stream.queries(layer, token, 1).row(head, 0);
    std::vector<double> logits, out(shape.values(), 0.0);
    double total = 0;
    for (std::size_t j = first; j <= token; ++j) {
        const float* k = stream.keys(layer, j, 1).row(kv, 0);
        double logit = 0;
        for (std::size_t c = 0; c < shape.head_dim; ++c)
            logit += static_cast<double>(q[c]) * static_cast<double>(k[c]);
        logit *= static_cast<double>(shape.logit_scale());
        const double cap = shape.softcap;
        if (cap > 0) logit = cap * std::tanh(logit / cap);
        if (!slopes.empty())
            logit -= static_cast<double>(slopes[head]) *
                     static_cast<double>(stream.position(token) - stream.position(j));
        logits.push_back(std::exp(logit));
        total += logits.back();
    }
    for (std::size_t j = first; j <= token; ++j)
        for (std::size_t c = 0; c < out.size(); ++c)
            out[c] +=
                logits[j - first] / total * static_cast<double>(stream.values(layer, j, 1).row(kv, 0)[c]);
    return out;
}

/// Feeds the stream, a prompt in chunks and then token by token, and compares the outputs of the layers.
template <class Cache>
void require_full_attention(Cache& cache, const Stream& stream, std::size_t chunk,
                            const std::vector<std::size_t>& layers, const std::vector<float>& slopes = {}) {
    const CacheShape& shape = stream.shape;
    cache.begin_prompt();
    for (std::size_t first = 0; first < stream.tokens;) {
        const std::size_t count = first < prompt ? std::min(chunk, prompt - first) : 1;
        const std::vector<float> out = feed(cache, stream, first, count);
        for (const std::size_t layer : layers)
            for (std::size_t head = 0; head < shape.q_heads; ++head)
                for (std::size_t i = 0; i < count; ++i) {
                    const auto want = full_attention(stream, layer, head, first + i, slopes);
                    const float* got =
                        out.data() + ((layer * shape.q_heads + head) * count + i) * shape.values();
                    bool good = true;
                    for (std::size_t c = 0; c < want.size(); ++c)
                        good = good && close(got[c], want[c], 2e-5, 2e-5);
                    CAPTURE(layer, head, first + i);
                    REQUIRE(good);
                }
        first += count;
        if (first == prompt) cache.end_prompt();
    }
}

/// One ranking over all layers.
struct ModelH2O : H2O {
    static constexpr Scope scope() { return Scope::model_pooled; }
};

CacheShape layered(std::size_t group, std::size_t dim, std::vector<LayerTraits> traits) {
    return {.layers = traits.size(),
            .q_heads = 2 * group,
            .kv_heads = 2,
            .head_dim = dim,
            .value_dim = dim + 3,
            .traits = std::move(traits)};
}

}  // namespace

TEST_CASE("softcap, bias and windows give the attention of the model on every path", "[differential]") {
    for (const std::size_t group : {1U, 4U, 7U}) {
        CacheShape shape =
            layered(group, group == 1 ? 1 : 20, {{}, {.window = 9}, {.window = 1}, {.evicts = false}});
        shape.softcap = 2.5F;
        std::vector<float> slopes(shape.q_heads);
        for (std::size_t h = 0; h < slopes.size(); ++h) slopes[h] = 0.02F * static_cast<float>(h + 1);
        const Stream stream = random_stream(shape, tokens, group);
        for (const std::size_t chunk : {45U, 11U, 1U})
            for_each_driver(shape, Full{}, {}, [&](auto& cache, const std::string& name) {
                INFO(name << ", group " << group << ", chunk " << chunk);
                cache.set_bias(alibi(slopes));
                require_full_attention(cache, stream, chunk, {0, 1, 2, 3}, slopes);
            });
    }
}

TEST_CASE("rows of a probe see what tokens in their place would see", "[differential]") {
    CacheShape shape = layered(4, 20, {{}, {.window = 9}, {.window = 3}});
    shape.softcap = 2.0F;
    const std::vector<float> slopes(shape.q_heads, 0.05F);
    const Stream stream = random_stream(shape, tokens, 4);
    KVCache cache(shape, Full{});
    cache.set_bias(alibi(slopes));
    feed(cache, stream, 0, 40);
    constexpr std::size_t count = 5;
    std::vector<float> out(shape.q_heads * count * shape.values());
    for (std::size_t layer = 0; layer < shape.layers; ++layer) {
        cache.probe(layer, stream.queries(layer, 40, count), stream.keys(layer, 40, count),
                    stream.values(layer, 40, count),
                    head_major(out.data(), shape.q_heads, count, shape.values()));
        for (std::size_t row = 0; row < shape.q_heads * count; ++row) {
            const auto want = full_attention(stream, layer, row / count, 40 + row % count, slopes);
            for (std::size_t c = 0; c < want.size(); ++c)
                REQUIRE(close(out[row * shape.values() + c], want[c], 2e-5, 2e-5));
        }
    }
}

TEST_CASE("a policy leaves layers with a window and spared layers to themselves", "[differential]") {
    const CacheShape shape = layered(2, 8, {{}, {.window = 16}, {.evicts = false}, {}});
    const Stream stream = random_stream(shape, tokens, 5);
    const auto check = [&](const auto& policy) {
        for_each_driver(shape, policy, {.tokens = 20}, [&](auto& cache, const std::string& name) {
            INFO(name << ", " << policy.name);
            require_full_attention(cache, stream, 10, {1, 2});
            for (std::size_t h = 0; h < shape.kv_heads; ++h) {
                CHECK(cache.rows(0, h) + cache.rows(0, 1 - h) + cache.rows(3, h) + cache.rows(3, 1 - h) <=
                      80);
                CHECK(cache.rows(1, h) >= 15);
                CHECK(cache.rows(1, h) <= 18);
                CHECK(cache.rows(2, h) == tokens);
            }
        });
    };
    check(H2O{});
    check(Tova{});
    check(KeyDiff{});
    check(SnapKV{.window = 4, .decode_interval = 1});
    check(ModelH2O{});
}

TEST_CASE("rows of a window leave a few at a time, however long the call", "[property]") {
    const CacheShape shape = layered(1, 4, {{.window = 16}});
    const Stream stream = random_stream(shape, tokens, 6);
    for_each_driver(shape, Full{}, {}, [&](auto& cache, const std::string& name) {
        INFO(name);
        feed(cache, stream, 0, 40);
        CHECK(cache.rows(0, 0) == 15);
        std::size_t most = 0, cuts = 0;
        for (std::size_t token = 40; token < tokens; ++token) {
            const std::size_t before = cache.rows(0, 0);
            feed(cache, stream, token, 1);
            const std::size_t after = cache.rows(0, 0);
            cuts += after <= before ? 1 : 0;
            most = std::max(most, after);
            const auto held = positions_of(cache.view(0, 1));
            CHECK(held.back() == static_cast<position_t>(token));
            CHECK(held.front() <= static_cast<position_t>(token) - 14);
        }
        CHECK(most == 18);
        CHECK(cuts == 7);  // every fourth token
    });
}

TEST_CASE("positions with gaps shrink what a window holds", "[differential]") {
    const CacheShape shape = layered(2, 8, {{.window = 12}, {}});
    Stream stream = random_stream(shape, tokens, 7);
    for (std::size_t i = 0; i < tokens; ++i)
        stream.positions.push_back(static_cast<position_t>(3 * i + i / 20 * 1000));
    KVCache cache(shape, Full{});
    for (std::size_t token = 0; token < tokens; ++token) {
        const std::vector<float> out = feed(cache, stream, token, 1);
        for (std::size_t head = 0; head < shape.q_heads; ++head) {
            double total = 0, want = 0;
            for (std::size_t j = 0; j <= token; ++j) {
                if (stream.position(token) - stream.position(j) >= 12) continue;
                double logit = 0;
                for (std::size_t c = 0; c < shape.head_dim; ++c)
                    logit += static_cast<double>(stream.queries(0, token, 1).row(head, 0)[c]) *
                             static_cast<double>(stream.keys(0, j, 1).row(head / 2, 0)[c]);
                const double weight = std::exp(logit * static_cast<double>(shape.logit_scale()));
                total += weight;
                want += weight * static_cast<double>(stream.values(0, j, 1).row(head / 2, 0)[0]);
            }
            REQUIRE(close(out[head * shape.values()], want / total, 2e-5, 2e-5));
        }
    }
}

TEST_CASE("a window gives its blocks back, and the peak of a prompt is one layer uncompressed",
          "[property]") {
    const CacheShape shape = layered(1, 4, {{.window = 8}, {.window = 8}, {.window = 8}, {.window = 8}});
    const Stream stream = random_stream(shape, tokens, 8);
    BlockPool pool({.block_rows = 4});
    KVCache cache(shape, Full{}, {}, pool);
    feed(cache, stream, 0, 64);
    KVCache small(shape, Full{}, {}, pool);
    feed(small, stream, 0, 7);
    const std::size_t block = small.bytes() / (4 * 2 * 2);
    CHECK(cache.rows(0, 0) == 7);
    CHECK(cache.bytes() == small.bytes());
    CHECK(cache.peak_bytes() <= (2 * 16 + 3 * 2 * 2) * block);
}

TEST_CASE("marks, forks and truncation keep what a window needs", "[property]") {
    const CacheShape shape = layered(2, 8, {{.window = 16}, {}});
    const Stream stream = random_stream(shape, tokens, 9);
    KVCache cache(shape, H2O{}, {.tokens = 24});
    feed(cache, stream, 0, 30);
    const Mark mark = cache.mark();
    const std::vector<float> first = feed_decode(cache, stream, 30, 50);
    cache.rollback(mark);
    CHECK(same_bits(feed_decode(cache, stream, 30, 50), first));

    // Two tokens may go: the window was cut less than that ago. More would leave it with a hole.
    KVCache other(shape, Full{});
    for (std::size_t token = 0; token < 34; ++token) feed(other, stream, token, 1);
    const auto gone = other.positions(0, 0).front();
    const auto spare = static_cast<std::size_t>(34 - 15 - gone);
    other.truncate(spare);
    require_full_attention(other, stream, 1, {});
}

TEST_CASE("truncation that would tear a hole into a window is refused and changes nothing", "[contract]") {
    const CacheShape shape = layered(1, 4, {{}, {.window = 16}});
    const Stream stream = random_stream(shape, tokens, 10);
    KVCache cache(shape, Full{});
    feed(cache, stream, 0, 40);
    const auto before = cache.positions(1, 0);
    CHECK(failure<error::shape_error>([&] { cache.truncate(1); }) ==
          "Evictor::truncate: tokens is 1, want few enough for the rows that left the window of layer 1");
    CHECK(cache.positions(1, 0) == before);
    CHECK(cache.seen() == 40);
    feed(cache, stream, 40, 1);
    cache.truncate(1);
    CHECK(cache.seen() == 40);
}

TEST_CASE("a budget of memory gives the windows theirs first", "[contract]") {
    const CacheShape shape = layered(1, 4, {{.window = 16}, {}, {}});
    const std::size_t row = shape.row_bytes(), windows = 18 * 2 * row;
    KVCache cache(shape, H2O{}, {.bytes = windows + 11 * 4 * row});
    CHECK(cache.evictor().size(1, 0) == 11);
    CHECK(cache.evictor().size(0, 0) == unlimited);
    CHECK(failure<error::config_error>([&] { KVCache(shape, H2O{}, Budget{.bytes = windows}); }) ==
          "Budget: bytes is " + std::to_string(windows) + ", want more than the " + std::to_string(windows) +
              " of layers with a window");
    const CacheShape spared = layered(1, 4, {{.evicts = false}, {}});
    CHECK(failure<error::config_error>([&] { KVCache(spared, H2O{}, Budget{.bytes = 1 << 20}); }) ==
          "Budget: bytes is 1048576, want a number of tokens: layer 0 keeps all its rows");
}

TEST_CASE("what reads plain logits is refused by name where they are capped or biased", "[contract]") {
    CacheShape shape = layered(1, 4, {{}});
    shape.softcap = 30.0F;
    const LaqThen<OBCache> ahead{};
    CHECK(failure<error::config_error>([&] { KVCache(shape, ahead, Budget{.tokens = 40}); }) ==
          "CacheShape: softcap is given, want none: laq reads plain logits");
    CHECK_NOTHROW(KVCache(shape, OBCache{.kind = OBCache::Score::key}, Budget{.tokens = 40}));
    CHECK_NOTHROW(KVCache(shape, SnapKV{.window = 4}, Budget{.tokens = 9}));
    shape.softcap = 0.0F;
    KVCache cache(shape, ahead, Budget{.tokens = 40});
    CHECK(failure<error::config_error>([&] {
              cache.set_bias(alibi({1.0F, 1.0F}));
          }) == "Evictor::set_bias: bias is given, want none: laq reads plain logits");
    cache.set_bias({});
}

TEST_CASE("shapes with impossible features are refused", "[contract]") {
    CacheShape shape = layered(1, 4, {{}, {}});
    shape.traits.pop_back();
    CHECK(failure<error::config_error>([&] { KVCache(shape, Full{}); }) ==
          "CacheShape: traits.size() is 1, want layers = 2, or 0");
    shape.traits.clear();
    for (const float cap : {-1.0F, quiet_nan()}) {
        shape.softcap = cap;
        CHECK(failure<error::config_error>([&] {
                  KVCache(shape, Full{});
              }).ends_with("want a positive number, or 0 for none"));
    }
}

TEST_CASE("scores of a layer that the policy has no say in are refused", "[contract]") {
    const CacheShape shape = layered(1, 4, {{.window = 3}});
    KVCache cache(shape, H2O{}, {.tokens = 5});
    CHECK(failure<error::state_error>([&] { (void)cache.scores(0, 1); }) ==
          "Evictor::scores: layer 0 is spared from eviction, want a layer that the policy has a say in");
}

TEST_CASE("latent values are the front of their keys and are stored once", "[differential]") {
    const CacheShape apart{.layers = 2, .q_heads = 7, .kv_heads = 1, .head_dim = 12, .value_dim = 9};
    CacheShape latent = apart;
    latent.latent = true;
    Stream stream = random_stream(apart, tokens, 13);
    for (std::size_t layer = 0; layer < 2; ++layer)
        for (std::size_t i = 0; i < tokens; ++i)
            std::copy_n(stream.keys(layer, i, 1).row(0, 0), 9, stream.v.data() + (layer * tokens + i) * 9);
    const auto check = [&](const auto& policy) {
        KVCache two(apart, policy, Budget{.tokens = 14}), one(latent, policy, Budget{.tokens = 14});
        for (std::size_t token = 0; token < tokens; ++token) {
            const std::vector<float> want = feed(two, stream, token, 1);
            std::vector<float> got(want.size());
            for (std::size_t layer = 0; layer < 2; ++layer) {
                one.append(layer, stream.keys(layer, token, 1), {});
                one.attend(layer, stream.queries(layer, token, 1),
                           head_major(got.data() + layer * 63, 7, 1, 9));
            }
            one.end_step();
            REQUIRE(same_bits(got, want));
            REQUIRE(one.positions(1, 0) == two.positions(1, 0));
        }
        CHECK(one.bytes() < two.bytes());
    };
    check(H2O{});
    check(Caote<>{});
    check(KeyDiff{});

    KVCache cache(latent, Full{});
    CHECK(failure<error::shape_error>([&] {
              cache.append(0, stream.keys(0, 0, 1), stream.values(0, 0, 1));
          }) == "KVCache::append: v is given, want none: values are latent in k");

    KVCache two(apart, Full{});
    feed(two, stream, 0, 9);
    std::vector<float> want(7 * 3 * 9), got(want.size());
    two.probe(1, stream.queries(1, 9, 3), stream.keys(1, 9, 3), stream.values(1, 9, 3),
              head_major(want.data(), 7, 3, 9));
    for (std::size_t layer = 0; layer < 2; ++layer) {
        std::vector<float> out(7 * 9 * 9);
        cache.append(layer, stream.keys(layer, 0, 9), {});
        cache.attend(layer, stream.queries(layer, 0, 9), head_major(out.data(), 7, 9, 9));
    }
    cache.end_step();
    const auto probe = [&](HeadsView<const float> v) {
        cache.probe(1, stream.queries(1, 9, 3), stream.keys(1, 9, 3), v, head_major(got.data(), 7, 3, 9));
    };
    CHECK(failure<error::shape_error>([&] { probe(stream.values(1, 9, 3)); }) ==
          "Evictor::probe: v is given, want none: values are latent in k");
    probe({});
    CHECK(same_bits(got, want));
    latent.value_dim = 13;
    CHECK(failure<error::config_error>([&] { KVCache(latent, Full{}); }) ==
          "CacheShape: value_dim is 13, want at most head_dim = 12, as values are latent");
}

TEST_CASE("votes by queries follow softcap and bias", "[differential]") {
    // With a slope so steep that a token sees only itself and its neighbour, old rows get no vote.
    CacheShape shape = layered(2, 8, {{}});
    shape.softcap = 1.0F;
    const Stream stream = random_stream(shape, 40, 12);
    for_each_driver(
        shape, SnapKV{.window = 4, .kernel = 1, .pool = Pool::none}, {.tokens = 6},
        [&](auto& cache, const std::string& name) {
            INFO(name);
            cache.set_bias(alibi(std::vector<float>(shape.q_heads, 60.0F)));
            feed_prompt(cache, stream, 0, 40, 13, false);
            for (std::size_t h = 0; h < shape.kv_heads; ++h)
                CHECK(positions_of(cache.view(0, h)) == std::vector<position_t>{34, 35, 36, 37, 38, 39});
        });
}
