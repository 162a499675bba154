/// select/<what>/n:<rows>: from scores to rows, to moves, to moved rows, 128 rows going or one (`gone:1`).
/// `naive`: sorting and copying all.

#include <numeric>
#include <string>
#include <vector>

#include "groups.hpp"
#include "kvcull/select/executors.hpp"
#include "kvcull/select/topk.hpp"
#include "support/cases.hpp"
#include "support/naive.hpp"
#include "support/rows.hpp"

namespace kvcull::bench {
namespace {

constexpr std::size_t dim = 128, evicted = 128;

/// Scores of one head and what it keeps: all rows but `gone`.
struct Head {
    std::vector<float> score;
    std::vector<position_t> position;
    Candidates candidates;
    std::vector<index_t> keep;

    explicit Head(std::size_t n, std::uint64_t seed = 5, std::size_t gone = evicted)
        : score(random_row(n, seed)),
          position(n),
          candidates{score, PositionsView(std::span<const position_t>(position)), n - gone, {4, n / 2}} {
        std::iota(position.begin(), position.end(), position_t{0});
    }
    Head(const Head&) = delete;
    Head& operator=(const Head&) = delete;
};

void add(const std::string& what, std::size_t n, std::function<void(benchmark::State&, std::size_t)> body) {
    add_case("select/" + what + "/n:" + std::to_string(n), 200,
             [body = std::move(body), n](benchmark::State& state) { body(state, n); });
}

template <class Body>
void time_each(benchmark::State& state, std::size_t n, const Body& body) {
    Series time;
    body();
    for (auto _ : state) {
        const Stopwatch watch;
        body();
        time.add(watch.elapsed(), state);
    }
    state.counters["ns_per_row"] = time.best() * 1e9 / static_cast<double>(n);
    state.counters["spread"] = time.spread();
}

}  // namespace

void add_selection() {
    for (const std::size_t n : {std::size_t{4096}, std::size_t{65536}}) {
        add("top_k", n, [](benchmark::State& state, std::size_t rows) {
            Head head(rows);
            Selector selector;
            time_each(state, rows, [&] { selector.head(head.candidates, {}, head.keep); });
        });
        add("top_k/gone:1", n, [](benchmark::State& state, std::size_t rows) {
            Head head(rows, 5, 1);
            Selector selector;
            time_each(state, rows, [&] { selector.head(head.candidates, {}, head.keep); });
        });
        add("top_k/naive", n, [](benchmark::State& state, std::size_t rows) {
            Head head(rows);
            time_each(state, rows, [&] { naive::top_k(head.score, rows - evicted, head.keep); });
        });
        add("pooled/heads:8", n, [](benchmark::State& state, std::size_t rows) {
            std::vector<std::unique_ptr<Head>> heads;
            std::vector<Candidates> candidates;
            for (std::uint64_t h = 0; h < 8; ++h) {
                heads.push_back(std::make_unique<Head>(rows, h));
                candidates.push_back(heads.back()->candidates);
            }
            std::vector<std::vector<index_t>> keep(8);
            Selector selector;
            time_each(state, rows,
                      [&] { selector.pooled(candidates, 8 * (rows - evicted), {}, HeadTie::lower, keep); });
        });
        for (const Compaction compaction : {Compaction::fill, Compaction::ascending}) {
            const std::string order = compaction == Compaction::fill ? "fill" : "ascending";
            add("plan/" + order, n, [compaction](benchmark::State& state, std::size_t rows) {
                Head head(rows);
                Selector selector;
                selector.head(head.candidates, {}, head.keep);
                Plan plan;
                time_each(state, rows, [&] {
                    plan.clear();
                    plan.add(0, 0, rows, head.keep, compaction);
                });
            });
            add("move/" + order, n, [compaction](benchmark::State& state, std::size_t rows) {
                Head head(rows);
                Selector selector;
                selector.head(head.candidates, {}, head.keep);
                Plan plan;
                plan.add(0, 0, rows, head.keep, compaction);
                std::vector<float> data = random_row(rows * dim, 9);
                time_each(state, rows, [&] {
                    move_rows(plan[0].moves, data.data(), dim * sizeof(float), dim * sizeof(float));
                });
                state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(plan[0].moves.size() *
                                                                                       dim * sizeof(float)));
            });
        }
        add("move/naive", n, [](benchmark::State& state, std::size_t rows) {
            Head head(rows);
            naive::top_k(head.score, rows - evicted, head.keep);
            std::vector<float> data = random_row(rows * dim, 9);
            time_each(state, rows, [&] { naive::gather(head.keep, data.data(), dim); });
            state.SetBytesProcessed(state.iterations() *
                                    static_cast<std::int64_t>(head.keep.size() * dim * sizeof(float)));
        });
    }
}

}  // namespace kvcull::bench
