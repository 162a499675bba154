#pragma once
/// From the scores of single heads to keep lists for engines that can drop only whole tokens of a layer, the
/// same tokens in all layers, or whole blocks of rows.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "../base/error.hpp"
#include "../base/types.hpp"
#include "../views.hpp"
#include "topk.hpp"

namespace kvcull::inline KVCULL_ABI {

/// How many heads agree on a row. `max`: by its highest score. `mean`: by the mean of its scores. `vote`: by
/// the number of heads that would keep it within their own budgets, then by the mean. For a block of rows the
/// scores, or the votes, of all its rows count alike.
enum class Consensus : std::uint8_t { max, mean, vote };

/// What an engine can do.
struct Reduction {
    Consensus by = Consensus::mean;
    bool all_layers = false;     // one keep list for the model; otherwise one per layer
    bool equal_counts = false;   // every layer keeps as many rows (or blocks) as the one that keeps fewest
    std::size_t block_rows = 1;  // slots go in whole blocks of so many rows
};

/// Reductions with their scratch memory: no allocation once it has seen the largest case.
///
/// Heads that share a list keep the mean of their `Candidates::size`, rounded down; in blocks: as many whole
/// blocks as fit, and the last one, if partly filled, where it fits beside them. As in `Selector`, pinned
/// rows come first, then the newest `recent`, then the oldest `sinks` (the largest number that a head asks
/// for), as many as the budget holds; a block with such a row counts as one, and if these are too many, the
/// oldest of the recent ones go. Then a score of +Inf in any head, whatever the others say. NaN counts as
/// -Inf, and so does a mean with one in it. Of equal rows the later position stays, of equal blocks the one
/// with the latest row. O(heads * n).
class Reducer {
  public:
    /// @param heads  [layers * kv_heads]; heads that share a list hold the same positions in the same slots.
    /// @param keep   [layers] lists, or [1] if `how.all_layers`: overwritten, ascending, ready for
    /// `Plan::add`.
    /// @returns the score given up: over all heads, the total over the rows that the head would keep by
    /// itself within its own budget, less the total over those that stay. Scores that are not finite count as
    /// 0. Not negative where scores are not and no head gets more rows than its own budget.
    /// @throws shape_error if sizes or positions do not fit each other, config_error for `block_rows` of 0
    /// and for pins beyond the budget; `keep` is then unchanged.
    double operator()(const Reduction& how, std::size_t kv_heads, std::span<const Candidates> heads,
                      std::span<const PositionRange> pinned, std::span<std::vector<index_t>> keep) {
        using detail::check, detail::text;
        check<error::config_error>(how.block_rows > 0, where, "block_rows", how.block_rows, "at least 1");
        check<error::shape_error>(kv_heads > 0 && heads.size() % kv_heads == 0, where, "heads.size()",
                                  heads.size(), text("a multiple of kv_heads = ", kv_heads));
        const std::size_t group = how.all_layers ? std::max<std::size_t>(heads.size(), 1) : kv_heads;
        const std::size_t lists = heads.size() / group;
        detail::check_size(where, "keep.size()", keep.size(), lists);
        counts_.clear();
        for (std::size_t list = 0; list < lists; ++list)
            counts_.push_back(count(how, list * group, heads.subspan(list * group, group)));
        if (how.equal_counts && lists > 0)
            std::fill(counts_.begin(), counts_.end(), *std::min_element(counts_.begin(), counts_.end()));
        if (!pinned.empty())
            for (std::size_t list = 0; list < lists; ++list)
                check_pins(how, heads[list * group], counts_[list], pinned);
        double given_up = 0.0;
        for (std::size_t list = 0; list < lists; ++list)
            given_up += agree(how, heads.subspan(list * group, group), counts_[list], pinned, keep[list]);
        return given_up;
    }
    /// Memory for lists of `rows` rows, and for `layers` of them.
    void reserve(std::size_t layers, std::size_t rows) {
        selector_.reserve(rows);
        counts_.reserve(layers);
        for (auto* indices : {&own_, &tied_, &picked_}) indices->reserve(rows);
        for (auto* levels : {&level_, &sorted_}) levels->reserve(rows);
        for (auto* places : {&position_, &latest_, &tied_position_}) places->reserve(rows);
        for (auto* scores : {&score_, &tied_score_}) scores->reserve(rows);
        for (auto* marks : {&fixed_, &newest_, &pinned_}) marks->reserve(rows);
    }

