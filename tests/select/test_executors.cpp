#include "kvcull/select/executors.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "kvcull/base/memory.hpp"
#include "support/catch.hpp"

using namespace kvcull;

namespace {

/// A random ascending subset of 0 .. n - 1, in stretches: all, none, or anything between.
std::vector<index_t> random_keep(std::size_t n, SplitMix64& random) {
    const std::uint64_t share = random() % 11, change = 1 + random() % 8;  // tenths
    std::vector<index_t> keep;
    bool kept = random() % 10 < share;
    for (std::size_t j = 0; j < n; ++j) {
        if (random() % change == 0) kept = random() % 10 < share;
        if (kept) keep.push_back(static_cast<index_t>(j));
    }
    return keep;
}

struct Case {
    std::size_t rows = 0;
    std::vector<index_t> keep;
    std::vector<std::uint8_t> stays;  // [rows], by membership in `keep`
    Plan plan;

    Case(std::size_t n, std::vector<index_t> kept, Compaction compaction = Compaction::ascending)
        : rows(n), keep(std::move(kept)) {
        for (std::size_t j = 0; j < rows; ++j)
            stays.push_back(std::count(keep.begin(), keep.end(), static_cast<index_t>(j)) > 0 ? 1 : 0);
        plan.add(0, 0, rows, keep, compaction);
    }
    /// A plan names no head that keeps all; the executors take one all the same.
    [[nodiscard]] HeadPlan head() const { return plan.empty() ? HeadPlan{0, 0, rows, keep, {}} : plan[0]; }
};

/// Calls `visit(Case, random)` for 0 rows, all and none kept, and many random plans.
template <class Visit>
void for_each_case(std::uint64_t seed, Visit&& visit) {
    SplitMix64 random{seed};
    for (int round = 0; round < 400; ++round) {
        const std::size_t n = round < 20 ? static_cast<std::size_t>(round) % 3 : random() % 200;
        visit(Case(n, random_keep(n, random), round % 2 == 0 ? Compaction::ascending : Compaction::fill),
              random);
    }
}

template <class Range>
bool covers(const std::vector<Range>& runs, std::int64_t at) {
    return std::any_of(runs.begin(), runs.end(),
                       [at](const Range& run) { return at >= run.begin && at < run.end; });
}

}  // namespace

TEST_CASE("runs tell rows that go from rows that stay, and no fewer runs could", "[property]") {
    std::vector<IndexRange> removed, kept, reversed;
    for_each_case(1, [&](const Case& one, SplitMix64&) {
        removed_runs(one.head(), RunOrder::ascending, removed);
        removed_runs(one.head(), RunOrder::descending, reversed);
        kept_runs(one.head(), kept);
        std::size_t changes[2] = {};
        for (std::size_t j = 0; j < one.rows; ++j) {
            REQUIRE(covers(removed, static_cast<index_t>(j)) == (one.stays[j] == 0));
            REQUIRE(covers(kept, static_cast<index_t>(j)) == (one.stays[j] != 0));
            if (j == 0 || one.stays[j] != one.stays[j - 1]) ++changes[one.stays[j]];
        }
        REQUIRE(removed.size() == changes[0]);
        REQUIRE(kept.size() == changes[1]);
        for (const auto* runs : {&removed, &kept})
            for (std::size_t i = 1; i < runs->size(); ++i) REQUIRE((*runs)[i - 1].end < (*runs)[i].begin);
        std::reverse(reversed.begin(), reversed.end());
        REQUIRE((reversed == removed));
    });
}

