#include "kvcull/policies/h2o.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "support/catch.hpp"
#include "support/conformance.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

const CacheShape small{.layers = 1, .q_heads = 6, .kv_heads = 2, .head_dim = 16};
const CacheShape single{.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 16};
constexpr Budget roomy{.tokens = 1000};

/// Attention of query head `head` of a stream of one layer over tokens 0 .. its own: `[tokens, tokens]`.
std::vector<double> attention_of(const Stream& stream, std::size_t head) {
    const CacheShape& shape = stream.shape;
    const std::size_t n = stream.tokens, dim = shape.head_dim, kv = head / shape.group();
    std::vector<Visible> visible(n);
    for (std::size_t i = 0; i < n; ++i) visible[i] = {0, 0, i + 1};
    return reference_attention(std::span(stream.q).subspan(head * n * dim, n * dim),
                               std::span(stream.k).subspan(kv * n * dim, n * dim),
                               std::span(stream.v).subspan(kv * n * dim, n * dim), visible, n, dim, dim,
                               1.0 / std::sqrt(static_cast<double>(dim)))
        .attention;
}
/// Mean over the group of the sum of rows `first ..` of attention.
std::vector<double> received(const Stream& stream, std::size_t kv, std::size_t first) {
    const std::size_t n = stream.tokens, group = stream.shape.group();
    std::vector<double> mass(n);
    for (std::size_t g = 0; g < group; ++g) {
        const std::vector<double> attention = attention_of(stream, kv * group + g);
        for (std::size_t i = first; i < n; ++i)
            for (std::size_t j = 0; j < n; ++j) mass[j] += attention[i * n + j] / static_cast<double>(group);
    }
    return mass;
}
bool near(std::span<const float> got, std::span<const double> want) {
    if (got.size() != want.size()) return false;
    for (std::size_t j = 0; j < got.size(); ++j)
        if (!close(got[j], want[j], 1e-4, 1e-6)) return false;
    return true;
}
/// The `budget` best of a score by a full sort; the newest `recent` stay.
std::vector<position_t> best(std::span<const double> score, std::size_t budget, std::size_t recent = 0) {
    const std::size_t n = score.size();
    std::vector<std::size_t> order(n - recent);
    for (std::size_t j = 0; j < order.size(); ++j) order[j] = j;
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
        return score[a] != score[b] ? score[a] > score[b] : a > b;
    });
    std::vector<position_t> keep(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(budget - recent));
    for (std::size_t j = n - recent; j < n; ++j) keep.push_back(static_cast<position_t>(j));
    std::sort(keep.begin(), keep.end());
    return keep;
}
std::vector<position_t> newest(std::size_t budget, std::size_t n) {
    return best(std::vector<double>(n, 1.0), budget);
}
float sum(std::span<const float> numbers) {
    double total = 0;
    for (const float x : numbers) total += static_cast<double>(x);
    return static_cast<float>(total);
}

}  // namespace

TEST_CASE("H2O in every variant keeps the contract of a policy", "[property]") {
    SECTION("defaults") {
        policy_conformance(H2O{});
    }
    SECTION("nothing protected") {
        policy_conformance(H2O{.recent = 0});
    }
    SECTION("protects more than the budget") {
        policy_conformance(H2O{.recent = 50, .sinks = 3});
    }
    SECTION("a window of rows") {
        policy_conformance(H2O{.recent = 3, .sinks = 2, .window = 4});
    }
    SECTION("by the number of queries") {
        policy_conformance(H2O{.recent = 2, .by_queries = true});
    }
    SECTION("pooled by mean") {
        policy_conformance(H2O{.recent = 3, .kernel = 5, .pool = Pool::avg});
    }
    SECTION("pooled by maximum") {
        policy_conformance(H2O{.recent = 3, .kernel = 3, .pool = Pool::max});
    }
}

TEST_CASE("Tova in every variant keeps the contract of a policy", "[property]") {
    SECTION("defaults") {
        policy_conformance(Tova{});
    }
    SECTION("every KV head for itself") {
        policy_conformance(Tova{.share = Tova::Share::kv_head});
    }
    SECTION("protected rows") {
        policy_conformance(Tova{.protect_newest = true, .sinks = 2});
    }
    SECTION("pooled by mean") {
        policy_conformance(Tova{.recent = 3, .kernel = 5, .pool = Pool::avg});
    }
    SECTION("pooled by maximum, every KV head for itself") {
        policy_conformance(Tova{.share = Tova::Share::kv_head, .kernel = 3, .pool = Pool::max});
    }
}

