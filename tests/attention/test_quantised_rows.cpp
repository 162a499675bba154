/// The kernels over int8 and int4 rows, against those of floats over their numbers.

#include <cmath>
#include <cstddef>
#include <span>
#include <vector>

#include "kvcull/attention/row_kernels.hpp"
#include "kvcull/simd/wide.hpp"
#include "support/catch.hpp"
#include "support/isas.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

/// Rows of groups with a gap of one group between them, and their numbers as floats.
struct Grouped {
    std::size_t rows, dim, stride;
    DType type;
    std::vector<std::byte> bytes;
    std::vector<float> wide;

    Grouped(DType type_, std::size_t rows_, std::size_t dim_, std::uint64_t seed)
        : rows(rows_),
          dim(dim_),
          stride(elements(type_, dim_) + 1),
          type(type_),
          bytes(rows * stride * size_of(type_), std::byte{0xFF}),
          wide(rows * dim) {
        const std::vector<float> numbers = random_floats(rows * dim, seed);
        for (std::size_t j = 0; j < rows; ++j) {
            simd::narrow(simd::kernels(), type, &numbers[j * dim], dim, &bytes[j * stride * size_of(type)]);
            view().widen(j, std::span(wide).subspan(j * dim, dim));
        }
    }
    [[nodiscard]] RowsView view() const { return {bytes.data(), type, rows, dim, stride}; }
    [[nodiscard]] RowsView floats() const { return {wide.data(), rows, dim, dim}; }
};

/// Logits, weighted sums and distances of some queries, with rows cut into runs of `cut`.
std::vector<float> results(const simd::Kernels& kernels, const RowsView& view, std::size_t group,
                           std::size_t cut) {
    const std::size_t rows = view.rows(), dim = view.dim();
    const std::vector<float> q = random_floats(group * dim, 7), w = random_floats(group * rows, 8),
                             z = random_floats(group * rows, 9);
    std::vector<float> logits(group * rows), apart(group * rows), stretched(group * rows),
        sum(group * dim, 0.5F);
    for (std::size_t j = 0; j < rows; j += cut) {
        const RowsView::Run run{view.row(j), j, std::min(cut, rows - j)};
        const std::byte* next = j + cut < rows ? view.row(j + cut) : nullptr;
        detail::dots(kernels, q.data(), dim, group, view, run, 0.5F, &logits[j], rows, next);
        detail::weighted_sum(kernels, &w[j], rows, group, view, run, sum.data(), dim, next);
        detail::distances(kernels, q.data(), dim, group, view, run, nullptr, 0, &apart[j], rows, next);
        detail::distances(kernels, q.data(), dim, group, view, run, &z[j], rows, &stretched[j], rows, next);
    }
    for (const auto* more : {&apart, &stretched, &sum})
        logits.insert(logits.end(), more->begin(), more->end());
    return logits;
}

}  // namespace

TEST_CASE("int8 and int4 rows give what their widened copy gives, bit for bit", "[property]") {
    for (const simd::Isa isa : available_isas()) {
        const simd::Kernels& kernels = simd::kernels_for(isa);
        for (const DType type : {DType::int8, DType::int4}) {
            for (const std::size_t dim : {1U, 31U, 32U, 33U, 47U, 80U, 128U, 257U, 1024U}) {
                const Grouped rows(type, 45, dim, dim);
                for (const std::size_t group : {1U, 4U, 7U}) {
                    CAPTURE(simd::name_of(isa), name_of(type), dim, group);
                    const std::vector<float> wanted = results(kernels, rows.floats(), group, 45);
                    for (const std::size_t cut : {45U, 20U, 1U})
                        REQUIRE(same_bits(results(kernels, rows.view(), group, cut), wanted));
                }
            }
        }
    }
}

TEST_CASE("rows too long for the floats on the stack are summed in parts", "[differential]") {
    constexpr std::size_t dim = 2 * simd::wide_floats + 33, n = 3, group = 3;
    const DType type = GENERATE(DType::int8, DType::int4);
    const Grouped rows(type, n, dim, 5);
    for (const simd::Isa isa : available_isas()) {
        const simd::Kernels& kernels = simd::kernels_for(isa);
        CAPTURE(simd::name_of(isa), name_of(type));
        const std::vector<float> got = results(kernels, rows.view(), group, n),
                                 wanted = results(kernels, rows.floats(), group, n);
        for (std::size_t i = 0; i < 3 * group * n; ++i) REQUIRE(close(got[i], wanted[i], 1e-4, 1e-3));
        // A weighted sum has no sums over channels.
        REQUIRE(same_bits(std::span(got).subspan(3 * group * n), std::span(wanted).subspan(3 * group * n)));
    }
}
