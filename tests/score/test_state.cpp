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

namespace {

/// Plane p of row j holds 10 p + j.
struct Planes {
    RowPlanes<float> mass;

    [[nodiscard]] auto arrays() noexcept { return std::tie(mass); }

    void number() {
        for (std::size_t p = 0; p < mass.planes(); ++p)
            for (std::size_t j = 0; j < mass[p].size(); ++j) mass[p][j] = static_cast<float>(10 * p + j);
    }
};

}  // namespace

TEST_CASE("there are no planes until they are set, and no rows in them to follow", "[contract]") {
    Planes state;
    resize_state(state, 5);
    const std::array<Move, 1> moves{{{4, 0}}};
    move_state(state, moves, 2);
    CHECK(state.mass.planes() == 0);
    CHECK(state.mass.values().empty());
    CHECK(state_bytes(state) == 0);
}

TEST_CASE("planes start at zero, grow by zeros and are rows of their own", "[property]") {
    Planes state;
    state.mass.set_planes(3, 2);
    REQUIRE(state.mass.planes() == 3);
    CHECK((state.mass.values() == std::vector<float>(6)));
    state.number();
    resize_state(state, 4);
    CHECK((state.mass.values() == std::vector<float>{0, 1, 0, 0, 10, 11, 0, 0, 20, 21, 0, 0}));
    resize_state(state, 1);
    resize_state(state, 2);
    CHECK((state.mass.values() == std::vector<float>{0, 0, 10, 0, 20, 0}));
    state.mass.set_planes(1, 3);  // begins anew
    CHECK((state.mass.values() == std::vector<float>(3)));
}

TEST_CASE("every plane follows the moves of its rows", "[property]") {
    Planes state;
    state.mass.set_planes(2, 6);
    state.number();
    const std::array<Move, 3> moves{{{2, 0}, {4, 1}, {5, 2}}};
    move_state(state, moves, 3);
    CHECK((state.mass.values() == std::vector<float>{2, 4, 5, 12, 14, 15}));
    const Planes copy = state;
    state.number();
    CHECK((copy.mass.values() == std::vector<float>{2, 4, 5, 12, 14, 15}));
}

TEST_CASE("planes that come after a reservation hold it, and give it back when they shrink", "[contract]") {
    Planes state;
    reserve_state(state, 100);
    CHECK(state_bytes(state) == 0);
    state.mass.set_planes(3, 4);
    const std::size_t bytes = state_bytes(state);
    CHECK(bytes >= 3 * 100 * sizeof(float));
    const float* const before = state.mass[2].data();
    resize_state(state, 100);
    CHECK(state.mass[2].data() == before);
    CHECK(state_bytes(state) == bytes);
    resize_state(state, 5);
    shrink_state(state);
    CHECK(state_bytes(state) < bytes);
    state.mass.set_planes(2, 1);  // the reservation is over
    CHECK(state_bytes(state) < 2 * 100 * sizeof(float));
}
