#pragma once
/// Executors: what a head's plan means for an engine's own memory. Rows and columns are moved; engines that
/// cannot move get runs, blocks or a mask. Nothing allocates where the caller's vectors have room.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

#include "../base/error.hpp"
#include "../base/types.hpp"
#include "../views.hpp"
#include "plan.hpp"
#include "topk.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Rows, or blocks of rows, `begin .. end - 1`.
struct IndexRange {
    index_t begin = 0, end = 0;

    [[nodiscard]] constexpr bool empty() const noexcept { return begin >= end; }
    [[nodiscard]] constexpr bool operator==(const IndexRange&) const noexcept = default;
};

/// In which order runs are listed. `descending` is for engines that close each gap at once: the runs still to
/// come then keep their row numbers.
enum class RunOrder : std::uint8_t { ascending, descending };

namespace detail {
/// Calls `visit(move, count)` for stretches of moves whose rows are neighbours on both sides: one copy each.
template <class Visit>
void for_each_stretch(std::span<const Move> moves, Visit&& visit) {
    for (std::size_t i = 0; i < moves.size();) {
        std::size_t count = 1;
        while (i + count < moves.size() &&
               moves[i + count].from == moves[i].from + static_cast<index_t>(count) &&
               moves[i + count].to == moves[i].to + static_cast<index_t>(count))
            ++count;
        visit(moves[i], count);
        i += count;
    }
}
/// Calls `visit(begin, end)` for the gaps between kept rows, ascending.
template <class Visit>
void for_each_gap(const HeadPlan& plan, Visit&& visit) {
    index_t begin = 0;
    for (std::size_t next = 0; next < plan.keep.size();) {
        skip_neighbours(plan.keep, next, begin);
        if (next == plan.keep.size()) break;
        const index_t row = plan.keep[next++];
        if (row != begin) visit(begin, row);
        begin = row + 1;
    }
    const auto rows = static_cast<index_t>(plan.rows);
    if (begin != rows) visit(begin, rows);
}
inline void check_keep(std::string_view where, const HeadPlan& plan) {
    check<error::shape_error>(ascending_below(plan.rows, plan.keep), where, "plan.keep", "not that",
                              text("rows below ", plan.rows, ", ascending"));
}
inline void check_block_rows(std::string_view where, std::size_t block_rows) {
    check<error::shape_error>(block_rows > 0, where, "block_rows", block_rows, "at least 1");
}
}  // namespace detail

/// Carries out one head's moves on an engine's own rows: `row_bytes` opaque bytes every `stride_bytes`.
/// Bit for bit, in place; a run of neighbours is one memmove. Call it once per array (K, V, scales, ..).
inline void move_rows(std::span<const Move> moves, void* data, std::size_t row_bytes,
                      std::size_t stride_bytes) noexcept {
    auto* base = static_cast<std::byte*>(data);
    const auto copy = [&](const Move& move, std::size_t bytes) {
        std::memmove(base + static_cast<std::size_t>(move.to) * stride_bytes,
                     base + static_cast<std::size_t>(move.from) * stride_bytes, bytes);
    };
    if (row_bytes == stride_bytes)
        detail::for_each_stretch(moves,
                                 [&](const Move& move, std::size_t count) { copy(move, count * row_bytes); });
    else
        for (const Move& move : moves) copy(move, row_bytes);
}

/// The same on a transposed buffer, such as V^T: `columns` is [dim, rows], a token is a column. Elements of
/// any plain type, moved bit for bit; O(dim * moves).
/// @throws shape_error unless `columns.cols == plan.rows`.
template <class T>
void move_columns(const HeadPlan& plan, MatrixView<T> columns) {
    static_assert(std::is_trivially_copyable_v<T>);
    detail::check_size("move_columns", "columns.cols", columns.cols, plan.rows);
    for (std::size_t c = 0; c < columns.rows; ++c) {
        T* const channel = columns[c].data();
        detail::for_each_stretch(plan.moves, [channel](const Move& move, std::size_t count) {
            if (count == 1)
                channel[move.to] = channel[move.from];
            else
                std::memmove(channel + move.to, channel + move.from, count * sizeof(T));
        });
    }
}

