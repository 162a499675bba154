/// policy/<name>/<observe|score|evict>/n:<rows>: what a policy costs beside attention, for one KV head with a
/// group of 4. observe: one decode step's query row. score: a number for every row. evict: score, select,
/// plan, and state and rows (f32, head_dim 128) moved, 128 rows going.

#include <cmath>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>

#include "groups.hpp"
#include "kvcull/cache/tiles.hpp"
#include "kvcull/select/executors.hpp"
#include "kvcull/select/topk.hpp"
#include "policies.hpp"
#include "support/cases.hpp"
#include "support/rows.hpp"

namespace kvcull::bench {
namespace {

constexpr std::size_t dim = 128, group = 4, evicted = 128, prompt_tile = 32;

/// One KV head that has seen a prompt of n rows and one token.
template <class P>
class Head {
  public:
    Head(P policy, std::size_t n)
        : policy_(std::move(policy)),
          n_(n),
          rows_(DType::f32, 1, n, dim),
          q_(random_row(group * prompt_tile * dim, 3)),
          out_(n),
          position_(n) {
        std::iota(position_.begin(), position_.end(), position_t{0});
        const std::size_t before = n - prompt_tile;
        reserve_state(state_, n);
        resize_state(state_, before);
        policy_.observe(state_, base(before, before, Phase::prompt));
        resize_state(state_, n);
        if constexpr (SideInput<P>) {
            std::vector<float> log_beta = random_row(n, 4);
            for (float& x : log_beta) x = -0.01F * std::abs(x);
            policy_.admit(state_, {.log_beta = log_beta});
        }
        run(Phase::prompt, prompt_tile, [&](const HeadStep& step) { policy_.observe(state_, step); });
    }

    void observe(benchmark::State& state) {
        run(Phase::decode, 1,
            [&](const HeadStep& step) { time_batches(state, [&] { policy_.observe(state_, step); }); });
    }
    void score(benchmark::State& state) {
        const HeadStep step = whole();
        prepare(step);
        time_batches(state, [&] { policy_.score(state_, step, out_); });
    }
    void evict(benchmark::State& state) {
        const HeadStep step = whole();
        const Candidates candidates{out_, step.cached.position, n_ - evicted, step.protect};
        const Compaction compaction = is_ordered(policy_) ? Compaction::ascending : Compaction::fill;
        Selector selector;
        Plan plan;
        std::vector<index_t> keep;
        time_batches(state, [&] {
            prepare(step);
            policy_.score(state_, step, out_);
            if constexpr (Finishes<P>) policy_.finish(step, out_);
            selector.head(candidates, {}, keep);
            plan.clear();
            plan.add(0, 0, n_, keep, compaction);
            move_state(state_, plan[0].moves, keep.size());
            move_rows(plan[0].moves, rows_.k(0), dim * sizeof(float), dim * sizeof(float));
            move_rows(plan[0].moves, rows_.v(0), dim * sizeof(float), dim * sizeof(float));
            resize_state(state_, n_);
        });
    }
    [[nodiscard]] std::size_t bytes() const { return state_bytes(state_); }

  private:
    void prepare(const HeadStep& step) {
        if constexpr (Prepares<P>) policy_.prepare(state_, step);
    }
    [[nodiscard]] HeadStep base(std::size_t rows, std::size_t added, Phase phase) {
        return {.phase = phase,
                .group = group,
                .next_position = static_cast<position_t>(rows),
                .added = added,
                .cached = {{rows_.k(0), DType::f32, rows, dim, dim},
                           {rows_.v(0), DType::f32, rows, dim, dim},
                           PositionsView(std::span<const position_t>(position_).first(rows))},
                .scale = 0.088388F,
                .kernels = &simd::kernels(),
                .workspace = &scratch_.policy,
                .wrapper_workspace = &scratch_.wrapper};
    }
    /// What scoring gets.
    [[nodiscard]] HeadStep whole() {
        HeadStep step = base(n_, 0, Phase::decode);
        step.protect = protected_rows(policy_, n_ - evicted);
        return step;
    }
    /// The newest `tokens` rows come with their queries, as the evictor hands them on.
    template <class Observe>
    void run(Phase phase, std::size_t tokens, const Observe& observe) {
        detail::for_each_tile(base(n_, tokens, phase), head_major<const float>(q_.data(), group, tokens, dim),
                              0, {}, {}, policy_.needs(phase), scratch_, observe);
    }
    /// Calls that are too short for the clock are timed many at once.
    template <class Body>
    void time_batches(benchmark::State& state, const Body& body) const {
        const auto run_batch = [&](std::size_t batch) {
            const Stopwatch watch;
            for (std::size_t i = 0; i < batch; ++i) {
                body();
                benchmark::ClobberMemory();
            }
            const Time taken = watch.elapsed();
            return Time{taken.wall / static_cast<double>(batch), taken.busy / static_cast<double>(batch)};
        };
        std::size_t batch = 1;
        while (batch < 100000 && run_batch(batch).busy * static_cast<double>(batch) < 50e-6) batch *= 2;
        Series time;
        for (auto _ : state) time.add(run_batch(batch), state);
        state.counters["ns_per_row"] = time.best() * 1e9 / static_cast<double>(n_);
        state.counters["spread"] = time.spread();
    }

    P policy_;
    std::size_t n_;
    Rows rows_;
    std::vector<float> q_, out_;
    std::vector<position_t> position_;
    typename P::State state_{};
    detail::TileScratch scratch_;
};

template <class P>
void add(const P& policy, std::string_view what, void (Head<P>::*measure)(benchmark::State&)) {
    for (const std::size_t n : {std::size_t{4096}, std::size_t{32768}}) {
        if (n > most_rows<P>) continue;
        const std::string name =
            "policy/" + std::string(P::name) + "/" + std::string(what) + "/n:" + std::to_string(n);
        add_case(name, 60, [policy, n, measure](benchmark::State& state) {
            Head<P> head(policy, n);
            (head.*measure)(state);
            state.counters["state_bytes_per_row"] =
                static_cast<double>(head.bytes()) / static_cast<double>(n);
        });
    }
}

}  // namespace

void add_policies() {
    for_each_policy([]<class P>(const P& policy) {
        add(policy, "observe", &Head<P>::observe);
        add(policy, "score", &Head<P>::score);
        add(policy, "evict", &Head<P>::evict);
    });
}

}  // namespace kvcull::bench
