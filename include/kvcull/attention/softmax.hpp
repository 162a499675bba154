#pragma once
/// Merging attention over parts of a cache: each part gives a normalised output and its log-sum-exp.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include "../base/error.hpp"
#include "../base/types.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Merges two partial results of one query row over disjoint sets of cached rows: afterwards `out` and `lse`
/// are what one softmax over the union gives. Associative up to rounding.
/// @param out, other  [d_v], normalised outputs. @param lse, other_lse  their log-sum-exps; -Inf: the part
/// saw
///                    nothing and does not count, whatever its output holds; NaN or +Inf: a bad row, and the
///                    result is a bad row too (output and lse NaN).
/// @throws shape_error if the sizes differ.
inline void merge(std::span<float> out, float& lse, std::span<const float> other, const float& other_lse) {
    detail::check_size("merge", "other.size()", other.size(), out.size());
    const auto empty = [](const float& x) {
        return std::bit_cast<std::uint32_t>(x) == negative_infinity_bits;
    };
    if ((!is_finite(lse) && !empty(lse)) || (!is_finite(other_lse) && !empty(other_lse))) {
        constexpr float nan = quiet_nan();
        std::fill(out.begin(), out.end(), nan);
        lse = nan;
        return;
    }
    if (empty(other_lse)) return;
    if (empty(lse)) {
        std::copy(other.begin(), other.end(), out.begin());
        lse = other_lse;
        return;
    }
    const double largest = std::max(lse, other_lse);
    const double mine = std::exp(static_cast<double>(lse) - largest);
    const double theirs = std::exp(static_cast<double>(other_lse) - largest);
    const double sum = mine + theirs;
    for (std::size_t c = 0; c < out.size(); ++c)
        out[c] = static_cast<float>(
            (mine * static_cast<double>(out[c]) + theirs * static_cast<double>(other[c])) / sum);
    lse = static_cast<float>(largest + std::log(sum));
}

}  // namespace kvcull::inline KVCULL_ABI
