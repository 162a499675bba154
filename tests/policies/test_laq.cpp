#include "kvcull/policies/laq.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "kvcull/policies/caote.hpp"
#include "kvcull/policies/h2o.hpp"
#include "kvcull/policies/obcache.hpp"
#include "support/catch.hpp"
#include "support/conformance.hpp"
#include "support/failure.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

const CacheShape small{.layers = 1, .q_heads = 6, .kv_heads = 2, .head_dim = 16};
const CacheShape single{.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 16};
constexpr std::size_t n = 60;

/// A cache that holds the first `tokens` of a stream as its prompt.
template <class P>
KVCache<P> prefilled(const P& policy, const Stream& stream, std::size_t tokens = n, std::size_t budget = 40) {
    KVCache<P> cache(stream.shape, policy, Budget{.tokens = budget});
    feed_prompt(cache, stream, 0, tokens, 13);
    return cache;
}
/// What `use(state, step, q)` makes of one head, the given query tokens being those of the stream.
template <class P, class Use>
std::vector<float> second_stage(const KVCache<P>& cache, const Stream& stream, std::size_t first,
                                std::size_t count, std::size_t head, const Use& use) {
    const std::size_t group = stream.shape.group(), dim = stream.shape.head_dim;
    const auto given = stream.queries(0, first, count);
    std::vector<float> q(group * count * dim), out(cache.rows(0, head));
    for (std::size_t r = 0; r < group * count; ++r)
        std::copy_n(given.row(head * group + r / count, r % count), dim, q.data() + r * dim);
    Scratch<float> workspace, wrapper;
    use(cache.evictor().state(0, head),
        HeadStep{.head = head,
                 .group = group,
                 .next_position = cache.evictor().next_position(),
                 .cached = cache.view(0, head),
                 .scale = stream.shape.logit_scale(),
                 .protect = protected_rows(cache.policy(), 20),
                 .kernels = &simd::kernels(),
                 .workspace = &workspace,
                 .wrapper_workspace = &wrapper},
        MatrixView<const float>(q.data(), group * count, dim), std::span(out));
    return out;
}
template <class P>
std::vector<float> rescored(const KVCache<P>& cache, const Stream& stream, std::size_t first,
                            std::size_t count, std::size_t head = 0) {
    return second_stage(cache, stream, first, count, head,
                        [&](const auto& state, const HeadStep& step, const auto& q, std::span<float> out) {
                            cache.policy().rescore(state, step, q, out);
                        });
}
/// The votes of pseudo tokens `n .. n + count - 1` after a prompt of n tokens, before pooling.
std::vector<float> raw(const Laq& policy, const Stream& stream, std::size_t count, std::size_t head = 0,
                       std::size_t first = n) {
    const KVCache<Laq> cache = prefilled(policy, stream);
    return second_stage(cache, stream, first, count, head,
                        [&](const auto& state, const HeadStep& step, const auto& q, std::span<float> out) {
                            policy.votes(state, step, q, out);
                        });
}
/// The same in double: query tokens `n - window .. n + count - 1` of which row i sees `end[i]` tokens.
std::vector<double> naive(const Stream& stream, std::size_t window, const std::vector<std::size_t>& end,
                          std::size_t kv, Group reduce) {
    const std::size_t tokens = stream.tokens, dim = stream.shape.head_dim, group = stream.shape.group(),
                      rows = end.size();
    std::vector<Visible> visible;
    for (const std::size_t one : end) visible.push_back({0, 0, one});
    std::vector<double> all(n);
    for (std::size_t g = 0; g < group; ++g) {
        const std::size_t head = kv * group + g;
        const auto attention =
            reference_attention(std::span(stream.q).subspan((head * tokens + n - window) * dim, rows * dim),
                                std::span(stream.k).subspan(kv * tokens * dim, n * dim),
                                std::span(stream.v).subspan(kv * tokens * dim, n * dim), visible, n, dim, dim,
                                1.0 / std::sqrt(static_cast<double>(dim)))
                .attention;
        for (std::size_t j = 0; j < n; ++j) {
            double vote = 0;
            for (std::size_t i = 0; i < rows; ++i) vote += attention[i * n + j];
            vote /= static_cast<double>(rows * (reduce == Group::mean ? group : 1));
            all[j] = reduce == Group::max ? std::max(all[j], vote) : all[j] + vote;
        }
    }
    return all;
}
bool near(std::span<const float> got, std::span<const double> want) {
    if (got.size() != want.size()) return false;
    for (std::size_t j = 0; j < got.size(); ++j)
        if (!close(got[j], want[j], 1e-4, 1e-6)) return false;
    return true;
}
bool near(std::span<const float> got, std::span<const float> want) {
    return near(got, std::vector<double>(want.begin(), want.end()));
}

