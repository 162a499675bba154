// Attention over pages that do not fit into the frames together.
#include "kvcull/cache/page_attention.hpp"

#include <numeric>

#include "kvcull/paging/guard.hpp"
#include "kvcull/paging/memory_store.hpp"
#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

namespace {

using namespace kvcull;
using namespace kvcull::test;

using Tier = PageTier<Guard<>, MemoryStore, Popularity>;

/// Rows of one head in pages of a tier, and the same rows as plain arrays.
struct Head {
    Head(PageLayout layout_, std::size_t frames, const std::vector<std::size_t>& rows_of)
        : layout(layout_),
          n(std::accumulate(rows_of.begin(), rows_of.end(), std::size_t{0})),
          k(random_floats(n * layout.head_dim, 1)),
          v(random_floats(n * layout.values(), 2)),
          tier(Guard<>(frames), MemoryStore(Frames(frames, layout.bytes())), {}) {
        std::size_t row = 0;
        for (const std::size_t rows : rows_of) {
            pages.push_back({100 * pages.size() + 7, rows});
            tier.step({}, pages.back().page);
            const auto frame = tier.store().frame(tier.frame(pages.back().page));
            for (std::size_t i = 0; i < rows; ++i, ++row)
                layout.put(frame, i, &k[row * layout.head_dim], &v[row * layout.values()], simd::kernels());
            tier.end_step();
        }
    }

    PageLayout layout;
    std::size_t n;
    std::vector<float> k, v;
    std::vector<PageRows> pages;
    Tier tier;
};

struct Result {
    std::vector<float> output, lse, attention;
    std::size_t waves = 0;
};
Result run(Head& head, const std::vector<float>& q, std::span<const std::size_t> ends = {},
           bool weights = true) {
    const std::size_t rows = q.size() / head.layout.head_dim, values = head.layout.values();
    Result result{std::vector<float>(rows * values, 42.0F), std::vector<float>(rows, 42.0F),
                  std::vector<float>(rows * head.n, 42.0F)};
    PageAttention attend;
    PagedOutput want{{result.output.data(), rows, values}, result.lse};
    if (weights) want.attention = {result.attention.data(), rows, head.n};
    result.waves =
        attend(head.tier, head.layout, head.pages, {q.data(), rows, head.layout.head_dim}, ends, 0.3F, want);
    return result;
}
std::vector<Visible> visible(std::span<const std::size_t> ends) {
    std::vector<Visible> rows;
    for (const std::size_t end : ends) rows.push_back({0, 0, end});
    return rows;
}

}  // namespace

TEST_CASE("attention in waves equals attention over all rows", "[differential]") {
    const std::size_t frames = GENERATE(1U, 3U, 64U);
    const std::size_t dim = GENERATE(1U, 80U, 128U, 257U);
    const std::size_t group = GENERATE(1U, 4U, 7U);
    CAPTURE(frames, dim, group);
    // The last page is partly filled, one in the middle too, one is empty.
    const std::vector<std::size_t> rows{4, 4, 2, 4, 0, 4, 1};
    Head head({.head_dim = dim, .value_dim = dim + 3, .page_tokens = 4}, frames, rows);
    const auto q = random_floats(group * dim, 3, dim > 100 ? 0.3F : 1.0F);
    std::vector<std::size_t> ends(group);
    for (std::size_t row = 0; row < group; ++row) ends[row] = row == 1 ? 0 : head.n - 3 * row;
    const bool all = GENERATE(true, false);
    const Result got = run(head, q, all ? std::span<const std::size_t>{} : ends);
    const std::vector<std::size_t> seen = all ? std::vector<std::size_t>(group, head.n) : ends;
    const auto want =
        reference_attention(q, head.k, head.v, visible(seen), head.n, dim, dim + 3, double{0.3F});
    CHECK(got.waves == (frames == 64 ? 1 : frames == 3 ? 3 : 7));
    for (std::size_t i = 0; i < got.output.size(); ++i)
        REQUIRE(close(got.output[i], want.output[i], 1e-4, 1e-5));
    for (std::size_t i = 0; i < got.attention.size(); ++i)
        REQUIRE(close(got.attention[i], want.attention[i], 1e-4, 1e-6));
    for (std::size_t row = 0; row < group; ++row) {
        if (seen[row] > 0)
            REQUIRE(close(got.lse[row], want.lse[row], 1e-5, 1e-5));
        else
            REQUIRE(same_bits(got.lse[row], negative_infinity()));
    }
    const auto& cache = head.tier.cache();
    CHECK(cache.pinned_slots() == 0);
}

