#include "kvcull/policies/snapkv.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "kvcull/policies/h2o.hpp"
#include "support/catch.hpp"
#include "support/conformance.hpp"
#include "support/heard.hpp"
#include "support/live.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

const CacheShape small{.layers = 1, .q_heads = 6, .kv_heads = 2, .head_dim = 16};
const CacheShape single{.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 16};
constexpr std::size_t n = 60;

std::vector<position_t> newest(std::size_t kept, std::size_t tokens) {
    std::vector<position_t> positions;
    for (std::size_t j = tokens - kept; j < tokens; ++j) positions.push_back(static_cast<position_t>(j));
    return positions;
}
/// Scores of one head after a prompt in one call, before anything is evicted.
std::vector<float> scores(const SnapKV& policy, const Stream& stream, std::size_t head = 0) {
    KVCache cache(stream.shape, policy, Budget{.tokens = 1000});
    feed_prompt(cache, stream, 0, stream.tokens, stream.tokens);
    return cache.scores(0, head);
}
std::vector<std::vector<position_t>> keep(const SnapKV& policy, const Stream& stream, std::size_t budget) {
    KVCache cache(stream.shape, policy, Budget{.tokens = budget});
    feed_prompt(cache, stream, 0, stream.tokens, stream.tokens);
    return all_positions(cache);
}
/// Mean attention that the window pays to every token, per query head: `[q_heads, tokens]`.
std::vector<std::vector<double>> votes(const Stream& stream, std::size_t window) {
    const std::size_t tokens = stream.tokens, dim = stream.shape.head_dim;
    std::vector<std::vector<double>> all;
    std::vector<Visible> visible;
    for (std::size_t i = tokens - window; i < tokens; ++i) visible.push_back({0, 0, i + 1});
    for (std::size_t head = 0; head < stream.shape.q_heads; ++head) {
        const std::size_t kv = head / stream.shape.group();
        const auto attention =
            reference_attention(
                std::span(stream.q).subspan(((head + 1) * tokens - window) * dim, window * dim),
                std::span(stream.k).subspan(kv * tokens * dim, tokens * dim),
                std::span(stream.v).subspan(kv * tokens * dim, tokens * dim), visible, tokens, dim, dim,
                1.0 / std::sqrt(static_cast<double>(dim)))
                .attention;
        std::vector<double> mean(tokens);
        for (std::size_t i = 0; i < window; ++i)
            for (std::size_t j = 0; j < tokens; ++j)
                mean[j] += attention[i * tokens + j] / static_cast<double>(window);
        all.push_back(mean);
    }
    return all;
}
bool near(std::span<const float> got, std::span<const double> want) {
    if (got.size() != want.size()) return false;
    for (std::size_t j = 0; j < got.size(); ++j)
        if (!close(got[j], want[j], 1e-4, 1e-6)) return false;
    return true;
}

}  // namespace

TEST_CASE("SnapKV in every variant keeps the contract of a policy", "[property]") {
    const Promises once{.evictions = 1, .while_decoding = false, .chunks_do_not_matter = true};
    SECTION("only the prompt is evicted") {
        policy_conformance(SnapKV{.window = 4, .kernel = 3}, once);
    }
    SECTION("mean over the group, no pooling, sinks") {
        policy_conformance(SnapKV{.window = 4, .pool = Pool::none, .sinks = 3}, once);
    }
    SECTION("maximum over the group, pooled by mean") {
        policy_conformance(SnapKV{.window = 5, .kernel = 5, .pool = Pool::avg, .gqa = Group::max}, once);
    }
    SECTION("sum over the group, a window wider than a call") {
        policy_conformance(
            SnapKV{.window = 20, .kernel = 99, .gqa = Group::sum},
            {.budget = 22, .evictions = 1, .while_decoding = false, .chunks_do_not_matter = true});
    }
    SECTION("again with every decoded token") {
        policy_conformance(SnapKV{.window = 4, .kernel = 3, .decode_interval = 1},
                           {.chunks_do_not_matter = true});
    }
    SECTION("again every 9 decoded tokens") {
        policy_conformance(SnapKV{.window = 4, .kernel = 3, .decode_interval = 9},
                           {.while_decoding = false, .chunks_do_not_matter = true});
    }
    SECTION("again after every window") {
        policy_conformance(SnapKV{.window = 4, .kernel = 3, .gqa = Group::max, .decode_interval = 4},
                           {.while_decoding = false, .chunks_do_not_matter = true});
    }
}

