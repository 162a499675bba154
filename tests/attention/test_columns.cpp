#include "kvcull/attention/columns.hpp"

#include <cstddef>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "kvcull/attention/attend.hpp"
#include "kvcull/attention/row_kernels.hpp"
#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/isas.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

/// The same elements as rows, as columns of one matrix, and as columns of blocks that lie in no order. What
/// belongs to no row is NaN.
struct ThreeWays {
    static constexpr std::size_t block_rows = 12, gap = 3;

    std::size_t rows, dim;
    DType dtype;
    std::vector<std::byte> row_major, matrix, pages;
    std::vector<const std::byte*> blocks;

    ThreeWays(std::size_t rows_, std::size_t dim_, DType dtype_) : rows(rows_), dim(dim_), dtype(dtype_) {
        const std::size_t size = size_of(dtype), count = (rows + block_rows - 1) / block_rows;
        const std::vector<float> values = random_floats(rows * dim, 3);
        row_major.assign(rows * dim * size, std::byte{0xFF});
        matrix.assign((rows + gap) * dim * size, std::byte{0xFF});
        pages.assign(count * block_rows * dim * size, std::byte{0xFF});
        for (std::size_t b = 0; b < count; ++b)
            blocks.push_back(pages.data() + (count - 1 - b) * block_rows * dim * size);
        for (std::size_t j = 0; j < rows; ++j)
            for (std::size_t c = 0; c < dim; ++c) {
                std::byte* const element = row_major.data() + (j * dim + c) * size;
                const float x = values[j * dim + c];
                if (dtype == DType::f32) put(element, x);
                if (dtype == DType::f16) put(element, to_float16(x));
                if (dtype == DType::bf16) put(element, to_bfloat16(x));
                std::memcpy(matrix.data() + (c * (rows + gap) + j) * size, element, size);
                auto* const block = const_cast<std::byte*>(blocks[j / block_rows]);
                std::memcpy(block + (c * block_rows + j % block_rows) * size, element, size);
            }
    }
    template <class T>
    static void put(std::byte* to, const T& element) {
        std::memcpy(to, &element, sizeof element);
    }

    [[nodiscard]] RowsView as_rows() const { return {row_major.data(), dtype, rows, dim, dim}; }
    [[nodiscard]] std::vector<RowsView> as_columns() const {
        return {RowsView::columns(matrix.data(), dtype, rows, dim, rows + gap),
                RowsView::columns(blocks.data(), 0, dtype, block_rows, rows, dim)};
    }
};

/// What every kernel over rows says of rows `begin .. end - 1`.
std::vector<float> all_of(const simd::Kernels& kernels, const RowsView& rows, std::size_t begin,
                          std::size_t end, bool whole_runs) {
    constexpr std::size_t group = 3;
    const std::size_t n = rows.rows(), dim = rows.dim();
    const std::vector<float> q = random_floats(group * dim, 5), w = random_floats(group * n, 6);
    std::vector<float> dots(group * n), sum(group * dim), far(group * n), moved(group * n), wide(n * dim);
    const auto read = [&](const RowsView::Run& piece, const std::byte* next) {
        const std::size_t at = piece.first;
        detail::dots(kernels, q.data(), dim, group, rows, piece, 0.5F, dots.data() + at, n, next);
        detail::weighted_sum(kernels, w.data() + at, n, group, rows, piece, sum.data(), dim, next);
        detail::distances(kernels, q.data(), dim, group, rows, piece, nullptr, 0, far.data() + at, n, next);
        detail::distances(kernels, q.data(), dim, group, rows, piece, w.data() + at, n, moved.data() + at, n,
                          next);
    };
    if (whole_runs)
        rows.for_each_run(begin, end, [&](const RowsView::Run& run) { read(run, nullptr); });
    else
        detail::for_each_piece(rows, begin, end, read);
    for (std::size_t j = begin; j < end; ++j) rows.widen(j, {wide.data() + j * dim, dim});
    for (const auto* more : {&sum, &far, &moved, &wide}) dots.insert(dots.end(), more->begin(), more->end());
    return dots;
}

}  // namespace

