#pragma once
/// How much every key of a head says what others say already (R-KV): its mean cosine with all of them, less
/// one link per key, so that one of a group of alike keys survives.

#include <algorithm>
#include <cstddef>
#include <span>

#include "key_links.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Floats of scratch that `redundancy` takes.
[[nodiscard]] constexpr std::size_t redundancy_scratch(std::size_t n, std::size_t dim) noexcept {
    return 2 * (n + dim);
}

/// Redundancy of every key of a head: softmax over all keys of their mean cosine with the n keys, where the
/// cosine with oneself counts 0 and so does the link that each key spares: that to the key of `links`, or to
/// key 0 if there is none. Sums to 1. Cost: two passes over the keys, O(n dim), since the sum of cosines is
/// the cosine with the sum.
/// @param links  as `find_links` leaves them. @param out  [n].
/// @param scratch  `redundancy_scratch(n, keys.dim())` floats.
/// @returns false if `links` are not those of these keys; `out` is then worth nothing.
[[nodiscard]] inline bool redundancy(const simd::Kernels& kernels, const RowsView& keys,
                                     const PositionsView& position, const KeyLinks& links,
                                     std::span<float> out, float* scratch) {
    const std::size_t n = keys.rows(), dim = keys.dim();
    if (links.link.rows() != n) return false;
    if (n == 0) return true;
    const std::span<const float> inverse = links.inverse.values();
    float *const total = scratch, *const oldest = scratch + dim;
    const std::span<float> with_all(scratch + 2 * dim, n), with_oldest(scratch + 2 * dim + n, n);
    std::fill_n(total, 2 * dim, 0.0F);
    detail::for_each_piece(keys, 0, n, [&](const RowsView::Run& piece, const std::byte* next) {
        detail::weighted_sum(kernels, inverse.data() + piece.first, n, 1, keys, piece, total, dim, next);
    });
    detail::weighted_sum(kernels, inverse.data(), n, 1, keys, {keys.row(0), 0, 1}, oldest, dim);
    detail::for_each_piece(keys, 0, n, [&](const RowsView::Run& piece, const std::byte* next) {
        detail::dots(kernels, total, dim, 2, keys, piece, 1.0F, with_all.data() + piece.first, n, next);
    });
    for (std::size_t j = 0; j < n; ++j) {
        const float own = 1.0F - detail::norm_epsilon * inverse[j];  // the norm of the unit key
        out[j] = with_all[j] * inverse[j] - own * own;
    }
    position_t last = KeyLinks::none;
    std::size_t linked = 0;
    for (std::size_t j = 0; j < n; ++j) {
        const position_t link = links.link[j];
        if (link == KeyLinks::unseen || link == KeyLinks::lost) return false;
        if (link == KeyLinks::none) {
            if (j > 0) out[0] -= with_oldest[j] * inverse[j];
            continue;
        }
        if (link != last) linked = detail::row_of(position, ~(last = link));
        if (linked == n) return false;
        out[linked] -= links.cosine[j];
    }
    const float share = 1.0F / static_cast<float>(n);
    for (float& x : out) x *= share;
    float lse = 0.0F;
    kernels.softmax(out.data(), n, &lse);
    return true;
}

}  // namespace kvcull::inline KVCULL_ABI
