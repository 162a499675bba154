#pragma once
/// How much every key of a head says what others say already (R-KV): its mean cosine with all of them, less
/// one link per key, so that one of a group of alike keys survives.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "../attention/row_kernels.hpp"
#include "similarity.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Whose link a key spares: that to the newest or to the oldest of the keys like it.
enum class Retain : std::uint8_t { last, first };
[[nodiscard]] constexpr auto names_of(Retain /*any*/) noexcept {
    return std::array<std::string_view, 2>{"last", "first"};
}

namespace detail {

/// Joins the norm of a key before it divides: a zero key has cosine 0 with all others.
inline constexpr float norm_epsilon = 1e-8F;
/// Keys whose products with each other are held at a time.
inline constexpr std::size_t link_tile = 128;
[[nodiscard]] constexpr std::size_t link_scratch(std::size_t n, std::size_t dim) noexcept {
    const std::size_t tile = std::min(n, link_tile);
    return tile * (2 * dim + tile + 1);
}

/// The search for the link that each key spares: of the keys whose cosine with it is above the threshold, the
/// one that stands first in the order of preference. Tiles of keys meet in that order, every pair of tiles
/// once for both sides, so that the first hit is the one; keys that have found theirs are not multiplied
/// again.
class LinkSearch {
  public:
    /// @param inverse  [n], 1 / (norm + epsilon). @param open  [n], 1 on entry; 0 for keys that found a link.
    /// @param scratch  `link_scratch(n, dim)` floats.
    LinkSearch(const simd::Kernels& kernels, const RowsView& keys, std::span<const float> inverse,
               float threshold, Retain retain, std::span<float> open, float* scratch) noexcept
        : kernels_(kernels),
          keys_(keys),
          inverse_(inverse),
          open_(open),
          threshold_(threshold),
          retain_(retain),
          tile_(std::min(keys.rows(), link_tile)),
          near_{scratch},
          far_{scratch + tile_ * keys.dim()},
          product_(scratch + 2 * tile_ * keys.dim()),
          highest_(product_ + tile_ * tile_) {}

    /// Calls `found(key, other, cosine)` once for each key that has a link, and `none(key, cosine)` with the
    /// cosine with key 0 for the others. Cost: at most n^2 dim / 2 multiply-adds, O(n dim) if every key is
    /// like the one that is preferred to all.
    template <class Found, class None>
    void run(const Found& found, const None& none) {
        const std::size_t n = keys_.rows();
        for (std::size_t first = 0; first < n; first += tile_) {
            load_near(first);
            if (meet_itself(found)) load_near(first);
            for (std::size_t other = first + tile_; other < n; other += tile_) {
                if (near_.seekers == 0 && !any_open(other)) continue;
                load(far_, other);
                if (meet(found)) load_near(first);
            }
        }
        finish(none);
    }

  private:
    struct Tile {
        /// far: [count, dim]; near: [dim, tile], so that products need no sum across a register
        float* unit;
        std::array<std::size_t, link_tile> row = {};  // of each unit key; those without a link come first
        std::size_t count = 0, seekers = 0;
    };
    struct Link {
        std::size_t row = 0;
        float cosine = 0.0F;
        bool found = false;
    };