TEST_CASE("kernels give columns the bits that they give rows", "[differential]") {
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
        for (const auto& [rows, dim] : {std::pair<std::size_t, std::size_t>{1, 5}, {50, 24}, {70, 129}}) {
            const ThreeWays same(rows, dim, dtype);
            for (const simd::Isa isa : available_isas()) {
                const simd::Kernels& kernels = simd::kernels_for(isa);
                for (const std::size_t begin : {std::size_t{0}, rows / 3}) {
                    CAPTURE(name_of(dtype), rows, dim, begin, simd::name_of(isa));
                    const std::vector<float> wanted = all_of(kernels, same.as_rows(), begin, rows, false);
                    for (const RowsView& columns : same.as_columns())
                        for (const bool whole_runs : {false, true})
                            REQUIRE(same_bits(all_of(kernels, columns, begin, rows, whole_runs), wanted));
                }
            }
        }
}

TEST_CASE("rows that are columns are copied bit for bit", "[property]") {
    const ThreeWays same(29, 7, DType::f16);
    for (const RowsView& columns : same.as_columns()) {
        REQUIRE(columns.are_columns());
        REQUIRE(columns.row_bytes() == 14);
        std::vector<std::byte> out(same.row_major.size());
        columns.for_each_run(0, 29, [&](const RowsView::Run& run) {
            detail::copy_rows(columns, run, out.data() + run.first * columns.row_bytes());
        });
        REQUIRE(out == same.row_major);
    }
    std::vector<std::byte> out(same.row_major.size());
    detail::copy_rows(same.as_rows(), same.as_rows().run_at(0), out.data());
    REQUIRE(out == same.row_major);
}

TEST_CASE("attention over V as columns has the bits of attention over its rows", "[differential]") {
    constexpr std::size_t rows = 61, dim = 20, queries = 3;
    const ThreeWays k(rows, dim, DType::f32), v(rows, dim, DType::f32);
    const std::vector<float> q = random_floats(queries * dim, 8);
    const std::vector<Visible> visible{{0, 0, rows}, {2, 7, 40}, {0, 50, rows}};
    const auto output = [&](const RowsView& keys, const RowsView& values) {
        std::vector<float> attention(queries * rows), out(queries * dim), lse(queries);
        attend(simd::kernels(), {q.data(), queries, dim}, keys, values, visible, 0.3F,
               {.attention = {attention.data(), queries, rows},
                .lse = lse,
                .output = {out.data(), queries, dim}});
        return out;
    };
    const std::vector<float> wanted = output(k.as_rows(), v.as_rows());
    for (const RowsView& columns : v.as_columns()) REQUIRE(same_bits(output(k.as_rows(), columns), wanted));
    for (const RowsView& columns : k.as_columns()) REQUIRE(same_bits(output(columns, v.as_rows()), wanted));
}

TEST_CASE("columns that a matrix does not have, or too many channels, are refused", "[contract]") {
    const std::vector<float> some(64);
    CHECK(failure<error::shape_error>([&] { (void)RowsView::columns(some.data(), DType::f32, 9, 8, 8); }) ==
          "RowsView::columns: rows is 9, want at most capacity = 8");
    CHECK(failure<error::shape_error>([&] {
              (void)RowsView::columns(some.data(), DType::f32, 0, 4097, 8);
          }) == "RowsView::columns: dim is 4097, want at most 4096");
    const std::byte* const block = reinterpret_cast<const std::byte*>(some.data());
    CHECK(failure<error::shape_error>([&] { (void)RowsView::columns(&block, 0, DType::f16, 8, 8, 5000); }) ==
          "RowsView::columns: dim is 5000, want at most 4096");
}
