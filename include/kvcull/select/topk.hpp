#pragma once
/// From scores to rows: the k best under rows that must stay. O(n).

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "../base/types.hpp"
#include "../score/concepts.hpp"
#include "../views.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Positions `begin .. end - 1`.
struct PositionRange {
    position_t begin = 0, end = 0;

    [[nodiscard]] constexpr std::size_t size() const noexcept {
        return static_cast<std::size_t>(end - begin);
    }
    [[nodiscard]] constexpr bool holds(position_t at) const noexcept { return begin <= at && at < end; }
};

/// One head's part of a selection.
struct Candidates {
    std::span<const float> score;  // [n], higher = keep
    PositionsView position;        // [n]
    std::size_t size = 0;  // rows to keep, at most n; pooled heads: the room of this head's protected rows
    Protected protect;
};

/// Order of scores as an unsigned number, 2^31 plus or minus the magnitude's bits: -0 is +0, and NaN like
/// -Inf.
[[nodiscard]] constexpr std::uint32_t score_order(const float& score) noexcept {
    constexpr std::uint32_t zero = 0x80000000U, infinity = 0x7F800000U;
    const auto bits = std::bit_cast<std::uint32_t>(score);
    const std::uint32_t magnitude = bits & ~zero;
    const std::uint32_t order = (bits & zero) != 0 ? zero - magnitude : zero + magnitude;
    return magnitude > infinity ? zero - infinity : order;
}

/// Selection with its scratch memory: no allocation once it has seen the largest case.
class Selector {
  public:
    /// Marks in `fixed[n]` the rows that stay whatever their score: pinned rows, then the newest `recent`,
    /// then the oldest `sinks`, as many as `size` allows. Age is the position's, not the slot's. @returns how
    /// many.
    std::size_t fix(const Candidates& head, std::span<const PositionRange> pinned,
                    std::vector<std::uint8_t>& fixed) {
        const std::size_t n = head.score.size(), room = std::min(head.size, n);
        const std::size_t recent = std::min(head.protect.recent, room);
        fixed.assign(n, 0);
        if (pinned.empty()) {
            const std::size_t sinks = std::min(head.protect.sinks, room - recent);
            if (recent + sinks == 0 || fix_as_guessed(head.position, sinks, recent, fixed))
                return recent + sinks;
        }
        positions_.clear();
        head.position.for_each_run([&](std::size_t, std::span<const position_t> run) {
            positions_.insert(positions_.end(), run.begin(), run.end());
        });
        std::size_t count = 0;
        for (std::size_t j = n; j-- > 0 && count < room;)
            for (const PositionRange& range : pinned)
                if (fixed[j] == 0 && range.holds(positions_[j])) {
                    fixed[j] = 1;
                    ++count;
                }
        sorted_ = std::is_sorted(positions_.begin(), positions_.end());
        count += fix_end(true, recent, room - count, fixed);
        count += fix_end(false, std::min(head.protect.sinks, n), room - count, fixed);
        return count;
    }

    /// The rows that one head keeps, ascending: `min(n, size)` of them. Higher score first; NaN counts as
    /// -Inf; of equal scores the later position stays.
    void head(const Candidates& head, std::span<const PositionRange> pinned, std::vector<index_t>& keep) {
        const std::size_t n = head.score.size(), gone = n - std::min(n, head.size);
        keep.resize(n);
        if (gone == 0) return std::iota(keep.begin(), keep.end(), index_t{0});
        fix(head, pinned, fixed_);
        ranks_.resize(n);
        std::uint32_t border = ~0U;  // the highest rank that goes; fixed rows lie above all others
        for (std::size_t j = 0; j < n; ++j) {
            ranks_[j] = score_order(head.score[j]) | (0U - std::uint32_t{fixed_[j]});
            border = std::min(border, ranks_[j]);
        }
        if (gone > 1) {
            lowest_ = ranks_;
            const auto last = lowest_.begin() + static_cast<std::ptrdiff_t>(gone - 1);
            std::nth_element(lowest_.begin(), last, lowest_.end());
            border = *last;
        }
        std::size_t kept = write_beyond(border, keep);
        if (kept < n - gone) {
            raise_latest(border, n - gone - kept, head.position);
            kept = write_beyond(border, keep);
        }
        keep.resize(kept);
    }