TEST_CASE("pages that fit together give the bits of attention over the same pages in memory", "[property]") {
    const DType dtype = GENERATE(DType::f32, DType::f16, DType::bf16, DType::int8, DType::int4);
    constexpr std::size_t dim = 80, group = 4;
    Head head({.head_dim = dim, .page_tokens = 16, .dtype = dtype}, 6, {16, 16, 16, 16, 16, 5});
    const auto q = random_floats(group * dim, 3);
    const Result got = run(head, q);
    CHECK(got.waves == 1);
    std::vector<std::vector<std::byte>> memory(head.pages.size(),
                                               std::vector<std::byte>(head.layout.bytes()));
    std::vector<const std::byte*> frames;
    for (std::size_t row = 0; row < head.n; ++row)
        head.layout.put(memory[row / 16], row % 16, &head.k[row * dim], &head.v[row * dim], simd::kernels());
    for (const auto& page : memory) frames.push_back(page.data());
    std::vector<float> output(group * dim), lse(group), attention(group * head.n);
    const std::vector<Visible> all(group, {0, 0, head.n});
    attend(
        simd::kernels(), {q.data(), group, dim}, head.layout.keys(frames, head.n),
        head.layout.values(frames, head.n), all, 0.3F,
        {.attention = {attention.data(), group, head.n}, .lse = lse, .output = {output.data(), group, dim}});
    CHECK(same_bits(got.output, output));
    CHECK(same_bits(got.lse, lse));
    CHECK(same_bits(got.attention, attention));
    CHECK(same_bits(run(head, q, {}, false).output, output));
}

TEST_CASE("a wave takes first what is in frames, and fetches each page at most once") {
    Head head({.head_dim = 8, .page_tokens = 2}, 3, {2, 2, 2, 2, 2});
    const auto q = random_floats(8, 3);
    const auto before = head.tier.counts().fetches;
    std::size_t resident = 0;
    for (const PageRows& page : head.pages) resident += head.tier.cache().contains(page.page) ? 1 : 0;
    CHECK(resident == 3);
    CHECK(run(head, q).waves == 2);
    CHECK(head.tier.counts().fetches - before == 2);
    // A page that is pinned for good needs no frame of the wave's.
    const page_t sink = head.pages[1].page;
    head.tier.step(std::vector{sink});
    head.tier.pin(sink);
    head.tier.end_step();
    CHECK(run(head, q).waves == 2);  // three pages with the sink, two more
    CHECK(head.tier.cache().pinned_slots() == 1);
}

TEST_CASE("a key that is not finite spoils its row's output wherever its wave is") {
    const float bad = GENERATE(quiet_nan_value, positive_infinity_value);
    Head head({.head_dim = 2, .page_tokens = 1}, 1, {1, 1, 1});
    head.tier.step(std::vector{head.pages[1].page});
    const std::vector<float> k{bad, 0}, v{1, 1};
    head.layout.put(head.tier.store().frame(head.tier.frame(head.pages[1].page)), 0, k.data(), v.data(),
                    simd::kernels());
    head.tier.mark_dirty(head.pages[1].page);
    head.tier.end_step();
    const std::vector<std::size_t> ends{3, 1};
    const Result got = run(head, {1, 0, 1, 0}, ends);
    CHECK(is_nan(got.lse[0]));
    CHECK(is_nan(got.output[0]));
    CHECK(got.attention[0] == 0);
    CHECK(is_finite(got.lse[1]));
    CHECK(got.output[2] == head.v[0]);
    CHECK(got.attention[3] == 1);
}

TEST_CASE("attention over pages refuses what does not fit, and leaves no step open", "[contract]") {
    Head head({.head_dim = 2, .page_tokens = 2}, 1, {2, 2, 1});
    const std::vector<float> q{1, 2};
    std::vector<float> out(2), lse(1), weights(4);
    PageAttention attend;
    const auto refused = [&](auto&& change, auto error) {
        PageLayout layout = head.layout;
        std::vector<PageRows> pages = head.pages;
        PagedOutput want{{out.data(), 1, 2}, lse};
        change(layout, pages, want);
        return failure<decltype(error)>([&] {
            attend(head.tier, layout, pages, {q.data(), 1, 2}, {}, 1.0F, want);
        });
    };
    using Pages = std::vector<PageRows>;
    const error::shape_error shape("");
    CHECK(refused([](PageLayout& layout, Pages&, PagedOutput&) { layout.head_dim = 3; }, shape) ==
          "PageAttention: q.cols is 2, want 3");
    CHECK(refused([](PageLayout&, Pages& pages, PagedOutput&) { pages[1].rows = 3; }, shape) ==
          "PageAttention: rows of page 107 is 3, want at most 2");
    CHECK(refused(
              [&](PageLayout&, Pages&, PagedOutput& want) {
                  want.attention = {weights.data(), 1, 4};
              },
              shape) == "PageAttention: want.attention.cols is 4, want 5");
    CHECK(refused([](PageLayout& layout, Pages&, PagedOutput&) { layout.page_tokens = 3; }, shape) ==
          "PageAttention: bytes of a frame is 32, want at least 48");
    CHECK(refused([](PageLayout&, Pages& pages, PagedOutput&) { pages[2].page = 7; },
                  error::config_error("")) == "PageAttention: page is 7, want each page once");
    CHECK(refused([](PageLayout&, Pages& pages, PagedOutput&) { pages[2].page = 9; },
                  error::state_error("")) == "PageTier::step: page is 9, want a known page");
    CHECK(head.tier.cache().pinned_slots() == 0);
    head.tier.step(std::vector{head.pages[0].page});
    head.tier.pin(head.pages[0].page);
    head.tier.end_step();
    CHECK(refused([](PageLayout&, Pages&, PagedOutput&) {}, error::capacity_error("")) ==
          "PageTier::step: number of pages, pinned ones included is 2, want at most 1");
    head.tier.unpin(head.pages[0].page);
    CHECK_NOTHROW(
        attend(head.tier, head.layout, head.pages, {q.data(), 1, 2}, {}, 1.0F, {{out.data(), 1, 2}, lse}));
}
