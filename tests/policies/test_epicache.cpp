#include "kvcull/policies/epicache.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kvcull/cache/kv_cache.hpp"
#include "support/catch.hpp"
#include "support/conformance.hpp"
#include "support/failure.hpp"
#include "support/random.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

constexpr CacheShape shape{.layers = 1, .q_heads = 4, .kv_heads = 2, .head_dim = 8};

/// A cache that has seen `tokens` random tokens, their keys shifted by `shift`.
KVCache<EpiCache> filled(const EpiCache& policy, std::size_t tokens, std::size_t budget, float shift = 0,
                         CacheShape of = shape) {
    KVCache cache(of, policy, Budget{.tokens = budget});
    auto k = random_floats(of.kv_heads * tokens * of.head_dim, 1);
    for (float& x : k) x += shift;
    const auto v = random_floats(of.kv_heads * tokens * of.head_dim, 2);
    const std::vector<float> q(of.q_heads * tokens * of.head_dim);
    std::vector<float> out(q.size());
    cache.begin_prompt();
    cache.append(0, head_major(k.data(), of.kv_heads, tokens, of.head_dim),
                 head_major(v.data(), of.kv_heads, tokens, of.head_dim));
    cache.attend(0, head_major(q.data(), of.q_heads, tokens, of.head_dim),
                 head_major(out.data(), of.q_heads, tokens, of.head_dim));
    cache.end_step();
    cache.end_prompt();
    return cache;
}
/// q [Hq, p, d]
void probe(KVCache<EpiCache>& cache, const std::vector<float>& q) {
    const CacheShape& of = cache.shape();
    const std::size_t p = q.size() / of.q_heads / of.head_dim;
    const auto own = random_floats(of.kv_heads * p * of.head_dim, 3);  // must have no say
    std::vector<float> out(q.size());
    const auto keys = head_major(own.data(), of.kv_heads, p, of.head_dim);
    cache.probe(0, head_major(q.data(), of.q_heads, p, of.head_dim), keys, keys,
                head_major(out.data(), of.q_heads, p, of.head_dim));
}
std::vector<float> scores_after(const std::vector<float>& q, float shift = 0) {
    KVCache<EpiCache> cache = filled({}, 20, 20, shift);
    probe(cache, q);
    std::vector<float> all = cache.scores(0, 0);
    const std::vector<float> other = cache.scores(0, 1);
    all.insert(all.end(), other.begin(), other.end());
    return all;
}
/// The score of the spec in double, for the keys of `filled`.
std::vector<double> reference(const std::vector<float>& q, std::size_t n) {
    const std::size_t d = shape.head_dim, p = q.size() / shape.q_heads / d;
    const auto k = random_floats(shape.kv_heads * n * d, 1);
    std::vector<double> score(shape.kv_heads * n);
    for (std::size_t h = 0; h < shape.q_heads; ++h)
        for (std::size_t t = 0; t < p; ++t) {
            const std::size_t head = h / shape.group();
            std::vector<double> weight(n);
            double sum = 0;
            for (std::size_t j = 0; j < n; ++j) {
                double logit = 0;
                for (std::size_t c = 0; c < d; ++c)
                    logit += static_cast<double>(q[(h * p + t) * d + c]) *
                             static_cast<double>(k[(head * n + j) * d + c]);
                sum += weight[j] = std::exp(logit / std::sqrt(static_cast<double>(d)));
            }
            for (std::size_t j = 0; j < n; ++j)
                score[head * n + j] = std::max(score[head * n + j], weight[j] / sum);
        }
    return score;
}

}  // namespace

TEST_CASE("EpiCache passes the battery of all policies: nothing but a probe evicts") {
    policy_conformance(
        EpiCache{},
        {.evictions = 0, .when_probed = true, .while_decoding = false, .chunks_do_not_matter = true});
}
TEST_CASE("EpiCache with uniform heads and protected rows passes the battery too") {
    policy_conformance(
        EpiCache{.heads = HeadBudget::uniform, .sinks = 1, .recent = 2},
        {.evictions = 0, .when_probed = true, .while_decoding = false, .chunks_do_not_matter = true});
}