TEST_CASE("votes are the window's mean attention, reduced over the group and pooled over the candidates",
          "[differential]") {
    const Stream stream = random_stream(small, n, 1);
    const std::size_t window = 7, candidates = n - window;
    const auto by_head = votes(stream, window);
    for (const Group reduce : {Group::mean, Group::max, Group::sum})
        for (const Pool pool : {Pool::none, Pool::max, Pool::avg})
            for (std::size_t kv = 0; kv < 2; ++kv) {
                std::vector<double> raw(candidates), want(candidates);
                for (std::size_t j = 0; j < candidates; ++j)
                    for (std::size_t g = 0; g < 3; ++g) {
                        const double vote = by_head[kv * 3 + g][j];
                        raw[j] = reduce == Group::max ? std::max(raw[j], vote)
                                                      : raw[j] + vote / (reduce == Group::mean ? 3.0 : 1.0);
                    }
                for (std::size_t j = 0; j < candidates; ++j) {
                    if (pool == Pool::none) want[j] = raw[j];
                    for (std::size_t i = j < 2 ? 0 : j - 2;
                         pool != Pool::none && i <= j + 2 && i < candidates; ++i)
                        want[j] = pool == Pool::max ? std::max(want[j], raw[i]) : want[j] + raw[i] / 5;
                }
                const std::vector<float> got =
                    scores({.window = window, .kernel = 5, .pool = pool, .gqa = reduce}, stream, kv);
                CHECK(near(std::span(got).first(candidates), want));
            }
}

TEST_CASE("a window of several tiles votes like any other", "[differential]") {
    const Stream stream = random_stream(single, 150, 20);
    const std::size_t window = 100;
    const std::vector<double> want = votes(stream, window)[0];
    const std::vector<float> got = scores({.window = window, .kernel = 1}, stream);
    CHECK(near(std::span(got).first(50), std::span(want).first(50)));
}

TEST_CASE("the window, the sinks and the best candidates stay", "[property]") {
    const Stream stream = random_stream(small, n, 2);
    const SnapKV policy{.window = 6, .kernel = 3, .sinks = 4};
    const auto kept = keep(policy, stream, 20);
    for (std::size_t h = 0; h < 2; ++h) {
        REQUIRE(kept[h].size() == 20);
        CHECK(std::is_sorted(kept[h].begin(), kept[h].end()));
        CHECK((std::vector(kept[h].end() - 6, kept[h].end()) == newest(6, n)));
        CHECK((std::vector(kept[h].begin(), kept[h].begin() + 4) == std::vector<position_t>{0, 1, 2, 3}));
        const std::vector<float> score = scores(policy, stream, h);
        float worst_kept = 1e9F, best_lost = -1e9F;
        for (std::size_t j = 4; j + 6 < n; ++j) {
            const bool stays = std::count(kept[h].begin(), kept[h].end(), static_cast<position_t>(j)) > 0;
            (stays ? worst_kept : best_lost) =
                stays ? std::min(worst_kept, score[j]) : std::max(best_lost, score[j]);
        }
        CHECK(worst_kept >= best_lost);
    }
}

TEST_CASE("votes for candidates sum to one minus what the window gives itself", "[property]") {
    const Stream stream = random_stream(small, n, 3);
    const std::size_t window = 6;
    const std::vector<float> got = scores({.window = window, .kernel = 1}, stream, 1);
    double candidates = 0, itself = 0;
    for (std::size_t j = 0; j < n; ++j) (j + window < n ? candidates : itself) += static_cast<double>(got[j]);
    double want = 0;
    for (std::size_t g = 3; g < 6; ++g)
        for (std::size_t j = n - window; j < n; ++j) want += votes(stream, window)[g][j] / 3;
    CHECK(candidates <= 1.0);
    CHECK(close(static_cast<float>(itself), want, 1e-4, 0));
    CHECK(close(static_cast<float>(candidates), 1 - want, 1e-4, 0));
}

