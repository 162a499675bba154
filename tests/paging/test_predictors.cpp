#include "kvcull/paging/predictors.hpp"

#include <cmath>
#include <vector>

#include "support/catch.hpp"
#include "support/requests.hpp"

namespace {

using namespace kvcull;

}  // namespace

TEST_CASE("guesses of a short stream, by hand") {
    Popularity popularity;
    LastGap gap;
    // Requests 7 8 7 7 at times 0 .. 3.
    CHECK(popularity.next(7, 0) == 2.0);
    CHECK(popularity.next(8, 1) == 4.0);
    CHECK(popularity.next(7, 2) == 4.5);
    CHECK(popularity.next(7, 3) == 4.0 + 4.0 / 3);
    CHECK(gap.next(7, 0) == never_again);
    CHECK(gap.next(8, 1) == never_again);
    CHECK(gap.next(7, 2) == 4.0);
    CHECK(gap.next(7, 3) == 4.0);
}

TEST_CASE("Pleco weighs all requests by their age", "[property]") {
    const auto pages = test::some_requests(6, 600, 5)[2].pages;
    const auto weight = [](std::size_t age) {
        const auto a = static_cast<double>(age);
        return std::pow(a + 11, -1.8) * std::exp(-(a + 1) / 670);
    };
    Pleco pleco;
    for (std::size_t t = 0; t < pages.size(); ++t) {
        double all = 0, mine = 0;
        for (std::size_t i = 0; i <= t; ++i) {
            all += weight(t - i);
            if (pages[i] == pages[t]) mine += weight(t - i);
        }
        REQUIRE(pleco.next(pages[t], t) == Approx(static_cast<double>(t) + all / mine).epsilon(1e-9));
    }
}

TEST_CASE("Pleco forgets requests that weigh nothing any more") {
    Pleco pleco;
    (void)pleco.next(1, 0);
    for (std::uint64_t t = 1; t < 50'000; ++t) (void)pleco.next(2, t);
    // Page 1 is as if it had just been seen for the first time.
    Pleco fresh;
    double first = 0;
    for (std::uint64_t t = 0; t <= 50'000; ++t) first = fresh.next(t, t);
    REQUIRE(pleco.next(1, 50'000) == first);
}

TEST_CASE("true next requests and Belady's labels, by hand") {
    const std::vector<page_t> pages{1, 2, 3, 1, 2, 3};
    REQUIRE(next_requests(pages, -1) == std::vector<double>{3, 4, 5, -1, -1, -1});
    // Two slots: 3 comes, 2 goes (needed at 4, after 1 at 3); 2 comes back, and of 1 and 3 the former, never
    // needed again, goes.
    REQUIRE(belady_labels(pages, 2) == std::vector<double>{0, 1, 0, 1, 0, 0});
    REQUIRE(next_requests({}).empty());
    REQUIRE(belady_labels({}, 2).empty());
}

TEST_CASE("what was foretold ends somewhere") {
    Foretold told({5, 6});
    REQUIRE(told.next(0, 1) == 6.0);
    REQUIRE_THROWS_WITH(told.next(0, 2), contains_text("now is 2, want less than 2"));
}
