#pragma once
/// Non-owning views: shapes and strides, nothing else. They are passed by value and never outlive a call.

#include <algorithm>
#include <cstddef>
#include <span>

#include "base/error.hpp"
#include "base/quantised.hpp"
#include "base/types.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Row-major matrix; `stride` counts elements from one row to the next.
template <class T>
struct MatrixView {
    T* data = nullptr;
    std::size_t rows = 0, cols = 0, stride = 0;

    constexpr MatrixView() = default;
    constexpr MatrixView(T* data_, std::size_t rows_, std::size_t cols_) noexcept
        : MatrixView(data_, rows_, cols_, cols_) {}
    constexpr MatrixView(T* data_, std::size_t rows_, std::size_t cols_, std::size_t stride_) noexcept
        : data(data_), rows(rows_), cols(cols_), stride(stride_) {}
    constexpr operator MatrixView<const T>() const noexcept { return {data, rows, cols, stride}; }

    [[nodiscard]] constexpr std::span<T> operator[](std::size_t row) const noexcept {
        return {data + row * stride, cols};
    }
    [[nodiscard]] constexpr bool empty() const noexcept { return rows == 0 || cols == 0; }
};

/// What the heads of one layer bring or take in one call: `[heads, tokens, dim]` by strides, so an engine
/// hands over its own buffers whether they are head-major or token-major. The channels of a row lie together.
template <class T>
struct HeadsView {
    T* data = nullptr;
    std::size_t heads = 0, tokens = 0, dim = 0, head_stride = 0, token_stride = 0;

    constexpr operator HeadsView<const T>() const noexcept {
        return {data, heads, tokens, dim, head_stride, token_stride};
    }
    [[nodiscard]] constexpr T* row(std::size_t head, std::size_t token) const noexcept {
        return data + head * head_stride + token * token_stride;
    }
    [[nodiscard]] constexpr bool empty() const noexcept { return data == nullptr; }
    /// Tokens `first .. first + count - 1`.
    [[nodiscard]] constexpr HeadsView slice(std::size_t first, std::size_t count) const noexcept {
        HeadsView part = *this;
        if (!empty()) part.data += first * token_stride;
        part.tokens = count;
        return part;
    }
};
/// `[heads, tokens, dim]`: the rows of one head lie together.
template <class T>
[[nodiscard]] constexpr HeadsView<T> head_major(T* data, std::size_t heads, std::size_t tokens,
                                                std::size_t dim) noexcept {
    return {data, heads, tokens, dim, tokens * dim, dim};
}
/// `[tokens, heads, dim]`: what a projection of a token's hidden state gives.
template <class T>
[[nodiscard]] constexpr HeadsView<T> token_major(T* data, std::size_t heads, std::size_t tokens,
                                                 std::size_t dim) noexcept {
    return {data, heads, tokens, dim, dim, heads * dim};
}

/// Cached rows of one KV head: `rows` rows of `dim` numbers of type `dtype`, as one strided run or as a table
/// of blocks of `block_rows` rows each (the last one may be partly filled). `stride` counts elements between
/// rows: numbers, or groups of int8 and int4 rows. The element type is a value and not a template parameter,
/// so that a policy compiles once for all of them.
///
/// Rows may also be columns: of one matrix [dim, capacity], as engines without a fused kernel hold V, or of
/// blocks [dim, block_rows]. Whoever reads rows by `attention/row_kernels.hpp`, or `widen`, need not care.
class RowsView {
  public:
    /// Longest stretch of rows that lie `stride` elements apart.
    struct Run {
        const std::byte* data;
        std::size_t first, rows;
    };

    constexpr RowsView() = default;
    RowsView(const float* data, std::size_t rows, std::size_t dim, std::size_t stride) noexcept
        : RowsView(data, DType::f32, rows, dim, stride) {}
    RowsView(const void* data, DType dtype, std::size_t rows, std::size_t dim, std::size_t stride) noexcept
        : single_(static_cast<const std::byte*>(data)),
          rows_(rows),
          dim_(dim),
          stride_(stride),
          block_rows_(rows),
          dtype_(dtype) {}
    /// Block `b` starts at `blocks[b] + offset` bytes.
    RowsView(const std::byte* const* blocks, std::size_t offset, DType dtype, std::size_t block_rows,
             std::size_t rows, std::size_t dim, std::size_t stride) noexcept
        : blocks_(blocks),
          offset_(offset),
          rows_(rows),
          dim_(dim),
          stride_(stride),
          block_rows_(block_rows),
          dtype_(dtype) {}

