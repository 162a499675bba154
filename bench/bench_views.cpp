/// views/columns/<type>/n:<rows>: attention's sum over V and the changes of its output for four query heads,
/// with V as columns of [128, n] and as rows, in turn: `over_rows`.
/// views/positions/n:<rows>: comparing a head's old positions with what is remembered of them.
/// views/queries/<policy>/heads:32x8/n:<budget>/slack:128: a decode step of an engine that attends by itself
/// and gives queries and views: what the evictor takes beyond that attention, as a share of its time, with a
/// pass over the keys in every step (`at_once`), and with queries that wait for the step that evicts
/// (`waits`).

#include <algorithm>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "groups.hpp"
#include "kvcull/cache/evictor.hpp"
#include "kvcull/cache/held_positions.hpp"
#include "kvcull/score/removal.hpp"
#include "kvcull/select/executors.hpp"
#include "policies.hpp"
#include "support/attend.hpp"
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
        removal_errors(kernels, "bench", w, w, v, {.points = o}, Changes::norm, error, scratch.data());
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

/// An engine of one layer: its memory, its attention, and rows that go as a plan says.
class Engine {
  public:
    static constexpr CacheShape shape{.layers = 1, .q_heads = 32, .kv_heads = 8, .head_dim = dim};

    explicit Engine(std::size_t capacity)
        : rows_(DType::f32, shape.kv_heads, capacity, dim),
          positions_(shape.kv_heads),
          views_(shape.kv_heads),
          out_(shape.q_heads * dim) {}

    /// The next token's keys and values, which no other token has.
    void append() {
        for (std::size_t h = 0; h < shape.kv_heads; ++h) {
            const std::size_t n = positions_[h].size();
            for (std::byte* const memory : {rows_.k(h), rows_.v(h)}) {
                auto* const row = reinterpret_cast<float*>(memory) + n * dim;
                fill({row, dim}, ++drawn_);
            }
            positions_[h].push_back(seen_);
            views_[h] = {rows_.keys(h, n + 1), rows_.values(h, n + 1), PositionsView(positions_[h])};
        }
        ++seen_;
    }
    [[nodiscard]] CacheView view() const { return {views_, shape.kv_heads}; }
    void attend(const HeadsView<const float>& q, detail::TileScratch& scratch) {
        attend_plainly(
            shape, [&](std::size_t h) { return views_[h]; }, q,
            token_major(out_.data(), shape.q_heads, 1, dim), scratch);
    }
    void apply(const Plan& plan) {
        for (std::size_t i = 0; i < plan.size(); ++i) {
            const HeadPlan head = plan[i];
            std::vector<position_t>& positions = positions_[head.head];
            move_rows(head.moves, rows_.k(head.head), dim * sizeof(float), dim * sizeof(float));
            move_rows(head.moves, rows_.v(head.head), dim * sizeof(float), dim * sizeof(float));
            move_rows(head.moves, positions.data(), sizeof(position_t), sizeof(position_t));
            positions.resize(head.keep.size());
        }
    }

  private:
    Rows rows_;
    std::vector<std::vector<position_t>> positions_;
    std::vector<HeadView> views_;
    std::vector<float> out_;
    position_t seen_ = 0;
    std::uint64_t drawn_ = 0;
};

template <class P>
void queries(benchmark::State& state, const P& policy, const Budget& budget) {
    const std::size_t cycle = budget.slack + 1;
    Engine engine(budget.tokens + cycle);
    Evictor<P> at_once(Engine::shape, policy, budget), waits(Engine::shape, policy, budget);
    waits.buffer_queries();
    for (Evictor<P>* const evictor : {&at_once, &waits}) evictor->reserve(budget.tokens + cycle);
    detail::TileScratch scratch;
    std::vector<float> q(Engine::shape.q_heads * dim);
    const HeadsView<const float> query = token_major<const float>(q.data(), Engine::shape.q_heads, 1, dim);
    std::uint64_t token = 0;
    Time attention, eager, patient;
    const auto steps = [&](std::size_t count) {
        attention = eager = patient = {};
        for (std::size_t i = 0; i < count; ++i) {
            fill(q, ++token);
            engine.append();
            const Stopwatch plain;
            engine.attend(query, scratch);
            attention += plain.elapsed();
            const Stopwatch first;
            const Plan& plan = at_once.step(0, engine.view().layer(0), query);
            eager += first.elapsed();
            const Stopwatch second;
            const std::size_t gone = waits.step(0, engine.view().layer(0), query).size();
            patient += second.elapsed();
            if (gone != plan.size()) state.SkipWithError("the two evictors differ");
            engine.apply(plan);
            at_once.end_step();
            waits.end_step();
        }
    };
    steps(budget.tokens + cycle);  // up to the first eviction
    Series time;
    Ratios over_at_once, over_waits;
    for (auto _ : state) {
        steps(cycle);
        const auto count = static_cast<double>(cycle);
        time.add({patient.wall / count, patient.busy / count}, state);
        over_at_once.add(eager.busy, attention.busy);
        over_waits.add(patient.busy, attention.busy);
    }
    state.counters["at_once"] = over_at_once.middle();
    state.counters["waits"] = over_waits.middle();
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
    for_each_policy([]<class P>(const P& policy) {
        if (!detail::can_wait<P>(policy.needs(Phase::decode))) return;
        const Budget budget{.tokens = 4096, .slack = 128};
        add_case("views/queries/" + std::string(P::name) + "/heads:32x8/n:4096/slack:128", 5,
                 [policy, budget](benchmark::State& state) { queries(state, policy, budget); });
    });
}

}  // namespace kvcull::bench
