#include "kvcull/train/capacity.hpp"

#include <cmath>
#include <vector>

#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/reference.hpp"
#include "train/numbers.hpp"

using namespace kvcull;
using namespace kvcull::test;
using train::CapacityLoss;
using train::TokenRange;
using Mode = CapacityLoss::Mode;

namespace {

struct Streams {
    std::size_t streams, tokens;
    std::vector<TokenRange> documents;
    std::vector<double> log_beta;

    [[nodiscard]] std::vector<double> sizes() const {
        std::vector<double> all(log_beta.size());
        for (std::size_t r = 0; r < streams; ++r)
            CapacityLoss::soft_sizes<double>(std::span(log_beta).subspan(r * tokens, tokens), documents,
                                             std::span(all).subspan(r * tokens, tokens));
        return all;
    }
    double loss(const CapacityLoss& capacity, MatrixView<double> gradient = {}, double weight = 1.0) const {
        return capacity(MatrixView<const double>(log_beta.data(), streams, tokens), documents, sizes(),
                        gradient, weight);
    }
};

/// Rates that leave no weight near where it counts no more: differences stay smooth.
Streams slow_streams(bool packed) {
    Streams s{3, 50, {{0, 50}}, random_doubles(150, 6)};
    for (double& x : s.log_beta) x = -0.005 - 0.1 * std::abs(x);
    if (packed) s.documents = {{0, 8}, {8, 30}, {30, 50}};
    return s;
}
/// The loss by the definition.
double reference(const Streams& s, Mode mode, double budget) {
    double total = 0.0, active = 0.0;
    const std::size_t streams = s.streams;
    for (const TokenRange& document : s.documents)
        for (std::size_t t = document.begin; t < document.end; ++t) {
            const double most = budget < 1.0 ? budget * static_cast<double>(document.size()) : budget;
            const auto at = static_cast<double>(t - document.begin), r = static_cast<double>(streams);
            double all = 0.0;
            for (std::size_t stream = 0; stream < streams; ++stream) {
                double size = 0.0;
                for (std::size_t i = document.begin; i <= t; ++i)
                    size += std::exp(static_cast<double>(t - i) * s.log_beta[stream * s.tokens + i]);
                all += size;
                const double over = std::max(0.0, size - most);
                if (mode == Mode::active && over > 0.0) {
                    total += over / std::max(1.0, at - most);
                    active += 1.0;
                }
                if (mode == Mode::paper) total += over / (at + 1.0) / static_cast<double>(streams * s.tokens);
            }
            if (mode == Mode::global && all > r * most) {
                total += (all - r * most) / std::max(1.0, r * (at - most));
                active += 1.0;
            }
        }
    return mode == Mode::paper || active == 0.0 ? total : total / active;
}

}  // namespace

TEST_CASE("the capacity loss and its gradient agree with their definition", "[differential]") {
    for (const bool packed : {false, true})
        for (const Mode mode : {Mode::active, Mode::paper, Mode::global})
            for (const double budget : {1.0, 4.0, 0.2}) {
                CAPTURE(packed, static_cast<int>(mode), budget);
                Streams s = slow_streams(packed);
                const CapacityLoss capacity{mode, budget};
                std::vector<double> gradient(s.log_beta.size());
                const double loss = s.loss(capacity, {gradient.data(), 3, 50}, 0.5);
                CHECK(std::abs(loss - reference(s, mode, budget)) < 1e-9);
                CHECK(loss > 0.0);
                CHECK(gradient_error(s.log_beta, gradient, [&] { return 0.5 * reference(s, mode, budget); }) <
                      1e-7);
                for (const double x : gradient) CHECK(x >= 0.0);
            }
}

TEST_CASE("soft sizes have their closed forms", "[property]") {
    Streams s{1, 300, {{0, 300}}, std::vector<double>(300, 0.0)};
    std::vector<double> sizes = s.sizes();
    for (std::size_t t = 0; t < 300; ++t) REQUIRE(std::abs(sizes[t] - static_cast<double>(t + 1)) < 1e-12);
    s.log_beta.assign(300, std::log(0.9));
    sizes = s.sizes();
    double worst = 0.0;
    for (std::size_t t = 0; t < 300; ++t)
        worst = std::max(worst, std::abs(sizes[t] - (1.0 - std::pow(0.9, static_cast<double>(t + 1))) / 0.1));
    CHECK(worst < 1e-6);  // what has decayed below 1e-9 counts no more
    s.log_beta.assign(300, -1e300 * 1e300);
    for (const double size : s.sizes()) REQUIRE(std::abs(size - 1.0) < 1e-12);
}

TEST_CASE("rows at or below the budget have no loss and no gradient", "[property]") {
    for (const Mode mode : {Mode::active, Mode::paper, Mode::global}) {
        const Streams s{2, 6, {{0, 6}}, std::vector<double>(12, 0.0)};  // S = t + 1 reaches 6
        std::vector<double> gradient(12);
        CHECK(s.loss({mode, 6.0}, {gradient.data(), 2, 6}) <= 0.0);
        for (const double x : gradient) CHECK(x <= 0.0);
        CHECK(s.loss({mode, 5.0}, {gradient.data(), 2, 6}) > 0.0);
        CHECK(gradient[5] <= 0.0);  // of the last token
        CHECK(gradient[4] > 0.0);
    }
    const Streams none{0, 0, {}, {}};
    CHECK(none.loss({}) <= 0.0);
}

TEST_CASE("tokens that vanish quickly cost no accuracy", "[differential]") {
    Streams s{2, 400, {{0, 400}}, random_doubles(800, 9)};
    for (std::size_t i = 0; i < 800; ++i)
        s.log_beta[i] = -std::abs(s.log_beta[i]) * (i % 5 == 0 ? 1e-3 : 2.0);
    for (const Mode mode : {Mode::active, Mode::paper, Mode::global}) {
        std::vector<double> gradient(800);
        CHECK(std::abs(s.loss({mode, 10.0}, {gradient.data(), 2, 400}) - reference(s, mode, 10.0)) < 1e-7);
        const std::size_t slow = 15;  // Horner from the end against the sum
        const double step = 1e-7, before = s.log_beta[slow];
        s.log_beta[slow] = before + step;
        const double above = reference(s, mode, 10.0);
        s.log_beta[slow] = before - step;
        const double below = reference(s, mode, 10.0);
        s.log_beta[slow] = before;
        CHECK(std::abs((above - below) / (2 * step) - gradient[slow]) < 1e-6);
    }
}

TEST_CASE("the capacity loss refuses what does not fit by name", "[contract]") {
    const Streams s = slow_streams(false);
    std::vector<double> gradient(150);
    CHECK(failure<error::shape_error>([&] {
              s.loss({}, {gradient.data(), 2, 50});
          }) == "CapacityLoss: d_log_beta.rows is 2, want 3");
    CHECK(failure<error::config_error>([&] {
              s.loss({Mode::active, 0.0});
          }).starts_with("CapacityLoss: budget"));
    Streams holes = s;
    holes.documents = {{0, 40}};
    CHECK(failure<error::shape_error>([&] {
              CapacityLoss{}(MatrixView<const double>(s.log_beta.data(), 3, 50), holes.documents, s.sizes(),
                             MatrixView<double>{});
          }) == "CapacityLoss: end of the last document is 40, want 50");
}