    /// Most channels of rows that are columns: those are copied on the stack, a few rows at a time.
    static constexpr std::size_t max_column_dim = 4096;
    /// Columns 0 .. rows - 1 of a matrix [dim, capacity]. @throws shape_error if it has not as many.
    [[nodiscard]] static RowsView columns(const void* data, DType dtype, std::size_t rows, std::size_t dim,
                                          std::size_t capacity) {
        detail::check<error::shape_error>(rows <= capacity, "RowsView::columns", "rows", rows,
                                          detail::text("at most capacity = ", capacity));
        return RowsView(data, dtype, rows, dim, 1).as_columns(capacity);
    }
    /// Columns of blocks, each [dim, block_rows]; block `b` starts at `blocks[b] + offset` bytes.
    [[nodiscard]] static RowsView columns(const std::byte* const* blocks, std::size_t offset, DType dtype,
                                          std::size_t block_rows, std::size_t rows, std::size_t dim) {
        return RowsView(blocks, offset, dtype, block_rows, rows, dim, 1).as_columns(block_rows);
    }

    [[nodiscard]] constexpr std::size_t rows() const noexcept { return rows_; }
    [[nodiscard]] constexpr std::size_t dim() const noexcept { return dim_; }
    [[nodiscard]] constexpr std::size_t stride() const noexcept { return stride_; }
    /// Elements from one channel of a row to the next.
    [[nodiscard]] constexpr std::size_t channel_stride() const noexcept { return channel_stride_; }
    /// Whether the channels of a row lie apart.
    [[nodiscard]] constexpr bool are_columns() const noexcept { return channel_stride_ != 1; }
    [[nodiscard]] constexpr DType dtype() const noexcept { return dtype_; }
    [[nodiscard]] constexpr std::size_t row_bytes() const noexcept { return kvcull::row_bytes(dtype_, dim_); }

    /// The first channel of a row; the others follow every `channel_stride` elements.
    [[nodiscard]] const std::byte* row(std::size_t index) const noexcept {
        const std::size_t step = stride_ * size_of(dtype_);
        if (blocks_ == nullptr) return single_ + index * step;
        return blocks_[index / block_rows_] + offset_ + index % block_rows_ * step;
    }
    /// The run that holds row `index`, cut to begin there.
    [[nodiscard]] Run run_at(std::size_t index) const noexcept {
        const std::size_t end =
            blocks_ == nullptr ? rows_ : std::min(rows_, (index / block_rows_ + 1) * block_rows_);
        return {row(index), index, end - index};
    }
    /// Rows 0 .. count - 1.
    [[nodiscard]] constexpr RowsView first(std::size_t count) const noexcept {
        RowsView view = *this;
        view.rows_ = count;
        return view;
    }
    /// Calls `visit(Run)` for the runs that cover rows `begin .. end - 1`, in order.
    template <class Visit>
    void for_each_run(std::size_t begin, std::size_t end, Visit&& visit) const {
        while (begin < end) {
            Run run = run_at(begin);
            run.rows = std::min(run.rows, end - begin);
            visit(run);
            begin += run.rows;
        }
    }
    /// Copies row `index` to `out[dim]`, widened to float.
    void widen(std::size_t index, std::span<float> out) const noexcept {
        const std::byte* source = row(index);
        const auto copy = [&]<class T>(const T* from) {
            for (std::size_t c = 0; c < dim_; ++c) out[c] = to_float(from[c * channel_stride_]);
        };
        if (dtype_ == DType::f32) copy(reinterpret_cast<const float*>(source));
        if (dtype_ == DType::f16) copy(reinterpret_cast<const float16*>(source));
        if (dtype_ == DType::bf16) copy(reinterpret_cast<const bfloat16*>(source));
        if (dtype_ == DType::int8)
            widen_groups(reinterpret_cast<const int8_group*>(source), out.data(), dim_);
        if (dtype_ == DType::int4)
            widen_groups(reinterpret_cast<const int4_group*>(source), out.data(), dim_);
    }

