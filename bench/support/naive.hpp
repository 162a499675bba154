#pragma once
/// What one would write first: the loops that every kernel is shown beside.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <list>
#include <numeric>
#include <span>
#include <unordered_map>
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

/// LRU of the standard library's parts: the newest page in front.
class ListLru {
  public:
    explicit ListLru(std::size_t slots) : slots_(slots) { where_.reserve(slots + 1); }

    /// @returns whether the page was there
    bool request(std::uint64_t page) {
        if (const auto found = where_.find(page); found != where_.end()) {
            pages_.splice(pages_.begin(), pages_, found->second);
            return true;
        }
        if (pages_.size() == slots_) {
            where_.erase(pages_.back());
            pages_.pop_back();
        }
        pages_.push_front(page);
        where_.emplace(page, pages_.begin());
        return false;
    }

  private:
    std::size_t slots_;
    std::list<std::uint64_t> pages_;
    std::unordered_map<std::uint64_t, std::list<std::uint64_t>::iterator> where_;
};

}  // namespace kvcull::bench::naive
