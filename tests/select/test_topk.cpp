#include "kvcull/select/topk.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <set>
#include <vector>

#include "kvcull/base/memory.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

/// One head's numbers, in slot order.
struct Head {
    std::vector<float> score;
    std::vector<position_t> position;
    std::size_t size = 0;
    Protected protect = {};

    [[nodiscard]] Candidates candidates() const { return {score, PositionsView(position), size, protect}; }
};

/// Slots by falling rank: score (NaN lowest, -0 equal to 0), then the later position. A full sort of its own.
std::vector<std::size_t> ranked(const Head& head, std::vector<std::size_t> slots) {
    const auto order = [&](std::size_t j) {
        return is_nan(head.score[j]) ? -std::numeric_limits<double>::infinity()
                                     : static_cast<double>(head.score[j]) + 0.0;
    };
    std::stable_sort(slots.begin(), slots.end(), [&](std::size_t a, std::size_t b) {
        return order(a) != order(b) ? order(a) > order(b) : head.position[a] > head.position[b];
    });
    return slots;
}

/// The same by the words of the specification: pinned, then the newest, then the oldest, then the best.
std::vector<index_t> reference(const Head& head, std::span<const PositionRange> pinned) {
    const std::size_t n = head.score.size();
    std::vector<std::size_t> slots(n);
    std::iota(slots.begin(), slots.end(), 0U);
    std::set<std::size_t> keep;
    const auto add = [&](std::size_t slot) {
        if (keep.size() < std::min(head.size, n)) keep.insert(slot);
    };
    for (const std::size_t j : slots)
        for (const PositionRange& range : pinned)
            if (head.position[j] >= range.begin && head.position[j] < range.end) add(j);
    std::vector<std::size_t> by_age = slots;
    std::sort(by_age.begin(), by_age.end(),
              [&](auto a, auto b) { return head.position[a] > head.position[b]; });
    const std::size_t recent = std::min({head.protect.recent, head.size, n});
    for (std::size_t i = 0; i < recent; ++i) add(by_age[i]);
    const std::size_t sinks =
        std::min({head.protect.sinks, head.size - std::min(head.protect.recent, head.size), n});
    for (std::size_t i = 0; i < sinks; ++i) add(by_age[n - 1 - i]);
    for (const std::size_t j : ranked(head, slots)) add(j);
    return {keep.begin(), keep.end()};
}

std::vector<index_t> select(Selector& selector, const Head& head,
                            std::span<const PositionRange> pinned = {}) {
    std::vector<index_t> keep;
    selector.head(head.candidates(), pinned, keep);
    return keep;
}

/// Scores with many ties, zeros of both signs and what is not finite; positions ascending or in no order.
Head random_head(std::size_t n, SplitMix64& random, bool ascending) {
    const float specials[] = {
        0.0F, -0.0F, quiet_nan(), -quiet_nan(), negative_infinity(), -negative_infinity()};
    Head head;
    for (std::size_t j = 0; j < n; ++j) {
        const std::uint64_t draw = random() % 20;
        head.score.push_back(draw < 6 ? specials[draw] : static_cast<float>(random() % 9) - 4.0F);
        head.position.push_back(static_cast<position_t>(3 * j + random() % 3));
    }
    if (!ascending)
        for (std::size_t j = n; j > 1; --j) std::swap(head.position[j - 1], head.position[random() % j]);
    return head;
}

}  // namespace

TEST_CASE("selection agrees with a full sort, whatever the scores, order and protection", "[differential]") {
    SplitMix64 random{1};
    Selector selector;
    for (int round = 0; round < 3000; ++round) {
        const std::size_t n = random() % 40;
        Head head = random_head(n, random, round % 2 == 0);
        head.size = random() % 45;
        if (round % 3 != 0) head.protect = {random() % 12, random() % 12};
        std::vector<PositionRange> pinned;
        // Pins beyond the size are refused before they come here.
        std::size_t held = 0;
        for (std::uint64_t k = random() % 3; k > 0; --k) {
            const auto begin = static_cast<position_t>(random() % 100);
            pinned.push_back({begin, begin + static_cast<position_t>(random() % 10)});
        }
        for (const position_t position : head.position)
            held += std::any_of(pinned.begin(), pinned.end(), [&](const PositionRange& range) {
                return position >= range.begin && position < range.end;
            });
        if (held > head.size) pinned.clear();
        const std::vector<index_t> want = reference(head, pinned), got = select(selector, head, pinned);
        CAPTURE(round, n, head.size, head.protect.sinks, head.protect.recent);
        REQUIRE((got == want));
    }
}

