#pragma once
/// Attention of query rows over the cached rows of one KV head: one pass over K and one over V, shared by all
/// rows.

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "../base/error.hpp"
#include "../simd/kernels.hpp"
#include "../views.hpp"
#include "logits.hpp"
#include "row_kernels.hpp"

namespace kvcull::inline KVCULL_ABI {

/// What one call produces for R query rows of one KV head over n cached rows. Rows may be query heads of the
/// group, tokens of a window or both; the result of a row does not depend on the other rows of the call.
struct AttentionRows {
    /// [R, n] required: softmax weights; 0 where invisible, all 0 in a bad row
    MatrixView<float> attention = {};
    /// [R] required: log-sum-exp; -Inf: the row sees nothing (output 0); NaN: bad row (output NaN)
    std::span<float> lse = {};
    MatrixView<float> logits = {};     ///< [R, n] or empty: what softmax sees, 0 where invisible
    MatrixView<float> output = {};     ///< [R, d_v] or empty: then V is not read
    std::span<float> column_sum = {};  ///< [n] or empty: += attention over the rows
    std::span<float> column_max = {};  ///< [n] or empty: max with attention over the rows
};

namespace detail {

/// Visible rows as two disjoint ranges: 0 .. head - 1 and begin .. end - 1, with head <= begin <= end.
struct VisibleRanges {
    std::size_t head, begin, end;

