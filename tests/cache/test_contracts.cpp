// Every kind of method that is to come has a stub in support/stubs.hpp. Here each of them runs through
// KVCache and through Evictor on foreign buffers, and gets its data when the contract says so.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "kvcull/cache/kv_cache.hpp"
#include "kvcull/policies.hpp"
#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/foreign.hpp"
#include "support/reference.hpp"
#include "support/stubs.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

/// Which refinements of the contract P meets.
template <class P>
constexpr std::array<bool, 12> abilities{SequenceState<P>, SideInput<P>, Lookahead<P>,      Selects<P>,
                                         PerQueryHead<P>,  Scoped<P>,    Triggered<P>,      Protects<P>,
                                         Ordered<P>,       Checked<P>,   TakesWorkspace<P>, Finishes<P>};
enum Ability {
    sequence,
    side,
    lookahead,
    selects,
    per_query_head,
    scoped,
    triggered,
    protects,
    ordered,
    checks,
    workspace,
    finishes
};

template <Policy P>
constexpr bool meets_only(std::initializer_list<Ability> wanted) {
    for (std::size_t i = 0; i < abilities<P>.size(); ++i) {
        bool expected = false;
        for (const Ability ability : wanted) expected = expected || ability == i;
        if (abilities<P>[i] != expected) return false;
    }
    return true;
}
static_assert(meets_only<SkipLike>({sequence, triggered}));
static_assert(meets_only<TrimLike>({side}));
static_assert(meets_only<TrimGateLike>({side}));
static_assert(meets_only<TrimDynamicLike>({side, scoped}));
static_assert(meets_only<LaqLike>({lookahead}));
static_assert(meets_only<EpiLike>({scoped, triggered}));
static_assert(meets_only<GreedyLike>({selects, protects}));
static_assert(meets_only<LastRowLike>({per_query_head}));
static_assert(meets_only<CaoteLike<LastRowLike>>({workspace}));
static_assert(meets_only<ObcLike>({}));
static_assert(meets_only<EveryLike>({triggered}));
static_assert(decides_late<SkipLike> && decides_late<LaqLike> && !decides_late<TrimLike>);
static_assert(HeadBudgetRule<AdaLike> && BudgetRule<AdaLike>);
static_assert(BudgetRule<PyramidLike> && !HeadBudgetRule<PyramidLike>);
static_assert(BudgetRule<Uniform> && !HeadBudgetRule<Uniform>);

template <class Cache>
concept Rescores = requires(Cache cache, std::span<const HeadsView<const float>> q) {
    cache.rescore(q);
};
static_assert(Rescores<KVCache<LaqLike>> && !Rescores<KVCache<SnapKV>> && !Rescores<KVCache<SkipLike>>);
template <class E>
concept RescoresRows = requires(E evictor, CacheView rows, std::span<const HeadsView<const float>> q) {
    evictor.rescore(rows, q);
};
static_assert(RescoresRows<Evictor<LaqLike>> && !RescoresRows<Evictor<SnapKV>>);

constexpr CacheShape two_layers{.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 8};

/// The `count` positions of highest score, ascending; of equal scores the later one.
template <class Score>
std::vector<position_t> best(std::vector<position_t> held, std::size_t count, const Score& score) {
    std::stable_sort(held.begin(), held.end(), [&](position_t a, position_t b) {
        return std::tuple(score(a), a) > std::tuple(score(b), b);
    });
    held.resize(std::min(count, held.size()));
    return sorted(held);
}

/// Attention of `q` [group * c, dim] over the rows of `head` (all of them visible up to `end[i]`) in double.
ReferenceAttention attention_over(const HeadView& head, const std::vector<float>& q,
                                  const std::vector<Visible>& visible) {
    return reference_attention(q, widened(head.k), widened(head.v), visible, head.rows(), head.k.dim(),
                               head.v.dim(), 1.0 / std::sqrt(static_cast<double>(head.k.dim())));
}

template <class P, class R>
bool all_hold(const KVCache<P, R>& cache, std::size_t rows) {
    for (std::size_t layer = 0; layer < cache.shape().layers; ++layer)
        for (std::size_t head = 0; head < cache.shape().kv_heads; ++head)
            if (cache.rows(layer, head) != rows) return false;
    return true;
}

/// Token ids and hidden states [tokens, 3] for SkipLike: ids repeat, the first channel is the weight.
struct Text {
    std::vector<std::int32_t> ids;
    std::vector<float> hidden;

    explicit Text(std::size_t tokens) : hidden(random_floats(3 * tokens, 99)) {
        for (std::size_t i = 0; i < tokens; ++i) ids.push_back(static_cast<std::int32_t>(i * 7 % 11));
    }
    [[nodiscard]] StepInputs inputs(std::size_t first, std::size_t count) const {
        return {std::span(ids).subspan(first, count), {hidden.data() + 3 * first, count, 3}};
    }
};

}  // namespace

TEST_CASE("a policy with sequence state decides in all layers at the end of the step", "[contract]") {
    const std::size_t prompt = 10, budget = 6;
    const std::size_t chunk = GENERATE(std::size_t{3}, 4, 10);
    const bool known = GENERATE(true, false);
    const TokenStream stream(two_layers, 40, 1);
    const Text text(40);
    Record record;
    KVCache cache(two_layers, SkipLike{.interval = 4, .record = &record}, Budget{.tokens = budget});
    SkipLike::Sequence said;  // what the policy must have heard
    std::vector<position_t> held;
    const auto feed_one = [&](std::size_t first, std::size_t count, std::size_t rows_before) {
        Outputs out(two_layers, count);
        for (std::size_t layer = 0; layer < 2; ++layer) {
            cache.append(layer, stream.k(layer, first, count), stream.v(layer, first, count));
            cache.attend(layer, stream.q(layer, first, count), out.layer(layer));
            REQUIRE(cache.rows(layer, 0) == rows_before + count);  // no layer evicts by itself
        }
        cache.end_step(text.inputs(first, count));
        SkipLike{}.end_step(said, text.inputs(first, count));
        for (std::size_t i = first; i < first + count; ++i) held.push_back(static_cast<position_t>(i));
    };
    const auto evict = [&] {
        held = best(held, budget, [&](position_t p) { return said.score(static_cast<std::size_t>(p)); });
    };

    cache.begin_prompt(known ? std::optional(prompt) : std::nullopt);
    in_chunks(prompt, chunk, [&](std::size_t first, std::size_t count) {
        feed_one(first, count, first);
        const bool last = first + count == prompt;
        REQUIRE(all_hold(cache, known && last ? budget : first + count));  // chunks count as one prompt
    });
    cache.end_prompt();
    evict();
    REQUIRE(record.steps.size() == (prompt + chunk - 1) / chunk);
    for (std::size_t layer = 0; layer < 2; ++layer)
        for (std::size_t head = 0; head < 2; ++head) REQUIRE(cache.positions(layer, head) == held);

    for (std::size_t token = prompt; token < 40; ++token) {
        feed_one(token, 1, held.size());
        if ((token + 1) % 4 == 0) evict();
        CAPTURE(token);
        for (std::size_t layer = 0; layer < 2; ++layer)
            for (std::size_t head = 0; head < 2; ++head) REQUIRE(cache.positions(layer, head) == held);
    }
    REQUIRE(record.steps.back().tokens == std::vector{text.ids[39]});
    REQUIRE(record.steps.back().hidden == std::vector{text.hidden[3 * 39]});
}

