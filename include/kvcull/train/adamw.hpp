#pragma once
/// AdamW with the learning rate and the clipping of TRIM-KV's recipe.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numbers>
#include <span>

#include "../base/error.hpp"

namespace kvcull::inline KVCULL_ABI::train {

/// Linear from 0 over `warmup` steps (the first step has rate 0), then a cosine down to `least`.
struct Schedule {
    double rate = 2e-4, least = 1e-6;
    std::size_t warmup = 100, steps = 10000;

    /// Of step 0, 1, ..
    [[nodiscard]] double operator()(std::size_t step) const noexcept {
        if (step < warmup) return rate * static_cast<double>(step) / static_cast<double>(warmup);
        const double done = static_cast<double>(step - warmup) /
                            static_cast<double>(std::max<std::size_t>(1, steps - std::min(steps, warmup)));
        const double share = (1.0 + std::cos(std::numbers::pi * done)) / 2.0;
        return rate * share + least * (1.0 - share);
    }
};

/// Sum of squares, to be added over all tensors before the root is taken.
template <class T>
[[nodiscard]] double squared_norm(std::span<const T> gradient) noexcept {
    double sum = 0.0;
    for (const T x : gradient) sum += static_cast<double>(x) * static_cast<double>(x);
    return sum;
}
/// What gradients of such a norm are scaled by so that it does not exceed `limit`.
[[nodiscard]] inline double clip_factor(double norm, double limit) noexcept {
    return std::min(1.0, limit / (norm + 1e-6));
}

/// Adam with decoupled weight decay (arXiv 1711.05101). Its division by the second moment undoes the factor
/// sigmoid(-bias) that every gradient of a gate carries.
struct AdamW {
    double beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.01;

    /// One tensor. @param step  counts from 1 @param scale  of the gradient, as `clip_factor` gives it
    /// @param decays  false for biases @throws shape_error if sizes differ, before anything changes
    template <class T>
    void update(std::span<T> parameters, std::span<const T> gradient, std::span<T> mean,
                std::span<T> variance, std::size_t step, double rate, bool decays, double scale = 1.0) const {
        constexpr std::string_view where = "AdamW::update";
        detail::check_size(where, "gradient.size()", gradient.size(), parameters.size());
        detail::check_size(where, "mean.size()", mean.size(), parameters.size());
        detail::check_size(where, "variance.size()", variance.size(), parameters.size());
        detail::check<error::shape_error>(step > 0, where, "step", step, "at least 1");
        const double keep = decays ? 1.0 - rate * weight_decay : 1.0;
        const double first = 1.0 - std::pow(beta1, static_cast<double>(step));
        const double second = 1.0 - std::pow(beta2, static_cast<double>(step));
        for (std::size_t i = 0; i < parameters.size(); ++i) {
            const double g = scale * static_cast<double>(gradient[i]);
            const double m = beta1 * static_cast<double>(mean[i]) + (1.0 - beta1) * g;
            const double v = beta2 * static_cast<double>(variance[i]) + (1.0 - beta2) * g * g;
            mean[i] = static_cast<T>(m);
            variance[i] = static_cast<T>(v);
            parameters[i] = static_cast<T>(keep * static_cast<double>(parameters[i]) -
                                           rate * (m / first) / (std::sqrt(v / second) + eps));
        }
    }
};

}  // namespace kvcull::inline KVCULL_ABI::train
