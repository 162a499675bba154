#include "kvcull/train/gate.hpp"

#include <numeric>
#include <vector>

#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/reference.hpp"
#include "train/numbers.hpp"

using namespace kvcull;
using namespace kvcull::test;
using train::GateTensors;
using train::GateTrace;

namespace {

constexpr std::size_t input = 5, width = 4, heads = 2, tokens = 7;

GateTensors<double> random_gate(bool deep) {
    GateTensors<double> gate(input, width, heads, deep);
    const auto numbers = random_doubles(gate.values().size(), 3);
    std::copy(numbers.begin(), numbers.end(), gate.values().begin());
    return gate;
}

}  // namespace

TEST_CASE("the tensors of a gate tile its memory in order", "[property]") {
    for (const bool deep : {false, true}) {
        GateTensors<float> gate(input, width, heads, deep);
        std::size_t next = 0;
        for (const auto& part : gate.parts()) {
            CHECK(part.first == next);
            next += part.size;
        }
        CHECK(next == gate.values().size());
        CHECK(gate.parts().size() == (deep ? 6 : 4));
        CHECK_NOTHROW(detail::check_gate("gate", gate.view()));
        gate.view().bias[1] = 3.0F;
        CHECK(same_bits(gate.values().back(), 3.0F));
        const GateTensors<float> copy = gate;
        CHECK(same_bits(copy.view().bias[1], 3.0F));
    }
}

TEST_CASE("gradients of a gate agree with central differences", "[differential]") {
    for (const bool deep : {false, true}) {
        CAPTURE(deep);
        GateTensors<double> gate = random_gate(deep);
        std::vector<double> x = random_doubles(tokens * input, 4);
        const std::vector<double> d = random_doubles(heads * tokens, 5);
        std::vector<double> log_beta(heads * tokens);
        GateTrace<double> trace;
        const auto loss = [&] {
            train::gate_forward<double>(gate.view(), MatrixView<const double>(x.data(), tokens, input), trace,
                                        {log_beta.data(), heads, tokens});
            return std::inner_product(d.begin(), d.end(), log_beta.begin(), 0.0);
        };
        loss();
        GateTensors<double> gradient(input, width, heads, deep);
        std::vector<double> d_x(x.size());
        const auto backward = [&](const MatrixView<double>& to) {
            train::gate_backward<double>(gate.view(), MatrixView<const double>(x.data(), tokens, input),
                                         trace, MatrixView<const double>(d.data(), heads, tokens),
                                         gradient.view(), to);
        };
        backward({d_x.data(), tokens, input});
        CHECK(gradient_error(x, d_x, loss) < 1e-7);
        std::vector<double> weights(gate.values().begin(), gate.values().end());
        const std::vector<double> want(gradient.values().begin(), gradient.values().end());
        CHECK(gradient_error(weights, want, [&] {
                  std::copy(weights.begin(), weights.end(), gate.values().begin());
                  return loss();
              }) < 1e-7);
        std::copy(weights.begin(), weights.end(), gate.values().begin());
        loss();
        backward({});  // gradients add up; that of x may be left out
        for (std::size_t i = 0; i < want.size(); ++i)
            CHECK(std::abs(gradient.values()[i] - 2 * want[i]) < 1e-12);
    }
}

TEST_CASE("the gradient of a gate does not vanish where beta rounds to 1", "[property]") {
    GateTensors<float> gate(1, 1, 1);
    gate.view().bias[0] = 18.0F;
    const float x = 1.0F, d = 1.0F;
    float log_beta = 0.0F;
    GateTrace<float> trace;
    train::gate_forward<float>(gate.view(), MatrixView<const float>(&x, 1, 1), trace, {&log_beta, 1, 1});
    GateTensors<float> gradient(1, 1, 1);
    train::gate_backward<float>(gate.view(), MatrixView<const float>(&x, 1, 1), trace,
                                MatrixView<const float>(&d, 1, 1), gradient.view(), {});
    CHECK(close(log_beta, -1.523e-8, 1e-3, 0));
    CHECK(close(gradient.view().bias[0], 1.523e-8, 1e-3, 0));
}

TEST_CASE("a gate's arguments that do not fit are refused by name", "[contract]") {
    const GateTensors<double> gate = random_gate(false);
    GateTensors<double> wrong(input, width + 1, heads), right(input, width, heads);
    std::vector<double> x(40);
    GateTrace<double> trace;
    const auto in = [&](std::size_t rows, std::size_t cols) {
        return MatrixView<const double>(x.data(), rows, cols);
    };
    std::vector<double> out(20);
    CHECK(failure<error::shape_error>([&] {
              train::gate_forward<double>(gate.view(), in(3, 4), trace, {out.data(), heads, 3});
          }) == "gate_forward: x.cols is 4, want 5");
    CHECK(failure<error::shape_error>([&] {
              train::gate_forward<double>(gate.view(), in(3, 5), trace, {out.data(), heads, 4});
          }) == "gate_forward: log_beta.cols is 4, want 3");
    train::gate_forward<double>(gate.view(), in(3, 5), trace, {out.data(), heads, 3});
    CHECK(failure<error::shape_error>([&] {
              train::gate_backward<double>(gate.view(), in(4, 5), trace, in(heads, 4), right.view(), {});
          }) == "gate_backward: trace.z.size() is 6, want 8");
    CHECK(failure<error::shape_error>([&] {
              train::gate_backward<double>(gate.view(), in(3, 5), trace, in(heads, 3), wrong.view(), {});
          }) == "gate_backward: d_gate.w1.rows is 5, want 4");
}
