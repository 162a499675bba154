#pragma once
/// Attention of one KV head's group in tiles of query tokens, so that attention [G * m, n] never exists
/// whole.

#include <algorithm>
#include <cstddef>
#include <functional>
#include <numeric>
#include <vector>

#include "../attention/attend.hpp"
#include "../attention/parts.hpp"
#include "../attention/softmax.hpp"
#include "../base/memory.hpp"
#include "../score/concepts.hpp"
#include "schedule.hpp"
#include "shape.hpp"

namespace kvcull::inline KVCULL_ABI::detail {

/// Scratch of one thread. Grows to the largest case and stays.
struct TileScratch {
    Scratch<float> q, attention, logits, output, lse, score, policy, wrapper;
    std::vector<Visible> visible;
    std::vector<float> token_lse;  // of one token of a tile, see `OneByOne`
    std::vector<Visible> token_visible;
};

/// What computes: kernels, the caller's threads, and scratch for each of them.
struct Workers {
    const simd::Kernels* kernels = &simd::kernels();
    Executor executor;
    std::vector<TileScratch> scratch;  // one, or one per head if an executor runs them side by side
    Schedule schedule;

    /// `body(head, scratch)` for every head.
    template <class Body>
    void for_each_head(std::size_t count, Body&& body) {
        scratch.resize(std::max(scratch.size(), executor ? count : std::size_t{1}));
        const auto run = [&](std::size_t head) { body(head, scratch[executor ? head : 0]); };
        if (executor)
            executor(count, std::ref(run));  // by reference: std::function would copy it to the heap
        else
            for (std::size_t head = 0; head < count; ++head) run(head);
    }
    /// Heads in parts, see `Schedule`: `parts(head)`, `cost(head)`, then `start(head, scratch)`,
    /// `run(head, part, scratch)` and, of heads with several parts, `merge(head, scratch)`.
    template <class Count, class Cost, class Start, class Run, class Merge>
    void for_each_part(std::size_t count, Count&& parts, Cost&& cost, Start&& start, Run&& run,
                       Merge&& merge) {
        scratch.resize(std::max(scratch.size(), executor ? count : std::size_t{1}));
        const auto of = [&](std::size_t head) -> TileScratch& { return scratch[executor ? head : 0]; };
        schedule.clear();
        for (std::size_t head = 0; head < count; ++head) {
            const std::size_t pieces = parts(head);
            schedule.add(pieces, cost(head) / pieces);
        }
        schedule.run(
            executor, [&](std::size_t head) { start(head, of(head)); },
            [&](std::size_t head, std::size_t part) { run(head, part, of(head)); },
            [&](std::size_t head, std::size_t pieces) {
                if (pieces > 1) merge(head, of(head));
            });
    }
    [[nodiscard]] TileScratch& scratch_of(std::size_t head) {
        scratch.resize(std::max(scratch.size(), head + 1));
        return scratch[head];
    }
    void reserve(const CacheShape& shape, const Needs& needs, std::size_t rows, std::size_t workspace,
                 std::size_t wrapper_workspace);
};

/// Query tokens per tile: about a MiB of attention, but enough rows to share every load of K and V.
[[nodiscard]] constexpr std::size_t tile_tokens(std::size_t group, std::size_t n) noexcept {
    constexpr std::size_t floats = 1U << 18U;
    return std::clamp<std::size_t>(floats / std::max<std::size_t>(group * n, 1), 4, 64);
}

/// Scratch for tiles over `rows` rows. The workspaces: floats that the policy takes for itself.
inline void Workers::reserve(const CacheShape& shape, const Needs& needs, std::size_t rows,
                             std::size_t workspace, std::size_t wrapper_workspace) {
    scratch.resize(std::max(scratch.size(), executor ? shape.kv_heads : std::size_t{1}));
    schedule.reserve(shape.kv_heads, Parts{0, rows}.count());
    const std::size_t tile = shape.group() * tile_tokens(shape.group(), rows);
    for (TileScratch& one : scratch) {
        one.q.get((tile + 1) * shape.head_dim);
        one.attention.get((tile + 1) * rows);
        if (needs.logits) one.logits.get(tile * rows);
        const std::size_t most = std::max(tile, (Parts{0, rows}.count() + 1) * shape.group());
        one.output.get(most * shape.values());
        one.lse.get(most);
        one.policy.get(workspace);
        one.wrapper.get(wrapper_workspace);
        one.visible.reserve(tile);
        one.token_lse.reserve(shape.group());
        one.token_visible.reserve(shape.group());
    }
}

/// What a policy sees of the tiles of one KV head.
template <Policy P>
struct Observer {
    const P& policy;
    typename P::State& state;

