#pragma once
/// What leaving a token out does to an attention output, in closed form (CAOTE, arXiv 2504.14051): the other
/// weights grow by 1 / (1 - a_j), so the output moves by a_j / (1 - a_j) |v_j - o|.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "../attention/row_kernels.hpp"
#include "../base/error.hpp"
#include "../views.hpp"
#include "similarity.hpp"
#include "squared_distances.hpp"

namespace kvcull::inline KVCULL_ABI {

/// How the outputs of a group become one number per row: the norm of all their changes, or the mean norm.
enum class Changes : std::uint8_t { norm, mean };

namespace detail {

struct Summary {
    float least = 0.0F, most = 0.0F;
    double sum = 0.0;

    Summary(const simd::Kernels& kernels, std::span<const float> row) {
        kernels.summarise(row.data(), row.size(), &least, &most, &sum);
    }
};

/// A row of scores whose shares of its sum are weights.
struct Shares {
    const float* row;
    float factor;  // makes its sum 1
    float most;    // of the weights

    /// Takes NaN for 0, and a row without any weight for a uniform one. @param spare  [n], where such a row
    /// is put; may be the row itself. @throws state_error for a negative score.
    Shares(const simd::Kernels& kernels, std::string_view where, std::span<const float> scores,
           std::span<float> spare) {
        Summary all(kernels, scores);
        const bool nan = std::bit_cast<std::uint64_t>(all.sum) << 1U > std::uint64_t{0x7FF} << 53U;
        constexpr float many = 1e30F;  // some of them would sum to more than a float holds
        constexpr double few = 1e-30;  // the factor would leave float's range
        const bool usual = !nan && all.most <= many && all.sum >= few;
        row = usual ? scores.data() : spare.data();
        if (!usual && scores.data() != row) std::copy(scores.begin(), scores.end(), spare.begin());
        if (nan) {
            for (float& weight : spare)
                if (is_nan(weight)) weight = 0.0F;
            all = Summary(kernels, spare);
        }
        check<error::state_error>(all.least >= 0.0F, where, "base score", all.least, "not negative");
        if (all.most > many) {
            for (float& weight : spare) weight *= 0x1p-64F;
            all = Summary(kernels, spare);
        }
        if (!(all.sum > 0.0)) {
            std::fill(spare.begin(), spare.end(), 1.0F);
            all = Summary(kernels, spare);
        } else if (all.sum < few) {
            for (float& weight : spare) weight = static_cast<float>(static_cast<double>(weight) / all.sum);
            all = Summary(kernels, spare);
        }
        factor = static_cast<float>(1.0 / all.sum);
        most = factor * all.most;
    }
};

/// The shares of every row of `scores` [G, n], which `weights` may be.
inline void normalise(const simd::Kernels& kernels, std::string_view where, MatrixView<const float> scores,
                      MatrixView<float> weights) {
    for (std::size_t g = 0; g < weights.rows; ++g) {
        const Shares shares(kernels, where, scores[g], weights[g]);
        for (std::size_t j = 0; j < weights.cols; ++j) weights[g][j] = shares.row[j] * shares.factor;
    }
}

/// out[G, d] = sum_j weights[g, j] v_j.
inline void weighted_mean(const simd::Kernels& kernels, MatrixView<const float> weights, const RowsView& v,
                          MatrixView<float> out) {
    for (std::size_t g = 0; g < out.rows; ++g) std::fill(out[g].begin(), out[g].end(), 0.0F);
    for_each_piece(v, 0, v.rows(), [&](const RowsView::Run& piece, const std::byte* next) {
        weighted_sum(kernels, weights.data + piece.first, weights.stride, weights.rows, v, piece, out.data,
                     out.stride, next);
    });
}

/// |row j of v - point|.
[[nodiscard]] inline float distance(const simd::Kernels& kernels, const RowsView& v, std::size_t j,
                                    const float* point) {
    RowsView::Run one = v.run_at(j);
    one.rows = 1;
    float square = 0.0F;
    distances(kernels, point, 0, 1, v, one, nullptr, 0, &square, 1);
    return std::sqrt(square);
}

}  // namespace detail

/// Where the distances of `removal_errors` are taken from.
struct Centre {
    MatrixView<const float> points = {};  ///< [G, d]: the outputs under the weights; `plain`: [1, d]
    std::span<const float> squares = {};  ///< [n] or empty; `plain`: |v_j - point|^2, so V is not read
    std::span<const float> norms = {};    ///< [n] or empty: |v_j|^2, which halve the arithmetic
    bool plain = false;                   ///< one point for all, the plain mean of the values (FastCAOTE)
};

/// Floats of scratch that `removal_errors` takes.
[[nodiscard]] constexpr std::size_t removal_scratch(std::size_t group, std::size_t dim) noexcept {
    return std::max(dim, group * (2 * detail::distance_rows + 1));
}

/// Change of a group's outputs when one row is left out; out[n], [0] = +Inf if it is the only row.
/// A row that holds more than half of a weight is measured against the mean of the *other* rows, because
/// 1 - a_j and v_j - o vanish together; if the others weigh nothing, it gets +Inf. A centre that is not
/// finite makes all of them NaN.
/// @param scores [G, n], whose shares of a row's sum are the weights, see `Shares`. @param weights [G, n],
/// overwritten; may be the scores. @param scratch `removal_scratch(G, d)` floats.
/// Cost: one pass over V, one more per such heavy row; O(G n d), or O(G n) if the distances are known.
/// @throws state_error for a negative score.
inline void removal_errors(const simd::Kernels& kernels, std::string_view where,
                           MatrixView<const float> scores, MatrixView<float> weights, const RowsView& v,
                           const Centre& centre, Changes changes, std::span<float> out, float* scratch) {
    const std::size_t n = v.rows(), group = weights.rows, dim = v.dim();
    if (n == 1) {
        out[0] = positive_infinity();
        return;
    }
    for (std::size_t g = 0; centre.squares.empty() && g < centre.points.rows; ++g)
        if (!all_finite(centre.points[g])) return std::fill(out.begin(), out.end(), quiet_nan());
    std::fill(out.begin(), out.end(), 0.0F);
    const auto add = [&](std::size_t j, float error) {
        out[j] += changes == Changes::norm ? error * error : error;
    };
    for (std::size_t g = 0; g < group; ++g) {
        const std::span<float> a = weights[g];
        detail::Shares shares(kernels, where, scores[g], a);
        if (shares.most > 0.5F) {
            if (shares.row != a.data()) std::copy_n(shares.row, n, a.data());
            shares.row = a.data();
            const auto heaviest = static_cast<std::size_t>(std::max_element(a.begin(), a.end()) - a.begin());
            a[heaviest] = 0.0F;
            const double sum = detail::Summary(kernels, a).sum;
            const double rest = sum * static_cast<double>(shares.factor);
            if (!(rest > 0.0)) {
                out[heaviest] = positive_infinity();
            } else if (!centre.plain) {
                const MatrixView<float> others(scratch, 1, dim);
                detail::weighted_mean(kernels, {a.data(), 1, n}, v, others);
                for (float& x : others[0]) x = static_cast<float>(static_cast<double>(x) / sum);
                add(heaviest, shares.most * detail::distance(kernels, v, heaviest, others.data));
            } else {
                const float* const point = centre.points.data;
                const float far = centre.squares.empty() ? detail::distance(kernels, v, heaviest, point)
                                                         : std::sqrt(centre.squares[heaviest]);
                add(heaviest, static_cast<float>(static_cast<double>(shares.most) / rest) * far);
            }
        }
        kernels.odds(shares.row, a.data(), n, shares.factor);
    }

    const auto root_of_squares = [&](std::size_t row, const float* square, std::size_t stride) {
        double sum = 0.0;
        for (std::size_t g = 0; g < group; ++g) {
            const auto weight = static_cast<double>(weights[g][row]);
            sum += weight * weight * static_cast<double>(square[g * stride]);
        }
        return static_cast<float>(std::sqrt(sum));
    };
    const auto collect = [&](std::size_t first, std::size_t rows, const float* squares, std::size_t stride) {
        if (changes == Changes::norm) {
            kernels.add_squares(out.data() + first, weights.data + first, weights.stride, nullptr, 0, squares,
                                stride, group, rows);
            kernels.square_roots(out.data() + first, rows);
            constexpr float tiny = 1e-15F;  // whose square has lost bits, or all of them
            bool some = false;              // told apart, so that the loop over all of them is one of vectors
            for (std::size_t j = 0; j < rows; ++j) some |= out[first + j] < tiny;
            for (std::size_t j = 0; some && j < rows; ++j)
                if (out[first + j] < tiny) out[first + j] = root_of_squares(first + j, squares + j, stride);
            return;
        }
        for (std::size_t g = 0; g < group; ++g)
            for (std::size_t j = 0; j < rows; ++j)
                out[first + j] += weights[g][first + j] * std::sqrt(squares[g * stride + j]);
    };
    if (!centre.squares.empty()) {
        collect(0, n, centre.squares.data(), 0);
    } else {
        const std::size_t points = centre.points.rows;
        float* const squares = scratch;  // of the points; the mean of a heavy row's others is gone by now
        float* const distances = scratch + points;
        for (std::size_t g = 0; g < points; ++g) squares[g] = squared_norm(kernels, centre.points[g]);
        for (std::size_t first = 0; first < n; first += detail::distance_rows) {
            const std::size_t end = std::min(n, first + detail::distance_rows);
            detail::squared_distances(kernels, {centre.points, squares}, v, first, end,
                                      centre.norms.empty() ? nullptr : centre.norms.data() + first, {},
                                      distances, distances + points * detail::distance_rows);
            collect(first, end - first, distances, centre.plain ? 0 : detail::distance_rows);
        }
    }
    if (changes == Changes::mean)
        for (float& error : out) error /= static_cast<float>(group);
}

/// Norm of an output's change when a whole set of rows is left out: exact, for diagnostics.
/// |sum over the set of a_j (o - v_j)| / (1 - weight of the set); +Inf if nothing else has weight. In double.
/// @param weights [n], any non-negative numbers. @param removed  distinct rows.
/// @throws shape_error for sizes or rows that do not fit.
[[nodiscard]] inline double set_error(std::span<const float> weights, const RowsView& v,
                                      std::span<const index_t> removed) {
    constexpr std::string_view where = "set_error";
    const std::size_t n = v.rows(), dim = v.dim();
    detail::check_size(where, "weights.size()", weights.size(), n);
    std::vector<std::uint8_t> gone(n, 0);
    for (const index_t row : removed) {
        const auto j = static_cast<std::size_t>(row);
        detail::check<error::shape_error>(row >= 0 && j < n && gone[j] == 0, where, "removed", row,
                                          detail::text("distinct rows below ", n));
        gone[j] = 1;
    }
    std::vector<double> sums(2 * dim, 0.0);  // of the rows that stay, of those that go
    std::vector<float> value(dim);
    double weight[2] = {0.0, 0.0};
    for (std::size_t j = 0; j < n; ++j) {
        v.widen(j, value);
        const auto a = static_cast<double>(weights[j]);
        weight[gone[j]] += a;
        for (std::size_t c = 0; c < dim; ++c) sums[gone[j] * dim + c] += a * static_cast<double>(value[c]);
    }
    if (!(weight[1] > 0.0)) return 0.0;
    if (!(weight[0] > 0.0)) return static_cast<double>(positive_infinity());
    double square = 0.0;
    for (std::size_t c = 0; c < dim; ++c) {
        const double apart = sums[c] / weight[0] - sums[dim + c] / weight[1];
        square += apart * apart;
    }
    return weight[1] / (weight[0] + weight[1]) * std::sqrt(square);
}

}  // namespace kvcull::inline KVCULL_ABI
