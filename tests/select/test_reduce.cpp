#include "kvcull/select/reduce.hpp"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "kvcull/base/memory.hpp"
#include "support/catch.hpp"

using namespace kvcull;

namespace {

struct Head {
    std::vector<float> score;
    std::vector<position_t> position;
    std::size_t size = 0;
    Protected protect;

    [[nodiscard]] Candidates candidates() const { return {score, {position}, size, protect}; }
};
std::vector<Candidates> candidates(const std::vector<Head>& heads) {
    std::vector<Candidates> result;
    for (const Head& head : heads) result.push_back(head.candidates());
    return result;
}

struct Result {
    std::vector<std::vector<index_t>> keep;
    double given_up = 0.0;
};
Result reduce(const Reduction& how, std::size_t kv_heads, const std::vector<Head>& heads,
              const std::vector<PositionRange>& pinned = {}) {
    Result result;
    result.keep.resize(how.all_layers ? 1 : heads.size() / kv_heads);
    result.given_up = Reducer{}(how, kv_heads, candidates(heads), pinned, result.keep);
    return result;
}

/// Scores of few distinct values, so that many are equal; sometimes one that is not finite.
std::vector<Head> random_heads(std::size_t count, std::size_t n, bool finite, SplitMix64& random) {
    std::vector<position_t> position(n);
    for (std::size_t j = 0; j < n; ++j) position[j] = static_cast<position_t>(3 * j);
    if (random() % 2 == 0)
        for (std::size_t j = n; j > 1; --j) std::swap(position[j - 1], position[random() % j]);
    std::vector<Head> heads(count);
    for (Head& head : heads) {
        head.position = position;
        for (std::size_t j = 0; j < n; ++j) {
            head.score.push_back(static_cast<float>(random() % 8) / 4.0F);
            if (!finite && random() % 12 == 0)
                head.score[j] = random() % 3 == 0   ? positive_infinity()
                                : random() % 2 == 0 ? negative_infinity()
                                                    : quiet_nan();
        }
    }
    return heads;
}

/// A number that orders scores: NaN like -Inf.
double value(const float& score) {
    if (is_nan(score)) return -1e300;
    if (!is_finite(score)) return score_order(score) > score_order(0.0F) ? 1e300 : -1e300;
    return static_cast<double>(score);
}
/// What one head keeps without protected rows: by sorting.
std::vector<std::size_t> best(const Head& head) {
    std::vector<std::size_t> rows(head.score.size());
    std::iota(rows.begin(), rows.end(), std::size_t{0});
    std::sort(rows.begin(), rows.end(), [&](std::size_t a, std::size_t b) {
        return std::tuple(value(head.score[a]), head.position[a]) >
               std::tuple(value(head.score[b]), head.position[b]);
    });
    rows.resize(std::min(head.size, rows.size()));
    return rows;
}
double total(const Head& head, const std::vector<std::size_t>& rows) {
    double sum = 0.0;
    for (const std::size_t j : rows)
        if (is_finite(head.score[j])) sum += static_cast<double>(head.score[j]);
    return sum;
}

/// The rows that heads without protected rows keep together, by sorting whole blocks.
std::vector<index_t> naive(const Reduction& how, const std::vector<Head>& heads) {
    const std::size_t n = heads[0].score.size(), rows = how.block_rows;
    std::size_t size = 0;
    for (const Head& head : heads) size += std::min(head.size, n);
    size /= heads.size();
    std::vector<std::set<std::size_t>> own;
    for (const Head& head : heads) {
        const auto kept = best(head);
        own.emplace_back(kept.begin(), kept.end());
    }
    struct Block {
        bool infinite;
        std::size_t votes;
        double score;
        position_t latest;
        std::vector<index_t> rows;
    };
    std::vector<Block> blocks;
    for (std::size_t begin = 0; begin < n; begin += rows) {
        Block block{false, 0, 0.0, 0, {}};
        std::vector<double> scores;
        for (std::size_t j = begin; j < std::min(n, begin + rows); ++j) {
            block.rows.push_back(static_cast<index_t>(j));
            block.latest = std::max(block.latest, heads[0].position[j]);
            for (std::size_t h = 0; h < heads.size(); ++h) {
                scores.push_back(value(heads[h].score[j]));
                if (how.by == Consensus::vote) block.votes += own[h].count(j);
            }
        }
        const double highest = *std::max_element(scores.begin(), scores.end());
        const double lowest = *std::min_element(scores.begin(), scores.end());
        block.infinite = highest == 1e300;
        if (how.by == Consensus::max || block.infinite)
            block.score = highest;
        else if (lowest == -1e300)
            block.score = lowest;
        else
            block.score = static_cast<double>(static_cast<float>(
                std::accumulate(scores.begin(), scores.end(), 0.0) / static_cast<double>(scores.size())));
        blocks.push_back(block);
    }
    std::vector<index_t> keep;
    std::size_t room = size / rows;
    if (n % rows != 0 && n % rows <= size % rows) {
        keep = blocks.back().rows;
        blocks.pop_back();
    }
    std::sort(blocks.begin(), blocks.end(), [](const Block& a, const Block& b) {
        return std::tuple(a.infinite, a.votes, a.score, a.latest) >
               std::tuple(b.infinite, b.votes, b.score, b.latest);
    });
    for (std::size_t i = 0; i < std::min(room, blocks.size()); ++i)
        keep.insert(keep.end(), blocks[i].rows.begin(), blocks[i].rows.end());
    std::sort(keep.begin(), keep.end());
    return keep;
}

}  // namespace

