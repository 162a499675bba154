#pragma once
/// A stand-in for an engine: the numbers that its model makes, and cache buffers of its own.

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <numeric>
#include <span>
#include <stdexcept>
#include <vector>

#include "kvcull/cache/evictor.hpp"
#include "kvcull/cache/kv_cache.hpp"
#include "kvcull/select/executors.hpp"
#include "support/random.hpp"

namespace kvcull::test {

/// q, k and v of a sequence of tokens, [tokens, layers, heads, dim]. A token's numbers do not depend on how
/// the tokens are cut into calls.
class TokenStream {
  public:
    TokenStream(const CacheShape& shape, std::size_t tokens, std::uint64_t seed)
        : shape_(shape),
          tokens_(tokens),
          q_(random_floats(tokens * shape.layers * shape.q_heads * shape.head_dim, 3 * seed)),
          k_(random_floats(tokens * shape.heads() * shape.head_dim, 3 * seed + 1)),
          v_(random_floats(tokens * shape.heads() * shape.values(), 3 * seed + 2)) {}

    [[nodiscard]] std::size_t tokens() const { return tokens_; }
    [[nodiscard]] HeadsView<const float> q(std::size_t layer, std::size_t first, std::size_t count) const {
        return part(q_, shape_.q_heads, shape_.head_dim, layer, first, count);
    }
    [[nodiscard]] HeadsView<const float> k(std::size_t layer, std::size_t first, std::size_t count) const {
        return part(k_, shape_.kv_heads, shape_.head_dim, layer, first, count);
    }
    [[nodiscard]] HeadsView<const float> v(std::size_t layer, std::size_t first, std::size_t count) const {
        return part(v_, shape_.kv_heads, shape_.values(), layer, first, count);
    }
    /// One row of k, to be set by a test that needs certain keys.
    [[nodiscard]] std::span<float> key(std::size_t token, std::size_t layer, std::size_t head) {
        return {&k_[((token * shape_.layers + layer) * shape_.kv_heads + head) * shape_.head_dim],
                shape_.head_dim};
    }
    [[nodiscard]] std::span<float> query(std::size_t token, std::size_t layer, std::size_t head) {
        return {&q_[((token * shape_.layers + layer) * shape_.q_heads + head) * shape_.head_dim],
                shape_.head_dim};
    }

  private:
    [[nodiscard]] HeadsView<const float> part(const std::vector<float>& all, std::size_t heads,
                                              std::size_t dim, std::size_t layer, std::size_t first,
                                              std::size_t count) const {
        if (first + count > tokens_) throw std::out_of_range("TokenStream: not that many tokens");
        const std::size_t stride = shape_.layers * heads * dim;
        return {all.data() + first * stride + layer * heads * dim, heads, count, dim, dim, stride};
    }

    CacheShape shape_;
    std::size_t tokens_;
    std::vector<float> q_, k_, v_;
};

/// Outputs of one call, [layers, q_heads, tokens, value_dim].
class Outputs {
  public:
    Outputs(const CacheShape& shape, std::size_t tokens)
        : values(shape.layers * shape.q_heads * tokens * shape.values(), -77.0F),
          shape_(shape),
          tokens_(tokens) {}

    [[nodiscard]] HeadsView<float> layer(std::size_t index) {
        return head_major(values.data() + index * shape_.q_heads * tokens_ * shape_.values(), shape_.q_heads,
                          tokens_, shape_.values());
    }
    std::vector<float> values;

  private:
    CacheShape shape_;
    std::size_t tokens_;
};

/// Cached rows of an engine: every head one strided run, moved by plans.
class Foreign {
  public:
    /// `gap`: elements between two rows that belong to nobody.
    explicit Foreign(const CacheShape& shape, std::size_t gap = 3)
        : shape_(shape), gap_(gap), heads_(shape.heads()), views_(shape.heads()) {}

