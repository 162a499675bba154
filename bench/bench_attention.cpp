/// decode/<type>/<instruction set>/heads:<q>x<kv>/n:<rows>/threads:<t>[/scores:<what>], prefill/.. alike.
/// `naive` in the place of the instruction set: the loops of support/naive.hpp on the same memory.

#include <array>
#include <cmath>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "groups.hpp"
#include "kvcull/attention/attend.hpp"
#include "kvcull/cache/tiles.hpp"
#include "kvcull/policies/caote.hpp"
#include "kvcull/policies/obcache.hpp"
#include "support/cases.hpp"
#include "support/naive.hpp"
#include "support/roofline.hpp"
#include "support/rows.hpp"

namespace kvcull::bench {
namespace {

constexpr std::size_t dim = 128;

/// What a step computes for policies beside its output. From `obcache_value` on it is the policy itself that
/// takes part, in a step that scores: OBCache counts the row, CAOTE (over TOVA) takes its decision's scores.
enum class Scores : std::uint8_t {
    none,
    sums,
    rows,
    obcache_value,
    obcache_key,
    obcache_joint,
    obcache_lagged,
    caote,
    fastcaote
};
constexpr std::array score_names{"none",          "sums",           "rows",  "obcache_value", "obcache_key",
                                 "obcache_joint", "obcache_lagged", "caote", "fastcaote"};
constexpr std::string_view name_of(Scores scores) {
    return score_names[static_cast<std::size_t>(scores)];
}

struct Case {
    DType dtype = DType::f32;
    std::string isa;  // or "naive"
    std::size_t q_heads = 32, kv_heads = 8, n = 0, threads = 1;
    std::size_t tokens = 1;  // query rows per query head: the newest rows of the cache, causal
    Scores scores = Scores::none;

    [[nodiscard]] std::size_t group() const { return q_heads / kv_heads; }
    [[nodiscard]] std::string name(std::string_view kind) const {
        std::string name = std::string(kind) + "/" + std::string(kvcull::name_of(dtype)) + "/" + isa +
                           "/heads:" + std::to_string(q_heads) + "x" + std::to_string(kv_heads) +
                           "/n:" + std::to_string(n);
        if (tokens > 1) name += "/tokens:" + std::to_string(tokens);
        return name + "/threads:" + std::to_string(threads);
    }
    /// Bytes of K and V that a step must read at least.
    [[nodiscard]] double bytes() const {
        return 2.0 * static_cast<double>(kv_heads * n * row_bytes(dtype, dim));
    }
    /// Multiply-adds of logits and outputs: token i of c sees n - c + i + 1 rows.
    [[nodiscard]] double multiply_adds() const {
        const double seen = static_cast<double>(n) - 0.5 * (static_cast<double>(tokens) - 1.0);
        return 2.0 * static_cast<double>(q_heads * tokens * dim) * seen;
    }
};

/// One policy on all heads of a layer, one decode step over and over.
class PolicyStep {
  public:
    virtual ~PolicyStep() = default;
    /// Attention of one head's group with all that the policy does in this step.
    virtual void run(std::size_t head, std::size_t thread) = 0;
    /// Takes all states back to where they were before the step.
    virtual void reset() = 0;
};
template <class P>
class StepOf final : public PolicyStep {
  public:
    StepOf(const Case& shape, const simd::Kernels& kernels, Rows& rows, const float* q, float* out, P policy)
        : shape_(shape), kernels_(&kernels), rows_(&rows), q_(q), out_(out), policy_(std::move(policy)) {
        position_.resize(shape.n);
        std::iota(position_.begin(), position_.end(), position_t{0});
        scratch_.resize(shape.threads);
        score_.resize(shape.threads, std::vector<float>(shape.n));
        for (std::size_t head = 0; head < shape.kv_heads; ++head) {
            typename P::State& state = before_.emplace_back();
            HeadStep prompt = base(head, 0, shape.n - 1);
            prompt.phase = Phase::prompt;
            prompt.added = prompt.n();
            resize_state(state, prompt.n());
            policy_.observe(state, prompt);
            resize_state(state, shape.n);
        }
        states_ = before_;
        for (std::size_t head = 0; head < shape.kv_heads; ++head) run(head, 0);
        if constexpr (std::is_same_v<P, OBCache>)
            if (policy_.lagged) before_ = states_;  // a row waits
        reset();
    }