TEST_CASE("what a policy needs at the end of the step is asked for by name, before anything changed",
          "[contract]") {
    const TokenStream stream(two_layers, 12, 2);
    const Text text(12);
    KVCache cache(two_layers, SkipLike{}, Budget{.tokens = 5});
    KVCache twin(two_layers, SkipLike{}, Budget{.tokens = 5});
    for (std::size_t token = 0; token < 12; ++token) {
        Outputs out(two_layers, 1);
        for (std::size_t layer = 0; layer < 2; ++layer) {
            cache.append(layer, stream.k(layer, token, 1), stream.v(layer, token, 1));
            cache.attend(layer, stream.q(layer, token, 1), out.layer(layer));
        }
        REQUIRE(failure<error::state_error>([&] { cache.end_step(); }) ==
                "SkipLike: tokens is missing, want given to end_step");
        REQUIRE(failure<error::state_error>([&] {
                    cache.end_step({std::span(text.ids).subspan(token, 1), {}});
                }) == "SkipLike: hidden is missing, want given to end_step");
        REQUIRE(failure<error::shape_error>([&] { cache.end_step(text.inputs(0, 2)); }) ==
                "Evictor::end_step: inputs.tokens.size() is 2, want 1");
        StepInputs wide = text.inputs(token, 1);
        wide.hidden.rows = 2;
        REQUIRE(failure<error::shape_error>([&] { cache.end_step(wide); }) ==
                "Evictor::end_step: inputs.hidden.rows is 2, want 1");
        REQUIRE(cache.seen() == token);
        cache.end_step(text.inputs(token, 1));
        feed(twin, stream, token, 1, text.inputs(token, 1));
        REQUIRE(cache.positions(1, 1) == twin.positions(1, 1));
        REQUIRE(cache.evictor().live().sequence.tokens == twin.evictor().live().sequence.tokens);
    }
    REQUIRE(all_hold(cache, 5));
}

TEST_CASE("an engine whose policy decides at the end of the step hands over all its rows there",
          "[contract]") {
    const TokenStream stream(two_layers, 30, 2);
    const Text text(30);
    Evictor evictor(two_layers, SkipLike{.interval = 3}, Budget{.tokens = 5});
    REQUIRE(evictor.decides_at_end());
    REQUIRE_FALSE(Evictor(two_layers, LaqLike{}, Budget{.tokens = 5}).decides_at_end());
    REQUIRE_FALSE(Evictor(two_layers, H2O{}, Budget{.tokens = 5}).decides_at_end());
    REQUIRE(Evictor(two_layers, TrimDynamicLike{}, Budget{.tokens = 5}).decides_at_end());
    Foreign rows(two_layers);
    KVCache cache(two_layers, SkipLike{.interval = 3}, Budget{.tokens = 5});
    for (std::size_t token = 0; token < 30; ++token) {
        for (std::size_t layer = 0; layer < 2; ++layer) {
            rows.append(layer, stream.k(layer, token, 1), stream.v(layer, token, 1), evictor.next_position());
            REQUIRE(evictor.step(layer, rows.layer(layer), stream.q(layer, token, 1)).empty());
        }
        REQUIRE(failure<error::shape_error>([&] { evictor.end_step({}, text.inputs(token, 1)); }) ==
                "Evictor::end_step: cached.kv_heads is 0, want 2");
        rows.apply(evictor.end_step(rows.view(), text.inputs(token, 1)));
        feed(cache, stream, token, 1, text.inputs(token, 1));
        for (std::size_t i = 0; i < 4; ++i)
            REQUIRE(to_vector(cache.view(i / 2, i % 2).position) == rows.positions(i / 2, i % 2));
    }
    REQUIRE(rows.positions(1, 0).size() == 5);
}

TEST_CASE("side values enter with their tokens and follow them through evictions", "[contract]") {
    const std::size_t tokens = 30, budget = 7;
    const TokenStream stream(two_layers, tokens, 3);
    std::vector<float> log_beta = random_floats(tokens * 4, 5);  // [layers, kv_heads, tokens]
    for (float& x : log_beta) x = -0.01F - std::abs(x);
    Record record;
    KVCache cache(two_layers, TrimLike{.record = &record}, Budget{.tokens = budget});
    Foreign rows(two_layers);
    Evictor evictor(two_layers, TrimLike{}, Budget{.tokens = budget});
    std::array<std::vector<position_t>, 4> held;
    for (std::size_t first = 0; first < tokens;) {
        const std::size_t count = first == 0 ? 12 : first == 12 ? 5 : 1;
        for (std::size_t layer = 0; layer < 2; ++layer) {
            Outputs out(two_layers, count);
            const AppendInputs inputs{.log_beta = {&log_beta[2 * layer * tokens + first], 2, count, tokens}};
            const std::size_t before = cache.rows(layer, 1);
            record.admitted.clear();
            cache.append(layer, stream.k(layer, first, count), stream.v(layer, first, count), inputs);
            REQUIRE(record.admitted.size() == 2);  // one call per head, before the attention of the tokens
            REQUIRE(record.admitted[1].layer == layer);
            REQUIRE(record.admitted[1].head == 1);
            REQUIRE(record.admitted[1].first_row == before);
            REQUIRE(record.admitted[1].tokens == count);
            cache.attend(layer, stream.q(layer, first, count), out.layer(layer));
            evictor.admit(layer, count, inputs);
            rows.append(layer, stream.k(layer, first, count), stream.v(layer, first, count),
                        evictor.next_position());
            rows.apply(evictor.step(layer, rows.layer(layer), stream.q(layer, first, count)));
            for (std::size_t head = 0; head < 2; ++head) {
                std::vector<position_t>& own = held[2 * layer + head];
                for (std::size_t i = 0; i < count; ++i) own.push_back(static_cast<position_t>(first + i));
                own = best(own, budget, [&](position_t p) {
                    const auto index = (2 * layer + head) * tokens + static_cast<std::size_t>(p);
                    return static_cast<float>(static_cast<position_t>(first + count) - p) * log_beta[index];
                });
                CAPTURE(first, layer, head);
                REQUIRE(cache.positions(layer, head) == own);
                REQUIRE(sorted(rows.positions(layer, head)) == own);
                const HeadView view = cache.view(layer, head);
                const TrimLike::State& state = cache.evictor().state(layer, head);
                for (std::size_t j = 0; j < view.rows(); ++j)
                    REQUIRE(same_bits(
                        state.log_beta[j],
                        log_beta[(2 * layer + head) * tokens + static_cast<std::size_t>(view.position[j])]));
            }
        }
        cache.end_step();
        rows.apply(evictor.end_step());
        first += count;
    }
}

