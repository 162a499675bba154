#pragma once
/// Causal attention whose logits decay by learned rates, as TRIM-KV trains its gates with: forward and
/// backward.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

#include "documents.hpp"
#include "products.hpp"

namespace kvcull::inline KVCULL_ABI::train {

/// s[h,t,i] = scale * q[h,t] . k[g,i] + (t - i) log_beta[g,i] for i <= t of the same document, g = h / group;
/// P = softmax_i(s), o = P v. The decay is added to the logit: it multiplies the weight by beta^(t-i).
template <class T>
struct GatedAttention {
    HeadsView<const T> q, k, v;    // [q_heads, T, d], [kv_heads, T, d], [kv_heads, T, dv]
    MatrixView<const T> log_beta;  // [kv_heads, T], <= 0; -Inf: visible to itself only
    std::span<const TokenRange> documents;
    T scale;  // 1 / sqrt(d)

    /// @param o [q_heads, T, dv] @param lse [q_heads, T], log-sum-exp of the logits, for the backward pass.
    /// Cost: O(T^2 d) operations, O(tile T) memory. @throws shape_error
    void forward(HeadsView<T> o, MatrixView<T> lse) const {
        check("GatedAttention::forward", o, lse);
        Tile tile;
        for (std::size_t h = 0; h < q.heads; ++h)
            for_each_tile(h, tile, [&](const Rows& rows) {
                for (std::size_t r = 0; r < rows.count; ++r) {
                    const auto row = tile.s[r].first(rows.visible(r));
                    softmax(row, lse[h][rows.first + r]);
                    std::fill(row.end(), tile.s[r].end(), T{0});
                    T* const out = o.row(h, rows.first + r);
                    std::fill(out, out + o.dim, T{0});
                }
                add_product<T>(tile.s, keys(v, h, rows), queries(o, h, rows));
            });
    }

    /// Adds the gradients of q, k, v and log_beta that d_o [q_heads, T, dv] makes of `o` and `lse` as
    /// `forward` left them. Logits are made anew, tile by tile. @throws shape_error
    void backward(HeadsView<const T> o, MatrixView<const T> lse, HeadsView<const T> d_o, HeadsView<T> d_q,
                  HeadsView<T> d_k, HeadsView<T> d_v, MatrixView<T> d_log_beta) const {
        constexpr std::string_view where = "GatedAttention::backward";
        check(where, o, lse);
        check_like(where, "d_o", d_o, o);
        check_like(where, "d_q", d_q, q);
        check_like(where, "d_k", d_k, k);
        check_like(where, "d_v", d_v, v);
        detail::check_size(where, "d_log_beta.rows", d_log_beta.rows, k.heads);
        detail::check_size(where, "d_log_beta.cols", d_log_beta.cols, k.tokens);
        Tile tile;
        std::vector<T> memory;
        for (std::size_t h = 0; h < q.heads; ++h)
            for_each_tile(h, tile, [&](const Rows& rows) {
                memory.resize(rows.count * rows.keys());
                const MatrixView<T> ds(memory.data(), rows.count, rows.keys());
                const MatrixView<T>& p = tile.s;
                product_transposed<T>(queries(d_o, h, rows), keys(v, h, rows), ds);
                const auto d_beta = d_log_beta[h / group()].subspan(rows.begin, rows.keys());
                for (std::size_t r = 0; r < rows.count; ++r) {
                    const std::size_t t = rows.first + r, visible = rows.visible(r);
                    const T *const out = o.row(h, t), *const d_out = d_o.row(h, t);
                    T mean = 0;
                    for (std::size_t c = 0; c < o.dim; ++c) mean += d_out[c] * out[c];
                    for (std::size_t i = 0; i < visible; ++i) {
                        p[r][i] = std::exp(p[r][i] - lse[h][t]);
                        ds[r][i] = p[r][i] * (ds[r][i] - mean);
                        d_beta[i] += static_cast<T>(visible - 1 - i) * ds[r][i];
                        ds[r][i] *= scale;
                    }
                    std::fill(p[r].begin() + static_cast<std::ptrdiff_t>(visible), p[r].end(), T{0});
                    std::fill(ds[r].begin() + static_cast<std::ptrdiff_t>(visible), ds[r].end(), T{0});
                }
                add_product<T>(ds, keys(k, h, rows), queries(d_q, h, rows));
                add_transposed_product<T>(ds, queries(q, h, rows), keys(d_k, h, rows));
                add_transposed_product<T>(p, queries(d_o, h, rows), keys(d_v, h, rows));
            });
    }