    void run(std::size_t head, std::size_t thread) override {
        const HeadStep step = base(head, thread, shape_.n);
        detail::for_each_tile(step, head_major(q_, shape_.q_heads, 1, dim), head * shape_.group(), {},
                              head_major(out_, shape_.q_heads, 1, dim), policy_.needs(Phase::decode),
                              scratch_[thread], detail::Observer<P>{policy_, states_[head]});
        if (decides) policy_.score(states_[head], step, score_[thread]);
    }
    void reset() override { states_ = before_; }

  private:
    static constexpr bool decides = !std::is_same_v<P, OBCache>;

    [[nodiscard]] HeadStep base(std::size_t head, std::size_t thread, std::size_t rows) {
        return {.phase = Phase::decode,
                .head = head,
                .group = shape_.group(),
                .next_position = static_cast<position_t>(rows),
                .added = 1,
                .cached = {rows_->keys(head, rows), rows_->values(head, rows),
                           PositionsView(std::span<const position_t>(position_).first(rows))},
                .scale = 1.0F / std::sqrt(static_cast<float>(dim)),
                .evicts = decides,
                .kernels = kernels_,
                .workspace = &scratch_[thread].policy,
                .wrapper_workspace = &scratch_[thread].wrapper};
    }

    Case shape_;
    const simd::Kernels* kernels_;
    Rows* rows_;
    const float* q_;
    float* out_;
    P policy_;
    std::vector<position_t> position_;
    std::vector<detail::TileScratch> scratch_;
    std::vector<std::vector<float>> score_;
    std::vector<typename P::State> states_, before_;
};

/// One layer: its queries, its cache, and per thread the scratch that a KVCache would use.
class Layer {
  public:
    Layer(const Case& shape, Team& team)
        : case_(shape),
          team_(&team),
          rows_(shape.dtype, shape.kv_heads, shape.n, dim),
          q_(random_row(shape.q_heads * shape.tokens * dim, 3)),
          out_(q_.size()),
          lse_(shape.q_heads * shape.tokens),
          tile_(std::min(detail::tile_tokens(shape.group(), shape.n), shape.tokens)) {
        const std::size_t entries = shape.group() * tile_ * shape.n;
        for (std::size_t thread = 0; thread < team.threads(); ++thread) scratch_.emplace_back(entries);
        visible_.resize(shape.group() * tile_ * team.threads());
        if (shape.isa != "naive") kernels_ = &simd::kernels_for(simd::parse_isa(shape.isa));
        if (shape.scores == Scores::sums) mass_.resize(shape.kv_heads * shape.n);
        if (shape.scores == Scores::rows) {
            kept_.resize(shape.kv_heads * entries);
            logits_.resize(shape.kv_heads * entries);
        }
        const auto take = [&](auto policy) {
            policy_ = std::make_unique<StepOf<decltype(policy)>>(shape, *kernels_, rows_, q_.data(),
                                                                 out_.data(), policy);
        };
        using Kind = OBCache::Score;
        if (shape.scores == Scores::obcache_value) take(OBCache{.kind = Kind::value});
        if (shape.scores == Scores::obcache_key) take(OBCache{.kind = Kind::key});
        if (shape.scores == Scores::obcache_joint) take(OBCache{.kind = Kind::joint});
        if (shape.scores == Scores::obcache_lagged) take(OBCache{.kind = Kind::key, .lagged = true});
        if (shape.scores == Scores::caote) take(Caote<>{});
        if (shape.scores == Scores::fastcaote) take(Caote<>{.fast = true});
    }

