#include "kvcull/cache/decision.hpp"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <string>
#include <vector>

#include "kvcull/policies.hpp"
#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/stubs.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

constexpr CacheShape shape{.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 1};

/// Due by its rows in the given phase and layer, and ranked in the given scope; a row's score is its value.
struct Probe {
    static constexpr std::string_view name = "probe";
    using State = NoState;

    Phase phase = Phase::decode;
    std::size_t layer = unlimited;  // every one
    std::size_t interval = 1, since_interval = 1;
    bool at_prompt_end = false;
    Scope ranked = Scope::head;
    std::vector<Moment>* asked = nullptr;
    std::vector<HeadStep>* scored = nullptr;

    static constexpr auto fields() { return std::tuple{}; }
    static constexpr Needs needs(Phase /*phase*/) { return {}; }
    [[nodiscard]] Scope scope() const { return ranked; }
    [[nodiscard]] bool due(const Moment& moment) const {
        if (asked != nullptr) asked->push_back(moment);
        return moment.phase == phase && (layer == unlimited || layer == moment.layer) &&
               moment.rows > moment.budget && moment.seen % interval == 0 &&
               moment.since % since_interval == 0 && (!at_prompt_end || moment.prompt_end);
    }
    static Protected protect(std::size_t budget) { return {1, budget / 4}; }
    static void observe(State& /*state*/, const HeadStep& /*step*/) {}
    void score(const State& /*state*/, const HeadStep& step, std::span<float> out) const {
        if (scored != nullptr) scored->push_back(step);
        for (std::size_t j = 0; j < out.size(); ++j) step.cached.v.widen(j, out.subspan(j, 1));
    }
};

/// Rows whose value is their score.
struct Rows {
    std::vector<std::vector<float>> values;
    std::vector<std::vector<position_t>> positions;
    std::vector<HeadView> views;

    explicit Rows(std::vector<std::vector<float>> all) : values(std::move(all)) {
        for (const auto& head : values) {
            auto& own = positions.emplace_back(head.size());
            std::iota(own.begin(), own.end(), position_t{0});
        }
        for (std::size_t i = 0; i < values.size(); ++i)
            views.push_back({{values[i].data(), values[i].size(), 1, 1},
                             {values[i].data(), values[i].size(), 1, 1},
                             {positions[i]}});
    }
};
template <class P>
Live<P> live_of(const Rows& rows) {
    Live<P> live(shape);
    for (std::size_t i = 0; i < rows.values.size(); ++i) live.rows[i] = rows.values[i].size();
    return live;
}
std::vector<std::vector<index_t>> keeps(const Plan& plan, std::size_t heads, const Rows& rows) {
    std::vector<std::vector<index_t>> result(heads);
    for (std::size_t i = 0; i < heads; ++i)
        for (std::size_t j = 0; j < rows.values[i].size(); ++j) result[i].push_back(static_cast<index_t>(j));
    for (std::size_t i = 0; i < plan.size(); ++i)
        result[plan[i].layer * 2 + plan[i].head].assign(plan[i].keep.begin(), plan[i].keep.end());
    return result;
}

}  // namespace

