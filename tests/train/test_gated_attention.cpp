#include "kvcull/train/gated_attention.hpp"

#include <cmath>
#include <numeric>
#include <vector>

#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/reference.hpp"
#include "train/numbers.hpp"

using namespace kvcull;
using namespace kvcull::test;
using train::GatedAttention;
using train::TokenRange;

namespace {

/// A sequence, its attention and all gradients.
template <class T>
struct Case {
    std::size_t q_heads, kv_heads, tokens, dim, values;
    std::vector<TokenRange> documents = {{0, tokens}};
    std::vector<T> q = random(q_heads * tokens * dim, 1), k = random(kv_heads * tokens * dim, 2),
                   v = random(kv_heads * tokens * values, 3), log_beta = rates(),
                   d_o = random(q_heads * tokens * values, 5);
    std::vector<T> o = std::vector<T>(d_o.size()), lse = std::vector<T>(q_heads * tokens), d_q = {}, d_k = {},
                   d_v = {}, d_log_beta = {};

    static std::vector<T> random(std::size_t count, std::uint64_t seed) {
        const auto numbers = random_doubles(count, seed);
        return {numbers.begin(), numbers.end()};
    }
    [[nodiscard]] std::vector<T> rates() const {
        std::vector<T> all = random(kv_heads * tokens, 4);
        for (T& x : all) x = -std::abs(x) * T(0.2);
        return all;
    }
    [[nodiscard]] GatedAttention<T> attention() const {
        return {head_major<const T>(q.data(), q_heads, tokens, dim),
                head_major<const T>(k.data(), kv_heads, tokens, dim),
                head_major<const T>(v.data(), kv_heads, tokens, values),
                {log_beta.data(), kv_heads, tokens},
                documents,
                T(1) / std::sqrt(static_cast<T>(dim))};
    }
    /// <d_o, o>
    double forward() {
        attention().forward(head_major(o.data(), q_heads, tokens, values), {lse.data(), q_heads, tokens});
        return std::inner_product(o.begin(), o.end(), d_o.begin(), 0.0);
    }
    void backward() {
        forward();
        d_q.assign(q.size(), 0);
        d_k.assign(k.size(), 0);
        d_v.assign(v.size(), 0);
        d_log_beta.assign(log_beta.size(), 0);
        attention().backward(
            head_major<const T>(o.data(), q_heads, tokens, values), {lse.data(), q_heads, tokens},
            head_major<const T>(d_o.data(), q_heads, tokens, values),
            head_major(d_q.data(), q_heads, tokens, dim), head_major(d_k.data(), kv_heads, tokens, dim),
            head_major(d_v.data(), kv_heads, tokens, values), {d_log_beta.data(), kv_heads, tokens});
    }
};

/// Output of one head's token by the formula.
std::vector<double> reference(const Case<double>& c, std::size_t h, std::size_t t, std::size_t begin) {
    const std::size_t g = h / (c.q_heads / c.kv_heads);
    std::vector<double> out(c.values);
    double sum = 0.0;
    for (std::size_t i = begin; i <= t; ++i) {
        double s = 0.0;
        for (std::size_t e = 0; e < c.dim; ++e)
            s += c.q[(h * c.tokens + t) * c.dim + e] * c.k[(g * c.tokens + i) * c.dim + e];
        s = s / std::sqrt(static_cast<double>(c.dim)) +
            (t > i ? static_cast<double>(t - i) * c.log_beta[g * c.tokens + i] : 0.0);
        const double weight = std::exp(s);
        sum += weight;
        for (std::size_t e = 0; e < c.values; ++e) out[e] += weight * c.v[(g * c.tokens + i) * c.values + e];
    }
    for (double& x : out) x /= sum;
    return out;
}

}  // namespace

TEST_CASE("gated attention is the softmax of logits plus decays, in tiles and documents", "[differential]") {
    for (const std::size_t tokens : {1U, 31U, 32U, 33U, 70U}) {
        Case<double> c{.q_heads = 4, .kv_heads = 2, .tokens = tokens, .dim = 3, .values = 5};
        if (tokens == 70) c.documents = {{0, 10}, {10, 11}, {11, 70}};
        c.log_beta[0] = -1e300 * 1e300;  // visible to itself only
        c.forward();
        double worst = 0.0;
        for (const TokenRange& document : c.documents)
            for (std::size_t t = document.begin; t < document.end; ++t)
                for (std::size_t h = 0; h < 4; ++h) {
                    const auto want = reference(c, h, t, document.begin);
                    for (std::size_t e = 0; e < 5; ++e)
                        worst = std::max(worst, std::abs(want[e] - c.o[(h * tokens + t) * 5 + e]));
                }
        CHECK(worst < 1e-12);
    }
}

