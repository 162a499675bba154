#pragma once
/// Sums over the keys or values of a head that follow its rows, so that a decision need not read them all.

#include <cstddef>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "../base/memory.hpp"
#include "concepts.hpp"

namespace kvcull::inline KVCULL_ABI {

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

/// A sum over a head's rows that is kept up while rows come and go, so that nobody has to read them all.
struct RunningSum {
    static constexpr std::size_t stale = all_rows;
    std::vector<double> sum;
    std::size_t rows = 0;  // held rows that it is true for; any other number of rows: it is not known

    [[nodiscard]] auto parts() noexcept { return std::tie(sum, rows); }

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
    /// The rows of a call come: @returns whether they are to be added, as the sum is true for those before.
    bool grow(const HeadStep& step) noexcept {
        const bool known = rows == step.n() - step.added;
        rows = known ? step.n() : stale;
        return known;
    }
    /// All rows but `keep` leave: `add(index, sign, row)` adds one of `held` with a sign. What is not known
    /// is summed anew over what stays.
    template <class Add>
    void shrink(const RowsView& held, Scratch<float>& workspace, std::span<const index_t> keep,
                const Add& add) {
        const bool known = knows(held.rows());
        if (!known) reset(sum.size());
        for_each_row_of(held, workspace, keep, !known,
                        [&](std::size_t j, std::span<const float> row) { add(j, known ? -1.0 : 1.0, row); });
        rows = keep.size();
    }
};

/// Whether numbers that a policy takes while attention reads the rows are those of the rows held now.
class ReadAlong {
  public:
    /// A pass begins, and the call's rows have been taken in before it.
    void begin() noexcept {
        began_ = true;
        rows_ = RunningSum::stale;
    }
    /// Numbers of `piece` are taken.
    void read(const RowsView::Run& piece, std::size_t n) noexcept {
        if (piece.first + piece.rows == n) finish(n);
    }
    /// The numbers of all `n` rows are taken.
    void finish(std::size_t n) noexcept { rows_ = n; }
    /// In `observe`: @returns whether no pass began in this call, so that its rows are still to be taken in.
    bool missed() noexcept {
        if (std::exchange(began_, false)) return false;
        rows_ = RunningSum::stale;
        return true;
    }
    [[nodiscard]] bool knows(std::size_t held) const noexcept { return rows_ == held; }
    [[nodiscard]] auto parts() noexcept { return std::tie(rows_, began_); }

  private:
    std::size_t rows_ = RunningSum::stale;
    bool began_ = false;
};

}  // namespace kvcull::inline KVCULL_ABI
