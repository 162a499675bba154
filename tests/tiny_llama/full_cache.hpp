#pragma once
/// Attention over everything, in plain loops of double: what a cache without eviction must compute.

#include <cmath>
#include <cstddef>
#include <kvcull/cache/shape.hpp>
#include <kvcull/score/concepts.hpp>
#include <kvcull/views.hpp>
#include <vector>

class FullCache {
  public:
    FullCache(std::size_t layers, std::size_t kv_heads) : rows_(layers * kv_heads), kv_heads_(kv_heads) {}

    [[nodiscard]] std::size_t seen() const { return seen_; }
    void append(std::size_t layer, kvcull::HeadsView<const float> k, kvcull::HeadsView<const float> v,
                const kvcull::AppendInputs& /*inputs*/ = {}) {
        for (std::size_t head = 0; head < kv_heads_; ++head)
            for (std::size_t t = 0; t < k.tokens; ++t)
                rows_[layer * kv_heads_ + head].push_back(
                    {{k.row(head, t), k.row(head, t) + k.dim}, {v.row(head, t), v.row(head, t) + v.dim}});
        pending_ = k.tokens;
    }
    void attend(std::size_t layer, kvcull::HeadsView<const float> q, kvcull::HeadsView<float> out) {
        const std::size_t group = q.heads / kv_heads_;
        for (std::size_t head = 0; head < q.heads; ++head) {
            const auto& rows = rows_[layer * kv_heads_ + head / group];
            for (std::size_t t = 0; t < q.tokens; ++t)
                attend(rows, rows.size() - q.tokens + t + 1, q.row(head, t), q.dim, out.row(head, t));
        }
    }
    void end_step(const kvcull::StepInputs& /*inputs*/) { seen_ += pending_; }

  private:
    struct Row {
        std::vector<float> k, v;
    };
    static void attend(const std::vector<Row>& rows, std::size_t visible, const float* q, std::size_t dim,
                       float* out) {
        std::vector<double> weights(visible), sum(dim);
        double largest = -1e300, total = 0;
        for (std::size_t j = 0; j < visible; ++j) {
            for (std::size_t c = 0; c < dim; ++c) weights[j] += double{q[c]} * double{rows[j].k[c]};
            weights[j] /= std::sqrt(static_cast<double>(dim));
            largest = std::max(largest, weights[j]);
        }
        for (double& weight : weights) total += weight = std::exp(weight - largest);
        for (std::size_t j = 0; j < visible; ++j)
            for (std::size_t c = 0; c < dim; ++c) sum[c] += weights[j] / total * double{rows[j].v[c]};
        for (std::size_t c = 0; c < dim; ++c) out[c] = static_cast<float>(sum[c]);
    }

    std::vector<std::vector<Row>> rows_;
    std::size_t kv_heads_, pending_ = 0, seen_ = 0;
};