TEST_CASE("a missing or misshapen side value is refused before anything changed", "[contract]") {
    const TokenStream stream(two_layers, 4, 3);
    const std::vector<float> values(64, -0.5F);
    const auto k = stream.k(0, 0, 3), v = stream.v(0, 0, 3);
    SECTION("log_beta") {
        KVCache cache(two_layers, TrimLike{}, Budget{.tokens = 7});
        const auto fails = [&](auto error, const MatrixView<const float>& log_beta) {
            const std::string text =
                failure<decltype(error)>([&] { cache.append(0, k, v, {.log_beta = log_beta}); });
            CHECK(cache.rows(0, 0) == 0);
            CHECK(cache.bytes() == 0);
            CHECK(cache.evictor().state(0, 0).log_beta.rows() == 0);
            return text;
        };
        REQUIRE(fails(error::state_error(""), {}) ==
                "KVCache::append: log_beta is missing, want given with the tokens: trim_like needs it");
        REQUIRE(fails(error::shape_error(""), {values.data(), 4, 3}) ==
                "KVCache::append: log_beta.rows is 4, want 2");
        REQUIRE(fails(error::shape_error(""), {values.data(), 2, 4}) ==
                "KVCache::append: log_beta.cols is 4, want 3");
        cache.append(0, k, v, {.log_beta = {values.data(), 2, 3}});
        REQUIRE(cache.rows(0, 1) == 3);
    }
    SECTION("log_beta on foreign buffers") {
        Evictor evictor(two_layers, TrimLike{}, Budget{.tokens = 7});
        Foreign rows(two_layers);
        rows.append(0, k, v, 0);
        REQUIRE(failure<error::state_error>([&] { evictor.admit(0, 3); }) ==
                "Evictor::admit: log_beta is missing, want given with the tokens: trim_like needs it");
        REQUIRE(failure<error::state_error>([&] { evictor.step(0, rows.layer(0), stream.q(0, 0, 3)); }) ==
                "Evictor::step: log_beta is missing, want given with the tokens: trim_like needs it");
        evictor.admit(0, 3, {.log_beta = {values.data(), 2, 3}});
        REQUIRE_NOTHROW(evictor.step(0, rows.layer(0), stream.q(0, 0, 3)));
    }
    SECTION("attention_input") {
        KVCache cache(two_layers, TrimGateLike{{}, {1.0F, 2.0F, 3.0F}}, Budget{.tokens = 7});
        const auto fails = [&](auto error, const MatrixView<const float>& input) {
            const std::string text =
                failure<decltype(error)>([&] { cache.append(0, k, v, {.attention_input = input}); });
            CHECK(cache.rows(0, 0) == 0);
            CHECK(cache.bytes() == cache.evictor().bytes());  // no block was taken
            CHECK(cache.evictor().state(0, 0).log_beta.rows() == 0);
            CHECK(cache.evictor().live().call_tokens == 0);
            return text;
        };
        REQUIRE(fails(error::state_error(""), {}) ==
                "KVCache::append: attention_input is missing, want given with the tokens: trim_gate_like "
                "needs it");
        REQUIRE(fails(error::shape_error(""), {values.data(), 2, 3}) ==
                "KVCache::append: attention_input.rows is 2, want 3");
        // What only the policy knows it checks itself.
        REQUIRE(fails(error::shape_error(""), {values.data(), 3, 4}) ==
                "TrimGateLike: attention_input.cols is 4, want 3");
        std::vector<float> x(9, 0.0F);
        x[5] = 1.0F;  // token 1: 3
        cache.append(0, k, v, {.attention_input = {x.data(), 3, 3}});
        REQUIRE(same_bits(cache.evictor().state(0, 0).log_beta[1], -3.0F));
        REQUIRE(same_bits(cache.evictor().state(0, 1).log_beta[1], -4.0F));
        REQUIRE(same_bits(cache.evictor().state(0, 1).log_beta[0], -1.0F));
    }
}

TEST_CASE("a look-ahead policy evicts when it is given its query rows, and never before", "[contract]") {
    const std::size_t prompt = 21, small = 5, budget = 9;
    const bool known = GENERATE(true, false);
    const TokenStream stream(two_layers, 30, 4);
    BlockPool pool({.block_rows = 4});
    KVCache cache(two_layers, LaqLike{}, Budget{.tokens = budget}, pool);
    cache.begin_prompt(known ? std::optional(prompt) : std::nullopt);
    in_chunks(prompt, 8, [&](std::size_t first, std::size_t count) { feed(cache, stream, first, count); });
    cache.end_prompt();
    REQUIRE(all_hold(cache, prompt));
    const auto rows_of = [&](std::size_t layer, std::size_t head) {
        const HeadView view = cache.view(layer, head);
        return std::tuple(widened(view.k), widened(view.v), to_vector(view.position),
                          cache.scores(layer, head));
    };
    std::vector<decltype(rows_of(0, 0))> before;
    for (std::size_t i = 0; i < 4; ++i) before.push_back(rows_of(i / 2, i % 2));
    const std::size_t bytes = cache.bytes();

    // Look ahead on a compacted copy.
    KVCache fork = cache.fork(cache.propose(small));
    REQUIRE(all_hold(fork, small));
    for (std::size_t i = 0; i < 4; ++i) {
        const auto& [k, v, position, score] = before[i];
        const auto kept =
            best(position, small, [&, &s = score](position_t p) { return s[static_cast<std::size_t>(p)]; });
        REQUIRE(fork.positions(i / 2, i % 2) == kept);
    }
    for (std::size_t token = prompt; token < prompt + 4; ++token) feed(fork, stream, token, 1);
    REQUIRE(all_hold(fork, small + 4));
    REQUIRE(fork.seen() == prompt + 4);
    REQUIRE(fork.positions(0, 0).back() == static_cast<position_t>(prompt + 3));

    REQUIRE(cache.bytes() == bytes);
    REQUIRE(cache.seen() == prompt);
    for (std::size_t i = 0; i < 4; ++i) REQUIRE(rows_of(i / 2, i % 2) == before[i]);

    // The queries of the pseudo tokens decide.
    std::array<std::vector<position_t>, 4> expected;
    for (std::size_t i = 0; i < 4; ++i) {
        const std::vector<float> all_q = gathered(stream.q(i / 2, prompt, 4));
        const HeadView view = cache.view(i / 2, i % 2);
        const auto first = all_q.begin() + static_cast<std::ptrdiff_t>(i % 2 * 2 * 4 * 8);
        const ReferenceAttention naive = attention_over(view, {first, first + 2 * 4 * 8},
                                                        std::vector<Visible>(8, Visible{0, 0, view.rows()}));
        std::vector<double> sum(view.rows(), 0.0);
        for (std::size_t r = 0; r < 8; ++r)
            for (std::size_t j = 0; j < view.rows(); ++j) sum[j] += naive.attention[r * view.rows() + j];
        expected[i] = best(to_vector(view.position), budget,
                           [&](position_t p) { return sum[static_cast<std::size_t>(p)]; });
    }
    cache.rescore(std::array{stream.q(0, prompt, 4), stream.q(1, prompt, 4)});
    for (std::size_t i = 0; i < 4; ++i) REQUIRE(cache.positions(i / 2, i % 2) == expected[i]);
    // Nothing is evicted later, and the fork lives on.
    feed(cache, stream, prompt, 1);
    REQUIRE(all_hold(cache, budget + 1));
    feed(fork, stream, prompt + 4, 1);
    REQUIRE(all_hold(fork, small + 5));
}

