#include "kvcull/attention/rope.hpp"

#include <cmath>
#include <complex>
#include <cstddef>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

/// Pairs as complex numbers, turned by multiplication with a unit number whose angle is reduced in long
/// double.
std::vector<double> rotated(const Rope& rope, position_t position, const std::vector<float>& row) {
    std::vector<double> result(row.begin(), row.end());
    const std::size_t half = rope.frequencies.size();
    for (std::size_t a = 0; a < half; ++a) {
        const std::size_t x = rope.pairing == Pairing::half_split ? a : 2 * a;
        const std::size_t y = rope.pairing == Pairing::half_split ? a + half : 2 * a + 1;
        const long double angle =
            static_cast<long double>(position) * static_cast<long double>(rope.frequencies[a]);
        const std::complex<double> turn(static_cast<double>(std::cos(angle)),
                                        static_cast<double>(std::sin(angle)));
        const std::complex<double> turned = std::complex<double>(result[x], result[y]) * turn;
        result[x] = turned.real();
        result[y] = turned.imag();
    }
    return result;
}

bool close_rows(const std::vector<float>& got, const std::vector<double>& wanted, double tolerance) {
    bool good = got.size() == wanted.size();
    for (std::size_t c = 0; c < got.size(); ++c)
        good = good && close(got[c], wanted[c], tolerance, tolerance);
    return good;
}

std::vector<double> as_double(const std::vector<float>& row) {
    return {row.begin(), row.end()};
}

}  // namespace

TEST_CASE("a rotation is a product of complex numbers, near and far, in both pairings", "[differential]") {
    const auto pairing = GENERATE(Pairing::half_split, Pairing::interleaved);
    for (const std::size_t dims : {2U, 8U, 64U, 128U}) {
        const Rope table = rope(dims, 10000.0, pairing);
        for (const position_t position :
             {position_t{0}, position_t{1}, position_t{4095}, position_t{-17}, position_t{1000000000}}) {
            std::vector<float> row = random_floats(dims, 1);
            const std::vector<double> wanted = rotated(table, position, row);
            rotate(table, position, row);
            CAPTURE(dims, position);
            REQUIRE(close_rows(row, wanted, 3e-7));
        }
    }
}

TEST_CASE("half-split and interleaved pairs turn alike", "[property]") {
    const std::vector<float> split = random_floats(16, 2);
    std::vector<float> pairs(16);
    for (std::size_t a = 0; a < 8; ++a) {
        pairs[2 * a] = split[a];
        pairs[2 * a + 1] = split[a + 8];
    }
    std::vector<float> x = split;
    rotate(rope(16), 123, x);
    rotate(rope(16, 10000.0, Pairing::interleaved), 123, pairs);
    for (std::size_t a = 0; a < 8; ++a) {
        REQUIRE(pairs[2 * a] == x[a]);
        REQUIRE(pairs[2 * a + 1] == x[a + 8]);
    }
}

TEST_CASE("rotations add: re-rotation by the difference of positions is rotation to the new one",
          "[property]") {
    const Rope table = rope(64, 500000.0);
    const std::vector<float> raw = random_floats(64, 3);
    for (const position_t from : {position_t{5}, position_t{70000}}) {
        for (const position_t to : {position_t{0}, position_t{3}, position_t{80000}}) {
            std::vector<float> moved = raw, direct = raw;
            rotate(table, from, moved);
            rotate(table, to - from, moved);
            rotate(table, to, direct);
            REQUIRE(close_rows(moved, as_double(direct), 1e-6));
        }
    }
}

TEST_CASE("a negative position turns back, position 0 changes no bit, and lengths stay", "[property]") {
    const Rope table = rope(32);
    const std::vector<float> raw = random_floats(32, 4);
    std::vector<float> row = raw;
    rotate(table, 0, row);
    REQUIRE(same_bits(row, raw));
    rotate(table, 991, row);
    double before = 0, after = 0;
    for (std::size_t c = 0; c < 32; ++c) {
        before += static_cast<double>(raw[c]) * static_cast<double>(raw[c]);
        after += static_cast<double>(row[c]) * static_cast<double>(row[c]);
    }
    REQUIRE(std::abs(before - after) < 1e-5);
    rotate(table, -991, row);
    REQUIRE(close_rows(row, as_double(raw), 1e-6));
}

