#pragma once
/// Which key is how much like which: for every key of a head the one link that R-KV's redundancy spares. Keys
/// that stay do not change, so what is known of them stays true, and a decision compares new keys only.

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <tuple>

#include "../attention/row_kernels.hpp"
#include "link_screen.hpp"
#include "similarity.hpp"
#include "state.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Whose link a key spares: that to the newest or to the oldest of the keys like it.
enum class Retain : std::uint8_t { last, first };
[[nodiscard]] constexpr auto names_of(Retain /*any*/) noexcept {
    return std::array<std::string_view, 2>{"last", "first"};
}
/// Which keys are alike, and which of them counts.
struct LinkRule {
    float threshold = 0.5F;  // cosine above it
    Retain retain = Retain::last;

    friend bool operator==(const LinkRule&, const LinkRule&) = default;
};

/// The links of a head's keys, found once. State: 16 bytes per token and KV head.
struct KeyLinks {
    /// A key that was compared with no other; one that is like none; one whose like has gone. All other
    /// entries are the complement of a position.
    static constexpr position_t unseen = 0, none = 1, lost = 2;

    RowArray<position_t> link;
    RowArray<float> cosine;   // with the linked key
    RowArray<float> inverse;  // 1 / (norm + norm_epsilon)
    float threshold = 0.0F;   // of the rule by which they were found
    bool oldest = false;

    [[nodiscard]] auto arrays() noexcept { return std::tie(link, cosine, inverse); }
    [[nodiscard]] auto parts() noexcept { return std::tie(threshold, oldest); }
};

