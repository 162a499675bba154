#include "kvcull/select/plan.hpp"

#include <algorithm>
#include <numeric>
#include <vector>

#include "kvcull/base/memory.hpp"
#include "kvcull/select/executors.hpp"
#include "support/catch.hpp"

using namespace kvcull;

namespace {

/// A random ascending subset of 0 .. n - 1; half of the time it lacks three rows at most.
std::vector<index_t> random_keep(std::size_t n, SplitMix64& random) {
    std::vector<index_t> keep(n);
    std::iota(keep.begin(), keep.end(), index_t{0});
    const std::uint64_t share = random() % 22;  // tenths
    if (share <= 10)
        std::erase_if(keep, [&](index_t) { return random() % 10 >= share; });
    else
        for (std::uint64_t gone = random() % 4; gone > 0 && !keep.empty(); --gone)
            keep.erase(keep.begin() + static_cast<std::ptrdiff_t>(random() % keep.size()));
    return keep;
}

/// Rows as `width` bytes every `stride`, each byte telling its row; what lies between is 0xEE.
std::vector<unsigned char> rows_of(std::size_t n, std::size_t width, std::size_t stride) {
    std::vector<unsigned char> bytes(n * stride, 0xEE);
    for (std::size_t j = 0; j < n; ++j)
        for (std::size_t i = 0; i < width; ++i) bytes[j * stride + i] = static_cast<unsigned char>(j);
    return bytes;
}

}  // namespace

TEST_CASE("moves carried out in order in place leave exactly the kept rows", "[property]") {
    SplitMix64 random{1};
    for (int round = 0; round < 2000; ++round) {
        const std::size_t n = random() % 250, width = 1 + random() % 3, stride = width + random() % 2;
        const std::vector<index_t> keep = random_keep(n, random);
        for (const Compaction compaction : {Compaction::ascending, Compaction::fill}) {
            Plan plan;
            plan.add(2, 1, n, keep, compaction);
            CAPTURE(round, n, width, stride, static_cast<int>(compaction));
            if (keep.size() == n) {
                REQUIRE(plan.empty());
                continue;
            }
            REQUIRE(plan.size() == 1);
            const HeadPlan head = plan[0];
            REQUIRE((head.layer == 2 && head.head == 1 && head.rows == n));
            REQUIRE(std::equal(head.keep.begin(), head.keep.end(), keep.begin(), keep.end()));
            std::vector<unsigned char> bytes = rows_of(n, width, stride);
            move_rows(head.moves, bytes.data(), width, stride);
            std::vector<index_t> left;
            for (std::size_t j = 0; j < keep.size(); ++j) {
                left.push_back(static_cast<index_t>(bytes[j * stride]));
                for (std::size_t i = 0; i < width; ++i) REQUIRE(bytes[j * stride + i] == bytes[j * stride]);
            }
            for (std::size_t j = 0; j < n; ++j)
                for (std::size_t i = width; i < stride; ++i) REQUIRE(bytes[j * stride + i] == 0xEE);
            if (compaction == Compaction::ascending) REQUIRE((left == keep));
            std::sort(left.begin(), left.end());
            REQUIRE((left == keep));
        }
    }
}

TEST_CASE("filling gaps moves at most one row per evicted row, and no row that may stay where it is",
          "[property]") {
    SplitMix64 random{2};
    for (int round = 0; round < 2000; ++round) {
        const std::size_t n = 1 + random() % 250;
        const std::vector<index_t> keep = random_keep(n, random);
        Plan plan;
        plan.add(0, 0, n, keep, Compaction::fill);
        if (plan.empty()) continue;
        REQUIRE(plan[0].moves.size() <= n - keep.size());
        for (const Move& move : plan[0].moves) {
            REQUIRE(move.from >= static_cast<index_t>(keep.size()));
            REQUIRE(move.to < static_cast<index_t>(keep.size()));
        }
    }
}

TEST_CASE("no move writes where a later move still reads", "[property]") {
    SplitMix64 random{3};
    for (int round = 0; round < 1000; ++round) {
        const std::size_t n = 1 + random() % 60;
        const std::vector<index_t> keep = random_keep(n, random);
        for (const Compaction compaction : {Compaction::ascending, Compaction::fill}) {
            Plan plan;
            plan.add(0, 0, n, keep, compaction);
            if (plan.empty()) continue;
            const auto moves = plan[0].moves;
            for (std::size_t i = 0; i < moves.size(); ++i)
                for (std::size_t later = i + 1; later < moves.size(); ++later) {
                    REQUIRE(moves[later].from != moves[i].to);
                    REQUIRE(moves[later].to != moves[i].to);
                }
        }
    }
}

TEST_CASE("one victim among ascending rows moves all after it, or the last one into the gap", "[property]") {
    const std::vector<index_t> keep{0, 1, 3, 4, 5};
    Plan plan;
    plan.add(0, 0, 6, keep, Compaction::ascending);
    plan.add(0, 1, 6, keep, Compaction::fill);
    REQUIRE(plan.size() == 2);
    CHECK(plan[0].moves.size() == 3);
    REQUIRE(plan[1].moves.size() == 1);
    CHECK(plan[1].moves[0].from == 5);
    CHECK(plan[1].moves[0].to == 2);
}

TEST_CASE("keeping none empties a head and keeping all is no plan", "[property]") {
    const std::vector<index_t> all{0, 1, 2};
    Plan plan;
    plan.add(0, 0, 3, all, Compaction::fill);
    CHECK(plan.empty());
    plan.add(0, 0, 0, {}, Compaction::fill);
    CHECK(plan.empty());
    plan.add(0, 0, 3, {}, Compaction::fill);
    REQUIRE(plan.size() == 1);
    CHECK(plan[0].keep.empty());
    CHECK(plan[0].moves.empty());
    plan.clear();
    CHECK(plan.empty());
}

TEST_CASE("a keep list that is not ascending or out of range is refused and nothing is added", "[contract]") {
    Plan plan;
    const std::vector<index_t> good{0, 2};
    plan.add(0, 0, 4, good, Compaction::fill);
    for (const std::vector<index_t>& bad : {std::vector<index_t>{2, 1}, std::vector<index_t>{1, 1},
                                            std::vector<index_t>{0, 4}, std::vector<index_t>{-1, 2}})
        CHECK_THROWS_AS(plan.add(0, 1, 4, bad, Compaction::fill), error::shape_error);
    REQUIRE(plan.size() == 1);
    CHECK(plan[0].keep.size() == 2);
    CHECK(plan[0].moves.size() == 1);
}

TEST_CASE("a plan that reserved enough keeps its memory", "[contract]") {
    Plan plan;
    plan.reserve(2, 50);
    std::vector<index_t> keep(49);
    std::iota(keep.begin(), keep.end(), 1);
    plan.add(0, 0, 50, keep, Compaction::ascending);
    const index_t* const first = plan[0].keep.data();
    plan.add(0, 1, 50, keep, Compaction::ascending);
    CHECK(plan[0].keep.data() == first);
    CHECK(plan[1].moves.size() == 49);
    CHECK(plan[1].moves.data() == plan[0].moves.data() + 49);
}