    void operator()(const HeadStep& tile) const { policy.observe(state, tile); }
    /// Calls `run(reader)` with what the policy reads along with attention, if it does. `own_query`
    /// [head_dim]: where a query of its own goes, behind those of the tile.
    template <class Run>
    void read_along(const HeadStep& tile, std::span<float> own_query, const Run& run) const {
        Reader reader{policy, state, tile};
        if constexpr (QueriesKeys<P>) {
            const std::span<const float> query = policy.key_query(state, tile);
            reader.queries = !query.empty();
            std::copy(query.begin(), query.end(), own_query.begin());
        }
        if constexpr (ReadsValues<P>) reader.reads_values = policy.reads_values(state, tile);
        reader.queries || reader.reads_values ? run(reader) : run(NoReader{});
    }

    struct Reader {
        const P& policy;
        typename P::State& state;
        const HeadStep& tile;
        bool queries = false, reads_values = false;

        void products(std::span<const float> of_keys) const {
            if constexpr (QueriesKeys<P>) policy.take_products(state, tile, of_keys);
        }
        void values(const RowsView::Run& piece) const {
            if constexpr (ReadsValues<P>)
                if (reads_values) policy.read_values(state, tile, piece);
        }
    };
};

/// Which cached rows the query tokens of a call see.
struct TokenMask {
    /// The tokens are those of the newest rows, and none sees a later one's. Else they come after all rows.
    bool causal = true;
    std::size_t window = 0;  // > 0: only so many positions, its own included; rows are then ascending