TEST_CASE("a policy that is never due takes no budget, any other does", "[contract]") {
    const auto never = [](auto policy) {
        return detail::Decision<decltype(policy), Uniform>(shape, policy, {.tokens = 4}, {}).never;
    };
    REQUIRE(never(Full{}));
    REQUIRE_FALSE(never(H2O{}));
    REQUIRE_FALSE(never(SnapKV{.window = 2}));
    REQUIRE_FALSE(never(SkipLike{}));
    REQUIRE_FALSE(never(LaqLike{}));
    REQUIRE_FALSE(never(EpiLike{}));  // due after a probe
    for (const Phase phase : {Phase::prompt, Phase::decode, Phase::probe})
        for (const std::size_t layer : {std::size_t{0}, std::size_t{1}, unlimited})
            for (const std::size_t interval : {1U, 7U, 128U, 997U})
                for (const bool end : {false, true}) {
                    if (end && phase != Phase::prompt) continue;
                    CAPTURE(static_cast<int>(phase), layer, interval, end);
                    const Probe policy{.phase = phase,
                                       .layer = layer,
                                       .interval = interval,
                                       .since_interval = 1 + interval / 2,
                                       .at_prompt_end = end};
                    const detail::Decision<Probe, Uniform> decision(shape, policy, {.tokens = 4}, {});
                    REQUIRE_FALSE(decision.never);
                    for (const Phase other : {Phase::prompt, Phase::decode, Phase::probe})
                        REQUIRE(decision.falls_due[static_cast<std::size_t>(other)] == (other == phase));
                    REQUIRE(decision.may_fall_due(phase, true));
                    REQUIRE(decision.may_fall_due(phase, false) == !end);
                }
    REQUIRE_THROWS_AS((detail::Decision<H2O, Uniform>(shape, H2O{}, {}, {})), error::config_error);
    REQUIRE_NOTHROW((detail::Decision<Full, Uniform>(shape, Full{}, {}, {})));
    REQUIRE_THROWS_AS((detail::Decision<Full, Uniform>(shape, Full{}, {.ratio = 2.0}, {})),
                      error::config_error);
}

TEST_CASE("a budget becomes sizes of heads, or nothing changes", "[contract]") {
    const detail::Decision<Probe, PyramidLike> decision(shape, {}, {.ratio = 0.5}, {.step = 4});
    Live<Probe> live(shape);
    decision.resolve(live, 10, 20);
    REQUIRE(live.sizes == std::vector<std::size_t>{12, 12, 8, 8});
    REQUIRE(live.resolved);
    live.pinned = {{0, 5}, {10, 13}};
    decision.resolve(live, 10, 20);
    live.pinned.push_back({20, 21});
    REQUIRE(failure<error::config_error>([&] { decision.resolve(live, 9, 20); }) ==
            "pin: budget is 7, want at least the pinned 9");
    REQUIRE(live.sizes == std::vector<std::size_t>{12, 12, 8, 8});

    const detail::Decision<SnapKV, Uniform> checked(shape, {.window = 6}, {.ratio = 0.5}, {});
    Live<SnapKV> other(shape);
    REQUIRE_THROWS_AS(checked.resolve(other, 6, 12), error::config_error);
    REQUIRE_FALSE(other.resolved);
    REQUIRE(other.sizes[0] == unlimited);
}

TEST_CASE("whether heads hold too many rows, and whether that is the moment", "[property]") {
    const Rows rows({{1, 2, 3}, {1, 2, 3, 4, 5}, {1}, {}});
    std::vector<Moment> asked;
    const auto decide = [&](Scope scope, std::vector<std::size_t> sizes, auto&& question) {
        const detail::Decision<Probe, Uniform> decision(shape, {.ranked = scope, .asked = &asked},
                                                        {.tokens = 4}, {});
        Live<Probe> live = live_of<Probe>(rows);
        live.sizes = std::move(sizes);
        live.since = {3, 4};
        asked.clear();
        return question(decision, live);
    };
    const auto over = [&](std::size_t coming, std::vector<std::size_t> sizes) {
        return decide(Scope::head, sizes,
                      [&](auto& d, auto& live) { return d.over(live, d.layer(0), coming); });
    };
    REQUIRE(over(0, {3, 4, 9, 9}));
    REQUIRE_FALSE(over(0, {3, 5, 0, 0}));
    REQUIRE(over(1, {3, 5, 9, 9}));
    REQUIRE_FALSE(over(100, {unlimited, unlimited, 0, 0}));

    const auto due = [&](Scope scope, std::vector<std::size_t> sizes, std::size_t layer) {
        return decide(scope, sizes, [&](auto& d, auto& live) {
            const auto span = scope == Scope::model_pooled
                                  ? typename detail::Decision<Probe, Uniform>::Span{0, 4}
                                  : d.layer(layer);
            return d.due_now(live, span, {.phase = Phase::decode, .seen = 40});
        });
    };
    REQUIRE(due(Scope::head, {4, 4, 4, 4}, 0));  // the second head is over
    REQUIRE(asked.size() == 2);
    REQUIRE((asked[1].rows == 5 && asked[1].budget == 4 && asked[1].since == 3 && asked[1].seen == 40));
    REQUIRE_FALSE(due(Scope::head, {4, 5, 4, 4}, 0));
    REQUIRE_FALSE(due(Scope::layer_pooled, {4, 4, 4, 4}, 0));  // 8 of 8
    REQUIRE(asked.size() == 1);
    REQUIRE((asked[0].rows == 8 && asked[0].budget == 8 && asked[0].layer == 0));
    REQUIRE(due(Scope::layer_pooled, {4, 3, 4, 4}, 0));
    REQUIRE_FALSE(due(Scope::layer_pooled, {4, 3, 1, 1}, 1));
    REQUIRE((asked[0].rows == 1 && asked[0].budget == 2 && asked[0].layer == 1 && asked[0].since == 4));
    REQUIRE(due(Scope::model_pooled, {4, 3, 1, 0}, 0));
    REQUIRE((asked[0].rows == 9 && asked[0].budget == 8));
}

