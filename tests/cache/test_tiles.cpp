#include "kvcull/cache/tiles.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <functional>
#include <set>
#include <vector>

#include "support/catch.hpp"
#include "support/every_policy.hpp"
#include "support/reference.hpp"
#include "support/stubs.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

struct Case {
    std::size_t group, n, count, dim, value_dim;
    std::vector<float> q, k, v, out;
    std::vector<position_t> positions;

    Case(std::size_t group_, std::size_t n_, std::size_t count_, std::size_t dim_, std::size_t value_dim_)
        : group(group_),
          n(n_),
          count(count_),
          dim(dim_),
          value_dim(value_dim_),
          q(random_floats(3 * group * count * dim, 1)),  // of three KV heads: the second is run
          k(random_floats(n * dim, 2)),
          v(random_floats(n * value_dim, 3)),
          out(3 * group * count * value_dim, 7.0F),
          positions(n) {}

    [[nodiscard]] HeadStep base() const {
        return {.group = group,
                .cached = {{k.data(), n, dim, dim}, {v.data(), n, value_dim, value_dim}, {positions}},
                .scale = 0.3F,
                .kernels = &simd::kernels()};
    }
    [[nodiscard]] HeadsView<const float> queries() const {
        return head_major(q.data(), 3 * group, count, dim);
    }
    [[nodiscard]] HeadsView<float> outputs() { return head_major(out.data(), 3 * group, count, value_dim); }
    [[nodiscard]] ReferenceAttention naive(bool causal) const {
        std::vector<Visible> visible;
        for (std::size_t g = 0; g < group; ++g)
            for (std::size_t i = 0; i < count; ++i) visible.push_back({0, 0, causal ? n - count + i + 1 : n});
        return reference_attention(std::span(q).subspan(group * count * dim, group * count * dim), k, v,
                                   visible, n, dim, value_dim, static_cast<double>(0.3F));
    }
};

}  // namespace

TEST_CASE("a tile holds about a MiB of attention, four tokens at least and sixty-four at most",
          "[property]") {
    REQUIRE(detail::tile_tokens(1, 0) == 64);
    REQUIRE(detail::tile_tokens(8, 100) == 64);
    REQUIRE(detail::tile_tokens(4, 4096) == 16);
    REQUIRE(detail::tile_tokens(8, 1U << 20U) == 4);
    for (const std::size_t group : {1U, 4U, 7U, 8U})
        for (std::size_t n = 1; n < (1U << 20U); n = n * 3 + 1) {
            const std::size_t tile = detail::tile_tokens(group, n);
            REQUIRE((tile >= 4 && tile <= 64));
            REQUIRE((tile == 4 || tile * group * n * sizeof(float) <= (1U << 20U)));
        }
}

TEST_CASE("tiles cover the counted tokens once, with what was asked for and no more", "[property]") {
    const std::size_t group = GENERATE(std::size_t{1}, 3);
    const std::size_t count = GENERATE(std::size_t{1}, 63, 64, 65, 200);
    const std::size_t rows = GENERATE(std::size_t{0}, 1, 64, 137, all_rows);
    const bool with_output = GENERATE(true, false), causal = GENERATE(true, false);
    const unsigned wanted = GENERATE(0U, 1U, 2U, 4U, 7U, 8U, 16U, 10U);
    Case one(group, count + 11, count, 5, 3);
    const Needs needs{.rows = rows,
                      .attention = (wanted & 1U) != 0,
                      .logits = (wanted & 2U) != 0,
                      .output = (wanted & 4U) != 0,
                      .attention_if_made = (wanted & 8U) != 0,
                      .logits_if_made = (wanted & 16U) != 0};
    const bool attention = needs.attention || (needs.attention_if_made && with_output),
               logits = needs.logits || (needs.logits_if_made && with_output),
               any = attention || logits || needs.output;
    const ReferenceAttention naive = one.naive(causal);
    detail::TileScratch scratch;
    Record record;
    detail::for_each_tile(one.base(), one.queries(), group, {.causal = causal},
                          with_output ? one.outputs() : HeadsView<float>{}, needs.shown(with_output), scratch,
                          [&](const HeadStep& step) { record.tile(step); });

    const std::size_t counted = std::min(rows, count), n = one.n;
    std::size_t next = count - counted;
    bool good = true;
    for (const Record::Tile& tile : record.tiles) {
        const HeadStep& step = tile.step;
        good = good && (counted == 0 || (step.first == next && step.tokens > 0));
        good = good && step.first_tile == (counted == 0 || step.first == count - counted);
        next += step.tokens;
        good = good && step.last_tile == (next == count);
        const std::size_t tile_rows = group * step.tokens;
        good = good && tile.q.size() == tile_rows * one.dim && tile.visible.size() == tile_rows;
        good = good && tile.attention.size() == (attention ? tile_rows * n : 0);
        good = good && tile.logits.size() == (logits ? tile_rows * n : 0);
        const bool output = needs.output || (with_output && any);  // what is made anyway
        good = good && tile.output.size() == (output ? tile_rows * one.value_dim : 0);
        good = good && tile.lse.size() == (any ? tile_rows : 0);
        for (std::size_t r = 0; good && r < tile_rows; ++r) {
            const std::size_t row = r / step.tokens * count + step.first + r % step.tokens;
            const auto same = [&](const std::vector<float>& got, const std::vector<double>& all,
                                  std::size_t width) {
                for (std::size_t j = 0; j < width && !got.empty(); ++j)
                    if (!close(got[r * width + j], all[row * width + j], 1e-4, 1e-6)) return false;
                return true;
            };
            good = same(tile.attention, naive.attention, n) && same(tile.logits, naive.logits, n) &&
                   same(tile.output, naive.output, one.value_dim) && same(tile.lse, naive.lse, 1) &&
                   tile.visible[r].end == (causal ? n - count + step.first + r % step.tokens + 1 : n) &&
                   std::equal(&tile.q[r * one.dim], &tile.q[r * one.dim] + one.dim,
                              &one.q[(group * count + row) * one.dim]);
        }
    }
    CAPTURE(group, count, rows, with_output, causal, wanted);
    REQUIRE(good);
    REQUIRE(next == count);
    REQUIRE(record.tiles.size() >= 1);
    if (counted == 0) REQUIRE(record.tiles.size() == 1);
    // Outputs of the own group and of no other.
    for (std::size_t i = 0; i < one.out.size(); ++i) {
        const std::size_t row = i / one.value_dim;
        const bool own = row / (group * count) == 1;
        good = good && (with_output && own
                            ? close(one.out[i], naive.output[i - group * count * one.value_dim], 1e-4, 1e-6)
                            : same_bits(one.out[i], 7.0F));
    }
    REQUIRE(good);
}

