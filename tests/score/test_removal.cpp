#include "kvcull/score/removal.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/isas.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

/// Weights [group, n], rows that sum to 1, and values [n, dim].
struct Case {
    std::size_t group, n, dim;
    std::vector<float> weights, v;

    [[nodiscard]] RowsView rows() const { return {v.data(), n, dim, dim}; }
    [[nodiscard]] std::span<const float> of(std::size_t g) const {
        return std::span(weights).subspan(g * n, n);
    }
};
void normalise(MatrixView<float> weights) {
    detail::normalise(simd::kernels(), "test", weights, weights);
}

enum class Kind { ordinary, peaked, nearly_one, some_zeros, uniform };

Case make(Kind kind, std::size_t group, std::size_t n, std::size_t dim, std::uint64_t seed) {
    Case one{group, n, dim, random_floats(group * n, seed), random_floats(n * dim, seed + 1)};
    for (std::size_t i = 0; i < one.weights.size(); ++i) {
        float& x = one.weights[i];
        const bool first = i % n == (i / n * 3) % n;  // another row in every query head
        if (kind == Kind::ordinary) x = std::exp(x);
        if (kind == Kind::peaked) x = std::exp(6.0F * x);
        if (kind == Kind::nearly_one) x = first ? 1.0F : 1e-9F * std::abs(x) / static_cast<float>(n);
        if (kind == Kind::some_zeros) x = x < 0.5F && i % n > 1 ? 0.0F : std::abs(x);
        if (kind == Kind::uniform) x = 1.0F;
    }
    normalise({one.weights.data(), group, n});
    return one;
}

using Real = long double;  // changes of 1e-13 are differences of numbers near 1

/// Weighted mean of the rows that are not `gone`; [dim].
std::vector<Real> mean_without(const Case& one, std::size_t g, std::span<const index_t> gone) {
    std::vector<Real> mean(one.dim);
    Real total = 0;
    for (std::size_t j = 0; j < one.n; ++j) {
        if (std::find(gone.begin(), gone.end(), static_cast<index_t>(j)) != gone.end()) continue;
        const auto a = static_cast<Real>(one.of(g)[j]);
        total += a;
        for (std::size_t c = 0; c < one.dim; ++c) mean[c] += a * static_cast<Real>(one.v[j * one.dim + c]);
    }
    for (Real& x : mean) x /= total;
    return mean;
}
Real apart(std::span<const Real> x, std::span<const Real> y) {
    Real square = 0;
    for (std::size_t c = 0; c < x.size(); ++c) square += (x[c] - y[c]) * (x[c] - y[c]);
    return std::sqrt(square);
}
/// Change of every output when each row is really deleted, or FastCAOTE by its definition; [group, n].
std::vector<double> changes_of(const Case& one, bool fast) {
    std::vector<double> changes;
    const Case uniform{1, one.n, one.dim, std::vector<float>(one.n, 1.0F), one.v};
    const std::vector<Real> plain = mean_without(uniform, 0, {});
    for (std::size_t g = 0; g < one.group; ++g) {
        const std::vector<Real> full = mean_without(one, g, {});
        for (std::size_t j = 0; j < one.n; ++j) {
            const index_t gone[]{static_cast<index_t>(j)};
            if (!fast) {
                changes.push_back(static_cast<double>(apart(full, mean_without(one, g, gone))));
                continue;
            }
            Real rest = 0;
            for (std::size_t i = 0; i < one.n; ++i) rest += i == j ? 0 : static_cast<Real>(one.of(g)[i]);
            const auto row = one.v.begin() + static_cast<std::ptrdiff_t>(j * one.dim);
            const std::vector<Real> value(row, row + static_cast<std::ptrdiff_t>(one.dim));
            changes.push_back(
                static_cast<double>(static_cast<Real>(one.of(g)[j]) / rest * apart(value, plain)));
        }
    }
    return changes;
}

enum class Known { nothing, distances, norms };

