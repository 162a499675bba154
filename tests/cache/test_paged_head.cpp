// A token policy over pages in a tier: which pages stay, what attention sees, what their bounds say.
#include "kvcull/cache/paged_head.hpp"

#include <cmath>
#include <map>
#include <set>
#include <stdexcept>

#include "kvcull/policies/h2o.hpp"
#include "kvcull/policies/snapkv.hpp"
#include "kvcull/policies/streaming.hpp"
#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

namespace {

using namespace kvcull;
using namespace kvcull::test;

constexpr std::size_t dim = 20, value_dim = 12, group = 3, page_tokens = 4;
constexpr PageLayout layout{.head_dim = dim, .value_dim = value_dim, .page_tokens = page_tokens};
constexpr float scale = 0.25F;

/// A memory whose `erase` fails while it is told to.
struct Unwilling : MemoryStore {
    using MemoryStore::MemoryStore;
    bool* refuses = nullptr;
    void erase(page_t page) {
        if (refuses != nullptr && *refuses) throw std::runtime_error("cannot erase");
        MemoryStore::erase(page);
    }
};

PagedHeadOptions options_of(std::size_t budget, PageChoice read = {.count = unlimited}) {
    return {.group = group, .budget = {.tokens = budget}, .read = read, .scale = scale, .first_page = 1000};
}

/// What came in, by position, and the head under test.
template <class P, class Store = MemoryStore>
struct Bench {
    Bench(P policy, std::size_t frames, PagedHeadOptions options, Store store)
        : head(layout, policy, options, Guard<>(frames), std::move(store)) {}
    Bench(P policy, std::size_t frames, PagedHeadOptions options)
        : Bench(policy, frames, options, Store(Frames(frames, layout.bytes()))) {}

    /// One call of `tokens` tokens. @returns the attention over `seen`, plain, and compares the output to it
    ReferenceAttention step(std::size_t tokens, Phase phase = Phase::decode, bool prompt_end = false,
                            std::vector<position_t> seen = {}) {
        const auto q = random_floats(group * tokens * dim, 1000 + next, 2.0F);
        const auto new_k = random_floats(tokens * dim, 2000 + next),
                   new_v = random_floats(tokens * value_dim, 3000 + next);
        if (seen.empty()) seen.assign(head.positions().begin(), head.positions().end());
        for (std::size_t i = 0; i < tokens; ++i) seen.push_back(static_cast<position_t>(next + i));
        next += tokens;
        k.insert(k.end(), new_k.begin(), new_k.end());
        v.insert(v.end(), new_v.begin(), new_v.end());
        std::vector<float> out(group * tokens * value_dim, 42.0F);
        head.step({q.data(), group * tokens, dim}, {new_k.data(), tokens, dim},
                  {new_v.data(), tokens, value_dim}, {out.data(), group * tokens, value_dim}, phase,
                  prompt_end);

        std::vector<float> rows_k, rows_v;
        for (const position_t at : seen) {
            const auto row = static_cast<std::size_t>(at);
            rows_k.insert(rows_k.end(), &k[row * dim], &k[row * dim] + dim);
            rows_v.insert(rows_v.end(), &v[row * value_dim], &v[row * value_dim] + value_dim);
        }
        std::vector<Visible> visible(group * tokens);
        for (std::size_t row = 0; row < visible.size(); ++row)
            visible[row] = {0, 0, seen.size() - tokens + row % tokens + 1};
        const auto want = reference_attention(q, rows_k, rows_v, visible, seen.size(), dim, value_dim, scale);
        for (std::size_t i = 0; i < out.size(); ++i) REQUIRE(close(out[i], want.output[i], 1e-4, 1e-5));
        return want;
    }
    /// Whole pages, exact bounds, nothing left of what went.
    void check() const {
        std::set<page_t> ids;
        std::size_t first = 0;
        for (const auto& page : head.pages()) {
            ids.insert(page.id);
            REQUIRE(page.rows == std::min(page_tokens, head.rows() - first));
            for (std::size_t c = 0; c < dim; ++c) {
                float low = 1e9F, high = -1e9F;
                for (std::size_t i = first; i < first + page.rows; ++i) {
                    const float x = k[static_cast<std::size_t>(head.positions()[i]) * dim + c];
                    low = std::min(low, x);
                    high = std::max(high, x);
                }
                REQUIRE(head.bounds().low(page.bound)[c] == low);
                REQUIRE(head.bounds().high(page.bound)[c] == high);
            }
            first += page.rows;
        }
        REQUIRE(first == head.rows());
        REQUIRE(ids.size() == head.pages().size());
        for (const page_t page : head.tier().store().pages()) REQUIRE(ids.contains(page));
        for (page_t page = 1000; page < 1000 + next; ++page)
            if (!ids.contains(page)) REQUIRE_FALSE(head.tier().cache().contains(page));
        REQUIRE(head.tier().cache().pinned_slots() == 0);
    }