TEST_CASE("the score is the largest weight over prompt rows and the group, over cached rows alone",
          "[differential]") {
    for (const std::size_t p : {1U, 5U, 70U}) {  // 70: two tiles
        const auto q = random_floats(shape.q_heads * p * shape.head_dim, p, 2.0F);
        const auto got = scores_after(q);
        const auto wanted = reference(q, 20);
        for (std::size_t j = 0; j < got.size(); ++j) {
            CAPTURE(p, j);
            REQUIRE(std::abs(static_cast<double>(got[j]) - wanted[j]) < 1e-5);
        }
        for (std::size_t h = 0; h < 2; ++h) {
            const float sum = std::accumulate(got.begin() + static_cast<std::ptrdiff_t>(20 * h),
                                              got.begin() + static_cast<std::ptrdiff_t>(20 * h + 20), 0.0F);
            REQUIRE(sum >= 1.0F - 1e-5F);
            REQUIRE(sum <= static_cast<float>(shape.group() * p) + 1e-5F);
        }
    }
}

TEST_CASE("one prompt row more lowers no score, and a constant added to all keys changes none",
          "[property]") {
    const std::size_t p = 6, d = shape.head_dim;
    const auto q = random_floats(shape.q_heads * p * d, 9, 2.0F);
    std::vector<float> fewer, turned;
    for (std::size_t h = 0; h < shape.q_heads; ++h)
        for (std::size_t t = 0; t < p; ++t) {
            const auto row = q.begin() + static_cast<std::ptrdiff_t>((h * p + t) * d);
            const auto last = q.begin() + static_cast<std::ptrdiff_t>((h * p + p - 1 - t) * d);
            if (t + 1 < p) fewer.insert(fewer.end(), row, row + static_cast<std::ptrdiff_t>(d));
            turned.insert(turned.end(), last, last + static_cast<std::ptrdiff_t>(d));
        }
    const auto all = scores_after(q), without = scores_after(fewer), shifted = scores_after(q, 0.5F);
    CHECK(scores_after(turned) == all);
    for (std::size_t j = 0; j < all.size(); ++j) {
        CHECK(all[j] >= without[j]);
        CHECK(std::abs(all[j] - shifted[j]) < 1e-5F);
    }
}

TEST_CASE("each probe scores afresh and evicts down to the budget", "[property]") {
    for (const HeadBudget heads : {HeadBudget::pooled, HeadBudget::uniform}) {
        KVCache<EpiCache> cache = filled({.heads = heads}, 20, 9);
        CHECK(cache.rows(0, 0) == 20);
        probe(cache, random_floats(shape.q_heads * 3 * shape.head_dim, 4, 3.0F));
        CHECK(cache.rows(0, 0) + cache.rows(0, 1) == 18);
        if (heads == HeadBudget::uniform) CHECK(cache.rows(0, 0) == 9);
        const auto before = cache.scores(0, 0);
        probe(cache, std::vector<float>(shape.q_heads * shape.head_dim));
        const auto rows = static_cast<float>(cache.rows(0, 0));
        for (const float x : cache.scores(0, 0)) CHECK(std::abs(x - 1.0F / rows) < 1e-6F);
        CHECK(cache.scores(0, 0) != before);
    }
}

TEST_CASE("pooled heads may end empty, and an empty head answers from the new rows alone", "[property]") {
    // Queries of the first KV head find one sharp match each, those of the second nothing in particular.
    KVCache<EpiCache> cache = filled({}, 20, 1);
    const HeadView held = cache.view(0, 0);
    std::vector<float> q(shape.q_heads * 2 * shape.head_dim), key(shape.head_dim);
    for (std::size_t t = 0; t < 2; ++t) {
        held.k.widen(3 + 8 * t, key);
        for (std::size_t c = 0; c < key.size(); ++c) q[t * key.size() + c] = 40 * key[c];
    }
    probe(cache, q);
    REQUIRE(cache.rows(0, 0) == 2);
    REQUIRE(cache.rows(0, 1) == 0);
    const auto k = random_floats(2 * shape.head_dim, 5), v = random_floats(2 * shape.head_dim, 6);
    std::vector<float> out(shape.q_heads * shape.head_dim);
    const auto one = random_floats(shape.q_heads * shape.head_dim, 7);
    cache.append(0, head_major(k.data(), 2, 1, shape.head_dim), head_major(v.data(), 2, 1, shape.head_dim));
    cache.attend(0, head_major(one.data(), shape.q_heads, 1, shape.head_dim),
                 head_major(out.data(), shape.q_heads, 1, shape.head_dim));
    cache.end_step();
    for (std::size_t c = 0; c < 2 * shape.head_dim; ++c)
        CHECK(std::abs(out[2 * shape.head_dim + c] - v[shape.head_dim + c % shape.head_dim]) < 1e-6F);
    probe(cache, one);  // an empty head is no trouble for a probe
    CHECK(cache.rows(0, 0) + cache.rows(0, 1) == 2);
}

