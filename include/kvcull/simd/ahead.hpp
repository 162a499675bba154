#pragma once
/// How kernels that stream rows keep memory busy, the same for every instruction set.

#include <cstddef>
#include <cstdint>

#include "../base/config.hpp"
#include "target.hpp"

KVCULL_PRECISE_BEGIN

namespace kvcull::inline KVCULL_ABI::simd {

/// How far ahead memory is asked for rows. Measured: 2 KiB hides half of the latency, 8 KiB all of it; 16 KiB
/// is slower again.
inline constexpr std::size_t prefetch_bytes = 8192;

/// Rows that stay in the first-level cache while many queries go over them; a multiple of 16.
[[nodiscard]] constexpr std::size_t chunk_rows(std::size_t row_bytes) noexcept {
    const std::size_t fit = 16384 / (row_bytes + 1) / 16 * 16;
    return fit < 16 ? 16 : fit;
}

#if KVCULL_X86

/// How far ahead of the rows at hand to ask memory for rows, in bytes: to the rows that come next; if nobody
/// said which, `prefetch_bytes` further into these rows, as the hardware alone asks too late when several
/// queries share a row; 0, which asks for what is there already, if these rows are few.
template <class T>
[[nodiscard]] [[gnu::always_inline]] inline std::uintptr_t distance(const T* rows, std::size_t count,
                                                                    const void* next) noexcept {
    if (next != nullptr)
        return reinterpret_cast<std::uintptr_t>(next) - reinterpret_cast<std::uintptr_t>(rows);
    return count * sizeof(T) > prefetch_bytes ? prefetch_bytes : 0;
}

/// Asks memory for the cache line at an address. A hint: it reads nothing and never faults.
[[gnu::always_inline]] inline void prefetch(std::uintptr_t address) noexcept {
    __builtin_prefetch(reinterpret_cast<const void*>(address));
}

/// Asks for the lines of a few rows, in the order in which a tile of them is computed: a line of every row,
/// then the next line of every row. Rows without gaps are asked for in the order of addresses instead:
/// memory answers one ascending stream faster than several (measured: a fifth to a quarter).
class Fetch {
  public:
    /// @param dim   stride of rows without gaps @param line  bytes to the next line of a row with gaps
    template <class T>
    [[gnu::always_inline]] Fetch(const T* rows, std::uintptr_t ahead, std::size_t count, std::size_t dim,
                                 std::size_t stride, std::size_t line = 64) noexcept
        : at_(reinterpret_cast<std::uintptr_t>(rows) + ahead),
          line_(stride == dim ? 64 * count : line),
          row_(stride == dim ? 64 : stride * sizeof(T)) {}

    /// The next line of every row.
    template <std::size_t Count>
    [[gnu::always_inline]] void next() noexcept {
        std::uintptr_t at = at_;
#    pragma GCC unroll 4
        for (std::size_t row = 0; row < Count; ++row, at += row_) prefetch(at);
        at_ += line_;
    }

  private:
    std::uintptr_t at_;
    std::size_t line_, row_;
};

#endif

}  // namespace kvcull::inline KVCULL_ABI::simd

KVCULL_PRECISE_END
