#pragma once
/// An engine with buffers of its own, and sequences to feed it or a KVCache with. `Engine` has the calls of
/// KVCache as far as tests need them, so that one template drives both.

#include <algorithm>
#include <cstddef>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kvcull/cache/evictor.hpp"
#include "kvcull/cache/kv_cache.hpp"
#include "kvcull/select/executors.hpp"
#include "kvcull/simd/kernels.hpp"
#include "support/random.hpp"

namespace kvcull::test {

/// q, k, v of every token of a sequence, `[layers, heads, tokens, dim]`.
struct Stream {
    CacheShape shape;
    std::size_t tokens = 0;
    std::vector<float> q, k, v;
    std::vector<position_t> positions = {};  // empty: 0, 1, 2, ..

    /// Tokens `first .. first + count - 1` of a layer.
    [[nodiscard]] HeadsView<const float> queries(std::size_t layer, std::size_t first,
                                                 std::size_t count) const {
        return part(q, layer, shape.q_heads, shape.head_dim, first, count);
    }
    [[nodiscard]] HeadsView<const float> keys(std::size_t layer, std::size_t first, std::size_t count) const {
        return part(k, layer, shape.kv_heads, shape.head_dim, first, count);
    }
    [[nodiscard]] HeadsView<const float> values(std::size_t layer, std::size_t first,
                                                std::size_t count) const {
        return part(v, layer, shape.kv_heads, shape.values(), first, count);
    }
    [[nodiscard]] position_t position(std::size_t token) const {
        return positions.empty() ? static_cast<position_t>(token) : positions[token];
    }

  private:
    [[nodiscard]] HeadsView<const float> part(const std::vector<float>& all, std::size_t layer,
                                              std::size_t heads, std::size_t dim, std::size_t first,
                                              std::size_t count) const {
        return {all.data() + (layer * heads * tokens + first) * dim, heads, count, dim, tokens * dim, dim};
    }
};

/// Normal queries, keys and values. `sharpness` scales the queries: attention far from uniform has no near
/// ties.
inline Stream random_stream(const CacheShape& shape, std::size_t tokens, std::uint64_t seed,
                            float sharpness = 3.0F) {
    const auto floats = [&](std::size_t heads, std::size_t dim, std::uint64_t part, float scale) {
        return random_floats(shape.layers * heads * tokens * dim, seed * 4 + part, scale);
    };
    return {shape, tokens, floats(shape.q_heads, shape.head_dim, 0, sharpness),
            floats(shape.kv_heads, shape.head_dim, 1, 1), floats(shape.kv_heads, shape.values(), 2, 1)};
}

/// The rows of one KV head, each in front of its neighbour with a gap that nobody may touch.
class EngineRows {
  public:
    explicit EngineRows(const CacheShape& shape) : dim_(shape.head_dim), values_(shape.values()) {}

    void append(const float* k, const float* v, position_t position) {
        k_.insert(k_.end(), k, k + dim_);
        k_.push_back(gap);
        v_.insert(v_.end(), v, v + values_);
        positions_.push_back(position);
    }
    void apply(const HeadPlan& plan) {
        move_rows(plan.moves, k_.data(), dim_ * sizeof(float), (dim_ + 1) * sizeof(float));
        move_rows(plan.moves, v_.data(), values_ * sizeof(float), values_ * sizeof(float));
        move_rows(plan.moves, positions_.data(), sizeof(position_t), sizeof(position_t));
        k_.resize(plan.keep.size() * (dim_ + 1));
        v_.resize(plan.keep.size() * values_);
        positions_.resize(plan.keep.size());
    }
    [[nodiscard]] HeadView view() const {
        return {RowsView(k_.data(), positions_.size(), dim_, dim_ + 1),
                RowsView(v_.data(), positions_.size(), values_, values_), PositionsView(positions_)};
    }
    [[nodiscard]] bool gaps_are_untouched() const {
        for (std::size_t i = dim_; i < k_.size(); i += dim_ + 1)
            if (k_[i] != gap) return false;
        return true;
    }

