#pragma once
/// Memory full of rows. Every case takes its K and V from one arena, so that a run never holds two of them.

#include <cstddef>
#include <cstring>
#include <span>
#include <vector>

#include "kvcull/base/memory.hpp"
#include "kvcull/simd/kernels.hpp"
#include "kvcull/views.hpp"

namespace kvcull::bench {

/// Numbers in -1 .. 1.
inline void fill(std::span<float> out, std::uint64_t seed) {
    SplitMix64 random{seed};
    for (float& x : out) x = static_cast<float>(2.0 * random.uniform() - 1.0);
}
[[nodiscard]] inline std::vector<float> random_row(std::size_t count, std::uint64_t seed) {
    std::vector<float> row(count);
    fill(row, seed);
    return row;
}

/// K and V of `heads` KV heads as a run of rows each: K of all heads first, then V of all heads.
class Rows {
  public:
    /// Valid until the next call of `rows`.
    Rows(DType dtype, std::size_t heads, std::size_t n, std::size_t dim)
        : dtype_(dtype),
          n_(n),
          dim_(dim),
          head_bytes_(n * row_bytes(dtype, dim)),
          bytes_(2 * heads * head_bytes_) {
        static Scratch<std::byte> arena;
        static std::size_t filled = 0;
        static DType filled_with = DType::f32;
        data_ = arena.get(bytes_);
        if (filled >= bytes_ && filled_with == dtype) return;
        constexpr std::size_t pattern = 1U << 18U;  // numbers; repeated, as only their range matters for time
        std::vector<float> numbers(pattern);
        fill(numbers, 7);
        std::vector<std::byte> cell(row_bytes(dtype, pattern));
        simd::narrow(simd::kernels(), dtype, numbers.data(), pattern, cell.data());
        for (std::size_t at = 0; at < bytes_; at += cell.size())
            std::memcpy(data_ + at, cell.data(), std::min(cell.size(), bytes_ - at));
        filled = bytes_;
        filled_with = dtype;
    }

    [[nodiscard]] std::span<const std::byte> memory() const { return {data_, bytes_}; }
    [[nodiscard]] std::byte* k(std::size_t head) const { return data_ + head * head_bytes_; }
    [[nodiscard]] std::byte* v(std::size_t head) const { return data_ + bytes_ / 2 + head * head_bytes_; }
    [[nodiscard]] RowsView keys(std::size_t head) const { return keys(head, n_); }
    [[nodiscard]] RowsView values(std::size_t head) const { return values(head, n_); }
    /// The first `rows`.
    [[nodiscard]] RowsView keys(std::size_t head, std::size_t rows) const { return view(k(head), rows); }
    [[nodiscard]] RowsView values(std::size_t head, std::size_t rows) const { return view(v(head), rows); }

  private:
    [[nodiscard]] RowsView view(const std::byte* data, std::size_t rows) const {
        return {data, dtype_, rows, dim_, elements(dtype_, dim_)};
    }

    DType dtype_;
    std::size_t n_, dim_, head_bytes_, bytes_;
    std::byte* data_ = nullptr;
};

}  // namespace kvcull::bench