TEST_CASE("a head without rows gives zeros", "[contract]") {
    Case one(2, 0, 3, 4, 2);
    detail::TileScratch scratch;
    std::size_t calls = 0;
    detail::for_each_tile(one.base(), one.queries(), 2, {.causal = false}, one.outputs(),
                          {.rows = all_rows, .attention = true, .output = true}, scratch,
                          [&](const HeadStep& step) {
                              ++calls;
                              REQUIRE(step.n() == 0);
                              for (const float x : step.lse) REQUIRE(same_bits(x, negative_infinity()));
                          });
    REQUIRE(calls == 1);
    for (std::size_t i = 12; i < 24; ++i) REQUIRE(same_bits(one.out[i], 0.0F));
}

TEST_CASE("workers run every head once, with a scratch of its own where heads run side by side",
          "[threads]") {
    detail::Workers workers;
    std::vector<int> seen(9, 0);
    workers.for_each_head(9, [&](std::size_t head, detail::TileScratch&) { ++seen[head]; });
    REQUIRE(seen == std::vector<int>(9, 1));
    REQUIRE(workers.scratch.size() == 1);

    workers.executor = threads();
    std::vector<detail::TileScratch*> used(9, nullptr);
    workers.for_each_head(9, [&](std::size_t head, detail::TileScratch& scratch) {
        used[head] = &scratch;
        ++seen[head];
    });
    REQUIRE(seen == std::vector<int>(9, 2));
    REQUIRE(std::set<detail::TileScratch*>(used.begin(), used.end()).size() == 9);
    REQUIRE(&workers.scratch_of(3) == used[3]);
    const detail::TileScratch* last = &workers.scratch_of(12);
    REQUIRE(last == &workers.scratch.back());
}

TEST_CASE("reserve takes the scratch of a decode step beforehand", "[property]") {
    const CacheShape shape{.layers = 1, .q_heads = 6, .kv_heads = 2, .head_dim = 8, .value_dim = 5};
    detail::Workers workers;
    workers.reserve(shape, {.rows = 1, .logits = true}, 100, 33, 44);
    REQUIRE(workers.scratch.size() == 1);
    const auto holds = [](const detail::TileScratch& scratch, bool logits) {
        return scratch.q.bytes() >= 3 * 8 * 4 && scratch.attention.bytes() >= 3 * 100 * 4 &&
               (scratch.logits.bytes() >= 3 * 100 * 4) == logits && scratch.output.bytes() >= 3 * 5 * 4 &&
               scratch.lse.bytes() >= 3 * 4 && scratch.policy.bytes() >= 33 * 4 &&
               scratch.wrapper.bytes() >= 44 * 4 && scratch.visible.capacity() >= 3;
    };
    REQUIRE(holds(workers.scratch[0], true));
    workers.executor = threads();
    workers.reserve(shape, {}, 100, 33, 44);
    REQUIRE(workers.scratch.size() == 2);
    REQUIRE(holds(workers.scratch[1], false));
}
