// Queries that wait for a step that evicts: nobody may be able to tell.
#include <algorithm>
#include <cstddef>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "kvcull/cache/evictor.hpp"
#include "kvcull/policies.hpp"
#include "kvcull/select/head_rules.hpp"
#include "support/catch.hpp"
#include "support/every_policy.hpp"
#include "support/failure.hpp"
#include "support/isas.hpp"
#include "support/stubs.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

constexpr CacheShape small{.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 8, .value_dim = 6};

/// Wants all that there is, and writes down what it is given.
struct Witness {
    static constexpr std::string_view name = "witness";
    static constexpr bool follows_logits = true;
    struct State : ReceivedAttention {
        Record seen;
    };

    bool newest = false;  // wants no more than the newest token

    static constexpr auto fields() { return std::tuple{}; }
    [[nodiscard]] Needs needs(Phase /*phase*/) const {
        return {.rows = newest ? 1 : all_rows,
                .attention = true,
                .logits = true,
                .output = true,
                .replaced = newest};
    }
    static void observe(State& state, const HeadStep& step) {
        REQUIRE(state.mass.rows() == step.n());
        state.seen.tile(step);
        state.ReceivedAttention::observe({}, step);
    }
    static void score(const State& state, const HeadStep& step, std::span<float> out) {
        state.write(step, out);
    }
};

/// Takes a side value, and attention too.
struct Sided : H2O {
    static constexpr Side side = Side::log_beta;
    static void admit(State& /*state*/, const HeadInputs& /*inputs*/) {}
};

bool same(const Record::Tile& a, const Record::Tile& b) {
    const HeadStep &x = a.step, &y = b.step;
    const auto seen = [](const Visible& v) { return std::tuple(v.sinks, v.begin, v.end); };
    const auto call = [](const HeadStep& s) {
        return std::tuple(s.phase, s.layer, s.head, s.group, s.next_position, s.added, s.n(), s.first,
                          s.tokens, s.first_tile, s.last_tile, s.evicts);
    };
    return call(x) == call(y) && same_bits(a.q, b.q) && same_bits(a.attention, b.attention) &&
           same_bits(a.logits, b.logits) && same_bits(a.output, b.output) && same_bits(a.lse, b.lse) &&
           std::equal(a.visible.begin(), a.visible.end(), b.visible.begin(), b.visible.end(),
                      [&](const Visible& v, const Visible& w) { return seen(v) == seen(w); });
}

/// The engine attends by itself: one call through all layers.
template <class P, class R>
void step(Evictor<P, R>& evictor, Foreign& rows, const TokenStream& stream, std::size_t first,
          std::size_t count, const StepInputs& end = {}) {
    for (std::size_t layer = 0; layer < evictor.shape().layers; ++layer) {
        rows.append(layer, stream.k(layer, first, count), stream.v(layer, first, count),
                    evictor.next_position());
        if (count > 2) evictor.admit(layer, count);  // as an engine may, before it steps
        rows.apply(evictor.step(layer, rows.layer(layer), stream.q(layer, first, count)));
    }
    rows.apply(evictor.end_step(rows.view(), end));
}

/// Two engines go through the same, one of which lets its queries wait.
template <class P, class R = Uniform>
struct Pair {
    Evictor<P, R> at_once, waits;
    Foreign a, b;
    std::size_t at = 0;

    Pair(const CacheShape& shape, const P& policy, const Budget& budget, std::size_t most, R rule = {})
        : at_once(shape, policy, budget, rule), waits(shape, policy, budget, rule), a(shape), b(shape) {
        waits.buffer_queries(most);
    }
    template <class Call>
    void both(Call&& call) {
        call(at_once, a);
        call(waits, b);
    }
    void feed(const TokenStream& stream, std::size_t count) {
        const std::vector<std::int32_t> ids(count, at % 5 == 4 ? 2 : 7);  // 2 ends a sentence
        const std::vector<float> hidden = random_floats(count * 3, at);
        both([&](auto& evictor, Foreign& rows) {
            step(evictor, rows, stream, at, count, {ids, {hidden.data(), count, 3}});
        });
        at += count;
    }
    [[nodiscard]] bool same_rows() const {
        const CacheShape& shape = at_once.shape();
        for (std::size_t layer = 0; layer < shape.layers; ++layer)
            for (std::size_t head = 0; head < shape.kv_heads; ++head)
                if (a.positions(layer, head) != b.positions(layer, head)) return false;
        return true;
    }
    [[nodiscard]] bool same_states() {
        waits.catch_up(b.view());
        return same_live(at_once.live(), waits.live());
    }
};

}  // namespace