template <class P>
std::vector<std::vector<position_t>> kept(const P& policy, const Stream& stream, std::size_t pseudo,
                                          std::size_t budget = 40) {
    auto cache = prefilled(policy, stream, n, budget);
    cache.rescore(std::array{stream.queries(0, n, pseudo)});
    return all_positions(cache);
}
bool holds(const std::vector<position_t>& positions, std::size_t token) {
    return std::binary_search(positions.begin(), positions.end(), static_cast<position_t>(token));
}

}  // namespace

TEST_CASE("LAQ keeps the contract of a policy and by itself evicts nothing", "[property]") {
    const Promises never{.evictions = 0, .while_decoding = false, .chunks_do_not_matter = true};
    SECTION("pseudo tokens alone") {
        policy_conformance(Laq{.lookahead_window = 4, .kernel = 3}, never);
    }
    SECTION("a window beside them, the copy a stream") {
        policy_conformance(LaqPlus({.window = 3, .lookahead_method = Laq::Method::streaming}), never);
    }
    SECTION("another policy as second stage") {
        policy_conformance(LaqThen<OBCache>{{.window = 2, .lookahead_window = 4}, {.recent = 3}}, never);
    }
}

TEST_CASE("a window and pseudo tokens vote by their mean attention over the prompt alone", "[differential]") {
    const Stream stream = random_stream(small, n + 20, 1);
    for (const std::size_t window : {std::size_t{0}, std::size_t{5}})
        for (const std::size_t pseudo : {std::size_t{1}, std::size_t{6}, std::size_t{20}})
            for (const Laq::Mask mask : {Laq::Mask::causal, Laq::Mask::shifted})
                for (const Group reduce : {Group::mean, Group::max, Group::sum})
                    for (std::size_t kv = 0; kv < 2; ++kv) {
                        CAPTURE(window, pseudo, static_cast<int>(mask), kv);
                        std::vector<std::size_t> end;
                        for (std::size_t i = 0; i < window + pseudo; ++i)
                            end.push_back(mask == Laq::Mask::shifted ? n - window - pseudo + i + 1
                                          : i < window               ? n - window + i + 1
                                                                     : n);
                        const Laq policy{
                            .window = window, .lookahead_window = 3, .gqa = reduce, .mask = mask};
                        CHECK(near(raw(policy, stream, pseudo, kv), naive(stream, window, end, kv, reduce)));
                    }
}

TEST_CASE("more rows than the prompt has tokens make a shifted mask causal", "[differential]") {
    const Stream stream = random_stream(single, 30, 2);
    const auto votes = [&](Laq::Mask mask, std::size_t rows) {
        const auto cache = prefilled(Laq{.lookahead_window = 3, .kernel = 1, .mask = mask}, stream, 8, 7);
        return rescored(cache, stream, 8, rows);
    };
    CHECK(same_bits(votes(Laq::Mask::shifted, 9), votes(Laq::Mask::causal, 9)));
    CHECK_FALSE(same_bits(votes(Laq::Mask::shifted, 8), votes(Laq::Mask::causal, 8)));
}

TEST_CASE("without pseudo tokens LAQ++ is SnapKV with its window", "[differential]") {
    const Stream stream = random_stream(small, n, 3);
    for (const std::size_t window : {std::size_t{1}, std::size_t{6}}) {
        const LaqPlus policy({.window = window, .lookahead = 0, .kernel = 3});
        auto cache = prefilled(policy, stream);
        const KVCache<SnapKV> snap = prefilled(SnapKV{.window = window, .kernel = 3}, stream);
        cache.rescore(std::array{HeadsView<const float>{}});
        CHECK((all_positions(cache) == all_positions(snap)));
    }
}

TEST_CASE("under a shifted mask the prompt's last queries as pseudo tokens vote like SnapKV's window",
          "[differential]") {
    const Stream stream = random_stream(small, n, 4);
    const std::size_t window = 7;
    KVCache snap(small, SnapKV{.window = window, .kernel = 1}, Budget{.tokens = 1000});
    feed_prompt(snap, stream, 0, n, n);
    for (std::size_t kv = 0; kv < 2; ++kv)
        CHECK(near(raw({.mask = Laq::Mask::shifted}, stream, window, kv, n - window), snap.scores(0, kv)));
}

