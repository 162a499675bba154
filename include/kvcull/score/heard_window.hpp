#pragma once
/// What the newest tokens pay attention to, summed while they do.

#include <algorithm>
#include <cstddef>
#include <span>
#include <tuple>

#include "concepts.hpp"
#include "state.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Sums over the last `window` of every `interval` decoded tokens, taken where their own steps make the
/// weights or logits, so that an eviction at the interval's end need not compute them a second time. They
/// stand for what would be computed then as long as no row leaves before.
/// State: 4 bytes per row and plane, once there are any. Cost: that of `add`, for a window's tokens.
class HeardWindow {
  public:
    /// Takes notice of a tile.
    /// @param planes  sums of [n] that are made, from the first tile on that does not say 0
    /// @returns tokens before it that were decoded since rows left or a prompt ended
    std::size_t follow(const HeadStep& step, std::size_t planes) {
        if (planes > 0 && sums_.planes() == 0) sums_.set_planes(planes, step.n());
        const bool decoded = step.phase == Phase::decode;
        if (step.first_tile) {
            if (!decoded || rows_ != step.n() - step.added) decoded_ = counted_ = 0;
            decoded_ += decoded ? step.added : 0;
            rows_ = step.n();
        }
        return decoded_ - std::min(decoded_, step.added - step.first);
    }
    /// Sums up what counts of a tile of decoded tokens.
    /// @param before   tokens of the interval before the tile
    /// @param audible  the step made what is summed
    /// @param add      `add(sums, first, count)` takes these tokens of the tile; false: they cannot be heard
    template <class Add>
    void hear(std::size_t window, std::size_t interval, std::size_t before, bool audible,
              const HeadStep& step, const Add& add) {
        if (interval < window) return;
        const std::size_t silent = interval - window, begin = std::max(before, silent),
                          after = before + step.tokens;
        const bool inside = audible && after > silent && after <= interval;
        if (inside && begin == silent) {
            for (std::size_t i = 0; i < sums_.planes(); ++i)
                std::fill(sums_[i].begin(), sums_[i].end(), 0.0F);
            counted_ = 0;
        }
        const bool follows = inside && counted_ == begin - silent;
        counted_ = follows && add(sums_, begin - before, after - begin) ? after - silent : 0;
    }
    /// Whether the sums are those of the newest `tokens` tokens over the `rows` rows that are held.
    [[nodiscard]] bool knows(std::size_t tokens, std::size_t rows) const noexcept {
        return counted_ == tokens && rows_ == rows && sums_.planes() > 0;
    }
    [[nodiscard]] const RowPlanes<float>& sums() const noexcept { return sums_; }

    [[nodiscard]] auto arrays() noexcept { return std::tie(sums_); }
    [[nodiscard]] auto parts() noexcept { return std::tie(rows_, decoded_, counted_); }

  private:
    RowPlanes<float> sums_;
    std::size_t rows_ = 0;     // held when the newest token had come
    std::size_t decoded_ = 0;  // tokens since rows left or a prompt ended
    std::size_t counted_ = 0;  // the newest tokens, in the sums; 0: none
};

}  // namespace kvcull::inline KVCULL_ABI
