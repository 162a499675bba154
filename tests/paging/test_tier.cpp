// Pages between frames and a store that may fail at any call.

#include "kvcull/paging/tier.hpp"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <optional>
#include <set>
#include <stdexcept>
#include <vector>

#include "kvcull/base/memory.hpp"
#include "kvcull/paging/guard.hpp"
#include "kvcull/paging/rules.hpp"
#include "support/catch.hpp"

namespace {

using namespace kvcull;

/// Frames of one number each, and what was written. Fails at call number `fail_at`.
struct Memory {
    std::vector<std::uint64_t> frames;
    std::map<page_t, std::uint64_t> written;
    std::size_t calls = 0, fail_at = 0, reads = 0, writes = 0;
};
struct Store {
    Memory* memory = nullptr;

    void count() const {
        if (++memory->calls == memory->fail_at) throw std::runtime_error("the store failed");
    }
    void read(page_t page, slot_t frame) const {
        count();
        memory->frames[frame] = memory->written.at(page);
        ++memory->reads;
    }
    void write(page_t page, slot_t frame) const {
        count();
        memory->written[page] = memory->frames[frame];
        ++memory->writes;
    }
    void erase(page_t page) const {
        count();
        memory->written.erase(page);
    }
};
template <class Cache>
using Tier = PageTier<Cache, Store, Popularity>;

/// What the model wrote into each page, and the tier that has to keep it.
template <class Cache>
struct Bench {
    explicit Bench(std::size_t slots)
        : memory{.frames = std::vector<std::uint64_t>(slots), .written = {}},
          tier(Cache(slots), {&memory}, {}) {}

    /// Steps, checks that every page of the step has its bytes, and changes some of them.
    void step(const std::vector<page_t>& pages, std::optional<page_t> created, SplitMix64& random) {
        tier.step(pages, created);
        if (created) write(*created, random());
        std::set<slot_t> used;
        for (const page_t page : pages) {
            REQUIRE(memory.frames[tier.frame(page)] == content.at(page));
            used.insert(tier.frame(page));
            if (random() % 8 == 0) write(page, random());
        }
        REQUIRE(used.size() == pages.size());
        tier.end_step();
    }
    void write(page_t page, std::uint64_t bytes) {
        memory.frames[tier.frame(page)] = content[page] = bytes;
        tier.mark_dirty(page);
    }
    std::vector<page_t> choose(std::size_t most, SplitMix64& random) const {
        std::vector<page_t> pages;
        for (const auto& [page, bytes] : content)
            if (pages.size() < most && random() % 3 == 0) pages.push_back(page);
        for (std::size_t i = pages.size(); i > 1; --i) std::swap(pages[i - 1], pages[random() % i]);
        return pages;
    }

    Memory memory;
    std::map<page_t, std::uint64_t> content;
    Tier<Cache> tier;
};

}  // namespace

TEMPLATE_TEST_CASE("a step's pages are in frames with the bytes that were written last", "[property]",
                   Guard<>, Guard<Lru>, BlindOracle, Marker<>) {
    for (const std::size_t slots : std::initializer_list<std::size_t>{2, 5, 16}) {
        SplitMix64 random{slots};
        Bench<TestType> bench(slots);
        for (page_t next = 0; next < 300; ++next) {
            bench.step(bench.choose(slots - 1, random), next * 77, random);
            if (random() % 4 == 0) {
                const auto gone = static_cast<std::ptrdiff_t>(random() % bench.content.size());
                const page_t page = std::next(bench.content.begin(), gone)->first;
                bench.tier.erase(page);
                bench.content.erase(page);
                REQUIRE_THROWS_AS(bench.tier.step(std::vector{page}), error::state_error);
            }
        }
        const PageCounts& counts = bench.tier.counts();
        REQUIRE(counts.fetches == bench.memory.reads);
        REQUIRE(counts.write_backs == bench.memory.writes);
        REQUIRE(counts.fetches > 100);
        REQUIRE(counts.write_backs <= counts.evictions);
    }
}

