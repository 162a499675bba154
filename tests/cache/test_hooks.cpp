// The hooks of a policy into a step: values read along with attention, notice of evictions, rows that leave.

#include <algorithm>
#include <cstddef>
#include <span>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "kvcull/cache/evictor.hpp"
#include "kvcull/cache/kv_cache.hpp"
#include "support/catch.hpp"
#include "support/foreign.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

/// Wide values, so that a few rows are several pieces.
constexpr CacheShape wide{.layers = 2, .q_heads = 6, .kv_heads = 2, .head_dim = 8, .value_dim = 257};
constexpr std::size_t tokens = 70;

/// What a policy with all hooks was shown.
struct Log {
    struct Reading {
        std::size_t layer, head, rows = 0, pieces = 0;
        std::vector<float> values = {};  // of all pieces, one after the other
        bool observed = false;
    };
    struct Forgotten {
        std::size_t layer, head;
        std::vector<index_t> keep;
        std::vector<position_t> positions;  // of all rows, those that go included
        std::vector<float> values;
    };
    std::vector<Reading> readings;
    std::vector<float> query;    // of the policy's own, over the keys
    std::size_t key_passes = 0;  // with it, since the last pass over V began
    std::vector<Forgotten> forgotten;
    std::vector<bool> evicts;  // of every first tile
    std::size_t asked = 0;
};
struct Hooked {
    static constexpr std::string_view name = "hooked";
    struct State {
        RowArray<float> positions;

        [[nodiscard]] auto arrays() noexcept { return std::tie(positions); }
    };
    Log* log = nullptr;
    bool reads = true, weights = false, outputs = false;
    std::size_t interval = 1;  // evicts when so many tokens were seen
    Scope over = Scope::head;

    static constexpr auto fields() { return std::tuple{}; }
    [[nodiscard]] Needs needs(Phase /*phase*/) const {
        return {.rows = 1, .attention = weights, .output = outputs};
    }
    [[nodiscard]] Scope scope() const { return over; }
    [[nodiscard]] bool due(const Moment& moment) const {
        return moment.rows > moment.budget && moment.rows - moment.budget > moment.slack &&
               moment.seen % interval == 0;
    }
    [[nodiscard]] bool reads_values(State& /*state*/, const HeadStep& step) const {
        ++log->asked;
        CHECK(step.added == 1);
        return reads;
    }
    /// The newest key as a query.
    [[nodiscard]] std::span<const float> key_query(State& /*state*/, const HeadStep& step) const {
        CHECK(step.added == 1);
        log->query.resize(step.cached.k.dim());
        step.cached.k.widen(step.n() - 1, log->query);
        return reads ? std::span<const float>(log->query) : std::span<const float>{};
    }
    void take_products(State& /*state*/, const HeadStep& step, std::span<const float> products) const {
        CHECK(products.size() == step.n());
        const std::vector<float> keys = widened(step.cached.k);
        for (std::size_t j = 0; j < step.n(); ++j) {
            double sum = 0.0;
            for (std::size_t c = 0; c < log->query.size(); ++c)
                sum +=
                    static_cast<double>(log->query[c]) * static_cast<double>(keys[j * log->query.size() + c]);
            CHECK(close(products[j], sum * static_cast<double>(step.scale), 1e-5, 1e-5));
        }
        ++log->key_passes;
    }
    void read_values(State& /*state*/, const HeadStep& step, const RowsView::Run& piece) const {
        if (piece.first == 0) {
            log->readings.push_back({step.layer, step.head});
            CHECK(std::exchange(log->key_passes, 0) == 1);
        }
        Log::Reading& now = log->readings.back();
        ++now.pieces;
        CHECK(piece.first == now.rows);
        const auto* row = reinterpret_cast<const float*>(piece.data);
        for (std::size_t j = 0; j < piece.rows; ++j, row += step.cached.v.stride())
            now.values.insert(now.values.end(), row, row + step.cached.v.dim());
        now.rows += piece.rows;
        if (now.rows == step.n()) CHECK(same_bits(now.values, widened(step.cached.v)));
    }
    void observe(State& state, const HeadStep& step) const {
        for (std::size_t j = 0; j < step.n(); ++j)
            state.positions[j] = static_cast<float>(step.cached.position[j]);
        if (step.first_tile) log->evicts.push_back(step.evicts);
        if (!log->readings.empty() && step.added == 1) log->readings.back().observed = true;
    }
    void score(const State& /*state*/, const HeadStep& step, std::span<float> out) const {
        for (std::size_t j = 0; j < out.size(); ++j)  // the oldest odd positions go first
            out[j] = static_cast<float>(step.cached.position[j] % 2 == 0 ? 1000 + step.cached.position[j]
                                                                         : step.cached.position[j]);
    }
    void forget(State& state, const HeadStep& step, std::span<const index_t> keep) const {
        std::vector<position_t> positions(step.n());
        REQUIRE(state.positions.rows() == step.n());  // the state is not compacted yet
        for (std::size_t j = 0; j < step.n(); ++j) {
            positions[j] = step.cached.position[j];
            CHECK(state.positions[j] == static_cast<float>(positions[j]));
        }
        log->forgotten.push_back(
            {step.layer, step.head, {keep.begin(), keep.end()}, positions, widened(step.cached.v)});
    }
};
static_assert(Policy<Hooked> && QueriesKeys<Hooked> && ReadsValues<Hooked> && Forgets<Hooked>);

