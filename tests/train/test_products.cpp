#include "kvcull/train/products.hpp"

#include <vector>

#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/reference.hpp"
#include "train/numbers.hpp"

using namespace kvcull;
using namespace kvcull::test;

TEST_CASE("the three products agree with plain sums in float and double, with strides", "[differential]") {
    const auto check = [&]<class T>(T) {
        for (const std::size_t m : {1U, 5U, 40U})
            for (const std::size_t k : {1U, 9U, 33U}) {
                const std::size_t n = 7, gap = 3;
                const auto array = [&](std::size_t rows, std::size_t cols, std::uint64_t seed) {
                    const auto numbers = random_doubles(rows * (cols + gap), seed);
                    return std::vector<T>(numbers.begin(), numbers.end());
                };
                const auto a = array(m, k, 1), b = array(k, n, 2), turned_a = array(k, m, 3),
                           c = array(m, n, 5);
                const auto turned_b = array(n, k, 4);
                const auto view = [&](const std::vector<T>& values, std::size_t rows, std::size_t cols) {
                    return MatrixView<const T>(values.data(), rows, cols, cols + gap);
                };
                std::vector<T> sum = c, turned_sum = c, product = c;
                const auto out = [&](std::vector<T>& values) {
                    return MatrixView<T>(values.data(), m, n, n + gap);
                };
                train::add_product<T>(view(a, m, k), view(b, k, n), out(sum));
                train::add_transposed_product<T>(view(turned_a, k, m), view(b, k, n), out(turned_sum));
                train::product_transposed<T>(view(a, m, k), view(turned_b, n, k), out(product), T{2});
                bool near = true;
                const double tolerance = sizeof(T) == 4 ? 1e-4 : 1e-12;
                for (std::size_t i = 0; i < m; ++i)
                    for (std::size_t j = 0; j < n; ++j) {
                        double want = static_cast<double>(c[i * (n + gap) + j]), turned = want, plain = 0.0;
                        for (std::size_t l = 0; l < k; ++l) {
                            const auto at = [&](const std::vector<T>& v, std::size_t row, std::size_t col,
                                                std::size_t cols) {
                                return static_cast<double>(v[row * (cols + gap) + col]);
                            };
                            want += at(a, i, l, k) * at(b, l, j, n);
                            turned += at(turned_a, l, i, m) * at(b, l, j, n);
                            plain += 2.0 * at(a, i, l, k) * at(turned_b, j, l, k);
                        }
                        const std::size_t index = i * (n + gap) + j;
                        const auto agrees = [&](T got, double number) {
                            return std::abs(static_cast<double>(got) - number) <=
                                   tolerance * (1 + std::abs(number));
                        };
                        near = near && agrees(sum[index], want) && agrees(turned_sum[index], turned) &&
                               agrees(product[index], plain);
                    }
                CHECK(near);
            }
    };
    check(0.0F);
    check(0.0);
}

TEST_CASE("matrices that do not fit are refused by name", "[contract]") {
    std::vector<double> x(30);
    const auto view = [&](std::size_t rows, std::size_t cols) {
        return MatrixView<double>(x.data(), rows, cols);
    };
    using error::shape_error;
    CHECK(failure<shape_error>([&] { train::add_product<double>(view(2, 3), view(2, 3), view(2, 3)); }) ==
          "add_product: b.rows is 2, want 3");
    CHECK(failure<shape_error>([&] { train::add_product<double>(view(2, 3), view(3, 4), view(3, 4)); }) ==
          "add_product: c.rows is 3, want 2");
    CHECK(failure<shape_error>([&] {
              train::add_transposed_product<double>(view(2, 3), view(3, 4), view(3, 4));
          }) == "add_transposed_product: b.rows is 3, want 2");
    CHECK(failure<shape_error>([&] {
              train::product_transposed<double>(view(2, 3), view(4, 3), view(2, 3));
          }) == "product_transposed: c.cols is 3, want 4");
}