TEST_CASE("whichever call of the store fails, nothing that was written is lost", "[property]") {
    for (std::size_t fail_at = 1; fail_at < 120; ++fail_at) {
        CAPTURE(fail_at);
        SplitMix64 random{5};
        Bench<Guard<>> bench(4);
        bench.memory.fail_at = fail_at;
        std::size_t failures = 0;
        for (page_t next = 1; next < 40; ++next) {
            const auto pages = bench.choose(3, random);
            try {
                bench.step(pages, next, random);
            } catch (const std::runtime_error&) {
                ++failures;
                REQUIRE_THROWS_AS(bench.tier.end_step(), error::state_error);  // no step is open
                REQUIRE(bench.tier.cache().pinned_slots() == 0);
                bench.step(pages, next, random);  // once more: the same step goes through
            }
        }
        REQUIRE(failures == (bench.memory.calls >= fail_at ? 1 : 0));
        for (const auto& [page, bytes] : bench.content) bench.step({page}, {}, random);
    }
}

TEST_CASE("a page is written back once, unless it changes again") {
    SplitMix64 random{1};
    Bench<Follow<Lru>> bench(1);
    bench.step({}, 1, random);
    bench.step({}, 2, random);  // 1 goes out
    REQUIRE(bench.memory.writes == 1);
    const auto fetch = [&](page_t page) {
        const bool wrote = bench.tier.step(std::vector{page}).front().write_back;
        bench.tier.end_step();
        return wrote;
    };
    REQUIRE(fetch(1));        // 2 goes out
    REQUIRE_FALSE(fetch(2));  // 1 as it was
    REQUIRE_FALSE(fetch(1));
    bench.write(1, 9);
    REQUIRE(fetch(2));
    REQUIRE(bench.memory.written.at(1) == 9);
}

TEST_CASE("a step that cannot be is refused before anything changed") {
    SplitMix64 random{1};
    Bench<Guard<>> bench(3);
    auto& tier = bench.tier;
    for (page_t page = 1; page <= 5; ++page) bench.step({}, page, random);
    const auto counts = tier.counts();
    const auto calls = bench.memory.calls;
    const auto refuse = [&](std::vector<page_t> pages, std::optional<page_t> created = {}) {
        tier.step(pages, created);
    };
    REQUIRE_THROWS_AS(refuse({1, 2, 1}), error::config_error);
    REQUIRE_THROWS_WITH(refuse({1, 9}), contains_text("page is 9, want a known page"));
    REQUIRE_THROWS_AS(refuse({}, 3), error::state_error);
    REQUIRE_THROWS_AS(refuse({6}, 6), error::state_error);
    REQUIRE_THROWS_WITH(refuse({1, 2, 3}, 6), contains_text("pinned ones included is 4, want at most 3"));
    REQUIRE_THROWS_AS(tier.end_step(), error::state_error);
    REQUIRE_THROWS_AS(tier.frame(77), error::state_error);
    REQUIRE(tier.counts() == counts);
    REQUIRE(bench.memory.calls == calls);
    tier.step(std::vector<page_t>{1, 2});
    REQUIRE_THROWS_AS(refuse({1}), error::state_error);  // the last step is open
    REQUIRE_THROWS_AS(tier.erase(1), error::state_error);
    REQUIRE_THROWS_WITH(tier.unpin(1), contains_text("page is 1, want a page that `pin` has pinned"));
    tier.pin(2);
    tier.unpin(2);
    tier.pin(1);
    tier.end_step();
    REQUIRE_THROWS_AS(tier.erase(1), error::state_error);
    REQUIRE_THROWS_AS(refuse({2, 3, 4}), error::capacity_error);
    REQUIRE_NOTHROW(refuse({1, 3, 4}));  // a pinned page that the step names counts once
    tier.end_step();
    tier.unpin(1);
    tier.erase(1);
    Guard<> used(2);
    used.request(5, 1.0);
    REQUIRE_THROWS_AS(Tier<Guard<>>(std::move(used), {&bench.memory}, {}), error::config_error);
    REQUIRE(counts.fetches + 4 >= tier.counts().fetches);
    REQUIRE(bench.memory.calls > calls);
}