TEST_CASE("a window of one row scores like TOVA with the newest token protected", "[property]") {
    const CacheShape one_head{.layers = 1, .q_heads = 4, .kv_heads = 1, .head_dim = 16};
    const Stream stream = random_stream(one_head, n, 4);
    const SnapKV snapkv{.window = 1, .kernel = 1};
    const Tova tova{.protect_newest = true};
    KVCache snap(one_head, snapkv, Budget{.tokens = 20});
    KVCache last(one_head, tova, Budget{.tokens = 20});
    snap.begin_prompt();
    last.begin_prompt();
    snap.hold(true);
    last.hold(true);
    feed(snap, stream, 0, n);
    feed(last, stream, 0, n);
    const std::vector<float> want = last.scores(0, 0);
    CHECK(near(snap.scores(0, 0), std::vector<double>(want.begin(), want.end())));
    snap.hold(false);
    last.hold(false);
    snap.end_prompt();
    last.end_prompt();
    CHECK((snap.positions(0, 0) == last.positions(0, 0)));
}

TEST_CASE("zero queries leave the most recent tokens, and the mean's padding costs the last candidates",
          "[property]") {
    Stream stream = random_stream(small, n, 5);
    std::fill(stream.q.begin(), stream.q.end(), 0.0F);
    const std::size_t window = 6, budget = 20, candidates = n - window;
    for (const SnapKV& policy : {SnapKV{.window = window, .kernel = 1}, SnapKV{.window = window, .kernel = 7},
                                 SnapKV{.window = window, .pool = Pool::none}})
        for_each_driver(small, policy, {.tokens = budget}, [&](auto& cache, const std::string&) {
            feed_prompt(cache, stream, 0, n, n);
            CHECK((positions_of(cache.view(0, 0)) == newest(budget, n)));
        });
    const SnapKV average{.window = window, .kernel = 7, .pool = Pool::avg};
    const std::vector<float> score = scores(average, stream);
    for (std::size_t j = 0; j < candidates; ++j) {
        const bool inside = j >= 3 && j + 3 < candidates;
        CHECK((inside ? same_bits(score[j], score[candidates / 2]) : score[j] < score[candidates / 2]));
    }
    std::vector<position_t> want;  // the last 3 candidates lose
    for (std::size_t j = candidates - 3 - (budget - window); j < n; ++j)
        if (j < candidates - 3 || j >= candidates) want.push_back(static_cast<position_t>(j));
    CHECK((keep(average, stream, budget)[1] == want));
}

TEST_CASE("the order of query heads in a group does not matter", "[property]") {
    const Stream stream = random_stream(small, n, 6);
    Stream turned = stream;
    const std::size_t head = n * small.head_dim;
    for (std::size_t h = 0; h < 6; ++h)
        std::copy_n(stream.q.data() + (h / 3 * 3 + (h + 1) % 3) * head, head, turned.q.data() + h * head);
    const std::vector<float> want = scores({.window = 6}, stream, 1);
    CHECK(near(scores({.window = 6}, turned, 1), std::vector<double>(want.begin(), want.end())));
    CHECK((keep({.window = 6, .kernel = 3}, turned, 20) == keep({.window = 6, .kernel = 3}, stream, 20)));
}

TEST_CASE("neither values nor a vector added to all keys change what stays", "[property]") {
    const Stream stream = random_stream(small, n, 7);
    const auto want = keep({.window = 6, .kernel = 3}, stream, 20);
    Stream other = stream;
    other.v = random_floats(stream.v.size(), 8, 10);
    CHECK((keep({.window = 6, .kernel = 3}, other, 20) == want));
    const std::vector<float> constant = random_floats(small.head_dim, 9);
    for (std::size_t i = 0; i < other.k.size(); ++i) other.k[i] += constant[i % small.head_dim];
    CHECK((keep({.window = 6, .kernel = 3}, other, 20) == want));
}

