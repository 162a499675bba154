#include "kvcull/score/per_head_attention.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#include "kvcull/policies/h2o.hpp"
#include "support/catch.hpp"
#include "support/conformance.hpp"

using namespace kvcull;
using namespace kvcull::test;
using Rows = PerHeadAttention::Rows;

namespace {

constexpr CacheShape small{.layers = 1, .q_heads = 6, .kv_heads = 2, .head_dim = 8, .value_dim = 12};
constexpr Budget roomy{.tokens = 1000};

bool near(std::span<const float> got, std::span<const float> want, double factor) {
    for (std::size_t j = 0; j < got.size(); ++j)
        if (!close(got[j], factor * static_cast<double>(want[j]), 1e-4, 1e-6)) return false;
    return got.size() == want.size();
}
/// Whether the policy says that it knows sum_j mass_j v_j of a head, having checked that it is right.
template <class Cache>
bool knows_the_sum(const Cache& cache, const PerHeadAttention& policy, std::size_t head) {
    const HeadView held = cache.view(0, head);
    const PerHeadAttention::State& state = cache.evictor().state(0, head);
    const std::size_t dim = small.values(), group = small.group();
    std::vector<float> got(group * dim, 42.0F), value(dim);
    HeadStep step{.group = group, .cached = held, .kernels = &simd::kernels()};
    if (!policy.weighted_values(state, step, {got.data(), group, dim})) return false;
    std::vector<double> want(group * dim), size(group * dim);
    for (std::size_t j = 0; j < held.rows(); ++j) {
        held.v.widen(j, value);
        for (std::size_t g = 0; g < group; ++g)
            for (std::size_t c = 0; c < dim; ++c) {
                const double term = static_cast<double>(state.mass[g][j]) * static_cast<double>(value[c]);
                want[g * dim + c] += term;
                size[g * dim + c] += std::abs(term);
            }
    }
    bool good = true;
    for (std::size_t i = 0; i < got.size(); ++i)
        good = good && close(got[i], want[i], 0, 2e-5 * size[i] + 1e-7);
    CHECK(good);
    return true;
}

}  // namespace

TEST_CASE("attention per query head keeps the contract of a policy", "[property]") {
    SECTION("TOVA's row") {
        policy_conformance(PerHeadAttention{});
    }
    SECTION("H2O's rows") {
        policy_conformance(PerHeadAttention{.base = Rows::h2o, .sinks = 2});
    }
    SECTION("SnapKV's rows, smoothed") {
        policy_conformance(PerHeadAttention{.base = Rows::snapkv, .window = 4});
    }
}

TEST_CASE("the planes are the query heads' own attention: their sum is what the plain policies count",
          "[differential]") {
    const Stream stream = random_stream(small, 60, 1);
    const auto compare = [&](const PerHeadAttention& policy, const auto& plain) {
        KVCache got(small, policy, Budget{.tokens = 14});
        KVCache want(small, plain, Budget{.tokens = 14});
        feed_prompt(got, stream, 0, 30, 11);
        feed_prompt(want, stream, 0, 30, 11);
        for (std::size_t at = 30; at < 60; ++at) {
            feed(got, stream, at, 1);
            feed(want, stream, at, 1);
            REQUIRE((all_positions(got) == all_positions(want)));
        }
        CHECK(near(got.scores(0, 1), want.scores(0, 1), 3.0));
    };
    compare({}, Tova{.share = Tova::Share::kv_head});
    compare({.base = Rows::h2o}, H2O{});
    compare({.base = Rows::h2o, .recent = 2, .sinks = 1, .window = 5},
            H2O{.recent = 2, .sinks = 1, .window = 5});
    compare({.base = Rows::snapkv, .window = 4},
            H2O{.recent = 4, .window = 4, .kernel = 5, .pool = Pool::avg});

    // Every plane by itself: one query head per cache.
    KVCache grouped(small, PerHeadAttention{.base = Rows::h2o}, roomy);
    feed_prompt(grouped, stream, 0, 40, 11);
    for (std::size_t g = 0; g < 3; ++g) {
        const CacheShape alone{.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 8, .value_dim = 12};
        Stream one{.shape = alone, .tokens = 60, .q = {}, .k = {}, .v = {}};
        const auto copy = [&](const std::vector<float>& from, std::size_t head, std::size_t dim) {
            const auto at = from.begin() + static_cast<std::ptrdiff_t>(head * 60 * dim);
            return std::vector<float>(at, at + static_cast<std::ptrdiff_t>(60 * dim));
        };
        one.q = copy(stream.q, 3 + g, 8);
        one.k = copy(stream.k, 1, 8);
        one.v = copy(stream.v, 1, 12);
        KVCache cache(alone, H2O{}, roomy);
        feed_prompt(cache, one, 0, 40, 11);
        CHECK(near(grouped.evictor().state(0, 1).mass[g], cache.scores(0, 0), 1.0));
    }
}