TEST_CASE("the order of pseudo tokens matters under a shifted mask only, and votes sum to one",
          "[property]") {
    Stream stream = random_stream(single, n + 4, 5);
    const auto causal = raw({}, stream, 4), shifted = raw({.mask = Laq::Mask::shifted}, stream, 4);
    CHECK(close(std::accumulate(causal.begin(), causal.end(), 0.0F), 1.0, 1e-5, 0));
    const auto row = [&](std::size_t token) {
        return stream.q.begin() + static_cast<std::ptrdiff_t>(token * single.head_dim);
    };
    std::swap_ranges(row(n), row(n + 1), row(n + 3));
    CHECK(near(raw({}, stream, 4), causal));
    CHECK_FALSE(near(raw({.mask = Laq::Mask::shifted}, stream, 4), shifted));
}

TEST_CASE("pooling ends where the window begins", "[property]") {
    const Stream stream = random_stream(single, n + 4, 6);
    const Laq policy{.window = 6, .lookahead_window = 3, .kernel = 5};
    const std::vector<float> votes = raw(policy, stream, 4),
                             score = rescored(prefilled(policy, stream), stream, n, 4);
    const auto last = static_cast<std::ptrdiff_t>(n - 6);
    CHECK(same_bits(score[n - 7], *std::max_element(votes.begin() + last - 3, votes.begin() + last)));
}

TEST_CASE("LAQ++ keeps its window, LAQ need not keep any prompt token", "[property]") {
    Stream stream = random_stream(single, n + 4, 7);
    // Pseudo tokens look at the first tokens only.
    const auto k = stream.keys(0, 0, 1);
    for (std::size_t c = 0; c < single.head_dim; ++c)
        for (std::size_t t = n; t < n + 4; ++t) stream.q[t * single.head_dim + c] = 20.0F * k.data[c];
    const auto plain = kept(Laq{.lookahead_window = 5, .kernel = 1}, stream, 4, 10)[0];
    const auto plus = kept(LaqPlus({.window = 3, .lookahead_window = 5, .kernel = 1}), stream, 4, 10)[0];
    CHECK(holds(plain, 0));
    CHECK(holds(plus, 0));
    for (std::size_t token = n - 3; token < n; ++token) CHECK(holds(plus, token));
    CHECK(plain.size() == 10);
    CHECK(plus.size() == 10);
    CHECK(LaqPlus().window == 8);
}

TEST_CASE("a token that only pseudo tokens look at is kept, where SnapKV drops it", "[property]") {
    for (std::uint64_t seed = 0; seed < 5; ++seed) {
        Stream stream = random_stream(single, n + 4, 20 + seed, 1.0F);
        const std::size_t planted = 11, dim = single.head_dim;
        for (std::size_t c = 0; c < dim; ++c) {
            stream.k[planted * dim + c] = c == 0 ? 8.0F : 0.0F;
            for (std::size_t t = 0; t < n; ++t) stream.q[t * dim] = -1.0F;
            for (std::size_t t = n; t < n + 4; ++t) stream.q[t * dim] = 4.0F;
        }
        CHECK(holds(kept(Laq{.lookahead_window = 6, .kernel = 1}, stream, 4, 12)[0], planted));
        CHECK(holds(kept(LaqPlus({.window = 4, .lookahead_window = 6, .kernel = 1}), stream, 4, 12)[0],
                    planted));
        const KVCache<SnapKV> snap = prefilled(SnapKV{.window = 6, .kernel = 1}, stream, n, 12);
        CHECK_FALSE(holds(all_positions(snap)[0], planted));
    }
}

TEST_CASE("pseudo tokens with bad logits vote for nothing and still count", "[property]") {
    Stream stream = random_stream(single, n + 4, 8);
    const auto good = raw({}, stream, 3);
    stream.q[(n + 3) * single.head_dim] = std::numeric_limits<float>::quiet_NaN();
    std::vector<double> want(good.begin(), good.end());
    for (double& vote : want) vote *= 0.75;
    CHECK(near(raw({}, stream, 4), want));
    for (std::size_t t = n; t < n + 3; ++t)
        stream.q[t * single.head_dim] = std::numeric_limits<float>::infinity();
    const auto all_bad = kept(Laq{.lookahead_window = 5}, stream, 4, 10)[0];
    for (std::size_t token = n - 10; token < n; ++token) CHECK(holds(all_bad, token));
}

