#include "kvcull/cache/held_positions.hpp"

#include <algorithm>
#include <functional>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kvcull/cache/evictor.hpp"
#include "kvcull/policies.hpp"
#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/foreign.hpp"
#include "support/live.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

using error::shape_error;

constexpr CacheShape small{.layers = 2, .q_heads = 2, .kv_heads = 2, .head_dim = 4};

/// Ranks all heads of the model together, so that it decides at the end of the step.
struct Pooled : H2O {
    static constexpr Scope scope() { return Scope::model_pooled; }
};

/// Views of an engine of which one head's positions are what the engine says, not what is true.
class Lie {
  public:
    Lie(const CacheView& view, std::size_t index, const std::function<void(std::vector<position_t>&)>& tell)
        : heads_(view.heads.begin(), view.heads.end()), told_(to_vector(view.heads[index].position)) {
        tell(told_);
        heads_[index].position = PositionsView(told_);
    }
    [[nodiscard]] CacheView view() const { return {heads_, small.kv_heads}; }
    [[nodiscard]] LayerView layer(std::size_t index) const { return view().layer(index); }

  private:
    std::vector<HeadView> heads_;
    std::vector<position_t> told_;
};
void swap_rows(std::vector<position_t>& told) {
    std::swap(told[1], told[3]);
}

/// An engine and its evictor, some tokens on.
template <class P>
struct Running {
    TokenStream stream{small, 40, 1};
    Evictor<P> evictor;
    Foreign rows{small};

    Running(P policy, Budget budget, std::size_t tokens, bool ascending = false)
        : evictor(small, std::move(policy), budget) {
        if (ascending) evictor.keep_ascending();
        for (std::size_t token = 0; token < tokens; ++token) feed(evictor, rows, stream, token, 1);
    }
    [[nodiscard]] HeadsView<const float> q(std::size_t layer) const {
        return stream.q(layer, evictor.seen(), 1);
    }
    LayerView arrive(std::size_t layer) {
        rows.append(layer, stream.k(layer, evictor.seen(), 1), stream.v(layer, evictor.seen(), 1),
                    evictor.next_position());
        return rows.layer(layer);
    }
};
/// What `call(one, lie)` says of views that lie about a head. Whatever it says, nothing may have changed:
/// the call that follows is that of a twin.
template <class P, class Call>
std::string refusal(const Running<P>& one, std::size_t head,
                    const std::function<void(std::vector<position_t>&)>& tell, Call&& call) {
    Running<P> tried = one;
    const std::string message =
        failure<shape_error>([&] { call(tried, Lie(tried.rows.view(), head, tell)); });
    REQUIRE(same_live(tried.evictor.live(), one.evictor.live()));
    REQUIRE(tried.evictor.live().held == one.evictor.live().held);
    return message;
}

}  // namespace

TEST_CASE("the sums of a head follow what is appended and what plans take and move", "[property]") {
    SplitMix64 random{7};
    for (const Compaction compaction : {Compaction::fill, Compaction::ascending}) {
        std::vector<position_t> positions;
        HeldPositions held;
        position_t next = 5;
        for (int round = 0; round < 200; ++round) {
            const std::size_t known = positions.size();
            for (std::size_t count = random() % 70; count > 0; --count)
                positions.push_back(next += 1 + static_cast<position_t>(random() % 3));
            held.append(PositionsView(positions), known);
            std::vector<index_t> keep;
            for (std::size_t j = 0; j < positions.size(); ++j)
                if (random() % 4 != 0) keep.push_back(static_cast<index_t>(j));
            Plan plan;
            plan.add(0, 0, positions.size(), keep, compaction);
            if (plan.empty()) continue;
            held.follow(plan[0], PositionsView(positions));
            move_rows(plan[0].moves, positions.data(), sizeof(position_t), sizeof(position_t));
            positions.resize(keep.size());
            REQUIRE(held == HeldPositions::of(PositionsView(positions), positions.size()));
            HeldPositions naive{.rows = positions.size()};
            for (std::size_t j = 0; j < positions.size(); ++j) {
                naive.sum += static_cast<std::uint64_t>(positions[j]);
                naive.by_row += static_cast<std::uint64_t>(positions[j]) * j;
            }
            REQUIRE(held == naive);
        }
    }
}