TEST_CASE("a larger budget keeps what a smaller one keeps", "[property]") {
    const Stream stream = random_stream(small, n, 10);
    for (const Pool pool : {Pool::none, Pool::max, Pool::avg})
        for (std::size_t budget = 10; budget < n; ++budget) {
            const auto less = keep({.window = 6, .kernel = 5, .pool = pool}, stream, budget);
            const auto more = keep({.window = 6, .kernel = 5, .pool = pool}, stream, budget + 1);
            CHECK(std::includes(more[0].begin(), more[0].end(), less[0].begin(), less[0].end()));
        }
}

TEST_CASE("the prompt is evicted once, whether its length is announced or not", "[property]") {
    const Stream stream = random_stream(small, n, 11);
    const auto want = keep({.window = 6}, stream, 20);
    for (const bool announced : {true, false})
        for_each_driver(small, SnapKV{.window = 6}, {.tokens = 20}, [&](auto& cache, const std::string&) {
            feed_prompt(cache, stream, 0, n, 9, announced);
            CHECK((all_positions(cache) == want));
        });
}

TEST_CASE("with decode_interval the cache never exceeds the budget by more", "[property]") {
    const Stream stream = random_stream(small, n + 40, 12);
    for (const std::size_t interval : {1U, 3U, 8U, 30U}) {
        CAPTURE(interval);
        const SnapKV policy{.window = 6, .kernel = 3, .decode_interval = interval};
        for_each_driver(small, policy, {.tokens = 20}, [&](auto& cache, const std::string&) {
            feed_prompt(cache, stream, 0, n, n);
            for (std::size_t step = 1; step <= 40; ++step) {
                feed(cache, stream, n + step - 1, 1);
                CHECK(cache.rows(0, 0) == 20 + step % interval);
            }
        });
    }
    KVCache grows(small, SnapKV{.window = 6}, Budget{.tokens = 20});
    feed_prompt(grows, stream, 0, n, n);
    feed_decode(grows, stream, n, n + 40);
    CHECK(grows.rows(0, 0) == 60);
}

TEST_CASE("a bad window row votes for nothing and still counts", "[differential]") {
    const std::size_t window = 6, candidates = n - window;
    for (const float bad : {quiet_nan(), std::numeric_limits<float>::infinity()}) {
        Stream stream = random_stream(small, n, 13);
        const Stream good = stream;
        stream.q[(1 * n + n - 3) * 16 + 2] = bad;  // the third newest row of the second head
        std::vector<double> want(candidates);
        const auto all = votes(good, window);
        for (std::size_t g = 0; g < 3; ++g)
            for (std::size_t j = 0; j < candidates; ++j) want[j] += all[g][j] / 3;
        // Its own part: the window of that row alone.
        Stream shorter{.shape = small, .tokens = n - 2, .q = {}, .k = {}, .v = {}};
        const auto cut = [&](const std::vector<float>& from, std::vector<float>& to, std::size_t heads) {
            for (std::size_t h = 0; h < heads; ++h)
                to.insert(to.end(), from.begin() + static_cast<std::ptrdiff_t>(h * n * 16),
                          from.begin() + static_cast<std::ptrdiff_t>((h * n + n - 2) * 16));
        };
        cut(good.q, shorter.q, 6);
        cut(good.k, shorter.k, 2);
        cut(good.v, shorter.v, 2);
        const std::vector<double> its = votes(shorter, 1)[1];
        for (std::size_t j = 0; j < candidates; ++j) want[j] -= its[j] / static_cast<double>(3 * window);
        const std::vector<float> got = scores({.window = window, .kernel = 1}, stream);
        CHECK(near(std::span(got).first(candidates), want));
    }
    Stream stream = random_stream(small, n, 14);
    std::fill(stream.q.begin(), stream.q.end(), quiet_nan());
    for (const Pool pool : {Pool::none, Pool::max})
        CHECK((keep({.window = window, .pool = pool}, stream, 20)[0] == newest(20, n)));
}

