#pragma once
/// CriticalKV: a second look at the rows that a policy would hardly keep, weighed by what their values do.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "../base/error.hpp"
#include "../score/concepts.hpp"
#include "../select/topk.hpp"

namespace kvcull::inline KVCULL_ABI {

/// A base that scores heads alone, at the end of a layer, and leaves the choice to its scores.
template <class P>
concept CriticalBase =
    Policy<P> && !decides_late<P> && !Scoped<P> && !Selects<P> && !TakesWrapperWorkspace<P>;

/// The output projection of every layer: [layers], each [q_heads * value_dim, D], where rows `h * value_dim`
/// and following belong to query head h. The caller's memory.
using Projections = std::span<const MatrixView<const float>>;

/// out[n] = mean over the query heads of the group of |v_j Wo[h]|_1. `wo` [group * value_dim, D] has the rows
/// of the group. `scratch`: `projected_scratch(dim, D)` floats. Cost: 2 group n dim D flops.
inline constexpr std::size_t projected_tile = 16;
[[nodiscard]] constexpr std::size_t projected_scratch(std::size_t dim, std::size_t width) noexcept {
    return projected_tile * (dim + width);
}
inline void projected_norms(const simd::Kernels& kernels, const RowsView& v, MatrixView<const float> wo,
                            std::size_t group, std::span<float> out, float* scratch) {
    const std::size_t n = v.rows(), dim = v.dim(), width = wo.cols;
    float* const projected = scratch + projected_tile * dim;
    for (std::size_t first = 0; first < n; first += projected_tile) {
        const std::size_t rows = std::min(projected_tile, n - first);
        for (std::size_t j = 0; j < rows; ++j) v.widen(first + j, {scratch + j * dim, dim});
        double sums[projected_tile] = {};
        for (std::size_t g = 0; g < group; ++g) {
            std::fill_n(projected, rows * width, 0.0F);
            kernels.weighted_sum_f32(scratch, dim, rows, wo[g * dim].data(), wo.stride, dim, width, projected,
                                     width);
            for (std::size_t j = 0; j < rows; ++j)
                for (std::size_t c = 0; c < width; ++c)
                    sums[j] += static_cast<double>(std::abs(projected[j * width + c]));
        }
        for (std::size_t j = 0; j < rows; ++j)
            out[first + j] = static_cast<float>(sums[j] / static_cast<double>(group));
    }
}

/// CriticalKV (arXiv 2502.03805): a head keeps its protected rows, then its best by the base's score until it
/// has `half_permille` of its size, then the best by (score + eps) * norm, where norm is what the value
/// weighs after the output projection. Base parameters, state and triggers are the base's. Cost: the base's,
/// its scores a second time, and 2 q_heads n value_dim D flops per layer and eviction.
template <CriticalBase Base>
struct Critical : Base {
    static constexpr std::string_view name = "critical";
    Projections projection = {};
    std::size_t half_permille = 500;  // at most 1000
    std::size_t safe = 0;             // rows that the first stage has at least, protected ones included
    float eps = 1e-4F;                // >= 0

    void check(std::size_t budget) const {
        using error::config_error;
        if constexpr (Checked<Base>) Base::check(budget);
        detail::check<config_error>(half_permille <= 1000, name, "half_permille", half_permille,
                                    "at most 1000");
        detail::check<config_error>(is_finite(eps) && eps >= 0, name, "eps", eps,
                                    "a finite number, not negative");
    }
    void check_projection(std::size_t layers, std::size_t rows) const {
        using error::config_error;
        detail::check<config_error>(projection.size() == layers, name, "number of projections",
                                    projection.size(), layers);
        for (const MatrixView<const float>& wo : projection)
            detail::check<config_error>(wo.rows == rows, name, "rows of a projection", wo.rows,
                                        detail::text("q_heads * value_dim = ", rows));
    }
    [[nodiscard]] std::size_t wrapper_workspace(std::size_t rows, std::size_t /*group*/,
                                                std::size_t dim) const {
        std::size_t width = 0;
        for (const auto& wo : projection) width = std::max(width, wo.cols);
        return 2 * rows + projected_scratch(dim, width);
    }
    /// |v Wo|_1 of every row of a head, mean over its query heads; out[n].
    void norms(const HeadStep& step, std::span<float> out, float* scratch) const {
        const std::size_t rows = step.group * step.cached.v.dim();
        const MatrixView<const float>& wo = projection[step.layer];
        projected_norms(*step.kernels, step.cached.v, {wo[step.head * rows].data(), rows, wo.cols, wo.stride},
                        step.group, out, scratch);
    }
    void select(const typename Base::State& state, const HeadStep& step, std::span<const std::uint8_t> fixed,
                std::size_t count, std::vector<index_t>& keep) const {
        const std::size_t n = step.n();
        float* const memory =
            step.wrapper_workspace->get(wrapper_workspace(n, step.group, step.cached.v.dim()));
        const std::span<float> scores(memory, n), weighed(memory + n, n);
        norms(step, weighed, memory + 2 * n);
        Base::score(state, step, scores);
        for (std::size_t j = 0; j < n; ++j) weighed[j] *= scores[j] + eps;

        std::size_t stay = 0;
        for (std::size_t j = 0; j < n; ++j)
            if (fixed[j] == 0)
                keep.push_back(static_cast<index_t>(j));
            else
                ++stay;
        const std::size_t places = count - stay, share = std::max(half_permille * count / 1000, safe);
        const std::size_t first = std::min(share - std::min(share, stay), places);
        const auto take = [&](std::size_t from, std::size_t to, std::span<const float> by) {
            const auto at = [&](std::size_t i) { return keep.begin() + static_cast<std::ptrdiff_t>(i); };
            std::nth_element(at(from), at(to), keep.end(), [&](index_t a, index_t b) {
                const auto i = static_cast<std::size_t>(a), j = static_cast<std::size_t>(b);
                const std::uint32_t one = score_order(by[i]), other = score_order(by[j]);
                return one != other ? one > other : step.cached.position[i] > step.cached.position[j];
            });
        };
        take(0, first, scores);
        take(first, places, weighed);
        keep.resize(places);
        for (std::size_t j = 0; j < n; ++j)
            if (fixed[j] != 0) keep.push_back(static_cast<index_t>(j));
        std::sort(keep.begin(), keep.end());
    }
};

}  // namespace kvcull::inline KVCULL_ABI