TEST_CASE("positions in pages have the sums of positions in one run, of any number of rows", "[property]") {
    std::vector<position_t> positions(45);
    std::iota(positions.begin(), positions.end(), 1'000'000'007);
    std::swap(positions[3], positions[30]);
    for (const std::size_t page : {1U, 4U, 7U, 64U}) {
        std::vector<const std::byte*> pages;
        for (std::size_t j = 0; j < positions.size(); j += page)
            pages.push_back(reinterpret_cast<const std::byte*>(&positions[j]));
        for (const std::size_t rows : {0U, 1U, 8U, 29U, 44U, 45U})
            REQUIRE(HeldPositions::of({pages.data(), 0, page, positions.size()}, rows) ==
                    HeldPositions::of(PositionsView(std::span(positions).first(rows)), rows));
    }
}

TEST_CASE("a view that lies about old positions is refused where rows may go, by name, and nothing changed",
          "[contract]") {
    const Running one(H2O{}, Budget{.tokens = 8, .slack = 3}, 11);
    REQUIRE(one.rows.positions(0, 1).size() == 11);  // the next token evicts
    const auto step = [](auto& tried, const Lie& lie) { tried.evictor.step(0, lie.layer(0), tried.q(0)); };
    Running arrived = one;
    arrived.arrive(0);
    CHECK(refusal(
              arrived, 1, [](auto& told) { told[2] = 100; }, step) ==
          "Evictor::step: cached[1].position[2] is 100, want 2");
    CHECK(refusal(
              arrived, 1, [](auto& told) { told[2] = 1; }, step) ==
          "Evictor::step: cached[1].position[2] is 1, want another than in row 1");
    CHECK(refusal(
              arrived, 0, [](auto& told) { told[4] = told[5] = 4; }, step) ==
          "Evictor::step: cached[0].position[5] is 4, want another than in row 4");
    CHECK(refusal(arrived, 0, swap_rows, step) ==
          "Evictor::step: cached[0].position is in another order, or of other rows, want what the last call "
          "left");

    // And in calls between steps.
    const auto says = [&](const char* where, const auto& call) {
        CAPTURE(where);
        CHECK(refusal(
                  one, 3, [](auto& told) { told[9] = -1; }, call) ==
              std::string(where) + ": cached.heads[3].position[9] is -1, want 9");
    };
    says("Evictor::make_room", [](auto& tried, const Lie& lie) { tried.evictor.make_room(lie.view(), 1); });
    says("Evictor::truncate", [](auto& tried, const Lie& lie) { tried.evictor.truncate(lie.view(), 1); });
    says("Evictor::propose", [](auto& tried, const Lie& lie) { tried.evictor.propose(lie.view(), 4); });
    std::vector<float> scores(11);
    CHECK(refusal(one, 2, swap_rows, [&](auto& tried, const Lie& lie) {
              tried.evictor.scores(1, 0, lie.view().heads[2], scores);
          }).substr(0, 17) == "Evictor::scores: ");
}

TEST_CASE("rows out of order are named as such where they must ascend", "[contract]") {
    Running one(H2O{}, Budget{.tokens = 8, .slack = 3}, 11, true);
    one.arrive(0);
    CHECK(refusal(one, 0, swap_rows, [](auto& tried, const Lie& lie) {
              tried.evictor.step(0, lie.layer(0), tried.q(0));
          }) == "Evictor::step: cached[0].position[2] is 2, want beyond 3");
}

TEST_CASE("a lie about rows that nobody needs yet is found by the next decision", "[contract]") {
    Running one(H2O{}, Budget{.tokens = 8, .slack = 3}, 9);
    one.arrive(0);
    REQUIRE(one.evictor.step(0, Lie(one.rows.view(), 0, swap_rows).layer(0), one.q(0)).empty());
    one.arrive(1);
    one.evictor.step(1, one.rows.layer(1), one.q(1));
    one.evictor.end_step();
    feed(one.evictor, one.rows, one.stream, 10, 1);
    one.arrive(0);
    CHECK(failure<shape_error>([&] {
              one.evictor.step(0, Lie(one.rows.view(), 0, swap_rows).layer(0), one.q(0));
          }) != "no error");
    REQUIRE(!one.evictor.step(0, one.rows.layer(0), one.q(0)).empty());
}

TEST_CASE("an engine that does not carry out a plan's moves is found out by the next one", "[contract]") {
    Running one(Streaming{.sinks = 1}, Budget{.tokens = 8}, 8);
    for (std::size_t layer = 0; layer < small.layers; ++layer) {
        one.arrive(layer);
        const Plan& plan = one.evictor.step(layer, one.rows.layer(layer), one.q(layer));
        REQUIRE(plan[0].moves.size() == 1);
        Plan cut;  // the rows that the plan has at the end, where they lay before
        for (std::size_t i = 0; i < plan.size(); ++i) {
            std::vector<index_t> first(plan[i].keep.size());
            std::iota(first.begin(), first.end(), 0);
            cut.add(layer, plan[i].head, plan[i].rows, first, Compaction::fill);
        }
        one.rows.apply(cut);
    }
    one.evictor.end_step();
    one.arrive(0);
    CHECK(failure<shape_error>([&] { one.evictor.step(0, one.rows.layer(0), one.q(0)); }) ==
          "Evictor::step: cached[0].position[1] is 1, want 8");
}

TEST_CASE("policies that decide at the end of the step, and windows, are told there", "[contract]") {
    {
        Running one(Pooled{}, Budget{.tokens = 8}, 8);
        for (std::size_t layer = 0; layer < small.layers; ++layer) {
            one.arrive(layer);
            one.evictor.step(layer, one.rows.layer(layer), one.q(layer));
        }
        CHECK(refusal(
                  one, 2, [](auto& told) { told[0] = 50; },
                  [](auto& tried, const Lie& lie) { tried.evictor.end_step(lie.view()); }) ==
              "Evictor::end_step: cached.heads[2].position[0] is 50, want 0");
        REQUIRE(!one.evictor.end_step(one.rows.view()).empty());
    }
    CacheShape windowed = small;
    windowed.traits = {{.window = 8}, {.evicts = false}};
    const TokenStream stream(windowed, 20, 2);
    Evictor evictor(windowed, Full{});
    Foreign rows(windowed);
    for (std::size_t token = 0; token < 9; ++token) feed(evictor, rows, stream, token, 1);
    rows.append(0, stream.k(0, 9, 1), stream.v(0, 9, 1), 9);
    CHECK(failure<shape_error>([&] {
              evictor.step(0, Lie(rows.view(), 0, swap_rows).layer(0), stream.q(0, 9, 1));
          }) == "Evictor::step: cached[0].position[2] is 2, want beyond 3");
    REQUIRE(!evictor.step(0, rows.layer(0), stream.q(0, 9, 1)).empty());
}

TEST_CASE("after a plan of the caller's own, positions are taken on trust once", "[contract]") {
    Running one(H2O{}, Budget{.tokens = 8}, 8);
    one.evictor.hold(true);
    Plan plan;
    const std::vector<index_t> keep{0, 2, 3, 5, 6, 7};
    for (std::size_t i = 0; i < small.heads(); ++i)
        plan.add(i / 2, i % 2, 8, keep, one.evictor.compaction(i / 2));
    one.rows.apply(plan);
    one.evictor.commit(plan);
    one.evictor.hold(false);
    for (std::size_t token = 8; token < 14; ++token) feed(one.evictor, one.rows, one.stream, token, 1);
    one.arrive(0);
    CHECK(failure<shape_error>([&] {
              one.evictor.step(0, Lie(one.rows.view(), 1, swap_rows).layer(0), one.q(0));
          }) != "no error");
    one.evictor.trust_views();
    REQUIRE(!one.evictor.step(0, Lie(one.rows.view(), 1, swap_rows).layer(0), one.q(0)).empty());
}
