#include "kvcull/policies/caote.hpp"

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <vector>

#include "kvcull/policies/h2o.hpp"
#include "kvcull/policies/keydiff.hpp"
#include "kvcull/policies/obcache.hpp"
#include "kvcull/policies/snapkv.hpp"
#include "support/catch.hpp"
#include "support/conformance.hpp"
#include "support/failure.hpp"
#include "support/hooks.hpp"
#include "support/stubs.hpp"

using namespace kvcull;
using namespace kvcull::test;
using Gqa = Caote<>::Gqa;
using Rows = PerHeadAttention::Rows;

namespace {

constexpr CacheShape small{.layers = 1, .q_heads = 6, .kv_heads = 2, .head_dim = 8, .value_dim = 12};
constexpr CacheShape single{.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 8};
constexpr Budget roomy{.tokens = 1000};

std::vector<float> widened(const RowsView& rows) {
    std::vector<float> all(rows.rows() * rows.dim());
    for (std::size_t j = 0; j < rows.rows(); ++j)
        rows.widen(j, std::span(all).subspan(j * rows.dim(), rows.dim()));
    return all;
}
/// Rows without row `gone`.
std::vector<float> without(std::vector<float> rows, std::size_t dim, std::size_t gone) {
    const auto at = rows.begin() + static_cast<std::ptrdiff_t>(gone * dim);
    rows.erase(at, at + static_cast<std::ptrdiff_t>(dim));
    return rows;
}
/// Output of query head `q_head` at `token` over what a head holds.
ReferenceAttention attend_to(const Stream& stream, std::size_t q_head, std::size_t token,
                             std::span<const float> k, std::span<const float> v) {
    const std::size_t dim = stream.shape.head_dim, rows = k.size() / dim;
    const std::vector<Visible> all{{0, 0, rows}};
    return reference_attention({stream.queries(0, token, 1).row(q_head, 0), dim}, k, v, all, rows, dim,
                               stream.shape.values(), 1.0 / std::sqrt(static_cast<double>(dim)));
}
/// Norm of the change of a group's outputs at `token` when row j of what is held is really left out; [n].
std::vector<double> measured_changes(const HeadView& held, const Stream& stream, std::size_t head,
                                     std::size_t token) {
    const std::size_t group = stream.shape.group(), dim = stream.shape.head_dim,
                      values = stream.shape.values();
    const std::vector<float> k = widened(held.k), v = widened(held.v);
    std::vector<double> changes(held.rows());
    for (std::size_t g = 0; g < group; ++g) {
        const auto full = attend_to(stream, head * group + g, token, k, v).output;
        for (std::size_t j = 0; j < changes.size(); ++j) {
            const auto less =
                attend_to(stream, head * group + g, token, without(k, dim, j), without(v, values, j)).output;
            for (std::size_t c = 0; c < values; ++c) changes[j] += std::pow(full[c] - less[c], 2);
        }
    }
    for (double& x : changes) x = std::sqrt(x);
    return changes;
}
/// CAOTE's score of one distribution, from any scores that are not negative.
std::vector<double> closed_form(std::span<const float> scores, const RowsView& rows, bool fast = false) {
    const std::size_t n = rows.rows(), dim = rows.dim();
    const std::vector<float> v = widened(rows);
    std::vector<double> a(scores.begin(), scores.end()), centre(dim), error(n);
    double sum = 0;
    for (const double x : a) sum += x;
    for (std::size_t j = 0; j < n; ++j) {
        a[j] /= sum;
        for (std::size_t c = 0; c < dim; ++c)
            centre[c] += static_cast<double>(v[j * dim + c]) * (fast ? 1.0 / static_cast<double>(n) : a[j]);
    }
    for (std::size_t j = 0; j < n; ++j) {
        double square = 0;
        for (std::size_t c = 0; c < dim; ++c)
            square += std::pow(static_cast<double>(v[j * dim + c]) - centre[c], 2);
        error[j] = a[j] / (1 - a[j]) * std::sqrt(square);
    }
    return error;
}
bool near(std::span<const float> got, std::span<const double> want, double factor = 1.0,
          double relative = 1e-4) {
    if (got.size() != want.size()) return false;
    const double most = *std::max_element(want.begin(), want.end());
    for (std::size_t j = 0; j < got.size(); ++j)
        if (!close(got[j], factor * want[j], relative, 1e-6 * factor * most)) return false;
    return true;
}
bool near(std::span<const float> got, std::span<const float> want, double factor = 1.0,
          double relative = 1e-4) {
    return near(got, std::vector<double>(want.begin(), want.end()), factor, relative);
}
/// NaN agrees with NaN.
bool agree(std::span<const float> got, std::span<const float> want, double relative) {
    if (got.size() != want.size()) return false;
    float most = 0;
    for (const float& x : want)
        if (is_finite(x)) most = std::max(most, x);
    for (std::size_t j = 0; j < got.size(); ++j) {
        if (is_nan(got[j]) && is_nan(want[j])) continue;
        if (!is_finite(want[j]) ||
            !close(got[j], static_cast<double>(want[j]), relative, 1e-7 * static_cast<double>(most)))
            return false;
    }
    return true;
}

/// A base whose scores are what the test says, the same in every head.
struct GivenScores {
    static constexpr std::string_view name = "given_scores";
    static constexpr bool nonnegative = true;
    using State = NoState;
    std::vector<float> given = {};