/// What the library says, with the centre computed by it too.
std::vector<float> errors_of(const simd::Kernels& kernels, const Case& one, const RowsView& rows,
                             Changes changes, bool fast, Known known = Known::nothing) {
    const std::size_t group = one.group, n = one.n, dim = one.dim;
    std::vector<float> weights = one.weights, points(group * dim), out(n, 42.0F), squares(n), norms(n),
                       scratch(removal_scratch(group, dim) + 1, 77.0F);
    Centre centre{.points = {points.data(), fast ? 1 : group, dim}, .plain = fast};
    std::vector<float> uniform(n, 1.0F / static_cast<float>(n));
    detail::weighted_mean(kernels, {fast ? uniform.data() : weights.data(), fast ? 1 : group, n}, rows,
                          {points.data(), fast ? 1 : group, dim});
    if (known == Known::norms) {
        std::vector<float> value(dim);
        for (std::size_t j = 0; j < n; ++j) {
            rows.widen(j, value);
            norms[j] = squared_norm(kernels, value);
        }
        centre.norms = norms;
    }
    if (known == Known::distances) {
        for (std::size_t j = 0; j < n; ++j) {
            RowsView::Run run = rows.run_at(j);
            run.rows = 1;
            detail::distances(kernels, points.data(), dim, 1, rows, run, nullptr, 0, &squares[j], 1);
        }
        centre.squares = squares;
        centre.points.data = points.data();
    }
    const MatrixView<float> in_place(weights.data(), group, n);
    removal_errors(kernels, "test", in_place, in_place, rows, centre, changes, out, scratch.data());
    CHECK(scratch.back() == 77.0F);
    return out;
}
std::vector<float> errors_of(const Case& one, Changes changes = Changes::norm, bool fast = false) {
    return errors_of(simd::kernels(), one, one.rows(), changes, fast);
}
bool near(std::span<const float> got, std::span<const float> want, double factor, double absolute) {
    for (std::size_t j = 0; j < got.size(); ++j)
        if (!close(got[j], factor * static_cast<double>(want[j]), 1e-4, absolute)) return false;
    return got.size() == want.size();
}

}  // namespace

TEST_CASE("removal errors are what deleting each row changes, for every kind of weights, group and dim",
          "[differential]") {
    const auto kind =
        GENERATE(Kind::ordinary, Kind::peaked, Kind::nearly_one, Kind::some_zeros, Kind::uniform);
    struct Size {
        std::size_t group, dim, n;
    };
    for (const Size& size : {Size{1, 1, 70}, Size{4, 1, 19}, Size{1, 80, 2}, Size{4, 80, 70}, Size{7, 80, 19},
                             Size{1, 128, 70}, Size{7, 128, 19}, Size{1, 257, 19}, Size{4, 257, 40}}) {
        const auto [group, dim, n] = size;
        const Case one = make(kind, group, n, dim, n + dim + group);
        for (const bool fast : {false, true}) {
            const std::vector<double> changes = changes_of(one, fast);
            std::vector<double> norm(n), mean(n);
            for (std::size_t i = 0; i < group * n; ++i) {
                norm[i % n] += changes[i] * changes[i];
                mean[i % n] += changes[i] / static_cast<double>(group);
            }
            for (const simd::Isa isa : available_isas()) {
                const simd::Kernels& kernels = simd::kernels_for(isa);
                CAPTURE(simd::name_of(isa), static_cast<int>(kind), group, dim, n, fast);
                const auto got = errors_of(kernels, one, one.rows(), Changes::norm, fast);
                const auto means = errors_of(kernels, one, one.rows(), Changes::mean, fast, Known::norms);
                // A row of one number may lie as near to the output as rounding.
                const double absolute = dim == 1 ? 1e-7 : 1e-16;
                bool good = true;
                for (std::size_t j = 0; j < n; ++j)
                    good = good && close(got[j], std::sqrt(norm[j]), 1e-4, absolute) &&
                           close(means[j], mean[j], 1e-4, absolute);
                CHECK(good);
            }
        }
    }
}