    void append(std::size_t layer, HeadsView<const float> k, HeadsView<const float> v,
                std::span<const position_t> positions) {
        for (std::size_t h = 0; h < shape_.kv_heads; ++h) {
            Head& head = heads_[layer * shape_.kv_heads + h];
            for (std::size_t i = 0; i < positions.size(); ++i) {
                store(k.row(h, i), shape_.head_dim, head.k);
                store(v.row(h, i), shape_.values(), head.v);
                head.position.push_back(positions[i]);
            }
        }
    }
    void append(std::size_t layer, HeadsView<const float> k, HeadsView<const float> v, position_t first) {
        std::vector<position_t> positions(k.tokens);
        std::iota(positions.begin(), positions.end(), first);
        append(layer, k, v, positions);
    }
    void apply(const Plan& plan) {
        for (std::size_t i = 0; i < plan.size(); ++i) {
            const HeadPlan part = plan[i];
            Head& head = heads_[part.layer * shape_.kv_heads + part.head];
            const std::size_t key = row_bytes(shape_.dtype, shape_.head_dim),
                              value = row_bytes(shape_.dtype, shape_.values()), gap = gap_bytes();
            move_rows(part.moves, head.k.data(), key, key + gap);
            move_rows(part.moves, head.v.data(), value, value + gap);
            move_rows(part.moves, head.position.data(), sizeof(position_t), sizeof(position_t));
            head.k.resize(part.keep.size() * (key + gap));
            head.v.resize(part.keep.size() * (value + gap));
            head.position.resize(part.keep.size());
        }
    }
    [[nodiscard]] CacheView view() {
        for (std::size_t i = 0; i < heads_.size(); ++i) {
            const Head& head = heads_[i];
            const std::size_t rows = head.position.size();
            const auto rows_of = [&](const std::vector<std::byte>& bytes, std::size_t dim) {
                return RowsView(bytes.data(), shape_.dtype, rows, dim, elements(shape_.dtype, dim) + gap_);
            };
            views_[i] = {rows_of(head.k, shape_.head_dim), rows_of(head.v, shape_.values()), {head.position}};
        }
        return {views_, shape_.kv_heads};
    }
    [[nodiscard]] LayerView layer(std::size_t index) { return view().layer(index); }
    /// In slot order.
    [[nodiscard]] const std::vector<position_t>& positions(std::size_t layer, std::size_t head) const {
        return heads_[layer * shape_.kv_heads + head].position;
    }

  private:
    struct Head {
        std::vector<std::byte> k, v;
        std::vector<position_t> position;
    };
    [[nodiscard]] std::size_t gap_bytes() const { return gap_ * size_of(shape_.dtype); }
    /// The gap behind a row is all ones: whatever the type, numbers that spoil what reads them.
    void store(const float* row, std::size_t dim, std::vector<std::byte>& out) const {
        const std::size_t begin = out.size(), end = begin + row_bytes(shape_.dtype, dim);
        out.resize(end + gap_bytes(), std::byte{0xFF});
        simd::narrow(simd::kernels(), shape_.dtype, row, dim, out.data() + begin);
    }

    CacheShape shape_;
    std::size_t gap_;
    std::vector<Head> heads_;
    std::vector<HeadView> views_;
};

/// One call of `count` tokens from token `first` of the stream on, through all layers. @returns the outputs.
template <class P, class R>
std::vector<float> feed(KVCache<P, R>& cache, const TokenStream& stream, std::size_t first, std::size_t count,
                        const StepInputs& end = {}, const AppendInputs& inputs = {}) {
    Outputs out(cache.shape(), count);
    for (std::size_t layer = 0; layer < cache.shape().layers; ++layer) {
        cache.append(layer, stream.k(layer, first, count), stream.v(layer, first, count), inputs);
        cache.attend(layer, stream.q(layer, first, count), out.layer(layer));
    }
    cache.end_step(end);
    return std::move(out.values);
}
/// The same on an engine's buffers.
template <class P, class R>
std::vector<float> feed(Evictor<P, R>& evictor, Foreign& rows, const TokenStream& stream, std::size_t first,
                        std::size_t count, const StepInputs& end = {}) {
    Outputs out(evictor.shape(), count);
    for (std::size_t layer = 0; layer < evictor.shape().layers; ++layer) {
        rows.append(layer, stream.k(layer, first, count), stream.v(layer, first, count),
                    evictor.next_position());
        rows.apply(evictor.step(layer, rows.layer(layer), stream.q(layer, first, count), out.layer(layer)));
    }
    rows.apply(evictor.end_step(rows.view(), end));
    return std::move(out.values);
}
/// A whole prompt in chunks.
template <class Feed>
void in_chunks(std::size_t tokens, std::size_t chunk, Feed&& feed_one) {
    for (std::size_t first = 0; first < tokens; first += chunk)
        feed_one(first, std::min(chunk, tokens - first));
}

/// Rows of one head, widened, [rows, dim] without gaps.
inline std::vector<float> widened(const RowsView& rows) {
    std::vector<float> result(rows.rows() * rows.dim());
    for (std::size_t j = 0; j < rows.rows(); ++j)
        rows.widen(j, std::span(result).subspan(j * rows.dim(), rows.dim()));
    return result;
}
/// A copy of [heads, tokens, dim] without gaps.
inline std::vector<float> gathered(HeadsView<const float> view) {
    std::vector<float> result;
    for (std::size_t h = 0; h < view.heads; ++h)
        for (std::size_t i = 0; i < view.tokens; ++i)
            result.insert(result.end(), view.row(h, i), view.row(h, i) + view.dim);
    return result;
}
inline std::vector<position_t> to_vector(const PositionsView& positions) {
    std::vector<position_t> result(positions.size());
    for (std::size_t j = 0; j < result.size(); ++j) result[j] = positions[j];
    return result;
}
inline std::vector<position_t> sorted(std::vector<position_t> positions) {
    std::sort(positions.begin(), positions.end());
    return positions;
}

}  // namespace kvcull::test
