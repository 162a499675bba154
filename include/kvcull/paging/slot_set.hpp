#pragma once
/// Sets of slots with a random member in O(1), and the draws that choose it.

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../base/config.hpp"
#include "../base/memory.hpp"
#include "page_table.hpp"

namespace kvcull::inline KVCULL_ABI {

/// A source of uniform 32- or 64-bit numbers. Bounds on randomised paging hold only if the requests do not
/// depend on the draws.
template <class D>
concept DrawSource = requires(D draws) {
    { draws() } -> std::unsigned_integral;
};

/// The next 32 random bits: the upper half where a source gives 64.
template <DrawSource D>
[[nodiscard]] std::uint32_t draw_32(D& draws) {
    const auto bits = draws();
    static_assert(sizeof(bits) >= 4, "draws of 32 or 64 bits");
    if constexpr (sizeof(bits) == 8)
        return static_cast<std::uint32_t>(bits >> 32U);
    else
        return bits;
}
/// Maps a draw to 0 .. size - 1 (multiply and shift).
[[nodiscard]] constexpr std::size_t scale_draw(std::uint32_t draw, std::size_t size) noexcept {
    return static_cast<std::size_t>((std::uint64_t{draw} * size) >> 32U);
}

/// Some of the slots 0 .. slots - 1. All O(1), `fill` too: members stand in front of a permutation of all
/// slots, and what earlier fills left of it stays. Empty at first.
class SlotSet {
  public:
    explicit SlotSet(std::size_t slots) : dense_(slots), pos_(slots) {
        std::iota(dense_.begin(), dense_.end(), slot_t{0});
        std::iota(pos_.begin(), pos_.end(), slot_t{0});
    }

    [[nodiscard]] std::size_t size() const noexcept { return size_; }
    [[nodiscard]] bool empty() const noexcept { return size_ == 0; }
    [[nodiscard]] bool contains(slot_t slot) const noexcept { return pos_[slot] < size_; }
    /// No-op if it is no member.
    void remove(slot_t slot) noexcept {
        if (!contains(slot)) return;
        const slot_t at = pos_[slot], last = dense_[--size_];
        dense_[at] = last;
        dense_[size_] = slot;
        pos_[last] = at;
        pos_[slot] = static_cast<slot_t>(size_);
    }
    void fill() noexcept { size_ = dense_.size(); }
    /// A member of a set that is not empty, each with the same probability. Takes one draw.
    template <DrawSource D>
    [[nodiscard]] slot_t random(D& draws) const {
        return dense_[scale_draw(draw_32(draws), size_)];
    }

  private:
    std::vector<slot_t> dense_, pos_;
    std::size_t size_ = 0;
};

}  // namespace kvcull::inline KVCULL_ABI