    [[nodiscard]] std::size_t row_at(std::size_t rank) const noexcept {
        return retain_ == Retain::last ? keys_.rows() - 1 - rank : rank;
    }
    [[nodiscard]] bool any_open(std::size_t first) const noexcept {
        for (std::size_t rank = first; rank < std::min(first + tile_, keys_.rows()); ++rank)
            if (open_[row_at(rank)] != 0.0F) return true;
        return false;
    }
    void load_unit(std::size_t row, float* out) const noexcept {
        std::fill_n(out, keys_.dim(), 0.0F);
        weighted_sum(kernels_, &inverse_[row], 1, 1, keys_, {keys_.row(row), row, 1}, out, keys_.dim());
    }
    void load(Tile& tile, std::size_t first) const noexcept {
        const std::size_t end = std::min(first + tile_, keys_.rows());
        tile.count = 0;
        for (const bool open : {true, false}) {
            for (std::size_t rank = first; rank < end; ++rank) {
                const std::size_t row = row_at(rank);
                if ((open_[row] != 0.0F) != open) continue;
                load_unit(row, tile.unit + tile.count * keys_.dim());
                tile.row[tile.count++] = row;
            }
            if (open) tile.seekers = tile.count;
        }
    }
    /// The keys come through the far tile, which holds them until it is loaded again.
    void load_near(std::size_t first) noexcept {
        load(far_, first);
        near_.row = far_.row;
        near_.count = far_.count;
        near_.seekers = far_.seekers;
        // Few rows are written side by side: more would push each other out of the cache.
        constexpr std::size_t side = 16;
        const std::size_t dim = keys_.dim();
        for (std::size_t begin = 0; begin < dim; begin += side)
            for (std::size_t b = 0; b < near_.count; ++b)
                for (std::size_t c = begin; c < std::min(begin + side, dim); ++c)
                    near_.unit[c * tile_ + b] = far_.unit[b * dim + c];
    }
    /// product_[a, b] = cosine of far keys `first .. last - 1` and the first `count` near keys.
    void multiply(std::size_t first, std::size_t last, std::size_t count) noexcept {
        for (std::size_t a = first; a < last; ++a) std::fill_n(product_ + a * tile_, count, 0.0F);
        const std::size_t dim = keys_.dim();
        kernels_.weighted_sum_f32(far_.unit + first * dim, dim, last - first, near_.unit, tile_, dim, count,
                                  product_ + first * tile_, tile_);
    }
    void consider(Link& link, std::size_t row, float cosine) const noexcept {
        if (!(cosine > threshold_)) return;
        if (!link.found || (row > link.row) == (retain_ == Retain::last)) link = {row, cosine, true};
    }
    /// The best link among the near keys; most rows hold no hit, and one look shows it.
    [[nodiscard]] Link best_near(const float* cosines) const noexcept {
        float least = 0.0F, most = 0.0F;
        double sum = 0.0;
        kernels_.summarise(cosines, near_.count, &least, &most, &sum);
        Link link;
        // `most` is never below 0: with a threshold there all are looked at.
        for (std::size_t b = 0; most > threshold_ && b < near_.count; ++b)
            consider(link, near_.row[b], cosines[b]);
        return link;
    }
    template <class Found>
    bool settle(std::size_t row, const Link& link, const Found& found) {
        if (!link.found) return false;
        open_[row] = 0.0F;
        found(row, link.row, link.cosine);
        return true;
    }

    /// Both: @returns whether a key of the near tile found its link.
    template <class Found>
    bool meet_itself(const Found& found) {
        bool changed = false;
        multiply(0, far_.seekers, near_.count);
        for (std::size_t a = 0; a < far_.seekers; ++a) {
            float* const cosines = product_ + a * tile_;
            cosines[a] = 0.0F;  // no link to oneself, but a 0 above a threshold below 0
            changed |= settle(far_.row[a], best_near(cosines), found);
        }
        return changed;
    }
    template <class Found>
    bool meet(const Found& found) {
        const std::size_t seekers = near_.seekers;
        multiply(0, far_.seekers, near_.count);
        if (seekers > 0) multiply(far_.seekers, far_.count, seekers);
        std::fill_n(highest_, seekers, negative_infinity());
        for (std::size_t a = 0; a < far_.count; ++a)
            kernels_.maximum(highest_, product_ + a * tile_, seekers);
        bool changed = false;
        for (std::size_t b = 0; b < seekers; ++b) {
            Link link;
            for (std::size_t a = 0; highest_[b] > threshold_ && a < far_.count; ++a)
                consider(link, far_.row[a], product_[a * tile_ + b]);
            changed |= settle(near_.row[b], link, found);
        }
        for (std::size_t a = 0; a < far_.seekers; ++a)
            settle(far_.row[a], best_near(product_ + a * tile_), found);
        return changed;
    }
    template <class None>
    void finish(const None& none) {
        float* const oldest = near_.unit;  // [dim]
        if (keys_.rows() > 0) load_unit(0, oldest);
        for (std::size_t first = 0; first < keys_.rows(); first += tile_) {
            if (!any_open(first)) continue;
            load(far_, first);
            kernels_.dots_f32(oldest, 0, 1, far_.unit, keys_.dim(), far_.seekers, keys_.dim(), 1.0F, product_,
                              tile_);
            for (std::size_t a = 0; a < far_.seekers; ++a) none(far_.row[a], product_[a]);
        }
    }