TEST_CASE("runs erased in descending order leave what moves leave, over several evictions", "[property]") {
    SplitMix64 random{2};
    std::vector<IndexRange> runs;
    for (int round = 0; round < 100; ++round) {
        std::vector<int> erased, moved, naive;
        for (int eviction = 0; eviction < 6; ++eviction) {
            for (std::uint64_t fresh = random() % 40; fresh > 0; --fresh)
                for (auto* rows : {&erased, &moved, &naive})
                    rows->push_back(static_cast<int>(fresh) + 1000 * eviction);
            const Case one(naive.size(), random_keep(naive.size(), random));
            removed_runs(one.head(), RunOrder::descending, runs);
            for (const IndexRange run : runs)
                erased.erase(erased.begin() + run.begin, erased.begin() + run.end);
            move_rows(one.head().moves, moved.data(), sizeof(int), sizeof(int));
            moved.resize(one.keep.size());
            std::vector<int> rebuilt;
            for (const index_t row : one.keep) rebuilt.push_back(naive[static_cast<std::size_t>(row)]);
            naive = rebuilt;
            REQUIRE(erased == naive);
            REQUIRE(moved == naive);
        }
    }
}

TEST_CASE("runs of positions hit every row that goes and none that stays, whatever the slots' order",
          "[property]") {
    std::vector<PositionRange> runs, reversed;
    for_each_case(3, [&](const Case& one, SplitMix64& random) {
        std::vector<position_t> position(one.rows);
        position_t at = -3;
        for (position_t& p : position) p = at += 1 + static_cast<position_t>(random() % 3);
        if (random() % 2 == 0)
            for (std::size_t j = one.rows; j > 1; --j) std::swap(position[j - 1], position[random() % j]);
        removed_runs(one.head(), {position}, RunOrder::ascending, runs);
        for (std::size_t j = 0; j < one.rows; ++j) REQUIRE(covers(runs, position[j]) == (one.stays[j] == 0));
        // A run can end only at a row that stays, so the stretches of rows that go count them.
        std::vector<std::size_t> order(one.rows);
        std::iota(order.begin(), order.end(), std::size_t{0});
        std::sort(order.begin(), order.end(), [&](auto a, auto b) { return position[a] < position[b]; });
        std::size_t stretches = 0;
        for (std::size_t i = 0; i < order.size(); ++i)
            if (one.stays[order[i]] == 0 && (i == 0 || one.stays[order[i - 1]] != 0)) ++stretches;
        REQUIRE(runs.size() == stretches);
        removed_runs(one.head(), {position}, RunOrder::descending, reversed);
        for (std::size_t i = 0; i < runs.size(); ++i)
            REQUIRE(runs[i].begin == reversed[runs.size() - 1 - i].begin);
    });
}

TEST_CASE("a block is freed at once if it holds no kept row, and after the moves if it lies beyond them",
          "[property]") {
    std::vector<index_t> blocks;
    for_each_case(4, [&](const Case& one, SplitMix64& random) {
        for (const std::size_t size : {std::size_t{1}, std::size_t{2}, std::size_t{16}, std::size_t{257},
                                       1 + static_cast<std::size_t>(random() % 257)}) {
            std::vector<index_t> empty, trailing;
            for (std::size_t begin = 0; begin < one.rows; begin += size) {
                const auto block = static_cast<index_t>(begin / size);
                bool holds = false;
                for (std::size_t j = begin; j < std::min(one.rows, begin + size); ++j)
                    holds = holds || one.stays[j] != 0;
                if (!holds) empty.push_back(block);
                if (begin >= one.keep.size()) trailing.push_back(block);
            }
            CAPTURE(one.rows, size);
            empty_blocks(one.head(), size, blocks);
            REQUIRE(blocks == empty);
            const IndexRange freed = trailing_blocks(one.head(), size);
            REQUIRE(freed.end - freed.begin == static_cast<index_t>(trailing.size()));
            if (!trailing.empty()) REQUIRE(freed.begin == trailing.front());
        }
    });
}

TEST_CASE("a mask has a 1 for each row that stays", "[property]") {
    for_each_case(5, [](const Case& one, SplitMix64&) {
        std::vector<std::uint8_t> mask(one.rows, 7);
        keep_mask(one.head(), mask);
        REQUIRE(mask == one.stays);
    });
}