TEST_CASE("a row that holds all the weight is never worth removing, and the others cost nothing",
          "[property]") {
    for (const bool fast : {false, true})
        for (const Changes changes : {Changes::norm, Changes::mean}) {
            Case one = make(Kind::uniform, 1, 9, 16, 1);
            std::fill(one.weights.begin(), one.weights.end(), 0.0F);
            one.weights[4] = 1.0F;
            std::vector<float> want(9);
            want[4] = positive_infinity();
            CHECK(same_bits(errors_of(one, changes, fast), want));
            // One of two query heads is enough.
            Case two = make(Kind::ordinary, 2, 9, 16, 1);
            std::copy(one.weights.begin(), one.weights.end(), two.weights.begin());
            const std::vector<float> got = errors_of(two, changes, fast);
            for (std::size_t j = 0; j < 9; ++j) CHECK(is_finite(got[j]) == (j != 4));
            CHECK(same_bits(got[4], positive_infinity()));
            const Case alone = make(Kind::uniform, 3, 1, 16, 2);
            CHECK(same_bits(errors_of(alone, changes, fast)[0], positive_infinity()));
        }
}

TEST_CASE("weights whose squares no float holds have their errors all the same", "[differential]") {
    const Changes changes = GENERATE(Changes::norm, Changes::mean);
    for (const std::size_t group : {1U, 4U}) {
        const std::size_t n = 12, dim = 5;
        const std::vector<float> v = random_floats(n * dim, 3);
        std::vector<float> weights(group * n, 0.0F), points(group * dim),
            scratch(removal_scratch(group, dim));
        for (std::size_t g = 0; g < group; ++g)
            for (std::size_t j = 0; j < n; ++j)
                weights[g * n + j] =
                    j + 2 < n ? std::pow(10.0F, -12.0F - 2.0F * static_cast<float>(j)) : 0.5F;
        const RowsView rows(v.data(), n, dim, dim);
        detail::weighted_mean(simd::kernels(), {weights.data(), group, n}, rows, {points.data(), group, dim});
        std::vector<float> out(n);
        const MatrixView<float> in_place(weights.data(), group, n);
        removal_errors(simd::kernels(), "test", in_place, in_place, rows,
                       {.points = {points.data(), group, dim}}, changes, out, scratch.data());
        for (std::size_t j = 0; j + 2 < n; ++j) {
            double square = 0;
            for (std::size_t c = 0; c < dim; ++c)
                square += std::pow(static_cast<double>(v[j * dim + c]) - static_cast<double>(points[c]), 2);
            const double heads = changes == Changes::norm ? std::sqrt(static_cast<double>(group)) : 1.0;
            CHECK(close(out[j],
                        heads * std::pow(10.0, -12.0 - 2.0 * static_cast<double>(j)) * std::sqrt(square),
                        1e-4, 0.0));
        }
    }
}

TEST_CASE("a value that is not finite leaves no row a price", "[contract]") {
    for (const float bad : {quiet_nan(), -negative_infinity(), negative_infinity()}) {
        std::vector<float> v = random_floats(8 * 3, 4), weights(8, 0.125F), point(3), out(8),
                           scratch(removal_scratch(1, 3));
        v[7 * 3] = bad;
        const RowsView rows(v.data(), 8, 3, 3);
        detail::weighted_mean(simd::kernels(), {weights.data(), 1, 8}, rows, {point.data(), 1, 3});
        const MatrixView<float> in_place(weights.data(), 1, 8);
        removal_errors(simd::kernels(), "test", in_place, in_place, rows, {.points = {point.data(), 1, 3}},
                       Changes::norm, out, scratch.data());
        for (const float& error : out) CHECK(is_nan(error));
    }
}

TEST_CASE("uniform weights make the plain mean exact, and equal values cost nothing", "[property]") {
    const Case uniform = make(Kind::uniform, 4, 50, 80, 3);
    CHECK(near(errors_of(uniform, Changes::norm, true), errors_of(uniform), 1.0, 1e-7));
    Case equal = make(Kind::peaked, 4, 50, 80, 4);
    for (std::size_t i = 0; i < equal.v.size(); ++i) equal.v[i] = equal.v[i % 80];
    for (const bool fast : {false, true})
        for (const float& x : errors_of(equal, Changes::norm, fast)) CHECK(x < 1e-3F);
}