    static constexpr auto fields() { return std::tuple{}; }
    static constexpr Needs needs(Phase /*phase*/) { return {}; }
    static void observe(State& /*state*/, const HeadStep& /*step*/) {}
    void score(const State& /*state*/, const HeadStep& /*step*/, std::span<float> out) const {
        std::copy_n(given.begin(), out.size(), out.begin());
    }
};
static_assert(CaoteBase<GivenScores> && !PerQueryHead<GivenScores>);
static_assert(!CaoteBase<KeyDiff> && !CaoteBase<OBCache>);

std::vector<float> scores_with(const std::vector<float>& base, const Stream& stream, bool fast = false) {
    KVCache cache(stream.shape, Caote<GivenScores>{.base = {base}, .fast = fast}, roomy);
    feed_prompt(cache, stream, 0, base.size(), base.size());
    return cache.scores(0, 0);
}

/// What is left when single removal goes on until `size` rows per head are left.
std::vector<std::vector<position_t>> removed_one_by_one(KVCache<Caote<>> cache, std::size_t size) {
    const std::size_t rows = cache.rows(0, 0);
    if (rows == size) return all_positions(cache);
    return removed_one_by_one(cache.fork(cache.propose(rows - 1)), size);
}

}  // namespace

TEST_CASE("CAOTE in every variant keeps the contract of a policy", "[property]") {
    SECTION("defaults: TOVA's last row") {
        policy_conformance(Caote{});
    }
    SECTION("H2O, fast") {
        policy_conformance(Caote<>{.base = {.base = Rows::h2o, .sinks = 2}, .fast = true});
    }
    SECTION("SnapKV's window, greedy") {
        policy_conformance(Caote<>{
            .base = {.base = Rows::snapkv, .window = 3}, .gqa = Gqa::mean, .order = Caote<>::Order::greedy});
    }
    SECTION("around H2O, fast and greedy") {
        policy_conformance(
            Caote<H2O>{.base = {.recent = 3}, .fast = true, .order = Caote<H2O>::Order::greedy});
    }
    SECTION("around VATP") {
        policy_conformance(Caote<Vatp>{.base = {.sinks = 2}});
    }
    SECTION("around SnapKV, which evicts at the prompt's end") {
        policy_conformance(Caote<SnapKV>{.base = {.window = 4}},
                           {.evictions = 1, .while_decoding = false, .chunks_do_not_matter = true});
    }
}

