// Guard's promises: optimal with right predictions, bounded with wrong ones.

#include "kvcull/paging/guard.hpp"

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <set>
#include <vector>

#include "kvcull/paging/predictors.hpp"
#include "kvcull/paging/rules.hpp"
#include "support/catch.hpp"
#include "support/requests.hpp"

namespace {

using namespace kvcull;
using test::replay;
using test::some_requests;

/// SplitMix64 that counts.
struct Counted {
    SplitMix64 source{};
    std::size_t used = 0;
    std::uint64_t operator()() {
        ++used;
        return source();
    }
};

double harmonic(std::size_t n) {
    double sum = 0;
    for (std::size_t i = 1; i <= n; ++i) sum += 1.0 / static_cast<double>(i);
    return sum;
}

}  // namespace

TEST_CASE("right predictions give Belady's misses and no guard", "[property]") {
    for (const std::size_t slots : std::initializer_list<std::size_t>{1, 2, 3, 7, 16, 64}) {
        for (std::uint64_t seed = 1; seed <= 4; ++seed) {
            for (const auto& [name, pages] : some_requests(slots, 1500, seed)) {
                CAPTURE(slots, seed, name);
                const auto next = next_requests(pages);
                const auto labels = belady_labels(pages, slots);
                const auto best = replay(BlindOracle(slots), pages, next).misses;
                const auto guarded = replay(Guard<>(slots), pages, next);
                const auto labelled = replay(Guard<Labels>(slots), pages, labels);
                REQUIRE(guarded.misses == best);
                REQUIRE(guarded.guards == 0);
                REQUIRE(labelled.misses == best);
                REQUIRE(labelled.guards == 0);
                // Nobody misses less than Belady.
                REQUIRE(replay(Follow<Lru>(slots), pages, next).misses >= best);
                REQUIRE(replay(Follow<Fifo>(slots), pages, next).misses >= best);
                REQUIRE(replay(Rand<>(slots), pages, next).misses >= best);
                REQUIRE(replay(Marker<>(slots), pages, next).misses >= best);
                REQUIRE(replay(LMarker<>(slots), pages, next).misses >= best);
                REQUIRE(replay(PredictiveMarker<>(slots), pages, next).misses >= best);
                REQUIRE(replay(CombineDeterministic<BlindOracle, Follow<Lru>>(slots), pages, next).misses >=
                        best);
            }
        }
    }
}

TEST_CASE("constant values make Furthest the same as Lru, victim by victim", "[property]") {
    for (const auto& [name, pages] : some_requests(9, 2000, 3)) {
        CAPTURE(name);
        Guard<Furthest> furthest(9, {1, {5}});
        Guard<Lru> lru(9, {1, {5}});
        for (const page_t page : pages) REQUIRE(furthest.request(page, 1) == lru.request(page, 0));
    }
}

TEST_CASE("a phase guards what it evicted wrongly, and takes one draw for each", "[property]") {
    for (const std::size_t slots : std::initializer_list<std::size_t>{2, 5, 16}) {
        for (const auto& [name, pages] : some_requests(slots, 3000, 17)) {
            CAPTURE(slots, name);
            const auto truth = next_requests(pages);
            Guard<Furthest, Counted> cache(slots);
            std::set<page_t> guarded, evicted;
            std::uint64_t phase = 0;
            std::size_t guards = 0, of_phase = 0;
            for (std::size_t t = 0; t < pages.size(); ++t) {
                const Access access = cache.request(pages[t], -truth[t]);  // hostile
                if (cache.rule().phase() != phase) {
                    phase = cache.rule().phase();
                    guarded.clear();
                    evicted.clear();
                    of_phase = 0;
                }
                REQUIRE(access.guard == (access.victim.has_value() && evicted.contains(pages[t])));
                if (access.victim) {
                    REQUIRE_FALSE(guarded.contains(*access.victim));
                    evicted.insert(*access.victim);
                }
                if (access.guard) {
                    guarded.insert(pages[t]);
                    ++guards;
                    REQUIRE(++of_phase <= slots);
                    REQUIRE(cache.rule().guarded(access.slot));
                }
                for (slot_t slot = 0; slot < slots; ++slot)
                    REQUIRE_FALSE((cache.rule().guarded(slot) && cache.rule().old().contains(slot)));
            }
            REQUIRE(cache.rule().draws().used == guards);
            REQUIRE(guards > 0);
        }
    }
}

