#pragma once
/// From scores to rows: the k best under rows that must stay. O(n).

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "../base/types.hpp"
#include "../score/concepts.hpp"
#include "../views.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Positions `begin .. end - 1`.
struct PositionRange {
    position_t begin = 0, end = 0;
};

/// Of two rows of different heads with equal score and position, the head that keeps its row.
enum class HeadTie : std::uint8_t { lower, later };

/// One head's part of a selection.
struct Candidates {
    std::span<const float> score;  // [n], higher = keep
    PositionsView position;        // [n]
    std::size_t size = 0;  // rows to keep, at most n; pooled heads: the room of this head's protected rows
    Protected protect;
};

/// Order of scores as an unsigned number: NaN like -Inf, and -0 like +0.
[[nodiscard]] constexpr std::uint32_t score_order(const float& score) noexcept {
    const auto bits = std::bit_cast<std::uint32_t>(score);
    if (is_nan(score)) return ~negative_infinity_bits;
    if ((bits & 0x7FFFFFFFU) == 0) return 0x80000000U;
    return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

/// Selection with its scratch memory: no allocation once it has seen the largest case.
class Selector {
  public:
    /// Marks in `fixed[n]` the rows that stay whatever their score: pinned rows, then the newest `recent`,
    /// then the oldest `sinks`, as many as `size` allows. Age is the position's, not the slot's. @returns how
    /// many.
    std::size_t fix(const Candidates& head, std::span<const PositionRange> pinned,
                    std::vector<std::uint8_t>& fixed) {
        const std::size_t n = head.score.size();
        fixed.assign(n, 0);
        std::size_t count = 0;
        if (!pinned.empty())
            for (std::size_t j = n; j-- > 0 && count < head.size;)
                for (const PositionRange& range : pinned)
                    if (fixed[j] == 0 && head.position[j] >= range.begin && head.position[j] < range.end) {
                        fixed[j] = 1;
                        ++count;
                    }
        if (n == 0 || (head.protect.recent == 0 && head.protect.sinks == 0)) return count;
        positions_.resize(n);
        for (std::size_t j = 0; j < n; ++j) positions_[j] = head.position[j];
        sorted_ = std::is_sorted(positions_.begin(), positions_.end());
        count += fix_end(true, std::min(head.protect.recent, n), head.size - count, fixed);
        count += fix_end(false, std::min(head.protect.sinks, n), head.size - count, fixed);
        return count;
    }

    /// The rows that one head keeps, ascending: `min(n, size)` of them. Higher score first; NaN counts as
    /// -Inf; of equal scores the later position stays.
    void head(const Candidates& head, std::span<const PositionRange> pinned, std::vector<index_t>& keep) {
        const std::size_t n = head.score.size();
        keep.clear();
        if (n <= head.size) {
            for (std::size_t j = 0; j < n; ++j) keep.push_back(static_cast<index_t>(j));
            return;
        }
        const std::size_t taken = fix(head, pinned, fixed_);
        best_.clear();
        for (std::size_t j = 0; j < n; ++j)
            if (fixed_[j] == 0)
                best_.push_back({score_order(head.score[j]), static_cast<index_t>(j), head.position[j], 0});
        take_best(head.size - taken, HeadTie::lower);
        for (const Row& row : best_) fixed_[static_cast<std::size_t>(row.slot)] = 1;
        for (std::size_t j = 0; j < n; ++j)
            if (fixed_[j] != 0) keep.push_back(static_cast<index_t>(j));
    }

    /// One ranking over the rows of all heads: `total` rows stay, protected ones first. Heads end ragged.
    /// Order: score, then later position, then `tie`. `keep[h]` is ascending.
    void pooled(std::span<const Candidates> heads, std::size_t total, std::span<const PositionRange> pinned,
                HeadTie tie, std::span<std::vector<index_t>> keep) {
        best_.clear();
        std::size_t taken = 0;
        for (std::size_t h = 0; h < heads.size(); ++h) {
            keep[h].clear();
            Candidates head = heads[h];
            head.size = std::min({head.size, head.score.size(), total - taken});
            taken += fix(head, pinned, fixed_);
            for (std::size_t j = 0; j < head.score.size(); ++j) {
                if (fixed_[j] != 0)
                    keep[h].push_back(static_cast<index_t>(j));
                else
                    best_.push_back({score_order(head.score[j]), static_cast<index_t>(j), head.position[j],
                                     static_cast<std::uint32_t>(h)});
            }
        }
        take_best(total - taken, tie);
        for (const Row& row : best_) keep[row.head].push_back(row.slot);
        for (std::size_t h = 0; h < heads.size(); ++h) std::sort(keep[h].begin(), keep[h].end());
    }

    void reserve(std::size_t rows) {
        fixed_.reserve(rows);
        positions_.reserve(rows);
        order_.reserve(rows);
        best_.reserve(rows);
    }

  private:
    struct Row {
        std::uint32_t score;
        index_t slot;
        position_t position;
        std::uint32_t head;
    };

    /// Marks those of the `wanted` newest (or oldest) rows that are not marked yet: the newest (oldest)
    /// `room` of them. @returns how many.
    std::size_t fix_end(bool newest, std::size_t wanted, std::size_t room, std::vector<std::uint8_t>& fixed) {
        const auto within = [newest](position_t position, position_t border) {
            return newest ? position >= border : position <= border;
        };
        // The position at the border of the `count` rows at that end of `order_`.
        const auto border_of = [&](std::size_t count) {
            const auto at =
                order_.begin() + static_cast<std::ptrdiff_t>(newest ? order_.size() - count : count - 1);
            if (!sorted_) std::nth_element(order_.begin(), at, order_.end());
            return *at;
        };
        if (wanted == 0 || room == 0) return 0;
        order_ = positions_;
        position_t border = border_of(wanted);
        order_.clear();
        for (std::size_t j = 0; j < fixed.size(); ++j)
            if (fixed[j] == 0 && within(positions_[j], border)) order_.push_back(positions_[j]);
        const std::size_t count = std::min(order_.size(), room);
        if (count < order_.size()) border = border_of(count);
        for (std::size_t j = 0; j < fixed.size(); ++j)
            if (within(positions_[j], border)) fixed[j] = 1;
        return count;
    }

    /// Cuts `best_` to its `count` best rows, in no order.
    void take_best(std::size_t count, HeadTie tie) {
        if (count >= best_.size()) return;
        const auto better = [tie](const Row& a, const Row& b) {
            if (a.score != b.score) return a.score > b.score;
            if (a.position != b.position) return a.position > b.position;
            return tie == HeadTie::lower ? a.head < b.head : a.head > b.head;
        };
        std::nth_element(best_.begin(), best_.begin() + static_cast<std::ptrdiff_t>(count), best_.end(),
                         better);
        best_.resize(count);
    }

    std::vector<std::uint8_t> fixed_;
    std::vector<position_t> positions_, order_;  // of all rows, and of those that are being ranked
    bool sorted_ = false;                        // the slots' order is that of the positions
    std::vector<Row> best_;
};

}  // namespace kvcull::inline KVCULL_ABI