TEST_CASE("Vatp in every variant keeps the contract of a policy", "[property]") {
    SECTION("defaults, sinks beyond the budget") {
        policy_conformance(Vatp{});
    }
    SECTION("nothing protected") {
        policy_conformance(Vatp{.recent = 0, .sinks = 0});
    }
    SECTION("a window of rows") {
        policy_conformance(Vatp{.recent = 3, .sinks = 2, .window = 4});
    }
    SECTION("pooled by mean") {
        policy_conformance(Vatp{.recent = 3, .sinks = 0, .kernel = 5, .pool = Pool::avg});
    }
}

TEST_CASE("decoding one token per step never holds more than one row beyond the budget", "[property]") {
    const Stream stream = random_stream(small, 60, 1);
    Engine<H2O> engine(small, H2O{}, {.tokens = 10});
    std::size_t most = 0;
    engine.on_plan = [&](const HeadPlan& plan, const HeadView&) { most = std::max(most, plan.rows); };
    feed_decode(engine, stream, 0, 60);
    CHECK(most == 11);
    CHECK(engine.rows(0, 0) == 10);
}

TEST_CASE("by default H2O protects half the budget", "[contract]") {
    CHECK(H2O{}.protect(41).recent == 20);
    CHECK(H2O{.recent = 3}.protect(41).recent == 3);
    CHECK(Vatp{}.protect(41).recent == 20);
    CHECK(Vatp{}.protect(41).sinks == 20);
    CHECK(Tova{}.protect(41).recent == 0);
    CHECK(Tova{.protect_newest = true}.protect(41).recent == 1);
}

TEST_CASE("without eviction the state of H2O is the attention of all rows and sums to their number",
          "[differential]") {
    const Stream stream = random_stream(small, 40, 2);
    for_each_driver(small, H2O{}, roomy, [&](auto& cache, const std::string&) {
        feed_prompt(cache, stream, 0, 31, 12);
        feed_decode(cache, stream, 31, 40);
        for (std::size_t h = 0; h < small.kv_heads; ++h) {
            const std::vector<float> scores = cache.scores(0, h);
            CHECK(near(scores, received(stream, h, 0)));
            CHECK(close(sum(scores), 40, 1e-4, 0));
        }
    });
}

TEST_CASE("rows one by one give H2O the state of rows together", "[property]") {
    const Stream stream = random_stream(small, 40, 3);
    KVCache together(small, H2O{}, roomy), apart(small, H2O{}, roomy), chunks(small, H2O{}, roomy);
    feed_prompt(together, stream, 0, 40, 40);
    feed_prompt(chunks, stream, 0, 40, 7);
    feed_decode(apart, stream, 0, 40);
    for (std::size_t h = 0; h < small.kv_heads; ++h) {
        const std::vector<float> want = together.scores(0, h);
        CHECK(near(apart.scores(0, h), std::vector<double>(want.begin(), want.end())));
        CHECK(near(chunks.scores(0, h), std::vector<double>(want.begin(), want.end())));
    }
}

TEST_CASE("a window counts the last rows of a prompt's last call and every decoded row", "[differential]") {
    const std::size_t window = 6;
    const Stream stream = random_stream(small, 40, 4);
    KVCache whole(small, H2O{.window = window}, roomy), chunks(small, H2O{.window = window}, roomy),
        short_end(small, H2O{.window = window}, roomy), wide(small, H2O{.window = 100}, roomy);
    feed_prompt(whole, stream, 0, 40, 40);
    feed_prompt(chunks, stream, 0, 40, 32);     // the last call brings 8 rows
    feed_prompt(short_end, stream, 0, 40, 38);  // the last call brings 2 rows
    feed_prompt(wide, stream, 0, 40, 40);
    KVCache decoded(small, H2O{.window = window}, roomy);
    feed_prompt(decoded, stream, 0, 30, 30);
    feed_decode(decoded, stream, 30, 40);
    for (std::size_t h = 0; h < small.kv_heads; ++h) {
        CHECK(near(whole.scores(0, h), received(stream, h, 40 - window)));
        CHECK(near(chunks.scores(0, h), received(stream, h, 40 - window)));
        CHECK(near(short_end.scores(0, h), received(stream, h, 38)));
        CHECK(near(wide.scores(0, h), received(stream, h, 0)));
        CHECK(near(decoded.scores(0, h), received(stream, h, 30 - window)));
    }
}