TEMPLATE_TEST_CASE("columns of a transposed buffer move like rows, bit for bit", "[property]", std::uint8_t,
                   float16, float) {
    for_each_case(6, [](const Case& one, SplitMix64& random) {
        const std::size_t dim = 1 + random() % 5, stride = one.rows + random() % 3;
        std::vector<TestType> columns(dim * stride + 1);
        auto* const bytes = reinterpret_cast<std::uint8_t*>(columns.data());
        for (std::size_t i = 0; i < columns.size() * sizeof(TestType); ++i)
            bytes[i] = static_cast<std::uint8_t>(random());  // NaN of every kind among them
        std::vector<TestType> before = columns;
        move_columns(one.head(), MatrixView<TestType>(columns.data(), dim, one.rows, stride));
        std::vector<index_t> source(one.rows);
        std::iota(source.begin(), source.end(), 0);
        for (const Move& move : one.head().moves)
            source[static_cast<std::size_t>(move.to)] = source[static_cast<std::size_t>(move.from)];
        for (std::size_t c = 0; c < dim; ++c)
            for (std::size_t j = 0; j < stride; ++j) {
                if (j >= one.keep.size() && j < one.rows) continue;  // belongs to nobody now
                const std::size_t from = j < one.rows ? static_cast<std::size_t>(source[j]) : j;
                REQUIRE(std::memcmp(&columns[c * stride + j], &before[c * stride + from], sizeof(TestType)) ==
                        0);
            }
    });
}

TEST_CASE("sizes that do not fit the plan are refused and nothing is written", "[contract]") {
    const Case one(4, {1, 3});
    std::vector<std::uint8_t> mask(5, 7);
    CHECK_THROWS_AS(keep_mask(one.head(), mask), error::shape_error);
    CHECK(mask == std::vector<std::uint8_t>(5, 7));
    std::vector<float> columns(6, 7.0F);
    CHECK_THROWS_AS(move_columns(one.head(), MatrixView<float>(columns.data(), 2, 3)), error::shape_error);
    CHECK(columns == std::vector<float>(6, 7.0F));
    std::vector<index_t> blocks;
    CHECK_THROWS_AS(empty_blocks(one.head(), 0, blocks), error::shape_error);
    CHECK_THROWS_AS(trailing_blocks(one.head(), 0), error::shape_error);
    std::vector<PositionRange> ranges;
    const std::vector<position_t> three{0, 1, 2}, twice{5, 6, 7, 5};
    CHECK_THROWS_AS(removed_runs(one.head(), {three}, RunOrder::ascending, ranges), error::shape_error);
    CHECK_THROWS_AS(removed_runs(one.head(), {twice}, RunOrder::ascending, ranges), error::shape_error);
    // A keep list that no Plan would take.
    const std::vector<index_t> bad{1, 4};
    const HeadPlan head{0, 0, 4, bad, {}};
    std::vector<IndexRange> runs;
    mask.resize(4);
    CHECK_THROWS_AS(removed_runs(head, RunOrder::ascending, runs), error::shape_error);
    CHECK_THROWS_AS(kept_runs(head, runs), error::shape_error);
    CHECK_THROWS_AS(empty_blocks(head, 2, blocks), error::shape_error);
    CHECK_THROWS_AS(trailing_blocks(head, 2), error::shape_error);
    CHECK_THROWS_AS(keep_mask(head, mask), error::shape_error);
}

TEST_CASE("vectors with room keep their memory", "[contract]") {
    const Case one(9, {1, 3, 4, 8});
    std::vector<position_t> position{8, 7, 6, 5, 4, 3, 2, 1, 0};
    std::vector<IndexRange> runs;
    std::vector<PositionRange> ranges;
    runs.reserve(9);
    ranges.reserve(9);
    const auto* const at = runs.data();
    const auto* const where = ranges.data();
    removed_runs(one.head(), RunOrder::descending, runs);
    removed_runs(one.head(), {position}, RunOrder::descending, ranges);
    CHECK(runs.data() == at);
    CHECK(ranges.data() == where);
}
