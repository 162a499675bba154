#pragma once
/// Which slot has the largest key, kept up to date as keys change.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../base/config.hpp"
#include "page_table.hpp"

namespace kvcull::inline KVCULL_ABI::detail {

/// A tree of matches between eight: the slots are its leaves, every other node holds the winner below it, the
/// root the first of all. Larger values win, of equal ones the earlier time. A slot with value 0 takes no
/// part.
///
/// A change goes up as far as it is felt: a slot that neither won its first match nor does so now costs one
/// comparison, one that outdoes all a few stores. Only where a winner falls back is a match played again,
/// without a branch on who wins: that is hard to predict, and a wrong guess costs more than the match.
class Tournament {
  public:
    explicit Tournament(std::size_t slots)
        : leaves_(root + std::max<std::size_t>((slots + 5) / 7, 1)),
          values_(eight * (leaves_ - root + 1)),
          slots_(values_.size()),
          times_(values_.size()) {
        for (slot_t slot = 0; slot < slots; ++slot) slots_[leaves_ + slot] = slot;
    }

    [[nodiscard]] std::uint64_t value(slot_t slot) const noexcept { return values_[leaves_ + slot]; }
    void set(slot_t slot, std::uint64_t value) noexcept {
        const std::size_t leaf = leaves_ + slot, match = above(leaf);
        values_[leaf] = value;
        if (slot == slots_[match] || outdoes(slot, value, match)) carry(slot, value, match);
    }
    /// Breaks ties of the values that are set from now on.
    void date(slot_t slot, std::uint64_t time) noexcept { times_[slot] = time; }
    /// Any slot if none takes part.
    [[nodiscard]] slot_t winner() const noexcept { return slots_[root]; }

  private:
    // The children of node i are 8 (i - 6) and the seven after it.
    static constexpr std::size_t root = 7, eight = 8;
    [[nodiscard]] static constexpr std::size_t above(std::size_t node) noexcept {
        return node / eight + root - 1;
    }

    [[nodiscard]] bool outdoes(slot_t slot, std::uint64_t value, std::size_t match) const noexcept {
        return value > values_[match] || (value == values_[match] && times_[slot] < times_[slots_[match]]);
    }
    /// The slot's value has changed to `value`, and `match` feels it.
    [[gnu::noinline]] void carry(slot_t slot, std::uint64_t value, std::size_t match) noexcept {
        for (;; match = above(match)) {
            if (outdoes(slot, value, match)) {
                values_[match] = value;
                slots_[match] = slot;
            } else if (slot == slots_[match]) {
                play(match);
            } else {
                return;
            }
            if (match == root) return;
        }
    }
    void play(std::size_t match) noexcept {
        const std::size_t first = eight * (match - root + 1);
        const auto better = [&](std::size_t a, std::size_t b) {
            bool second = values_[b] > values_[a];
            if (values_[a] == values_[b]) [[unlikely]]
                second = times_[slots_[b]] < times_[slots_[a]];
            // A mask, because compilers make a branch of a choice.
            return a + ((b - a) & (std::size_t{0} - static_cast<std::size_t>(second)));
        };
        const auto pair = [&](std::size_t i) { return better(first + i, first + i + 1); };
        const std::size_t best = better(better(pair(0), pair(2)), better(pair(4), pair(6)));
        values_[match] = values_[best];
        slots_[match] = slots_[best];
    }

    std::size_t leaves_;                 // where they begin
    std::vector<std::uint64_t> values_;  // by node
    std::vector<slot_t> slots_;          // by node: who won
    std::vector<std::uint64_t> times_;   // by slot
};

}  // namespace kvcull::inline KVCULL_ABI::detail