TEST_CASE("TOVA's row of a step that does not evict is had again from its queries", "[differential]") {
    const Stream stream = [] {
        Stream of = random_stream(small, 60, 3);
        of.shape.softcap = 2.0F;
        return of;
    }();
    const std::vector<float> slopes{0.01F, 0.02F, 0.005F, 0.03F, 0.002F, 0.01F};
    // Unlike ALiBi it gives other weights where the query stands elsewhere.
    const Bias squares = [&](const BiasRow& row) {
        for (std::size_t j = 0; j < row.logits.size(); ++j) {
            const auto apart = static_cast<float>(row.query - row.keys[row.first + j]);
            row.logits[j] -= slopes[row.q_head] * apart * apart;
        }
    };
    // Attention of token `query` over what a head holds, summed over the group, in doubles.
    const auto naive = [&](const HeadView& held, std::size_t query, std::size_t head) {
        const std::size_t dim = small.head_dim, group = small.group();
        std::vector<float> key(dim), sums(held.rows());
        for (std::size_t g = head * group; g < (head + 1) * group; ++g) {
            std::vector<double> weights(held.rows());
            for (std::size_t j = 0; j < held.rows(); ++j) {
                held.k.widen(j, key);
                double logit = 0;
                for (std::size_t c = 0; c < dim; ++c)
                    logit += static_cast<double>(stream.queries(0, query, 1).row(g, 0)[c]) *
                             static_cast<double>(key[c]);
                const double apart = static_cast<double>(query) - static_cast<double>(held.position[j]);
                weights[j] = std::exp(2.0 * std::tanh(logit / std::sqrt(static_cast<double>(dim)) / 2.0) -
                                      static_cast<double>(slopes[g]) * apart * apart);
            }
            const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
            for (std::size_t j = 0; j < held.rows(); ++j) sums[j] += static_cast<float>(weights[j] / sum);
        }
        return sums;
    };
    for_each_driver(stream.shape, PerHeadAttention{}, {.tokens = 14, .slack = 9},
                    [&](auto& cache, const std::string& driver) {
                        cache.set_bias(squares);
                        feed_prompt(cache, stream, 0, 20, 7);
                        std::size_t grown = 0;
                        for (std::size_t at = 20; at < 60; ++at) {
                            CAPTURE(driver, at);
                            const std::size_t before = cache.view(0, 1).rows();
                            feed(cache, stream, at, 1);
                            if (cache.view(0, 1).rows() < before) continue;
                            ++grown;
                            CHECK(near(cache.scores(0, 1), naive(cache.view(0, 1), at, 1), 1.0));
                        }
                        CHECK(grown > 20);
                        cache.truncate(2);  // the rows that are left share what the taken ones had
                        CHECK(near(cache.scores(0, 0), naive(cache.view(0, 0), 59, 0), 1.0));
                    });
}