/// The rows that go, numbered as before the plan, in as few runs as possible; overwrites `runs`. For engines
/// that close the gaps themselves, so that kept rows stay ascending.
/// @throws shape_error if `plan.keep` is not ascending below `plan.rows`; so do all functions below.
inline void removed_runs(const HeadPlan& plan, RunOrder order, std::vector<IndexRange>& runs) {
    detail::check_keep("removed_runs", plan);
    runs.clear();
    detail::for_each_gap(plan, [&](index_t begin, index_t end) { runs.push_back({begin, end}); });
    if (order == RunOrder::descending) std::reverse(runs.begin(), runs.end());
}
/// The rows that stay, numbered as before the plan, in as few runs as possible, ascending.
inline void kept_runs(const HeadPlan& plan, std::vector<IndexRange>& runs) {
    detail::check_keep("kept_runs", plan);
    runs.clear();
    for (const index_t row : plan.keep)
        if (!runs.empty() && runs.back().end == row)
            ++runs.back().end;
        else
            runs.push_back({row, row + 1});
}

/// The positions that go, in as few runs as possible, for engines that remove by position (`seq_rm`). A run
/// may cover positions that no row holds any more, never one of a kept row. Rows may lie in any order.
/// Room for `plan.rows` runs is used on the way; O(rows), or O(rows log rows) where rows are not ascending.
/// @param position [plan.rows], as before the plan. @throws shape_error also if one occurs twice; `runs` then
/// holds nothing of use.
inline void removed_runs(const HeadPlan& plan, const PositionsView& position, RunOrder order,
                         std::vector<PositionRange>& runs) {
    constexpr std::string_view where = "removed_runs";
    detail::check_keep(where, plan);
    detail::check_size(where, "position.size()", position.size(), plan.rows);
    runs.clear();
    position.for_each_run([&](std::size_t, std::span<const position_t> run) {
        for (const position_t at : run) runs.push_back({at, at + 1});
    });
    for (const index_t row : plan.keep) --runs[static_cast<std::size_t>(row)].end;  // empty: it stays
    const auto by_begin = [](const PositionRange& a, const PositionRange& b) { return a.begin < b.begin; };
    if (!std::is_sorted(runs.begin(), runs.end(), by_begin)) std::sort(runs.begin(), runs.end(), by_begin);
    for (std::size_t i = 1; i < runs.size(); ++i)
        detail::check<error::shape_error>(runs[i - 1].begin != runs[i].begin, where,
                                          detail::text("position ", runs[i].begin), "that of two rows",
                                          "that of one");
    std::size_t count = 0;
    bool open = false;  // the row before goes too
    for (const PositionRange row : runs) {
        const bool goes = row.begin != row.end;
        if (goes && open)
            runs[count - 1].end = row.end;
        else if (goes)
            runs[count++] = row;
        open = goes;
    }
    runs.resize(count);
    if (order == RunOrder::descending) std::reverse(runs.begin(), runs.end());
}

/// Blocks of `block_rows` rows that hold no kept row, ascending: an engine frees them at once and moves
/// nothing. The last block may be partly filled. @throws shape_error also if `block_rows` is 0.
inline void empty_blocks(const HeadPlan& plan, std::size_t block_rows, std::vector<index_t>& blocks) {
    detail::check_block_rows("empty_blocks", block_rows);
    detail::check_keep("empty_blocks", plan);
    blocks.clear();
    detail::for_each_gap(plan, [&](index_t begin, index_t end) {
        const auto last = static_cast<std::size_t>(end);
        std::size_t block = (static_cast<std::size_t>(begin) + block_rows - 1) / block_rows;
        for (; block * block_rows < last && (last == plan.rows || (block + 1) * block_rows <= last); ++block)
            blocks.push_back(static_cast<index_t>(block));
    });
}
/// Blocks that the plan's moves leave without rows: those beyond the kept ones.
[[nodiscard]] inline IndexRange trailing_blocks(const HeadPlan& plan, std::size_t block_rows) {
    detail::check_block_rows("trailing_blocks", block_rows);
    detail::check_keep("trailing_blocks", plan);
    const auto blocks = [block_rows](std::size_t rows) {
        return static_cast<index_t>(rows / block_rows + (rows % block_rows != 0 ? 1 : 0));
    };
    return {blocks(plan.keep.size()), blocks(plan.rows)};
}

/// One byte per row as before the plan: 1 stays, 0 goes. @param mask [plan.rows], overwritten.
inline void keep_mask(const HeadPlan& plan, std::span<std::uint8_t> mask) {
    detail::check_size("keep_mask", "mask.size()", mask.size(), plan.rows);
    detail::check_keep("keep_mask", plan);
    std::fill(mask.begin(), mask.end(), std::uint8_t{0});
    for (const index_t row : plan.keep) mask[static_cast<std::size_t>(row)] = 1;
}

}  // namespace kvcull::inline KVCULL_ABI