    PagedHead<P, Guard<>, Store> head;
    std::vector<float> k, v;
    std::size_t next = 0;
};

}  // namespace

TEST_CASE("rows that stay over several evictions attend as if they had always been alone", "[differential]") {
    const std::size_t frames = GENERATE(1U, 2U, 16U);
    constexpr std::size_t budget = 14;
    CAPTURE(frames);
    Bench<H2O> bench({.recent = 1}, frames, options_of(budget));
    std::map<position_t, double> mass;
    std::size_t evictions = 0;
    for (std::size_t token = 0; token < 70; ++token) {
        const std::vector<position_t> before(bench.head.positions().begin(), bench.head.positions().end());
        const auto attention = bench.step(1).attention;
        auto seen = before;
        seen.push_back(static_cast<position_t>(token));
        for (std::size_t j = 0; j < seen.size(); ++j)
            for (std::size_t g = 0; g < group; ++g) mass[seen[j]] += attention[g * seen.size() + j] / group;
        bench.check();
        REQUIRE(bench.head.rows() <= budget);
        REQUIRE(bench.head.positions().back() == seen.back());

        // Whoever left was the page with the lowest mean of those without the newest row.
        const auto mean = [&](std::size_t page) {
            double sum = 0;
            for (std::size_t i = 0; i < page_tokens; ++i) sum += mass[seen[page * page_tokens + i]];
            return sum / page_tokens;
        };
        if (bench.head.rows() < seen.size()) {
            ++evictions;
            const std::size_t gone = seen.size() - bench.head.rows();
            REQUIRE(gone == page_tokens);
            std::size_t page = 0;
            while (bench.head.positions()[page * page_tokens] == seen[page * page_tokens]) ++page;
            for (std::size_t other = 0; (other + 1) * page_tokens < seen.size(); ++other)
                REQUIRE(mean(page) <= mean(other) + 1e-5);
        }
        std::size_t first = 0;
        for (const auto& page : bench.head.pages()) {
            double sum = 0;
            for (std::size_t i = 0; i < page.rows; ++i) sum += mass[bench.head.positions()[first + i]];
            first += page.rows;
            REQUIRE(std::abs(bench.head.page_scores().next(page.id, 0) + sum) < 1e-4);
        }
    }
    CHECK(evictions > 10);
    CHECK(bench.head.bounds().pages() == 4);  // those of pages that left are used again
}

TEST_CASE("SnapKV over pages keeps those that the prompt's last tokens look at", "[differential]") {
    const std::size_t frames = GENERATE(1U, 3U);
    constexpr std::size_t window = 4, prompt = 40, chunk = 8, budget = 16;
    Bench<SnapKV> bench({.window = window, .kernel = 1}, frames, options_of(budget));
    std::vector<double> votes;
    for (std::size_t first = 0; first < prompt; first += chunk) {
        const auto attention = bench.step(chunk, Phase::prompt, first + chunk == prompt).attention;
        votes.assign(prompt, 0.0);
        for (std::size_t row = 0; row < group * chunk; ++row)
            if (row % chunk >= chunk - window)
                for (std::size_t j = 0; j < first + chunk; ++j)
                    votes[j] += attention[row * (first + chunk) + j];
    }
    bench.check();
    std::vector<std::pair<double, std::size_t>> pages;
    for (std::size_t page = 0; page + 1 < prompt / page_tokens; ++page) {
        double sum = 0;
        for (std::size_t i = 0; i < page_tokens; ++i) sum += votes[page * page_tokens + i];
        pages.emplace_back(-sum, page);
    }
    std::sort(pages.begin(), pages.end());
    std::set<page_t> want{1000 + prompt / page_tokens - 1};
    for (std::size_t i = 0; i < 3; ++i) want.insert(1000 + pages[i].second);
    std::set<page_t> got;
    for (const auto& page : bench.head.pages()) got.insert(page.id);
    CHECK(got == want);
    for (std::size_t token = 0; token < 9; ++token) bench.step(1);  // grows, and nothing leaves
    CHECK(bench.head.rows() == budget + 9);
    bench.check();
}

TEST_CASE("a step reads the pages that Quest's bounds name, and the policy hears of those alone") {
    Bench<H2O> bench({.recent = 8}, 5, options_of(40, {.count = 4, .sinks = 1, .recent = 1}));
    for (std::size_t token = 0; token < 90; ++token) {
        const auto& head = bench.head;
        const auto q = random_floats(group * dim, 1000 + token, 2.0F);  // as `step` makes it
        const std::size_t pages = head.pages().size(), open = head.rows() % page_tokens == 0 ? 1 : 0;
        std::vector<float> scores(pages + open);
        for (std::size_t i = 0; i < pages; ++i)
            scores[i] = head.bounds().score(head.pages()[i].bound, {q.data(), group, dim});
        std::vector<position_t> seen;
        for (const std::size_t i : choose_pages(scores, {.count = 4}))
            for (std::size_t row = i * page_tokens; row < std::min((i + 1) * page_tokens, head.rows()); ++row)
                seen.push_back(head.positions()[row]);
        const auto fetches = head.tier().counts().fetches;
        const bool first = seen.empty();
        if (!first) bench.step(1, Phase::decode, false, seen);
        if (first) bench.step(1);
        bench.check();
        REQUIRE(head.waves() == 1);
        REQUIRE(head.tier().counts().fetches - fetches <= 3);
    }
    CHECK(bench.head.tier().counts().fetches > 0);
    CHECK(bench.head.rows() <= 40);
}

