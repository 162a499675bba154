#include "kvcull/policies/keydiff.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "kvcull/attention/rope.hpp"
#include "support/catch.hpp"
#include "support/conformance.hpp"
#include "support/hooks.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

const CacheShape small{.layers = 1, .q_heads = 2, .kv_heads = 2, .head_dim = 16};
constexpr Budget roomy{.tokens = 1000};

std::span<const float> key(const Stream& stream, std::size_t head, std::size_t token) {
    const std::size_t dim = stream.shape.head_dim;
    return std::span(stream.k).subspan((head * stream.tokens + token) * dim, dim);
}
double dot(std::span<const float> a, std::span<const float> b) {
    double sum = 0;
    for (std::size_t c = 0; c < a.size(); ++c) sum += static_cast<double>(a[c]) * static_cast<double>(b[c]);
    return sum;
}
double norm(std::span<const float> a) {
    return std::sqrt(dot(a, a));
}
std::vector<position_t> newest(std::size_t kept, std::size_t n) {
    std::vector<position_t> positions;
    for (std::size_t j = n - kept; j < n; ++j) positions.push_back(static_cast<position_t>(j));
    return positions;
}
/// Positions of both heads after a prompt in one call.
template <class P>
std::vector<std::vector<position_t>> keep(const P& policy, const Stream& stream, std::size_t budget) {
    KVCache cache(stream.shape, policy, Budget{.tokens = budget});
    feed_prompt(cache, stream, 0, stream.tokens, stream.tokens);
    return all_positions(cache);
}
template <class P>
std::vector<float> scores(const P& policy, const Stream& stream, std::size_t head) {
    KVCache cache(stream.shape, policy, roomy);
    feed_prompt(cache, stream, 0, stream.tokens, stream.tokens);
    return cache.scores(0, head);
}

}  // namespace

TEST_CASE("KeyDiff in every variant keeps the contract of a policy", "[property]") {
    // In one dimension all unit keys are +1 or -1, and scores tie up to rounding.
    SECTION("defaults") {
        policy_conformance(KeyDiff{}, {.tie_free_dim = 2});
    }
    SECTION("protected rows") {
        policy_conformance(KeyDiff{.sinks = 2, .recent = 4}, {.tie_free_dim = 2});
    }
}

TEST_CASE("KeyNorm in every variant keeps the contract of a policy", "[property]") {
    SECTION("defaults") {
        policy_conformance(KeyNorm{}, {.chunks_do_not_matter = true});
    }
    SECTION("protected rows") {
        policy_conformance(KeyNorm{.sinks = 2, .recent = 4}, {.chunks_do_not_matter = true});
    }
}

TEST_CASE("KeyNorm never evicts from layers that it skips", "[property]") {
    const CacheShape shape{.layers = 3, .q_heads = 4, .kv_heads = 2, .head_dim = 16};
    const Stream stream = random_stream(shape, 60, 1);
    for_each_driver(shape, KeyNorm{.skip_layers = 2}, {.tokens = 10}, [&](auto& cache, const std::string&) {
        feed_prompt(cache, stream, 0, 40, 15);
        feed_decode(cache, stream, 40, 60);
        CHECK(cache.rows(0, 1) == 60);
        CHECK(cache.rows(1, 1) == 60);
        CHECK(cache.rows(2, 1) == 10);
        CHECK(states_fit(cache));
    });
}

TEST_CASE("KeyDiff scores by the cosine with the mean of unit keys", "[differential]") {
    const Stream stream = random_stream(small, 50, 2);
    for_each_driver(small, KeyDiff{}, roomy, [&](auto& cache, const std::string&) {
        feed_prompt(cache, stream, 0, 50, 11);
        for (std::size_t h = 0; h < 2; ++h) {
            std::vector<double> anchor(16);
            for (std::size_t j = 0; j < 50; ++j)
                for (std::size_t c = 0; c < 16; ++c)
                    anchor[c] += static_cast<double>(key(stream, h, j)[c]) / norm(key(stream, h, j)) / 50;
            double length = 0;
            for (const double x : anchor) length += x * x;
            const std::vector<float> got = cache.scores(0, h);
            for (std::size_t j = 0; j < 50; ++j) {
                double want = 0;
                for (std::size_t c = 0; c < 16; ++c)
                    want -= static_cast<double>(key(stream, h, j)[c]) * anchor[c];
                CHECK(close(got[j], want / norm(key(stream, h, j)) / std::sqrt(length), 1e-4, 1e-6));
            }
        }
    });
}