TEST_CASE("heads agree on the rows or blocks that sorting them finds, and report what they give up",
          "[property][differential]") {
    SplitMix64 random{1};
    for (int round = 0; round < 600; ++round) {
        const std::size_t kv_heads = 1 + random() % 3, layers = 1 + random() % 3, n = random() % 90;
        auto heads = random_heads(kv_heads * layers, n, round % 2 == 0, random);
        for (Head& head : heads) head.size = random() % 4 == 0 ? n + random() % 5 : random() % (n + 1);
        const Reduction how{
            .by = static_cast<Consensus>(random() % 3),
            .all_layers = random() % 2 == 0,
            .block_rows = random() % 2 == 0 ? 1 : 1 + static_cast<std::size_t>(random() % 40)};
        CAPTURE(round, kv_heads, layers, n, how.block_rows, how.all_layers, static_cast<int>(how.by));
        const Result result = reduce(how, kv_heads, heads);
        const std::size_t group = how.all_layers ? heads.size() : kv_heads;
        double given_up = 0.0;
        for (std::size_t list = 0; list < result.keep.size(); ++list) {
            const std::vector<Head> part(heads.begin() + static_cast<std::ptrdiff_t>(list * group),
                                         heads.begin() + static_cast<std::ptrdiff_t>((list + 1) * group));
            const std::vector<index_t> wanted = naive(how, part);
            REQUIRE(result.keep[list] == wanted);
            for (const Head& head : part)
                given_up += total(head, best(head)) - total(head, {wanted.begin(), wanted.end()});
        }
        REQUIRE(result.given_up == Approx(given_up).margin(1e-9));
    }
}

TEST_CASE("one head alone keeps what selection keeps and gives nothing up", "[property][differential]") {
    SplitMix64 random{2};
    for (int round = 0; round < 300; ++round) {
        const std::size_t n = 1 + random() % 60;
        auto heads = random_heads(1, n, round % 2 == 0, random);
        heads[0].size = random() % (n + 1);
        heads[0].protect = {random() % 5, random() % 9};
        std::vector<PositionRange> pinned;
        if (heads[0].size > 3 && random() % 2 == 0) pinned.push_back({6, 12});
        std::vector<index_t> wanted;
        Selector{}.head(heads[0].candidates(), pinned, wanted);
        for (const Consensus by : {Consensus::max, Consensus::mean, Consensus::vote}) {
            const Result result = reduce({.by = by}, 1, heads, pinned);
            REQUIRE(result.keep[0] == wanted);
            REQUIRE(result.given_up == 0.0);
        }
    }
}

TEST_CASE("sharing a list with equal budgets never gains score, and heads of one mind lose none",
          "[property]") {
    SplitMix64 random{3};
    for (int round = 0; round < 200; ++round) {
        const std::size_t n = 1 + random() % 60, size = random() % (n + 1);
        auto heads = random_heads(4, n, true, random);
        for (Head& head : heads) head.size = size;
        const auto by = static_cast<Consensus>(random() % 3);
        const double per_layer = reduce({.by = by}, 2, heads).given_up;
        REQUIRE(per_layer >= -1e-9);
        REQUIRE(reduce({.by = by, .all_layers = true}, 2, heads).given_up >= -1e-9);
        for (Head& head : heads) head.score = heads[0].score;
        REQUIRE(reduce({.by = by, .all_layers = true}, 2, heads).given_up == Approx(0.0).margin(1e-9));
    }
}

TEST_CASE("the newest of more recent blocks than there is room for stay, whatever their scores",
          "[contract]") {
    std::vector<position_t> position(17);
    std::iota(position.begin(), position.end(), position_t{0});
    for (const float old : {1.0F, 1e30F, std::numeric_limits<float>::infinity()}) {
        std::vector<float> score(17, old);
        score[16] = 0.0F;
        CHECK(reduce({.block_rows = 16}, 1, {{score, position, 16, {0, 8}}}).keep[0] ==
              std::vector<index_t>{16});
        CHECK(reduce({.block_rows = 4}, 1, {{score, position, 12, {1, 11}}}).keep[0] ==
              std::vector<index_t>{0, 1, 2, 3, 12, 13, 14, 15, 16});
    }
}