TEST_CASE("a choice keeps the best rows of each head beside the protected ones", "[contract]") {
    // Protected: the oldest row and the newest size / 4.
    const Rows rows({{9, 1, 8, 7, 2, 6, 3, 0}, {0, 5, 5, 5, 9, 1, 1, 0}});
    std::vector<HeadStep> scored;
    detail::Decision<Probe, Uniform> decision(shape, {.scored = &scored}, {.tokens = 4}, {});
    Live<Probe> live = live_of<Probe>(rows);
    live.sizes = {4, 5, 1, 1};
    live.phase = Phase::decode;
    live.call_reach.next = 8;
    Plan plan;
    decision.choose(live, decision.layer(0), rows.views, Phase::probe, 0, plan);
    REQUIRE(keeps(plan, 2, rows) == std::vector<std::vector<index_t>>{{0, 2, 3, 7}, {0, 2, 3, 4, 7}});
    REQUIRE(scored.size() == 2);
    REQUIRE((scored[1].layer == 0 && scored[1].head == 1 && scored[1].group == 2));
    REQUIRE(scored[1].phase == Phase::probe);
    REQUIRE(scored[1].next_position == 8);
    REQUIRE((scored[1].protect.sinks == 1 && scored[1].protect.recent == 1));
    REQUIRE(live.sizes == std::vector<std::size_t>{4, 5, 1, 1});

    // Two rows are to come: they will be among the newest.
    plan.clear();
    decision.choose(live, decision.layer(0), rows.views, Phase::decode, 2, plan);
    REQUIRE(keeps(plan, 2, rows) == std::vector<std::vector<index_t>>{{0, 2}, {0, 3, 4}});
    REQUIRE(scored.back().protect.recent == 0);

    // The user's protection joins the policy's.
    detail::Decision<Probe, Uniform> wider(shape, {}, {.tokens = 4, .sinks = 2, .recent = 1}, {});
    plan.clear();
    wider.choose(live, wider.layer(0), rows.views, Phase::decode, 0, plan);
    REQUIRE(keeps(plan, 2, rows) == std::vector<std::vector<index_t>>{{0, 1, 2, 7}, {0, 1, 3, 4, 7}});

    // Pinned rows come before all else.
    live.pinned = {{4, 6}};
    plan.clear();
    decision.choose(live, decision.layer(0), rows.views, Phase::decode, 0, plan);
    REQUIRE(keeps(plan, 2, rows) == std::vector<std::vector<index_t>>{{0, 4, 5, 7}, {0, 3, 4, 5, 7}});
}

