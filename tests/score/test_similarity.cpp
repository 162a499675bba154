#include "kvcull/score/similarity.hpp"

#include <cmath>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

std::vector<float> inverses(const simd::Kernels& kernels, const RowsView& rows) {
    std::vector<float> norm(rows.rows());
    Scratch<float> workspace;
    for_each_row(rows, 0, workspace,
                 [&](std::size_t j, std::span<const float> row) { norm[j] = inverse_norm(kernels, row); });
    return norm;
}

}  // namespace

TEST_CASE("norms agree with double sums at every length and magnitude on every instruction set",
          "[differential]") {
    const auto count = GENERATE(std::size_t{1}, 7, 8, 9, 33, 128, 257);
    for (const simd::Isa isa : simd::all_isas) {
        if (!simd::available(isa)) continue;
        for (const float scale : {1e-30F, 1e-18F, 1.0F, 1e18F, 1e30F}) {
            const std::vector<float> row = random_floats(count, count, scale);
            double square = 0, absolute = 0;
            for (const float x : row) {
                square += static_cast<double>(x) * static_cast<double>(x);
                absolute += std::abs(static_cast<double>(x));
            }
            CAPTURE(count, scale);
            CHECK(close(euclidean_norm(simd::kernels_for(isa), row), std::sqrt(square), 1e-5, 0));
            CHECK(close(l1_norm(row), absolute, 1e-6, 0));
        }
    }
}

TEST_CASE("norms of nothing, of zeros and of what is not finite", "[property]") {
    const simd::Kernels& kernels = simd::kernels();
    CHECK(same_bits(euclidean_norm(kernels, {}), 0.0F));
    const std::vector<float> zeros(9), one_nan{1, quiet_nan(), 2}, one_infinite{1, negative_infinity(), 2};
    CHECK(same_bits(euclidean_norm(kernels, zeros), 0.0F));
    CHECK(same_bits(l1_norm(zeros), 0.0F));
    CHECK(is_nan(euclidean_norm(kernels, one_nan)));
    CHECK(is_nan(l1_norm(one_nan)));
    CHECK(same_bits(euclidean_norm(kernels, one_infinite), -negative_infinity()));
    CHECK(same_bits(l1_norm(one_infinite), -negative_infinity()));
}

TEST_CASE("cosines with the mean of unit rows agree with doubles on every instruction set, paged and not",
          "[differential]") {
    const auto count = GENERATE(std::size_t{1}, 2, 7, 64, 100);
    const auto dim = GENERATE(std::size_t{2}, 8, 33, 128);
    const std::vector<float> rows = random_floats(count * dim, count + dim);
    std::vector<double> anchor(dim), norm(count);
    for (std::size_t j = 0; j < count; ++j) {
        for (std::size_t c = 0; c < dim; ++c) norm[j] += std::pow(static_cast<double>(rows[j * dim + c]), 2);
        norm[j] = std::sqrt(norm[j]);
        for (std::size_t c = 0; c < dim; ++c) anchor[c] += static_cast<double>(rows[j * dim + c]) / norm[j];
    }
    double length = 0;
    for (const double x : anchor) length += x * x;
    const std::size_t block_rows = 10;
    std::vector<const std::byte*> blocks;
    for (std::size_t j = 0; j < count; j += block_rows)
        blocks.push_back(reinterpret_cast<const std::byte*>(rows.data() + j * dim));
    for (const simd::Isa isa : simd::all_isas) {
        if (!simd::available(isa)) continue;
        std::vector<float> got(count), paged(count);
        Scratch<float> workspace;
        const simd::Kernels& kernels = simd::kernels_for(isa);
        const RowsView one_run(rows.data(), count, dim, dim);
        const std::vector<float> inverse = inverses(kernels, one_run);
        cosine_to_mean(kernels, one_run, inverse, got, workspace);
        cosine_to_mean(kernels, {blocks.data(), 0, DType::f32, block_rows, count, dim, dim}, inverse, paged,
                       workspace);
        CHECK(same_bits(got, paged));
        for (std::size_t j = 0; j < count; ++j) {
            double want = 0;
            for (std::size_t c = 0; c < dim; ++c) want += static_cast<double>(rows[j * dim + c]) * anchor[c];
            CHECK(close(got[j], want / norm[j] / std::sqrt(length), 1e-4, 1e-5));
        }
    }
}

TEST_CASE("a zero row has cosine 0, and no row at all is legal", "[property]") {
    std::vector<float> rows = random_floats(5 * 8, 3), got(5);
    std::fill_n(rows.begin() + 16, 8, 0.0F);
    Scratch<float> workspace;
    const RowsView view(rows.data(), 5, 8, 8);
    cosine_to_mean(simd::kernels(), view, inverses(simd::kernels(), view), got, workspace);
    CHECK(same_bits(got[2], 0.0F));
    CHECK(std::abs(got[1]) > 0.0F);
    cosine_to_mean(simd::kernels(), {rows.data(), 0, 8, 8}, {}, {}, workspace);
}

TEST_CASE("rows are visited in order and widened", "[contract]") {
    const std::vector<float> numbers = random_floats(6 * 3, 4);
    const std::vector<float16> halves = to_float16s(numbers);
    const RowsView rows(halves.data(), DType::f16, 6, 3, 3);
    Scratch<float> workspace;
    std::vector<std::size_t> order;
    for_each_row(rows, 2, workspace, [&](std::size_t j, std::span<const float> row) {
        order.push_back(j);
        REQUIRE(row.size() == 3);
        for (std::size_t c = 0; c < 3; ++c) CHECK(same_bits(row[c], to_float(halves[j * 3 + c])));
    });
    CHECK((order == std::vector<std::size_t>{2, 3, 4, 5}));
}