  private:
    static constexpr std::string_view where = "Reducer";

    /// Scores of several heads and rows as one.
    class Blend {
      public:
        void add(const float& score) noexcept {
            ++count_;
            if (score_order(score) > score_order(best_)) best_ = score;
            if (is_finite(score))
                sum_ += static_cast<double>(score);
            else
                low_ |= score_order(score) == score_order(negative_infinity());
        }
        [[nodiscard]] bool infinite() const noexcept {
            return score_order(best_) == score_order(positive_infinity());
        }
        /// By reference, like all scores that may be infinite.
        void store(Consensus by, float& out) const noexcept {
            if (by == Consensus::max || infinite())
                out = best_;
            else if (low_)
                out = negative_infinity();
            else
                out = static_cast<float>(sum_ / static_cast<double>(count_));
        }

      private:
        double sum_ = 0.0;
        std::size_t count_ = 0;
        float best_ = negative_infinity();
        bool low_ = false;
    };

    /// Ranks of rows and blocks above all that scores and votes say; the number of votes stands below.
    enum Class : std::uint64_t {
        protected_once = std::uint64_t{1} << 59U,  // recent; twice: sinks; three times: pinned
        infinite_score = protected_once >> 1U,
        free_tail = protected_once << 2U,  // the last block, where it costs no other block
    };

    /// Checks the heads of one list, of which the first is head `first` of all. @returns how many rows, or
    /// blocks, they keep.
    std::size_t count(const Reduction& how, std::size_t first, std::span<const Candidates> heads) {
        using detail::check_size, detail::text;
        const std::size_t n = heads[0].score.size();
        std::size_t total = 0;
        for (std::size_t h = 0; h < heads.size(); ++h) {
            const PositionsView& position = heads[h].position;
            check_size(where, text("heads[", first + h, "].score.size()"), heads[h].score.size(), n);
            check_size(where, text("heads[", first + h, "].position.size()"), position.size(), n);
            if (h == 0) gather(position);
            position.for_each_run([&](std::size_t begin, std::span<const position_t> run) {
                for (std::size_t j = 0; j < run.size(); ++j)
                    check_size(where, text("heads[", first + h, "].position[", begin + j, "]"), run[j],
                               position_[begin + j]);
            });
            total += std::min(heads[h].size, n);
        }
        const std::size_t size = total / heads.size(), tail = n % how.block_rows;
        return size / how.block_rows + (tail > 0 && tail <= size % how.block_rows ? 1 : 0);
    }
    void gather(const PositionsView& position) {
        position_.clear();
        position.for_each_run([&](std::size_t, std::span<const position_t> run) {
            position_.insert(position_.end(), run.begin(), run.end());
        });
    }
    static void check_pins(const Reduction& how, const Candidates& head, std::size_t count,
                           std::span<const PositionRange> pinned) {
        std::size_t needed = 0, next = 0;  // blocks, and the first row of the next one
        for (std::size_t j = 0; j < head.position.size(); ++j) {
            const position_t at = head.position[j];
            for (const PositionRange& range : pinned)
                if (j >= next && range.holds(at)) {
                    ++needed;
                    next = (j / how.block_rows + 1) * how.block_rows;
                }
        }
        detail::check<error::config_error>(needed <= count, where, "budget",
                                           detail::text(count, " blocks of ", how.block_rows, " rows"),
                                           detail::text("at least the ", needed, " with pinned rows"));
    }

