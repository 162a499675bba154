#pragma once
/// What an evictor remembers of the positions in a head's rows: enough to notice a view that lies about them,
/// in two numbers.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "../base/error.hpp"
#include "../select/executors.hpp"
#include "../select/plan.hpp"
#include "../views.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Sums over the rows j of a head, modulo 2^64: of its positions p_j, and of j p_j. One altered position
/// changes the first, two rows that changed places the second; so does whatever else is wrong, unless several
/// errors cancel in both. Rows that enter, leave or move change the sums by as much: only a comparison reads
/// all rows.
struct HeldPositions {
    std::uint64_t sum = 0, by_row = 0;
    std::size_t rows = 0;  // that were counted; of a head with another number, nothing is known

    [[nodiscard]] constexpr bool operator==(const HeldPositions&) const noexcept = default;

    /// Those of the first `rows` rows. O(rows).
    [[nodiscard]] static HeldPositions of(const PositionsView& positions, std::size_t rows) {
        HeldPositions held{.rows = rows};
        positions.for_each_run([&](std::size_t first, std::span<const position_t> run) {
            held.add(first, run.first(std::min(run.size(), rows - std::min(first, rows))));
        });
        return held;
    }
    /// Counts the rows beyond the first `known` too, or all if those were not counted.
    void append(const PositionsView& positions, std::size_t known) {
        if (rows != known) *this = of(positions, known);
        for (; rows < positions.size(); ++rows) add(rows, positions[rows]);
    }
    /// Rows leave and move. @param positions  as before the plan. O(rows that leave or move).
    void follow(const HeadPlan& plan, const PositionsView& positions) noexcept {
        if (rows != plan.rows) return;
        detail::for_each_gap(plan, [&](index_t begin, index_t end) {
            for (auto j = static_cast<std::size_t>(begin); j < static_cast<std::size_t>(end); ++j) {
                sum -= number(positions[j]);
                by_row -= number(positions[j]) * j;
            }
        });
        for (const Move& move : plan.moves)
            by_row -= number(positions[static_cast<std::size_t>(move.from)]) *
                      static_cast<std::uint64_t>(move.from - move.to);
        rows = plan.keep.size();
    }

  private:
    [[nodiscard]] static std::uint64_t number(position_t position) noexcept {
        return static_cast<std::uint64_t>(position);
    }
    void add(std::size_t row, position_t position) noexcept {
        sum += number(position);
        by_row += number(position) * row;
    }
    /// Rows from `first` on, by additions alone: `even_before` counts an even row once for every even row
    /// after it. Two chains, so that one addition need not wait for the other.
    void add(std::size_t first, std::span<const position_t> run) noexcept {
        std::uint64_t even = 0, odd = 0, even_before = 0, odd_before = 0;
        const std::size_t pairs = run.size() / 2;
        for (std::size_t pair = 0; pair < pairs; ++pair) {
            even_before += even;
            odd_before += odd;
            even += number(run[2 * pair]);
            odd += number(run[2 * pair + 1]);
        }
        sum += even + odd;
        by_row += (even + odd) * first + odd + 2 * ((even + odd) * (pairs - 1) - even_before - odd_before);
        if (run.size() % 2 != 0) add(first + run.size() - 1, run.back());
    }
};

namespace detail {

/// Says what is wrong with positions whose sums are not the `held` ones, as far as it can be told.
[[noreturn, gnu::cold, gnu::noinline]] inline void fail_positions(std::string_view where,
                                                                  std::string_view name, std::size_t head,
                                                                  const PositionsView& positions,
                                                                  const HeldPositions& held, bool ascending) {
    const HeldPositions got = HeldPositions::of(positions, held.rows);
    const auto fail_row = [&](std::size_t row, const auto& wanted) {
        fail<error::shape_error>(where, text(name, "[", head, "].position[", row, "]"), positions[row],
                                 wanted);
    };
    std::vector<std::size_t> order(held.rows);
    for (std::size_t j = 0; j < order.size(); ++j) order[j] = j;
    if (ascending)
        for (std::size_t j = 1; j < order.size(); ++j)
            if (positions[j] <= positions[j - 1]) fail_row(j, text("beyond ", positions[j - 1]));
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
        return positions[a] != positions[b] ? positions[a] < positions[b] : a < b;
    });
    for (std::size_t j = 1; j < order.size(); ++j)
        if (positions[order[j - 1]] == positions[order[j]])
            fail_row(order[j], text("another than in row ", order[j - 1]));
    const std::uint64_t more = got.sum - held.sum, more_by_row = got.by_row - held.by_row;
    for (std::size_t j = 0; more != 0 && j < held.rows; ++j)
        if (more * j == more_by_row)  // a single row, if it is one
            fail_row(j, static_cast<position_t>(static_cast<std::uint64_t>(positions[j]) - more));
    fail<error::shape_error>(where, text(name, "[", head, "].position"), "in another order, or of other rows",
                             "what the last call left");
}

/// Compares what views say of all but their newest `added` rows with what is `held` of them, if anything is.
inline void check_positions(std::string_view where, std::string_view name, std::span<const HeadView> cached,
                            std::span<const HeldPositions> held, std::size_t added, bool ascending) {
    for (std::size_t h = 0; h < cached.size(); ++h) {
        const std::size_t rows = cached[h].rows() - added;
        if (held[h].rows == rows && HeldPositions::of(cached[h].position, rows) != held[h]) [[unlikely]]
            fail_positions(where, name, h, cached[h].position, held[h], ascending);
    }
}

}  // namespace detail

}  // namespace kvcull::inline KVCULL_ABI
