#include "kvcull/base/quantised.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kvcull/views.hpp"
#include "support/catch.hpp"

using namespace kvcull;

static_assert(elements(DType::f16, 33) == 33 && row_bytes(DType::f16, 33) == 66);
static_assert(elements(DType::int8, 0) == 0 && elements(DType::int8, 1) == 1);
static_assert(elements(DType::int8, 32) == 1 && elements(DType::int8, 33) == 2);
static_assert(row_bytes(DType::int8, 128) == 136 && row_bytes(DType::int4, 128) == 72);

TEST_CASE("the names of element types stand in their order") {
    std::string_view wanted[] = {"f32", "f16", "bf16", "int8", "int4"};
    for (const DType type : all_dtypes) CHECK(name_of(type) == wanted[static_cast<std::size_t>(type)]);
}

TEST_CASE("the bytes of a Q8_0 block read as its scale times its bytes", "[differential]") {
    std::array<std::uint8_t, 34> block{0x00, 0x34};  // 0.25
    block[2] = 0x81;                                 // -127
    block[3] = 5;
    block[33] = 127;
    std::array<float, 32> row;
    RowsView(block.data(), DType::int8, 1, 32, 1).widen(0, row);
    CHECK(row[0] == -31.75F);
    CHECK(row[1] == 1.25F);
    CHECK(row[2] == 0);
    CHECK(row[31] == 31.75F);
}

TEST_CASE("the bytes of a Q4_0 block hold channels 0 to 15 in their low halves", "[differential]") {
    std::array<std::uint8_t, 18> block{0x00, 0xC0};  // -2
    block[2] = 0x80;                                 // 0 - 8 low, 8 - 8 high
    block[17] = 0x3F;                                // 15 - 8 low, 3 - 8 high
    std::array<float, 32> row;
    RowsView(block.data(), DType::int4, 1, 32, 1).widen(0, row);
    CHECK(row[0] == 16);
    CHECK(row[16] == 0);
    CHECK(row[15] == -14);
    CHECK(row[31] == 10);
}

TEST_CASE("rows of groups lie their stride apart, in blocks too", "[property]") {
    alignas(2) std::array<std::byte, 34 * 3 * 4> memory{};
    for (std::size_t row = 0; row < 4; ++row) {  // rows of 33 channels in 2 groups of 3; the scale is 1
        memory[102 * row + 1] = memory[102 * row + 35] = std::byte{0x3C};
        memory[102 * row + 2] = static_cast<std::byte>(row + 1);
        memory[102 * row + 36] = static_cast<std::byte>(row + 10);
    }
    const std::byte* blocks[] = {memory.data() + 204, memory.data()};
    const RowsView single(memory.data(), DType::int8, 4, 33, 3), paged(blocks, 0, DType::int8, 2, 4, 33, 3);
    CHECK(single.row_bytes() == 68);
    std::array<float, 33> row;
    for (std::size_t j = 0; j < 4; ++j) {
        single.widen(j, row);
        CHECK(row[0] == static_cast<float>(j + 1));
        CHECK(row[32] == static_cast<float>(j + 10));
        paged.widen((j + 2) % 4, row);
        CHECK(row[32] == static_cast<float>(j + 10));
    }
}