TEST_CASE("selection agrees with a full sort where few of many paged rows go, as at every decoded token",
          "[differential]") {
    SplitMix64 random{4};
    Selector selector;
    constexpr std::size_t block_rows = 7;
    for (int round = 0; round < 600; ++round) {
        const std::size_t n = 100 + random() % 100;
        Head head = random_head(n, random, true);
        head.size = n - 1 - random() % 3;
        head.protect = {random() % 9, round % 3 == 0 ? 0 : random() % n};
        // Mostly without gaps; slots in no order but for the oldest rows and the newest, or at all.
        if (round % 4 != 0) std::iota(head.position.begin(), head.position.end(), position_t{5});
        if (round % 8 == 1) head.position.back() += 1;
        const std::size_t first = round % 8 == 2 ? 0 : head.protect.sinks, last = n - (round % 8 < 4 ? 0 : 1);
        for (std::size_t j = first + 1; round % 8 != 7 && j < last; ++j)
            std::swap(head.position[j], head.position[first + random() % (j + 1 - first)]);
        std::vector<const std::byte*> blocks;
        for (std::size_t j = 0; j < n; j += block_rows)
            blocks.push_back(reinterpret_cast<const std::byte*>(&head.position[j]));
        Candidates paged = head.candidates();
        paged.position = PositionsView(blocks.data(), 0, block_rows, n);
        std::vector<index_t> got;
        selector.head(paged, {}, got);
        CAPTURE(round, n, head.size, head.protect.sinks, head.protect.recent);
        REQUIRE((got == reference(head, {})));
    }
}

TEST_CASE("of equal scores the later position stays, not the later slot", "[property]") {
    Selector selector;
    const Head head{.score = {1, 1, 1, 1}, .position = {7, 30, 5, 20}, .size = 2};
    CHECK((select(selector, head) == std::vector<index_t>{1, 3}));
}

TEST_CASE("NaN counts as minus infinity and the zeros are equal", "[property]") {
    CHECK(score_order(quiet_nan()) == score_order(negative_infinity()));
    CHECK(score_order(-quiet_nan()) == score_order(negative_infinity()));
    CHECK(score_order(0.0F) == score_order(-0.0F));
    const std::vector<float> rising{negative_infinity(), -3e38F, -1.0F, -1e-45F, 0.0F, 1e-45F, 1.0F, 3e38F,
                                    -negative_infinity()};
    for (std::size_t j = 1; j < rising.size(); ++j)
        CHECK(score_order(rising[j - 1]) < score_order(rising[j]));
}

TEST_CASE("a head within its size keeps all, protected or not", "[property]") {
    Selector selector;
    for (const std::size_t size : {5U, 6U, 100U}) {
        const Head head{
            .score = {quiet_nan(), 2, 1, 0, 5}, .position = {1, 2, 3, 4, 5}, .size = size, .protect = {9, 9}};
        CHECK((select(selector, head) == std::vector<index_t>{0, 1, 2, 3, 4}));
    }
    CHECK(select(selector, {.score = {}, .position = {}, .size = 3, .protect = {2, 2}}).empty());
    CHECK(select(selector, {.score = {1, 2}, .position = {0, 1}, .size = 0, .protect = {2, 2}}).empty());
}

TEST_CASE("pinned rows come first; then the newest rows as far as they fit, newest first", "[property]") {
    Selector selector;
    const std::vector<PositionRange> pinned{{10, 13}};
    // Slots in no order: positions 10, 11, 12 are pinned, two of the four newest still fit.
    const Head head{.score = {9, 9, 9, 0, 0, 0, 0, 0, 0},
                    .position = {23, 20, 22, 10, 11, 5, 21, 12, 4},
                    .size = 5,
                    .protect = {3, 4}};
    CHECK((select(selector, head, pinned) == std::vector<index_t>{0, 2, 3, 4, 7}));
}

