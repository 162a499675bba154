#include "kvcull/paging/quest.hpp"

#include <cmath>
#include <limits>
#include <numeric>

#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/random.hpp"

namespace {

using kvcull::choose_pages;
using kvcull::MatrixView;
using kvcull::PageBounds;
using kvcull::PageChoice;
using kvcull::RowsView;
using kvcull::test::failure;
using kvcull::test::random_floats;
namespace error = kvcull::error;

using Indices = std::vector<std::size_t>;

RowsView rows(const std::vector<float>& keys, std::size_t dim, std::size_t first, std::size_t count) {
    return {keys.data() + first * dim, count, dim, dim};
}
MatrixView<const float> heads(const std::vector<float>& queries, std::size_t dim) {
    return {queries.data(), queries.size() / dim, dim};
}

}  // namespace

TEST_CASE("a page's score is at or above every q . k in it", "[property]") {
    const std::size_t dim = GENERATE(1U, 80U, 128U, 257U);
    const std::size_t group = GENERATE(1U, 4U, 7U);
    const float scale = GENERATE(1e-3F, 1.0F, 1e3F);
    constexpr std::size_t pages = 6, page_tokens = 16;
    CAPTURE(dim, group, scale);
    const auto keys = random_floats(pages * page_tokens * dim, dim, scale);
    const auto queries = random_floats(group * dim, dim + group);
    PageBounds bounds(dim), single(dim);
    for (std::size_t page = 0; page < pages; ++page) {
        bounds.add(page, rows(keys, dim, page * page_tokens, 5));
        bounds.add(page, rows(keys, dim, page * page_tokens + 5, page_tokens - 5));
    }
    for (std::size_t token = 0; token < pages * page_tokens; ++token)
        single.add(token, rows(keys, dim, token, 1));
    std::vector<float> scores(pages), dots(pages * page_tokens);
    bounds.scores(heads(queries, dim), scores);
    single.scores(heads(queries, dim), dots);
    for (std::size_t page = 0; page < pages; ++page) {
        CAPTURE(page);
        REQUIRE(scores[page] == bounds.score(page, heads(queries, dim)));
        double want = -std::numeric_limits<double>::infinity(), most = 0;
        for (std::size_t g = 0; g < group; ++g) {
            double sum = 0, size = 0;
            for (std::size_t c = 0; c < dim; ++c) {
                const double q = queries[g * dim + c];
                double low = keys[page * page_tokens * dim + c], high = low;
                for (std::size_t t = 0; t < page_tokens; ++t) {
                    const double k = keys[(page * page_tokens + t) * dim + c];
                    low = std::min(low, k);
                    high = std::max(high, k);
                }
                sum += std::max(q * low, q * high);
                size += std::max(std::abs(q * low), std::abs(q * high));
            }
            want = std::max(want, sum);
            most = std::max(most, size);
        }
        const double slack = static_cast<double>(dim + 2) * 0x1p-24 * most;
        REQUIRE(std::abs(scores[page] - want) <= slack);
        for (std::size_t t = 0; t < page_tokens; ++t) {
            const std::size_t token = page * page_tokens + t;
            REQUIRE(scores[page] >= dots[token]);  // a page of one key: q . k itself, no slack needed
            for (std::size_t g = 0; g < group; ++g) {
                double dot = 0;
                for (std::size_t c = 0; c < dim; ++c)
                    dot += static_cast<double>(queries[g * dim + c]) * keys[token * dim + c];
                REQUIRE(scores[page] >= dot - slack);
            }
        }
    }
}

TEST_CASE("bounds follow rows of every element type, and forget them when a page is reset") {
    PageBounds bounds(3);
    const std::vector<float> first{1, -2, 3, -1, 4, 0.5F};
    const auto halves = kvcull::test::to_float16s({8, 0, 0});
    bounds.add(2, rows(first, 3, 0, 2));
    REQUIRE(bounds.pages() == 3);
    bounds.add(2, RowsView(halves.data(), kvcull::DType::f16, 1, 3, 3));
    REQUIRE(std::ranges::equal(bounds.low(2), std::vector<float>{-1, -2, 0}));
    REQUIRE(std::ranges::equal(bounds.high(2), std::vector<float>{8, 4, 3}));
    const std::vector<float> q{1, -1, 2};
    REQUIRE(bounds.score(2, heads(q, 3)) == 8 + 2 + 6);
    REQUIRE(bounds.score(0, heads(q, 3)) == kvcull::negative_infinity());
    bounds.reset(2);
    bounds.reset(99);
    REQUIRE(bounds.pages() == 3);
    REQUIRE(bounds.score(2, heads(q, 3)) == kvcull::negative_infinity());
    bounds.add(2, rows(first, 3, 1, 1));
    REQUIRE(bounds.score(2, heads(q, 3)) == -1 - 4 + 1);
}

TEST_CASE("a page with a key that is not finite is always read") {
    const float bad =
        GENERATE(kvcull::quiet_nan_value, kvcull::positive_infinity_value, kvcull::negative_infinity_value);
    constexpr std::size_t dim = 20;
    auto keys = random_floats(3 * dim, 1);
    PageBounds bounds(dim);
    for (std::size_t page = 0; page < 3; ++page) bounds.add(page, rows(keys, dim, page, 1));
    keys[dim + 17] = bad;
    bounds.add(1, rows(keys, dim, 1, 1));
    bounds.add(1, rows(keys, dim, 0, 1));  // a good row does not make it good again
    std::vector<float> scores(3);
    bounds.scores(heads(std::vector<float>(dim, 0.0F), dim), scores);
    REQUIRE(scores[0] == 0);
    REQUIRE(scores[1] == kvcull::positive_infinity());
    REQUIRE(choose_pages(scores, {.count = 1, .sinks = 0, .recent = 0}) == Indices{1});
    bounds.reset(1);
    bounds.add(1, rows(keys, dim, 0, 1));
    REQUIRE(bounds.score(1, heads(std::vector<float>(dim, 0.0F), dim)) == 0);
}