  private:
    [[nodiscard]] RowsView as_columns(std::size_t channel_stride) const {
        detail::check<error::shape_error>(channels_of(dtype_) == 1, "RowsView::columns", "dtype",
                                          name_of(dtype_),
                                          "f32, f16 or bf16: a group of channels cannot be cut");
        detail::check<error::shape_error>(dim_ <= max_column_dim, "RowsView::columns", "dim", dim_,
                                          detail::text("at most ", max_column_dim));
        RowsView view = *this;
        view.channel_stride_ = channel_stride;
        return view;
    }

    const std::byte* single_ = nullptr;
    const std::byte* const* blocks_ = nullptr;
    std::size_t offset_ = 0, rows_ = 0, dim_ = 0, stride_ = 0, block_rows_ = 1, channel_stride_ = 1;
    DType dtype_ = DType::f32;
};

/// Positions of one KV head's rows, with the same paging as its RowsView.
class PositionsView {
  public:
    constexpr PositionsView() = default;
    PositionsView(std::span<const position_t> single) noexcept
        : single_(single.data()), size_(single.size()) {}
    PositionsView(const std::byte* const* blocks, std::size_t offset, std::size_t block_rows,
                  std::size_t size) noexcept
        : blocks_(blocks), offset_(offset), block_rows_(block_rows), size_(size) {}

    [[nodiscard]] constexpr std::size_t size() const noexcept { return size_; }
    /// Positions of rows 0 .. count - 1.
    [[nodiscard]] constexpr PositionsView first(std::size_t count) const noexcept {
        PositionsView view = *this;
        view.size_ = count;
        return view;
    }
    [[nodiscard]] position_t operator[](std::size_t index) const noexcept {
        if (blocks_ == nullptr) return single_[index];
        return block(index / block_rows_)[index % block_rows_];
    }
    /// Calls `visit(first row, positions)` for stretches that lie together, in order: all of them, without
    /// the division that each `[]` costs. Blocks lie too far apart for the hardware to foresee the next one.
    template <class Visit>
    void for_each_run(Visit&& visit) const {
        constexpr std::size_t ahead = 4, line = 64;
        if (blocks_ == nullptr) return visit(std::size_t{0}, std::span(single_, size_));
        for (std::size_t first = 0; first < size_; first += block_rows_) {
            const std::size_t index = first / block_rows_;
            if (first + ahead * block_rows_ < size_)
                for (std::size_t byte = 0; byte < block_rows_ * sizeof(position_t); byte += line)
                    __builtin_prefetch(blocks_[index + ahead] + offset_ + byte);
            visit(first, std::span(block(index), std::min(block_rows_, size_ - first)));
        }
    }

  private:
    [[nodiscard]] const position_t* block(std::size_t index) const noexcept {
        return reinterpret_cast<const position_t*>(blocks_[index] + offset_);
    }

    const position_t* single_ = nullptr;
    const std::byte* const* blocks_ = nullptr;
    std::size_t offset_ = 0, block_rows_ = 1, size_ = 0;
};

/// All that is cached of one KV head.
struct HeadView {
    RowsView k, v;
    PositionsView position;

    [[nodiscard]] std::size_t rows() const noexcept { return k.rows(); }
    /// Rows 0 .. count - 1.
    [[nodiscard]] HeadView first(std::size_t count) const noexcept {
        return {k.first(count), v.first(count), position.first(count)};
    }
};
/// One layer: a HeadView per KV head. Heads may differ in length.
using LayerView = std::span<const HeadView>;
/// A sequence: `heads[layer * kv_heads + head]`.
struct CacheView {
    std::span<const HeadView> heads;
    std::size_t kv_heads = 0;

    [[nodiscard]] LayerView layer(std::size_t index) const noexcept {
        return heads.subspan(index * kv_heads, kv_heads);
    }
};

/// Which cached rows a query row may see: rows below `sinks`, and rows `begin .. end - 1`.
/// Causal: {0, 0, end}. A sliding window of w with s sinks: {s, end - w, end}.
struct Visible {
    std::size_t sinks = 0, begin = 0, end = 0;

    [[nodiscard]] constexpr std::size_t count() const noexcept {
        const std::size_t head = std::min(sinks, end);
        return head + (end > std::max(begin, head) ? end - std::max(begin, head) : 0);
    }
};

}  // namespace kvcull::inline KVCULL_ABI