TEST_CASE("a call that is computed in several tiles counts every row once", "[differential]") {
    const std::size_t tokens = 150;
    const Stream stream = random_stream(small, tokens, 18);
    KVCache all(small, H2O{}, roomy), window(small, H2O{.window = 100}, roomy);
    KVCache vatp(small, Vatp{}, roomy);
    feed_prompt(all, stream, 0, tokens, tokens);
    feed_prompt(window, stream, 0, tokens, tokens);
    feed_prompt(vatp, stream, 0, tokens, tokens);
    for (std::size_t h = 0; h < small.kv_heads; ++h) {
        std::vector<double> mass = received(stream, h, 0);
        CHECK(near(all.scores(0, h), mass));
        CHECK(near(window.scores(0, h), received(stream, h, tokens - 100)));
        for (std::size_t j = 0; j < tokens; ++j)
            mass[j] *= static_cast<double>(vatp.evictor().state(0, h).value_norm[j]);
        CHECK(near(vatp.scores(0, h), mass));
    }
}

TEST_CASE("by_queries divides by the number of rows that could see a token", "[differential]") {
    const Stream stream = random_stream(small, 30, 5);
    KVCache cache(small, H2O{.by_queries = true}, roomy);
    feed_prompt(cache, stream, 0, 20, 8);
    feed_decode(cache, stream, 20, 30);
    std::vector<double> want = received(stream, 1, 0);
    for (std::size_t j = 0; j < want.size(); ++j) want[j] /= static_cast<double>(30 - j);
    CHECK(near(cache.scores(0, 1), want));
}

TEST_CASE("the best tokens stay, the newest of equal ones", "[differential]") {
    const Stream stream = random_stream(small, 50, 6);
    for_each_driver(small, H2O{.recent = 5}, {.tokens = 20}, [&](auto& cache, const std::string&) {
        feed_prompt(cache, stream, 0, 50, 50);
        for (std::size_t h = 0; h < small.kv_heads; ++h)
            CHECK((positions_of(cache.view(0, h)) == best(received(stream, h, 0), 20, 5)));
    });
}

TEST_CASE("TOVA keeps the same tokens in all heads of a layer, by the last row alone", "[differential]") {
    const CacheShape shape{.layers = 2, .q_heads = 6, .kv_heads = 3, .head_dim = 16};
    Stream stream = random_stream(shape, 40, 7);
    const auto keep = [&] {
        KVCache cache(shape, Tova{}, Budget{.tokens = 15});
        feed_prompt(cache, stream, 0, 40, 40);
        return all_positions(cache);
    };
    const auto first = keep();
    for (std::size_t i = 0; i < first.size(); ++i) CHECK((first[i] == first[i / 3 * 3]));
    CHECK_FALSE((first[0] == first[3]));
    // Other queries before the last: the weights of the past have no say.
    const std::vector<float> other = random_floats(stream.q.size(), 99, 3);
    for (std::size_t head = 0; head < shape.layers * shape.q_heads; ++head)
        std::copy_n(other.data() + head * 40 * 16, 39 * 16, stream.q.data() + head * 40 * 16);
    CHECK((keep() == first));
}

TEST_CASE("TOVA of single heads is H2O whose history is one row", "[property]") {
    const Stream stream = random_stream(small, 40, 8);
    KVCache tova(small, Tova{.share = Tova::Share::kv_head}, Budget{.tokens = 15});
    KVCache h2o(small, H2O{.recent = 0, .window = 1}, Budget{.tokens = 15});
    for (std::size_t at = 0; at < 40; at += 4) {
        feed_prompt(tova, stream, at, at + 4, 4);
        feed_prompt(h2o, stream, at, at + 4, 4);
        CHECK((all_positions(tova) == all_positions(h2o)));
    }
    for (std::size_t h = 0; h < small.kv_heads; ++h) {
        // Later decoded rows replace the state of TOVA; they join that of H2O.
        CHECK(same_bits(tova.scores(0, h), h2o.scores(0, h)));
    }
}

