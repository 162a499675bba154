#pragma once
/// Streams of page requests that the tests of paging share.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kvcull/base/memory.hpp"
#include "kvcull/paging/predictors.hpp"

namespace kvcull::test {

struct Requests {
    std::string name;
    std::vector<page_t> pages;
};

/// Uniform, looping (one page more than fits) and Zipf requests over 64-bit ids.
inline std::vector<Requests> some_requests(std::size_t slots, std::size_t count, std::uint64_t seed) {
    SplitMix64 random{seed};
    std::vector<Requests> all(3);
    all[0].name = "uniform";
    all[1].name = "loop";
    all[2].name = "zipf";
    const std::size_t pages = 2 * slots + 1;
    const auto id = [](std::size_t page) { return SplitMix64{page}(); };
    for (std::size_t t = 0; t < count; ++t) {
        all[0].pages.push_back(id(random() % pages));
        all[1].pages.push_back(id(t % (slots + 1)));
        // Ranks with density 1 / rank, by inverting its integral.
        all[2].pages.push_back(
            id(static_cast<std::size_t>(std::pow(static_cast<double>(4 * pages), random.uniform()))));
    }
    return all;
}

struct Tally {
    std::size_t misses = 0, guards = 0;
};
template <PageCache Cache>
Tally replay(Cache& cache, const std::vector<page_t>& pages, const std::vector<double>& values) {
    Tally tally;
    for (std::size_t t = 0; t < pages.size(); ++t) {
        const Access access = cache.request(pages[t], values[t]);
        tally.misses += access.hit ? 0 : 1;
        tally.guards += access.guard ? 1 : 0;
    }
    return tally;
}
template <PageCache Cache>
Tally replay(Cache&& cache, const std::vector<page_t>& pages, const std::vector<double>& values) {
    return replay(cache, pages, values);
}

}  // namespace kvcull::test
