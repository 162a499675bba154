#pragma once
/// Everything that changes over a sequence, as one value: marks, forks and saved states are copies of it.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "../score/concepts.hpp"
#include "../select/plan.hpp"
#include "../select/topk.hpp"
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

/// State of one sequence under policy P.
template <Policy P>
struct Live {
    std::vector<typename P::State> states;  // [layers * kv_heads]
    typename detail::SequenceOf<P>::type sequence{};
    std::vector<std::size_t> rows, sizes;         // [layers * kv_heads]: held; allowed after an eviction
    std::vector<std::size_t> since;               // [layers]: tokens decoded since the last eviction
    std::vector<std::uint8_t> admitted, stepped;  // [layers]: in the call that runs now
    std::vector<std::uint8_t> decided;            // [layers]: the prompt's last decision was taken
    std::vector<position_t> gone;                 // [layers]: positions below fell out of the window
    std::vector<PositionRange> pinned;
    std::size_t seen = 0, call_tokens = 0, prompt_end = unlimited;
    position_t next_position = 0, call_next = 0;  // before and after the call that runs now
    Phase phase = Phase::decode;
    bool resolved = false;  // the budget is known in tokens
    bool hold = false;

    explicit Live(const CacheShape& shape)
        : states(shape.heads()),
          rows(shape.heads(), 0),
          sizes(shape.heads(), unlimited),
          since(shape.layers, 0),
          admitted(shape.layers, 0),
          stepped(shape.layers, 0),
          decided(shape.layers, 1),
          gone(shape.layers, 0) {}

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
};

}  // namespace kvcull::inline KVCULL_ABI