TEST_CASE("rescore checks its arguments, works on foreign buffers and under hold does nothing",
          "[contract]") {
    const TokenStream stream(two_layers, 12, 4);
    KVCache cache(two_layers, LaqLike{}, Budget{.tokens = 4});
    Evictor evictor(two_layers, LaqLike{}, Budget{.tokens = 4});
    Foreign rows(two_layers);
    feed(cache, stream, 0, 9);
    feed(evictor, rows, stream, 0, 9);
    const auto q = std::array{stream.q(0, 9, 3), stream.q(1, 9, 3)};
    const auto refused = [&](const HeadsView<const float>& second) {
        return failure<error::shape_error>([&] { cache.rescore(std::array{stream.q(0, 9, 3), second}); });
    };
    REQUIRE(failure<error::shape_error>([&] { cache.rescore(std::span(q).first(1)); }) ==
            "Evictor::rescore: q.size() is 1, want 2");
    REQUIRE(refused(stream.k(1, 9, 3)) == "Evictor::rescore: q[1].heads is 2, want 4");
    REQUIRE(refused(stream.q(1, 9, 2)) == "Evictor::rescore: q[1].tokens is 2, want 3");
    cache.hold(true);
    cache.rescore(q);
    REQUIRE(all_hold(cache, 9));
    cache.hold(false);
    cache.rescore(q);
    rows.apply(evictor.rescore(rows.view(), q));
    for (std::size_t layer = 0; layer < 2; ++layer)
        for (std::size_t head = 0; head < 2; ++head)
            REQUIRE(cache.positions(layer, head) == sorted(rows.positions(layer, head)));
    REQUIRE(all_hold(cache, 4));
}

namespace {

/// Probe outputs as naive double loops: attention over the cached rows and the probe's own rows before.
std::vector<double> naive_probe(const HeadView& head, HeadsView<const float> q, HeadsView<const float> k,
                                HeadsView<const float> v, std::size_t kv_head, std::size_t group) {
    const std::size_t n = head.rows(), c = q.tokens;
    std::vector<float> keys = widened(head.k), values = widened(head.v), queries;
    for (std::size_t i = 0; i < c; ++i) {
        keys.insert(keys.end(), k.row(kv_head, i), k.row(kv_head, i) + k.dim);
        values.insert(values.end(), v.row(kv_head, i), v.row(kv_head, i) + v.dim);
    }
    std::vector<Visible> visible;
    for (std::size_t g = 0; g < group; ++g)
        for (std::size_t i = 0; i < c; ++i) {
            const float* row = q.row(kv_head * group + g, i);
            queries.insert(queries.end(), row, row + q.dim);
            visible.push_back({0, 0, n + i + 1});
        }
    return reference_attention(queries, keys, values, visible, n + c, q.dim, v.dim,
                               1.0 / std::sqrt(static_cast<double>(q.dim)))
        .output;
}

}  // namespace

