#pragma once
/// One layer's call while it runs, head by head: what its heads have in common, and a long head in parts.

#include <algorithm>
#include <cstddef>

#include "../attention/parts.hpp"
#include "live.hpp"
#include "tiles.hpp"

namespace kvcull::inline KVCULL_ABI {

/// What `Evictor::begin` found out. Views stay the caller's.
struct LayerCall {
    std::size_t layer = 0;
    LayerView cached = {};
    HeadsView<const float> q = {};
    HeadsView<float> out = {};
    Needs needs = {};
    bool spared = false;  // the policy has no say
    bool evicts = false;  // at its end
    bool waits = false;   // its query, to be shown to the policy later
    Reach reach = {};     // after its newest token
    Moment moment = {};   // of its end
    detail::TokenMask mask = {};

    /// Rows that the heads' queries go over: what a head costs, but for the size of a row.
    [[nodiscard]] std::size_t cost(std::size_t head) const noexcept { return cached[head].rows() * q.tokens; }
};

namespace detail {

/// The one query token of a call over a long head, in parts: `prepare`, then `run` for every part, on any
/// threads, then `merge`.
class PartedHead {
  public:
    PartedHead(const HeadStep& base, const LayerCall& call, TileScratch& scratch)
        : base_(base), call_(call), scratch_(scratch), parts_(cut(call, base.head)) {}

    [[nodiscard]] static Parts cut(const LayerCall& call, std::size_t head) noexcept {
        const HeadView& cached = call.cached[head];
        HeadStep step;
        step.cached = cached;
        const Visible visible = call.mask.visible(step, 0, 1);
        return {visible.begin, visible.end};
    }

    void prepare() {
        const std::size_t group = base_.group, n = base_.n(), parts = parts_.count();
        const MatrixView<float> q(scratch_.q.get(group * call_.q.dim), group, call_.q.dim);
        for (std::size_t g = 0; g < group; ++g) {
            const float* row = call_.q.row(base_.head * group + g, 0);
            std::copy(row, row + q.cols, q[g].data());
        }
        scratch_.visible.assign(group, {0, parts_.begin, parts_.end});
        scratch_.attention.get(group * n);
        if (logits()) {
            float* const all = scratch_.logits.get(group * n);
            if (parts_.begin > 0) std::fill(all, all + group * n, 0.0F);
        }
        scratch_.lse.get((parts + 1) * group);
        scratch_.output.get((parts + 1) * group * base_.cached.v.dim());
    }
    void run(std::size_t part) const {
        with_logit_rule(
            base_, [](std::size_t row) { return row; },
            [&](std::size_t /*row*/) { return call_.mask.position(base_, 0, 1); },
            [&](const LogitRule& rule) {
                attend_part(*base_.kernels, query(), base_.cached.k, base_.cached.v, parts_.first(part),
                            parts_.first(part + 1), rule, rows(part + 1));
            });
    }
    template <class Observe>
    void merge(Observe&& observe) const {
        const std::size_t group = base_.group, parts = parts_.count(), values = base_.cached.v.dim();
        const Needs& needs = call_.needs;
        const bool weights = needs.rows > 0 && needs.attention;
        const AttentionRows all = rows(0);
        merge_parts(parts_, {scratch_.lse.data() + group, parts, group},
                    {scratch_.output.data() + group * values, parts * group, values}, weights, all);
        for (std::size_t g = 0; g < group; ++g)
            std::copy(all.output[g].begin(), all.output[g].end(), call_.out.row(base_.head * group + g, 0));
        if (needs.rows == 0) return observe(base_);
        HeadStep step = base_;
        step.tokens = 1;
        step.q = query();
        step.visible = scratch_.visible;
        if (needs.attention || needs.logits || needs.output) {
            step.lse = all.lse;
            if (needs.attention) step.attention = all.attention;
            step.logits = all.logits;
            step.output = all.output;
        }
        observe(step);
    }

  private:
    [[nodiscard]] bool logits() const noexcept { return call_.needs.rows > 0 && call_.needs.logits; }
    [[nodiscard]] MatrixView<const float> query() const noexcept {
        return {scratch_.q.data(), base_.group, call_.q.dim};
    }
    /// Of all parts (0), or of part `index - 1`.
    [[nodiscard]] AttentionRows rows(std::size_t index) const noexcept {
        const std::size_t group = base_.group, n = base_.n(), values = base_.cached.v.dim();
        AttentionRows rows{.attention = {scratch_.attention.data(), group, n},
                           .lse = {scratch_.lse.data() + index * group, group},
                           .output = {scratch_.output.data() + index * group * values, group, values}};
        if (logits()) rows.logits = {scratch_.logits.data(), group, n};
        return rows;
    }

    const HeadStep& base_;
    const LayerCall& call_;
    TileScratch& scratch_;
    Parts parts_;
};

}  // namespace detail

}  // namespace kvcull::inline KVCULL_ABI
