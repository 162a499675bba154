#pragma once
/// Base policies of paging: which of the visible slots goes first.

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "../base/config.hpp"
#include "page_cache.hpp"
#include "tournament.hpp"

namespace kvcull::inline KVCULL_ABI {

/// An order of slots. Made as `B(slots)`. A slot joins at its first `touch` and leaves at `drop`; while
/// hidden it is kept up to date but is no victim, and `hide`, `show` of what is hidden or shown already do
/// nothing. `touch` serves hits and loads alike; an order that tells them apart has `load(slot, now, value)`
/// too.
template <class B>
concept VictimOrder = std::constructible_from<B, std::size_t> &&
    requires(B order, slot_t slot, std::uint64_t now, double value) {
    order.touch(slot, now, value);
    order.drop(slot);
    order.hide(slot);
    order.show(slot);
    { order.victim() } -> std::same_as<slot_t>;  ///< at least one slot is visible
};

namespace detail {

template <VictimOrder Order>
void touch(Order& order, const Served& request) {
    if constexpr (requires { order.load(request.slot, request.now, request.value); }) {
        if (!request.hit) return order.load(request.slot, request.now, request.value);
    }
    order.touch(request.slot, request.now, request.value);
}

/// Doubles as integers in the same order; NaN counts as +infinity and -0 as 0. By bits, because comparisons
/// with NaN are anybody's guess under -ffast-math.
[[nodiscard]] inline std::uint64_t ordered_bits(double value) noexcept {
    constexpr std::uint64_t sign = std::uint64_t{1} << 63U, infinity = 0x7FF0000000000000U;
    const std::uint64_t bits = std::bit_cast<std::uint64_t>(value);
    if (bits <= infinity || bits == sign) [[likely]]
        return bits | sign;
    return (bits & ~sign) > infinity ? infinity | sign : ~bits;
}

/// Slots from the oldest to the newest, some of them hidden. All calls O(1), amortised over what was hidden:
/// a cursor stands where everything older is hidden.
class AgeList {
  public:
    explicit AgeList(std::size_t slots) : nodes_(slots + 1), end_(static_cast<slot_t>(slots)), cursor_(end_) {
        nodes_[end()].newer = nodes_[end()].older = end();
    }

    [[nodiscard]] bool holds(slot_t slot) const noexcept { return nodes_[slot].listed; }
    /// Makes `slot` the newest. `when` grows from call to call.
    void push(slot_t slot, std::uint64_t when) noexcept {
        remove(slot);
        const slot_t last = nodes_[end()].older;
        nodes_[slot] = {last, end(), when, true, nodes_[slot].hidden};
        nodes_[last].newer = nodes_[end()].older = slot;
        if (cursor_ == end()) cursor_ = slot;
    }
    void remove(slot_t slot) noexcept {
        Node& node = nodes_[slot];
        if (!node.listed) return;
        if (cursor_ == slot) cursor_ = node.newer;
        nodes_[node.older].newer = node.newer;
        nodes_[node.newer].older = node.older;
        node.listed = false;
    }
    void hide(slot_t slot) noexcept { nodes_[slot].hidden = true; }
    void show(slot_t slot) noexcept {
        Node& node = nodes_[slot];
        if (node.hidden && node.listed && (cursor_ == end() || node.when < nodes_[cursor_].when))
            cursor_ = slot;
        node.hidden = false;
    }
    /// `end()` if none is visible.
    [[nodiscard]] slot_t oldest() noexcept { return cursor_ = visible_from(cursor_); }
    /// The next newer visible one.
    [[nodiscard]] slot_t after(slot_t slot) const noexcept { return visible_from(nodes_[slot].newer); }
    [[nodiscard]] slot_t end() const noexcept { return end_; }

  private:
    struct Node {
        slot_t older = 0, newer = 0;
        std::uint64_t when = 0;
        bool listed = false, hidden = false;
    };
    [[nodiscard]] slot_t visible_from(slot_t slot) const noexcept {
        while (nodes_[slot].hidden) slot = nodes_[slot].newer;  // the end is never hidden
        return slot;
    }

