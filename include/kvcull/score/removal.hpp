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

/// Checks that no weight of `row` is negative, takes NaN for 0 and a row without any weight for a uniform
/// one. @returns the factor that makes its sum 1. @throws state_error for a negative weight.
inline float prepare(const simd::Kernels& kernels, std::string_view where, std::span<float> row) {
    Summary all(kernels, row);
    if (std::bit_cast<std::uint64_t>(all.sum) << 1U > std::uint64_t{0x7FF} << 53U) {  // NaN
        for (float& weight : row)
            if (is_nan(weight)) weight = 0.0F;
        all = Summary(kernels, row);
    }
    check<error::state_error>(all.least >= 0.0F, where, "base score", all.least, "not negative");
    if (all.most > 1e30F) {  // some of them would sum to more than a float holds
        for (float& weight : row) weight *= 0x1p-64F;
        all = Summary(kernels, row);
    }
    if (!(all.sum > 0.0)) {
        std::fill(row.begin(), row.end(), 1.0F);
        all.sum = static_cast<double>(row.size());
    } else if (all.sum < 1e-30) {  // the factor would leave float's range
        for (float& weight : row) weight = static_cast<float>(static_cast<double>(weight) / all.sum);
        all.sum = 1.0;
    }
    return static_cast<float>(1.0 / all.sum);
}

/// Makes every row of `weights` [G, n] sum to 1, see `prepare`.
inline void normalise(const simd::Kernels& kernels, std::string_view where, MatrixView<float> weights) {
    for (std::size_t g = 0; g < weights.rows; ++g) {
        const float factor = prepare(kernels, where, weights[g]);
        for (float& weight : weights[g]) weight *= factor;
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
    bool plain = false;                   ///< one point for all, the plain mean of the values (FastCAOTE)
};

/// Floats of scratch that `removal_errors` takes.
[[nodiscard]] constexpr std::size_t removal_scratch(std::size_t group, std::size_t dim) noexcept {
    return group * detail::distance_rows + dim;
}

/// Change of a group's outputs when one row is left out; out[n], [0] = +Inf if it is the only row.
/// A row that holds more than half of a weight is measured against the mean of the *other* rows, because
/// 1 - a_j and v_j - o vanish together; if the others weigh nothing, it gets +Inf. A centre that is not
/// finite makes all of them NaN.
/// @param weights [G, n], rows that sum to 1; overwritten. @param scratch `removal_scratch(G, d)` floats.
/// Cost: one pass over V, one more per such heavy row; O(G n d), or O(G n) if the distances are known.
inline void removal_errors(const simd::Kernels& kernels, MatrixView<float> weights, const RowsView& v,
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
        if (detail::Summary(kernels, a).most > 0.5F) {
            const auto heaviest = static_cast<std::size_t>(std::max_element(a.begin(), a.end()) - a.begin());
            const float weight = std::exchange(a[heaviest], 0.0F);
            const double rest = detail::Summary(kernels, a).sum;
            if (!(rest > 0.0)) {
                out[heaviest] = positive_infinity();
            } else if (!centre.plain) {
                const MatrixView<float> others(scratch, 1, dim);
                detail::weighted_mean(kernels, {a.data(), 1, n}, v, others);
                for (float& x : others[0]) x = static_cast<float>(static_cast<double>(x) / rest);
                add(heaviest, weight * detail::distance(kernels, v, heaviest, others.data));
            } else {
                const float* const point = centre.points.data;
                const float far = centre.squares.empty() ? detail::distance(kernels, v, heaviest, point)
                                                         : std::sqrt(centre.squares[heaviest]);
                add(heaviest, static_cast<float>(static_cast<double>(weight) / rest) * far);
            }
        }
        kernels.odds(a.data(), n, 1.0F);
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
            for (std::size_t j = 0; j < rows; ++j)
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
        const std::size_t points = centre.plain ? 1 : group;
        for (std::size_t first = 0; first < n; first += detail::distance_rows) {
            const std::size_t end = std::min(n, first + detail::distance_rows);
            detail::distances(kernels, centre.points.data, centre.points.stride, points, v, first, end,
                              nullptr, scratch);
            collect(first, end - first, scratch, centre.plain ? 0 : detail::distance_rows);
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