TEST_CASE("two slots and a page that is never let go") {
    const std::size_t m = 50;
    std::vector<page_t> pages{0, 1};
    std::vector<double> values{0, 1e9};
    for (std::size_t i = 0; i < m; ++i) {
        pages.insert(pages.end(), {2, 1});
        values.insert(values.end(), {1e9, 1e9});
    }
    REQUIRE(replay(BlindOracle(2), pages, values).misses == 2 + 2 * m);
    REQUIRE(replay(Guard<>(2), pages, values).misses == 4);
    REQUIRE(replay(Follow<Lru>(2), pages, values).misses == 3);
    REQUIRE(replay(BlindOracle(2), pages, next_requests(pages)).misses == 3);
    // A phase that tolerates more errors than there are goes on as blindly as the order.
    REQUIRE(replay(Guard<>(2, {.guard_after = 4 * m}), pages, values).misses == 2 + 2 * m);
}

TEST_CASE("hostile predictions cost at most what the paper proves", "[property]") {
    for (const std::size_t slots : std::initializer_list<std::size_t>{2, 8, 32}) {
        for (const auto& [name, pages] : some_requests(slots, 200 * slots, 29)) {
            CAPTURE(slots, name);
            const auto truth = next_requests(pages);
            std::vector<double> hostile, useless;
            SplitMix64 noise{3};
            for (const double next : truth) {
                hostile.push_back(never_again - next);
                useless.push_back(noise.uniform());
            }
            const auto best = static_cast<double>(replay(BlindOracle(slots), pages, truth).misses);
            const double bound = (2 * harmonic(slots - 1) + 2) * best + static_cast<double>(slots);
            for (const auto& values : {hostile, useless}) {
                double sum = 0;
                const int seeds = 10;
                for (int seed = 0; seed < seeds; ++seed)
                    sum += static_cast<double>(
                        replay(Guard<>(slots, {1, {static_cast<std::uint64_t>(seed)}}), pages, values)
                            .misses);
                REQUIRE(sum / seeds <= bound);
            }
        }
    }
}

TEST_CASE("the order alone breaks the bound that Guard keeps") {
    const std::size_t slots = 32;
    const auto pages = some_requests(slots, 200 * slots, 29)[1].pages;  // the loop
    std::vector<double> hostile;
    for (const double next : next_requests(pages)) hostile.push_back(never_again - next);
    const auto best = replay(BlindOracle(slots), pages, next_requests(pages)).misses;
    REQUIRE(static_cast<double>(replay(BlindOracle(slots), pages, hostile).misses) >
            (2 * harmonic(slots - 1) + 2) * static_cast<double>(best));
}

TEST_CASE("fewer pages than slots start no phase, and one slot never guards") {
    Guard<> roomy(8);
    for (int round = 0; round < 5; ++round)
        for (page_t page = 0; page < 8; ++page) roomy.request(page, 0);
    REQUIRE(roomy.rule().phase() == 0);

    Guard<Furthest, Counted> narrow(1);
    for (int i = 0; i < 20; ++i) REQUIRE_FALSE(narrow.request(static_cast<page_t>(i % 2), 0).guard);
    REQUIRE(narrow.rule().phase() == 19);
    REQUIRE(narrow.rule().draws().used == 0);
}

TEST_CASE("a page that comes back into a free slot is not guarded, nor one that was erased") {
    Guard<> cache(2);
    cache.request(1, 9);
    cache.request(2, 8);
    REQUIRE(cache.request(3, 7).victim == page_t{1});
    cache.erase(2);
    REQUIRE_FALSE(cache.request(1, 9).guard);  // its slot was free
    cache.erase(3);                            // gone, like what is known of it
    REQUIRE_FALSE(cache.request(4, 6).victim.has_value());
    REQUIRE_FALSE(cache.request(3, 5).guard);
}

TEST_CASE("a guard that tolerates nothing is refused") {
    REQUIRE_THROWS_AS(Guard<>(4, {.guard_after = 0}), error::config_error);
    REQUIRE_THROWS_WITH(Guard<>(4, {.guard_after = 0}), contains_text("guard_after is 0, want at least 1"));
    REQUIRE_THROWS_AS(Guard<>(0), error::config_error);
}