    /// The rows of one head that reach `least`, and those that `fix` marks, ascending.
    void reaching(Candidates head, float least, std::span<const PositionRange> pinned,
                  std::vector<index_t>& keep) {
        head.size = head.score.size();
        fix(head, pinned, fixed_);
        keep.clear();
        for (std::size_t j = 0; j < head.score.size(); ++j)
            if (fixed_[j] != 0 || score_order(head.score[j]) >= score_order(least))
                keep.push_back(static_cast<index_t>(j));
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
        ranks_.reserve(rows);
        lowest_.reserve(rows);
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

    /// Positions from which on rows are the newest ones, and up to which they are the oldest ones.
    struct Borders {
        std::uint64_t newest, oldest;
    };
    /// How many rows are not the newest, and how many not the oldest.
    struct Others {
        std::uint64_t before = 0, after = 0;
    };
    /// Marks the rows of a run beyond either border. By the signs of differences: vector units of old compare
    /// no 64-bit numbers.
    static Others mark_beyond(Borders borders, std::span<const position_t> run, std::uint8_t* mark) noexcept {
        std::uint64_t all_before = 0, all_after = 0;
        for (std::size_t j = 0; j < run.size(); ++j) {
            const auto own = static_cast<std::uint64_t>(run[j]);
            const std::uint64_t before = (own - borders.newest) >> 63U, after = (borders.oldest - own) >> 63U;
            mark[j] = static_cast<std::uint8_t>((before & after) ^ 1U);
            all_before += before;
            all_after += after;
        }
        return {all_before, all_after};
    }
    /// Tries borders that hold wherever the newest rows came without gaps and the oldest have not moved, and
    /// marks what lies beyond them. @returns whether they were right.
    static bool fix_as_guessed(const PositionsView& position, std::size_t sinks, std::size_t recent,
                               std::vector<std::uint8_t>& fixed) {
        const std::size_t n = position.size();
        const auto at = [&](std::size_t slot) { return static_cast<std::uint64_t>(position[slot]); };
        Borders borders{std::numeric_limits<position_t>::max(), ~std::uint64_t{0}};  // none is beyond these
        if (recent > 0) borders.newest = at(n - 1) - (recent - 1);
        if (sinks > 0) borders.oldest = at(sinks - 1);
        Others others;
        position.for_each_run([&](std::size_t first, std::span<const position_t> run) {
            const Others here = mark_beyond(borders, run, &fixed[first]);
            others.before += here.before;
            others.after += here.after;
        });
        if (others.before == n - recent && others.after == n - sinks) return true;
        std::fill(fixed.begin(), fixed.end(), std::uint8_t{0});
        return false;
    }

    /// Writes the rows of a rank beyond `border`, ascending. @returns how many.
    std::size_t write_beyond(std::uint32_t border, std::vector<index_t>& keep) const {
        std::size_t kept = 0;
        for (std::size_t j = 0; j < ranks_.size(); ++j) {
            keep[kept] = static_cast<index_t>(j);
            kept += ranks_[j] > border ? 1 : 0;
        }
        return kept;
    }
    /// Raises the `count` latest rows of rank `border` beyond it.
    void raise_latest(std::uint32_t border, std::size_t count, const PositionsView& position) {
        const auto for_each_equal = [&](const auto& visit) {
            position.for_each_run([&](std::size_t first, std::span<const position_t> run) {
                for (std::size_t j = 0; j < run.size(); ++j)
                    if (ranks_[first + j] == border) visit(ranks_[first + j], run[j]);
            });
        };
        order_.clear();
        for_each_equal([&](std::uint32_t, position_t at) { order_.push_back(at); });
        const auto first = order_.end() - static_cast<std::ptrdiff_t>(count);
        std::nth_element(order_.begin(), first, order_.end());
        for_each_equal([&](std::uint32_t& rank, position_t at) { rank += at >= *first ? 1 : 0; });
    }

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
    std::vector<std::uint32_t> ranks_, lowest_;
    std::vector<position_t> positions_, order_;  // of all rows, and of those that are being ranked
    bool sorted_ = false;                        // the slots' order is that of the positions
    std::vector<Row> best_;
};

}  // namespace kvcull::inline KVCULL_ABI