TEST_CASE("TOVA pools the mean of the layer, not the mean of pooled heads", "[differential]") {
    const std::size_t n = 40, budget = 14, recent = 2, kernel = 5;
    const Stream stream = random_stream(small, n, 20);
    std::vector<double> mean(n), pooled_first(n);
    const auto pooled = [&](std::vector<double> score) {
        const std::vector<double> original = score;
        for (std::size_t j = 0; j + recent < n; ++j)
            for (std::size_t i = j - std::min<std::size_t>(j, kernel / 2);
                 i <= j + kernel / 2 && i + recent < n; ++i)
                score[j] = std::max(score[j], original[i]);
        return score;
    };
    for (std::size_t h = 0; h < small.kv_heads; ++h) {
        const std::vector<double> last = received(stream, h, n - 1), smooth = pooled(last);
        for (std::size_t j = 0; j < n; ++j) {
            mean[j] += last[j] / static_cast<double>(small.kv_heads);
            pooled_first[j] += smooth[j] / static_cast<double>(small.kv_heads);
        }
    }
    const auto want = best(pooled(mean), budget, recent);
    REQUIRE_FALSE((want == best(pooled_first, budget, recent)));
    for_each_driver(small, Tova{.recent = recent, .kernel = kernel, .pool = Pool::max}, {.tokens = budget},
                    [&](auto& cache, const std::string&) {
                        feed_prompt(cache, stream, 0, n, n);
                        CHECK((positions_of(cache.view(0, 0)) == want));
                        CHECK((positions_of(cache.view(0, 1)) == want));
                    });
}

TEST_CASE("pooling smooths the rows before the recent ones and leaves the state alone", "[differential]") {
    const std::size_t n = 30, recent = 4, kernel = 5;
    const Stream stream = random_stream(small, n, 10);
    KVCache plain(small, H2O{.recent = recent}, roomy);
    KVCache cache(small, H2O{.recent = recent, .kernel = kernel, .pool = Pool::avg}, roomy);
    feed_prompt(plain, stream, 0, n, n);
    feed_prompt(cache, stream, 0, n, n);
    const std::vector<double> mass = received(stream, 1, 0);
    std::vector<double> want = mass;
    for (std::size_t j = 0; j + recent < n; ++j) {
        want[j] = 0;
        for (std::size_t i = j - std::min<std::size_t>(j, 2); i <= j + 2 && i + recent < n; ++i)
            want[j] += mass[i] / 5;
    }
    CHECK(near(cache.scores(0, 1), want));
    CHECK(same_bits(cache.evictor().state(0, 1).mass.values(), plain.evictor().state(0, 1).mass.values()));
}

TEST_CASE("equal query heads give the result of one", "[property]") {
    const CacheShape grouped{.layers = 1, .q_heads = 8, .kv_heads = 2, .head_dim = 16};
    const CacheShape alone{.layers = 1, .q_heads = 2, .kv_heads = 2, .head_dim = 16};
    const Stream one = random_stream(alone, 50, 11);
    Stream four{.shape = grouped, .tokens = 50, .q = {}, .k = one.k, .v = one.v};
    for (std::size_t head = 0; head < 8; ++head)
        four.q.insert(four.q.end(), one.q.begin() + static_cast<std::ptrdiff_t>(head / 4 * 50 * 16),
                      one.q.begin() + static_cast<std::ptrdiff_t>((head / 4 + 1) * 50 * 16));
    const auto compare = [&](const auto& policy) {
        KVCache a(alone, policy, Budget{.tokens = 20}), b(grouped, policy, Budget{.tokens = 20});
        feed_prompt(a, one, 0, 30, 10);
        feed_prompt(b, four, 0, 30, 10);
        feed_decode(a, one, 30, 50);
        feed_decode(b, four, 30, 50);
        CHECK((all_positions(a) == all_positions(b)));
    };
    compare(H2O{});
    compare(Tova{});
    compare(Vatp{.sinks = 0});
}

TEST_CASE("VATP scores by mass times the L1 norm of the value", "[differential]") {
    const Stream stream = random_stream(small, 30, 12);
    KVCache cache(small, Vatp{}, roomy);
    feed_prompt(cache, stream, 0, 20, 8);
    feed_decode(cache, stream, 20, 30);
    std::vector<double> want = received(stream, 1, 0);
    for (std::size_t j = 0; j < want.size(); ++j) {
        double norm = 0;
        for (std::size_t c = 0; c < 16; ++c)
            norm += std::abs(static_cast<double>(stream.v[(30 + j) * 16 + c]));
        want[j] *= norm;
    }
    CHECK(near(cache.scores(0, 1), want));
}

