#include "kvcull/paging/rules.hpp"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "support/catch.hpp"
#include "support/requests.hpp"

namespace {

using namespace kvcull;

}  // namespace

TEST_CASE("a mixture of one part, repeated, is that part", "[property]") {
    for (const std::size_t slots : std::initializer_list<std::size_t>{1, 4, 13}) {
        for (const auto& [name, pages] : test::some_requests(slots, 1500, 8)) {
            CAPTURE(slots, name);
            const auto next = next_requests(pages);
            Follow<Lru> lru(slots);
            CombineDeterministic<Follow<Lru>, Follow<Lru>> twice(slots);
            for (std::size_t t = 0; t < pages.size(); ++t)
                REQUIRE(twice.request(pages[t], next[t]) == lru.request(pages[t], next[t]));
        }
    }
}

TEST_CASE("a mixture goes over to the part that misses less", "[property]") {
    const std::size_t slots = 16;
    const auto pages = test::some_requests(slots, 6000, 8)[2].pages;
    std::vector<double> hostile;
    for (const double next : next_requests(pages)) hostile.push_back(-next);
    const auto blind = test::replay(BlindOracle(slots), pages, hostile).misses;
    const auto lru = test::replay(Follow<Lru>(slots), pages, hostile).misses;
    const auto both =
        test::replay(CombineDeterministic<BlindOracle, Follow<Lru>>(slots), pages, hostile).misses;
    REQUIRE(lru * 3 < blind * 2);
    REQUIRE(both < lru + lru / 20);
}

TEST_CASE("a marking rule evicts only what its phase has not requested", "[property]") {
    for (const std::size_t slots : std::initializer_list<std::size_t>{1, 4, 13}) {
        for (const auto& [name, pages] : test::some_requests(slots, 2000, 8)) {
            CAPTURE(slots, name);
            Marker<> cache(slots);
            std::vector<page_t> requested;  // since the phase began
            for (const page_t page : pages) {
                const bool known = std::find(requested.begin(), requested.end(), page) != requested.end();
                const Access access = cache.request(page, 0);
                if (access.victim && requested.size() == slots) {  // all are marked: a new phase
                    requested.clear();
                } else if (access.victim) {
                    REQUIRE(std::find(requested.begin(), requested.end(), *access.victim) == requested.end());
                }
                if (!known || requested.empty()) requested.push_back(page);
            }
        }
    }
}

TEST_CASE("a bound below 1, or none, is refused") {
    using Mixture = CombineDeterministic<BlindOracle, Follow<Lru>>;
    const double nan = std::bit_cast<double>(std::uint64_t{0x7FF8000000000000U});
    REQUIRE_THROWS_WITH(Mixture(4, {.bound = 0.5}), contains_text("bound is 0.5"));
    REQUIRE_THROWS_AS(Mixture(4, {.bound = nan}), error::config_error);
    REQUIRE_THROWS_AS(Mixture(4, {.bound = -1}), error::config_error);
    REQUIRE_NOTHROW(Mixture(4, {.bound = 1}));
}
