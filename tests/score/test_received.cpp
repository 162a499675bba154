#include "kvcull/score/received.hpp"

#include <vector>

#include "support/catch.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

/// A tile of one query head over 4 rows.
struct Tile {
    std::vector<float> attention;
    std::vector<Visible> visible;

    explicit Tile(std::vector<float> weights) : attention(std::move(weights)) {
        visible.assign(attention.size() / 4, Visible{0, 0, 4});
    }
    [[nodiscard]] HeadStep step(Phase phase, bool first = true) const {
        HeadStep step{.phase = phase, .kernels = &simd::kernels()};
        step.tokens = visible.size();
        step.first_tile = first;
        step.attention = {attention.data(), visible.size(), 4};
        step.visible = visible;
        return step;
    }
};

std::vector<float> mass_of(const ReceivedAttention& state) {
    return {state.mass.values().begin(), state.mass.values().end()};
}

}  // namespace

TEST_CASE("an accumulation asks for the rows that it counts", "[contract]") {
    using Mode = Accumulation::Mode;
    const Accumulation sum{}, window{Mode::window, 5}, last{Mode::replace};
    CHECK(sum.needs(Phase::prompt).rows == all_rows);
    CHECK(sum.needs(Phase::decode).rows == all_rows);
    CHECK(window.needs(Phase::prompt).rows == 5);
    CHECK(window.needs(Phase::decode).rows == all_rows);
    CHECK(last.needs(Phase::prompt).rows == 1);
    CHECK(last.needs(Phase::decode).rows == 1);
    for (const Accumulation& rule : {sum, window, last}) {
        CHECK(rule.needs(Phase::prompt).attention);
        CHECK_FALSE(rule.needs(Phase::prompt).output);
        CHECK(rule.needs(Phase::probe).rows == 0);
        CHECK_FALSE(rule.needs(Phase::probe).attention);
    }
}

TEST_CASE("sum adds, window replaces in a prompt and adds while decoding, replace replaces", "[property]") {
    using Mode = Accumulation::Mode;
    struct Case {
        Accumulation rule;
        Phase phase;
        float want;  // of a row that held 1 and receives 0.5 + 0.25 in two tiles
    };
    for (const Case& one :
         {Case{{Mode::sum}, Phase::prompt, 1.75F}, Case{{Mode::sum}, Phase::decode, 1.75F},
          Case{{Mode::window, 2}, Phase::prompt, 0.75F}, Case{{Mode::window, 2}, Phase::decode, 1.75F},
          Case{{Mode::replace}, Phase::prompt, 0.75F}, Case{{Mode::replace}, Phase::decode, 0.75F}}) {
        ReceivedAttention state;
        resize_state(state, 4);
        state.mass[1] = 1.0F;
        const Tile first({0, 0.5F, 0.5F, 0}), second({0, 0.25F, 0, 0.75F});
        state.observe(one.rule, first.step(one.phase));
        state.observe(one.rule, second.step(one.phase, false));
        CHECK(same_bits(mass_of(state), {{0.0F, one.want, 0.5F, 0.75F}}));
    }
}

TEST_CASE("a call without rows replaces nothing", "[property]") {
    ReceivedAttention state;
    resize_state(state, 4);
    state.mass[2] = 3.0F;
    HeadStep step{.phase = Phase::prompt, .kernels = &simd::kernels()};
    state.observe({Accumulation::Mode::replace}, step);
    CHECK(state.mass[2] == 3.0F);
}

TEST_CASE("what a row cannot see is not added, whatever lies there", "[property]") {
    ReceivedAttention state;
    resize_state(state, 4);
    Tile tile({0.5F, 0.5F, quiet_nan(), 7.0F});
    tile.visible[0].end = 2;
    state.observe({}, tile.step(Phase::decode));
    CHECK(same_bits(mass_of(state), {{0.5F, 0.5F, 0.0F, 0.0F}}));
}

TEST_CASE("the score is the mean over the group", "[property]") {
    ReceivedAttention state;
    resize_state(state, 2);
    state.mass[0] = 3.0F;
    state.mass[1] = 1.5F;
    std::vector<float> out(2);
    state.write({.group = 3}, out);
    CHECK(close(out[0], 1.0, 1e-6, 0));
    CHECK(close(out[1], 0.5, 1e-6, 0));
}

TEST_CASE("nothing leaks from the protected newest rows into pooled candidates", "[property]") {
    std::vector<float> score{0, 1, 0, 0, 9, 9};
    Scratch<float> workspace;
    HeadStep step;
    step.protect.recent = 2;
    step.workspace = &workspace;
    pool_candidates(Pool::max, 3, step, score);
    CHECK(same_bits(score, {{1.0F, 1.0F, 1.0F, 0.0F, 9.0F, 9.0F}}));
    step.protect.recent = 100;
    pool_candidates(Pool::max, 3, step, score);
    CHECK(same_bits(score, {{1.0F, 1.0F, 1.0F, 0.0F, 9.0F, 9.0F}}));
}
