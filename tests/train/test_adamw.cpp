#include "kvcull/train/adamw.hpp"

#include <cmath>
#include <vector>

#include "support/catch.hpp"
#include "support/failure.hpp"

using namespace kvcull;
using namespace kvcull::test;
using train::AdamW;
using train::Schedule;

namespace {
bool near(double a, double b) {
    return std::abs(a - b) <= 1e-12 * (1.0 + std::abs(b));
}
}  // namespace

TEST_CASE("the rate rises in a line from 0 and falls in a cosine", "[property]") {
    const Schedule schedule{.rate = 2.0, .least = 0.5, .warmup = 4, .steps = 24};
    CHECK(near(schedule(0), 0.0));
    CHECK(near(schedule(1), 0.5));
    CHECK(near(schedule(4), 2.0));
    CHECK(near(schedule(14), 1.25));
    CHECK(near(schedule(24), 0.5));
    CHECK(schedule(20) < schedule(19));
    CHECK(near(Schedule{.rate = 2.0, .least = 0.5, .warmup = 0, .steps = 0}(0), 2.0));
    CHECK(near(Schedule{.rate = 2.0, .least = 0.5, .warmup = 8, .steps = 4}(2), 0.5));
}

TEST_CASE("clipping scales a norm to the limit and leaves lesser ones alone", "[property]") {
    const std::vector<float> gradient{3.0F, 4.0F};
    const double norm = std::sqrt(train::squared_norm<float>(gradient));
    CHECK(near(norm, 5.0));
    CHECK(near(train::clip_factor(norm, 1.0), 1.0 / (5.0 + 1e-6)));
    CHECK(near(train::clip_factor(0.5, 1.0), 1.0));
    CHECK(near(train::clip_factor(0.0, 1.0), 1.0));
}

TEST_CASE("a step of AdamW decays first and then follows the corrected moments", "[differential]") {
    const AdamW adam{.beta1 = 0.8, .beta2 = 0.9, .eps = 1e-3, .weight_decay = 0.1};
    const double rate = 0.05, scale = 0.5;
    for (const bool decays : {true, false}) {
        std::vector<double> p{1.0, -2.0}, m(2), v(2);
        double want = 1.0, mean = 0.0, variance = 0.0;
        for (std::size_t step = 1; step <= 3; ++step) {
            const std::vector<double> gradient{0.4 * static_cast<double>(step), 0.0};
            adam.update<double>(p, gradient, m, v, step, rate, decays, scale);
            const double g = scale * gradient[0];
            if (decays) want *= 1.0 - rate * 0.1;
            mean = 0.8 * mean + 0.2 * g;
            variance = 0.9 * variance + 0.1 * g * g;
            want -= rate * (mean / (1.0 - std::pow(0.8, step))) /
                    (std::sqrt(variance / (1.0 - std::pow(0.9, step))) + 1e-3);
            CHECK(near(p[0], want));
        }
        CHECK(near(m[0], mean));
        CHECK(near(v[0], variance));
        CHECK(near(p[1], decays ? -2.0 * std::pow(0.995, 3) : -2.0));
    }
}

TEST_CASE("AdamW undoes the small factor that all gradients of a gate carry", "[property]") {
    std::vector<double> large(1), small(1), m(2), v(2);
    const AdamW adam{.eps = 1e-15};
    const std::vector<double> one{1.0}, tiny{1.5e-8};
    const std::span<double> mean(m), variance(v);
    adam.update<double>(large, one, mean.first(1), variance.first(1), 1, 0.1, false);
    adam.update<double>(small, tiny, mean.last(1), variance.last(1), 1, 0.1, false);
    CHECK(std::abs(large[0] - small[0]) < 1e-6);
}

TEST_CASE("AdamW refuses sizes that differ, before anything changes", "[contract]") {
    std::vector<double> p{1.0, 1.0}, m(2), v(1);
    const std::vector<double> g{1.0, 1.0};
    CHECK(failure<error::shape_error>([&] { AdamW{}.update<double>(p, g, m, v, 1, 0.1, true); }) ==
          "AdamW::update: variance.size() is 1, want 2");
    v.resize(2);
    CHECK(failure<error::shape_error>([&] { AdamW{}.update<double>(p, g, m, v, 0, 0.1, true); }) ==
          "AdamW::update: step is 0, want at least 1");
    CHECK(near(p[0], 1.0));
    CHECK(near(m[0], 0.0));
}