TEST_CASE(
    "over TOVA a score is the change of the group's outputs if the row really went, and no other row "
    "changes them less",
    "[differential]") {
    const Stream stream = random_stream(small, 60, 1);
    KVCache cache(small, Caote{}, Budget{.tokens = 14});
    feed_prompt(cache, stream, 0, 30, 11);
    std::size_t other_than_tova = 0;
    for (std::size_t at = 30; at < 60; ++at) {
        KVCache held = cache.fork();
        held.hold(true);
        feed(held, stream, at, 1);
        feed(cache, stream, at, 1);
        for (std::size_t h = 0; h < small.kv_heads; ++h) {
            const HeadView rows = held.view(0, h);
            REQUIRE(rows.rows() == 15);
            const std::vector<double> changes = measured_changes(rows, stream, h, at);
            CHECK(near(held.scores(0, h), changes));
            const auto victim =
                static_cast<std::size_t>(std::min_element(changes.begin(), changes.end()) - changes.begin());
            const std::vector<position_t> kept = positions_of(cache.view(0, h));
            CHECK(std::find(kept.begin(), kept.end(), rows.position[victim]) == kept.end());
            // What TOVA would give up, the row with the least attention:
            std::vector<float> mass(15);
            const auto& state = held.evictor().state(0, h).base;
            for (std::size_t g = 0; g < 3; ++g)
                for (std::size_t j = 0; j < 15; ++j) mass[j] += state.mass[g][j];
            const auto least =
                static_cast<std::size_t>(std::min_element(mass.begin(), mass.end()) - mass.begin());
            CHECK(changes[victim] <= changes[least]);
            other_than_tova += victim != least ? 1 : 0;
        }
    }
    CHECK(other_than_tova > 5);
}

TEST_CASE("over one row of attention it is OBCache's key with true removal for a zeroed key",
          "[differential]") {
    const Stream stream = random_stream(single, 20, 2);
    KVCache removal(single, Caote{}, roomy);
    KVCache zeroed(single, OBCache{.base = OBCache::Base::tova}, roomy);
    feed_prompt(removal, stream, 0, 20, 20);
    feed_prompt(zeroed, stream, 0, 20, 20);
    const auto last = attend_to(stream, 0, 19, stream.k, stream.v);
    std::vector<double> want;
    const std::vector<float> caote = removal.scores(0, 0);
    for (std::size_t j = 0; j < 20; ++j)
        want.push_back(std::pow(static_cast<double>(caote[j]) * (1 - last.attention[j]) * last.logits[j], 2));
    CHECK(near(zeroed.scores(0, 0), want));
}

TEST_CASE("with one query head all reductions agree; equal query heads make rss a root of their number",
          "[property]") {
    const auto scores = [](const Stream& stream, Gqa gqa, Rows rows, bool fast) {
        KVCache cache(stream.shape, Caote<>{.base = {.base = rows, .kernel = 1}, .fast = fast, .gqa = gqa},
                      roomy);
        feed_prompt(cache, stream, 0, 30, 13);
        feed_decode(cache, stream, 30, 40);
        return cache.scores(0, 0);
    };
    const Stream alone = random_stream(single, 40, 3);
    Stream four{.shape = {.layers = 1, .q_heads = 4, .kv_heads = 1, .head_dim = 8},
                .tokens = 40,
                .q = {},
                .k = alone.k,
                .v = alone.v};
    for (int g = 0; g < 4; ++g) four.q.insert(four.q.end(), alone.q.begin(), alone.q.end());
    for (const Rows rows : {Rows::tova, Rows::h2o, Rows::snapkv})
        for (const bool fast : {false, true}) {
            CAPTURE(static_cast<int>(rows), fast);
            const std::vector<float> want = scores(alone, Gqa::pre, rows, fast);
            for (const Gqa gqa : {Gqa::rss, Gqa::mean}) CHECK(near(scores(alone, gqa, rows, fast), want));
            CHECK(near(scores(four, Gqa::rss, rows, fast), want, 2.0));
            CHECK(near(scores(four, Gqa::mean, rows, fast), want));
            CHECK(near(scores(four, Gqa::pre, rows, fast), want));
        }
}

TEST_CASE("scaling all base scores changes nothing; bad base scores are refused, NaN counts as nothing",
          "[property]") {
    const Stream stream = random_stream(single, 10, 4);
    std::vector<float> base{1, 2, 0, 0.5F, 4, 0.25F, 1, 1, 3, 2};
    const RowsView v(stream.v.data(), 10, 8, 8);
    for (const bool fast : {false, true}) {
        const std::vector<double> want = closed_form(base, v, fast);
        for (const float scale : {1.0F, 1e-30F, 1e30F}) {
            std::vector<float> scaled = base;
            for (float& x : scaled) x *= scale;
            CHECK(near(scores_with(scaled, stream, fast), want));
        }
        CHECK(near(scores_with(std::vector<float>(10), stream, fast),
                   closed_form(std::vector<float>(10, 1.0F), v)));  // no weight at all: uniform
        std::vector<float> with_nan = base;
        with_nan[2] = quiet_nan();
        CHECK(same_bits(scores_with(with_nan, stream, fast), scores_with(base, stream, fast)));
        std::vector<float> one(10);
        one[6] = 3.0F;
        std::vector<float> alone(10);
        alone[6] = positive_infinity();
        CHECK(same_bits(scores_with(one, stream, fast), alone));
    }
    base[3] = -0.5F;
    const auto message = failure<error::state_error>([&] { (void)scores_with(base, stream); });
    CHECK(message == "caote: base score is -0.500000, want not negative");
}

