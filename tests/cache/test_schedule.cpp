// Which part of which head runs when.

#include <atomic>
#include <cstddef>
#include <utility>
#include <vector>

#include "kvcull/cache/schedule.hpp"
#include "support/catch.hpp"
#include "support/every_policy.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {
using Pairs = std::vector<std::pair<std::size_t, std::size_t>>;

void fill(detail::Schedule& schedule) {
    schedule.clear();
    schedule.add(1, 10);
    schedule.add(3, 40);
    schedule.add(1, 70);
    schedule.add(2, 40);
}
const Executor in_order = [](std::size_t count, const std::function<void(std::size_t)>& body) {
    for (std::size_t index = 0; index < count; ++index) body(index);
};
}  // namespace

TEST_CASE("with an executor the longest parts come first, and the last part of a unit finishes it",
          "[property]") {
    detail::Schedule schedule;
    for (int again = 0; again < 2; ++again) {
        fill(schedule);
        Pairs ran, ended;
        std::vector<std::size_t> started;
        schedule.run(
            in_order, [&](std::size_t unit) { started.push_back(unit); },
            [&](std::size_t unit, std::size_t part) {
                REQUIRE(started == std::vector<std::size_t>{1, 3});
                ran.emplace_back(unit, part);
            },
            [&](std::size_t unit, std::size_t parts) {
                REQUIRE(ran.back().first == unit);
                ended.emplace_back(unit, parts);
            });
        REQUIRE(ran == Pairs{{2, 0}, {1, 0}, {1, 1}, {1, 2}, {3, 0}, {3, 1}, {0, 0}});
        REQUIRE(ended == Pairs{{2, 1}, {1, 3}, {3, 2}, {0, 1}});
    }
}

TEST_CASE("without one, units run in turn, so that they can share their memory", "[property]") {
    detail::Schedule schedule;
    fill(schedule);
    Pairs events;  // unit, and 10 for its start, its parts, 20 for its end
    schedule.run(
        {}, [&](std::size_t unit) { events.emplace_back(unit, 10); },
        [&](std::size_t unit, std::size_t part) { events.emplace_back(unit, part); },
        [&](std::size_t unit, std::size_t) { events.emplace_back(unit, 20); });
    REQUIRE(events == Pairs{{0, 0},
                            {0, 20},
                            {1, 10},
                            {1, 0},
                            {1, 1},
                            {1, 2},
                            {1, 20},
                            {2, 0},
                            {2, 20},
                            {3, 10},
                            {3, 0},
                            {3, 1},
                            {3, 20}});
}

TEST_CASE("threads run every part once and finish every unit once, after all its parts", "[threads]") {
    detail::Schedule schedule;
    std::vector<std::vector<int>> ran;
    for (std::size_t unit = 0; unit < 12; ++unit) {
        schedule.add(1 + unit % 4, unit);
        ran.emplace_back(1 + unit % 4, 0);
    }
    std::vector<int> ended(12, 0);
    std::atomic<int> early{0};
    schedule.run(
        threads(), [](std::size_t) {}, [&](std::size_t unit, std::size_t part) { ++ran[unit][part]; },
        [&](std::size_t unit, std::size_t) {
            ++ended[unit];
            for (const int times : ran[unit]) early += times != 1;
        });
    REQUIRE(ended == std::vector<int>(12, 1));
    REQUIRE(early == 0);
}