TEST_CASE("protected rows outlive any score, and the budget outlives them", "[property]") {
    SplitMix64 random{4};
    for (int round = 0; round < 300; ++round) {
        const std::size_t n = 20 + random() % 60, rows = 1 + random() % 8;
        auto heads = random_heads(3, n, round % 2 == 0, random);
        for (Head& head : heads) head.size = 8 * rows + random() % 8;  // eight blocks hold them all
        heads[1].protect.sinks = 1;
        heads[2].protect.recent = 1 + random() % 2;
        const std::size_t recent = heads[2].protect.recent;
        const std::vector<PositionRange> pinned{{15, 22}};  // of positions 0, 3, 6, ..: three
        const auto by = static_cast<Consensus>(random() % 3);
        const auto keep = reduce({.by = by, .block_rows = rows}, 3, heads, pinned).keep[0];
        std::size_t sum = 0;
        for (const Head& head : heads) sum += std::min(head.size, n);
        REQUIRE(keep.size() <= sum / 3);
        std::set<position_t> kept;
        for (const index_t row : keep) kept.insert(heads[0].position[static_cast<std::size_t>(row)]);
        std::vector<position_t> must{0, 15, 18, 21};
        for (std::size_t i = 1; i <= recent; ++i) must.push_back(static_cast<position_t>(3 * (n - i)));
        for (const position_t position : must) REQUIRE(kept.count(position) == 1);
    }
    // Four pinned rows of one block are one block.
    const Head four{{1, 1, 1, 1, 2, 2, 2, 2}, {0, 1, 2, 3, 4, 5, 6, 7}, 4, {}};
    CHECK(reduce({.block_rows = 4}, 1, {four}, {{0, 4}}).keep[0] == std::vector<index_t>{0, 1, 2, 3});
    // Two blocks of three: a partial block of recent rows goes before the sinks.
    Head head{{9, 9, 9, 9, 9, 9, 0, 0, 0}, {0, 1, 2, 3, 4, 5, 6, 7, 8}, 6, {2, 4}};
    CHECK(reduce({.block_rows = 3}, 1, {head}).keep[0] == std::vector<index_t>{0, 1, 2, 6, 7, 8});
}

TEST_CASE("layers keep equally many rows or blocks where asked", "[property]") {
    SplitMix64 random{5};
    for (int round = 0; round < 200; ++round) {
        auto heads = random_heads(2, 12, true, random);
        const auto others = random_heads(2, 30 + random() % 10, true, random);
        heads.insert(heads.end(), others.begin(), others.end());
        for (Head& head : heads) head.size = random() % 14;
        const std::size_t rows = 1 + random() % 5;
        const Reduction how{.equal_counts = true, .block_rows = rows};
        const Result result = reduce(how, 2, heads);
        std::vector<std::size_t> blocks;
        for (const auto& keep : result.keep) {
            std::set<std::size_t> all;
            for (const index_t row : keep) all.insert(static_cast<std::size_t>(row) / rows);
            blocks.push_back(all.size());
        }
        REQUIRE(blocks[0] == blocks[1]);
    }
    // Of recent rows that are too many for the smaller layer, the newest ones stay.
    const Head small{{9, 8, 7, 6, 5, 4}, {0, 1, 2, 3, 4, 5}, 2, {}};
    Head large = small;
    large.size = 5;
    large.protect.recent = 4;
    CHECK(reduce({.equal_counts = true}, 1, {small, large}).keep[1] == std::vector<index_t>{4, 5});
}

TEST_CASE("heads that do not fit each other are refused and no list changes", "[contract]") {
    const Head good{{1, 2, 3}, {0, 1, 2}, 2, {}};
    Head longer{{1, 2, 3, 4}, {0, 1, 2, 3}, 2, {}}, elsewhere = good, lying = good;
    elsewhere.position[1] = 7;
    lying.position.pop_back();
    const auto refused = [](const Reduction& how, std::size_t kv_heads, const std::vector<Head>& heads,
                            std::size_t lists, const std::vector<PositionRange>& pinned = {}) {
        std::vector<std::vector<index_t>> keep(lists, {42});
        Reducer reducer;
        std::string message;
        try {
            reducer(how, kv_heads, candidates(heads), pinned, keep);
        } catch (const error::exception& e) {
            message = e.what();
        }
        for (const auto& list : keep) REQUIRE(list == std::vector<index_t>{42});
        return message;
    };
    using Heads = std::vector<Head>;
    CHECK(refused({}, 2, Heads{good, longer}, 1) == "Reducer: heads[1].score.size() is 4, want 3");
    CHECK(refused({}, 1, Heads{good, lying}, 2) == "Reducer: heads[1].position.size() is 2, want 3");
    CHECK(refused({.all_layers = true}, 1, Heads{good, elsewhere}, 1) ==
          "Reducer: heads[1].position[1] is 7, want 1");
    CHECK(refused({}, 2, Heads{good}, 1) == "Reducer: heads.size() is 1, want a multiple of kv_heads = 2");
    CHECK(refused({}, 0, Heads{good}, 1) == "Reducer: heads.size() is 1, want a multiple of kv_heads = 0");
    CHECK(refused({}, 1, Heads{good, good}, 1) == "Reducer: keep.size() is 1, want 2");
    CHECK(refused({.block_rows = 0}, 1, Heads{good}, 1) == "Reducer: block_rows is 0, want at least 1");
    CHECK(refused({}, 1, Heads{good}, 1, {{0, 3}}) ==
          "Reducer: budget is 2 blocks of 1 rows, want at least the 3 with pinned rows");
}
