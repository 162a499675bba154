#include "kvcull/simd/transpose.hpp"

#include <cstddef>
#include <cstdint>
#include <vector>

#include "support/catch.hpp"

using namespace kvcull;

TEMPLATE_TEST_CASE("columns become rows bit for bit, and nothing else is written", "[simd][property]",
                   std::uint16_t, std::uint32_t) {
    for (const std::size_t rows : {0U, 1U, 3U, 4U, 7U, 8U, 9U, 16U, 33U}) {
        for (const std::size_t dim : {1U, 3U, 4U, 7U, 8U, 12U, 17U, 40U}) {
            CAPTURE(rows, dim);
            const std::size_t stride = rows + 5;
            std::vector<TestType> columns(dim * stride +
                                          1);  // from the second on, so that nothing is aligned
            for (std::size_t i = 0; i < columns.size(); ++i)
                columns[i] = static_cast<TestType>(i * 2654435761U + 1);
            std::vector<TestType> out(rows * dim + 1, TestType{77});
            simd::transpose(columns.data() + 1, stride, rows, dim, out.data());
            for (std::size_t j = 0; j < rows; ++j)
                for (std::size_t c = 0; c < dim; ++c)
                    REQUIRE(out[j * dim + c] == columns[1 + c * stride + j]);
            REQUIRE(out.back() == TestType{77});
        }
    }
}