TEST_CASE("a base policy's own scores become the weights", "[differential]") {
    const Stream stream = random_stream(small, 50, 5);
    const auto compare = [&](const auto& base) {
        using Base = std::remove_cvref_t<decltype(base)>;
        CAPTURE(Base::name);
        KVCache plain(small, base, roomy);
        KVCache exact(small, Caote<Base>{.base = base}, roomy);
        KVCache fast(small, Caote<Base>{.base = base, .fast = true}, roomy);
        const auto check = [&] {
            for (std::size_t h = 0; h < small.kv_heads; ++h) {
                const std::vector<float> weights = plain.scores(0, h);
                CHECK(near(exact.scores(0, h), closed_form(weights, exact.view(0, h).v)));
                CHECK(near(fast.scores(0, h), closed_form(weights, exact.view(0, h).v, true)));
            }
        };
        feed_prompt(plain, stream, 0, 30, 12);
        feed_prompt(exact, stream, 0, 30, 12);
        feed_prompt(fast, stream, 0, 30, 12);
        check();
        feed_decode(plain, stream, 30, 50);
        feed_decode(exact, stream, 30, 50);
        feed_decode(fast, stream, 30, 50);
        check();
    };
    compare(H2O{.recent = 3});
    compare(Vatp{.sinks = 2, .kernel = 3, .pool = Pool::avg});
    compare(SnapKV{.window = 4});
    compare(Tova{});
}

TEST_CASE("a user's base with scores per query head is taken apart by query head", "[differential]") {
    const Stream stream = random_stream(small, 60, 6);
    const Budget budget{.tokens = 14};
    for (const Gqa gqa : {Gqa::rss, Gqa::mean, Gqa::pre}) {
        KVCache own(small, Caote<LastRowLike>{.gqa = static_cast<Caote<LastRowLike>::Gqa>(gqa)}, budget);
        KVCache shipped(small, Caote<>{.gqa = gqa}, budget);
        feed_prompt(own, stream, 0, 30, 11);
        feed_prompt(shipped, stream, 0, 30, 11);
        feed_decode(own, stream, 30, 60);
        feed_decode(shipped, stream, 30, 60);
        CHECK((all_positions(own) == all_positions(shipped)));
        CHECK(near(own.scores(0, 1), shipped.scores(0, 1)));
    }
    const auto refusal = [](const auto& policy) {
        return failure<error::config_error>([&] { KVCache(small, policy, Budget{.tokens = 14}); });
    };
    CHECK(refusal(Caote<H2O>{.gqa = Caote<H2O>::Gqa::rss}) ==
          "Caote: gqa is rss, want pre: h2o has one score per KV head");
    CHECK(refusal(Caote<Tova>{.gqa = Caote<Tova>::Gqa::mean}) ==
          "Caote: gqa is mean, want pre: tova has one score per KV head");
    CHECK(refusal(Caote<H2O>{.gqa = Caote<H2O>::Gqa::pre}) == "no error");
    CHECK(refusal(Caote<H2O>{.base = {.kernel = 2}}) == "H2O: kernel is 2, want an odd number");
    CHECK(refusal(Caote<>{.base = {.base = Rows::snapkv, .window = 0}}) ==
          "PerHeadAttention: window is 0, want at least 1");
    CHECK(refusal(Caote<>{.base = {.base = Rows::snapkv, .recent = 14}}) ==
          "PerHeadAttention: recent is 14, want below the budget 14");
}