  private:
    static constexpr std::size_t tile_rows = 32;
    /// Below this a rate leaves nothing after one step; -Inf becomes it, so that no NaN arises.
    static constexpr T fastest = static_cast<T>(-1e30);

    /// Query tokens of a tile and the keys that any of them sees.
    struct Rows {
        std::size_t begin;         // of the document
        std::size_t first, count;  // query tokens

        [[nodiscard]] std::size_t keys() const noexcept { return first + count - begin; }
        [[nodiscard]] std::size_t visible(std::size_t r) const noexcept { return first + r + 1 - begin; }
    };
    struct Tile {
        std::vector<T> memory;
        MatrixView<T> s;  // [count, keys]
    };

    [[nodiscard]] std::size_t group() const noexcept { return q.heads / k.heads; }
    template <class View>
    static auto queries(const View& view, std::size_t h, const Rows& rows) {
        return MatrixView(view.row(h, rows.first), rows.count, view.dim, view.token_stride);
    }
    template <class View>
    auto keys(const View& view, std::size_t h, const Rows& rows) const {
        return MatrixView(view.row(h / group(), rows.begin), rows.keys(), view.dim, view.token_stride);
    }

    /// Of a row, in place.
    static void softmax(std::span<T> row, T& lse) {
        if constexpr (std::is_same_v<T, float>) {
            simd::kernels().softmax(row.data(), row.size(), &lse);
        } else {
            const T most = *std::max_element(row.begin(), row.end());
            T sum = 0;
            for (T& x : row) sum += x = std::exp(x - most);
            for (T& x : row) x /= sum;
            lse = most + std::log(sum);
        }
    }

    /// Calls `visit(rows)` with the logits of query head `h` in `tile.s`, tile after tile.
    template <class Visit>
    void for_each_tile(std::size_t h, Tile& tile, const Visit& visit) const {
        const auto rate = log_beta[h / group()];
        for (const TokenRange& document : documents)
            for (std::size_t first = document.begin; first < document.end; first += tile_rows) {
                const Rows rows{document.begin, first, std::min(tile_rows, document.end - first)};
                tile.memory.resize(rows.count * rows.keys());
                tile.s = {tile.memory.data(), rows.count, rows.keys()};
                product_transposed<T>(queries(q, h, rows), keys(k, h, rows), tile.s, scale);
                for (std::size_t r = 0; r < rows.count; ++r)
                    for (std::size_t i = 0; i < rows.visible(r); ++i)
                        tile.s[r][i] +=
                            static_cast<T>(rows.visible(r) - 1 - i) * std::max(rate[rows.begin + i], fastest);
                visit(rows);
            }
    }

    template <class A, class B>
    static void check_like(std::string_view where, std::string_view name, const HeadsView<A>& got,
                           const HeadsView<B>& want) {
        using detail::check_size, detail::text;
        check_size(where, text(name, ".heads"), got.heads, want.heads);
        check_size(where, text(name, ".tokens"), got.tokens, want.tokens);
        check_size(where, text(name, ".dim"), got.dim, want.dim);
    }
    template <class A, class B>
    void check(std::string_view where, const HeadsView<A>& o, const MatrixView<B>& lse) const {
        using detail::check_size;
        detail::check<error::shape_error>(k.heads > 0 && q.heads % k.heads == 0, where, "q.heads", q.heads,
                                          detail::text("a multiple of k.heads = ", k.heads));
        check_size(where, "k.tokens", k.tokens, q.tokens);
        check_size(where, "k.dim", k.dim, q.dim);
        check_size(where, "v.heads", v.heads, k.heads);
        check_size(where, "v.tokens", v.tokens, q.tokens);
        check_size(where, "log_beta.rows", log_beta.rows, k.heads);
        check_size(where, "log_beta.cols", log_beta.cols, q.tokens);
        check_size(where, "o.heads", o.heads, q.heads);
        check_size(where, "o.tokens", o.tokens, q.tokens);
        check_size(where, "o.dim", o.dim, v.dim);
        check_size(where, "lse.rows", lse.rows, q.heads);
        check_size(where, "lse.cols", lse.cols, q.tokens);
        check_documents(where, documents, q.tokens);
    }
};

}  // namespace kvcull::inline KVCULL_ABI::train