    [[nodiscard]] std::span<const std::byte> memory() const { return rows_.memory(); }

    /// Time of one step.
    Time step(Scores scores) {
        const bool by_policy = scores >= Scores::obcache_value;
        const Time time = team_->run([&](std::size_t thread) {
            const std::size_t part = case_.kv_heads / team_->threads();
            for (std::size_t head = thread * part; head < (thread + 1) * part; ++head) {
                if (by_policy)
                    policy_->run(head, thread);
                else if (case_.isa == "naive")
                    naive_head(head, thread);
                else
                    head_tiles(head, thread, scores);
            }
        });
        if (by_policy) policy_->reset();
        return time;
    }

  private:
    void head_tiles(std::size_t head, std::size_t thread, Scores scores) {
        const std::size_t group = case_.group(), n = case_.n, c = case_.tokens;
        const float scale = 1.0F / std::sqrt(static_cast<float>(dim));
        for (std::size_t first = 0; first < c; first += tile_) {
            const std::size_t tokens = std::min(tile_, c - first), rows = group * tokens;
            const std::span<Visible> visible(visible_.data() + thread * group * tile_, rows);
            for (std::size_t row = 0; row < rows; ++row)
                visible[row] = {0, 0, n - c + first + row % tokens + 1};
            const std::size_t at = (head * c + first) * group;
            const bool keep = scores == Scores::rows;
            float* const attention = keep ? kept_.data() + head * group * tile_ * n : scratch_[thread].data();
            AttentionRows want{.attention = {attention, rows, n},
                               .lse = std::span(lse_).subspan(at, rows),
                               .output = {out_.data() + at * dim, rows, dim}};
            if (keep) want.logits = {logits_.data() + head * group * tile_ * n, rows, n};
            if (scores == Scores::sums) want.column_sum = std::span(mass_).subspan(head * n, n);
            attend(*kernels_, {q_.data() + at * dim, rows, dim}, rows_.keys(head), rows_.values(head),
                   visible, scale, want);
        }
    }
    void naive_head(std::size_t head, std::size_t thread) {
        const float scale = 1.0F / std::sqrt(static_cast<float>(dim));
        const std::size_t c = case_.tokens;
        for (std::size_t row = 0; row < case_.group() * c; ++row) {
            const std::size_t at = (head * case_.group() * c + row) * dim, n = case_.n - c + row % c + 1;
            const auto run = [&]<class T>(const T*) {
                naive::attend(q_.data() + at, reinterpret_cast<const T*>(rows_.k(head)),
                              reinterpret_cast<const T*>(rows_.v(head)), n, dim, scale,
                              scratch_[thread].data(), out_.data() + at);
            };
            if (case_.dtype == DType::f32) run(static_cast<const float*>(nullptr));
            if (case_.dtype == DType::f16) run(static_cast<const float16*>(nullptr));
            if (case_.dtype == DType::bf16) run(static_cast<const bfloat16*>(nullptr));
        }
    }