TEST_CASE("a probe scores what is cached, the layer ranks its heads together, and a head may end empty",
          "[contract][differential]") {
    const CacheShape shape{.layers = 2, .q_heads = 6, .kv_heads = 3, .head_dim = 16, .value_dim = 5};
    const std::size_t group = 2, tokens = 12, probes = 3, budget = 4;
    TokenStream stream(shape, 40, 6);
    // In layer 0 every probe row (g, i) of heads 0 and 1 looks at one token of its own, head 2 at all alike.
    for (std::size_t token = 0; token < tokens; ++token)
        for (std::size_t head = 0; head < 3; ++head) {
            const auto key = stream.key(token, 0, head);
            std::fill(key.begin(), key.end(), 0.0F);
            if (head < 2) key[token] = 10.0F;
        }
    const auto target = [&](std::size_t head, std::size_t g, std::size_t i) {
        return (5 * head + 7 * g + 2 * i) % tokens;
    };
    for (std::size_t i = 0; i < probes; ++i)
        for (std::size_t q_head = 0; q_head < 6; ++q_head) {
            const auto query = stream.query(tokens + i, 0, q_head);
            std::fill(query.begin(), query.end(), 0.0F);
            query[target(q_head / 2, q_head % 2, i)] = 10.0F;
        }

    Record record;
    KVCache cache(shape, EpiLike{.record = &record}, Budget{.tokens = budget});
    Evictor evictor(shape, EpiLike{}, Budget{.tokens = budget});
    Foreign rows(shape);
    cache.begin_prompt();
    feed(cache, stream, 0, 8);
    feed(cache, stream, 8, 4);
    feed(evictor, rows, stream, 0, tokens);
    REQUIRE(all_hold(cache, tokens));  // only a probe evicts
    REQUIRE(record.tiles.empty());     // and only its rows are looked at

    for (std::size_t layer = 0; layer < 2; ++layer) {
        const auto q = stream.q(layer, tokens, probes);
        const auto k = stream.k(layer, tokens, probes), v = stream.v(layer, tokens, probes);
        std::vector<std::tuple<double, position_t, std::size_t>> ranked;
        std::vector<std::vector<double>> outputs, largest;
        for (std::size_t head = 0; head < 3; ++head) {
            const HeadView view = cache.view(layer, head);
            outputs.push_back(naive_probe(view, q, k, v, head, group));
            std::vector<float> own;
            for (std::size_t g = 0; g < group; ++g)
                for (std::size_t i = 0; i < probes; ++i)
                    own.insert(own.end(), q.row(head * group + g, i), q.row(head * group + g, i) + 16);
            // The denominator runs over the cached rows only.
            const ReferenceAttention naive =
                attention_over(view, own, std::vector<Visible>(group * probes, Visible{0, 0, view.rows()}));
            std::vector<double>& most = largest.emplace_back(view.rows(), 0.0);
            for (std::size_t r = 0; r < group * probes; ++r)
                for (std::size_t j = 0; j < view.rows(); ++j)
                    most[j] = std::max(most[j], naive.attention[r * view.rows() + j]);
            for (std::size_t j = 0; j < view.rows(); ++j)
                ranked.emplace_back(most[j], view.position[j], 2 - head);  // ties: later, then lower head
        }
        record.tiles.clear();
        Outputs out(shape, probes), foreign_out(shape, probes);
        cache.probe(layer, q, k, v, out.layer(layer));
        rows.apply(evictor.probe(layer, rows.layer(layer), q, k, v, foreign_out.layer(layer)));
        for (std::size_t head = 0; head < 3; ++head)
            for (std::size_t r = 0; r < group * probes; ++r)
                for (std::size_t c = 0; c < 5; ++c) {
                    CAPTURE(layer, head, r, c);
                    const float got = out.layer(layer).row(head * group + r / probes, r % probes)[c];
                    REQUIRE(close(got, outputs[head][r * 5 + c], 1e-5, 1e-6));
                    REQUIRE(same_bits(
                        got, foreign_out.layer(layer).row(head * group + r / probes, r % probes)[c]));
                }
        REQUIRE(record.tiles.size() == 3);
        for (std::size_t head = 0; head < 3; ++head) {
            const HeadStep& step = record.tiles[head].step;
            REQUIRE(step.phase == Phase::probe);
            REQUIRE(step.head == head);
            REQUIRE(step.tokens == probes);
            REQUIRE(step.added == 0);
            REQUIRE((step.first_tile && step.last_tile));
            REQUIRE(step.next_position == static_cast<position_t>(tokens));
        }
        std::sort(ranked.begin(), ranked.end(), std::greater<>());
        ranked.resize(3 * budget);
        std::array<std::vector<position_t>, 3> expected;
        for (const auto& [score, position, later] : ranked) expected[2 - later].push_back(position);
        for (std::size_t head = 0; head < 3; ++head) {
            CAPTURE(layer, head);
            REQUIRE(cache.positions(layer, head) == sorted(expected[head]));
            REQUIRE(sorted(rows.positions(layer, head)) == sorted(expected[head]));
            // The scores stay with their rows.
            const HeadView view = cache.view(layer, head);
            const auto& state = cache.evictor().state(layer, head).largest;
            REQUIRE(state.rows() == view.rows());
            for (std::size_t j = 0; j < view.rows(); ++j)
                REQUIRE(
                    close(state[j], largest[head][static_cast<std::size_t>(view.position[j])], 1e-5, 1e-6));
        }
    }
    REQUIRE(cache.rows(0, 0) == 6);
    REQUIRE(cache.rows(0, 1) == 6);
    REQUIRE(cache.rows(0, 2) == 0);
    REQUIRE(cache.seen() == tokens);  // probe rows are not kept

    // A head without rows answers a probe from the probe's own rows, and decodes over the new ones.
    {
        Outputs out(shape, probes);
        const auto q = stream.q(0, 20, probes), k = stream.k(0, 20, probes), v = stream.v(0, 20, probes);
        const std::vector<double> naive = naive_probe(cache.view(0, 2), q, k, v, 2, group);
        cache.probe(0, q, k, v, out.layer(0));
        for (std::size_t r = 0; r < group * probes; ++r)
            for (std::size_t c = 0; c < 5; ++c)
                REQUIRE(close(out.layer(0).row(4 + r / probes, r % probes)[c], naive[r * 5 + c], 1e-5, 1e-6));
        REQUIRE(cache.rows(0, 0) + cache.rows(0, 1) == 12);
    }
    cache.end_prompt();
    for (std::size_t token = tokens; token < tokens + 4; ++token) {
        Outputs out(shape, 1);
        for (std::size_t layer = 0; layer < 2; ++layer) {
            cache.append(layer, stream.k(layer, token, 1), stream.v(layer, token, 1));
            std::vector<std::vector<double>> expected;
            for (std::size_t head = 0; head < 3; ++head) {
                const HeadView view = cache.view(layer, head);
                const std::vector<float> all_q = gathered(stream.q(layer, token, 1));
                const std::vector<float> own(all_q.begin() + static_cast<std::ptrdiff_t>(head * 32),
                                             all_q.begin() + static_cast<std::ptrdiff_t>(head * 32 + 32));
                expected.push_back(
                    attention_over(view, own, std::vector<Visible>(2, Visible{0, 0, view.rows()})).output);
            }
            cache.attend(layer, stream.q(layer, token, 1), out.layer(layer));
            for (std::size_t head = 0; head < 3; ++head)
                for (std::size_t g = 0; g < group; ++g)
                    for (std::size_t c = 0; c < 5; ++c)
                        REQUIRE(close(out.layer(layer).row(head * group + g, 0)[c], expected[head][g * 5 + c],
                                      1e-5, 1e-6));
        }
        cache.end_step();
        REQUIRE(cache.rows(0, 2) == token - tokens + 1);
        REQUIRE(cache.rows(0, 0) == 6 + token - tokens + 1);
    }
}

TEST_CASE("a probe of several tiles sees the cached rows like one", "[contract][differential]") {
    const CacheShape shape{.layers = 1, .q_heads = 2, .kv_heads = 1, .head_dim = 4};
    const TokenStream stream(shape, 230, 8);
    Record record;
    KVCache cache(shape, EpiLike{.record = &record}, Budget{.tokens = 1000});
    feed(cache, stream, 0, 50);
    const std::size_t probes = 180;  // tiles of 64 tokens
    const auto q = stream.q(0, 50, probes), k = stream.k(0, 50, probes), v = stream.v(0, 50, probes);
    const std::vector<double> naive = naive_probe(cache.view(0, 0), q, k, v, 0, 2);
    Outputs out(shape, probes);
    cache.probe(0, q, k, v, out.layer(0));
    REQUIRE(record.tiles.size() == 3);
    std::size_t next = 0;
    for (const Record::Tile& tile : record.tiles) {
        REQUIRE(tile.step.first == next);
        REQUIRE(tile.step.first_tile == (next == 0));
        next += tile.step.tokens;
        REQUIRE(tile.step.last_tile == (next == probes));
        for (const Visible& visible : tile.visible) REQUIRE(visible.end == 50);
    }
    REQUIRE(next == probes);
    for (std::size_t r = 0; r < 2 * probes; ++r)
        for (std::size_t c = 0; c < 4; ++c) {
            CAPTURE(r, c);
            REQUIRE(close(out.layer(0).row(r / probes, r % probes)[c], naive[r * 4 + c], 1e-5, 1e-6));
        }
}