    /// The keep list of some heads. @returns what they give up.
    double agree(const Reduction& how, std::span<const Candidates> heads, std::size_t count,
                 std::span<const PositionRange> pinned, std::vector<index_t>& keep) {
        const std::size_t n = heads[0].score.size(), rows = how.block_rows;
        const std::size_t items = n / rows + (n % rows != 0 ? 1 : 0);
        double given_up = 0.0;
        gather(heads[0].position);
        blend(how, heads, items);
        std::size_t total = 0;
        Candidates shared = heads[0];
        for (const Candidates& head : heads) {
            selector_.head(head, pinned, own_);
            given_up += sum(head, own_);
            if (how.by == Consensus::vote)
                for (const index_t row : own_) ++level_[static_cast<std::size_t>(row) / rows];
            total += std::min(head.size, n);
            shared.protect.sinks = std::max(shared.protect.sinks, head.protect.sinks);
            shared.protect.recent = std::max(shared.protect.recent, head.protect.recent);
        }
        shared.size = total / heads.size();
        if (count > shared.size / rows) level_.back() += free_tail;
        shared.size = std::min(shared.size, count * rows);
        protect(rows, shared, pinned);
        choose(count);
        keep.clear();
        for (const index_t item : picked_)
            for (std::size_t j = static_cast<std::size_t>(item) * rows;
                 j < std::min(n, (static_cast<std::size_t>(item) + 1) * rows); ++j)
                keep.push_back(static_cast<index_t>(j));
        for (const Candidates& head : heads) given_up -= sum(head, keep);
        return given_up;
    }
    [[nodiscard]] static double sum(const Candidates& head, std::span<const index_t> keep) noexcept {
        double total = 0.0;
        for (const index_t row : keep)
            if (const float& score = head.score[static_cast<std::size_t>(row)]; is_finite(score))
                total += static_cast<double>(score);
        return total;
    }
    /// One score, one level and the latest position per row or block.
    void blend(const Reduction& how, std::span<const Candidates> heads, std::size_t items) {
        score_.resize(items);
        latest_.resize(items);
        level_.assign(items, 0);
        for (std::size_t i = 0; i < items; ++i) {
            const std::size_t begin = i * how.block_rows;
            const std::size_t end = std::min(position_.size(), begin + how.block_rows);
            Blend all;
            latest_[i] = position_[begin];
            for (std::size_t j = begin; j < end; ++j) {
                for (const Candidates& head : heads) all.add(head.score[j]);
                latest_[i] = std::max(latest_[i], position_[j]);
            }
            all.store(how.by, score_[i]);
            if (all.infinite()) level_[i] = infinite_score;
        }
    }
    /// Raises what holds a pinned row three times, a sink twice, a recent row once: where blocks are more
    /// than rows asked for, the oldest of the recent ones have no place.
    void protect(std::size_t block_rows, Candidates shared, std::span<const PositionRange> pinned) {
        const Protected all = shared.protect;
        const auto mark = [&](Protected part, std::vector<std::uint8_t>& rows) {
            shared.protect = part;
            selector_.fix(shared, pinned, rows);
        };
        mark(all, fixed_);
        mark({0, all.recent}, newest_);
        mark({}, pinned_);
        for (std::size_t j = 0; j < fixed_.size(); ++j) {
            if (fixed_[j] == 0) continue;
            const std::size_t item = j / block_rows;
            const std::uint64_t times = pinned_[j] != 0 ? 3 : newest_[j] != 0 ? 1 : 2;
            level_[item] = std::max(level_[item], times * protected_once);
            if (level_[item] == protected_once) score_[item] = 0.0F;  // then the later one stays
        }
    }
    /// The `count` items of the highest levels, of equal levels those of the highest scores, in `picked_`.
    void choose(std::size_t count) {
        picked_.clear();
        if (count == 0) return;
        sorted_ = level_;
        const auto last = sorted_.begin() + static_cast<std::ptrdiff_t>(count - 1);
        std::nth_element(sorted_.begin(), last, sorted_.end(), std::greater<>{});
        const std::uint64_t border = *last;
        tied_.clear();
        tied_score_.clear();
        tied_position_.clear();
        for (std::size_t i = 0; i < level_.size(); ++i) {
            if (level_[i] > border) picked_.push_back(static_cast<index_t>(i));
            if (level_[i] != border) continue;
            tied_.push_back(static_cast<index_t>(i));
            tied_score_.push_back(score_[i]);
            tied_position_.push_back(latest_[i]);
        }
        selector_.head({tied_score_, {tied_position_}, count - picked_.size(), {}}, {}, own_);
        for (const index_t index : own_) picked_.push_back(tied_[static_cast<std::size_t>(index)]);
        std::sort(picked_.begin(), picked_.end());
    }

    Selector selector_;
    std::vector<std::size_t> counts_;            // per list
    std::vector<position_t> position_, latest_;  // per row, per row or block
    std::vector<float> score_;                   // per row or block, like the next ones
    std::vector<std::uint64_t> level_, sorted_;
    std::vector<std::uint8_t> fixed_, newest_, pinned_;  // per row: all that stay; of these
    std::vector<index_t> own_, picked_, tied_;           // tied: at the border of the levels
    std::vector<float> tied_score_;
    std::vector<position_t> tied_position_;
};

}  // namespace kvcull::inline KVCULL_ABI