TEST_CASE("a policy cannot tell whether queries waited", "[property]") {
    const std::pair<std::size_t, std::size_t> size =
        GENERATE(std::pair{1, 128}, std::pair{4, 80}, std::pair{7, 1}, std::pair{4, 257});
    const std::size_t group = size.first, dim = size.second;
    const DType dtype = GENERATE(DType::f32, DType::f16, DType::int8);
    const float softcap = dtype == DType::f16 ? 5.0F : 0.0F;
    for (const simd::Isa isa : available_isas()) {
        CAPTURE(group, dim, softcap, name_of(dtype), simd::name_of(isa));
        CacheShape shape{.layers = 1, .q_heads = 2 * group, .kv_heads = 2, .head_dim = dim, .value_dim = 33};
        shape.dtype = dtype;
        shape.softcap = softcap;
        Pair<Witness> pair(shape, {}, {.tokens = 20, .slack = 70}, 80);
        pair.both([&](auto& evictor, Foreign&) {
            evictor.set_kernels(simd::kernels_for(isa));
            if (softcap != 0.0F) evictor.set_bias(alibi(std::vector<float>(2 * group, 0.01F)));
        });
        const TokenStream stream(shape, 180, 3);
        pair.feed(stream, 20);
        for (int token = 0; token < 150; ++token) pair.feed(stream, 1);
        REQUIRE(pair.waits.live().any_waits());
        pair.both([](auto& evictor, Foreign&) { evictor.begin_prompt(); });
        pair.feed(stream, 3);
        pair.both([](auto& evictor, Foreign& rows) { rows.apply(evictor.end_prompt(rows.view())); });
        for (int token = 0; token < 5; ++token) pair.feed(stream, 1);
        pair.waits.catch_up(pair.b.view());
        REQUIRE(pair.same_rows());
        for (std::size_t head = 0; head < 2; ++head) {
            const auto& want = pair.at_once.state(0, head).seen.tiles;
            const auto& got = pair.waits.state(0, head).seen.tiles;
            REQUIRE(want.size() == 157);
            REQUIRE(std::equal(want.begin(), want.end(), got.begin(), got.end(), same));
            REQUIRE(std::count_if(got.begin(), got.end(), [](const auto& t) { return t.step.evicts; }) == 2);
        }
    }
}

TEST_CASE("where calls replace one another, the newest query is shown alone", "[contract]") {
    const TokenStream stream(small, 20, 3);
    Evictor evictor(small, Witness{.newest = true}, Budget{.tokens = 15});
    Foreign rows(small);
    evictor.buffer_queries();
    for (std::size_t token = 0; token < 5; ++token) step(evictor, rows, stream, token, 1);
    REQUIRE(evictor.state(0, 0).seen.tiles.empty());
    step(evictor, rows, stream, 5, 3);
    const auto& tiles = evictor.state(0, 0).seen.tiles;
    REQUIRE(tiles.size() == 2);
    REQUIRE(tiles[0].step.added == 5);
    REQUIRE(tiles[0].step.first == 4);
    REQUIRE(tiles[0].step.tokens == 1);
    REQUIRE(tiles[0].step.n() == 5);
    const float* const query = stream.q(0, 4, 1).row(0, 0);
    REQUIRE(std::equal(query, query + small.head_dim, tiles[0].q.begin()));
    REQUIRE(tiles[1].step.added == 3);
}