TEST_CASE("a shared choice keeps the same rows in every head, by the mean of the scores", "[contract]") {
    const Rows rows({{0, 9, 0, 4, 5, 0}, {0, 0, 6, 4, 0, 0}});
    detail::Decision<Probe, Uniform> decision(shape, {.ranked = Scope::layer_shared}, {.tokens = 3}, {});
    Live<Probe> live = live_of<Probe>(rows);
    live.sizes = {3, 3, 3, 3};
    Plan plan;
    decision.choose(live, decision.layer(0), rows.views, Phase::decode, 0, plan);
    REQUIRE(keeps(plan, 2, rows) == std::vector<std::vector<index_t>>{{0, 1, 3}, {0, 1, 3}});

    // Heads of different lengths cannot share.
    const Rows ragged({{0, 9, 0, 4}, {0, 0, 6}});
    live = live_of<Probe>(ragged);
    live.sizes = {3, 3, 3, 3};
    REQUIRE(failure<error::state_error>([&] {
                decision.choose(live, decision.layer(0), ragged.views, Phase::decode, 0, plan);
            }) == "probe: rows of head 1 is 3, want 4");
}

TEST_CASE("a pooled choice ranks the rows of a layer, or of the model, in one list", "[contract]") {
    // size 4 a head: one oldest and one newest row of each head stay, then the best.
    const Rows rows({{1, 9, 9, 9, 9, 1}, {1, 2, 3, 4, 5, 1}, {1, 7, 8, 0, 0, 1}, {1, 0, 0, 0, 0, 1}});
    Live<Probe> live = live_of<Probe>(rows);
    live.sizes = {4, 4, 4, 4};
    Plan plan;
    detail::Decision<Probe, Uniform> layer(shape, {.ranked = Scope::layer_pooled}, {.tokens = 4}, {});
    layer.choose(live, layer.layer(0), std::span(rows.views).first(2), Phase::decode, 0, plan);
    REQUIRE(keeps(plan, 2, rows) == std::vector<std::vector<index_t>>{{0, 1, 2, 3, 4, 5}, {0, 5}});
    plan.clear();
    layer.choose(live, layer.layer(1), std::span(rows.views).last(2), Phase::decode, 0, plan);
    REQUIRE(keeps(plan, 4, rows)[2] == std::vector<index_t>{0, 1, 2, 4, 5});  // of equal scores the later
    REQUIRE(keeps(plan, 4, rows)[3] == std::vector<index_t>{0, 4, 5});

    detail::Decision<Probe, Uniform> model(shape, {.ranked = Scope::model_pooled}, {.tokens = 4}, {});
    plan.clear();
    model.choose(live, {0, 4}, rows.views, Phase::decode, 0, plan);
    const auto kept = keeps(plan, 4, rows);
    REQUIRE(kept[0] == std::vector<index_t>{0, 1, 2, 3, 4, 5});
    REQUIRE(kept[1] == std::vector<index_t>{0, 3, 4, 5});
    REQUIRE(kept[2] == std::vector<index_t>{0, 1, 2, 5});
    REQUIRE(kept[3] == std::vector<index_t>{0, 5});
}

TEST_CASE("a rule divides the layer's size, however heads were divided before", "[contract]") {
    const Rows rows({{1, 9, 9, 9, 9, 9, 9, 1}, {1, 2, 3, 4, 5, 1, 1, 1}});
    std::vector<std::size_t> asked;
    detail::Decision<Probe, AdaLike> decision(shape, {}, {.tokens = 4}, {.asked = &asked});
    Live<Probe> live = live_of<Probe>(rows);
    live.sizes = {1, 7, 4, 4};  // divided otherwise before
    live.layer_sizes = {4, 4};
    Plan plan;
    decision.choose(live, decision.layer(0), rows.views, Phase::prompt, 0, plan);
    REQUIRE(asked == std::vector<std::size_t>{4});
    REQUIRE(live.sizes == std::vector<std::size_t>{6, 2, 4, 4});
    decision.choose(live, decision.layer(0), rows.views, Phase::decode, 0, plan);
    decision.choose(live, decision.layer(0), rows.views, Phase::prompt, 1, plan);
    REQUIRE(asked.size() == 1);
    REQUIRE(live.sizes == std::vector<std::size_t>{6, 2, 4, 4});
}