    [[nodiscard]] position_t position(const HeadStep& step, std::size_t token, std::size_t tokens) const {
        return causal ? step.cached.position[step.n() - tokens + token]
                      : step.next_position + static_cast<position_t>(token);
    }
    /// What token `token` of `tokens` sees.
    [[nodiscard]] Visible visible(const HeadStep& step, std::size_t token, std::size_t tokens) const {
        const std::size_t end = causal ? step.n() - tokens + token + 1 : step.n();
        if (window == 0) return {0, 0, end};
        return {0, first_seen(step.cached.position, position(step, token, tokens)), end};
    }
    /// The first of ascending positions that a token at `query` sees.
    [[nodiscard]] std::size_t first_seen(const PositionsView& positions, position_t query) const {
        std::size_t low = 0, high = positions.size();
        while (low < high) {
            const std::size_t middle = low + (high - low) / 2;
            if (query - positions[middle] >= static_cast<position_t>(window))
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }
};

/// Runs the query tokens of one KV head over `base.cached` and calls `observe(step)` for every tile of the
/// last `needs.rows` tokens, or once with an empty tile if there are none.
/// @param q      [q_heads, c, d]; the group's heads begin at `first_head`.
/// @param out    [q_heads, c, d_v], or empty: then only what `needs` asks for is computed.
/// @param needs  as `shown` in such a call.
template <class Observe>
void for_each_tile(const HeadStep& base, const HeadsView<const float>& q, std::size_t first_head,
                   const TokenMask& mask, const HeadsView<float>& out, const Needs& needs,
                   TileScratch& scratch, Observe&& observe) {
    const std::size_t n = base.n(), c = q.tokens, group = base.group;
    const std::size_t counted = c - std::min(needs.rows, c);  // first token that is observed
    const bool asked = needs.attention || needs.logits || needs.output;
    const std::size_t most = tile_tokens(group, n);

    for (std::size_t first = out.empty() ? counted : 0; first < c;) {
        const bool watched = first >= counted;
        const std::size_t tokens = std::min(most, (watched ? c : counted) - first), rows = group * tokens;
        // With room for a query of the policy's own behind the rows.
        const MatrixView<float> tile_q(scratch.q.get((rows + 1) * q.dim), rows, q.dim);
        scratch.visible.resize(rows);
        for (std::size_t i = 0; i < tokens; ++i) {
            const Visible visible = mask.visible(base, first + i, c);
            for (std::size_t g = 0; g < group; ++g) {
                const float* row = q.row(first_head + g, first + i);
                std::copy(row, row + q.dim, tile_q[g * tokens + i].data());
                scratch.visible[g * tokens + i] = visible;
            }
        }
        HeadStep step = base;
        step.first = first;
        step.tokens = tokens;
        step.first_tile = first == counted;
        step.last_tile = first + tokens == c;
        step.q = tile_q;
        if (!out.empty() || (watched && asked)) {
            const bool output = !out.empty() || needs.output;
            const std::size_t values = base.cached.v.dim();
            AttentionRows want{.attention = {scratch.attention.get((rows + 1) * n), rows, n},
                               .lse = {scratch.lse.get(rows), rows}};
            if (watched && needs.logits) want.logits = {scratch.logits.get(rows * n), rows, n};
            if (output) want.output = {scratch.output.get(rows * values), rows, values};
            const auto run = [&](const auto& reader) {
                with_logit_rule(
                    base, [&](std::size_t row) { return row / tokens; },
                    [&](std::size_t row) { return mask.position(base, first + row % tokens, c); },
                    [&](const LogitRule& rule) {
                        attend(*base.kernels, tile_q, base.cached.k, base.cached.v, scratch.visible, rule,
                               want, reader);
                    });
            };
            const std::span<float> own_query(tile_q.data + rows * q.dim, q.dim);
            if constexpr (requires { observe.read_along(step, own_query, run); }) {
                c == 1 && output ? observe.read_along(step, own_query, run) : run(NoReader{});
            } else {
                run(NoReader{});
            }
            if (!out.empty())
                for (std::size_t g = 0; g < group; ++g)
                    for (std::size_t i = 0; i < tokens; ++i) {
                        const auto row = want.output[g * tokens + i];
                        std::copy(row.begin(), row.end(), out.row(first_head + g, first + i));
                    }
            if (asked) {
                step.lse = want.lse;
                if (needs.attention) step.attention = want.attention;
                step.logits = want.logits;
                step.output = want.output;
            }
        }
        step.visible = scratch.visible;
        if (watched) observe(step);
        first += tokens;
    }
    if (counted == c) observe(base);
}

/// Output of a tile of probe rows: that over the cached rows, which the tile holds, merged with attention
/// over the probe's own keys up to each row. @param k, v [kv_heads, c, dim] @param out [q_heads, c, d_v]
inline void add_own_rows(const HeadStep& tile, const TokenMask& mask, const HeadsView<const float>& k,
                         const HeadsView<const float>& v, const HeadsView<float>& out, TileScratch& scratch) {
    const std::size_t c = k.tokens, values = v.dim, rows = tile.q.rows;
    std::vector<position_t> positions(c);
    std::iota(positions.begin(), positions.end(), tile.next_position);
    std::vector<Visible> visible(rows);
    for (std::size_t r = 0; r < rows; ++r) {
        const std::size_t end = tile.first + r % tile.tokens + 1;
        visible[r] = {0, mask.window == 0 ? 0 : end - std::min(end, mask.window), end};
    }
    float* const memory = scratch.score.get(rows * (c + values + 1));
    const AttentionRows own{.attention = {memory, rows, c},
                            .lse = {memory + rows * c, rows},
                            .output = {memory + rows * (c + 1), rows, values}};
    HeadStep among = tile;
    among.cached = {{k.row(tile.head, 0), c, k.dim, k.token_stride},
                    {v.row(tile.head, 0), c, v.dim, v.token_stride},
                    PositionsView(positions)};
    with_logit_rule(
        among, [&](std::size_t r) { return r / tile.tokens; },
        [&](std::size_t r) { return positions[tile.first + r % tile.tokens]; },
        [&](const LogitRule& rule) {
            attend(*tile.kernels, tile.q, among.cached.k, among.cached.v, visible, rule, own);
        });
    for (std::size_t r = 0; r < rows; ++r) {
        merge(own.output[r], own.lse[r], tile.output[r], tile.lse[r]);
        const auto row = own.output[r];
        std::copy(row.begin(), row.end(),
                  out.row(tile.head * tile.group + r / tile.tokens, tile.first + r % tile.tokens));
    }
}

}  // namespace kvcull::inline KVCULL_ABI::detail
