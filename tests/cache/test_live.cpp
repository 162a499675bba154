#include "kvcull/cache/live.hpp"

#include <vector>

#include "kvcull/policies.hpp"
#include "support/catch.hpp"
#include "support/every_policy.hpp"
#include "support/stubs.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {
constexpr CacheShape shape{.layers = 2, .q_heads = 2, .kv_heads = 2, .head_dim = 4};
}

TEST_CASE("a sequence starts empty, decoding, with no limit known", "[contract]") {
    const Live<H2O> live(shape);
    REQUIRE(live.states.size() == 4);
    REQUIRE(live.rows == std::vector<std::size_t>(4, 0));
    REQUIRE(live.sizes == std::vector<std::size_t>(4, unlimited));
    REQUIRE(live.since == std::vector<std::size_t>(2, 0));
    REQUIRE(live.admitted == std::vector<std::uint8_t>(2, 0));
    REQUIRE(live.stepped == std::vector<std::uint8_t>(2, 0));
    REQUIRE(live.decided == std::vector<std::uint8_t>(2, 1));  // there is no prompt to decide on
    REQUIRE(live.phase == Phase::decode);
    REQUIRE(live.prompt_end == unlimited);
    REQUIRE_FALSE(live.resolved);
    REQUIRE_FALSE(live.hold);
}

TEST_CASE("a plan moves the states of the heads that it names, and of no other", "[property]") {
    Live<Vatp> live(shape);
    for (std::size_t i = 0; i < 4; ++i) {
        resize_state(live.states[i], 6);
        live.rows[i] = 6;
        for (std::size_t j = 0; j < 6; ++j) {
            live.states[i].received.mass[j] = static_cast<float>(10 * i + j);
            live.states[i].value_norm[j] = static_cast<float>(100 * i + j);
        }
    }
    live.since = {5, 7};
    Plan plan;
    plan.add(1, 0, 6, std::vector<index_t>{1, 2, 5}, Compaction::fill);       // 5 fills the place of 0
    plan.add(1, 1, 6, std::vector<index_t>{0, 3, 4}, Compaction::ascending);  // 3, 4 move down
    live.commit(plan);
    REQUIRE(live.rows == std::vector<std::size_t>{6, 6, 3, 3});
    REQUIRE(live.since == std::vector<std::size_t>{5, 0});
    const auto values = [&](std::size_t i) { return state_values(live.states[i]); };
    REQUIRE(values(0) == std::vector<float>{0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5});
    REQUIRE(values(1).size() == 12);
    REQUIRE(values(2) == std::vector<float>{25, 21, 22, 205, 201, 202});
    REQUIRE(values(3) == std::vector<float>{30, 33, 34, 300, 303, 304});
}

TEST_CASE("a copy is a sequence of its own", "[property]") {
    Live<SkipLike> live(shape);
    live.sequence.tokens = {1, 2};
    live.seen = 2;
    const Live<SkipLike> copy = live;
    live.sequence.tokens.push_back(3);
    live.pinned.push_back({0, 1});
    REQUIRE(copy.sequence.tokens == std::vector<std::int32_t>{1, 2});
    REQUIRE(copy.pinned.empty());
    REQUIRE(same_live(copy, copy));
    REQUIRE_FALSE(same_live(copy, live));
}