/// An engine: `count` tokens through all layers, with or without outputs of ours. `visit(plan)` sees every
/// layer's plan before it is carried out.
struct Engine {
    Evictor<Hooked> evictor;
    Foreign rows{wide};

    Engine(const Hooked& policy, const Budget& budget) : evictor(wide, policy, budget) {}
    template <class Visit>
    void feed(const TokenStream& stream, std::size_t first, std::size_t count, bool with_out,
              const Visit& visit) {
        Outputs out(wide, count);
        for (std::size_t layer = 0; layer < wide.layers; ++layer) {
            rows.append(layer, stream.k(layer, first, count), stream.v(layer, first, count),
                        evictor.next_position());
            const Plan& plan = evictor.step(layer, rows.layer(layer), stream.q(layer, first, count),
                                            with_out ? out.layer(layer) : HeadsView<float>{});
            visit(layer, plan);
            rows.apply(plan);
        }
        rows.apply(evictor.end_step(rows.view()));
    }
    void feed(const TokenStream& stream, std::size_t first, std::size_t count, bool with_out = true) {
        feed(stream, first, count, with_out, [](std::size_t, const Plan&) {});
    }
};

}  // namespace

TEST_CASE("who reads along gets every row of K and then of V once, in order, in each call of one token",
          "[contract]") {
    const TokenStream stream(wide, tokens, 1);
    Log log;
    const auto check = [&](const auto& call) {
        log = {};
        for (const std::size_t first : {0U, 13U, 26U}) call(first, std::min<std::size_t>(13, 35 - first));
        CHECK(log.asked == 0);
        for (std::size_t at = 35; at < tokens; ++at) {
            log.readings.clear();
            call(at, 1);
            REQUIRE(log.readings.size() == wide.heads());
            for (std::size_t i = 0; i < wide.heads(); ++i) {
                CHECK(log.readings[i].layer * wide.kv_heads + log.readings[i].head == i);
                CHECK(log.readings[i].rows == std::min<std::size_t>(at + 1, 41));
                CHECK(log.readings[i].pieces > 3);
                CHECK(log.readings[i].observed);
            }
        }
    };
    Engine engine({&log}, {.tokens = 40});
    BlockPool pool({.block_rows = 5});
    KVCache cache(wide, Hooked{&log}, Budget{.tokens = 40}, pool);
    check([&](std::size_t first, std::size_t count) { engine.feed(stream, first, count); });
    check([&](std::size_t first, std::size_t count) { feed(cache, stream, first, count); });
}

TEST_CASE("nobody reads along without outputs, in longer calls, or who does not want to", "[contract]") {
    const TokenStream stream(wide, tokens, 2);
    const auto readings = [&](Hooked policy, bool with_out, std::size_t count) {
        Log log;
        policy.log = &log;
        Engine engine(policy, {.tokens = 40});
        engine.feed(stream, 0, 10, with_out);
        engine.feed(stream, 10, count, with_out);
        if (policy.reads) CHECK(log.asked == log.readings.size());
        return log.readings.size();
    };
    CHECK(readings({}, true, 1) == wide.heads());
    CHECK(readings({}, false, 1) == 0);
    CHECK(readings({.weights = true}, false, 1) == 0);
    CHECK(readings({.outputs = true}, false, 1) == wide.heads());
    CHECK(readings({}, true, 2) == 0);
    CHECK(readings({.reads = false}, true, 1) == 0);
}