TEST_CASE("VATP with values of one norm keeps what H2O keeps", "[property]") {
    Stream stream = random_stream(small, 60, 13);
    for (float& x : stream.v) x = x < 0 ? -0.5F : 0.5F;
    KVCache vatp(small, Vatp{.sinks = 3}, Budget{.tokens = 20});
    KVCache h2o(small, H2O{.sinks = 3}, Budget{.tokens = 20});
    feed_prompt(vatp, stream, 0, 40, 15);
    feed_prompt(h2o, stream, 0, 40, 15);
    CHECK((all_positions(vatp) == all_positions(h2o)));
    feed_decode(vatp, stream, 40, 60);
    feed_decode(h2o, stream, 40, 60);
    CHECK((all_positions(vatp) == all_positions(h2o)));
}

TEST_CASE("a query row with NaN or infinite logits gives nothing to anybody", "[property]") {
    const CacheShape pair{.layers = 1, .q_heads = 2, .kv_heads = 1, .head_dim = 16};
    for (const float bad : {quiet_nan(), std::numeric_limits<float>::infinity()}) {
        Stream stream = random_stream(pair, 20, 14);
        stream.q[(20 + 7) * 16 + 3] = bad;  // token 7 of the second head
        for_each_driver(pair, H2O{}, roomy, [&](auto& cache, const std::string&) {
            feed_prompt(cache, stream, 0, 12, 5);
            feed_decode(cache, stream, 12, 20);
            CHECK(close(sum(cache.scores(0, 0)), 19.5, 1e-4, 0));
        });
    }
    // Both heads' last rows are bad: all scores are 0, and the most recent tokens stay.
    Stream stream = random_stream(pair, 20, 15);
    stream.q[19 * 16] = stream.q[39 * 16] = quiet_nan();
    for_each_driver(pair, Tova{}, {.tokens = 6}, [&](auto& cache, const std::string&) {
        feed_prompt(cache, stream, 0, 20, 20);
        CHECK((positions_of(cache.view(0, 0)) == newest(6, 20)));
    });
}

TEST_CASE("NaN scores lose, infinite ones win, equal ones leave the most recent", "[property]") {
    const std::size_t n = 20, dim = single.head_dim;
    Stream stream = random_stream(single, n, 16, 0.5F);
    stream.v[5 * dim] = quiet_nan();
    stream.v[6 * dim] = std::numeric_limits<float>::infinity();
    stream.v[7 * dim] = -std::numeric_limits<float>::infinity();
    for (const std::size_t kept : {2U, 19U}) {
        CAPTURE(kept);
        for_each_driver(single, Vatp{.recent = 0, .sinks = 0}, {.tokens = kept},
                        [&](auto& cache, const std::string&) {
                            feed_prompt(cache, stream, 0, n, n);
                            const std::vector<position_t> held = positions_of(cache.view(0, 0));
                            CHECK(std::count(held.begin(), held.end(), 5) == 0);
                            CHECK(std::count(held.begin(), held.end(), 6) == 1);
                            CHECK(std::count(held.begin(), held.end(), 7) == 1);
                        });
    }
    std::fill(stream.q.begin(), stream.q.end(), 0.0F);
    for_each_driver(single, Tova{}, {.tokens = 7}, [&](auto& cache, const std::string&) {
        feed_prompt(cache, stream, 0, n, n);
        CHECK((positions_of(cache.view(0, 0)) == newest(7, n)));
    });
}

TEST_CASE("protected rows that fill the budget leave no choice", "[property]") {
    const Stream stream = random_stream(small, 40, 17);
    for (const std::size_t recent : {12U, 13U, 40U}) {
        KVCache cache(small, H2O{.recent = recent, .sinks = 5}, Budget{.tokens = 12});
        feed_prompt(cache, stream, 0, 40, 9);
        CHECK((cache.positions(0, 0) == newest(12, 40)));
    }
}

TEST_CASE("an even kernel is refused before anything exists", "[contract]") {
    CHECK_THROWS_AS(KVCache(small, H2O{.kernel = 2}, roomy), error::config_error);
    CHECK_THROWS_AS(KVCache(small, H2O{.kernel = 0}, roomy), error::config_error);
    CHECK_THROWS_AS(KVCache(small, Tova{.kernel = 4}, roomy), error::config_error);
    CHECK_THROWS_AS(KVCache(small, Vatp{.kernel = 6}, roomy), error::config_error);
    CHECK_THROWS_AS(KVCache(small, H2O{.kernel = 2}, Budget{.ratio = 0.5}), error::config_error);
}