TEST_CASE("SnapKV refuses parameters that leave nothing to choose", "[contract]") {
    const auto refused = [](const SnapKV& policy, std::size_t budget) {
        CHECK_THROWS_AS(KVCache(small, policy, Budget{.tokens = budget}), error::config_error);
        CHECK_THROWS_AS((Evictor<SnapKV>(small, policy, Budget{.tokens = budget})), error::config_error);
    };
    refused({.window = 8}, 8);
    refused({.window = 8}, 3);
    refused({.window = 8, .sinks = 4}, 12);
    refused({.window = 0}, 8);
    refused({.window = 4, .kernel = 4}, 8);
    refused({.window = 4, .kernel = 0}, 8);
    CHECK_THROWS_AS(KVCache(CacheShape{.layers = 1, .q_heads = 3, .kv_heads = 2, .head_dim = 8},
                            SnapKV{.window = 4}, Budget{.tokens = 8}),
                    error::config_error);
    CHECK_NOTHROW(KVCache(small, SnapKV{.window = 8, .sinks = 4}, Budget{.tokens = 13}));
    // A ratio of the prompt is checked when the prompt's length is known, before anything changes.
    const Stream stream = random_stream(small, 20, 15);
    KVCache cache(small, SnapKV{.window = 8}, Budget{.ratio = 0.25});
    CHECK_THROWS_AS(cache.begin_prompt(20), error::config_error);
    CHECK_NOTHROW(cache.begin_prompt(40));
    KVCache unknown(small, SnapKV{.window = 8}, Budget{.ratio = 0.25});
    unknown.begin_prompt();
    feed(unknown, stream, 0, 20);
    CHECK_THROWS_AS(unknown.end_prompt(), error::config_error);
    CHECK(unknown.rows(0, 0) == 20);
}

TEST_CASE("a head that gets fewer rows than the window keeps its last ones", "[property]") {
    struct Few {
        static void layer_sizes(std::size_t mean, std::size_t, Protected, std::span<std::size_t> out) {
            std::fill(out.begin(), out.end(), mean);
        }
        static void head_sizes(std::size_t, std::span<const Candidates>, std::size_t size,
                               std::span<std::size_t> out) {
            out[0] = 3;
            out[1] = 2 * size - 3;
        }
    };
    const Stream stream = random_stream(small, n, 16);
    BlockPool pool;
    KVCache<SnapKV, Few> cache(small, SnapKV{.window = 6}, Budget{.tokens = 10}, pool);
    feed_prompt(cache, stream, 0, n, n);
    CHECK((cache.positions(0, 0) == newest(3, n)));
    CHECK(cache.rows(0, 1) == 17);
}

TEST_CASE("the newest tokens vote, however they came and whatever was taken back", "[property]") {
    const Stream stream = random_stream(small, n, 17);
    const SnapKV policy{.window = 6, .kernel = 1};
    const auto score = [](auto& cache) { return cache.scores(0, 0); };
    KVCache whole(small, policy, Budget{.tokens = 1000});
    feed_prompt(whole, stream, 0, n, n);
    const std::vector<float> raw = score(whole);
    const std::vector<double> want(raw.begin(), raw.end());

    KVCache decoded(small, policy, Budget{.tokens = 1000});
    feed_prompt(decoded, stream, 0, n - 4, n);
    feed_decode(decoded, stream, n - 4, n);
    CHECK(near(score(decoded), want));

    KVCache turns(small, policy, Budget{.tokens = 1000});
    feed_prompt(turns, stream, 0, n - 10, n);
    feed_decode(turns, stream, n - 10, n - 3);
    feed_prompt(turns, stream, n - 3, n, 2);
    CHECK(near(score(turns), want));

    // 4 tokens were taken back: the 2 before them still know what they asked.
    const Stream other = random_stream(small, n + 4, 18);
    KVCache shorter(small, SnapKV{.window = 2, .kernel = 1}, Budget{.tokens = 1000});
    KVCache taken(small, policy, Budget{.tokens = 1000});
    feed_prompt(shorter, stream, 0, n, n);
    feed_prompt(taken, stream, 0, n, n);
    feed_decode(taken, other, n, n + 4);
    taken.truncate(4);
    const std::vector<float> two = score(shorter);
    CHECK(near(score(taken), std::vector<double>(two.begin(), two.end())));
    // Other tokens come in their place.
    KVCache straight(small, SnapKV{.window = 3, .kernel = 1}, Budget{.tokens = 1000});
    feed_prompt(straight, stream, 0, n, n);
    const auto replaced = [&](auto& cache) {
        Stream last = other;  // token n, fed at position n
        feed(cache, last, n, 1);
        return cache.scores(0, 0);
    };
    const std::vector<float> three = replaced(straight);
    CHECK(near(replaced(taken), std::vector<double>(three.begin(), three.end())));
}

