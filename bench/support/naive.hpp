#pragma once
/// What one would write first: the loops that every kernel is shown beside.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <span>
#include <vector>

#include "kvcull/base/types.hpp"

namespace kvcull::bench::naive {

/// Attention of one query head over n cached rows: logits, softmax, weighted sum. `weight[n]` is left behind.
template <class T>
void attend(const float* q, const T* k, const T* v, std::size_t n, std::size_t dim, float scale,
            float* weight, float* out) {
    float largest = -3e38F;
    for (std::size_t j = 0; j < n; ++j) {
        float sum = 0;
        for (std::size_t c = 0; c < dim; ++c) sum += q[c] * to_float(k[j * dim + c]);
        weight[j] = sum * scale;
        largest = std::max(largest, weight[j]);
    }
    float total = 0;
    for (std::size_t j = 0; j < n; ++j) {
        weight[j] = std::exp(weight[j] - largest);
        total += weight[j];
    }
    std::fill(out, out + dim, 0.0F);
    for (std::size_t j = 0; j < n; ++j) {
        weight[j] /= total;
        for (std::size_t c = 0; c < dim; ++c) out[c] += weight[j] * to_float(v[j * dim + c]);
    }
}

/// The k best rows by sorting all of them.
inline void top_k(std::span<const float> score, std::size_t k, std::vector<index_t>& keep) {
    keep.resize(score.size());
    std::iota(keep.begin(), keep.end(), index_t{0});
    std::stable_sort(keep.begin(), keep.end(), [&](index_t a, index_t b) {
        return score[static_cast<std::size_t>(a)] > score[static_cast<std::size_t>(b)];
    });
    keep.resize(k);
    std::sort(keep.begin(), keep.end());
}

/// Rows that stay move down to their new place, one after the other.
inline void gather(std::span<const index_t> keep, float* rows, std::size_t dim) {
    for (std::size_t to = 0; to < keep.size(); ++to)
        for (std::size_t c = 0; c < dim; ++c)
            rows[to * dim + c] = rows[static_cast<std::size_t>(keep[to]) * dim + c];
}

}  // namespace kvcull::bench::naive