TEST_CASE("a query head that is NaN does not hide the others") {
    PageBounds bounds(2);
    bounds.add(0, rows({1, 1}, 2, 0, 1));
    const float nan = kvcull::quiet_nan_value;
    const std::vector<float> first{nan, 1, 2, 3}, later{2, 3, nan, 1}, all{nan, 1};
    REQUIRE(bounds.score(0, heads(first, 2)) == 5);
    REQUIRE(bounds.score(0, heads(later, 2)) == 5);
    REQUIRE(kvcull::is_nan(bounds.score(0, heads(all, 2))));
}

TEST_CASE("pages are chosen from both ends, then by score, the lower of equal ones") {
    const std::vector<float> scores{0, 5, 7, 5, 9, 5, 1};
    CHECK(choose_pages(scores, {.count = 4}) == Indices{0, 2, 4, 6});
    CHECK(choose_pages(scores, {.count = 5}) == Indices{0, 1, 2, 4, 6});
    CHECK(choose_pages(scores, {.count = 4, .sinks = 2, .recent = 2}) == Indices{0, 1, 5, 6});
    CHECK(choose_pages(scores, {.count = 2, .sinks = 0, .recent = 0}) == Indices{2, 4});
    CHECK(choose_pages(scores, {.count = 7}) == Indices{0, 1, 2, 3, 4, 5, 6});
    CHECK(choose_pages(scores, {.count = 100, .sinks = 40, .recent = 40}) == Indices{0, 1, 2, 3, 4, 5, 6});
    CHECK(choose_pages({}, {.count = 2}).empty());
    CHECK(choose_pages(scores, {.count = 0, .sinks = 0, .recent = 0}).empty());
    CHECK(failure<error::config_error>([&] {
              (void)choose_pages(scores, {.count = 3, .sinks = 2, .recent = 2});
          }) == "choose_pages: sinks + recent is 2 + 2, want at most count = 3");
}

TEST_CASE("scores that are NaN count as -infinity, zeros of both signs are equal") {
    const float nan = kvcull::quiet_nan_value, low = kvcull::negative_infinity_value;
    const std::vector<float> scores{low, nan, low, -0.0F, 0.0F, -1};
    const auto best = [&](std::size_t count) {
        return choose_pages(scores, {.count = count, .sinks = 0, .recent = 0});
    };
    CHECK(best(1) == Indices{3});
    CHECK(best(3) == Indices{3, 4, 5});
    CHECK(best(5) == Indices{0, 1, 3, 4, 5});
}

TEST_CASE("the choice is the best of a full sort", "[differential]") {
    auto scores = random_floats(200, 3);
    for (float& score : scores) score = std::round(score * 4);  // many ties
    for (std::size_t count = 3; count < 200; count += 13) {
        Indices order(scores.size() - 3);
        std::iota(order.begin(), order.end(), 2);
        std::ranges::stable_sort(order, [&](std::size_t a, std::size_t b) { return scores[a] > scores[b]; });
        order.resize(count - 3);
        for (const std::size_t page : Indices{0, 1, 199}) order.push_back(page);
        std::ranges::sort(order);
        REQUIRE(choose_pages(scores, {.count = count, .sinks = 2, .recent = 1}) == order);
    }
}

TEST_CASE("bounds refuse shapes that do not fit, and change nothing then", "[contract]") {
    CHECK(failure<error::config_error>([] { PageBounds(0); }) ==
          "PageBounds: head_dim is 0, want at least 1");
    PageBounds bounds(2);
    const std::vector<float> keys{1, 2, 3};
    CHECK(failure<error::shape_error>([&] { bounds.add(4, rows(keys, 3, 0, 1)); }) ==
          "PageBounds::add: dim of keys is 3, want 2");
    for (const std::size_t page : {std::numeric_limits<std::size_t>::max(), std::size_t{1} << 59U})
        CHECK(failure<error::shape_error>([&] { bounds.add(page, rows(keys, 2, 0, 1)); }) ==
              "PageBounds::add: page is " + std::to_string(page) + ", want below 2147483647");
    CHECK(bounds.pages() == 0);
    CHECK(failure<error::shape_error>([&] {
              (void)bounds.score(0, {keys.data(), 1, 2});
          }) == "PageBounds::score: page is 0, want less than 0");
    bounds.add(0, rows(keys, 2, 0, 1));
    CHECK(failure<error::shape_error>([&] {
              (void)bounds.score(0, {keys.data(), 1, 3});
          }) == "PageBounds: dim of queries is 3, want 2");
    CHECK(failure<error::shape_error>([&] {
              (void)bounds.score(0, {keys.data(), 0, 2});
          }) == "PageBounds: number of query heads is 0, want at least 1");
    std::vector<float> out(2);
    CHECK(failure<error::shape_error>([&] {
              bounds.scores({keys.data(), 1, 2}, out);
          }) == "PageBounds::scores: size of out is 2, want 1");
}
