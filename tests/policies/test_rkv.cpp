#include "kvcull/policies/rkv.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "kvcull/cache/saved.hpp"
#include "kvcull/policies/skipkv.hpp"
#include "support/catch.hpp"
#include "support/conformance.hpp"
#include "support/failure.hpp"
#include "support/heard.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

const CacheShape small{.layers = 1, .q_heads = 6, .kv_heads = 2, .head_dim = 16};
constexpr std::size_t n = 60;

std::vector<position_t> range(std::size_t begin, std::size_t end) {
    std::vector<position_t> positions;
    for (std::size_t j = begin; j < end; ++j) positions.push_back(static_cast<position_t>(j));
    return positions;
}
/// Scores of one head after a prompt in one call, before anything is evicted.
std::vector<float> scores(const RKV& policy, const Stream& stream, std::size_t head = 0,
                          const Bias& bias = {}) {
    KVCache cache(stream.shape, policy, Budget{.tokens = 1000});
    cache.set_bias(bias);
    feed_prompt(cache, stream, 0, stream.tokens, stream.tokens);
    return cache.scores(0, head);
}
std::vector<std::vector<position_t>> keep(const RKV& policy, const Stream& stream, std::size_t budget) {
    KVCache cache(stream.shape, policy, Budget{.tokens = budget});
    feed_prompt(cache, stream, 0, stream.tokens, stream.tokens);
    return all_positions(cache);
}
/// Attention of the last `window` tokens to the tokens before them, by definition and in doubles. `slopes`:
/// per query head, of ALiBi.
std::vector<double> naive_importance(const Stream& stream, const RKV& policy, std::size_t head,
                                     const std::vector<float>& slopes = {}) {
    const std::size_t dim = stream.shape.head_dim, group = stream.shape.group(),
                      candidates = stream.tokens - policy.window, reach = policy.kernel / 2;
    std::vector<double> mean(candidates), pooled(candidates);
    for (std::size_t t = candidates; t < stream.tokens; ++t) {
        std::vector<double> weights(candidates, -1e300);
        double sum = 0;
        for (std::size_t j = 0; j < candidates; ++j) {
            for (std::size_t g = 0; g < group; ++g) {
                double logit = 0;
                for (std::size_t c = 0; c < dim; ++c)
                    logit += static_cast<double>(stream.queries(0, t, 1).row(head * group + g, 0)[c]) *
                             static_cast<double>(stream.keys(0, j, 1).row(head, 0)[c]);
                logit /= std::sqrt(static_cast<double>(dim));
                const double cap = stream.shape.softcap;
                if (cap > 0) logit = cap * std::tanh(logit / cap);
                if (!slopes.empty())
                    logit -= static_cast<double>(slopes[head * group + g]) * static_cast<double>(t - j);
                weights[j] = std::max(weights[j], logit);
            }
            sum += weights[j] = std::exp(weights[j]);
        }
        for (std::size_t j = 0; j < candidates; ++j)
            mean[j] += weights[j] / sum / static_cast<double>(policy.window);
    }
    for (std::size_t j = 0; j < candidates; ++j)
        for (std::size_t i = j - std::min(j, reach); i < std::min(candidates, j + reach + 1); ++i)
            pooled[j] = std::max(pooled[j], mean[i]);
    return pooled;
}
/// What the largest number of rows is that a head ever holds after a step.
template <class Cache>
std::vector<std::size_t> lengths(Cache& cache, const Stream& stream, std::size_t first, std::size_t call) {
    std::vector<std::size_t> rows;
    for (std::size_t at = first; at + call <= stream.tokens; at += call) {
        feed(cache, stream, at, call);
        rows.push_back(cache.view(0, 1).rows());
    }
    return rows;
}

}  // namespace