namespace detail {

/// Joins the norm of a key before it divides: a zero key has cosine 0 with all others.
inline constexpr float norm_epsilon = 1e-8F;
/// Keys whose products with each other are held at a time, and how many of a tile tell whether the screen
/// excludes enough of them.
inline constexpr std::size_t link_tile = 128, link_probe = 16;

/// The row at `wanted` among ascending positions; their number if there is none.
[[nodiscard]] inline std::size_t row_of(const PositionsView& position, position_t wanted) noexcept {
    std::size_t low = 0, high = position.size();
    while (low < high) {
        const std::size_t middle = low + (high - low) / 2;
        if (position[middle] < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return low < position.size() && position[low] == wanted ? low : position.size();
}

/// The search for the links of keys that have none yet, by which keys that have one may find a better one.
/// Open keys (unseen or lost) come first, then the others, each in the order of preference. Tiles of open
/// keys meet all that come after them, every pair of tiles once for both sides, so that in most cases the
/// first hit is the one; keys that cannot find a better one are not multiplied again. A cosine has the same
/// bits in whatever tiles it is computed, so links do not depend on when they were searched.
class LinkSearch {
  public:
    /// @param scratch  `link_scratch(n, dim)` floats.
    LinkSearch(const simd::Kernels& kernels, const RowsView& keys, const PositionsView& position,
               const LinkRule& rule, KeyLinks& links, float* scratch) noexcept
        : kernels_(kernels),
          keys_(keys),
          position_(position),
          rule_(rule),
          links_(links),
          tile_(std::min(keys.rows(), link_tile)),
          list_(scratch),
          near_{list_ + keys.rows()},
          far_{near_.unit + tile_ * keys.dim()},
          product_(far_.unit + tile_ * keys.dim()),
          highest_(product_ + tile_ * tile_),
          screens_(LinkScreen::pays(kernels, keys.dim())),
          screen_(kernels, tile_, keys.dim(), highest_ + tile_) {}

    /// Cost: open keys x all keys x dim multiply-adds, half of that if all are open; O(n dim) if every key is
    /// like the one that is preferred to all. Where integers are fast, of bytes, and of floats for those keys
    /// that may be like one of a tile.
    void run() noexcept {
        const std::size_t n = keys_.rows();
        list_keys();
        for (std::size_t first = 0; first < open_; first += tile_) {
            const std::size_t last = std::min(first + tile_, open_);
            near_.count = 0;  // not loaded yet
            if (seekers(first, last, best_from(first)) > 0) {
                load_near(first, last, best_from(first));
                meet_itself();
            }
            for (std::size_t other = last; other < n; other += tile_) {
                const std::size_t end = std::min(other + tile_, n);
                const position_t best = best_from(other), best_near = position_[row(first)];
                const std::size_t seeking = seekers(first, last, best);
                if (seeking == 0 && seekers(other, end, best_near) == 0) continue;
                // Loading costs more than multiplying a few that need not seek any more.
                if (near_.count == 0 || 2 * seeking < near_.seekers) load_near(first, last, best);
                list(far_, other, end, best_near);
                if (screens_) sift();
                if (far_.count == 0) continue;
                load_far();
                meet();
            }
        }
        for (std::size_t i = 0; i < open_; ++i)
            if (position_t& link = links_.link[row(i)]; link >= 0) link = KeyLinks::none;
    }

  private:
    struct Tile {
        /// far: [count, dim]; near: [dim, count], so that products need no sum across a register
        float* unit;
        std::array<std::size_t, link_tile> row = {};  // of each unit key; those that seek come first
        std::size_t count = 0, seekers = 0;
    };
    struct Hit {
        position_t position = 0;
        float cosine = 0.0F;
        bool found = false;
    };

    void list_keys() noexcept {
        std::size_t count = 0;
        for (const bool open : {true, false}) {
            for (std::size_t rank = 0; rank < keys_.rows(); ++rank) {
                const std::size_t row = rule_.retain == Retain::last ? keys_.rows() - 1 - rank : rank;
                const position_t link = links_.link[row];
                if ((link == KeyLinks::unseen || link == KeyLinks::lost) == open)
                    list_[count++] = std::bit_cast<float>(static_cast<index_t>(row));
            }
            if (open) open_ = count;
        }
    }
    [[nodiscard]] std::size_t row(std::size_t listed) const noexcept {
        return static_cast<std::size_t>(std::bit_cast<index_t>(list_[listed]));
    }
    [[nodiscard]] bool prefers(position_t a, position_t b) const noexcept {
        return rule_.retain == Retain::last ? a > b : a < b;
    }
    /// The most preferred of the keys from `listed` on.
    [[nodiscard]] position_t best_from(std::size_t listed) const noexcept {
        const position_t first = position_[row(listed)];
        if (listed >= open_ || open_ == keys_.rows()) return first;
        const position_t other = position_[row(open_)];
        return prefers(other, first) ? other : first;
    }
    /// Whether a key may be better linked with one at `best`.
    [[nodiscard]] bool seeks(std::size_t row, position_t best) const noexcept {
        const position_t link = links_.link[row];
        return link >= 0 || prefers(best, ~link);
    }
    [[nodiscard]] std::size_t seekers(std::size_t first, std::size_t last, position_t best) const noexcept {
        std::size_t count = 0;
        for (std::size_t i = first; i < last; ++i) count += seeks(row(i), best) ? 1 : 0;
        return count;
    }
    void list(Tile& tile, std::size_t first, std::size_t last, position_t best) const noexcept {
        std::array<std::size_t, link_tile> others;
        std::size_t seeking = 0, rest = 0;
        for (std::size_t i = first; i < last; ++i) {  // both are written: who seeks is hard to predict
            const std::size_t j = row(i);
            const bool yes = seeks(j, best);
            tile.row[seeking] = others[rest] = j;
            seeking += yes ? 1 : 0;
            rest += yes ? 0 : 1;
        }
        std::copy_n(others.begin(), rest, tile.row.begin() + static_cast<std::ptrdiff_t>(seeking));
        tile.seekers = seeking;
        tile.count = seeking + rest;
    }
    /// out[dim] = factor * key
    void scale_key(std::size_t row, const float& factor, float* out) const noexcept {
        std::fill_n(out, keys_.dim(), 0.0F);
        weighted_sum(kernels_, &factor, 1, 1, keys_, {keys_.row(row), row, 1}, out, keys_.dim());
    }
    void load_far() noexcept {
        for (std::size_t a = 0; a < far_.count; ++a)
            scale_key(far_.row[a], links_.inverse[far_.row[a]], far_.unit + a * keys_.dim());
    }
    /// The keys come through the far tile, which holds them until it is loaded again.
    void load_near(std::size_t first, std::size_t last, position_t best) noexcept {
        list(far_, first, last, best);
        load_far();
        near_.row = far_.row;
        near_.count = far_.count;
        near_.seekers = far_.seekers;
        // Few rows are written side by side: more would push each other out of the cache.
        constexpr std::size_t side = 16;
        const std::size_t dim = keys_.dim();
        for (std::size_t begin = 0; begin < dim; begin += side)
            simd::transpose(far_.unit + begin, dim, std::min(side, dim - begin), near_.count,
                            near_.unit + begin * near_.count);
        if (screens_) screen_.take_tile(far_.unit, far_.count);
    }
    /// The key as floats, in `memory` unless it is stored so.
    [[nodiscard]] const float* floats_of(std::size_t row, float* memory) const noexcept {
        if (keys_.dtype() == DType::f32 && !keys_.are_columns())
            return reinterpret_cast<const float*>(keys_.row(row));
        scale_key(row, 1.0F, memory);
        return memory;
    }
    /// Leaves only the far keys that may be like a near one. If half of the first ones may, the others go
    /// unasked: the screen would cost more than it spares.
    void sift() noexcept {
        const std::size_t listed = far_.count, seeking = far_.seekers;
        far_.count = far_.seekers = 0;
        for (std::size_t first = 0, last = std::min(link_probe, listed); first < listed;
             first = last, last = listed) {
            const bool ask = 2 * far_.count <= first;
            for (std::size_t a = first; ask && a < last; ++a)
                screen_.take(a - first, floats_of(far_.row[a], far_.unit), links_.inverse[far_.row[a]]);
            if (ask) screen_.bound(last - first, highest_);
            for (std::size_t a = first; a < last; ++a) {
                if (ask && highest_[a - first] <= rule_.threshold) continue;
                far_.row[far_.count++] = far_.row[a];
                if (a < seeking) ++far_.seekers;
            }
        }
    }
    /// product_[a, b] = cosine of far keys `first .. last - 1` and the first `count` near keys.
    void multiply(std::size_t first, std::size_t last, std::size_t count) noexcept {
        for (std::size_t a = first; a < last; ++a) std::fill_n(product_ + a * tile_, count, 0.0F);
        const std::size_t dim = keys_.dim();
        kernels_.weighted_sum_f32(far_.unit + first * dim, dim, last - first, near_.unit, near_.count, dim,
                                  count, product_ + first * tile_, tile_);
    }
    void consider(Hit& hit, std::size_t row, float cosine) const noexcept {
        if (!(cosine > rule_.threshold)) return;
        const position_t position = position_[row];
        if (!hit.found || prefers(position, hit.position)) hit = {position, cosine, true};
    }
    /// The best one among the near keys; most rows hold no hit, and one look shows it.
    [[nodiscard]] Hit best_near(const float* cosines) const noexcept {
        float least = 0.0F, most = 0.0F;
        double sum = 0.0;
        kernels_.summarise(cosines, near_.count, &least, &most, &sum);
        Hit hit;
        // `most` is never below 0: with a threshold there all are looked at.
        for (std::size_t b = 0; most > rule_.threshold && b < near_.count; ++b)
            consider(hit, near_.row[b], cosines[b]);
        return hit;
    }
    void settle(std::size_t row, const Hit& hit) noexcept {
        if (!hit.found || !seeks(row, hit.position)) return;
        links_.link[row] = ~hit.position;
        links_.cosine[row] = hit.cosine;
    }
    void meet_itself() noexcept {
        multiply(0, far_.seekers, near_.count);
        for (std::size_t a = 0; a < far_.seekers; ++a) {
            float* const cosines = product_ + a * tile_;
            cosines[a] = 0.0F;  // no link to oneself, but a 0 above a threshold below 0
            settle(far_.row[a], best_near(cosines));
        }
    }
    void meet() noexcept {
        const std::size_t seeking = near_.seekers;
        multiply(0, far_.seekers, near_.count);
        if (seeking > 0) multiply(far_.seekers, far_.count, seeking);
        std::fill_n(highest_, seeking, negative_infinity());
        for (std::size_t a = 0; a < far_.count; ++a)
            kernels_.maximum(highest_, product_ + a * tile_, seeking);
        for (std::size_t a = 0; a < far_.seekers; ++a) settle(far_.row[a], best_near(product_ + a * tile_));
        for (std::size_t b = 0; b < seeking; ++b) {
            Hit hit;
            for (std::size_t a = 0; highest_[b] > rule_.threshold && a < far_.count; ++a)
                consider(hit, far_.row[a], product_[a * tile_ + b]);
            settle(near_.row[b], hit);
        }
    }

    const simd::Kernels& kernels_;
    const RowsView& keys_;
    const PositionsView& position_;
    LinkRule rule_;
    KeyLinks& links_;
    std::size_t tile_, open_ = 0;
    float* list_;  // [n], rows as bits: open ones, then the others
    Tile near_, far_;
    float *product_, *highest_;
    bool screens_;
    LinkScreen screen_;
};

}  // namespace detail

/// Floats of scratch that `find_links` takes.
[[nodiscard]] constexpr std::size_t link_scratch(std::size_t n, std::size_t dim) noexcept {
    const std::size_t tile = std::min(n, detail::link_tile);
    return n + tile * (2 * dim + tile + 1) + detail::LinkScreen::scratch(tile, dim);
}

/// Makes the links true for all keys of a head, whatever rows came and went since the last time: links of new
/// keys are found, those to keys that are gone found anew. What it finds is what a search from nothing finds.
/// Cost: O(n) for a look at them; new keys x n x dim multiply-adds, n^2 dim / 2 from nothing, at most.
/// @param position  of the keys, ascending. @param links  of n rows; new rows hold zeros.
/// @param scratch   `link_scratch(n, keys.dim())` floats.
/// @returns false if a new key holds a NaN or infinity: it stays unseen.
inline bool find_links(const simd::Kernels& kernels, const RowsView& keys, const PositionsView& position,
                       const LinkRule& rule, KeyLinks& links, float* scratch) noexcept {
    const std::size_t n = keys.rows(), dim = keys.dim();
    const std::span<position_t> link = links.link.values();
    const bool oldest = rule.retain == Retain::first;
    if (links.threshold != rule.threshold || links.oldest != oldest)
        std::fill(link.begin(), link.end(), KeyLinks::unseen);
    links.threshold = rule.threshold;
    links.oldest = oldest;

    bool open = false;
    position_t last = KeyLinks::none;
    bool gone = false;  // the key that `last` means; neighbours often share theirs
    for (std::size_t j = 0; j < n; ++j) {
        if (link[j] < 0) {
            if (link[j] != last) {
                last = link[j];
                const std::size_t at = detail::row_of(position, ~last);
                gone = at == n || link[at] == KeyLinks::unseen;  // another token took its position
            }
            if (gone) link[j] = KeyLinks::lost;
        }
        open = open || link[j] == KeyLinks::unseen || link[j] == KeyLinks::lost;
        if (link[j] != KeyLinks::unseen) continue;
        const std::span<float> row(scratch, dim);
        keys.widen(j, row);
        const float norm = euclidean_norm(kernels, row);
        if (!is_finite(norm) && !all_finite(row)) return false;
        links.inverse[j] = 1.0F / (norm + detail::norm_epsilon);
    }
    if (open) detail::LinkSearch(kernels, keys, position, rule, links, scratch).run();
    return true;
}

}  // namespace kvcull::inline KVCULL_ABI