TEST_CASE("a probe comes after the queries that waited when it came", "[property]") {
    const TokenStream stream(small, 20, 3);
    Pair<Witness> pair(small, {}, {.tokens = 15}, 64);
    for (int token = 0; token < 3; ++token) pair.feed(stream, 1);
    pair.both([&](auto& evictor, Foreign& rows) {
        Outputs out(small, 2);
        evictor.probe(1, rows.layer(1), stream.q(1, 3, 2), stream.k(1, 3, 2), stream.v(1, 3, 2),
                      out.layer(1));
    });
    pair.feed(stream, 1);
    pair.waits.catch_up(pair.b.view());
    for (std::size_t head = 0; head < 2; ++head) {
        const auto& want = pair.at_once.state(1, head).seen.tiles;
        const auto& got = pair.waits.state(1, head).seen.tiles;
        REQUIRE(want.size() == 5);
        REQUIRE(want[3].step.phase == Phase::probe);
        REQUIRE(std::equal(want.begin(), want.end(), got.begin(), got.end(), same));
    }
}

TEST_CASE("rows and states of every policy are the same whether queries waited or not", "[differential]") {
    const std::size_t slack = GENERATE(std::size_t{0}, 6), most = GENERATE(std::size_t{1}, 4, 64);
    const Executor executor = most == 4 ? threads() : Executor();
    for_every_policy([&](auto policy) {
        CAPTURE(policy.name, slack, most);
        Pair pair(small, policy, Budget{.tokens = 9, .slack = slack}, most);
        pair.both([&](auto& evictor, Foreign&) { evictor.set_executor(executor); });
        const TokenStream stream(small, 90, 8);
        const auto decode = [&](std::size_t tokens) {
            for (std::size_t token = 0; token < tokens; ++token) {
                pair.feed(stream, 1);
                REQUIRE(pair.same_rows());
            }
        };
        const auto prompt = [&](std::initializer_list<std::size_t> chunks) {
            pair.both([](auto& evictor, Foreign&) { evictor.begin_prompt(); });
            for (const std::size_t chunk : chunks) pair.feed(stream, chunk);
            pair.both([](auto& evictor, Foreign& rows) { rows.apply(evictor.end_prompt(rows.view())); });
            REQUIRE(pair.same_rows());
        };
        prompt({7, 1, 5});
        decode(17);
        REQUIRE(pair.same_states());
        decode(2);
        pair.feed(stream, 3);  // tokens that were guessed and checked together
        decode(2);
        pair.both([](auto& evictor, Foreign& rows) { rows.apply(evictor.truncate(rows.view(), 1)); });
        --pair.at;
        decode(2);
        pair.both([](auto& evictor, Foreign& rows) { rows.apply(evictor.make_room(rows.view(), 3)); });
        decode(2);
        pair.both([](auto& evictor, Foreign&) { evictor.hold(true); });
        decode(9);
        pair.both([](auto& evictor, Foreign&) { evictor.hold(false); });
        prompt({4, 4});
        decode(11);
        REQUIRE(pair.same_states());
    });
}

TEST_CASE("waiting queries belong to the sequence: copies and marks take them along", "[property]") {
    const TokenStream stream(small, 60, 4);
    Pair pair(small, H2O{.recent = 2}, Budget{.tokens = 9, .slack = 7}, 64);
    for (int token = 0; token < 21; ++token) pair.feed(stream, 1);
    REQUIRE(pair.waits.live().any_waits());
    auto copy = pair;
    const auto mark = pair.waits.live(), other = pair.at_once.live();
    const Foreign a = pair.a, b = pair.b;
    for (int again = 0; again < 2; ++again) {
        for (int token = 0; token < 20; ++token) {
            pair.feed(stream, 1);
            REQUIRE(pair.same_rows());
        }
        REQUIRE(pair.same_states());
        pair.waits.restore(mark);
        pair.at_once.restore(other);
        pair.a = a;
        pair.b = b;
        pair.at = 21;
    }
    for (int token = 0; token < 20; ++token) copy.feed(stream, 1);
    REQUIRE(copy.same_rows());
    REQUIRE(copy.same_states());
}

