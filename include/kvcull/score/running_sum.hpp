#pragma once
/// Sums over the keys or values of a head that follow its rows, so that a decision need not read them all.

#include <cstddef>
#include <span>
#include <vector>

#include "../base/memory.hpp"
#include "concepts.hpp"

namespace kvcull::inline KVCULL_ABI {

/// A sum over a head's rows that is kept up while rows come and go, so that nobody has to read them all.
struct RunningSum {
    static constexpr std::size_t stale = all_rows;
    std::vector<double> sum;
    std::size_t rows = 0;  // held rows that it is true for; any other number of rows: it is not known

    /// Begins anew, over no weight.
    void reset(std::size_t size) {
        sum.assign(size, 0.0);
        rows = 0;
    }
    /// sum[at ..] += factor * row.
    void add(std::size_t at, double factor, std::span<const float> row) noexcept {
        for (std::size_t c = 0; c < row.size(); ++c) sum[at + c] += factor * static_cast<double>(row[c]);
    }
    [[nodiscard]] bool knows(std::size_t held) const noexcept {
        if (rows != held || sum.empty()) return false;
        for (const double x : sum)
            if (const auto narrow = static_cast<float>(x); !is_finite(narrow)) return false;
        return true;
    }
};

/// Calls `visit(index, widened row)` for the rows that are not in `keep`, ascending, or for those that are.
template <class Visit>
void for_each_row_of(const RowsView& rows, Scratch<float>& workspace, std::span<const index_t> keep,
                     bool kept, const Visit& visit) {
    const std::span<float> wide(workspace.get(rows.dim()), rows.dim());
    const auto show = [&](std::size_t j) {
        rows.widen(j, wide);
        visit(j, std::span<const float>(wide));
    };
    std::size_t j = 0;
    for (const index_t stays : keep) {
        for (; j < static_cast<std::size_t>(stays); ++j)
            if (!kept) show(j);
        if (kept) show(j);
        ++j;
    }
    for (; j < rows.rows(); ++j)
        if (!kept) show(j);
}

}  // namespace kvcull::inline KVCULL_ABI
