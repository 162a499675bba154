/// paging/<cache>/<trace>/k:<slots>: a page cache over a trace of requests, from empty to its end,
/// predictions made beforehand. Beside it, sample by sample, an LRU made of std::unordered_map and std::list
/// over the same requests; `over_list` is how many times as many requests per second the cache serves.
/// `_ahead`: the cache hears of each page sixteen requests before. The trace `real` is run where
/// KVCULL_GOLDEN_DIR names a folder with guard/cloudphysics_*.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "groups.hpp"
#include "kvcull/base/memory.hpp"
#include "kvcull/base/safetensors.hpp"
#include "kvcull/paging/guard.hpp"
#include "kvcull/paging/predictors.hpp"
#include "kvcull/paging/rules.hpp"
#include "support/cases.hpp"
#include "support/naive.hpp"

namespace kvcull::bench {
namespace {

constexpr std::size_t requests = 200'000, lead = 16;

struct PageTrace {
    std::vector<page_t> pages;
    std::vector<double> values;
    std::size_t distinct = 0;

    /// @param next  numbers of pages; ids are those, mixed to 64 bits
    template <class Next>
    PageTrace(std::size_t count, Next&& next, std::size_t length = requests) : distinct(count) {
        Popularity popularity;
        for (std::size_t t = 0; t < length; ++t) {
            pages.push_back(SplitMix64{next()}());
            values.push_back(popularity.next(pages.back(), t));
        }
    }
};

/// Probabilities in proportion to 1 / rank.
PageTrace zipf(std::size_t) {
    constexpr std::size_t count = 65536;
    std::vector<double> up_to(count);
    double sum = 0;
    for (std::size_t i = 0; i < count; ++i) up_to[i] = sum += 1 / static_cast<double>(i + 1);
    return {count, [&, random = SplitMix64{1}]() mutable {
                const auto found = std::upper_bound(up_to.begin(), up_to.end() - 1, random.uniform() * sum);
                return static_cast<std::uint64_t>(found - up_to.begin());
            }};
}
/// Twice as many pages as fit, one after the other.
PageTrace loop(std::size_t slots) {
    return {2 * slots, [slots, t = std::uint64_t{0}]() mutable { return t++ % (2 * slots); }};
}

/// Block requests of a machine: numbers of pages by first appearance.
PageTrace real(std::size_t) {
    std::vector<std::int32_t> numbers;
    for (const char* part : {"cloudphysics_20k", "cloudphysics_ids_1", "cloudphysics_ids_2"}) {
        const std::string path =
            std::getenv("KVCULL_GOLDEN_DIR") + std::string("/guard/") + part + ".safetensors";
        const auto more = SafeTensors::read(path).tensor("in.pages").to_vector<std::int32_t>();
        numbers.insert(numbers.end(), more.begin(), more.end());
    }
    const auto distinct = static_cast<std::size_t>(*std::max_element(numbers.begin(), numbers.end()) + 1);
    return {distinct, [&, t = std::size_t{0}]() mutable { return static_cast<std::uint64_t>(numbers[t++]); },
            numbers.size()};
}

template <class Cache, std::size_t Lead>
void run(benchmark::State& state, const PageTrace& trace, std::size_t slots) {
    Series time;
    Ratios list_over_cache;
    std::uint64_t misses = 0, list_misses = 0;
    for (auto _ : state) {
        misses = list_misses = 0;
        Cache cache(slots);
        cache.reserve(trace.distinct);
        const std::size_t count = trace.pages.size();
        const Stopwatch mine;
        for (std::size_t t = 0; t < count; ++t) {
            if constexpr (Lead > 0) cache.prefetch(trace.pages[std::min(t + Lead, count - 1)]);
            misses += cache.request(trace.pages[t], trace.values[t]).hit ? 0 : 1;
        }
        const Time took = mine.elapsed();
        naive::ListLru list(slots);
        const Stopwatch beside;
        for (const page_t page : trace.pages) list_misses += list.request(page) ? 0 : 1;
        list_over_cache.add(beside.elapsed().busy, took.busy);
        time.add(took, state);
    }
    const auto length = static_cast<double>(trace.pages.size());
    const auto share = [&](std::uint64_t count) { return static_cast<double>(count) / length; };
    state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(trace.pages.size()));
    state.counters["ns_per_request"] = time.best() * 1e9 / length;
    state.counters["over_list"] = list_over_cache.middle();
    state.counters["misses"] = share(misses);
    state.counters["list_misses"] = share(list_misses);
    state.counters["spread"] = time.spread();
}

using MakeTrace = PageTrace (*)(std::size_t slots);

template <class Cache, std::size_t Lead = 0>
void add(const std::string& name, MakeTrace make) {
    for (const std::size_t slots : {std::size_t{64}, std::size_t{512}, std::size_t{4096}})
        add_case("paging/" + name + "/k:" + std::to_string(slots), 15,
                 [make, slots](benchmark::State& state) { run<Cache, Lead>(state, make(slots), slots); });
}
void add_caches(const std::string& trace, MakeTrace make) {
    add<Guard<>>("guard/" + trace, make);
    add<Guard<>, lead>("guard_ahead/" + trace, make);
    add<Guard<Lru>>("guard_lru/" + trace, make);
    add<Guard<Lru>, lead>("guard_lru_ahead/" + trace, make);
    add<Follow<Lru>>("lru/" + trace, make);
}

}  // namespace

void add_paging() {
    add_caches("zipf", zipf);
    add_caches("loop", loop);
    if (std::getenv("KVCULL_GOLDEN_DIR") != nullptr) add_caches("real", real);
}

}  // namespace kvcull::bench