TEST_CASE("the logit of two rotated rows depends on the distance of their positions alone", "[property]") {
    const Rope table = rope(64);
    const std::vector<float> q = random_floats(64, 5), k = random_floats(64, 6);
    const auto logit = [&](position_t query, position_t key) {
        std::vector<float> x = q, y = k;
        rotate(table, query, x);
        rotate(table, key, y);
        double sum = 0;
        for (std::size_t c = 0; c < 64; ++c) sum += static_cast<double>(x[c]) * static_cast<double>(y[c]);
        return sum;
    };
    REQUIRE(std::abs(logit(10, 3) - logit(10007, 10000)) < 1e-4);
    REQUIRE(std::abs(logit(10, 3) - logit(10, 4)) > 1e-2);
}

TEST_CASE("channels behind the rotated ones stay, and rows of a matrix turn like single rows", "[property]") {
    const Rope table = rope(8);
    std::vector<float> matrix = random_floats(3 * 15, 7);
    const std::vector<float> before = matrix;
    rotate(table, 42, MatrixView<float>(matrix.data(), 3, 12, 15));
    for (std::size_t row = 0; row < 3; ++row) {
        std::vector<float> single(before.begin() + static_cast<std::ptrdiff_t>(row * 15),
                                  before.begin() + static_cast<std::ptrdiff_t>(row * 15 + 15));
        rotate(table, 42, single);
        REQUIRE(same_bits(std::span(matrix).subspan(row * 15, 15), single));
        REQUIRE(same_bits(std::span(matrix).subspan(row * 15 + 8, 7),
                          std::span(before).subspan(row * 15 + 8, 7)));
    }
}

TEST_CASE("frequencies fall geometrically from 1, and linear scaling divides them", "[differential]") {
    const Rope plain = rope(64, 10000.0), scaled = scale_linear(plain, 4.0);
    REQUIRE(plain.dims() == 64);
    for (std::size_t a = 0; a < 32; ++a) {
        const double wanted = std::exp(-std::log(10000.0) * static_cast<double>(a) / 32.0);
        REQUIRE(std::abs(plain.frequencies[a] - wanted) <= 1e-14 * wanted);
        REQUIRE(scaled.frequencies[a] == plain.frequencies[a] / 4.0);
    }
}

TEST_CASE("llama3 scaling gives the numbers of Hugging Face transformers", "[golden]") {
    // modeling_rope_utils._compute_llama3_parameters in double: Llama 3.1 (29 .. 34 lie between the two
    // limits)
    const Rope large = scale_llama3(rope(128, 500000.0), 8.0, 1.0, 4.0, 8192.0);
    struct Expected {
        std::size_t index;
        double value;
    };
    for (const auto& [index, value] :
         {Expected{0, 1.0}, Expected{20, 0.016560440080994446}, Expected{28, 0.0032114459947525913},
          Expected{29, 0.0021665707635033591}, Expected{30, 0.0013718935677611381},
          Expected{32, 0.00052484616099295468}, Expected{34, 0.00017850781276799638},
          Expected{35, 9.5562123539646833e-05}, Expected{63, 3.0689259889145111e-07}}) {
        CAPTURE(index);
        REQUIRE(std::abs(large.frequencies[index] - value) <= 1e-12 * value);
    }
    const std::vector<double> small{1.0,
                                    0.23668711730167266,
                                    0.0037253549056583705,
                                    0.00098821176880261848,
                                    0.00031250000000000001,
                                    9.882117688026187e-05,
                                    3.1250000000000001e-05,
                                    9.8821176880261856e-06};
    const Rope tiny = scale_llama3(rope(16, 10000.0), 32.0, 1.0, 4.0, 64.0);
    for (std::size_t a = 0; a < 8; ++a) REQUIRE(std::abs(tiny.frequencies[a] - small[a]) <= 1e-12 * small[a]);
}

TEST_CASE("impossible parameters and short rows are errors", "[contract]") {
    REQUIRE_THROWS_AS(rope(7), error::config_error);
    REQUIRE_THROWS_AS(rope(8, 0.0), error::config_error);
    REQUIRE_THROWS_AS(rope(8, -1.0), error::config_error);
    REQUIRE_THROWS_AS(scale_linear(rope(8), 0.0), error::config_error);
    REQUIRE_THROWS_AS(scale_llama3(rope(8), 0.0, 1.0, 4.0, 64.0), error::config_error);
    REQUIRE_THROWS_AS(scale_llama3(rope(8), 8.0, 0.0, 4.0, 64.0), error::config_error);
    REQUIRE_THROWS_AS(scale_llama3(rope(8), 8.0, 4.0, 4.0, 64.0), error::config_error);
    REQUIRE_THROWS_AS(scale_llama3(rope(8), 8.0, 1.0, 4.0, 0.0), error::config_error);
    std::vector<float> row = random_floats(7, 8);
    const std::vector<float> before = row;
    REQUIRE_THROWS_AS(rotate(rope(8), 1, row), error::shape_error);
    REQUIRE(same_bits(row, before));
}
