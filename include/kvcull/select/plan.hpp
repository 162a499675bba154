#pragma once
/// A plan: which rows of which heads stay, and the moves that make it so. It knows no storage: a cache, an
/// engine's own buffers and the policy's state all follow the same plan.

#include <algorithm>
#include <cstddef>
#include <functional>
#include <span>
#include <vector>

#include "../base/error.hpp"
#include "../base/types.hpp"

namespace kvcull::inline KVCULL_ABI {

/// How kept rows close the gaps. `ascending`: kept rows move down and keep their order. `fill`: rows from the
/// tail fill the gaps, at most one row moved per row evicted; attention does not care about order.
enum class Compaction : std::uint8_t { ascending, fill };

namespace detail {
[[nodiscard]] inline bool ascending_below(std::size_t rows, std::span<const index_t> keep) noexcept {
    if (keep.empty()) return true;
    index_t descents = 0;  // no bool, so that the loop can be vectorised
    for (std::size_t i = 1; i < keep.size(); ++i) descents |= keep[i - 1] >= keep[i] ? 1 : 0;
    return descents == 0 && keep.front() >= 0 && static_cast<std::size_t>(keep.back()) < rows;
}
/// Passes over kept rows, from number `next` on, that are rows `to, to + 1, ..`: a stride at a time, as few
/// rows go.
inline void skip_neighbours(std::span<const index_t> keep, std::size_t& next, index_t& to) noexcept {
    constexpr std::size_t stride = 64;
    while (next + stride <= keep.size() && keep[next + stride - 1] == to + index_t{stride - 1}) {
        next += stride;
        to += index_t{stride};
    }
}
/// Appends the moves that turn `rows` rows into the kept ones, safe in place when done one after the other.
inline void append_moves(Compaction compaction, std::span<const index_t> keep, std::vector<Move>& moves) {
    const auto count = static_cast<index_t>(keep.size());
    std::size_t next = 0;
    index_t to = 0;
    if (compaction == Compaction::ascending) {
        skip_neighbours(keep, next, to);
        for (; to < count; ++to)
            if (const index_t from = keep[static_cast<std::size_t>(to)]; from != to)
                moves.push_back({from, to});
        return;
    }
    // Kept rows beyond the new end fill the gaps before it.
    auto tail = std::lower_bound(keep.begin(), keep.end(), count);
    for (; tail != keep.end(); ++to) {
        skip_neighbours(keep, next, to);
        if (keep[next] == to)
            ++next;
        else
            moves.push_back({*tail++, to});
    }
}
}  // namespace detail

/// What one KV head does. `keep` is ascending by row; carry out `moves` in order, then cut to `keep.size()`
/// rows.
struct HeadPlan {
    std::size_t layer = 0, head = 0;
    std::size_t rows = 0;  // before
    std::span<const index_t> keep;
    std::span<const Move> moves;
};

/// Plans of the heads that change; heads that are not named stay as they are. Memory is reused by `clear`.
class Plan {
  public:
    [[nodiscard]] bool empty() const noexcept { return entries_.empty(); }
    [[nodiscard]] std::size_t size() const noexcept { return entries_.size(); }
    [[nodiscard]] HeadPlan operator[](std::size_t index) const noexcept {
        const Entry& entry = entries_[index];
        return {entry.layer, entry.head, entry.rows, std::span(keep_).subspan(entry.keep, entry.keep_count),
                std::span(moves_).subspan(entry.moves, entry.moves_count)};
    }

    void clear() noexcept {
        entries_.clear();
        keep_.clear();
        moves_.clear();
    }
    /// `keep` must be ascending and below `rows`: shape_error otherwise, nothing added.
    void add(std::size_t layer, std::size_t head, std::size_t rows, std::span<const index_t> keep,
             Compaction compaction) {
        if (!detail::ascending_below(rows, keep)) [[unlikely]]
            for (std::size_t i = 0; i < keep.size(); ++i) {
                const bool good = keep[i] >= 0 && static_cast<std::size_t>(keep[i]) < rows &&
                                  (i == 0 || keep[i - 1] < keep[i]);
                detail::check<error::shape_error>(good, "Plan::add", detail::text("keep[", i, "]"), keep[i],
                                                  detail::text("an ascending row below ", rows));
            }
        if (keep.size() == rows) return;
        Entry entry{layer, head, rows, keep_.size(), keep.size(), moves_.size(), 0};
        keep_.insert(keep_.end(), keep.begin(), keep.end());
        detail::append_moves(compaction, keep, moves_);
        entry.moves_count = moves_.size() - entry.moves;
        entries_.push_back(entry);
    }
    /// Room for plans of `heads` heads of up to `rows` rows, so that `add` does not allocate.
    void reserve(std::size_t heads, std::size_t rows) {
        entries_.reserve(heads);
        keep_.reserve(heads * rows);
        moves_.reserve(heads * rows);
    }

  private:
    struct Entry {
        std::size_t layer, head, rows, keep, keep_count, moves, moves_count;
    };
    std::vector<Entry> entries_;
    std::vector<index_t> keep_;
    std::vector<Move> moves_;
};

/// Whether a plan can be carried out: throws if not.
using PlanCheck = std::function<void(const Plan& plan)>;

}  // namespace kvcull::inline KVCULL_ABI
