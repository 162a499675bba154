#pragma once
/// What tests of gradients share: random double arrays, and central differences.

#include <cmath>
#include <cstddef>
#include <vector>

#include "support/random.hpp"

namespace kvcull::test {

inline std::vector<double> random_doubles(std::size_t count, std::uint64_t seed, double scale = 1.0) {
    const std::vector<float> floats = random_floats(count, seed, static_cast<float>(scale));
    return {floats.begin(), floats.end()};
}

/// Largest difference between `gradient` and the central difference of `loss()` in each of `values`, relative
/// to the gradient's largest magnitude or 1.
template <class Loss>
double gradient_error(std::vector<double>& values, const std::vector<double>& gradient, const Loss& loss,
                      double step = 1e-6) {
    double worst = 0.0, largest = 1.0;
    for (std::size_t i = 0; i < values.size(); ++i) {
        const double before = values[i];
        values[i] = before + step;
        const double above = loss();
        values[i] = before - step;
        const double below = loss();
        values[i] = before;
        worst = std::max(worst, std::abs((above - below) / (2.0 * step) - gradient[i]));
        largest = std::max(largest, std::abs(gradient[i]));
    }
    return worst / largest;
}

}  // namespace kvcull::test
