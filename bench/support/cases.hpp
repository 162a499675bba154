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

/// Adds one case. `body` runs `samples` iterations and sets the time of each of them itself.
inline void add_case(const std::string& name, std::size_t samples,
                     std::function<void(benchmark::State&)> body) {
    benchmark::RegisterBenchmark(name.c_str(),
                                 [body = std::move(body)](benchmark::State& state) { body(state); })
        ->UseManualTime()
        ->Iterations(static_cast<benchmark::IterationCount>(samples))
        ->Unit(benchmark::kMicrosecond);
}

/// Ratios of samples that were taken one after the other, so that a machine that is faster for a while is so
/// for both. The middle one counts.
class Ratios {
  public:
    void add(double over, double under) { values_.push_back(over / under); }
    [[nodiscard]] double middle() {
        std::sort(values_.begin(), values_.end());
        return values_[values_.size() / 2];
    }

  private:
    std::vector<double> values_;
};

/// Times of samples. Counters show the best busy one, as whatever else runs on the machine only ever adds
/// time; the table's time is the mean by the wall.
class Series {
  public:
    void add(const Time& time) { values_.push_back(time); }
    /// Adds a sample, and reports it as the time of the iteration.
    void add(const Time& time, benchmark::State& state) {
        add(time);
        state.SetIterationTime(time.wall);
    }
    [[nodiscard]] double best() const { return sorted(&Time::busy).front(); }
    [[nodiscard]] double best_wall() const { return sorted(&Time::wall).front(); }
    /// Half of the samples lie within this share of the middle one, a quarter above and a quarter below.
    [[nodiscard]] double spread() const {
        const std::vector<double> busy = sorted(&Time::busy);
        return (busy[busy.size() * 3 / 4] - busy[busy.size() / 4]) / busy[busy.size() / 2];
    }

  private:
    [[nodiscard]] std::vector<double> sorted(double Time::*clock) const {
        std::vector<double> values;
        for (const Time& time : values_) values.push_back(time.*clock);
        std::sort(values.begin(), values.end());
        return values;
    }

    std::vector<Time> values_;
};

/// Samples for about `budget` seconds of work at an estimated `each`, between `least` and `most`.
[[nodiscard]] inline std::size_t samples_for(double budget, double each, std::size_t least = 3,
                                             std::size_t most = 25) {
    return std::clamp(static_cast<std::size_t>(budget / each), least, most);
}

}  // namespace kvcull::bench
