#include "kvcull/score/state.hpp"

#include <array>
#include <vector>

#include "support/catch.hpp"

using namespace kvcull;

namespace {

/// A state with arrays of two types and widths.
struct Sample {
    RowArray<float> mass;
    RowArray<int> history{3};

    [[nodiscard]] auto arrays() noexcept { return std::tie(mass, history); }
};

Sample numbered(std::size_t rows) {
    Sample state;
    resize_state(state, rows);
    for (std::size_t j = 0; j < rows; ++j) {
        state.mass[j] = static_cast<float>(j) + 0.5F;
        for (std::size_t i = 0; i < 3; ++i) state.history.values()[j * 3 + i] = static_cast<int>(10 * j + i);
    }
    return state;
}

}  // namespace

TEST_CASE("new rows of a state start at zero and old ones stay", "[property]") {
    Sample state = numbered(2);
    resize_state(state, 4);
    CHECK(state.mass.rows() == 4);
    CHECK(state.history.rows() == 4);
    CHECK(state.history.width() == 3);
    CHECK(state.mass[1] == 1.5F);
    CHECK(state.mass[3] == 0.0F);
    CHECK(state.history.values()[5] == 12);
    CHECK(state.history.values()[11] == 0);
}

TEST_CASE("rows that left and come back start at zero again", "[property]") {
    Sample state = numbered(4);
    resize_state(state, 1);
    resize_state(state, 4);
    for (std::size_t j = 1; j < 4; ++j) {
        CHECK(state.mass[j] == 0.0F);
        CHECK(state.history[j] == 0);
    }
}

TEST_CASE("every array of a state follows the moves of its rows", "[property]") {
    Sample state = numbered(6);
    const std::array<Move, 3> moves{{{2, 0}, {4, 1}, {5, 2}}};
    move_state(state, moves, 3);
    REQUIRE(state.mass.rows() == 3);
    REQUIRE(state.history.rows() == 3);
    const std::array<std::size_t, 3> came_from{2, 4, 5};
    for (std::size_t j = 0; j < 3; ++j) {
        CHECK(state.mass[j] == static_cast<float>(came_from[j]) + 0.5F);
        for (std::size_t i = 0; i < 3; ++i)
            CHECK(state.history.values()[j * 3 + i] == static_cast<int>(10 * came_from[j] + i));
    }
}

TEST_CASE("a reserved state does not allocate when it grows, and its bytes are what it holds", "[contract]") {
    Sample state;
    reserve_state(state, 100);
    const float* const before = state.mass.values().data();
    const std::size_t bytes = state_bytes(state);
    CHECK(bytes >= 100 * (sizeof(float) + 3 * sizeof(int)));
    resize_state(state, 100);
    CHECK((state.mass.values().data() == before || before == nullptr));
    CHECK(state_bytes(state) == bytes);
}

TEST_CASE("a policy without memory has a state without bytes", "[contract]") {
    NoState state;
    resize_state(state, 1000);
    move_state(state, {}, 10);
    CHECK(state_bytes(state) == 0);
}
