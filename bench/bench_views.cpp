/// views/columns/<type>/n:<rows>: attention's sum over V and the changes of its output for four query heads,
/// with V as columns of [128, n] and as rows, in turn: `over_rows`.
/// views/positions/n:<rows>: comparing a head's old positions with what is remembered of them.

#include <algorithm>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "groups.hpp"
#include "kvcull/cache/held_positions.hpp"
#include "kvcull/score/removal.hpp"
#include "support/cases.hpp"
#include "support/rows.hpp"

namespace kvcull::bench {
namespace {

constexpr std::size_t dim = 128, group = 4;

/// [rows, dim] turned to [dim, rows].
template <class T>
std::vector<T> turned(const std::vector<T>& rows) {
    const std::size_t n = rows.size() / dim;
    std::vector<T> columns(rows.size());
    for (std::size_t j = 0; j < n; ++j)
        for (std::size_t c = 0; c < dim; ++c) columns[c * n + j] = rows[j * dim + c];
    return columns;
}

template <class T>
void columns(benchmark::State& state, DType dtype, const std::vector<T>& rows) {
    const std::size_t n = rows.size() / dim;
    const std::vector<T> other = turned(rows);
    const RowsView as_rows(rows.data(), dtype, n, dim, dim);
    const RowsView as_columns = RowsView::columns(other.data(), dtype, n, dim, n);
    std::vector<float> weights(group * n), out(group * dim), error(n), scratch(removal_scratch(group, dim));
    const simd::Kernels& kernels = simd::kernels();
    const auto pass = [&](const RowsView& v) {
        std::fill(weights.begin(), weights.end(), 1.0F / static_cast<float>(n));
        const MatrixView<float> w(weights.data(), group, n), o(out.data(), group, dim);
        const Stopwatch watch;
        detail::weighted_mean(kernels, w, v, o);
        removal_errors(kernels, w, v, {.points = o}, Changes::norm, error, scratch.data());
        benchmark::ClobberMemory();
        return watch.elapsed();
    };
    pass(as_rows);
    pass(as_columns);
    Series time;
    Ratios ratio;
    for (auto _ : state) {
        const Time under = pass(as_rows), over = pass(as_columns);
        time.add(over, state);
        ratio.add(over.busy, under.busy);
    }
    state.counters["us"] = time.best() * 1e6;
    state.counters["over_rows"] = ratio.middle();
    state.counters["spread"] = time.spread();
}

void positions(benchmark::State& state, std::size_t n) {
    std::vector<position_t> held(n);
    std::iota(held.begin(), held.end(), position_t{0});
    const PositionsView view{std::span<const position_t>(held)};
    const HeldPositions known = HeldPositions::of(view, n);
    constexpr int times = 100;
    Series time;
    for (auto _ : state) {
        const Stopwatch watch;
        for (int i = 0; i < times; ++i) {
            bool same = HeldPositions::of(view, n) == known;
            benchmark::DoNotOptimize(same);
            benchmark::ClobberMemory();
        }
        const Time all = watch.elapsed();
        time.add({all.wall / times, all.busy / times}, state);
    }
    state.counters["us"] = time.best() * 1e6;
    state.counters["spread"] = time.spread();
}

}  // namespace

void add_views() {
    for (const std::size_t n : {std::size_t{4096}, std::size_t{16384}}) {
        const auto add = [n](DType dtype, auto convert) {
            add_case("views/columns/" + std::string(name_of(dtype)) + "/n:" + std::to_string(n), 100,
                     [=](benchmark::State& state) {
                         std::vector<decltype(convert(0.0F))> rows;
                         for (const float x : random_row(n * dim, 3)) rows.push_back(convert(x));
                         columns(state, dtype, rows);
                     });
        };
        add(DType::f32, [](float x) { return x; });
        add(DType::f16, to_float16);
        add(DType::bf16, to_bfloat16);
    }
    add_case("views/positions/n:4096", 100, [](benchmark::State& state) { positions(state, 4096); });
}

}  // namespace kvcull::bench