    Case case_;
    Team* team_;
    Rows rows_;
    std::vector<float> q_, out_, lse_, mass_, kept_, logits_;
    std::vector<std::vector<float>> scratch_;
    std::vector<Visible> visible_;
    std::size_t tile_;
    const simd::Kernels* kernels_ = nullptr;
    std::unique_ptr<PolicyStep> policy_;
};

/// Each sample: the step, the step without scores, a read of the same memory, multiply-adds.
void run(benchmark::State& state, const Case& shape) {
    Team team(shape.threads);
    Layer layer(shape, team);
    Roofline limits(shape.isa == "naive" ? "scalar" : shape.isa, team);
    if (state.max_iterations > 3) layer.step(shape.scores);  // touches all scratch
    Series steps, reads, multiplications;
    Ratios roofline, roofline_wall, over_none;
    for (auto _ : state) {
        const Time step = layer.step(shape.scores);
        const Time plain = shape.scores == Scores::none ? step : layer.step(Scores::none);
        const Time read = limits.read(layer.memory());
        const Time multiply = limits.multiply_adds(shape.multiply_adds());
        steps.add(step, state);
        reads.add(read);
        multiplications.add(multiply);
        roofline.add(std::max(read.busy, multiply.busy), step.busy);
        roofline_wall.add(std::max(read.wall, multiply.wall), step.wall);
        over_none.add(step.busy, plain.busy);
    }
    state.SetBytesProcessed(static_cast<std::int64_t>(shape.bytes()) * state.iterations());
    state.counters["roofline"] = roofline.middle();
    state.counters["roofline_wall"] = roofline_wall.middle();
    state.counters["over_none"] = over_none.middle();
    state.counters["best_us"] = steps.best() * 1e6;
    state.counters["spread"] = steps.spread();
    state.counters["read_GB/s"] = shape.bytes() / reads.best() * 1e-9;
    state.counters["fma_G/s"] = shape.multiply_adds() / multiplications.best() * 1e-9;
}

/// What a step takes roughly, in seconds: for the number of samples only.
double estimate(const Case& shape) {
    double rate = 40e9;
    if (shape.isa == "scalar" || shape.isa == "naive") rate = shape.dtype == DType::f16 ? 0.3e9 : 2e9;
    const double threads = static_cast<double>(shape.threads);
    return std::max(shape.multiply_adds() / rate, shape.bytes() / 30e9) / threads;
}
void add(const std::string& name, const Case& shape, double budget) {
    add_case(name, samples_for(budget, estimate(shape) * 3.0),
             [shape](benchmark::State& state) { run(state, shape); });
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const simd::Isa isa : simd::all_isas)
        if (simd::available(isa)) names.emplace_back(simd::name_of(isa));
    return names;
}

}  // namespace

void add_attention() {
    for (const DType dtype : all_dtypes) {
        for (const std::size_t n : {std::size_t{16384}, std::size_t{65536}}) {
            for (const std::size_t threads : {std::size_t{1}, std::size_t{2}}) {
                for (const std::string& isa : isas()) {
                    Case shape{.dtype = dtype, .isa = isa, .n = n, .threads = threads};
                    for (const std::size_t q_heads : {std::size_t{8}, std::size_t{32}}) {
                        shape.q_heads = q_heads;
                        add(shape.name("decode"), shape, 0.7);
                    }
                    for (std::size_t scores = 0; scores < score_names.size(); ++scores) {
                        shape.scores = static_cast<Scores>(scores);
                        const bool by_policy = shape.scores >= Scores::obcache_value;
                        // Portable kernels are too slow to measure everything on the longest cache.
                        if (by_policy && isa == "scalar" && n > 16384) continue;
                        add(shape.name("decode") + "/scores:" + score_names[scores], shape,
                            by_policy ? 0.5 : 0.7);
                    }
                }
            }
        }
        if (channels_of(dtype) > 1) continue;  // nobody writes that loop first
        const Case naive{.dtype = dtype, .isa = "naive", .n = 16384};
        add(naive.name("decode"), naive, 0.7);
    }
    for (const DType dtype : all_dtypes) {
        std::vector<std::string> names = isas();
        if (channels_of(dtype) == 1) names.emplace_back("naive");
        for (const std::string& isa : names) {
            for (const Scores scores : {Scores::none, Scores::sums}) {
                const bool slow = isa == "scalar" || isa == "naive";
                if (slow && scores != Scores::none) continue;
                const Case shape{
                    .dtype = dtype, .isa = isa, .n = slow ? 1024U : 4096U, .tokens = 64, .scores = scores};
                add(shape.name("prefill") + (slow ? "" : "/scores:" + std::string(name_of(scores))), shape,
                    0.5);
            }
        }
    }
}

}  // namespace kvcull::bench