TEST_CASE("KeyDiff has the order of the quadratic form, whose value is n times the anchor's length",
          "[property]") {
    const std::size_t n = 40;
    const Stream stream = random_stream(small, n, 3);
    const std::vector<float> linear = scores(KeyDiff{}, stream, 1);
    std::vector<double> quadratic(n);
    double square = 0;  // sum of all cosines: n^2 |anchor|^2
    for (std::size_t j = 0; j < n; ++j)
        for (std::size_t i = 0; i < n; ++i) {
            const double cosine =
                dot(key(stream, 1, j), key(stream, 1, i)) / norm(key(stream, 1, j)) / norm(key(stream, 1, i));
            quadratic[j] -= cosine;
            square += cosine;
        }
    std::vector<std::size_t> by_linear(n), by_quadratic(n);
    for (std::size_t j = 0; j < n; ++j) {
        CHECK(close(linear[j], quadratic[j] / std::sqrt(square), 1e-4, 1e-6));
        by_linear[j] = by_quadratic[j] = j;
    }
    std::sort(by_linear.begin(), by_linear.end(), [&](auto a, auto b) { return linear[a] < linear[b]; });
    std::sort(by_quadratic.begin(), by_quadratic.end(),
              [&](auto a, auto b) { return quadratic[a] < quadratic[b]; });
    CHECK((by_linear == by_quadratic));
}

TEST_CASE("KeyDiff does not look at the length of a key", "[property]") {
    Stream stream = random_stream(small, 60, 4);
    const auto before = keep(KeyDiff{}, stream, 20);
    const std::vector<float> factors = random_floats(120, 5);
    for (std::size_t row = 0; row < 120; ++row)
        for (std::size_t c = 0; c < 16; ++c)
            stream.k[row * 16 + c] *= std::exp2(std::round(4 * factors[row]));
    CHECK((keep(KeyDiff{}, stream, 20) == before));
}

TEST_CASE("equal keys score -1 under KeyDiff, and the most recent stay", "[property]") {
    Stream stream = random_stream(small, 30, 6);
    for (std::size_t j = 1; j < 30; ++j)
        for (std::size_t h = 0; h < 2; ++h)
            std::copy_n(key(stream, h, 0).begin(), 16,
                        stream.k.begin() + static_cast<std::ptrdiff_t>((h * 30 + j) * 16));
    for (const float score : scores(KeyDiff{}, stream, 1)) CHECK(close(score, -1, 1e-5, 0));
    CHECK((keep(KeyDiff{}, stream, 12)[1] == newest(12, 30)));
    CHECK((keep(KeyNorm{}, stream, 12)[1] == newest(12, 30)));
}

TEST_CASE("a zero key scores 0, which is the best of all norms", "[property]") {
    Stream stream = random_stream(small, 30, 7);
    std::fill_n(stream.k.begin() + 4 * 16, 16, 0.0F);
    CHECK(same_bits(std::abs(scores(KeyDiff{}, stream, 0)[4]), 0.0F));
    CHECK(same_bits(std::abs(scores(KeyNorm{}, stream, 0)[4]), 0.0F));
    CHECK((keep(KeyNorm{}, stream, 1)[0] == std::vector<position_t>{4}));
    std::fill(stream.k.begin(), stream.k.end(), 0.0F);
    for (const float score : scores(KeyDiff{}, stream, 0)) CHECK(same_bits(std::abs(score), 0.0F));
    CHECK((keep(KeyDiff{}, stream, 5)[0] == newest(5, 30)));
}

TEST_CASE("KeyNorm scores by the negative norm, whatever its magnitude", "[differential]") {
    Stream stream = random_stream(small, 30, 8);
    for (std::size_t j = 0; j < 30; ++j)
        for (std::size_t c = 0; c < 16; ++c)
            stream.k[j * 16 + c] *= j % 3 == 0 ? 1e-25F : j % 3 == 1 ? 1.0F : 1e25F;
    for_each_driver(small, KeyNorm{}, roomy, [&](auto& cache, const std::string&) {
        feed_prompt(cache, stream, 0, 20, 6);
        feed_decode(cache, stream, 20, 30);
        const std::vector<float> got = cache.scores(0, 0);
        for (std::size_t j = 0; j < 30; ++j) CHECK(close(got[j], -norm(key(stream, 0, j)), 1e-5, 0.0));
    });
}