TEST_CASE("the copy holds what SnapKV keeps, or a stream's first and last tokens", "[differential]") {
    const Stream stream = random_stream(small, n, 9);
    auto cache = prefilled(Laq{.window = 9, .lookahead_window = 5, .kernel = 3}, stream, n, 20);
    const KVCache<SnapKV> snap = prefilled(SnapKV{.window = 5, .kernel = 3}, stream, n, 20);
    CHECK((all_positions(cache.fork(cache.propose(20))) == all_positions(snap)));

    auto stream_cache =
        prefilled(Laq{.lookahead_window = 5, .lookahead_method = Laq::Method::streaming}, stream);
    const auto streamed = all_positions(stream_cache.fork(stream_cache.propose(9)));
    CHECK((streamed[1] == std::vector<position_t>{0, 1, 2, 3, 55, 56, 57, 58, 59}));
}

TEST_CASE("after truncate the queries that are left form the window", "[property]") {
    const Stream stream = random_stream(single, n + 4, 10);
    KVCache cache(single, Laq{.window = 4, .lookahead_window = 4, .kernel = 1}, Budget{.tokens = 20});
    feed_prompt(cache, stream, 0, n, n);
    cache.truncate(3);
    const std::vector<float> score = rescored(cache, stream, n, 2);
    std::vector<std::size_t> end{n - 3, n - 3, n - 3};
    Stream left = stream;  // token n - 4, then the pseudo tokens
    for (std::size_t i = 0; i < 2; ++i)
        std::copy_n(stream.q.begin() + static_cast<std::ptrdiff_t>((n + i) * 16), 16,
                    left.q.begin() + static_cast<std::ptrdiff_t>((n - 3 + i) * 16));
    std::vector<double> want = naive(left, 4, end, 0, Group::mean);
    want.resize(n - 3);
    CHECK(near(score, want));
}

TEST_CASE("a second stage of another policy ranks as that policy does by a prompt with those last rows",
          "[differential]") {
    const Stream stream = random_stream(small, n, 11);
    const auto compare = [&](const auto& scorer, std::size_t rows) {
        using Scorer = std::remove_cvref_t<decltype(scorer)>;
        KVCache<Scorer> own(small, scorer, Budget{.tokens = 1000});
        feed_prompt(own, stream, 0, n, n);
        const LaqThen<Scorer> policy{{.lookahead_window = 5, .mask = Laq::Mask::shifted}, scorer};
        const auto cache = prefilled(policy, stream);
        for (std::size_t kv = 0; kv < 2; ++kv) {
            CAPTURE(Scorer::name, rows, kv);
            std::vector<float> want = own.scores(0, kv);
            const std::vector<float> got = rescored(cache, stream, n - rows, rows, kv);
            CHECK(near(got, want));
        }
    };
    for (const auto kind : {OBCache::Score::attention, OBCache::Score::value_l1, OBCache::Score::value,
                            OBCache::Score::key, OBCache::Score::joint, OBCache::Score::separate})
        for (const std::size_t rows : {std::size_t{4}, std::size_t{20}})
            compare(OBCache{.kind = kind, .recent = 0, .window = rows}, rows);
    compare(OBCache{.base = OBCache::Base::tova}, 3);
    compare(Caote<>{}, 3);
    compare(Caote<>{.base = {.base = PerHeadAttention::Rows::snapkv, .recent = 0, .window = 6, .kernel = 1}},
            6);
    compare(FastCaote<>(Caote<>{.base = {.base = PerHeadAttention::Rows::tova}}), 3);
    compare(H2O{.recent = 0}, n);
}

TEST_CASE("bad parameters of LAQ are config errors", "[contract]") {
    const auto refused = [](const Laq& policy, std::size_t budget) {
        return failure<error::config_error>([&] { KVCache cache(small, policy, Budget{.tokens = budget}); });
    };
    CHECK(refused({.window = 40}, 40) == "Laq: budget is 40, want more than window = 40");
    CHECK(refused({}, 32) == "Laq: lookahead_budget is 32, want more than 32");
    CHECK(refused({.lookahead_window = 9, .lookahead_budget = 9}, 40).starts_with("Laq: lookahead_budget"));
    CHECK(refused({.lookahead_budget = 4, .lookahead_method = Laq::Method::streaming}, 40) ==
          "Laq: lookahead_budget is 4, want more than 4");
    CHECK(refused({.kernel = 4}, 40) == "Laq: kernel is 4, want an odd number");
    CHECK(refused({.lookahead = 0}, 40) == "Laq: lookahead is 0, want at least 1, or a window");
    CHECK(refused({.lookahead_window = 0}, 40) == "Laq: lookahead_window is 0, want at least 1");
    Laq{.lookahead_method = Laq::Method::full}.check(5);
    Laq{.window = 8, .lookahead = 0}.check(9);
    Laq{.lookahead_budget = 5, .lookahead_method = Laq::Method::streaming}.check(1);
}