TEST_CASE("with one KV head pooled and uniform budgets keep the same rows", "[property]") {
    const CacheShape single{.layers = 1, .q_heads = 3, .kv_heads = 1, .head_dim = 8};
    const auto q = random_floats(3 * 4 * 8, 8, 2.0F);
    KVCache<EpiCache> pooled = filled({}, 30, 7, 0, single),
                      uniform = filled({.heads = HeadBudget::uniform}, 30, 7, 0, single);
    probe(pooled, q);
    probe(uniform, q);
    CHECK(pooled.positions(0, 0) == uniform.positions(0, 0));
}

TEST_CASE("sinks and recent rows stay within the budget", "[property]") {
    for (const HeadBudget heads : {HeadBudget::pooled, HeadBudget::uniform}) {
        KVCache<EpiCache> cache = filled({.heads = heads, .sinks = 2, .recent = 3}, 30, 6);
        probe(cache, random_floats(shape.q_heads * 4 * shape.head_dim, 8, 4.0F));
        CHECK(cache.rows(0, 0) + cache.rows(0, 1) == 12);
        for (std::size_t h = 0; h < 2; ++h) {
            const auto positions = cache.positions(0, h);
            for (const position_t fixed : {0, 1, 27, 28, 29})
                CHECK(std::count(positions.begin(), positions.end(), fixed) == 1);
        }
    }
    CHECK(failure<error::config_error>([] { (void)filled({.sinks = 4, .recent = 3}, 10, 6); }) ==
          "epicache: budget is 6, want at least sinks + recent = 7");
}

TEST_CASE("logits that are not finite have no say, and rows of nothing else are skipped", "[property]") {
    const std::size_t n = 12, d = shape.head_dim;
    for (const float bad : {quiet_nan(), positive_infinity(), negative_infinity()}) {
        KVCache cache(shape, EpiCache{.heads = HeadBudget::uniform}, Budget{.tokens = n - 1});
        auto k = random_floats(2 * n * d, 1);
        k[5 * d] = bad;  // key 5 of the first KV head
        const std::vector<float> q(shape.q_heads * n * d);
        std::vector<float> out(q.size());
        cache.append(0, head_major(k.data(), 2, n, d), head_major(k.data(), 2, n, d));
        cache.attend(0, head_major(q.data(), 4, n, d), head_major(out.data(), 4, n, d));
        cache.end_step();
        auto asked = random_floats(shape.q_heads * 2 * d, 6, 2.0F);
        asked[d + 1] = bad;  // the second token under the first query head: all its logits are bad
        cache.hold(true);
        probe(cache, asked);
        const auto score = cache.scores(0, 0), other = cache.scores(0, 1);
        CHECK(score[5] == 0.0F);
        CHECK(std::all_of(score.begin(), score.end(), [](float x) { return is_finite(x) && x >= 0; }));
        CHECK(*std::max_element(score.begin(), score.end()) > 1.0F / static_cast<float>(n));
        cache.hold(false);
        probe(cache, asked);
        const auto positions = cache.positions(0, 0);
        CHECK(std::count(positions.begin(), positions.end(), 5) == 0);
        for (float& x : asked) x = bad;
        probe(cache, asked);
        for (const float x : cache.scores(0, 1)) CHECK(x == 0.0F);
    }
}
