#pragma once
/// What an evictor asks of the views, numbers and plans that a call brings.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "../base/error.hpp"
#include "../score/concepts.hpp"
#include "../select/plan.hpp"
#include "../views.hpp"
#include "live.hpp"
#include "shape.hpp"

namespace kvcull::inline KVCULL_ABI::detail {

inline void check_layer(std::string_view where, const CacheShape& shape, std::size_t layer) {
    check<error::shape_error>(layer < shape.layers, where, "layer", layer, text("below ", shape.layers));
}
inline void check_head(std::string_view where, const CacheShape& shape, std::size_t layer, std::size_t head) {
    check_layer(where, shape, layer);
    check<error::shape_error>(head < shape.kv_heads, where, "head", head, text("below ", shape.kv_heads));
}

/// One layer's views. @param rows [kv_heads], held so far. @param added  that the call brings
inline void check_cached(std::string_view where, const CacheShape& shape, LayerView cached,
                         std::span<const std::size_t> rows, std::size_t added) {
    check_size(where, "cached.size()", cached.size(), shape.kv_heads);
    for (std::size_t h = 0; h < shape.kv_heads; ++h) {
        const HeadView& head = cached[h];
        const std::size_t want = rows[h] + added;
        check_size(where, text("cached[", h, "].k.rows()"), head.k.rows(), want);
        check_size(where, text("cached[", h, "].v.rows()"), head.v.rows(), want);
        check_size(where, text("cached[", h, "].position.size()"), head.position.size(), want);
        check_size(where, text("cached[", h, "].k.dim()"), head.k.dim(), shape.head_dim);
        check_size(where, text("cached[", h, "].v.dim()"), head.v.dim(), shape.values());
    }
}
/// All layers' views. @param rows [layers * kv_heads]
inline void check_cached(std::string_view where, const CacheShape& shape, CacheView cached,
                         std::span<const std::size_t> rows) {
    check_size(where, "cached.kv_heads", cached.kv_heads, shape.kv_heads);
    check_size(where, "cached.heads.size()", cached.heads.size(), shape.heads());
    for (std::size_t layer = 0; layer < shape.layers; ++layer)
        check_cached(where, shape, cached.layer(layer), rows.subspan(layer * shape.kv_heads, shape.kv_heads),
                     0);
}

/// There must be a position after the newest one.
template <class Name>
void check_newest(std::string_view where, const Name& name, position_t newest) {
    constexpr position_t most = std::numeric_limits<position_t>::max();
    check<error::shape_error>(newest < most, where, name, newest, text("below ", most));
}
/// The newest `added` rows of a layer: ascending positions from `reach.next` on, the same in all heads.
/// @returns the reach with them.
inline Reach check_new_rows(std::string_view where, LayerView cached, std::size_t added, const Reach& reach) {
    const PositionsView& first = cached[0].position;
    Reach after = reach;
    for (std::size_t h = 0; h < cached.size(); ++h) {
        const PositionsView& positions = cached[h].position;
        after = reach;
        for (std::size_t i = 0; i < added; ++i) {
            const position_t at = positions[positions.size() - added + i];
            check<error::shape_error>(at >= after.next, where, text("cached[", h, "].position of a new row"),
                                      at, text("beyond ", after.next - 1));
            check_size(where, text("cached[", h, "].position of a new row"), at,
                       first[first.size() - added + i]);
            check_newest(where, text("cached[", h, "].position of a new row"), at);
            after = {at + 1, at == after.next ? after.unbroken + 1 : 1};
        }
    }
    return after;
}

/// `tokens` more rows fit into heads of `rows`: rows are numbered by `index_t`.
inline void check_room(std::string_view where, std::string_view name, std::size_t tokens,
                       std::span<const std::size_t> rows) {
    const std::size_t held = rows.empty() ? 0 : *std::max_element(rows.begin(), rows.end());
    check<error::capacity_error>(tokens <= max_rows - held, where, name, tokens,
                                 text("at most ", max_rows - held, " beyond the ", held, " rows of a head"));
}
/// A prompt of `total` tokens after `seen`. @returns how many are then seen.
inline std::size_t check_prompt(std::string_view where, std::size_t seen, std::size_t total) {
    check<error::shape_error>(total < unlimited - seen, where, "total", total,
                              text("below ", unlimited - seen));
    return seen + total;
}
/// A plan for the rows that are held, of heads that exist, each once. @param rows [layers * kv_heads]
inline void check_plan(std::string_view where, const CacheShape& shape, const Plan& plan,
                       std::span<const std::size_t> rows) {
    std::vector<std::uint8_t> named(rows.size(), 0);
    for (std::size_t i = 0; i < plan.size(); ++i) {
        const HeadPlan one = plan[i];
        check<error::shape_error>(one.layer < shape.layers, where, text("plan[", i, "].layer"), one.layer,
                                  text("below ", shape.layers));
        check<error::shape_error>(one.head < shape.kv_heads, where, text("plan[", i, "].head"), one.head,
                                  text("below ", shape.kv_heads));
        const std::size_t index = one.layer * shape.kv_heads + one.head;
        check_size(where, text("plan[", i, "].rows"), one.rows, rows[index]);
        check<error::shape_error>(std::exchange(named[index], 1) == 0, where, text("plan[", i, "]"),
                                  text("layer ", one.layer, ", head ", one.head, " again"),
                                  "every head once");
    }
}

/// Pinned rows never leave: `coming` more rows must fit into every head beside those that it holds.
/// @param sizes [layers * kv_heads]: most rows of each head
inline void check_beside_pinned(std::string_view where, CacheView cached,
                                std::span<const PositionRange> pinned, std::span<const std::size_t> sizes,
                                std::size_t coming) {
    for (std::size_t i = 0; !pinned.empty() && i < sizes.size(); ++i) {
        const PositionsView& position = cached.heads[i].position;
        std::size_t stay = 0;
        for (std::size_t j = 0; j < position.size(); ++j)
            stay += std::any_of(pinned.begin(), pinned.end(),
                                [at = position[j]](const PositionRange& range) { return range.holds(at); });
        check<error::shape_error>(
            stay <= sizes[i] && coming <= sizes[i] - stay, where, "tokens", coming,
            text("at most the budget ", sizes[i], " less the ", stay, " pinned rows of a head"));
    }
}

/// New tokens may enter a layer now.
template <class Decision, class Live>
void check_admit(std::string_view where, const Decision& decision, const Live& live, std::size_t layer,
                 std::size_t tokens) {
    check_layer(where, decision.shape, layer);
    check<error::state_error>(live.admitted[layer] == 0, where, text("layer ", layer), "already in this step",
                              "end_step first");
    check<error::shape_error>(tokens > 0, where, "tokens", tokens, "at least 1");
    if (live.call_tokens != 0) check_size(where, "tokens", tokens, live.call_tokens);
    const std::size_t heads = decision.shape.kv_heads;
    check_room(where, "tokens", tokens, std::span(live.rows).subspan(layer * heads, heads));
    const bool prompt = live.phase == Phase::prompt;
    check<error::state_error>(live.resolved || decision.budget.ratio == 0.0 || prompt, where, "budget",
                              "a ratio of a prompt that was not given", "begin_prompt first");
    if (prompt && live.prompt_end != unlimited)
        check<error::shape_error>(
            tokens <= live.prompt_end - live.seen, where, "tokens", tokens,
            text("at most the ", live.prompt_end - live.seen, " left of the prompt's total"));
}

/// Look-ahead queries of all layers, [q_heads, R, head_dim] each; R may be 0.
inline void check_queries(std::string_view where, const CacheShape& shape,
                          std::span<const HeadsView<const float>> q) {
    check_size(where, "q.size()", q.size(), shape.layers);
    for (std::size_t layer = 0; layer < q.size(); ++layer) {
        check_size(where, text("q[", layer, "].tokens"), q[layer].tokens, q[0].tokens);
        if (q[layer].tokens > 0)  // a policy may have rows of its own
            check_heads(where, to_text(text("q[", layer, "]")), q[layer], shape.q_heads, q[0].tokens,
                        shape.head_dim);
    }
}

}  // namespace kvcull::inline KVCULL_ABI::detail