    std::vector<Node> nodes_;  // the last one closes the ring
    slot_t end_, cursor_;
};

/// What orders by age have in common: they differ in what makes a slot the newest.
class AgeOrder {
  public:
    explicit AgeOrder(std::size_t slots) : ages_(slots) {}
    void drop(slot_t slot) noexcept { ages_.remove(slot); }
    void hide(slot_t slot) noexcept { ages_.hide(slot); }
    void show(slot_t slot) noexcept { ages_.show(slot); }
    [[nodiscard]] slot_t victim() noexcept { return ages_.oldest(); }

  protected:
    AgeList ages_;
};

}  // namespace detail

/// Least recently requested first. O(1).
class Lru : public detail::AgeOrder {
  public:
    using AgeOrder::AgeOrder;
    void touch(slot_t slot, std::uint64_t now, double) noexcept { ages_.push(slot, now); }
};

/// Longest loaded first. O(1).
class Fifo : public detail::AgeOrder {
  public:
    using AgeOrder::AgeOrder;
    void touch(slot_t slot, std::uint64_t now, double) noexcept {
        if (!ages_.holds(slot)) ages_.push(slot, now);
    }
    void load(slot_t slot, std::uint64_t now, double) noexcept { ages_.push(slot, now); }
};

/// `value` is a label, 1: not needed soon (anything above 0.5 counts). Least recently requested of those
/// labelled 1; if there is none, of all. O(1).
class Labels {
  public:
    explicit Labels(std::size_t slots) : lists_{detail::AgeList(slots), detail::AgeList(slots)} {}
    void touch(slot_t slot, std::uint64_t now, double value) noexcept {
        const bool evictable = detail::ordered_bits(value) > detail::ordered_bits(0.5);
        lists_[evictable ? 0 : 1].remove(slot);
        lists_[evictable ? 1 : 0].push(slot, now);
    }
    void drop(slot_t slot) noexcept {
        for (auto& list : lists_) list.remove(slot);
    }
    void hide(slot_t slot) noexcept {
        for (auto& list : lists_) list.hide(slot);
    }
    void show(slot_t slot) noexcept {
        for (auto& list : lists_) list.show(slot);
    }
    [[nodiscard]] slot_t victim() noexcept {
        const slot_t slot = lists_[1].oldest();
        return slot != lists_[1].end() ? slot : lists_[0].oldest();
    }

  private:
    detail::AgeList lists_[2];  // by label
};

/// Largest value first, of equal ones the least recently requested. With next times as values this is the
/// blind oracle, with the true ones Belady's rule, with page scores whatever they say. O(log slots), and a
/// comparison for a request that leaves a slot among those that stay.
class Furthest {
  public:
    explicit Furthest(std::size_t slots) : visible_(slots), aside_(slots), hidden_(slots) {}

    void touch(slot_t slot, std::uint64_t now, double value) noexcept {
        const std::uint64_t bits = detail::ordered_bits(value);
        visible_.date(slot, now);
        if (hidden_[slot] != 0)
            aside_[slot] = bits;
        else
            visible_.set(slot, bits);
    }
    void drop(slot_t slot) noexcept {
        aside_[slot] = 0;
        if (hidden_[slot] == 0) visible_.set(slot, 0);
    }
    void hide(slot_t slot) noexcept {
        if (std::exchange(hidden_[slot], 1) != 0) return;
        aside_[slot] = visible_.value(slot);
        visible_.set(slot, 0);
    }
    void show(slot_t slot) noexcept {
        if (std::exchange(hidden_[slot], 0) != 0) visible_.set(slot, aside_[slot]);
    }
    [[nodiscard]] slot_t victim() const noexcept { return visible_.winner(); }

  private:
    detail::Tournament visible_;
    std::vector<std::uint64_t> aside_;  // values of hidden slots
    std::vector<std::uint8_t> hidden_;
};

}  // namespace kvcull::inline KVCULL_ABI
