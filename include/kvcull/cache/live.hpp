#pragma once
/// Everything that changes over a sequence, as one value: marks, forks and saved states are copies of it.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "../score/concepts.hpp"
#include "../select/plan.hpp"
#include "../select/topk.hpp"
#include "held_positions.hpp"
#include "shape.hpp"

namespace kvcull::inline KVCULL_ABI {

namespace detail {
struct NoSequence {};
template <class P>
struct SequenceOf {
    using type = NoSequence;
};
template <SequenceState P>
struct SequenceOf<P> {
    using type = typename P::Sequence;
};
}  // namespace detail

/// How far a sequence has come.
struct Reach {
    position_t next = 0;       // after the newest token
    std::size_t unbroken = 0;  // newest tokens whose positions follow one another

    friend bool operator==(const Reach&, const Reach&) = default;
};

/// State of one sequence under policy P.
template <Policy P>
struct Live {
    std::vector<typename P::State> states;  // [layers * kv_heads]
    typename detail::SequenceOf<P>::type sequence{};
    std::vector<std::size_t> rows, sizes;         // [layers * kv_heads]: held; allowed after an eviction
    std::vector<std::size_t> layer_sizes;         // [layers]: of each head, before a rule divides over heads
    std::vector<std::size_t> since;               // [layers]: tokens decoded since the last eviction
    std::vector<std::uint8_t> admitted, stepped;  // [layers]: in the call that runs now
    std::vector<std::uint8_t> decided;            // [layers]: the prompt's last decision was taken
    std::vector<position_t> gone;                 // [layers]: positions below fell out of the window
    std::vector<HeldPositions> held;              // [layers * kv_heads]; empty if views are trusted
    /// [layers] of [tokens, q_heads, head_dim]: queries of the newest tokens, which states have not seen.
    std::vector<std::vector<float>> waiting;
    std::vector<PositionRange> pinned;
    std::size_t seen = 0, call_tokens = 0, prompt_end = unlimited;
    Reach reach, call_reach;  // before and after the call that runs now
    Phase phase = Phase::decode;
    bool resolved = false;  // the budget is known in tokens
    bool hold = false;

    explicit Live(const CacheShape& shape)
        : states(shape.heads()),
          rows(shape.heads(), 0),
          sizes(shape.heads(), unlimited),
          layer_sizes(shape.layers, unlimited),
          since(shape.layers, 0),
          admitted(shape.layers, 0),
          stepped(shape.layers, 0),
          decided(shape.layers, 1),
          gone(shape.layers, 0),
          held(shape.heads()),
          waiting(shape.layers) {}

    [[nodiscard]] bool any_waits() const noexcept {
        return std::any_of(waiting.begin(), waiting.end(), [](const auto& layer) { return !layer.empty(); });
    }
    /// The query of a layer's newest token joins those that wait. @returns how many do.
    std::size_t wait(std::size_t layer, const HeadsView<const float>& q) {
        std::vector<float>& queries = waiting[layer];
        for (std::size_t head = 0; head < q.heads; ++head)
            queries.insert(queries.end(), q.row(head, 0), q.row(head, 0) + q.dim);
        return queries.size() / (q.heads * q.dim);
    }
    /// The end of a call of `tokens` tokens.
    [[nodiscard]] Moment moment_after(std::size_t tokens) const noexcept {
        return {.phase = phase,
                .prompt_end = seen + tokens == prompt_end,
                .seen = seen + tokens,
                .tokens = tokens};
    }

    /// The pinned ranges and one more: those that touch become one, so that no row counts twice.
    [[nodiscard]] std::vector<PositionRange> pinned_with(PositionRange added) const {
        std::vector<PositionRange> ranges;
        for (const PositionRange& range : pinned) {
            if (range.end < added.begin || added.end < range.begin) {
                ranges.push_back(range);
            } else {
                added.begin = std::min(added.begin, range.begin);
                added.end = std::max(added.end, range.end);
            }
        }
        ranges.push_back(added);
        return ranges;
    }
    /// `tokens` new rows in all heads of a layer: state grows, and `admit(head, first new row)` fills it. If
    /// that throws, nothing has changed.
    template <class Admit>
    void enter(std::size_t layer, std::size_t tokens, const Admit& admit) {
        const std::size_t heads = rows.size() / since.size(), first = layer * heads;
        try {
            for (std::size_t h = 0; h < heads; ++h) {
                resize_state(states[first + h], rows[first + h] + tokens);
                admit(h, rows[first + h]);
            }
        } catch (...) {
            for (std::size_t h = 0; h < heads; ++h) resize_state(states[first + h], rows[first + h]);
            throw;
        }
        for (std::size_t h = 0; h < heads; ++h) rows[first + h] += tokens;
        if (phase == Phase::decode) since[layer] += tokens;
        admitted[layer] = 1;
        call_tokens = tokens;
    }
    /// All layers have made the call. @returns its tokens.
    std::size_t end_call() noexcept {
        const std::size_t tokens = std::exchange(call_tokens, 0);
        seen += tokens;
        reach = call_reach;
        std::fill(stepped.begin(), stepped.end(), std::uint8_t{0});
        std::fill(admitted.begin(), admitted.end(), std::uint8_t{0});
        return tokens;
    }
    /// Per-row state and lengths follow a plan that the rows follow too.
    void commit(const Plan& plan) noexcept {
        const std::size_t kv_heads = rows.size() / since.size();
        for (std::size_t i = 0; i < plan.size(); ++i) {
            const HeadPlan head = plan[i];
            const std::size_t index = head.layer * kv_heads + head.head;
            move_state(states[index], head.moves, head.keep.size());
            rows[index] = head.keep.size();
            since[head.layer] = 0;
        }
    }
    /// Positions follow too. @param cached  views as before the plan, of heads `first ..`
    void commit(const Plan& plan, std::span<const HeadView> cached, std::size_t first) noexcept {
        const std::size_t kv_heads = rows.size() / since.size();
        for (std::size_t i = 0; !held.empty() && i < plan.size(); ++i) {
            const std::size_t index = plan[i].layer * kv_heads + plan[i].head;
            held[index].follow(plan[i], cached[index - first].position);
        }
        commit(plan);
    }
    /// The newest `tokens` tokens leave as the plan says. That is no eviction: intervals go on counting. The
    /// rest of a prompt may still come, and its last decision with it.
    void take_back(const Plan& plan, std::span<const HeadView> cached, std::size_t tokens) {
        std::vector<std::size_t> left = since;
        for (std::size_t& count : left) count -= std::min(count, tokens);
        commit(plan, cached, 0);
        since.swap(left);
        seen -= tokens;
        if (phase == Phase::prompt) std::fill(decided.begin(), decided.end(), std::uint8_t{0});
        reach = call_reach = {reach.next - static_cast<position_t>(tokens), reach.unbroken - tokens};
    }
    /// The positions of a layer's newest `added` rows count as held from now on.
    void count(std::size_t layer, LayerView cached, std::size_t added) {
        for (std::size_t h = 0; !held.empty() && h < cached.size(); ++h)
            held[layer * cached.size() + h].append(cached[h].position, cached[h].rows() - added);
    }
};

}  // namespace kvcull::inline KVCULL_ABI