TEST_CASE("greedy removal is single removal over and over", "[differential]") {
    std::size_t other_than_at_once = 0;
    for (const std::uint64_t seed : {1U, 2U, 3U})
        for (const bool fast : {false, true})
            for (const Gqa gqa : {Gqa::rss, Gqa::mean, Gqa::pre}) {
                CAPTURE(fast, static_cast<int>(gqa), seed);
                const Stream stream = random_stream(small, 40, seed);
                Caote<> policy{
                    .base = {.base = Rows::h2o, .recent = 2, .sinks = 1}, .fast = fast, .gqa = gqa};
                KVCache single_order(small, policy, roomy);
                policy.order = Caote<>::Order::greedy;
                KVCache greedy(small, policy, roomy);
                feed_prompt(greedy, stream, 0, 40, 40);
                feed_prompt(single_order, stream, 0, 40, 40);
                const auto left = all_positions(greedy.fork(greedy.propose(12)));
                CHECK((removed_one_by_one(single_order.fork(), 12) == left));
                CHECK((all_positions(greedy.fork(greedy.propose(39))) ==
                       all_positions(single_order.fork(single_order.propose(39)))));
                const auto at_once = all_positions(single_order.fork(single_order.propose(12)));
                other_than_at_once += at_once == left ? 0 : 1;
            }
    CHECK(other_than_at_once > 0);
}

TEST_CASE("sums that follow the rows and distances taken along with attention give what a fresh look gives",
          "[differential]") {
    const std::size_t slack = GENERATE(std::size_t{0}, 5);
    const bool fast = GENERATE(false, true);
    const auto run = [&](const auto& base) {
        using P = Caote<std::remove_cvref_t<decltype(base)>>;
        CAPTURE(slack, fast, base.name);
        const P policy{.base = base, .fast = fast};
        const Stream stream = random_stream(small, 300, 8 + slack);
        std::vector<std::vector<float>> hooked;
        check_hooks(policy, stream, slack, hooked,
                    [](const auto& got, const auto& want) { return agree(got, want, 1e-5); });
    };
    run(PerHeadAttention{});
    run(PerHeadAttention{.base = Rows::h2o, .recent = 3});
    run(PerHeadAttention{.base = Rows::snapkv, .window = 4, .kernel = 1});
    run(H2O{.recent = 3});
}

TEST_CASE("the sum of values is right or not known, whatever happens to the rows", "[property]") {
    const Stream stream = random_stream(small, 300, 9);
    using P = Caote<>;
    const P policy{.base = {.base = Rows::h2o, .recent = 3}, .fast = true};
    KVCache cache(small, policy, Budget{.tokens = 14, .slack = 2});
    std::size_t known = 0;
    const auto check = [&] {
        for (std::size_t h = 0; h < small.kv_heads; ++h) {
            const HeadView held = cache.view(0, h);
            const RunningSum& values = cache.evictor().state(0, h).values;
            if (!values.knows(held.rows())) continue;
            ++known;
            std::vector<double> sum(small.values());
            const std::vector<float> rows = widened(held.v);
            for (std::size_t i = 0; i < rows.size(); ++i) sum[i % sum.size()] += static_cast<double>(rows[i]);
            for (std::size_t c = 0; c < sum.size(); ++c) CHECK(std::abs(values.sum[c] - sum[c]) < 1e-9);
        }
    };
    feed_prompt(cache, stream, 0, 30, 11);
    check();
    SplitMix64 random{3};
    for (std::size_t at = 30; at + 3 < 300;) {
        const double chance = random.uniform();
        const std::size_t count = chance < 0.1 ? 3 : 1;
        if (chance > 0.3 && chance < 0.4) {  // an answer that is tried and taken back
            const Mark mark = cache.mark();
            feed_decode(cache, stream, at, at + 3);
            check();
            cache.rollback(mark);
            cache.release(mark);
            check();
        }
        feed(cache, stream, at, count);
        at += count;
        check();
        if (chance > 0.92) cache.make_room(2);
        if (chance > 0.2 && chance < 0.23) cache.truncate(2);
        check();
    }
    CHECK(known > 400);
}