TEST_CASE("moving all values changes nothing, nor does turning them; scaling them scales", "[property]") {
    for (const Kind kind : {Kind::ordinary, Kind::peaked})
        for (const bool fast : {false, true}) {
            const Case one = make(kind, 4, 50, 80, 5);
            const std::vector<float> plain = errors_of(one, Changes::norm, fast);
            Case moved = one, turned = one, scaled = one;
            for (std::size_t i = 0; i < one.v.size(); ++i) {
                moved.v[i] += static_cast<float>(i % 80) / 16.0F;
                scaled.v[i] *= -3.0F;
                const std::size_t c = i % 80;
                if (c % 2 == 0) {
                    turned.v[i] = 0.6F * one.v[i] - 0.8F * one.v[i + 1];
                    turned.v[i + 1] = 0.8F * one.v[i] + 0.6F * one.v[i + 1];
                }
            }
            CHECK(near(errors_of(moved, Changes::norm, fast), plain, 1.0, 1e-6));
            CHECK(near(errors_of(turned, Changes::norm, fast), plain, 1.0, 1e-6));
            CHECK(near(errors_of(scaled, Changes::norm, fast), plain, 3.0, 1e-6));
        }
}

TEST_CASE("16-bit and paged rows give the bits of their floats, known distances those of a pass",
          "[property]") {
    const simd::Kernels& kernels = simd::kernels_for(GENERATE(from_range(available_isas())));
    for (const Kind kind : {Kind::ordinary, Kind::nearly_one}) {
        Case one = make(kind, 3, 130, 80, 6);
        const std::vector<float16> half = to_float16s(one.v);
        one.v = to_floats(half);
        const std::size_t block_rows = 13;
        std::vector<const std::byte*> blocks;
        for (std::size_t j = 0; j < one.n; j += block_rows)
            blocks.push_back(reinterpret_cast<const std::byte*>(one.v.data() + j * one.dim));
        const RowsView paged(blocks.data(), 0, DType::f32, block_rows, one.n, one.dim, one.dim);
        const RowsView narrow(half.data(), DType::f16, one.n, one.dim, one.dim);
        for (const bool fast : {false, true}) {
            const auto want = errors_of(kernels, one, one.rows(), Changes::norm, fast);
            CHECK(same_bits(errors_of(kernels, one, narrow, Changes::norm, fast), want));
            CHECK(same_bits(errors_of(kernels, one, paged, Changes::norm, fast), want));
        }
        for (const Changes changes : {Changes::norm, Changes::mean})
            CHECK(same_bits(errors_of(kernels, one, one.rows(), changes, true, Known::distances),
                            errors_of(kernels, one, one.rows(), changes, true)));
    }
}

TEST_CASE("known norms change no error by more than rounding, also of values far from the origin",
          "[differential]") {
    const simd::Kernels& kernels = simd::kernels_for(GENERATE(from_range(available_isas())));
    for (const float offset : {0.0F, 1.0F, 30.0F, 3000.0F}) {
        Case one = make(Kind::ordinary, 4, 600, 80, 7);
        for (std::size_t i = one.dim * one.n / 2; i < one.v.size(); ++i) one.v[i] += offset;  // some blocks
        const auto by_products = errors_of(kernels, one, one.rows(), Changes::norm, false, Known::norms);
        CAPTURE(simd::name_of(kernels.isa), offset);
        const auto by_differences = errors_of(kernels, one, one.rows(), Changes::norm, false);
        CHECK(near(by_products, by_differences, 1.0, 0.0));
        for (float& x : one.v) x += offset;
        CHECK(near(errors_of(kernels, one, one.rows(), Changes::norm, false, Known::norms),
                   errors_of(kernels, one, one.rows(), Changes::norm, false), 1.0, 0.0));
    }
}