TEST_CASE("R-KV in every variant keeps the contract of a policy", "[property]") {
    // In one dimension all cosines are 1 or -1, and redundancies tie.
    const Promises seldom{
        .evictions = 2, .while_decoding = false, .chunks_do_not_matter = true, .tie_free_dim = 2};
    SECTION("every 8 tokens") {
        policy_conformance(RKV{.window = 4, .interval = 8, .kernel = 3}, seldom);
    }
    SECTION("every token, sparing the oldest") {
        policy_conformance(RKV{.window = 1, .interval = 1, .retain = Retain::first},
                           {.chunks_do_not_matter = true, .tie_free_dim = 2});
    }
    SECTION("attention only") {
        policy_conformance(RKV{.window = 5, .interval = 5, .kernel = 1, .sigma = 1.0F}, seldom);
    }
    SECTION("redundancy only, a window wider than a call") {
        policy_conformance(RKV{.window = 20, .interval = 7, .sigma = 0.0F, .key_threshold = 0.1F},
                           {.budget = 22,
                            .evictions = 2,
                            .while_decoding = false,
                            .chunks_do_not_matter = true,
                            .tie_free_dim = 2});
    }
}

TEST_CASE("importance is the softmax of the group's largest logits over the candidates alone",
          "[differential]") {
    const Stream stream = random_stream(small, n, 1, 2.0F);
    for (const std::size_t window : {1U, 7U, 40U})  // 40: more than one tile of queries
        for (const std::size_t kernel : {1U, 5U})
            for (std::size_t head = 0; head < 2; ++head) {
                RKV policy{.window = window, .kernel = kernel, .sigma = 1.0F};
                const std::vector<double> want = naive_importance(stream, policy, head);
                const std::vector<float> got = scores(policy, stream, head);
                bool near = true;
                for (std::size_t j = 0; j < want.size(); ++j)
                    near = near && close(got[j], want[j], 1e-4, 1e-7);
                CHECK(near);
            }
}

TEST_CASE("importance follows softcap and bias", "[differential]") {
    Stream stream = random_stream(small, n, 7, 2.0F);
    stream.shape.softcap = 1.5F;
    const std::vector<float> slopes{0.01F, 0.2F, 0.05F, 0.3F, 0.02F, 0.1F};
    for (const std::size_t window : {3U, 40U})
        for (std::size_t head = 0; head < 2; ++head) {
            const RKV policy{.window = window, .kernel = 3, .sigma = 1.0F};
            const auto agrees = [&](const Bias& bias, const std::vector<float>& by) {
                const std::vector<double> want = naive_importance(stream, policy, head, by);
                const std::vector<float> got = scores(policy, stream, head, bias);
                bool near = true;
                for (std::size_t j = 0; j < want.size(); ++j)
                    near = near && close(got[j], want[j], 1e-4, 1e-7);
                return near;
            };
            CHECK(agrees({}, {}));
            CHECK(agrees(alibi(slopes), slopes));
            CHECK_FALSE(agrees({}, slopes));
        }
}

TEST_CASE("the score weighs importance against redundancy, and the window is above all", "[differential]") {
    const Stream stream = random_stream(small, n, 2);
    const RKV policy{.window = 6, .sigma = 0.3F};
    RKV attention = policy, geometry = policy;
    attention.sigma = 1.0F;
    geometry.sigma = 0.0F;
    const std::vector<float> both = scores(policy, stream), important = scores(attention, stream),
                             redundant = scores(geometry, stream);
    bool weighed = true;
    for (std::size_t j = 0; j + 6 < n; ++j)
        weighed =
            weighed &&
            close(both[j], 0.3 * static_cast<double>(important[j]) + 0.7 * static_cast<double>(redundant[j]),
                  1e-5, 1e-8);
    CHECK(weighed);
    for (std::size_t j = n - 6; j < n; ++j) CHECK(same_bits(both[j], 1.0F));
    // Without attention in it, the queries have no say.
    Stream other = stream;
    other.q = random_floats(stream.q.size(), 99);
    CHECK(same_bits(scores(geometry, other), redundant));
}

