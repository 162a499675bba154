#pragma once
/// How much a layer's keys depend on far context: the profile behind the budget rule BySimilarity. Run one
/// long text twice, with causal attention and with `BlockMask`, and compare the keys of the two caches.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "../base/error.hpp"
#include "../views.hpp"

namespace kvcull::inline KVCULL_ABI {

/// A token sees the sinks, its own block up to itself, and the end of the block before.
struct BlockMask {
    std::size_t block = 4096, sinks = 128, overlap = 2048;

    /// What token `i` sees, as `attend` takes it.
    /// @throws config_error if the block has no token or fewer than the sinks
    [[nodiscard]] Visible row(std::size_t i) const {
        detail::check<error::config_error>(block >= 1 && sinks <= block, "BlockMask", "block", block,
                                           detail::text("at least 1 and the ", sinks, " sinks"));
        const std::size_t own = i / block * block;
        return {std::min(sinks, i + 1), own - std::min({overlap, block, own}), i + 1};
    }
};

/// What is compared: every key alone, or the keys of `window` tokens laid end to end (the published code).
enum class KeySimilarity : std::uint8_t { token, window };
[[nodiscard]] constexpr auto names_of(KeySimilarity /*any*/) noexcept {
    return std::array<std::string_view, 2>{"token", "window"};
}

namespace detail {

/// Mean cosine of the windows of two runs of keys; two windows of zeros count as alike.
struct CosineSum {
    double sum = 0;
    std::size_t count = 0;

    void add(const RowsView& a, const RowsView& b, std::size_t window) {
        std::vector<float> x(a.dim()), y(a.dim());
        for (std::size_t begin = 0; begin < a.rows(); begin += window) {
            double both = 0, left = 0, right = 0;
            for (std::size_t j = begin; j < std::min(a.rows(), begin + window); ++j) {
                a.widen(j, x);
                b.widen(j, y);
                for (std::size_t c = 0; c < x.size(); ++c) {
                    both += static_cast<double>(x[c]) * static_cast<double>(y[c]);
                    left += static_cast<double>(x[c]) * static_cast<double>(x[c]);
                    right += static_cast<double>(y[c]) * static_cast<double>(y[c]);
                }
            }
            const double norm = std::sqrt(left) * std::sqrt(right);
            sum += left == 0 && right == 0 ? 1.0 : norm == 0 ? 0.0 : both / norm;
            ++count;
        }
    }
};

}  // namespace detail

/// Similarity per layer of the keys of two caches of the same tokens, mean over heads and tokens or windows
/// (the last one may be shorter). The first layer is 1 whatever was measured: its keys depend on no
/// attention. Rotation changes nothing, so keys are taken as cached. Cost: one pass over both.
/// @param full, masked [layers * kv_heads] keys in the order of tokens  @throws shape_error, config_error
[[nodiscard]] inline std::vector<float> layer_similarity(CacheView full, CacheView masked,
                                                         KeySimilarity measure = KeySimilarity::token,
                                                         std::size_t window = 100) {
    constexpr std::string_view where = "layer_similarity";
    detail::check_size(where, "masked.kv_heads", masked.kv_heads, full.kv_heads);
    detail::check_size(where, "masked.heads.size()", masked.heads.size(), full.heads.size());
    detail::check<error::config_error>(window >= 1, where, "window", window, "at least 1");
    for (std::size_t i = 0; i < full.heads.size(); ++i) {
        const RowsView &a = full.heads[i].k, &b = masked.heads[i].k;
        detail::check<error::shape_error>(a.rows() > 0, where, detail::text("full.heads[", i, "].k.rows()"),
                                          a.rows(), "at least 1");
        detail::check_size(where, detail::text("masked.heads[", i, "].k.rows()"), b.rows(), a.rows());
        detail::check_size(where, detail::text("masked.heads[", i, "].k.dim()"), b.dim(), a.dim());
    }
    std::vector<float> similarity(full.kv_heads == 0 ? 0 : full.heads.size() / full.kv_heads);
    for (std::size_t layer = 0; layer < similarity.size(); ++layer) {
        detail::CosineSum mean;
        for (std::size_t h = 0; h < full.kv_heads; ++h)
            mean.add(full.layer(layer)[h].k, masked.layer(layer)[h].k,
                     measure == KeySimilarity::token ? 1 : window);
        similarity[layer] =
            layer == 0 ? 1.0F : static_cast<float>(mean.sum / static_cast<double>(mean.count));
    }
    return similarity;
}

}  // namespace kvcull::inline KVCULL_ABI