TEST_CASE("a model-pooled policy ranks all layers in one list at the end of the step", "[contract]") {
    const std::size_t tokens = 16, budget = 3;
    const CacheShape shape{.layers = 3, .q_heads = 2, .kv_heads = 2, .head_dim = 4};
    const bool tied = GENERATE(true, false);
    const TokenStream stream(shape, tokens, 9);
    std::vector<float> log_beta = random_floats(6 * tokens, 10);
    for (float& x : log_beta) x = tied ? -0.25F : -0.01F - std::abs(x);
    log_beta[1] = -1e-4F;  // takes a place for good, so that ties between heads are cut apart
    KVCache cache(shape, TrimDynamicLike{}, Budget{.tokens = budget});
    std::array<std::vector<position_t>, 6> held;
    for (std::size_t first = 0; first < tokens;) {
        const std::size_t count = first == 0 ? 5 : 1;
        Outputs out(shape, count);
        for (std::size_t layer = 0; layer < 3; ++layer) {
            const std::size_t before = cache.rows(layer, 0);
            cache.append(layer, stream.k(layer, first, count), stream.v(layer, first, count),
                         {.log_beta = {&log_beta[2 * layer * tokens + first], 2, count, tokens}});
            cache.attend(layer, stream.q(layer, first, count), out.layer(layer));
            REQUIRE(cache.rows(layer, 0) == before + count);
        }
        cache.end_step();
        using Row = std::tuple<float, position_t, std::size_t>;  // ties: the later layer and head
        std::vector<Row> all;
        for (std::size_t i = 0; i < 6; ++i) {
            for (std::size_t t = first; t < first + count; ++t) held[i].push_back(static_cast<position_t>(t));
            for (const position_t p : held[i])
                all.emplace_back(static_cast<float>(static_cast<position_t>(first + count) - p) *
                                     log_beta[i * tokens + static_cast<std::size_t>(p)],
                                 p, i);
            held[i].clear();
        }
        std::sort(all.begin(), all.end(), std::greater<>());
        all.resize(std::min(all.size(), 6 * budget));
        for (const auto& [score, position, i] : all) held[i].push_back(position);
        for (std::size_t i = 0; i < 6; ++i) {
            CAPTURE(first, i);
            REQUIRE(cache.positions(i / 2, i % 2) == sorted(held[i]));
        }
        first += count;
    }
}

TEST_CASE("head sizes are set by the scores at the prompt's end and remembered while decoding",
          "[contract]") {
    const CacheShape shape{.layers = 2, .q_heads = 6, .kv_heads = 3, .head_dim = 8};
    const std::size_t prompt = 24, budget = 6;
    const bool known = GENERATE(true, false);
    const std::size_t chunk = GENERATE(std::size_t{24}, 10);
    TokenStream stream(shape, 60, 11);
    // Queries of head 0 and 1 of differing sharpness make the heads' scores differ.
    for (std::size_t token = 0; token < 60; ++token)
        for (std::size_t layer = 0; layer < 2; ++layer)
            for (std::size_t h = 0; h < 6; ++h)
                for (float& x : stream.query(token, layer, h)) x *= static_cast<float>(1 + 3 * (h / 2));
    std::vector<std::size_t> asked;
    BlockPool pool;
    KVCache<H2O, AdaLike> cache(shape, H2O{.recent = 0}, Budget{.tokens = budget}, pool, {.asked = &asked});
    cache.begin_prompt(known ? std::optional(prompt) : std::nullopt);
    std::vector<std::size_t> sizes(6);
    const auto note_sizes = [&] {
        for (std::size_t layer = 0; layer < 2; ++layer) {
            std::size_t sum = 0;
            for (std::size_t head = 0; head < 3; ++head) {
                const std::size_t size = cache.evictor().size(layer, head);
                sizes[3 * layer + head] = size;
                sum += size;
                REQUIRE(cache.rows(layer, head) == std::min(size, cache.seen()));
            }
            REQUIRE(sum == 3 * budget);  // a layer's rows are divided, neither more nor fewer
        }
    };
    in_chunks(prompt, chunk, [&](std::size_t first, std::size_t count) {
        feed(cache, stream, first, count);
        note_sizes();
    });
    cache.end_prompt();
    note_sizes();
    REQUIRE_FALSE(asked.empty());
    for (const std::size_t size : asked) REQUIRE(size == budget);  // also after a ragged division
    REQUIRE(std::set<std::size_t>(sizes.begin(), sizes.end()).size() > 1);

    const std::size_t calls = asked.size();
    for (std::size_t token = prompt; token < 40; ++token) {
        feed(cache, stream, token, 1);
        for (std::size_t i = 0; i < 6; ++i) REQUIRE(cache.rows(i / 3, i % 3) == sizes[i]);
    }
    REQUIRE(asked.size() == calls);

    // The next turn's prompt divides anew.
    cache.begin_prompt(10);
    feed(cache, stream, 40, 10);
    cache.end_prompt();
    REQUIRE(asked.size() == calls + 2);
    REQUIRE(asked.back() == budget);
    note_sizes();
}

TEST_CASE("making room within a prompt leaves the division of head sizes alone", "[contract]") {
    const CacheShape shape{.layers = 1, .q_heads = 2, .kv_heads = 2, .head_dim = 8};
    const TokenStream stream(shape, 40, 12);
    std::vector<std::size_t> asked;
    BlockPool pool;
    KVCache<H2O, AdaLike> cache(shape, H2O{.recent = 0}, Budget{.tokens = 8}, pool, {.asked = &asked});
    cache.begin_prompt(40);
    feed(cache, stream, 0, 20);
    const std::size_t a = cache.evictor().size(0, 0), b = cache.evictor().size(0, 1);
    REQUIRE(a + b == 16);
    cache.make_room(1);
    REQUIRE(cache.rows(0, 0) == a - 1);
    REQUIRE(cache.rows(0, 1) == b - 1);
    REQUIRE(cache.evictor().size(0, 0) == a);
    REQUIRE(cache.evictor().size(0, 1) == b);
}

namespace {

/// Head 0 keeps its oldest rows, head 1 its newest.
struct EndsLike {
    static constexpr std::string_view name = "ends_like";
    using State = NoState;

    static constexpr auto fields() { return std::tuple{}; }
    static constexpr Needs needs(Phase /*phase*/) { return {}; }
    static void observe(State& /*state*/, const HeadStep& /*step*/) {}
    static void score(const State& /*state*/, const HeadStep& step, std::span<float> out) {
        for (std::size_t j = 0; j < out.size(); ++j)
            out[j] = static_cast<float>(step.cached.position[j]) * (step.head == 0 ? -1.0F : 1.0F);
    }
};
/// Whatever the test wants next.
struct TableRule : AdaLike {
    std::vector<std::size_t>* sizes = nullptr;