TEST_CASE("room is made by the votes of the newest tokens, without an interval too", "[property]") {
    const Stream stream = random_stream(single, n, 19);
    const SnapKV policy{.window = 4, .kernel = 1};
    const std::size_t budget = 20, c = 2;
    KVCache cache(single, policy, Budget{.tokens = budget}), all(single, policy, Budget{.tokens = 1000});
    feed_decode(cache, stream, 0, n);
    feed_decode(all, stream, 0, n);
    CHECK(cache.rows(0, 0) == n);
    cache.make_room(c);
    const std::vector<float> score = all.scores(0, 0);
    std::vector<position_t> order;
    for (std::size_t j = 0; j + (policy.window - c) < n; ++j) order.push_back(static_cast<position_t>(j));
    std::stable_sort(order.begin(), order.end(), [&](position_t a, position_t b) {
        return score[static_cast<std::size_t>(a)] > score[static_cast<std::size_t>(b)];
    });
    order.resize(budget - policy.window);
    for (std::size_t j = n - (policy.window - c); j < n; ++j) order.push_back(static_cast<position_t>(j));
    std::sort(order.begin(), order.end());
    CHECK((cache.positions(0, 0) == order));
}

TEST_CASE("votes heard in their own steps are those that are computed anew, bit for bit", "[differential]") {
    const std::size_t group = GENERATE(std::size_t{1}, 4, 7);
    const CacheShape shape{.layers = 2, .q_heads = 2 * group, .kv_heads = 2, .head_dim = 20, .value_dim = 3};
    Stream stream = random_stream(shape, 260, 21 + group);
    stream.q[(3 * 260 + 83) * 20] = quiet_nan();
    for (const SnapKV& policy : {SnapKV{.window = 6, .kernel = 3, .gqa = Group::mean, .decode_interval = 6},
                                 SnapKV{.window = 6, .kernel = 3, .gqa = Group::max, .decode_interval = 7},
                                 SnapKV{.window = 6, .kernel = 3, .gqa = Group::sum, .decode_interval = 15}})
        for (const simd::Isa isa : simd::all_isas) {
            if (!simd::available(isa)) continue;
            const std::size_t interval = policy.decode_interval;
            CAPTURE(group, name_of(isa), interval);
            Listeners<SnapKV> three(stream, policy, Budget{.tokens = 20}, isa);
            three.decode(4, 1);
            three.prompt(3, 9);
            three.decode(40, 1);
            three.decode(9, 2);
            three.decode(3, 8);
            three.decode(11, 1);
            three.truncate(1);
            three.decode(2 * interval, 1);
            three.make_room(3);
            three.decode(4, 1);
            three.truncate(2);
            three.decode(1, 3);
            three.hold(true);
            three.decode(interval + 2, 1);
            three.hold(false);
            three.prompt(1, 2);
            three.decode(2 * interval, 1);
            three.hold(true);
            three.decode(interval - 3, 1);
            three.prompt(1, 2);
            three.decode(6, 1);
            REQUIRE(three.tokens() < stream.tokens);
        }
}

TEST_CASE("nobody is asked again whose whole window was heard", "[property]") {
    const Stream stream = random_stream(small, 140, 22);
    const SnapKV policy{.window = 6, .kernel = 3, .decode_interval = 10};
    HeardOrAsked<SnapKV> both(stream, policy, Budget{.tokens = 20}, 30);
    const std::size_t votes = 5 * small.q_heads;  // of all but the newest token
    both.decode(30);
    CHECK(both.heard.count == 0);
    CHECK(both.silent.count == 3 * votes);
    both.decode(4);
    both.truncate(1);
    both.decode(7);
    CHECK(both.heard.count == votes);  // rows left within the interval
    both.decode(10);
    CHECK(both.heard.count == 0);
    both.decode(2);
    KVCache fork = both.cache.fork();
    both.decode(8);
    CHECK(both.heard.count == 0);
    for (std::size_t at = both.at - 8; fork.seen() < both.cache.seen(); ++at) {
        both.heard.newest = stream.position(at);
        feed(fork, stream, at, 1);
    }
    CHECK(both.heard.count == 0);
    CHECK((all_positions(fork) == all_positions(both.cache)));
}