TEST_CASE("the sum of outputs is the weighted sum of what is cached, or it is not known", "[differential]") {
    const Stream stream = random_stream(small, 400, 2);
    const std::size_t slack = GENERATE(std::size_t{0}, 4);
    struct Variant {
        PerHeadAttention policy;
        std::size_t often;  // times that it must be known, of two heads and about 390 looks
    };
    for (const Variant& one : {Variant{{.base = Rows::h2o, .recent = 3}, 500},
                               Variant{{.base = Rows::h2o, .recent = 3, .window = 4}, 500},
                               Variant{{.base = Rows::snapkv, .window = 4, .kernel = 1}, 500}, Variant{{}, 0},
                               Variant{{.base = Rows::snapkv, .window = 4}, 0}}) {
        CAPTURE(slack, static_cast<int>(one.policy.base));
        for_each_driver(small, one.policy, {.tokens = 14, .slack = slack},
                        [&](auto& cache, const std::string& driver) {
                            CAPTURE(driver);
                            std::size_t known = 0;
                            const auto check = [&] {
                                for (std::size_t h = 0; h < 2; ++h)
                                    known += knows_the_sum(cache, one.policy, h) ? 1 : 0;
                            };
                            feed_prompt(cache, stream, 0, 30, 11);
                            check();
                            SplitMix64 random{5};
                            for (std::size_t at = 30; at + 3 < 400;) {
                                const double chance = random.uniform();
                                const std::size_t count = chance < 0.1 ? 3 : 1;
                                feed(cache, stream, at, count);
                                at += count;
                                check();
                                if (chance > 0.2 && chance < 0.23) cache.make_room(2);
                                if (chance > 0.3 && chance < 0.33) cache.truncate(2);
                                if (chance > 0.4 && chance < 0.42) feed_prompt(cache, stream, at, at, 1);
                                if (chance > 0.5 && chance < 0.52) feed_prompt(cache, stream, 0, 6, 4);
                                check();
                            }
                            if (one.often == 0 && one.policy.base == Rows::snapkv)
                                CHECK(known == 0);
                            else
                                CHECK(known >= one.often);
                        });
    }
}

TEST_CASE("rows that see nothing good add neither to the mass nor to the sum", "[property]") {
    Stream stream = random_stream(small, 40, 3);
    stream.q[(4 * 40 + 20) * 8 + 1] = quiet_nan();
    const PerHeadAttention policy{.base = Rows::h2o, .recent = 3};
    KVCache cache(small, policy, Budget{.tokens = 14});
    feed_prompt(cache, stream, 0, 15, 15);
    for (std::size_t at = 15; at < 40; ++at) {
        feed(cache, stream, at, 1);
        CHECK(knows_the_sum(cache, policy, 1));
    }
}

TEST_CASE("a value that is not finite makes the sum unknown until it has left", "[property]") {
    Stream stream = random_stream(small, 60, 4);
    stream.v[(60 + 20) * 12 + 7] = quiet_nan();
    const PerHeadAttention policy{.base = Rows::h2o, .recent = 3};
    KVCache cache(small, policy, Budget{.tokens = 14});
    feed_prompt(cache, stream, 0, 15, 15);
    bool was_unknown = false;
    for (std::size_t at = 15; at < 60; ++at) {
        feed(cache, stream, at, 1);
        const auto held = cache.positions(0, 1);
        const bool there = std::find(held.begin(), held.end(), position_t{20}) != held.end();
        was_unknown = was_unknown || there;
        CHECK(knows_the_sum(cache, policy, 1) == !there);
    }
    CHECK(was_unknown);
}

TEST_CASE("the base decides which rows count and what is protected", "[contract]") {
    CHECK(PerHeadAttention{}.protect(40).recent == 0);
    CHECK(PerHeadAttention{.base = Rows::h2o}.protect(41).recent == 20);
    CHECK(PerHeadAttention{.base = Rows::snapkv}.protect(40).recent == 32);
    CHECK(PerHeadAttention{.base = Rows::snapkv, .window = 7}.protect(40).recent == 7);
    CHECK(PerHeadAttention{.base = Rows::snapkv, .recent = 3, .window = 7}.protect(40).recent == 3);
    CHECK(PerHeadAttention{}.needs(Phase::prompt).rows == 1);
    CHECK(PerHeadAttention{.base = Rows::h2o}.needs(Phase::prompt).rows == all_rows);
    CHECK(PerHeadAttention{.base = Rows::snapkv}.needs(Phase::prompt).rows == 32);
    CHECK(PerHeadAttention{.base = Rows::snapkv}.ordered());
    CHECK_FALSE(PerHeadAttention{.base = Rows::snapkv, .kernel = 1}.ordered());
    CHECK_THROWS_AS(KVCache(small, PerHeadAttention{.kernel = 4}, roomy), error::config_error);
    CHECK_THROWS_AS(KVCache(small, PerHeadAttention{.base = Rows::snapkv}, Budget{.tokens = 32}),
                    error::config_error);
}