    const simd::Kernels& kernels_;
    const RowsView& keys_;
    std::span<const float> inverse_;
    std::span<float> open_;
    float threshold_;
    Retain retain_;
    std::size_t tile_;
    Tile near_, far_;
    float *product_, *highest_;
};

}  // namespace detail

/// Floats of scratch that `redundancy` takes.
[[nodiscard]] constexpr std::size_t redundancy_scratch(std::size_t n, std::size_t dim) noexcept {
    return 2 * n + std::max(detail::link_scratch(n, dim), 2 * dim);
}

/// Redundancy of every key of a head: softmax over all keys of their mean cosine with the n keys, where the
/// cosine with oneself counts 0 and so does the link that each key spares: that to the `retain` one of the
/// keys whose cosine with it is above `threshold`, or to key 0 if there is none. Sums to 1. A NaN or infinity
/// in any key makes all of it NaN. Cost: O(n dim) for the means, since the sum of cosines is the cosine with
/// the sum; n^2 dim / 2 multiply-adds for the links at most, far less where keys are alike. Memory: O(n).
/// @param out  [n]. @param scratch  `redundancy_scratch(n, keys.dim())` floats.
inline void redundancy(const simd::Kernels& kernels, const RowsView& keys, float threshold, Retain retain,
                       std::span<float> out, float* scratch) {
    const std::size_t n = keys.rows(), dim = keys.dim();
    if (n == 0) return;
    const std::span<float> inverse(scratch, n), open(scratch + n, n);
    const std::span<float> row(scratch + 2 * n, dim), total(scratch + 2 * n + dim, dim);
    const float one = 1.0F;
    std::fill(total.begin(), total.end(), 0.0F);
    for (std::size_t j = 0; j < n; ++j) {
        const RowsView::Run run{keys.row(j), j, 1};
        std::fill(row.begin(), row.end(), 0.0F);
        detail::weighted_sum(kernels, &one, 1, 1, keys, run, row.data(), dim);  // a copy, widened
        const float norm = euclidean_norm(kernels, row);
        if (!is_finite(norm) &&
            !std::all_of(row.begin(), row.end(), [](const float& x) { return is_finite(x); })) {
            std::fill(out.begin(), out.end(), quiet_nan());
            return;
        }
        inverse[j] = 1.0F / (norm + detail::norm_epsilon);
        detail::weighted_sum(kernels, &inverse[j], 1, 1, keys, run, total.data(), dim);
    }
    detail::for_each_piece(keys, 0, n, [&](const RowsView::Run& piece, const std::byte* next) {
        detail::dots(kernels, total.data(), dim, 1, keys, piece, 1.0F, out.data() + piece.first, n, next);
    });
    for (std::size_t j = 0; j < n; ++j) {
        const float own = 1.0F - detail::norm_epsilon * inverse[j];  // the norm of the unit key
        out[j] = out[j] * inverse[j] - own * own;
        open[j] = 1.0F;
    }
    detail::LinkSearch search(kernels, keys, inverse, threshold, retain, open, row.data());
    search.run([&](std::size_t /*key*/, std::size_t other, float cosine) { out[other] -= cosine; },
               [&](std::size_t key, float cosine) { out[0] -= key == 0 ? 0.0F : cosine; });
    const float share = 1.0F / static_cast<float>(n);
    for (float& x : out) x *= share;
    float lse = 0.0F;
    kernels.softmax(out.data(), n, &lse);
}

}  // namespace kvcull::inline KVCULL_ABI