TEST_CASE("a head evicts at the end of the prompt and at every multiple of the interval", "[property]") {
    const Stream stream = random_stream(small, 100, 3);
    const RKV policy{.window = 4, .interval = 16};
    for_each_driver(small, policy, {.tokens = 20}, [&](auto& cache, const std::string& driver) {
        CAPTURE(driver);
        feed_prompt(cache, stream, 0, 37, 9);  // 16 and 32 lie inside
        CHECK(cache.view(0, 1).rows() == 20);
        const std::vector<std::size_t> rows = lengths(cache, stream, 37, 1);
        for (std::size_t i = 0; i < rows.size(); ++i) {
            const std::size_t seen = 38 + i, last = seen < 48 ? 37 : seen / 16 * 16;
            CHECK(rows[i] == 20 + seen - last);
        }
    });
    // Below the budget nothing goes; what is due then waits for the next multiple.
    KVCache cache(small, policy, Budget{.tokens = 35});
    feed_prompt(cache, stream, 0, 30, 30);
    const std::vector<std::size_t> rows = lengths(cache, stream, 30, 1);
    CHECK(rows[1] == 32);
    CHECK(rows[16] == 47);
    CHECK(rows[17] == 35);
}

TEST_CASE("calls of several decoded tokens do not step over the interval", "[property]") {
    const Stream stream = random_stream(small, 100, 4);
    KVCache cache(small, RKV{.window = 4, .interval = 16}, Budget{.tokens = 20});
    feed_prompt(cache, stream, 0, 20, 20);
    for (const std::size_t rows : lengths(cache, stream, 20, 5)) CHECK(rows <= 20 + 16 + 4);
    CHECK(lengths(cache, stream, 95, 5).back() < 40);
}

TEST_CASE("a prompt is listened to by its last tokens, however it is cut", "[property]") {
    const Stream stream = random_stream(small, n, 5);
    const RKV policy{.window = 7, .interval = 8};
    const auto whole = keep(policy, stream, 20);
    for (const std::size_t chunk : {1U, 3U, 59U})
        for_each_driver(small, policy, {.tokens = 20}, [&](auto& cache, const std::string& driver) {
            CAPTURE(driver, chunk);
            feed_prompt(cache, stream, 0, n, chunk, driver.starts_with("KVCache"));
            CHECK((all_positions(cache) == whole));
        });
    for (const auto& head : whole) CHECK((std::vector(head.end() - 7, head.end()) == range(n - 7, n)));
}

TEST_CASE("of three identical keys the oldest goes first and the newest last", "[property]") {
    Stream stream = random_stream(small, n, 6);
    for (std::size_t head = 0; head < 2; ++head)
        for (const std::size_t j : {30U, 45U})
            std::copy_n(stream.keys(0, 12, 1).row(head, 0), 16, stream.k.data() + (head * n + j) * 16);
    const std::vector<float> score = scores({.sigma = 0.0F}, stream);
    CHECK(score[12] <= score[30]);
    CHECK(score[30] < score[45]);
    const std::vector<float> oldest = scores({.sigma = 0.0F, .retain = Retain::first}, stream);
    CHECK(oldest[12] > oldest[30]);
}

TEST_CASE("what is not finite in a head leaves it the newest rows and no other head", "[property]") {
    const Stream clean = random_stream(small, n, 7);
    const auto want = keep({}, clean, 20);
    for (const float bad : {quiet_nan(), -negative_infinity()}) {
        Stream keys = clean, queries = clean, old_query = clean;
        keys.k[(n + 3) * 16 + 5] = bad;            // head 1
        queries.q[(4 * n + n - 2) * 16] = bad;     // a query head of head 1, in the window
        old_query.q[(4 * n + n - 30) * 16] = bad;  // before the window
        for (const Stream* stream : {&keys, &queries}) {
            const auto kept = keep({}, *stream, 20);
            CHECK((kept[0] == want[0]));
            CHECK((kept[1] == range(n - 20, n)));
            const std::vector<float> score = scores({}, *stream, 1);
            CHECK(std::all_of(score.begin(), score.end(), [](const float& x) { return is_nan(x); }));
        }
        CHECK((keep({}, old_query, 20) == want));
    }
}