TEST_CASE("pooled heads share one total: protected rows first, then the best of all", "[differential]") {
    SplitMix64 random{2};
    Selector selector;
    for (int round = 0; round < 1000; ++round) {
        const std::size_t count = 1 + random() % 4;
        const HeadTie tie = round % 2 == 0 ? HeadTie::lower : HeadTie::later;
        std::vector<Head> heads;
        std::vector<Candidates> candidates;
        std::size_t held = 0, fixed = 0;
        const std::size_t size = random() % 12;
        for (std::size_t h = 0; h < count; ++h) {
            heads.push_back(random_head(random() % 20, random, round % 3 == 0));
            // Positions of different heads meet, so that ties between heads happen.
            for (std::size_t j = 0; j < heads[h].position.size(); ++j) heads[h].position[j] /= 3;
            heads[h].size = size;
            heads[h].protect = {random() % 3, random() % 3};
            held += heads[h].score.size();
        }
        for (const Head& head : heads) {
            candidates.push_back(head.candidates());
            fixed += std::min({head.protect.sinks + head.protect.recent, size, head.score.size()});
        }
        const std::size_t total = std::min(held, std::max(fixed, count * size));
        std::vector<std::vector<index_t>> got(count);
        selector.pooled(candidates, total, {}, tie, got);

        std::vector<std::set<index_t>> want(count);
        struct Row {
            std::size_t head, slot;
        };
        std::vector<Row> rest;
        std::size_t taken = 0;
        for (std::size_t h = 0; h < count; ++h) {
            Head alone = heads[h];
            std::fill(alone.score.begin(), alone.score.end(), 0.0F);
            alone.size = std::min(size, alone.score.size());
            const std::size_t recent = std::min(alone.protect.recent, alone.size);
            const std::size_t sinks = std::min(alone.protect.sinks, alone.size - recent);
            std::vector<std::size_t> by_age(alone.score.size());
            std::iota(by_age.begin(), by_age.end(), 0U);
            std::sort(by_age.begin(), by_age.end(),
                      [&](auto a, auto b) { return alone.position[a] > alone.position[b]; });
            for (std::size_t i = 0; i < recent; ++i) want[h].insert(static_cast<index_t>(by_age[i]));
            for (std::size_t i = 0; i < sinks; ++i)
                want[h].insert(static_cast<index_t>(by_age[by_age.size() - 1 - i]));
            taken += want[h].size();
            for (std::size_t j = 0; j < alone.score.size(); ++j)
                if (!want[h].contains(static_cast<index_t>(j))) rest.push_back({h, j});
        }
        std::stable_sort(rest.begin(), rest.end(), [&](const Row& a, const Row& b) {
            const std::uint32_t x = score_order(heads[a.head].score[a.slot]),
                                y = score_order(heads[b.head].score[b.slot]);
            if (x != y) return x > y;
            const position_t p = heads[a.head].position[a.slot], q = heads[b.head].position[b.slot];
            if (p != q) return p > q;
            return tie == HeadTie::lower ? a.head < b.head : a.head > b.head;
        });
        for (std::size_t i = 0; i < total - taken; ++i)
            want[rest[i].head].insert(static_cast<index_t>(rest[i].slot));
        CAPTURE(round, count, total);
        for (std::size_t h = 0; h < count; ++h)
            REQUIRE((got[h] == std::vector<index_t>(want[h].begin(), want[h].end())));
    }
}

TEST_CASE("after reserve a selection allocates nothing", "[contract]") {
    SplitMix64 random{3};
    Head head = random_head(500, random, false);
    head.size = 200;
    head.protect = {10, 20};
    Selector selector;
    selector.reserve(500);
    std::vector<index_t> keep;
    keep.reserve(500);
    const index_t* const before = keep.data();
    selector.head(head.candidates(), {}, keep);
    CHECK(keep.size() == 200);
    CHECK(keep.data() == before);
}
