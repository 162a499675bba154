/// decode/<type>/<instruction set>/heads:<q>x<kv>/n:<rows>/threads:<t>[/scores:<what>], prefill/.. alike.
/// `naive` in the place of the instruction set: the loops of support/naive.hpp on the same memory.

#include <cmath>
#include <string>
#include <vector>

#include "groups.hpp"
#include "kvcull/attention/attend.hpp"
#include "kvcull/cache/tiles.hpp"
#include "support/cases.hpp"
#include "support/naive.hpp"
#include "support/roofline.hpp"
#include "support/rows.hpp"

namespace kvcull::bench {
namespace {

constexpr std::size_t dim = 128;

/// What a step hands to policies beside its output.
enum class Scores : std::uint8_t { none, sums, rows };
constexpr std::string_view name_of(Scores scores) {
    return scores == Scores::none ? "none" : scores == Scores::sums ? "sums" : "rows";
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
        return 2.0 * static_cast<double>(kv_heads * n * dim * size_of(dtype));
    }
    /// Multiply-adds of logits and outputs: token i of c sees n - c + i + 1 rows.
    [[nodiscard]] double multiply_adds() const {
        const double seen = static_cast<double>(n) - 0.5 * (static_cast<double>(tokens) - 1.0);
        return 2.0 * static_cast<double>(q_heads * tokens * dim) * seen;
    }
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
    }

    [[nodiscard]] std::span<const std::byte> memory() const { return rows_.memory(); }

    /// Time of one step.
    Time step(Scores scores) {
        return team_->run([&](std::size_t thread) {
            const std::size_t part = case_.kv_heads / team_->threads();
            for (std::size_t head = thread * part; head < (thread + 1) * part; ++head)
                case_.isa == "naive" ? naive_head(head, thread) : head_tiles(head, thread, scores);
        });
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
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        for (const std::size_t n : {std::size_t{16384}, std::size_t{65536}}) {
            for (const std::size_t threads : {std::size_t{1}, std::size_t{2}}) {
                for (const std::string& isa : isas()) {
                    Case shape{.dtype = dtype, .isa = isa, .n = n, .threads = threads};
                    for (const std::size_t q_heads : {std::size_t{8}, std::size_t{32}}) {
                        shape.q_heads = q_heads;
                        add(shape.name("decode"), shape, 0.7);
                    }
                    for (const Scores scores : {Scores::none, Scores::sums, Scores::rows}) {
                        shape.scores = scores;
                        add(shape.name("decode") + "/scores:" + std::string(name_of(scores)), shape, 0.7);
                    }
                }
            }
        }
        const Case naive{.dtype = dtype, .isa = "naive", .n = 16384};
        add(naive.name("decode"), naive, 0.7);
    }
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        std::vector<std::string> names = isas();
        names.emplace_back("naive");
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
