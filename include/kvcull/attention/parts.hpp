#pragma once
/// Attention over a long run of rows in parts, which may run side by side, and their merge. All query rows
/// see the same cached rows: those of one token.

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "attend.hpp"
#include "softmax.hpp"

namespace kvcull::inline KVCULL_ABI {

/// How cached rows `begin .. end - 1` are cut. It depends on the rows alone, so the result does not depend on
/// how many threads there are.
struct Parts {
    /// Rows of a part, roughly: enough to pay for the merge, few enough for two threads to share one head.
    static constexpr std::size_t usual_rows = 4096;

    std::size_t begin = 0, end = 0;

    [[nodiscard]] constexpr std::size_t count() const noexcept {
        return std::max<std::size_t>(1, (end - begin + usual_rows / 2) / usual_rows);
    }
    /// First row of a part; of part `count()`: the end. Parts begin where blocks usually do.
    [[nodiscard]] constexpr std::size_t first(std::size_t part) const noexcept {
        if (part == 0) return begin;
        if (part == count()) return end;
        return (begin + (end - begin) * part / count()) / 64 * 64;
    }
};

namespace detail {

/// What `attend` does, for cached rows `begin .. end - 1` as if they were all: `want.lse` and `want.output`
/// are theirs; `want.attention` and `want.logits`, [R, n], get these columns, with weights that sum to 1.
inline void attend_part(const simd::Kernels& kernels, MatrixView<const float> q, const RowsView& k,
                        const RowsView& v, std::size_t begin, std::size_t end, const LogitRule& rule,
                        const AttentionRows& want) {
    const MatrixView<float>&attention = want.attention, &output = want.output;
    for_each_piece(k, begin, end, [&](const RowsView::Run& piece, const std::byte* next) {
        dots(kernels, q.data, q.stride, q.rows, k, piece, rule.scale, attention.data + piece.first,
             attention.stride, next);
    });
    for (std::size_t row = 0; row < q.rows; ++row) {
        const std::span<float> weights = attention[row].subspan(begin, end - begin);
        finish_logits(rule, row, begin, weights);
        if (!want.logits.empty()) std::copy(weights.begin(), weights.end(), want.logits[row].data() + begin);
        kernels.softmax(weights.data(), weights.size(), &want.lse[row]);
        std::fill(output[row].begin(), output[row].end(), 0.0F);
    }
    for_each_piece(v, begin, end, [&](const RowsView::Run& piece, const std::byte* next) {
        weighted_sum(kernels, attention.data + piece.first, attention.stride, q.rows, v, piece, output.data,
                     output.stride, next);
    });
}

inline void scale(float* row, std::size_t n, float factor) noexcept {
    constexpr std::size_t block = 32;  // a constant, so that -O2 makes vectors of it
    for (; n >= block; n -= block, row += block)
        for (std::size_t i = 0; i < block; ++i) row[i] *= factor;
    for (std::size_t i = 0; i < n; ++i) row[i] *= factor;
}

/// One result out of those of all parts, in their order.
/// @param lse [count, R], output [count * R, d_v]: of the parts. @param weights  of attention too.
inline void merge_parts(const Parts& parts, MatrixView<const float> lse, MatrixView<const float> output,
                        bool weights, const AttentionRows& want) {
    for (std::size_t row = 0; row < lse.cols; ++row) {
        const std::span<float> out = want.output[row];
        std::copy(output[row].begin(), output[row].end(), out.begin());
        float& total = want.lse[row];
        total = lse[0][row];
        for (std::size_t part = 1; part < lse.rows; ++part)
            merge(out, total, output[part * lse.cols + row], lse[part][row]);
        if (is_nan(total)) std::fill(out.begin(), out.end(), quiet_nan());
        if (!weights) continue;
        float* const attention = want.attention[row].data();
        std::fill(attention, attention + parts.begin, 0.0F);
        std::fill(attention + parts.end, attention + want.attention.cols, 0.0F);
        for (std::size_t part = 0; part < lse.rows; ++part) {
            const bool counts = is_finite(total) && is_finite(lse[part][row]);
            const float factor = counts ? std::exp(lse[part][row] - total) : 0.0F;
            scale(attention + parts.first(part), parts.first(part + 1) - parts.first(part), factor);
        }
    }
}

}  // namespace detail

}  // namespace kvcull::inline KVCULL_ABI
