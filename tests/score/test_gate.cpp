#include "kvcull/score/gate.hpp"

#include <cmath>
#include <cstddef>
#include <vector>

#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/isas.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

struct Weights {
    std::size_t input, width, heads;
    std::vector<float> w1 = random_floats(width * input, 1), b1 = random_floats(width, 2),
                       w2 = random_floats(width * width, 3), b2 = random_floats(width, 4),
                       w_out = random_floats(heads * width, 5), bias = random_floats(heads, 6);

    [[nodiscard]] RetentionGate<const float> gate(bool deep) const {
        RetentionGate<const float> gate{{w1.data(), width, input},    b1,  {}, {},
                                        {w_out.data(), heads, width}, bias};
        if (deep) {
            gate.w2 = {w2.data(), width, width};
            gate.b2 = b2;
        }
        return gate;
    }
};

double silu_of(double x) {
    return x / (1.0 + std::exp(-x));
}
/// z of one token in double.
std::vector<double> reference_logits(const RetentionGate<const float>& gate, std::span<const float> x) {
    const auto layer = [](const MatrixView<const float>& w, std::span<const float> b,
                          const std::vector<double>& in, bool activate) {
        std::vector<double> out(w.rows);
        for (std::size_t j = 0; j < w.rows; ++j) {
            out[j] = static_cast<double>(b[j]);
            for (std::size_t c = 0; c < w.cols; ++c) out[j] += static_cast<double>(w[j][c]) * in[c];
            if (activate) out[j] = silu_of(out[j]);
        }
        return out;
    };
    std::vector<double> u = layer(gate.w1, gate.b1, {x.begin(), x.end()}, true);
    if (gate.deep()) u = layer(gate.w2, gate.b2, u, true);
    return layer(gate.w_out, gate.bias, u, false);
}

}  // namespace

TEST_CASE("a gate agrees with double loops on every instruction set, width and count", "[differential]") {
    for (const simd::Isa isa : available_isas())
        for (const bool deep : {false, true})
            for (const std::size_t tokens : {std::size_t{0}, std::size_t{1}, gate_tile - 1, gate_tile,
                                             gate_tile + 1, 3 * gate_tile + 2}) {
                CAPTURE(simd::name_of(isa), deep, tokens);
                const Weights weights{.input = 37, .width = 19, .heads = 3};
                const auto gate = weights.gate(deep);
                const std::size_t stride = weights.input + 2;
                const std::vector<float> x = random_floats(tokens * stride, 7);
                std::vector<float> z(weights.heads * (tokens + 5), 77.0F);
                Scratch<float> workspace;
                gate_logits(simd::kernels_for(isa), gate, {x.data(), tokens, weights.input, stride},
                            {z.data(), weights.heads, tokens, tokens + 5}, workspace);
                bool near = true;
                for (std::size_t t = 0; t < tokens; ++t) {
                    const auto want = reference_logits(gate, std::span(x).subspan(t * stride, weights.input));
                    for (std::size_t h = 0; h < weights.heads; ++h)
                        near = near && close(z[h * (tokens + 5) + t], want[h], 1e-5, 1e-4);
                }
                CHECK(near);
                CHECK(same_bits(z.back(), 77.0F));
            }
}

TEST_CASE("log_sigmoid keeps what the sigmoid would round away", "[property]") {
    CHECK(close(log_sigmoid(18.0F), -1.5229979e-8, 1e-6, 0));
    CHECK(log_sigmoid(18.0F) < log_sigmoid(19.0F));
    CHECK(log_sigmoid(80.0F) < 0.0F);
    CHECK(close(log_sigmoid(0.0F), -std::log(2.0), 1e-6, 0));
    CHECK(close(log_sigmoid(-200.0F), -200.0, 1e-6, 0));
    CHECK(is_finite(log_sigmoid(-3e38F)));
    CHECK(log_sigmoid(3e38F) <= 0.0F);
}

TEST_CASE("sigmoid and silu are finite at both ends", "[property]") {
    CHECK(close(sigmoid(-18.0F), 1.5229979e-8, 1e-6, 0));
    CHECK(close(sigmoid(-3e38F), 0.0, 0, 1e-30));
    CHECK(same_bits(sigmoid(3e38F), 1.0F));
    CHECK(close(silu(-3e38F), 0.0, 0, 1e-30));
    CHECK(same_bits(silu(3e38F), 3e38F));
    CHECK(close(silu(1.5F), silu_of(1.5), 1e-6, 0));
    CHECK(close(silu(-1.5F), silu_of(-1.5), 1e-6, 0));
}

TEST_CASE("weights that do not fit one another are refused by name", "[contract]") {
    const Weights weights{.input = 4, .width = 3, .heads = 2};
    const auto text = [&](const auto& spoil) {
        auto gate = weights.gate(true);
        spoil(gate);
        return failure<error::shape_error>([&] { detail::check_gate("gate", gate); });
    };
    CHECK_NOTHROW(detail::check_gate("gate", weights.gate(true)));
    CHECK_NOTHROW(detail::check_gate("gate", weights.gate(false)));
    CHECK(text([](auto& gate) { gate.w1 = {}; }) == "gate: w1 is empty, want [F, D]");
    CHECK(text([](auto& gate) { gate.b1 = gate.b1.first(2); }) == "gate: b1.size() is 2, want 3");
    CHECK(text([](auto& gate) { gate.w2.cols = 2; }) == "gate: w2.cols is 2, want 3");
    CHECK(text([](auto& gate) { gate.w2 = {}; }) == "gate: b2.size() is 3, want 0");
    CHECK(text([](auto& gate) { gate.b2 = {}; }) == "gate: b2.size() is 0, want 3");
    CHECK(text([](auto& gate) { gate.w_out.cols = 4; }) == "gate: w_out.cols is 4, want 3");
    CHECK(text([](auto& gate) { gate.bias = gate.bias.first(1); }) == "gate: bias.size() is 1, want 2");
    Scratch<float> workspace;
    std::vector<float> z(8), x(8);
    CHECK(
        failure<error::shape_error>([&] {
            gate_logits(simd::kernels(), weights.gate(false), {x.data(), 2, 3}, {z.data(), 2, 2}, workspace);
        }) == "gate_logits: x.cols is 3, want 4");
    CHECK(
        failure<error::shape_error>([&] {
            gate_logits(simd::kernels(), weights.gate(false), {x.data(), 2, 4}, {z.data(), 2, 3}, workspace);
        }) == "gate_logits: z.cols is 3, want 2");
}