TEST_CASE("the error of a set is what deleting it changes, and obeys the triangle inequality",
          "[differential]") {
    for (const Kind kind : {Kind::ordinary, Kind::peaked, Kind::nearly_one, Kind::some_zeros}) {
        const Case one = make(kind, 1, 40, 33, 7);
        const std::vector<float> each = errors_of(one);
        for (const std::vector<index_t>& gone :
             {std::vector<index_t>{}, {3}, {0, 39}, {5, 4, 30, 12, 7}, {1, 2, 3, 8, 9, 10, 11, 20, 21, 22}}) {
            const double got = set_error(one.of(0), one.rows(), gone);
            const auto want =
                static_cast<double>(apart(mean_without(one, 0, {}), mean_without(one, 0, gone)));
            CHECK(std::abs(got - want) <= 1e-6 * want + 1e-12);
            double gone_weight = 0, sum = 0;
            for (const index_t row : gone) {
                const auto a = static_cast<double>(one.of(0)[static_cast<std::size_t>(row)]);
                gone_weight += a;
                sum += static_cast<double>(each[static_cast<std::size_t>(row)]) * (1 - a);
            }
            CHECK(got * (1 - gone_weight) <= sum * (1 + 1e-5) + 1e-9);
            if (gone.size() == 1) CHECK(close(each[3], got, 1e-4, 1e-9));
        }
    }
    const Case few = make(Kind::ordinary, 1, 4, 8, 8);
    const std::vector<index_t> all{0, 1, 2, 3};
    CHECK(same_bits(static_cast<float>(set_error(few.of(0), few.rows(), all)), positive_infinity()));
    std::vector<float> doubled = few.weights;  // any numbers that are not negative
    for (float& x : doubled) x *= 2.0F;
    const std::vector<index_t> two{0, 2};
    CHECK(std::abs(set_error(doubled, few.rows(), two) - set_error(few.of(0), few.rows(), two)) < 1e-9);
}

TEST_CASE("sets that are none are refused", "[contract]") {
    const Case one = make(Kind::ordinary, 1, 4, 8, 9);
    const auto refusal = [&](std::span<const float> weights, std::vector<index_t> removed) {
        return failure<error::shape_error>([&] { (void)set_error(weights, one.rows(), removed); });
    };
    CHECK(refusal(one.of(0), {0, 4}) == "set_error: removed is 4, want distinct rows below 4");
    CHECK(refusal(one.of(0), {-1}) == "set_error: removed is -1, want distinct rows below 4");
    CHECK(refusal(one.of(0), {2, 1, 2}) == "set_error: removed is 2, want distinct rows below 4");
    CHECK(refusal(one.of(0).first(3), {1}) == "set_error: weights.size() is 3, want 4");
}

TEST_CASE("weights are made to sum to 1: NaN counts as nothing, nothing at all is uniform", "[property]") {
    const auto normalised = [](std::vector<float> row) {
        normalise({row.data(), 1, row.size()});
        return row;
    };
    CHECK(same_bits(normalised({1, 2, 1}), {{0.25F, 0.5F, 0.25F}}));
    CHECK(same_bits(normalised({1, quiet_nan(), 1}), {{0.5F, 0.0F, 0.5F}}));
    CHECK(same_bits(normalised({0, 0, -0.0F, 0}), std::vector<float>(4, 0.25F)));
    CHECK(same_bits(normalised({quiet_nan(), quiet_nan()}), {{0.5F, 0.5F}}));
    std::vector<float> scales{1e-37F};
#ifndef __FAST_MATH__  // takes subnormal numbers for 0
    scales.push_back(1e-42F);
#endif
    for (const float tiny : scales) {
        const std::vector<float> row = normalised({tiny, 3.0F * tiny});
        CHECK(close(row[0], 0.25, 1e-3, 0));
        CHECK(close(row[1], 0.75, 1e-3, 0));
    }
    const std::vector<float> many = normalised(std::vector<float>(100003, 0.1F));
    CHECK(close(many[77], 1.0 / 100003, 1e-6, 0));
    for (const float& share : normalised(std::vector<float>(100, 3e38F))) CHECK(close(share, 0.01, 1e-6, 0));

    std::vector<float> two{1, 2, 1, -3};
    const std::string message = failure<error::state_error>([&] { normalise({two.data(), 2, 2}); });
    CHECK(message == "test: base score is -3.000000, want not negative");
    for (std::size_t at = 0; at < 21; ++at) {  // in every lane and in the tail
        std::vector<float> row(21, 1.0F);
        row[at] = -1e-30F;
        CHECK_THROWS_AS(normalise({row.data(), 1, 21}), error::state_error);
    }
}