namespace {
/// R-KV that forgets its links before it decides. @tparam Base  RKV, or what stands over it.
template <class Base>
struct Forgetful : Base {
    void prepare(typename Base::State& state, const HeadStep& step) const {
        std::ranges::fill(state.links.link.values(), KeyLinks::unseen);
        Base::prepare(state, step);
    }
};
/// Two streams of keys, those of the second like each other.
std::vector<Stream> streams_of_keys(std::size_t tokens) {
    std::vector<Stream> streams{random_stream(small, tokens, 31), random_stream(small, tokens, 32)};
    for (std::size_t i = 0; i < streams[1].k.size(); i += 3)
        streams[1].k[i] += i / 48 % 2 == 0 ? 2.0F : -2.0F;
    return streams;
}
}  // namespace

TEST_CASE("what is remembered of keys changes no score and no plan", "[property]") {
    for (const Stream& stream : streams_of_keys(150))
        for (const Retain retain : {Retain::last, Retain::first}) {
            const RKV policy{
                .window = 4, .interval = 7, .sigma = 0.05F, .key_threshold = 0.3F, .retain = retain};
            const Forgetful<RKV> forgetful{policy};
            std::vector<std::vector<std::vector<position_t>>> want;
            std::vector<std::vector<float>> scores;
            for_each_driver(small, forgetful, {.tokens = 40}, [&](auto& cache, const std::string&) {
                feed_prompt(cache, stream, 0, 60, 17, false);
                for (std::size_t at = 60; at < 150; ++at) {
                    feed(cache, stream, at, 1);
                    want.push_back(all_positions(cache));
                    scores.push_back(cache.scores(0, 1));
                }
            });
            std::size_t i = 0;
            for_each_driver(small, policy, {.tokens = 40}, [&](auto& cache, const std::string& driver) {
                CAPTURE(driver);
                feed_prompt(cache, stream, 0, 60, 17, false);
                for (std::size_t at = 60; at < 150; ++at, ++i) {
                    feed(cache, stream, at, 1);
                    REQUIRE((all_positions(cache) == want[i]));
                    REQUIRE(same_bits(cache.scores(0, 1), scores[i]));
                }
            });
        }
}

TEST_CASE("what is remembered of keys survives what a cache goes through", "[property]") {
    for (const Stream& stream : streams_of_keys(200)) {
        const RKV policy{.window = 4, .interval = 9, .sigma = 0.05F, .key_threshold = 0.3F};
        const auto live = [&](const auto& method) {
            std::vector<Snapshot> seen;
            BlockPool pool({.block_rows = 5});
            KVCache cache(small, method, Budget{.tokens = 30}, pool);
            feed_prompt(cache, stream, 0, 50, 50);
            feed_decode(cache, stream, 50, 70);
            seen.push_back(snapshot(cache));
            const auto mark = cache.mark();
            feed_decode(cache, stream, 100, 120);  // other keys at the same positions
            seen.push_back(snapshot(cache));
            cache.rollback(mark);
            auto fork = cache.fork();
            feed_decode(fork, stream, 130, 150);
            seen.push_back(snapshot(fork));
            cache.truncate(6);
            feed_decode(cache, stream, 150, 170);
            seen.push_back(snapshot(cache));
            KVCache loaded(small, method, Budget{.tokens = 30}, pool);
            load(loaded, save(cache));
            cache.make_room(12);
            for (auto* one : {&cache, &loaded}) {
                feed_decode(*one, stream, 170, 190);
                seen.push_back(snapshot(*one));
            }
            return seen;
        };
        CHECK((live(policy) == live(Forgetful<RKV>{policy})));
        CHECK((live(SkipKV<>{policy}) == live(SkipKV<Forgetful<RKV>>{{policy}})));  // decides after the step
    }
}