    void head_sizes(std::size_t /*layer*/, std::span<const Candidates> /*heads*/, std::size_t /*size*/,
                    std::span<std::size_t> out) const {
        std::copy(sizes->begin(), sizes->end(), out.begin());
    }
};

}  // namespace

TEST_CASE("a head within its size may get a smaller one while a fork shares its blocks", "[contract]") {
    const CacheShape shape{.layers = 1, .q_heads = 2, .kv_heads = 2, .head_dim = 8};
    const TokenStream stream(shape, 30, 13);
    std::vector<std::size_t> sizes{2, 18};
    BlockPool pool({.block_rows = 4});
    KVCache<EndsLike, TableRule> cache(shape, {}, Budget{.tokens = 10}, pool, {{}, &sizes});
    cache.begin_prompt();
    feed(cache, stream, 0, 20);
    const auto fork = cache.fork();
    cache.truncate(4);
    REQUIRE(cache.rows(0, 0) == 2);
    REQUIRE(cache.rows(0, 1) == 14);
    sizes = {14, 6};
    feed(cache, stream, 16, 2);  // head 0 is over its two, head 1 within its eighteen
    REQUIRE(cache.rows(0, 0) == 4);
    REQUIRE(cache.positions(0, 1) == std::vector<position_t>{12, 13, 14, 15, 16, 17});
    REQUIRE(fork.positions(0, 1).front() == 2);
    REQUIRE(fork.rows(0, 1) == 18);
}

TEST_CASE("a rule gives every layer its own size", "[contract]") {
    const CacheShape shape{.layers = 3, .q_heads = 2, .kv_heads = 1, .head_dim = 4};
    const TokenStream stream(shape, 30, 14);
    BlockPool pool;
    KVCache<Tova, PyramidLike> cache(shape, Tova{}, Budget{.ratio = 0.5}, pool, {.step = 2});
    REQUIRE(cache.evictor().size(2, 0) == unlimited);
    cache.begin_prompt(20);
    in_chunks(20, 6, [&](std::size_t first, std::size_t count) { feed(cache, stream, first, count); });
    cache.end_prompt();
    for (std::size_t token = 20; token < 30; ++token) {
        for (std::size_t layer = 0; layer < 3; ++layer) REQUIRE(cache.rows(layer, 0) == 12 - 2 * layer);
        feed(cache, stream, token, 1);
    }
    // The minimum of all layers decides what may be pinned.
    REQUIRE(failure<error::config_error>([&] { cache.pin(0, 9); }) ==
            "pin: budget is 8, want at least the pinned 9");
}

TEST_CASE("a policy that selects gets the rows that must stay and is held to its number", "[contract]") {
    const CacheShape shape{.layers = 1, .q_heads = 2, .kv_heads = 2, .head_dim = 4};
    const TokenStream stream(shape, 30, 15);
    std::vector<std::size_t> counts;
    KVCache cache(shape, GreedyLike{.sinks = 1, .recent = 2, .counts = &counts}, Budget{.tokens = 6});
    cache.pin(5, 6);
    feed(cache, stream, 0, 10);
    REQUIRE(counts == std::vector<std::size_t>{6, 6});  // once per head
    // Fixed: 0, 5, 8, 9; then every other slot from the oldest on: 2, 4.
    REQUIRE(cache.positions(0, 0) == std::vector<position_t>{0, 2, 4, 5, 8, 9});
    REQUIRE(cache.positions(0, 1) == cache.positions(0, 0));
    for (std::size_t token = 10; token < 20; ++token) {
        feed(cache, stream, token, 1);
        const auto held = cache.positions(0, 0);
        const auto now = static_cast<position_t>(token);
        REQUIRE(held.size() == 6);
        for (const position_t fixed : {position_t{0}, position_t{5}, now - 1, now})
            REQUIRE(std::count(held.begin(), held.end(), fixed) == 1);
    }
    cache.make_room(2);  // the newest two rows will be new ones
    REQUIRE(counts.back() == 4);
    REQUIRE(cache.rows(0, 0) == 4);
    counts.clear();
    feed(cache, stream, 20, 1);
    REQUIRE(counts.empty());  // not asked while everything fits
}

TEST_CASE("a policy that selects another number of rows is told so, and nothing is evicted", "[contract]") {
    const CacheShape shape{.layers = 2, .q_heads = 1, .kv_heads = 1, .head_dim = 4};
    const TokenStream stream(shape, 30, 16);
    const int miscount = GENERATE(-1, 1);
    KVCache cache(shape, GreedyLike{.miscount = miscount}, Budget{.tokens = 6});
    Outputs out(shape, 8);
    cache.append(0, stream.k(0, 0, 8), stream.v(0, 0, 8));
    REQUIRE(failure<error::state_error>([&] { cache.attend(0, stream.q(0, 0, 8), out.layer(0)); }) ==
            "greedy_like: number of rows selected is " + std::to_string(6 + miscount) + ", want 6");
    REQUIRE(cache.rows(0, 0) == 8);
    // A proposal fails likewise, and leaves the sizes as they are.
    KVCache asked(shape, GreedyLike{.miscount = miscount}, Budget{.tokens = 6});
    feed(asked, stream, 0, 5);
    REQUIRE_THROWS_AS(asked.propose(3), error::state_error);
    REQUIRE(asked.evictor().size(0, 0) == 6);
    REQUIRE(asked.evictor().size(1, 0) == 6);
    REQUIRE(asked.rows(0, 0) == 5);
}

TEST_CASE("a wrapper gets the distributions of its base per query head", "[contract][differential]") {
    const CacheShape shape{.layers = 2, .q_heads = 6, .kv_heads = 2, .head_dim = 8};
    const std::size_t budget = 5, group = 3;
    const TokenStream stream(shape, 24, 17);
    KVCache cache(shape, CaoteLike<LastRowLike>{}, Budget{.tokens = budget});
    for (std::size_t first = 0; first < 24;) {
        const std::size_t count = first == 0 ? 9 : 1;
        Outputs out(shape, count);
        for (std::size_t layer = 0; layer < 2; ++layer) {
            cache.append(layer, stream.k(layer, first, count), stream.v(layer, first, count));
            std::vector<std::vector<position_t>> expected;
            const std::vector<float> last = gathered(stream.q(layer, first + count - 1, 1));
            for (std::size_t head = 0; head < 2; ++head) {
                const HeadView view = cache.view(layer, head);
                const std::vector<float> own(
                    last.begin() + static_cast<std::ptrdiff_t>(head * group * 8),
                    last.begin() + static_cast<std::ptrdiff_t>((head + 1) * group * 8));
                const ReferenceAttention naive =
                    attention_over(view, own, std::vector<Visible>(group, Visible{0, 0, view.rows()}));
                const std::vector<float> values = widened(view.v);
                std::map<position_t, double> score;
                for (std::size_t j = 0; j < view.rows(); ++j) {
                    double norm = 0.0, error = 0.0;
                    for (std::size_t c = 0; c < 8; ++c)
                        norm += std::abs(static_cast<double>(values[j * 8 + c]));
                    for (std::size_t g = 0; g < group; ++g) {
                        const double a = naive.attention[g * view.rows() + j];
                        error += a / (1.0 - a);
                    }
                    score[view.position[j]] = error * norm;
                }
                expected.push_back(
                    best(to_vector(view.position), budget, [&](position_t p) { return score.at(p); }));
            }
            cache.attend(layer, stream.q(layer, first, count), out.layer(layer));
            for (std::size_t head = 0; head < 2; ++head) {
                CAPTURE(first, layer, head);
                REQUIRE(cache.positions(layer, head) == expected[head]);
            }
        }
        cache.end_step();
        first += count;
    }
}