TEST_CASE("a call of several decoded tokens is heard too", "[property]") {
    const Stream stream = random_stream(small, 190, 23);
    AskedAgain heard;
    KVCache cache(small, SnapKV{.window = 6, .kernel = 3, .decode_interval = 10}, Budget{.tokens = 20});
    feed_prompt(cache, stream, 0, 30, 30);
    cache.set_bias(heard.bias());
    for (const std::size_t count : {1U, 2U, 5U, 10U, 3U})
        for (std::size_t calls = 30 / count, at = 30; calls > 0; --calls, at += count) {
            heard.newest = 0;  // none is before it
            if (cache.rows(0, 0) + count > 29) heard.newest = 1000;
            heard.count = 0;
            feed(cache, stream, cache.seen(), count);
            if (heard.newest == 0) continue;
            // 3 tokens at a time step over the interval: the window is not the one that was heard.
            CHECK(heard.count == (count + (count == 3 ? 6 : 0)) * small.q_heads);
        }
}

TEST_CASE("in long heads, attended in parts, votes that were heard agree to rounding", "[differential]") {
    const CacheShape shape{.layers = 1, .q_heads = 2, .kv_heads = 1, .head_dim = 8};
    const Stream stream = random_stream(shape, 6310, 24, 0.3F);
    const SnapKV policy{.window = 4, .kernel = 1, .decode_interval = 8};
    KVCache hears(shape, policy, Budget{.tokens = 6300});
    Engine<SnapKV> asks(shape, policy, Budget{.tokens = 6300});
    feed_prompt(hears, stream, 0, 6300, 700);
    feed_prompt(asks, stream, 0, 6300, 700);
    hears.hold(true);
    asks.hold(true);
    for (std::size_t at = 6300; at < 6308; ++at) {
        feed(hears, stream, at, 1);
        feed_silently(asks, stream, at, 1);
    }
    const std::vector<float> heard = hears.scores(0, 0), asked = asks.scores(0, 0);
    double worst = 0.0;
    for (std::size_t j = 0; j < asked.size(); ++j)
        worst = std::max(worst, std::abs(static_cast<double>(heard[j]) / static_cast<double>(asked[j]) - 1));
    CHECK(worst < 2e-6);
    CHECK_FALSE(same_bits(heard, asked));
}

TEST_CASE("nothing is summed that no eviction can use", "[property]") {
    const Stream stream = random_stream(small, 60, 26);
    KVCache cache(small, SnapKV{.window = 3, .decode_interval = 5}, Budget{.tokens = 50});
    const auto sum = [&] {
        double total = 0.0;
        for (const float x : state_values(cache.evictor().state(0, 1))) total += static_cast<double>(x);
        return std::round(total * 1e4) / 1e4;
    };
    for (std::size_t at = 0; at < 20; ++at) {
        feed(cache, stream, at, 1);
        const std::size_t heard = at < 2 ? 0 : std::min<std::size_t>(at - 1, 3);
        CHECK(sum() == static_cast<double>(3 * heard));  // each query head of the group gives 1 per token
    }
}

TEST_CASE("sums of what is heard take memory only where they are used", "[property]") {
    const Stream stream = random_stream(small, 40, 25);
    const auto bytes = [&](std::size_t interval) {
        KVCache cache(small, SnapKV{.window = 6, .decode_interval = interval}, Budget{.tokens = 20});
        feed_prompt(cache, stream, 0, 40, 40);
        return cache.evictor().bytes();
    };
    CHECK(bytes(0) == 0);
    CHECK(bytes(5) == 0);
    CHECK(bytes(6) >= 2 * 3 * 20 * sizeof(float));  // heads, group, rows
    Engine<SnapKV> engine(small, SnapKV{.window = 6, .decode_interval = 6}, Budget{.tokens = 20});
    for (std::size_t at = 0; at < 40; ++at) feed_silently(engine, stream, at, 1);
    CHECK(engine.evictor().bytes() == 0);
}
