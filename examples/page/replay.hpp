#pragma once
/// Page caches over a trace of requests: what they miss, and how long they take.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "trace.hpp"

namespace page {

/// The policies that can be named, and the values that some of them read: what a cache is told, with a
/// request, about when its page is needed next.
[[nodiscard]] std::vector<std::string> policy_names();
[[nodiscard]] std::vector<std::string> value_names();

struct Options {
    std::vector<std::size_t> slots{8, 64, 512};
    std::vector<std::string> policies{"belady", "lru", "marker", "blind", "guard"};
    std::vector<std::string> values{"popularity", "adverse"};  ///< of the policies that follow predictions
    std::uint64_t seed = 0;                                    ///< of each run's draws
    std::size_t noise = 5000;  ///< the values `noisy` are 0 .. noise requests too late
    std::size_t repeats = 3;   ///< replays per run; the fastest one's time counts
};

/// One policy, with one kind of values, in one size.
struct Outcome {
    std::string policy = {};  ///< `lru`, `guard_popularity`
    std::size_t slots = 0;
    std::uint64_t misses = 0, guards = 0;
    std::uint64_t opt_misses = 0;  ///< Belady's, the fewest there can be
    double ns = 0;                 ///< per request, of the replay alone: values are known beforehand

    [[nodiscard]] double ratio() const {
        return static_cast<double>(misses) / static_cast<double>(opt_misses);
    }
};

/// In each size all policies with all values, in the order of `options`.
/// @throws kvcull::error::config_error for a name that does not exist, before anything runs; it lists those
/// that do
[[nodiscard]] std::vector<Outcome> replay(std::span<const kvcull::page_t> pages, const Options& options);

}  // namespace page