TEST_CASE("tiles bring every counted row once, in order, with the numbers of a naive loop",
          "[contract][differential]") {
    const CacheShape shape{.layers = 1, .q_heads = 4, .kv_heads = 2, .head_dim = 6, .value_dim = 3};
    const std::size_t group = 2, before = 7;
    const std::size_t count = GENERATE(std::size_t{1}, 5, 150);
    const std::size_t window = GENERATE(std::size_t{1}, 4, 70, 1000);
    const bool prompt = GENERATE(true, false);
    const bool engine = GENERATE(true, false);  // an engine with attention of its own wants no output
    CAPTURE(count, window, prompt, engine);
    const TokenStream stream(shape, before + count, 18);
    Record record;
    Evictor evictor(shape, ObcLike{.window = window, .record = &record}, Budget{.tokens = 1000});
    Foreign rows(shape);
    feed(evictor, rows, stream, 0, before);
    record.tiles.clear();
    if (prompt) evictor.begin_prompt(count);
    rows.append(0, stream.k(0, before, count), stream.v(0, before, count), before);
    const auto q = stream.q(0, before, count);
    Outputs out(shape, count);
    evictor.step(0, rows.layer(0), q, engine ? HeadsView<float>{} : out.layer(0));

    const std::size_t n = before + count, counted = std::min(window, count);
    std::array<std::size_t, 2> next{count - counted, count - counted}, first_tiles{}, last_tiles{};
    for (const Record::Tile& tile : record.tiles) {
        const HeadStep& step = tile.step;
        const std::size_t head = step.head;
        REQUIRE(step.phase == (prompt ? Phase::prompt : Phase::decode));
        REQUIRE(step.first == next[head]);
        REQUIRE(step.group == group);
        REQUIRE(step.added == count);
        REQUIRE(step.next_position == static_cast<position_t>(n));
        REQUIRE(step.tokens >= 1);
        REQUIRE(step.tokens <= detail::tile_tokens(group, n));
        first_tiles[head] += step.first_tile ? 1 : 0;
        last_tiles[head] += step.last_tile ? 1 : 0;
        REQUIRE(step.first_tile == (step.first == count - counted));
        REQUIRE(step.last_tile == (step.first + step.tokens == count));
        next[head] += step.tokens;

        const HeadView view = rows.layer(0)[head];
        std::vector<float> own;
        std::vector<Visible> visible;
        for (std::size_t g = 0; g < group; ++g)
            for (std::size_t i = step.first; i < step.first + step.tokens; ++i) {
                const float* row = q.row(head * group + g, i);
                own.insert(own.end(), row, row + 6);
                visible.push_back({0, 0, before + i + 1});
            }
        REQUIRE(same_bits(tile.q, own));
        REQUIRE(tile.visible.size() == visible.size());
        for (std::size_t r = 0; r < visible.size(); ++r) {
            REQUIRE(tile.visible[r].end == visible[r].end);
            REQUIRE(tile.visible[r].begin == 0);
        }
        const ReferenceAttention naive = attention_over(view, own, visible);
        const auto agrees = [](const std::vector<float>& got, const std::vector<double>& wanted) {
            return std::equal(got.begin(), got.end(), wanted.begin(), wanted.end(),
                              [](float x, double y) { return close(x, y, 1e-4, 1e-6); });
        };
        REQUIRE(agrees(tile.attention, naive.attention));
        REQUIRE(agrees(tile.logits, naive.logits));
        REQUIRE(agrees(tile.output, naive.output));
        REQUIRE(agrees(tile.lse, naive.lse));
    }
    for (std::size_t head = 0; head < 2; ++head) {
        REQUIRE(next[head] == count);
        REQUIRE(first_tiles[head] == 1);
        REQUIRE(last_tiles[head] == 1);
    }
    if (count == 150 && window >= 70) REQUIRE(record.tiles.size() > 2);
}

TEST_CASE("what nobody asked for is not computed, and a call without counted rows is still seen once",
          "[contract]") {
    const CacheShape shape{.layers = 1, .q_heads = 2, .kv_heads = 1, .head_dim = 4};
    const TokenStream stream(shape, 20, 19);
    Record record;
    Evictor evictor(shape, ObcLike{.window = 0, .record = &record}, Budget{.tokens = 1000});
    Foreign rows(shape);
    rows.append(0, stream.k(0, 0, 20), stream.v(0, 0, 20), 0);
    evictor.step(0, rows.layer(0), stream.q(0, 0, 20));
    REQUIRE(record.tiles.size() == 1);
    const Record::Tile& tile = record.tiles[0];
    REQUIRE(tile.step.tokens == 0);
    REQUIRE(tile.step.added == 20);
    REQUIRE((tile.step.first_tile && tile.step.last_tile));
    REQUIRE((tile.q.empty() && tile.attention.empty() && tile.lse.empty() && tile.visible.empty()));
}

TEST_CASE("a trigger on the count of tokens fires although no other moment is due", "[contract]") {
    const CacheShape shape{.layers = 2, .q_heads = 1, .kv_heads = 1, .head_dim = 4};
    const TokenStream stream(shape, 40, 20);
    const std::size_t interval = GENERATE(std::size_t{1}, 5, 7, 11);
    KVCache cache(shape, EveryLike{.interval = interval}, Budget{.tokens = 3});
    for (std::size_t token = 0; token < 40; ++token) {
        feed(cache, stream, token, 1);
        const std::size_t since = (token + 1) % interval, last = token + 1 - since;
        CAPTURE(token, interval);
        REQUIRE(all_hold(cache, std::min<std::size_t>(last, 3) + since));
    }
    REQUIRE_THROWS_AS(KVCache(shape, EveryLike{.interval = interval}),
                      error::config_error);  // needs a budget
}