  private:
    static constexpr float gap = 12345.0F;
    std::size_t dim_, values_;
    std::vector<float> k_, v_;
    std::vector<position_t> positions_;
};

/// Evictor on foreign buffers: plain vectors, and plans carried out by move_rows.
template <Policy P, BudgetRule Rule = Uniform>
class Engine {
  public:
    Engine(CacheShape shape, P policy, Budget budget, bool ascending = false, Rule rule = {})
        : evictor_(shape, std::move(policy), budget, std::move(rule)),
          rows_(shape.heads(), EngineRows(shape)) {
        if (ascending) evictor_.keep_ascending();
    }

    /// Sees every plan before it is carried out.
    std::function<void(const HeadPlan&, const HeadView&)> on_plan;

    [[nodiscard]] const Evictor<P, Rule>& evictor() const noexcept { return evictor_; }
    [[nodiscard]] const CacheShape& shape() const noexcept { return evictor_.shape(); }
    [[nodiscard]] std::size_t rows(std::size_t layer, std::size_t head) const {
        return view(layer, head).rows();
    }
    [[nodiscard]] HeadView view(std::size_t layer, std::size_t head) const {
        return rows_[layer * shape().kv_heads + head].view();
    }
    [[nodiscard]] std::vector<float> scores(std::size_t layer, std::size_t head) {
        std::vector<float> scores(rows(layer, head));
        evictor_.scores(layer, head, view(layer, head), scores);
        return scores;
    }
    [[nodiscard]] bool gaps_are_untouched() const {
        return std::all_of(rows_.begin(), rows_.end(),
                           [](const EngineRows& rows) { return rows.gaps_are_untouched(); });
    }

    void set_kernels(const simd::Kernels& kernels) noexcept { evictor_.set_kernels(kernels); }
    void set_bias(Bias bias) { evictor_.set_bias(std::move(bias)); }
    void set_trace(EvictionTrace trace) { evictor_.set_trace(std::move(trace)); }
    void begin_prompt(std::optional<std::size_t> total = std::nullopt) { evictor_.begin_prompt(total); }
    void hold(bool on) noexcept { evictor_.hold(on); }
    void pin(position_t begin, position_t end) { evictor_.pin(begin, end); }

    void append(std::size_t layer, HeadsView<const float> k, HeadsView<const float> v,
                const AppendInputs& inputs = {}) {
        if constexpr (SideInput<P>) evictor_.admit(layer, k.tokens, inputs);
        for (std::size_t h = 0; h < shape().kv_heads; ++h)
            for (std::size_t i = 0; i < k.tokens; ++i)
                rows_[layer * shape().kv_heads + h].append(
                    k.row(h, i), v.row(h, i),
                    inputs.positions.empty() ? evictor_.next_position() + static_cast<position_t>(i)
                                             : inputs.positions[i]);
    }
    void attend(std::size_t layer, HeadsView<const float> q, HeadsView<float> out) {
        const auto views = all();
        apply(evictor_.step(layer, CacheView{views, shape().kv_heads}.layer(layer), q, out));
    }
    void end_step(const StepInputs& inputs = {}) {
        const auto views = all();
        apply(evictor_.end_step({views, shape().kv_heads}, inputs));
    }
    void end_prompt() {
        const auto views = all();
        apply(evictor_.end_prompt({views, shape().kv_heads}));
    }
    void make_room(std::size_t tokens) {
        const auto views = all();
        apply(evictor_.make_room({views, shape().kv_heads}, tokens));
    }
    void rescore(std::span<const HeadsView<const float>> q) {
        const auto views = all();
        apply(evictor_.rescore({views, shape().kv_heads}, q));
    }
    void truncate(std::size_t tokens) {
        const auto views = all();
        apply(evictor_.truncate({views, shape().kv_heads}, tokens));
    }

  private:
    [[nodiscard]] std::vector<HeadView> all() const {
        std::vector<HeadView> views;
        for (const EngineRows& rows : rows_) views.push_back(rows.view());
        return views;
    }
    void apply(const Plan& plan) {
        for (std::size_t i = 0; i < plan.size(); ++i) {
            EngineRows& rows = rows_[plan[i].layer * shape().kv_heads + plan[i].head];
            if (on_plan) on_plan(plan[i], rows.view());
            rows.apply(plan[i]);
        }
    }

