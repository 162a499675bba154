#pragma once
/// When is a page needed next? Guesses from what was requested so far, and the truth for comparisons.

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../base/config.hpp"
#include "../base/error.hpp"
#include "page_table.hpp"
#include "rules.hpp"

namespace kvcull::inline KVCULL_ABI {

/// `next(page, now)`: the guessed index of the page's next request. Called once per request, in order; `now`
/// is the index of the request that is served.
template <class P>
concept NextUse = requires(P predictor, page_t page, std::uint64_t now) {
    { predictor.next(page, now) } -> std::convertible_to<double>;
};

/// "No next request is known."
inline constexpr double never_again = 0x1.0p62;

/// Pages come back at their mean rate so far: now' + now' / count, with now' = now + 1. O(1).
class Popularity {
  public:
    [[nodiscard]] double next(page_t page, std::uint64_t now) {
        const double elapsed = static_cast<double>(now) + 1;
        return elapsed + elapsed / static_cast<double>(++counts_[page]);
    }

  private:
    std::unordered_map<page_t, std::uint64_t> counts_;
};

/// A page comes back after the same gap as last time. O(1).
class LastGap {
  public:
    [[nodiscard]] double next(page_t page, std::uint64_t now) {
        const auto [found, first] = last_.try_emplace(page, now);
        if (first) return never_again;
        const double gap = static_cast<double>(now - found->second);
        found->second = now;
        return static_cast<double>(now) + gap;
    }

  private:
    std::unordered_map<page_t, std::uint64_t> last_;
};

/// PLECO: requests count the less the older they are, w(age) = (age + 11)^-1.8 exp(-(age + 1) / 670); the
/// page comes back at its share of all weights. Ages above 20000 are left out: they weigh 1e-20 of the
/// newest. O(requests of the page within that age).
class Pleco {
  public:
    Pleco() {
        double sum = 0;
        for (std::size_t age = 0; age < ages; ++age) {
            const auto a = static_cast<double>(age);
            weights_.push_back(std::pow(a + 11, -1.8) * std::exp(-(a + 1) / 670));
            sums_.push_back(sum += weights_.back());
        }
    }
    [[nodiscard]] double next(page_t page, std::uint64_t now) {
        auto& requests = requests_[page];
        requests.push_back(now);
        while (now - requests.front() >= ages) requests.pop_front();
        double mine = 0;
        for (const std::uint64_t request : requests) mine += weights_[now - request];
        return static_cast<double>(now) + sums_[std::min<std::uint64_t>(now, ages - 1)] / mine;
    }

  private:
    static constexpr std::size_t ages = 20001;
    std::vector<double> weights_, sums_;  // by age; all weights up to it
    std::unordered_map<page_t, std::deque<std::uint64_t>> requests_;
};

/// The true next request of each, `none` where there is none. O(n).
[[nodiscard]] inline std::vector<double> next_requests(std::span<const page_t> pages,
                                                       double none = never_again) {
    std::vector<double> next(pages.size(), none);
    std::unordered_map<page_t, std::size_t> later;
    for (std::size_t i = pages.size(); i-- > 0;) {
        const auto [found, last] = later.try_emplace(pages[i], i);
        if (!last) next[i] = static_cast<double>(std::exchange(found->second, i));
    }
    return next;
}

/// For each request 1 if Belady's rule with `slots` slots evicts the page before its next request, else 0.
/// @throws config_error as `SlotCache`.
[[nodiscard]] inline std::vector<double> belady_labels(std::span<const page_t> pages, std::size_t slots) {
    const auto next = next_requests(pages);
    std::vector<double> labels(pages.size());
    std::unordered_map<page_t, std::size_t> last;
    BlindOracle belady(slots);
    for (std::size_t i = 0; i < pages.size(); ++i) {
        if (const auto victim = belady.request(pages[i], next[i]).victim) labels[last[*victim]] = 1;
        last[pages[i]] = i;
    }
    return labels;
}

/// Values that are known beforehand, one per request: the truth, or recorded guesses.
class Foretold {
  public:
    explicit Foretold(std::vector<double> values) : values_(std::move(values)) {}
    /// @throws state_error if `now` lies beyond the values.
    [[nodiscard]] double next(page_t, std::uint64_t now) const {
        detail::check<error::state_error>(now < values_.size(), "Foretold::next", "now", now,
                                          detail::text("less than ", values_.size()));
        return values_[now];
    }

  private:
    std::vector<double> values_;
};

}  // namespace kvcull::inline KVCULL_ABI