TEST_CASE("importance heard in its own steps is that which is computed anew, bit for bit", "[differential]") {
    const std::size_t group = GENERATE(std::size_t{1}, 4, 7);
    const CacheShape shape{.layers = 1,
                           .q_heads = 2 * group,
                           .kv_heads = 2,
                           .head_dim = 20,
                           .value_dim = 3,
                           .softcap = group > 1 ? 3.0F : 0.0F};
    Stream stream = random_stream(shape, 170, 51 + group, 2.0F);
    std::fill_n(stream.q.begin() + 60 * 20, 20, 3e38F);  // logits overflow
    stream.q[83 * 20] = quiet_nan();
    stream.q[102 * 20] = std::numeric_limits<float>::infinity();  // which the softcap makes finite
    for (const RKV& policy : {RKV{.window = 6, .interval = 6, .kernel = 3, .sigma = 0.5F},
                              RKV{.window = 6, .interval = 15, .kernel = 3, .sigma = 0.5F}})
        for (const simd::Isa isa : simd::all_isas) {
            if (!simd::available(isa)) continue;
            CAPTURE(group, name_of(isa), policy.interval);
            Listeners<RKV> three(stream, policy, Budget{.tokens = 20}, isa);
            three.decode(4, 1);
            three.prompt(3, 9);
            three.decode(35, 1);
            three.decode(6, 2);
            three.decode(3, 8);
            three.truncate(1);
            three.decode(20, 1);
            three.make_room(3);
            three.decode(4, 1);
            three.hold(true);
            three.decode(17, 1);
            three.hold(false);
            three.decode(17, 1);
            REQUIRE(three.tokens() < stream.tokens);
        }
}

TEST_CASE("no query is asked again whose whole window was heard", "[property]") {
    const Stream stream = random_stream(small, 110, 52);
    const RKV policy{.window = 6, .interval = 10};
    HeardOrAsked<RKV> both(stream, policy, Budget{.tokens = 20}, 37);
    const std::size_t votes = 5 * small.q_heads;  // of all but the newest token
    both.decode(3);
    CHECK(both.heard.count == votes);  // half the window came with the prompt
    both.decode(30);
    CHECK(both.heard.count == 0);
    CHECK(both.silent.count == 3 * votes);
    both.decode(7);
    both.truncate(1);
    both.decode(4);
    CHECK(both.heard.count == votes);  // rows left within the window
    both.decode(7);
    both.all([](auto& one) { one.make_room(2); });
    both.decode(3);
    CHECK(both.heard.count == votes);
    both.all([](auto& one) { one.hold(true); });
    both.decode(10);
    both.all([](auto& one) { one.hold(false); });
    both.all([](auto& one) { one.make_room(3); });
    CHECK(same_bits(both.cache.scores(0, 0), both.engine.scores(0, 0)));
}

TEST_CASE("parameters of R-KV that make no sense are refused", "[contract]") {
    const auto refused = [](const RKV& policy, std::size_t budget = 100) {
        return failure<error::config_error>([&] { KVCache cache(small, policy, Budget{.tokens = budget}); });
    };
    const float nan = std::numeric_limits<float>::quiet_NaN();
    CHECK(refused({.window = 0}) == "RKV: window is 0, want at least 1");
    CHECK(refused({.interval = 0}) == "RKV: interval is 0, want at least 1");
    CHECK(refused({.kernel = 4}) == "RKV: kernel is 4, want an odd number");
    CHECK(refused({.sigma = 1.5F}) == "RKV: sigma is 1.500000, want 0 to 1");
    CHECK(refused({.sigma = -0.5F}) == "RKV: sigma is -0.500000, want 0 to 1");
    CHECK(refused({.sigma = nan}).starts_with("RKV: sigma is "));
    CHECK(refused({.key_threshold = 1.5F}) == "RKV: key_threshold is 1.500000, want -1 to 1");
    CHECK(refused({.key_threshold = nan}).starts_with("RKV: key_threshold is "));
    CHECK(refused({.window = 8}, 8) == "RKV: budget is 8, want more than window = 8");
}
