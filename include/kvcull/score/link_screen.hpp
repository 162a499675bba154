#pragma once
/// Which keys cannot be like any key of a tile, told by products of bytes, of which processors do several
/// times as many as of floats. A proven bound, so that those it excludes need no product of floats.
///
/// A unit key u is close to the key û of its codes, a whole number of steps s in each channel: the rest of a
/// channel is at most 0.501 s, also where the codes are those of the key before its division by the norm, so
/// |u - û| <= e = 0.501 s sqrt(dim). Of two unit keys with norms of at most
/// 1 + m
///     |u.v - û.v̂| = |u.(v - v̂) + (u - û).v̂| <= (1 + m) e_v + e_u (1 + m + e_v),
/// and a product of floats is off by at most (dim + 1) 2^-24 (1 + m)^2, whatever the order of its sum.
/// `slack` is above that, above m, and above what rounding takes from the bound itself.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>

#include "../simd/kernels.hpp"

namespace kvcull::inline KVCULL_ABI::detail {

class LinkScreen {
  public:
    /// Whether integers are faster here, and their sums fit.
    [[nodiscard]] static bool pays(const simd::Kernels& kernels, std::size_t dim) noexcept {
        return kernels.fast_integers && dim <= 65536;
    }
    /// Floats of scratch for tiles of `tile` keys.
    [[nodiscard]] static constexpr std::size_t scratch(std::size_t tile, std::size_t dim) noexcept {
        return 2 * whole_tile(tile) * words(dim) + 3 * whole_tile(tile);
    }

    /// @param scratch  `scratch(tile, dim)` floats.
    LinkScreen(const simd::Kernels& kernels, std::size_t tile, std::size_t dim, float* scratch) noexcept
        : kernels_(kernels),
          tile_(whole_tile(tile)),
          dim_(dim),
          slack_(static_cast<float>(dim + 64) * 0x1p-20F),
          code_(reinterpret_cast<std::uint8_t*>(scratch)),
          near_(reinterpret_cast<std::uint32_t*>(scratch + tile_ * words(dim))),
          start_(reinterpret_cast<std::int32_t*>(scratch + 2 * tile_ * words(dim))),
          product_(start_ + tile_),
          step_(scratch + 2 * tile_ * words(dim) + 2 * tile_) {}

    /// Takes the unit keys[count, dim] of a tile, count > 0: all in steps of the one that needs the largest.
    void take_tile(const float* unit, std::size_t count) noexcept {
        const std::size_t width = words(dim_), whole = whole_tile(count);
        near_count_ = whole;
        kernels_.to_codes(unit, count * dim_, least_step, code_, &near_step_);  // for the step alone
        std::fill_n(code_, 4 * width * whole, zero_code);
        for (std::size_t b = 0; b < whole; ++b) {
            std::uint8_t* const code = code_ + 4 * width * b;
            if (b < count) kernels_.to_codes(unit + b * dim_, dim_, near_step_, code, step_);
            // Codes of the other keys are 128 too large.
            start_[b] = zero_code * (static_cast<std::int32_t>(4 * width) * zero_code -
                                     std::accumulate(code, code + 4 * width, std::int32_t{0}));
        }
        simd::transpose(reinterpret_cast<const std::uint32_t*>(code_), width, width, whole, near_);
        for (std::size_t i = 0, size = width * whole; i < size; ++i) near_[i] ^= 0x80808080U;
    }

    /// Takes the key[dim] with this inverse of its norm as key a < tile of those to be bounded.
    void take(std::size_t a, const float* key, float inverse) noexcept {
        std::uint8_t* const code = code_ + 4 * words(dim_) * a;
        std::fill(code + dim_, code + 4 * words(dim_), zero_code);
        kernels_.to_codes(key, dim_, least_step, code, &step_[a]);
        step_[a] *= inverse;
    }
    /// highest[a] = a number that no product of the unit keys of key a < count and a key of the tile exceeds.
    void bound(std::size_t count, float* highest) noexcept {
        const std::size_t row = 4 * words(dim_);
        kernels_.largest_products(code_, row, count, reinterpret_cast<const std::int8_t*>(near_), start_,
                                  near_count_, row, product_);
        const float near_rest = rest(near_step_), norm = 1.0F + slack_;
        for (std::size_t a = 0; a < count; ++a) {
            const float own_rest = rest(step_[a]);
            highest[a] = step_[a] * near_step_ * static_cast<float>(product_[a]) + norm * near_rest +
                         own_rest * (norm + near_rest) + slack_;
        }
    }

  private:
    static constexpr std::uint8_t zero_code = 128;
    static constexpr float least_step = 0x1p-60F;  // so that its inverse is a float

    [[nodiscard]] static constexpr std::size_t whole_tile(std::size_t count) noexcept {
        return (count + 15) / 16 * 16;
    }
    [[nodiscard]] static constexpr std::size_t words(std::size_t dim) noexcept { return (dim + 3) / 4; }
    [[nodiscard]] float rest(float step) const noexcept {
        return 0.501F * step * std::sqrt(static_cast<float>(dim_));
    }

    const simd::Kernels& kernels_;
    std::size_t tile_, dim_, near_count_ = 0;
    float slack_, near_step_ = 0.0F;
    std::uint8_t* code_;   // [tile, 4 words], 128 for 0
    std::uint32_t* near_;  // [words, near_count], signed bytes
    std::int32_t *start_, *product_;
    float* step_;
};

}  // namespace kvcull::inline KVCULL_ABI::detail