TEST_CASE("KeyNorm does not notice RoPE", "[property]") {
    Stream stream = random_stream(small, 60, 9);
    const auto before = keep(KeyNorm{}, stream, 20);
    for (std::size_t row = 0; row < 120; ++row)
        rotate(rope(16), static_cast<position_t>(row % 60), std::span(stream.k).subspan(row * 16, 16));
    CHECK((keep(KeyNorm{}, stream, 20) == before));
}

TEST_CASE("KeyNorm heeds the budget's slack", "[property]") {
    const Stream stream = random_stream(small, 40, 10);
    for_each_driver(small, KeyNorm{}, {.tokens = 10, .slack = 4}, [&](auto& cache, const std::string&) {
        feed_decode(cache, stream, 0, 14);
        CHECK(cache.rows(0, 0) == 14);
        feed_decode(cache, stream, 14, 15);
        CHECK(cache.rows(0, 0) == 10);
    });
}

TEST_CASE("KeyNorm lets be what is below prune_after", "[property]") {
    const Stream stream = random_stream(small, 40, 10);
    for_each_driver(small, KeyNorm{.prune_after = 30}, {.tokens = 10}, [&](auto& cache, const std::string&) {
        feed_prompt(cache, stream, 0, 25, 5);
        CHECK(cache.rows(0, 0) == 25);
        feed_decode(cache, stream, 25, 29);
        CHECK(cache.rows(0, 0) == 29);
        feed_decode(cache, stream, 29, 30);
        CHECK(cache.rows(0, 0) == 10);
        feed_decode(cache, stream, 30, 40);
        CHECK(cache.rows(0, 0) == 20);
        CHECK(states_fit(cache));
    });
}

TEST_CASE("keys that are not finite have the worst norm, and blind KeyDiff", "[property]") {
    for (const float bad :
         {quiet_nan(), std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
        Stream stream = random_stream(small, 30, 11);
        stream.k[20 * 16 + 5] = bad;
        const std::vector<position_t> held = keep(KeyNorm{}, stream, 29)[0];
        CHECK(std::count(held.begin(), held.end(), 20) == 0);
        // The anchor of that head is NaN, so all its scores are: the most recent stay. The other head is
        // well.
        const auto both = keep(KeyDiff{}, stream, 10);
        CHECK((both[0] == newest(10, 30)));
        CHECK_FALSE((both[1] == newest(10, 30)));
    }
}

TEST_CASE("geometry of f16 keys is that of the rounded keys", "[property]") {
    Stream stream = random_stream(small, 60, 12);
    for (float& x : stream.k) x = to_float(to_float16(x));
    CacheShape half = small;
    half.dtype = DType::f16;
    const auto compare = [&](const auto& policy) {
        KVCache wide(small, policy, Budget{.tokens = 20}), narrow(half, policy, Budget{.tokens = 20});
        feed_prompt(wide, stream, 0, 60, 25);
        feed_prompt(narrow, stream, 0, 60, 25);
        CHECK((all_positions(wide) == all_positions(narrow)));
    };
    compare(KeyDiff{});
    compare(KeyNorm{});
}

TEST_CASE("KeyDiff finds the same scores along with attention as from scratch, whatever happens to the rows",
          "[property]") {
    for (const std::size_t slack : {0U, 3U}) {
        Stream stream = random_stream(small, 300, 20 + slack);
        for (std::size_t c = 0; c < small.head_dim; ++c)  // not a number: gone at once, and forgotten
            stream.k[60 * small.head_dim + c] = c == 3 ? quiet_nan() : 1.0F;
        std::vector<std::vector<float>> hooked;
        auto engine =
            check_hooks(KeyDiff{.recent = 2}, stream, slack, hooked, [](const auto& got, const auto& want) {
                bool same = true;
                for (std::size_t j = 0; j < got.size(); ++j)
                    same = same && is_nan(got[j]) == is_nan(want[j]) &&
                           (is_nan(want[j]) || std::abs(got[j] - want[j]) < 1e-5F);
                return same;
            });
        for (const float& x : engine.scores(0, 0)) CHECK(is_finite(x));
    }
}
