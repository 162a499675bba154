#include "kvcull/train/frozen.hpp"

#include <cmath>
#include <numeric>
#include <vector>

#include "support/catch.hpp"
#include "support/failure.hpp"
#include "train/numbers.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {
constexpr std::size_t rows = 3, cols = 5;
MatrixView<double> view(std::vector<double>& values) {
    return {values.data(), rows, cols};
}
}  // namespace

TEST_CASE("the gradient of the norm agrees with central differences", "[differential]") {
    std::vector<double> x = random_doubles(rows * cols, 1), out(x.size()), d_x(x.size(), 1.0);
    std::vector<double> d = random_doubles(rows * cols, 2);
    const std::vector<double> weight = random_doubles(cols, 3);
    const auto loss = [&] {
        train::rms_norm<double>(view(x), weight, 1e-3, view(out));
        return std::inner_product(d.begin(), d.end(), out.begin(), 0.0);
    };
    loss();
    double square = 0.0;
    for (std::size_t c = 0; c < cols; ++c) square += x[c] * x[c];
    CHECK(std::abs(out[2] - x[2] * weight[2] / std::sqrt(square / 5.0 + 1e-3)) < 1e-12);
    train::rms_norm_backward<double>(view(x), weight, 1e-3, view(d), view(d_x));
    for (double& g : d_x) g -= 1.0;  // gradients add up
    CHECK(gradient_error(x, d_x, loss) < 1e-7);
    CHECK(failure<error::shape_error>([&] {
              train::rms_norm<double>(view(x), std::span(weight).first(4), 1e-3, view(out));
          }) == "rms_norm: weight.size() is 4, want 5");
}

TEST_CASE("gradients of SwiGLU agree with central differences and may take its inputs' place",
          "[differential]") {
    std::vector<double> gate = random_doubles(rows * cols, 1, 3.0), up = random_doubles(rows * cols, 2);
    std::vector<double> d = random_doubles(rows * cols, 3), out(d.size());
    const auto loss = [&] {
        train::swiglu<double>(view(gate), view(up), view(out));
        return std::inner_product(d.begin(), d.end(), out.begin(), 0.0);
    };
    std::vector<double> d_gate = gate, d_up = up;
    train::swiglu_backward<double>(view(d_gate), view(d_up), view(d), view(d_gate), view(d_up));
    CHECK(gradient_error(gate, d_gate, loss) < 1e-7);
    CHECK(gradient_error(up, d_up, loss) < 1e-7);
}
