#pragma once
/// Rows that are columns of a matrix, made rows a few at a time: kernels know only rows.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../simd/kernels.hpp"
#include "../views.hpp"

namespace kvcull::inline KVCULL_ABI::detail {

/// Bytes of such rows at a time: they stay in first-level cache until the kernel has read them.
inline constexpr std::size_t column_bytes = RowsView::max_column_dim * sizeof(float);

/// Copies the rows of a run one after the other, `row_bytes` each, bit for bit.
inline void copy_rows(const RowsView& rows, const RowsView::Run& run, std::byte* out) noexcept {
    if (!rows.are_columns()) {
        const std::size_t step = rows.stride() * size_of(rows.dtype());
        for (std::size_t j = 0; j < run.rows; ++j)
            std::memcpy(out + j * rows.row_bytes(), run.data + j * step, rows.row_bytes());
        return;
    }
    const auto turn = [&]<class Word>(Word* to) {
        simd::transpose(reinterpret_cast<const Word*>(run.data), rows.channel_stride(), run.rows, rows.dim(),
                        to);
    };
    if (size_of(rows.dtype()) == sizeof(std::uint32_t))
        turn(reinterpret_cast<std::uint32_t*>(out));
    else
        turn(reinterpret_cast<std::uint16_t*>(out));
}

/// The second half of `for_each_stored`. Apart, as its copies lie on the stack.
template <class Visit>
[[gnu::noinline]] void for_each_copied(const RowsView& rows, const RowsView::Run& run,
                                       const Visit& visit) noexcept {
    alignas(64) std::byte copies[column_bytes];
    const std::size_t most = column_bytes / rows.row_bytes();
    for (std::size_t first = 0; first < run.rows; first += most) {
        const std::size_t count = std::min(most, run.rows - first);
        copy_rows(rows, {run.data + first * size_of(rows.dtype()), run.first + first, count}, copies);
        visit(static_cast<const std::byte*>(copies), rows.dim(), first, count,
              static_cast<const std::byte*>(nullptr));
    }
}
/// Calls `visit(data, stride, first, count, next)` with the rows of a run as a kernel takes them: all at
/// once, or, if they are columns, copies of rows `first ..` of the run.
template <class Visit>
void for_each_stored(const RowsView& rows, const RowsView::Run& run, const std::byte* next,
                     const Visit& visit) noexcept {
    if (rows.are_columns()) return for_each_copied(rows, run, visit);
    visit(run.data, rows.stride(), std::size_t{0}, run.rows, next);
}

}  // namespace kvcull::inline KVCULL_ABI::detail
