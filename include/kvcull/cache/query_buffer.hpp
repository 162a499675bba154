#pragma once
/// Queries that wait. Where an engine attends by itself, every token it decodes costs a pass over the keys
/// that only the policy wants. As long as no row goes, the queries may wait and share one pass: each sees the
/// rows of its own step, and the policy is shown them one by one, so that it cannot tell the difference.
/// Where each takes the place of the one before, the newest alone is shown.

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include "decision.hpp"
#include "live.hpp"
#include "tiles.hpp"

namespace kvcull::inline KVCULL_ABI::detail {

/// Whether nothing is lost when a policy sees a token's query later: it wants what only a pass over the rows
/// tells, and nothing that came with the token.
template <Policy P>
[[nodiscard]] bool can_wait(const Needs& needs) {
    return !SideInput<P> && needs.rows > 0 && (needs.attention || needs.logits || needs.output);
}

/// Shows a policy a tile of tokens as if each had come in a call of its own.
template <Policy P>
class OneByOne {
  public:
    OneByOne(const P& policy, typename P::State& state, TileScratch& scratch)
        : policy_(policy), state_(state), scratch_(scratch) {}

    void operator()(const HeadStep& tile) const {
        for (std::size_t i = 0; i < tile.tokens; ++i) {
            const HeadStep step = token(tile, i);
            resize_state(state_, step.n());
            policy_.observe(state_, step);
        }
    }

  private:
    /// The call of token `i` of the tile.
    [[nodiscard]] HeadStep token(const HeadStep& tile, std::size_t i) const {
        const std::size_t n = tile.n() - tile.added + tile.first + i + 1;
        const auto rows = [&](const MatrixView<const float>& all, std::size_t cols) {
            if (all.empty()) return all;
            return MatrixView<const float>(all[i].data(), tile.group, cols, tile.tokens * all.stride);
        };
        HeadStep step = tile;
        step.cached = tile.cached.first(n);
        step.next_position = tile.cached.position[n - 1] + 1;
        step.evicts = tile.evicts && n == tile.n();
        step.first = 0;
        step.added = step.tokens = 1;
        step.first_tile = step.last_tile = true;
        step.q = rows(tile.q, tile.q.cols);
        step.attention = rows(tile.attention, n);
        step.logits = rows(tile.logits, n);
        step.output = rows(tile.output, tile.output.cols);
        step.lse = gather(tile.lse, tile, i, scratch_.token_lse);
        step.visible = gather(tile.visible, tile, i, scratch_.token_visible);
        return step;
    }
    template <class T>
    static std::span<const T> gather(std::span<const T> all, const HeadStep& tile, std::size_t i,
                                     std::vector<T>& out) {
        if (all.empty()) return {};
        out.resize(tile.group);
        for (std::size_t g = 0; g < tile.group; ++g) out[g] = all[g * tile.tokens + i];
        return out;
    }

    const P& policy_;
    typename P::State& state_;
    TileScratch& scratch_;
};

/// Shows the states of a layer the queries that wait there. @param newer  rows of a call that came after them
/// @param evicts  rows go when this is done
template <Policy P, class Rule>
void show_waiting(Decision<P, Rule>& decision, Live<P>& live, std::size_t layer, LayerView cached,
                  std::size_t newer, bool evicts) {
    std::vector<float>& waiting = live.waiting[layer];
    if (waiting.empty()) return;
    const CacheShape& shape = decision.shape;
    const std::size_t tokens = waiting.size() / (shape.q_heads * shape.head_dim);
    const HeadsView<const float> q =
        token_major<const float>(waiting.data(), shape.q_heads, tokens, shape.head_dim);
    Needs needs = decision.policy.needs(Phase::decode);
    needs.rows = needs.replaced ? 1 : all_rows;
    decision.workers.for_each_head(shape.kv_heads, [&](std::size_t h, TileScratch& scratch) {
        const std::size_t index = layer * shape.kv_heads + h, rows = live.rows[index];
        HeadStep step = decision.head_step(live, index, cached[h].first(rows - newer), scratch);
        step.phase = Phase::decode;
        step.added = tokens;
        step.evicts = evicts;
        typename P::State& state = live.states[index];
        resize_state(state, step.n());
        const auto show = [&](const auto& observe) {
            for_each_tile(step, q, h * step.group, {}, {}, needs, scratch, observe);
        };
        needs.replaced ? show(Observer<P>{decision.policy, state})
                       : show(OneByOne<P>(decision.policy, state, scratch));
        resize_state(state, rows);
    });
    waiting.clear();
}

}  // namespace kvcull::inline KVCULL_ABI::detail
