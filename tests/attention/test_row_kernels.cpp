#include "kvcull/attention/row_kernels.hpp"

#include <cstddef>
#include <vector>

#include "support/catch.hpp"

using namespace kvcull;

TEST_CASE("pieces cover a range of rows in order, stay within blocks and name the piece that follows",
          "[property]") {
    constexpr std::size_t dim = 4, block_rows = 16, rows = 70;
    std::vector<float> storage(5 * block_rows * dim);
    std::vector<const std::byte*> blocks;
    for (std::size_t b = 0; b < 5; ++b)
        blocks.push_back(reinterpret_cast<const std::byte*>(storage.data() + (4 - b) * block_rows * dim));
    const RowsView paged(blocks.data(), 0, DType::f32, block_rows, rows, dim, dim);
    const RowsView single(storage.data(), rows, dim, dim);
    for (const RowsView* view : {&paged, &single}) {
        for (const std::size_t begin : {0U, 5U, 16U}) {
            for (const std::size_t end : {5U, 16U, 33U, 70U}) {
                std::size_t expected = begin;
                const std::byte* promised = nullptr;
                detail::for_each_piece(*view, begin, end,
                                       [&](const RowsView::Run& piece, const std::byte* next) {
                                           REQUIRE(piece.first == expected);
                                           REQUIRE(piece.rows > 0);
                                           REQUIRE(piece.data == view->row(piece.first));
                                           REQUIRE((promised == nullptr || promised == piece.data));
                                           expected += piece.rows;
                                           promised = next;
                                       });
                REQUIRE(expected == (begin < end ? end : begin));
                REQUIRE(promised == nullptr);
            }
        }
    }
}

TEST_CASE("a long run is cut into pieces of 8 KiB, wide rows into pieces of 8 rows", "[property]") {
    const std::vector<float> storage(64 * 1024);
    const auto sizes = [&](std::size_t rows, std::size_t dim) {
        std::vector<std::size_t> result;
        detail::for_each_piece(
            RowsView(storage.data(), rows, dim, dim), 0, rows,
            [&](const RowsView::Run& piece, const std::byte*) { result.push_back(piece.rows); });
        return result;
    };
    REQUIRE(sizes(40, 128) == std::vector<std::size_t>{16, 16, 8});
    REQUIRE(sizes(20, 1024) == std::vector<std::size_t>{8, 8, 4});
    REQUIRE(sizes(0, 128).empty());
}