TEST_CASE("queries wait under rules that leave heads of different length", "[differential]") {
    const TokenStream stream(small, 70, 12);
    Pair pair(small, SnapKV{.window = 4, .kernel = 3, .decode_interval = 3}, Budget{.tokens = 12}, 64,
              AdaKV{});
    pair.both([](auto& evictor, Foreign&) { evictor.begin_prompt(); });
    pair.feed(stream, 30);
    pair.both([](auto& evictor, Foreign& rows) { rows.apply(evictor.end_prompt(rows.view())); });
    REQUIRE(pair.b.positions(0, 0).size() != pair.b.positions(0, 1).size());
    for (int token = 0; token < 30; ++token) {
        pair.feed(stream, 1);
        REQUIRE(pair.same_rows());
    }
    REQUIRE(pair.same_states());
}

TEST_CASE("with outputs of ours, without need or with side values no query waits", "[contract]") {
    const TokenStream stream(small, 40, 4);
    const auto waits = [&](auto policy, bool ours) {
        Evictor evictor(small, policy, Budget{.tokens = 9, .slack = 20});
        evictor.buffer_queries();
        Foreign rows(small);
        for (std::size_t token = 0; token < 5; ++token)
            ours ? void(feed(evictor, rows, stream, token, 1)) : step(evictor, rows, stream, token, 1);
        return evictor.live().any_waits();
    };
    REQUIRE(waits(H2O{}, false));
    REQUIRE_FALSE(waits(H2O{}, true));
    REQUIRE_FALSE(waits(KeyDiff{}, false));
    REQUIRE_FALSE(waits(Full{}, false));

    const std::vector<float> beta(small.kv_heads, -0.1F);
    Evictor sided(small, Sided{}, Budget{.tokens = 9, .slack = 20});
    sided.buffer_queries();
    Foreign rows(small);
    rows.append(0, stream.k(0, 0, 1), stream.v(0, 0, 1), 0);
    sided.admit(0, 1, {.log_beta = {beta.data(), small.kv_heads, 1}});
    sided.step(0, rows.layer(0), stream.q(0, 0, 1));
    REQUIRE_FALSE(sided.live().any_waits());
}

TEST_CASE("what waiting queries are still needed for is refused by name", "[contract]") {
    const TokenStream stream(small, 40, 4);
    Evictor evictor(small, H2O{}, Budget{.tokens = 9, .slack = 20});
    Foreign rows(small);
    evictor.buffer_queries(3);
    step(evictor, rows, stream, 0, 1);
    std::vector<float> scores(1);
    const auto refused = [&](std::string_view where, const auto& call) {
        REQUIRE(failure<error::state_error>(call) ==
                std::string(where) + ": queries is waiting, want catch_up first");
    };
    refused("Evictor::scores", [&] { evictor.scores(0, 0, rows.layer(0)[0], scores); });
    refused("Evictor::commit", [&] { evictor.commit(Plan()); });
    refused("Evictor::set_bias", [&] { evictor.set_bias({}); });
    refused("Evictor::buffer_queries", [&] { evictor.buffer_queries(0); });
    evictor.catch_up(rows.view());
    evictor.scores(0, 0, rows.layer(0)[0], scores);
    REQUIRE(scores[0] == 1.0F);
    evictor.buffer_queries(0);
    step(evictor, rows, stream, 1, 1);
    REQUIRE_FALSE(evictor.live().any_waits());
    REQUIRE_THROWS_AS(evictor.catch_up({}), error::shape_error);
}

TEST_CASE("at most so many queries wait, and waiting allocates nothing", "[property]") {
    const TokenStream stream(small, 60, 4);
    Evictor evictor(small, H2O{}, Budget{.tokens = 9, .slack = 40});
    Foreign rows(small);
    evictor.buffer_queries(5);
    for (std::size_t token = 0; token < 23; ++token) {
        step(evictor, rows, stream, token, 1);
        for (const std::vector<float>& layer : evictor.live().waiting) {
            REQUIRE(layer.size() == (token + 1) % 5 * small.q_heads * small.head_dim);
            REQUIRE(layer.capacity() == 5 * small.q_heads * small.head_dim);
        }
    }
}