TEST_CASE("pages that the store does not let go stay, and leave with the next decision") {
    bool refuses = false;
    Unwilling store(Frames(3, layout.bytes()));
    store.refuses = &refuses;
    Bench<H2O, Unwilling> bench({.recent = 1}, 3, options_of(8), std::move(store));
    for (std::size_t token = 0; token < 8; ++token) bench.step(1);
    refuses = true;
    CHECK_THROWS_AS(bench.step(1), std::runtime_error);
    CHECK(bench.head.rows() == 9);
    bench.check();
    refuses = false;
    bench.step(1);
    CHECK(bench.head.rows() == 6);
    bench.check();
}

TEST_CASE("the newest page stays in the smallest budget, and sinks stay where recent rows fill it",
          "[property]") {
    Bench<H2O> least({}, 3, options_of(page_tokens));
    Bench<Streaming> sinks(Streaming{.sinks = 2}, 9, options_of(8 * page_tokens));
    for (position_t token = 0; token < 60; ++token) {
        least.step(1);
        sinks.step(1);
        CHECK(least.head.positions().back() == token);
        CHECK(least.head.rows() <= page_tokens);
        CHECK(sinks.head.positions()[0] == 0);
        CHECK(sinks.head.positions()[std::min<std::size_t>(1, sinks.head.rows() - 1)] <= 1);
        CHECK(sinks.head.positions().back() == token);
    }
}

TEST_CASE("a paged head refuses what does not fit, and policies that read rows while they observe",
          "[contract]") {
    const auto refused = [](PagedHeadOptions options, PageLayout pages = layout) {
        return failure<error::config_error>([&] {
            PagedHead head(pages, H2O{}, options, Guard<>(2), MemoryStore(Frames(2, pages.bytes())));
        });
    };
    CHECK(refused(options_of(3)) == "PagedHead: budget.tokens is 3, want at least a page of 4");
    CHECK(refused(options_of(8, {.count = 1})) ==
          "PagedHead: read.count is 1, want at least its sinks + recent");
    auto none = options_of(8);
    none.group = 0;
    CHECK(refused(none) == "PagedHead: group is 0, want at least 1");
    auto odd = options_of(8);
    odd.budget.ratio = 0.5;
    CHECK(refused(odd) == "Budget: tokens and ratio is both given, want one of them");
    odd = options_of(8);
    odd.budget.bytes = 64;
    CHECK(refused(odd) == "PagedHead: budget.bytes is 64, want 0: a number of tokens");
    odd = options_of(8);
    odd.scale = quiet_nan();
    CHECK(refused(odd) == "PagedHead: scale is nan, want a finite number");
    const auto over =
        []<class Error = error::config_error>(PageLayout pages, std::size_t frame, std::size_t frames) {
        return failure<Error>([&] {
            PagedHead head(pages, H2O{}, options_of(8), Guard<>(2), MemoryStore(Frames(frames, frame)));
        });
    };
    CHECK(over(layout, layout.bytes() - 1, 2) ==
          "PagedHead: bytes of a frame is 511, want at least the 512 of a page");
    CHECK(over.operator()<error::shape_error>(layout, layout.bytes(), 1) ==
          "Frames: frame is 1, want less than 1");
    PageLayout endless = layout;
    endless.page_tokens = std::size_t{1} << 61U;
    CHECK(over(endless, 64, 2).starts_with("PagedHead: page_tokens is 2305843009213693952, want"));
    static_assert(!PagePolicy<Tova>);

    const auto q = random_floats(group * dim, 1), k = random_floats(dim, 2), v = random_floats(value_dim, 3);
    std::vector<float> out(group * value_dim);
    const auto step = [&](auto& head, std::size_t q_rows) {
        head.step({q.data(), q_rows, dim}, {k.data(), 1, dim}, {v.data(), 1, value_dim},
                  {out.data(), group, value_dim});
    };
    Bench<H2O> bench({}, 2, options_of(8));
    CHECK(failure<error::shape_error>([&] { step(bench.head, group - 1); }) ==
          "PagedHead::step: q.rows is 2, want 3");
    CHECK(bench.head.rows() == 0);
    Bench<Vatp> reader({}, 2, options_of(8));
    CHECK(failure<error::state_error>([&] { step(reader.head, group); }) ==
          "PagedHead: score of a row is NaN, want a policy that does not read rows while it observes");
}