TEST_CASE("a value that is not finite costs no more than the ranking while it is there", "[property]") {
    const std::size_t bad = 40;
    for (const float& poison : {quiet_nan(), positive_infinity()})
        for (const bool fast : {false, true}) {
            CAPTURE(fast, poison);
            Stream stream = random_stream(small, 120, 10);
            stream.v[(120 + bad) * small.values() + 5] = poison;  // head 1
            using P = Caote<H2O>;
            const P policy{.base = {.recent = 3}, .fast = fast};
            std::vector<std::vector<float>> hooked, alone;
            Engine<Recording<P>> engine(small, {policy, hooked}, {.tokens = 14});
            Engine<Recording<Unhooked<P>>> fresh(small, {Unhooked<P>{policy}, alone}, {.tokens = 14});
            feed_prompt(engine, stream, 0, 30, 30);
            feed_prompt(fresh, stream, 0, 30, 30);
            for (std::size_t at = 30; at < 120; ++at) {
                feed(engine, stream, at, 1);
                feed(fresh, stream, at, 1);
                CAPTURE(at);
                REQUIRE(engine.rows(0, 1) == 14);
                REQUIRE((all_positions(engine) == all_positions(fresh)));
            }
            bool same = hooked.size() == alone.size();
            for (std::size_t i = 0; same && i < hooked.size(); ++i)
                same = std::equal(hooked[i].begin(), hooked[i].end(), alone[i].begin(), alone[i].end(),
                                  [](const float& x, const float& y) {
                                      return is_finite(x) == is_finite(y) && is_nan(x) == is_nan(y);
                                  });
            CHECK(same);
            const std::vector<position_t> held = positions_of(engine.view(0, 1));
            CHECK(std::find(held.begin(), held.end(), position_t{bad}) == held.end());
            for (const float& x : engine.scores(0, 1)) CHECK(is_finite(x));
        }
}

TEST_CASE("greedy removal of a row that is not finite leaves the others as if it had never been",
          "[property]") {
    const CacheShape one{.layers = 1, .q_heads = 2, .kv_heads = 1, .head_dim = 4};
    for (const bool fast : {false, true})
        for (const float bad : {quiet_nan(), -negative_infinity()}) {
            Stream stream = random_stream(one, 13, 8);
            stream.v[0] = bad;  // of the oldest token, which recency lets go first
            const Caote<H2O> policy{.base = {.recent = 0}, .fast = fast, .order = Caote<H2O>::Order::greedy};
            KVCache at_once(one, policy, {.tokens = 13}), in_two(one, policy, {.tokens = 13});
            feed(at_once, stream, 0, 13);
            feed(in_two, stream, 0, 13);
            at_once.make_room(7);
            in_two.make_room(1);
            in_two.make_room(7);
            CHECK(at_once.positions(0, 0) == in_two.positions(0, 0));
            CHECK(at_once.positions(0, 0) != std::vector<position_t>{7, 8, 9, 10, 11, 12});
        }
}

TEST_CASE("equal values leave the choice to recency, and the last row of a head has no price", "[property]") {
    Stream stream = random_stream(small, 40, 11);
    for (std::size_t i = 0; i < stream.v.size(); ++i) stream.v[i] = i % small.values() == 0 ? 1.0F : 0.0F;
    KVCache cache(small, Caote<GivenScores>{.base = {std::vector<float>(100, 1.0F)}}, Budget{.tokens = 8});
    feed_prompt(cache, stream, 0, 32, 32);
    for (const position_t position : cache.positions(0, 1)) CHECK(position >= 24);
    KVCache one(small, Caote{}, Budget{.tokens = 8});
    feed_decode(one, stream, 0, 1);
    CHECK(same_bits(one.scores(0, 0)[0], positive_infinity()));
}

TEST_CASE("before any query row was seen, or any that is finite, all weights are equal", "[property]") {
    const Stream stream = random_stream(small, 3, 12);
    Stream unseen = stream;
    std::fill(unseen.q.begin(), unseen.q.end(), quiet_nan());
    const std::vector<float> uniform(3, 1.0F);
    for (const Rows rows : {Rows::tova, Rows::h2o, Rows::snapkv})
        for (const bool fast : {false, true}) {
            KVCache cache(small, Caote<>{.base = {.base = rows}, .fast = fast, .gqa = Gqa::mean}, roomy);
            CHECK(cache.scores(0, 1).empty());
            cache.append(0, stream.keys(0, 0, 3), stream.values(0, 0, 3));
            CHECK(near(cache.scores(0, 1), closed_form(uniform, cache.view(0, 1).v)));
            KVCache bad(cache.shape(), cache.policy(), roomy);
            feed_decode(bad, unseen, 0, 3);
            CHECK(near(bad.scores(0, 1), closed_form(uniform, bad.view(0, 1).v)));
        }
}
