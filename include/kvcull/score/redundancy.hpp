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
            load(near_, first);
            if (meet_itself(found)) load(near_, first);
            for (std::size_t other = first + tile_; other < n; other += tile_) {
                if (near_.seekers == 0 && !any_open(other)) continue;
                load(far_, other);
                if (meet(found)) load(near_, first);
            }
        }
        finish(none);
    }

  private:
    struct Tile {
        float* unit;  // [count, dim], keys without a link first
        std::array<std::size_t, link_tile> row = {};
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
    /// product_[a, b] = cosine of query a and key b.
    void multiply(const float* queries, std::size_t rows, const float* keys, std::size_t count) noexcept {
        const std::size_t dim = keys_.dim();
        kernels_.dots_f32(queries, dim, rows, keys, dim, count, dim, 1.0F, product_, tile_);
    }
    void consider(Link& link, std::size_t row, float cosine) const noexcept {
        if (!(cosine > threshold_)) return;
        if (!link.found || (row > link.row) == (retain_ == Retain::last)) link = {row, cosine, true};
    }
    /// All of a row of products with the keys `rows`; most rows hold no hit, and one look shows it.
    void consider_all(Link& link, const float* cosines, std::size_t count, const std::size_t* rows) const {
        float least = 0.0F, most = 0.0F;
        double sum = 0.0;
        kernels_.summarise(cosines, count, &least, &most, &sum);
        if (!(most > threshold_))
            return;  // `most` is never below 0: with a threshold there all are looked at
        for (std::size_t b = 0; b < count; ++b) consider(link, rows[b], cosines[b]);
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
        multiply(near_.unit, near_.seekers, near_.unit, near_.count);
        for (std::size_t a = 0; a < near_.seekers; ++a) {
            float* const cosines = product_ + a * tile_;
            cosines[a] = 0.0F;  // no link to oneself, but a 0 above a threshold below 0
            Link link;
            consider_all(link, cosines, near_.count, near_.row.data());
            changed |= settle(near_.row[a], link, found);
        }
        return changed;
    }
    template <class Found>
    bool meet(const Found& found) {
        std::array<Link, link_tile> links = {};
        const std::size_t seekers = near_.seekers;
        multiply(far_.unit, far_.seekers, near_.unit, near_.count);
        std::fill_n(highest_, seekers, negative_infinity());
        for (std::size_t a = 0; a < far_.seekers; ++a)
            kernels_.maximum(highest_, product_ + a * tile_, seekers);
        for (std::size_t b = 0; b < seekers; ++b)
            for (std::size_t a = 0; highest_[b] > threshold_ && a < far_.seekers; ++a)
                consider(links[b], far_.row[a], product_[a * tile_ + b]);
        for (std::size_t a = 0; a < far_.seekers; ++a) {
            Link link;
            consider_all(link, product_ + a * tile_, near_.count, near_.row.data());
            settle(far_.row[a], link, found);
        }

        const std::size_t others = far_.count - far_.seekers;
        if (seekers > 0 && others > 0) {
            multiply(near_.unit, seekers, far_.unit + far_.seekers * keys_.dim(), others);
            for (std::size_t b = 0; b < seekers; ++b)
                consider_all(links[b], product_ + b * tile_, others, far_.row.data() + far_.seekers);
        }
        bool changed = false;
        for (std::size_t b = 0; b < seekers; ++b) changed |= settle(near_.row[b], links[b], found);
        return changed;
    }
    template <class None>
    void finish(const None& none) {
        if (keys_.rows() == 0) return;
        load_unit(0, far_.unit);
        for (std::size_t first = 0; first < keys_.rows(); first += tile_) {
            if (!any_open(first)) continue;
            load(near_, first);
            multiply(far_.unit, 1, near_.unit, near_.seekers);
            for (std::size_t b = 0; b < near_.seekers; ++b) none(near_.row[b], product_[b]);
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
/// in any key makes all of it NaN.
/// Cost: O(n dim) for the means, since the sum of cosines is the cosine with the sum; n^2 dim / 2
/// multiply-adds for the links at most, far less where keys are alike. Memory: never n x n.
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