TEST_CASE("`evicts` is true in exactly the calls that end with a plan", "[contract]") {
    const TokenStream stream(wide, tokens, 3);
    for (const Hooked& kind : {Hooked{}, Hooked{.interval = 4}, Hooked{.over = Scope::layer_shared},
                               Hooked{.over = Scope::layer_pooled}})
        for (const std::size_t slack : {0U, 3U}) {
            CAPTURE(slack, kind.interval, static_cast<int>(kind.over));
            Log log;
            Hooked policy = kind;
            policy.log = &log;
            Engine engine(policy, {.tokens = 20, .slack = slack});
            std::size_t evictions = 0, calls = 0;
            const auto call = [&](std::size_t first, std::size_t count) {
                log.evicts.clear();
                engine.feed(stream, first, count, first % 3 == 0, [&](std::size_t layer, const Plan& plan) {
                    REQUIRE(log.evicts.size() == (layer + 1) * wide.kv_heads);
                    for (std::size_t h = 0; h < wide.kv_heads; ++h)
                        CHECK(log.evicts[layer * wide.kv_heads + h] != plan.empty());
                    evictions += plan.empty() ? 0 : 1;
                    ++calls;
                });
            };
            engine.evictor.begin_prompt(30);
            for (const std::size_t first : {0U, 12U, 24U}) call(first, std::min<std::size_t>(12, 30 - first));
            engine.rows.apply(engine.evictor.end_prompt(engine.rows.view()));
            for (std::size_t at = 30; at < 60; ++at) {
                engine.evictor.hold(at >= 40 && at < 45);
                call(at, 1);
            }
            call(60, 4);
            CHECK(evictions > 10);
            CHECK(evictions < calls);
        }
}

TEST_CASE("a policy that ranks the whole model is never told that a call evicts, and is shown nothing",
          "[contract]") {
    const TokenStream stream(wide, tokens, 4);
    Log log;
    Engine engine({.log = &log, .over = Scope::model_pooled}, {.tokens = 20});
    for (std::size_t at = 0; at < 40; ++at) engine.feed(stream, at, 1);
    CHECK(engine.rows.positions(0, 0).size() < 40);
    CHECK(std::count(log.evicts.begin(), log.evicts.end(), true) == 0);
    CHECK(log.forgotten.empty());
}

TEST_CASE("before rows leave their policy is shown which stay, with all of them still in place",
          "[contract]") {
    const TokenStream stream(wide, tokens, 5);
    for (const std::size_t slack : {0U, 3U}) {
        Log log, cache_log;
        Engine engine({&log}, {.tokens = 20, .slack = slack});
        BlockPool pool({.block_rows = 5});
        KVCache cache(wide, Hooked{&cache_log}, Budget{.tokens = 20, .slack = slack}, pool);
        std::size_t plans = 0;
        for (std::size_t first = 0; first < 60;) {
            const std::size_t count = first < 26 ? 13 : 1;
            engine.feed(stream, first, count, true, [&](std::size_t layer, const Plan& plan) {
                for (std::size_t i = 0; i < plan.size(); ++i) {
                    REQUIRE(plans < log.forgotten.size());
                    const Log::Forgotten& shown = log.forgotten[plans++];
                    CHECK(shown.layer == layer);
                    CHECK(shown.head == plan[i].head);
                    CHECK(std::equal(shown.keep.begin(), shown.keep.end(), plan[i].keep.begin(),
                                     plan[i].keep.end()));
                    CHECK((shown.positions == engine.rows.positions(layer, plan[i].head)));
                    CHECK(same_bits(shown.values, widened(engine.rows.layer(layer)[plan[i].head].v)));
                }
            });
            feed(cache, stream, first, count);
            first += count;
        }
        CHECK(plans == log.forgotten.size());
        CHECK(plans > 4 * wide.heads());
        REQUIRE(cache_log.forgotten.size() == plans);
        for (std::size_t i = 0; i < plans; ++i) {
            CHECK((cache_log.forgotten[i].keep == log.forgotten[i].keep));
            CHECK((cache_log.forgotten[i].positions == log.forgotten[i].positions));
            CHECK(same_bits(cache_log.forgotten[i].values, log.forgotten[i].values));
        }
        cache.make_room(3);  // rows may leave unseen in other ways
        cache.truncate(2);
        CHECK(cache_log.forgotten.size() == plans);
    }
}
