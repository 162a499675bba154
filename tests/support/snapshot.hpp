#pragma once
/// What can be seen of a cache, as values that compare: for tests that say "as it was" or "the same as".

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvcull/score/state.hpp"
#include "support/engine.hpp"
#include "support/reference.hpp"

namespace kvcull::test {

/// Everything observable of a cache: rows in slot order, bit for bit, and the policy's scores.
struct Snapshot {
    std::vector<std::size_t> rows;
    std::vector<position_t> positions;
    std::vector<std::uint32_t> bits;

    friend bool operator==(const Snapshot&, const Snapshot&) = default;
};
template <class Cache>
Snapshot snapshot(Cache& cache) {
    Snapshot all;
    const auto add = [&](std::span<const float> numbers) {
        for (const float& x : numbers) all.bits.push_back(std::bit_cast<std::uint32_t>(x));
    };
    for (std::size_t layer = 0; layer < cache.shape().layers; ++layer)
        for (std::size_t h = 0; h < cache.shape().kv_heads; ++h) {
            const HeadView held = cache.view(layer, h);
            all.rows.push_back(held.rows());
            std::vector<float> row(std::max(held.k.dim(), held.v.dim()));
            for (std::size_t j = 0; j < held.rows(); ++j) {
                all.positions.push_back(held.position[j]);
                held.k.widen(j, row);
                add({row.data(), held.k.dim()});
                held.v.widen(j, row);
                add({row.data(), held.v.dim()});
            }
            add(cache.scores(layer, h));
        }
    return all;
}

/// Positions of every head, ascending.
template <class Cache>
std::vector<std::vector<position_t>> all_positions(const Cache& cache) {
    std::vector<std::vector<position_t>> all;
    for (std::size_t layer = 0; layer < cache.shape().layers; ++layer)
        for (std::size_t h = 0; h < cache.shape().kv_heads; ++h)
            all.push_back(positions_of(cache.view(layer, h)));
    return all;
}

template <class T>
bool has_rows(const RowArray<T>& array, std::size_t rows) {
    return array.rows() == rows;
}
template <class T>
bool has_rows(const RowPlanes<T>& array, std::size_t rows) {
    for (std::size_t plane = 0; plane < array.planes(); ++plane)
        if (array[plane].size() != rows) return false;
    return true;
}
/// Every array of every state has as many rows as its head.
template <class Cache>
bool states_fit(const Cache& cache) {
    bool fit = true;
    for (std::size_t layer = 0; layer < cache.shape().layers; ++layer)
        for (std::size_t h = 0; h < cache.shape().kv_heads; ++h) {
            auto state = cache.evictor().state(layer, h);
            detail::for_each_array(
                state, [&](const auto& array) { fit = fit && has_rows(array, cache.view(layer, h).rows()); });
        }
    return fit;
}

/// Every row is the stream's row of its position, bit for bit.
template <class Cache>
bool rows_are_copies(const Cache& cache, const Stream& stream) {
    for (std::size_t layer = 0; layer < stream.shape.layers; ++layer)
        for (std::size_t h = 0; h < stream.shape.kv_heads; ++h) {
            const HeadView held = cache.view(layer, h);
            std::vector<float> k(held.k.dim()), v(held.v.dim());
            for (std::size_t j = 0; j < held.rows(); ++j) {
                const auto token = static_cast<std::size_t>(held.position[j]);
                held.k.widen(j, k);
                held.v.widen(j, v);
                if (!same_bits(k, std::span(stream.keys(layer, token, 1).row(h, 0), k.size())) ||
                    !same_bits(v, std::span(stream.values(layer, token, 1).row(h, 0), v.size())))
                    return false;
            }
        }
    return true;
}

/// KV head h of the result is head order[h], with its group of query heads.
inline Stream permute_heads(const Stream& stream, std::span<const std::size_t> order) {
    Stream result = stream;
    const CacheShape& shape = stream.shape;
    const auto copy = [&](const std::vector<float>& from, std::vector<float>& to, std::size_t each,
                          std::size_t dim) {
        const std::size_t block = each * stream.tokens * dim;
        for (std::size_t layer = 0; layer < shape.layers; ++layer)
            for (std::size_t h = 0; h < shape.kv_heads; ++h)
                std::copy_n(from.data() + (layer * shape.kv_heads + order[h]) * block, block,
                            to.data() + (layer * shape.kv_heads + h) * block);
    };
    copy(stream.q, result.q, shape.group(), shape.head_dim);
    copy(stream.k, result.k, 1, shape.head_dim);
    copy(stream.v, result.v, 1, shape.values());
    return result;
}

}  // namespace kvcull::test