    Evictor<P, Rule> evictor_;
    std::vector<EngineRows> rows_;
};

/// One call: `count` tokens through all layers. @returns the attention output `[layers, q_heads, count,
/// value_dim]`.
template <class Cache>
std::vector<float> feed(Cache& cache, const Stream& stream, std::size_t first, std::size_t count,
                        const StepInputs& end = {}) {
    const CacheShape& shape = stream.shape;
    const std::size_t layer_size = shape.q_heads * count * shape.values();
    std::vector<float> out(shape.layers * layer_size);
    const AppendInputs inputs{.positions = stream.positions.empty()
                                               ? std::span<const position_t>{}
                                               : std::span(stream.positions).subspan(first, count)};
    for (std::size_t layer = 0; layer < shape.layers; ++layer) {
        cache.append(layer, stream.keys(layer, first, count), stream.values(layer, first, count), inputs);
        cache.attend(layer, stream.queries(layer, first, count),
                     head_major(out.data() + layer * layer_size, shape.q_heads, count, shape.values()));
    }
    cache.end_step(end);
    return out;
}

/// Tokens `first .. end - 1` as a prompt in calls of `chunk` tokens. `announced`: its length is told in
/// advance.
template <class Cache>
void feed_prompt(Cache& cache, const Stream& stream, std::size_t first, std::size_t end, std::size_t chunk,
                 bool announced = true) {
    cache.begin_prompt(announced ? std::optional(end - first) : std::nullopt);
    for (std::size_t at = first; at < end; at += chunk) feed(cache, stream, at, std::min(chunk, end - at));
    cache.end_prompt();
}
/// Tokens `first .. end - 1`, one per call. @returns the outputs of the calls one after the other.
template <class Cache>
std::vector<float> feed_decode(Cache& cache, const Stream& stream, std::size_t first, std::size_t end) {
    std::vector<float> all;
    for (std::size_t at = first; at < end; ++at) {
        const std::vector<float> out = feed(cache, stream, at, 1);
        all.insert(all.end(), out.begin(), out.end());
    }
    return all;
}

/// Slots of one head in the order of their positions.
inline std::vector<std::size_t> by_position(const HeadView& head) {
    std::vector<std::size_t> slots(head.rows());
    for (std::size_t j = 0; j < slots.size(); ++j) slots[j] = j;
    std::sort(slots.begin(), slots.end(),
              [&](std::size_t a, std::size_t b) { return head.position[a] < head.position[b]; });
    return slots;
}
/// Positions that one head holds, ascending.
inline std::vector<position_t> positions_of(const HeadView& head) {
    std::vector<position_t> positions;
    for (const std::size_t slot : by_position(head)) positions.push_back(head.position[slot]);
    return positions;
}
/// Numbers that come in slot order, in the order of positions.
inline std::vector<float> sorted_by_position(const HeadView& head, std::span<const float> numbers) {
    std::vector<float> sorted;
    for (const std::size_t slot : by_position(head)) sorted.push_back(numbers[slot]);
    return sorted;
}
/// All rows (K or V) in the order of positions.
inline std::vector<float> rows_by_position(const RowsView& rows, const HeadView& head) {
    std::vector<float> sorted(rows.rows() * rows.dim());
    std::size_t next = 0;
    for (const std::size_t slot : by_position(head)) {
        rows.widen(slot, std::span(sorted).subspan(next, rows.dim()));
        next += rows.dim();
    }
    return sorted;
}

/// Calls `use(cache, name)` for KVCache and for Evictor on foreign buffers, with both compactions, on every
/// instruction set of this machine. Blocks are small, so that short sequences fill many.
template <Policy P, class Use, BudgetRule Rule = Uniform>
void for_each_driver(const CacheShape& shape, const P& policy, const Budget& budget, Use&& use,
                     const Rule& rule = {}) {
    for (const simd::Isa isa : simd::all_isas) {
        if (!simd::available(isa)) continue;
        const auto run = [&](auto& cache, const std::string& name) {
            cache.set_kernels(simd::kernels_for(isa));
            use(cache, name + " on " + std::string(simd::name_of(isa)));
        };
        BlockPool pool({.block_rows = 5});
        KVCache cache(shape, policy, budget, pool, rule);
        run(cache, "KVCache");
        Engine<P, Rule> engine(shape, policy, budget, false, rule);
        run(engine, "Evictor");
        Engine<P, Rule> ascending(shape, policy, budget, true, rule);
        run(ascending, "ascending Evictor");
    }
}

}  // namespace kvcull::test