TEST_CASE("gradients of gated attention agree with central differences", "[differential]") {
    for (const bool packed : {false, true}) {
        Case<double> c{.q_heads = 4, .kv_heads = 2, .tokens = 37, .dim = 3, .values = 2};
        if (packed) c.documents = {{0, 5}, {5, 37}};
        c.backward();
        const auto loss = [&] { return c.forward(); };
        CHECK(gradient_error(c.q, c.d_q, loss) < 1e-7);
        CHECK(gradient_error(c.k, c.d_k, loss) < 1e-7);
        CHECK(gradient_error(c.v, c.d_v, loss) < 1e-7);
        CHECK(gradient_error(c.log_beta, c.d_log_beta, loss) < 1e-7);
        CHECK(same_bits(static_cast<float>(c.d_log_beta.back()), 0.0F));  // nobody comes after the last token
    }
}

TEST_CASE("a token that keeps nothing has no gradient and makes no NaN", "[property]") {
    Case<float> c{.q_heads = 2, .kv_heads = 1, .tokens = 40, .dim = 4, .values = 4};
    c.log_beta[3] = negative_infinity();
    c.backward();
    CHECK(same_bits(c.d_log_beta[3], 0.0F));
    for (const auto* all : {&c.o, &c.lse, &c.d_q, &c.d_k, &c.d_v, &c.d_log_beta})
        for (const float& x : *all) REQUIRE(is_finite(x));
}

TEST_CASE("float and double agree", "[differential]") {
    Case<double> wide{.q_heads = 4, .kv_heads = 2, .tokens = 65, .dim = 9, .values = 7};
    Case<float> narrow{.q_heads = 4, .kv_heads = 2, .tokens = 65, .dim = 9, .values = 7};
    wide.backward();
    narrow.backward();
    const auto agree = [](const std::vector<float>& a, const std::vector<double>& b) {
        for (std::size_t i = 0; i < a.size(); ++i)
            if (!close(a[i], b[i], 1e-4, 1e-4)) return false;
        return a.size() == b.size();
    };
    CHECK(agree(narrow.o, wide.o));
    CHECK(agree(narrow.lse, wide.lse));
    CHECK(agree(narrow.d_q, wide.d_q));
    CHECK(agree(narrow.d_k, wide.d_k));
    CHECK(agree(narrow.d_v, wide.d_v));
    CHECK(agree(narrow.d_log_beta, wide.d_log_beta));
}

TEST_CASE("copying query heads doubles the gradient of the rates", "[property]") {
    Case<double> once{.q_heads = 1, .kv_heads = 1, .tokens = 20, .dim = 3, .values = 3};
    Case<double> twice{.q_heads = 2, .kv_heads = 1, .tokens = 20, .dim = 3, .values = 3};
    const auto copy = [](const std::vector<double>& from, std::vector<double>& to) {
        std::copy(from.begin(), from.end(), to.begin());
        std::copy(from.begin(), from.end(), to.begin() + static_cast<std::ptrdiff_t>(from.size()));
    };
    copy(once.q, twice.q);
    copy(once.d_o, twice.d_o);
    once.backward();
    twice.backward();
    for (std::size_t i = 0; i < 20; ++i)
        CHECK(std::abs(twice.d_log_beta[i] - 2 * once.d_log_beta[i]) < 1e-12);
}

TEST_CASE("gated attention refuses shapes that do not fit by name", "[contract]") {
    Case<double> c{.q_heads = 4, .kv_heads = 2, .tokens = 6, .dim = 3, .values = 2};
    const auto text = [&](const auto& spoil) {
        GatedAttention<double> attention = c.attention();
        spoil(attention);
        return failure<error::shape_error>([&] {
            attention.forward(head_major(c.o.data(), 4, 6, 2), {c.lse.data(), 4, 6});
        });
    };
    CHECK(text([](auto& a) { a.k.heads = 3; }) ==
          "GatedAttention::forward: q.heads is 4, want a multiple of k.heads = 3");
    CHECK(text([](auto& a) { a.k.tokens = 5; }) == "GatedAttention::forward: k.tokens is 5, want 6");
    CHECK(text([](auto& a) { a.v.dim = 3; }) == "GatedAttention::forward: o.dim is 2, want 3");
    CHECK(text([](auto& a) { a.log_beta.rows = 4; }) ==
          "GatedAttention::forward: log_beta.rows is 4, want 2");
    CHECK(text([](auto& a) { a.documents = {}; }) ==
          "GatedAttention::forward: end of the last document is 0, want 6");
}
