#pragma once
/// How a case is run: samples of it and of what it is compared with take turns, so that whatever else the
/// machine does meets all of them alike.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "clock.hpp"

namespace kvcull::bench {

[[nodiscard]] inline double median(std::vector<double> values) {
    const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
    std::nth_element(values.begin(), middle, values.end());
    return *middle;
}

/// Adds one case. `body` runs `samples` iterations and sets the time of each of them itself.
inline void add_case(const std::string& name, std::size_t samples,
                     std::function<void(benchmark::State&)> body) {
    benchmark::RegisterBenchmark(name.c_str(),
                                 [body = std::move(body)](benchmark::State& state) { body(state); })
        ->UseManualTime()
        ->Iterations(static_cast<benchmark::IterationCount>(samples))
        ->Unit(benchmark::kMicrosecond);
}

/// One number per sample; the middle one and the spread are reported.
class Series {
  public:
    void add(double value) { values_.push_back(value); }
    [[nodiscard]] double middle() const { return median(values_); }
    /// Half of the samples lie within this share of the middle one, a quarter above and a quarter below.
    [[nodiscard]] double spread() const {
        std::vector<double> sorted = values_;
        std::sort(sorted.begin(), sorted.end());
        return (sorted[sorted.size() * 3 / 4] - sorted[sorted.size() / 4]) / median(values_);
    }

  private:
    std::vector<double> values_;
};

/// Samples for about `budget` seconds of work at an estimated `each`, between `least` and `most`.
[[nodiscard]] inline std::size_t samples_for(double budget, double each, std::size_t least = 3,
                                             std::size_t most = 25) {
    return std::clamp(static_cast<std::size_t>(budget / each), least, most);
}

}  // namespace kvcull::bench