    explicit constexpr VisibleRanges(const Visible& visible) noexcept
        : head(std::min(visible.sinks, visible.end)),
          begin(std::min(visible.begin, visible.end)),
          end(visible.end) {
        if (begin <= head) head = begin = end;
    }
};

/// Which of the two ranges of a row is meant.
enum class Part : unsigned char { head, band };

/// Calls `visit(first, last, begin, end)` so that every visible entry of `part` of every query row is covered
/// once, ascending within a row, and rows that see the same entries are visited together: what all of them
/// see at once, what is left of it by halves.
template <class Visit>
void for_each_shared(std::span<const Visible> visible, Part part, std::size_t first, std::size_t last,
                     std::size_t low, std::size_t high, const Visit& visit) {
    if (first == last || low >= high) return;
    std::size_t begin = low, end = high, all_begin = high, all_end = low;
    for (std::size_t row = first; row < last; ++row) {
        const VisibleRanges ranges(visible[row]);
        const std::size_t from = std::max(low, part == Part::head ? 0 : ranges.begin);
        const std::size_t to = std::min(high, part == Part::head ? ranges.head : ranges.end);
        begin = std::max(begin, from);
        end = std::min(end, to);
        if (from >= to) continue;
        all_begin = std::min(all_begin, from);
        all_end = std::max(all_end, to);
    }
    if (all_begin >= all_end) return;
    const bool shared = begin < end;
    if (last - first == 1) {
        visit(first, last, begin, end);
        return;
    }
    const std::size_t middle = first + (last - first) / 2;
    const std::size_t left = shared ? begin : all_end;
    for_each_shared(visible, part, first, middle, all_begin, left, visit);
    for_each_shared(visible, part, middle, last, all_begin, left, visit);
    if (!shared) return;
    visit(first, last, begin, end);
    for_each_shared(visible, part, first, middle, end, all_end, visit);
    for_each_shared(visible, part, middle, last, end, all_end, visit);
}

/// Nobody takes part in the passes over keys and values.
struct NoReader {
    static constexpr bool queries = false;
    static void products(std::span<const float> /*of_keys*/) noexcept {}
    static void values(const RowsView::Run& /*piece*/) noexcept {}
};

inline void check_attend(const MatrixView<const float>& q, const RowsView& k, const RowsView& v,
                         std::span<const Visible> visible, const AttentionRows& want) {
    constexpr std::string_view where = "attend";
    const std::size_t rows = q.rows, n = k.rows();
    check_size(where, "q.cols", q.cols, k.dim());
    check_size(where, "visible.size()", visible.size(), rows);
    check_size(where, "want.attention.rows", want.attention.rows, rows);
    check_size(where, "want.attention.cols", want.attention.cols, n);
    check_size(where, "want.lse.size()", want.lse.size(), rows);
    if (!want.logits.empty()) {
        check_size(where, "want.logits.rows", want.logits.rows, rows);
        check_size(where, "want.logits.cols", want.logits.cols, n);
    }
    if (!want.output.empty()) {
        check_size(where, "v.rows()", v.rows(), n);
        check_size(where, "want.output.rows", want.output.rows, rows);
        check_size(where, "want.output.cols", want.output.cols, v.dim());
    }
    if (!want.column_sum.empty()) check_size(where, "want.column_sum.size()", want.column_sum.size(), n);
    if (!want.column_max.empty()) check_size(where, "want.column_max.size()", want.column_max.size(), n);
    for (std::size_t row = 0; row < rows; ++row)
        if (visible[row].end > n) [[unlikely]]
            fail<error::shape_error>(where, "visible[" + std::to_string(row) + "].end", visible[row].end,
                                     "at most " + std::to_string(n));
}

}  // namespace detail

/// Attention of R query rows over n cached rows of one KV head. Invisible entries are skipped, not
/// multiplied: what K and V hold there reaches no result. A row whose visible logits hold a NaN or +Inf is
/// bad, see AttentionRows. Cost: reads K once and, if `want.output` is given, V once; R n (d + d_v)
/// multiply-adds. Allocates nothing.
/// @param q        [R, d]. @param k [n, d], of any type. @param v [n, d_v], read only if an output is
/// wanted.
/// @param visible  [R], `end` at most n. @param rule  what becomes of the dot products; a number is their
/// scale.
/// @param reader   gets every piece of V right after it was read, while it is in cache; if all rows see the
/// same entries, each piece once, in order. If they see all of them and `reader.queries`, a query of its own
/// lies behind those of `q`: it gets the products [n] of that with the keys, times the scale, for which there
/// is room behind `want.attention`.
/// @throws shape_error for sizes that do not fit; nothing is written then.
template <class Reader = detail::NoReader>
void attend(const simd::Kernels& kernels, MatrixView<const float> q, const RowsView& k, const RowsView& v,
            std::span<const Visible> visible, const LogitRule& rule, const AttentionRows& want,
            const Reader& reader = {}) {
    detail::check_attend(q, k, v, visible, want);
    const std::size_t rows = q.rows, n = k.rows();
    const MatrixView<float>& attention = want.attention;
    const bool queries =
        reader.queries && std::all_of(visible.begin(), visible.end(), [n](const Visible& row) {
            return row.begin <= row.sinks && row.end == n;
        });

    const auto score = [&](std::size_t first, std::size_t last, std::size_t begin, std::size_t end) {
        detail::for_each_piece(k, begin, end, [&](const RowsView::Run& piece, const std::byte* next) {
            detail::dots(kernels, q[first].data(), q.stride, last - first + (queries ? 1 : 0), k, piece,
                         rule.scale, attention[first].data() + piece.first, attention.stride, next);
        });
    };
    detail::for_each_shared(visible, detail::Part::head, 0, rows, 0, n, score);
    detail::for_each_shared(visible, detail::Part::band, 0, rows, 0, n, score);
    if (queries) reader.products({attention.data + rows * attention.stride, n});

    for (std::size_t row = 0; row < rows; ++row) {
        const detail::VisibleRanges ranges(visible[row]);
        const std::size_t band = ranges.end - ranges.begin;
        float* weights = attention[row].data();
        std::fill(weights + ranges.head, weights + ranges.begin, 0.0F);
        std::fill(weights + ranges.end, weights + n, 0.0F);
        detail::finish_logits(rule, row, 0, {weights, ranges.head});
        detail::finish_logits(rule, row, ranges.begin, {weights + ranges.begin, band});
        if (!want.logits.empty()) std::copy(weights, weights + n, want.logits[row].data());
        // The softmax wants its row in one piece: the band moves next to the head, and back.
        if (band != 0 && ranges.begin != ranges.head)
            std::memmove(weights + ranges.head, weights + ranges.begin, band * sizeof(float));
        kernels.softmax(weights, ranges.head + band, &want.lse[row]);
        if (band != 0 && ranges.begin != ranges.head) {
            std::memmove(weights + ranges.begin, weights + ranges.head, band * sizeof(float));
            std::fill(weights + ranges.head, weights + ranges.begin, 0.0F);
        }
        if (want.column_max.empty()) continue;
        kernels.maximum(want.column_max.data(), weights, ranges.head);
        kernels.maximum(want.column_max.data() + ranges.begin, weights + ranges.begin, band);
    }
    // Invisible weights are 0, so whole rows can be added, several at once.
    if (!want.column_sum.empty())
        kernels.add_rows(want.column_sum.data(), attention.data, attention.stride, rows, n);
    if (want.output.empty()) return;

    const MatrixView<float>& output = want.output;
    for (std::size_t row = 0; row < rows; ++row) std::fill(output[row].begin(), output[row].end(), 0.0F);
    const auto gather = [&](std::size_t first, std::size_t last, std::size_t begin, std::size_t end) {
        detail::for_each_piece(v, begin, end, [&](const RowsView::Run& piece, const std::byte* next) {
            detail::weighted_sum(kernels, attention[first].data() + piece.first, attention.stride,
                                 last - first, v, piece, output[first].data(), output.stride, next);
            reader.values(piece);
        });
    };
    detail::for_each_shared(visible, detail::Part::head, 0, rows, 0, n, gather);
    detail::for_each_shared(visible, detail::Part::band, 0, rows, 0, n, gather);
    constexpr float nan = quiet_nan();
    for (std::size_t row = 0; row < rows; ++row)
        if (is_nan(want.lse[row])) std::fill(output[row].begin(), output[row].end(), nan);
}

}  // namespace kvcull::inline KVCULL_ABI
