#include "replay/replay.hpp"

#include <algorithm>
#include <cmath>
#include <kvcull/base/error.hpp>
#include <limits>

#include "common/named_policies.hpp"
#include "random_trace.hpp"
#include "support/catch.hpp"
#include "support/reference.hpp"

namespace {

using replay::Outcome;
using replay::Trace;
using replay::test::random_trace;

/// One layer and head of one channel: attention weights are k (q is 1, the keys their logarithms), at a
/// prompt of all but the last token.
Trace by_hand(const std::vector<float>& weights, const std::vector<float>& values) {
    Trace trace;
    trace.shape = {.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 1, .scale = 1};
    trace.prompt = weights.size() - 1;
    for (std::size_t t = 0; t < weights.size(); ++t) trace.positions.push_back(static_cast<int>(t));
    trace.layers.resize(1);
    trace.layers[0].q.assign(weights.size(), 1.0F);
    for (const float weight : weights) trace.layers[0].k.push_back(std::log(weight));
    trace.layers[0].v = values;
    return trace;
}

TEST_CASE("error and mass are those computed by hand", "[replay][differential]") {
    // the last row sees tokens 0 and 2 of the prompt, and itself
    const replay::Setting setting{"streaming:sinks=1", {.tokens = 2}};
    const Outcome outcome = run(by_hand({1, 2, 3, 4}, {1, 2, 3, 4}), setting);
    CHECK(outcome.mean_mass == Approx(0.8));
    CHECK(outcome.mean_error == Approx(0.25 / 3));  // (0.1 + 0.9 + 1.6) / 0.8 beside 3
    CHECK(outcome.worst_error == outcome.mean_error);
    CHECK(outcome.until == std::vector<std::int64_t>{4, 0, 3, 4});
    CHECK(outcome.seen == std::vector<std::int64_t>{3, 4});

    const Outcome cancelled = run(by_hand({1, 1, 1, 1}, {1, -1, 0, 0}), setting);
    CHECK(cancelled.mean_error == 1.0);  // the full output is zero, this one is not
    CHECK(run(by_hand({1, 1, 1, 1}, {0, 0, 0, 0}), setting).mean_error == 0.0);
}

TEST_CASE("measures agree with naive loops for grouped heads and any chunk", "[replay][differential]") {
    constexpr std::size_t sinks = 2, budget = 10, recent = budget - sinks;
    const Trace trace = random_trace();
    const std::size_t n = trace.size();
    double error = 0, mass = 0, worst = 0, least = 1;
    std::size_t rows = 0;
    for (const Trace::Layer& layer : trace.layers)
        for (std::size_t head = 0; head < 4; ++head)
            for (std::size_t t = trace.prompt; t < n; ++t) {
                const std::span k = std::span(layer.k).subspan(head / 2 * n * 8, n * 8);
                const std::span v = std::span(layer.v).subspan(head / 2 * n * 6, n * 6);
                const std::span q = std::span(layer.q).subspan((head * n + t) * 8, 8);
                const kvcull::Visible all[]{{0, 0, t + 1}}, held[]{{sinks, t - recent, t + 1}};
                const double scale = 1 / std::sqrt(8.0);
                const auto full = kvcull::test::reference_attention(q, k, v, all, n, 8, 6, scale);
                const auto some = kvcull::test::reference_attention(q, k, v, held, n, 8, 6, scale);
                double difference = 0, norm = 0, kept = 0;
                for (std::size_t c = 0; c < 6; ++c) {
                    difference += std::pow(some.output[c] - full.output[c], 2);
                    norm += std::pow(full.output[c], 2);
                }
                for (std::size_t j = 0; j <= t; ++j)
                    if (kvcull::test::is_visible(held[0], j)) kept += full.attention[j];
                error += std::sqrt(difference / norm);
                worst = std::max(worst, std::sqrt(difference / norm));
                mass += kept;
                least = std::min(least, kept);
                ++rows;
            }

    const std::size_t chunk = GENERATE(0U, 7U, 1U, 25U, 100U);
    CAPTURE(chunk);
    const Outcome got = run(trace, {"streaming:sinks=2", {.tokens = budget}}, chunk);
    CHECK(got.mean_error == Approx(error / static_cast<double>(rows)).epsilon(1e-4));
    CHECK(got.worst_error == Approx(worst).epsilon(1e-4));
    CHECK(got.mean_mass == Approx(mass / static_cast<double>(rows)).epsilon(1e-4));
    CHECK(got.least_mass == Approx(least).epsilon(1e-4));
    CHECK(got.rows == budget);
    CHECK(got.peak_rows == (chunk == 0 || chunk >= 25 ? 25 : budget + chunk));
    CHECK(got.seconds > 0);
    CHECK(got.full_seconds > 0);

    REQUIRE(got.until.size() == 4 * n);
    for (std::size_t i = 0; i < got.until.size(); ++i) {
        const auto t = static_cast<std::int64_t>(i % n);
        std::int64_t until = 0;
        for (const std::int64_t seen : got.seen)
            if (seen > t && (t < std::int64_t{sinks} || t >= seen - std::int64_t{recent})) until = seen;
        CHECK(got.until[i] == until);
    }
}

TEST_CASE("a budget that holds everything costs nothing under any policy", "[replay][property]") {
    const Trace trace = random_trace(GENERATE(kvcull::DType::f32, kvcull::DType::f16, kvcull::DType::bf16));
    for (const std::string& policy : examples::NamedPolicies::names()) {
        CAPTURE(policy);
        const Outcome outcome = run(trace, {policy, {.tokens = 64}}, 10);
        CHECK(outcome.worst_error == 0.0);
        CHECK(outcome.least_mass == Approx(1.0));
        CHECK(outcome.rows == 40);
        CHECK(outcome.peak_rows == 40);
        CHECK(outcome.until == std::vector<std::int64_t>(outcome.until.size(), 40));
        CHECK(outcome.bytes >= outcome.full_bytes);
    }
}

TEST_CASE("of policies that look ahead, the tokens after the prompt vote", "[replay][property]") {
    const Trace trace = random_trace();
    const Outcome before = run(trace, {"snapkv:window=4,pool=none", {.tokens = 12}}),
                  none = run(trace, {"laq++:window=4,lookahead=0,pool=none", {.tokens = 12}}),
                  ahead = run(trace, {"laq:lookahead_window=4,lookahead=99,pool=none", {.tokens = 12}});
    CHECK(none.until == before.until);
    CHECK(ahead.rows == before.rows);
    CHECK(ahead.mean_mass > before.mean_mass);
}

TEST_CASE("rows are stored as the trace has them, at positions of the trace", "[replay][property]") {
    const replay::Setting setting{"keydiff", {.ratio = 0.5}};
    const Outcome wide = run(random_trace(), setting);
    CHECK(wide.rows == 12);  // of a prompt of 25
    CHECK(wide.bytes < wide.peak_bytes);
    CHECK(wide.peak_bytes < wide.full_bytes);
    CHECK(run(random_trace(kvcull::DType::f16), setting).full_bytes < wide.full_bytes);

    Trace gaps = random_trace();
    for (auto& position : gaps.positions) position = 3 * position + 5;
    CHECK(run(gaps, setting).until == wide.until);
}

TEST_CASE("rows of another type cost what their rounding costs, and less memory", "[replay][property]") {
    const Trace trace = random_trace();
    double before = 0;
    std::size_t bytes = run(trace, {"full", {.tokens = 40}}).bytes;
    for (const kvcull::DType type : {kvcull::DType::f16, kvcull::DType::int8, kvcull::DType::int4}) {
        const Outcome outcome = run(trace, {"full", {.tokens = 40}, "", type});
        CAPTURE(name_of(type));
        CHECK(outcome.mean_error > before);
        CHECK(outcome.mean_error < 0.3);
        CHECK(outcome.least_mass == Approx(1.0));
        CHECK(outcome.bytes <= bytes);  // dims of 8 and 6 fill a quarter of a group
        before = outcome.mean_error;
        if (type == kvcull::DType::f16) bytes = 2 * bytes;
    }
}

TEST_CASE("rows beyond a type's range cost everything, numbers beyond a float's are refused",
          "[replay][contract]") {
    Trace trace = random_trace();
    for (float& x : trace.layers[0].v) x *= 1e6F;
    const Outcome narrow = run(trace, {"full", {.tokens = 40}, "", kvcull::DType::f16});
    CHECK(narrow.worst_error == std::numeric_limits<double>::infinity());
    CHECK(narrow.mean_error == std::numeric_limits<double>::infinity());
    std::fill(trace.layers[0].q.begin(), trace.layers[0].q.end(), 1e20F);
    std::fill(trace.layers[0].k.begin(), trace.layers[0].k.end(), 1e20F);
    CHECK_THROWS_AS(run(trace, {"full", {.tokens = 40}}), kvcull::error::format_error);
}

TEST_CASE("an illegal setting is refused before anything runs", "[replay][contract]") {
    using kvcull::error::config_error;
    const Trace trace = random_trace();
    CHECK_NOTHROW(check(trace, {"snapkv:window=4", {.tokens = 8}}));
    CHECK_THROWS_WITH(check(trace, {"lru", {.tokens = 8}}), contains_text("want one of full, streaming"));
    CHECK_THROWS_AS(check(trace, {"snapkv", {.tokens = 8}}), config_error);
    CHECK_THROWS_AS(check(trace, {"snapkv", {.ratio = 0.5}}), config_error);
    CHECK_THROWS_WITH(check(trace, {"trimkv", {.tokens = 8}}), contains_text("that a trace does not hold"));
}

}  // namespace
