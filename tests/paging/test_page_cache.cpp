// What every page cache keeps to, whatever its rule: a test list that a new rule joins with one line.

#include "kvcull/paging/page_cache.hpp"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "kvcull/paging/guard.hpp"
#include "kvcull/paging/rules.hpp"
#include "support/catch.hpp"
#include "support/counting.hpp"
#include "support/requests.hpp"

namespace {

using namespace kvcull;
using Mixture = CombineDeterministic<BlindOracle, Follow<Lru>>;

using PageCaches =
    std::tuple<Guard<>, Guard<Lru>, Guard<Fifo>, Guard<Labels>, Follow<Furthest>, Follow<Lru>, Follow<Fifo>,
               Follow<Labels>, Rand<>, Marker<>, LMarker<>, PredictiveMarker<>, Mixture>;

}  // namespace

TEMPLATE_LIST_TEST_CASE("a page cache holds what was requested, keeps pins, and frees what is erased",
                        "[property]", PageCaches) {
    static_assert(PageCache<TestType>);
    for (const std::size_t slots : std::initializer_list<std::size_t>{1, 2, 3, 8, 31}) {
        CAPTURE(slots);
        SplitMix64 random{slots};
        TestType cache(slots);
        std::map<page_t, slot_t> held;
        std::map<page_t, int> pins;
        const auto id = [&] {
            const std::uint64_t page = random() % (2 * slots + 2);
            return page == 0 ? ~page_t{0} : page - 1;  // 0 and 2^64 - 1 are ordinary ids
        };
        for (int step = 0; step < 3000; ++step) {
            const page_t page = id();
            const auto kind = random() % 16;
            if (kind == 0) {
                if (pins.contains(page)) {
                    REQUIRE_THROWS_AS(cache.erase(page), error::state_error);
                } else {
                    cache.erase(page);
                    held.erase(page);
                }
            } else if (kind <= 2) {
                if (held.contains(page)) {
                    cache.pin(page);
                    ++pins[page];
                } else {
                    REQUIRE_THROWS_AS(cache.pin(page), error::state_error);
                }
            } else if (kind <= 5) {
                if (pins.contains(page)) {
                    cache.unpin(page);
                    if (--pins[page] == 0) pins.erase(page);
                } else {
                    REQUIRE_THROWS_AS(cache.unpin(page), error::state_error);
                }
            } else if (!held.contains(page) && pins.size() == slots) {
                REQUIRE_THROWS_AS(cache.request(page, 0), error::state_error);
            } else {
                const Access access = cache.request(page, random.uniform() * 4);
                REQUIRE(access.hit == held.contains(page));
                if (access.hit) REQUIRE(access.slot == held[page]);
                REQUIRE(access.victim.has_value() == (!access.hit && held.size() == slots));
                if (access.victim) {
                    REQUIRE_FALSE(pins.contains(*access.victim));
                    REQUIRE(held.at(*access.victim) == access.slot);
                    held.erase(*access.victim);
                }
                held[page] = access.slot;
            }
            std::set<slot_t> used;
            for (const auto& [known, slot] : held) {
                REQUIRE(cache.contains(known));
                REQUIRE(cache.slot_of(known) == slot);
                used.insert(slot);
            }
            REQUIRE(used.size() == held.size());
            REQUIRE(cache.size() == held.size());
            REQUIRE(cache.pinned_slots() == pins.size());
        }
    }
}

TEMPLATE_LIST_TEST_CASE("a refused request leaves no trace", "", PageCaches) {
    TestType cache(2), other(2);
    for (const page_t page : std::initializer_list<page_t>{1, 2}) {
        for (TestType* each : {&cache, &other}) {
            each->request(page, 1);
            each->pin(page);
        }
    }
    REQUIRE_THROWS_WITH(cache.request(3, 1),
                        contains_text("number of pinned slots is 2, want a slot that is not"));
    cache.unpin(1);
    other.unpin(1);
    SplitMix64 random{4};
    for (int t = 0; t < 200; ++t) {
        const page_t page = random() % 5;
        REQUIRE(cache.request(page, static_cast<double>(page)) ==
                other.request(page, static_cast<double>(page)));
    }
}

TEMPLATE_TEST_CASE("after reserve no request allocates", "", Guard<>, Guard<Lru>, Follow<Furthest>,
                   Follow<Lru>, Marker<>, PredictiveMarker<>) {
    const std::size_t slots = 16;
    const auto requests = test::some_requests(slots, 4000, 2);
    TestType cache(slots);
    cache.reserve(3 * 200);
    std::size_t misses = 0;
    const test::CountAllocations allocated;
    for (const auto& [name, pages] : requests)
        for (std::size_t t = 0; t < pages.size(); ++t)
            misses += cache.request(pages[t], static_cast<double>(t % 7)).hit ? 0 : 1;
    REQUIRE(allocated.count() == 0);
    REQUIRE(misses > 1000);
}

TEST_CASE("a hint of a page to come changes nothing") {
    Guard<> told(4, {.draws = {1}}), other(4, {.draws = {1}});
    SplitMix64 random{2};
    for (int t = 0; t < 2000; ++t) {
        const page_t page = random() % 9;
        told.prefetch(random());
        told.prefetch(page);
        REQUIRE(told.request(page, static_cast<double>(page)) ==
                other.request(page, static_cast<double>(page)));
        REQUIRE(told.known_pages() == other.known_pages());
    }
}

TEST_CASE("notes that mean nothing any more do not pile up") {
    Guard<Lru> cache(4);  // ever new pages: a phase lasts four misses
    std::size_t most = 0;
    for (page_t page = 0; page < 20'000; ++page) {
        cache.request(page, 0);
        most = std::max(most, cache.known_pages());
    }
    REQUIRE(cache.rule().phase() == 20'000 / 4 - 1);
    REQUIRE(most <= 32);
}

TEST_CASE("slots come out in order, and an erased page's slot is next") {
    Follow<Lru> cache(3);
    for (page_t page = 10; page < 13; ++page) REQUIRE(cache.request(page, 0).slot == page - 10);
    cache.erase(11);
    cache.erase(99);  // unknown: nothing happens
    REQUIRE(cache.size() == 2);
    REQUIRE(cache.request(20, 0) == Access{.hit = false, .guard = false, .slot = 1});
    REQUIRE(cache.request(21, 0) == Access{.hit = false, .guard = false, .slot = 0, .victim = 10});
}
