// Layouts of method `laq`.

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kinds.hpp"
#include "kvcull/attention/rope.hpp"
#include "kvcull/cache/lookahead.hpp"
#include "kvcull/policies.hpp"
#include "kvcull/select/head_rules.hpp"
#include "streams.hpp"

namespace kvcull::test::laq {
namespace {

Laq read_policy(const GoldenFile& file) {
    Laq policy{
        .window = file.count("w2"),
        .kernel = file.count("kernel"),
        .pool = file.choice<Pool>("pooling", {{"none", Pool::none}, {"max", Pool::max}, {"avg", Pool::avg}}),
        .gqa = file.choice<Group>("gqa", {{"mean", Group::mean}, {"max", Group::max}, {"sum", Group::sum}}),
        .mask =
            file.choice<Laq::Mask>("mask", {{"causal", Laq::Mask::causal}, {"shifted", Laq::Mask::shifted}})};
    if (policy.pool == Pool::none) policy.kernel = 1;  // whatever a file says there has no meaning
    return policy;
}

/// Appends the scores that look-ahead queries give the first `candidates` rows of one head.
template <class Cache>
void append_scores(const Cache& cache, std::size_t layer, std::size_t head, const HeadsView<const float>& q,
                   std::size_t candidates, std::vector<float>& all) {
    const std::size_t rows = cache.shape().group() * q.tokens;
    std::vector<float> own(rows * q.dim), score(cache.rows(layer, head));
    for (std::size_t r = 0; r < rows; ++r)
        std::copy_n(q.row(head * cache.shape().group() + r / q.tokens, r % q.tokens), q.dim,
                    own.data() + r * q.dim);
    with_head_step(
        cache, head,
        [&](const HeadStep& step) {
            cache.evictor().policy().rescore(cache.evictor().state(layer, head), step,
                                             {own.data(), rows, q.dim}, score);
        },
        layer);
    score.resize(candidates);
    append(all, score);
}

template <class Rule>
void compare_stage2(GoldenFile& file, const Rule& rule) {
    const auto window = file.array<float>("in.q_window", 3), pseudo = file.array<float>("in.q_pseudo", 3);
    auto k = file.array<float>("in.k", 3), v = file.array<float>("in.v", 3);
    const std::size_t heads = k.dim(0), n = k.dim(1), dim = k.dim(2), budget = file.count("B"),
                      q_heads = pseudo.dim(0);
    Laq policy = read_policy(file);
    policy.lookahead = pseudo.dim(1);
    policy.lookahead_window = 1;
    const std::size_t rows = window.dim(1), candidates = n - std::min(policy.window, n);
    detail::check_size("golden", "in.q_window.shape[0]", window.dim(0), q_heads);
    detail::check_size("golden", "in.q_window.shape[2]", window.dim(2), dim);
    detail::check_size("golden", "in.q_pseudo.shape[2]", pseudo.dim(2), dim);
    detail::check_size("golden", "in.v.shape[0]", v.dim(0), heads);
    detail::check_size("golden", "in.v.shape[1]", v.dim(1), n);
    detail::check<error::format_error>(rows <= n && rows >= std::min(policy.window, n), "golden",
                                       "in.q_window.shape[1]", rows,
                                       detail::text("w2 = ", policy.window, " to n = ", n));
    Stream stream{
        .shape = {.layers = 1, .q_heads = q_heads, .kv_heads = heads, .head_dim = dim, .value_dim = v.dim(2)},
        .tokens = n,
        .q = std::vector<float>(q_heads * n * dim),
        .k = std::move(k.values),
        .v = std::move(v.values)};
    for (std::size_t h = 0; h < q_heads; ++h)
        std::copy_n(window.values.data() + h * rows * dim, rows * dim,
                    stream.q.data() + (h * n + n - rows) * dim);
    const HeadsView<const float> q = head_major(pseudo.values.data(), q_heads, pseudo.dim(1), dim);

    for (const std::size_t chunk : {n, std::size_t{3}})
        for_each_driver(
            stream.shape, policy, {.tokens = budget},
            [&](auto& cache, const std::string& driver) {
                file.begin_run(driver + ", prompt in calls of " + std::to_string(chunk));
                feed_prompt(cache, stream, 0, n, chunk);
                std::vector<float> scores;
                for (std::size_t h = 0; h < heads; ++h) append_scores(cache, 0, h, q, candidates, scores);
                file.expect("out.score", {heads, candidates}, scores);
                cache.rescore(std::span(&q, 1));
                const std::vector<std::int64_t> keep = kept_positions(cache);
                if (!file.contains("out.capacity")) {
                    file.expect("out.keep", {heads, std::min(n, budget)}, keep);
                    return;
                }
                std::vector<std::int64_t> capacity, cu_len{0};
                for (std::size_t h = 0; h < heads; ++h) {
                    const std::size_t held = cache.rows(0, h);
                    capacity.push_back(static_cast<std::int64_t>(held - std::min(held, policy.window)));
                    cu_len.push_back(cu_len.back() + static_cast<std::int64_t>(held));
                }
                file.expect("out.keep", {keep.size()}, keep);
                file.expect("out.capacity", {heads}, capacity);
                file.expect("out.cu_len", {heads + 1}, cu_len);
            },
            rule);
}

/// The decoder of the files: attention alone, no norm, no MLP.
class ToyDecoder {
  public:
    explicit ToyDecoder(const GoldenFile& file)
        : embed_(file.array<float>("in.embed", 2)),
          unembed_(file.array<float>("in.unembed", 2)),
          wq_(file.array<float>("in.wq", 3)),
          wk_(file.array<float>("in.wk", 3)),
          wv_(file.array<float>("in.wv", 3)),
          wo_(file.array<float>("in.wo", 3)),
          shape_{.layers = file.count("layers"),
                 .q_heads = file.count("Hq"),
                 .kv_heads = file.count("Hkv"),
                 .head_dim = file.count("d")},
          rope_(rope(shape_.head_dim, file.real("rope_base"))) {
        const std::size_t width = embed_.dim(1), q = shape_.q_heads * shape_.head_dim,
                          kv = shape_.kv_heads * shape_.head_dim;
        const auto want = [&](const Array<float>& array, const std::string& name,
                              std::initializer_list<std::size_t> shape) {
            if (!std::equal(array.shape.begin(), array.shape.end(), shape.begin(), shape.end()))
                throw error::format_error("golden: shape of " + name + " does not fit the metadata");
        };
        want(wq_, "in.wq", {shape_.layers, width, q});
        want(wk_, "in.wk", {shape_.layers, width, kv});
        want(wv_, "in.wv", {shape_.layers, width, kv});
        want(wo_, "in.wo", {shape_.layers, q, width});
        want(unembed_, "in.unembed", {width, embed_.dim(0)});
    }
    [[nodiscard]] const CacheShape& shape() const noexcept { return shape_; }
    [[nodiscard]] std::size_t vocabulary() const noexcept { return embed_.dim(0); }

    /// Appends tokens to the cache. @returns the logits of the last one.
    template <class Cache>
    std::vector<float> forward(std::span<const std::int64_t> tokens, Cache& cache) const {
        const std::size_t n = tokens.size(), width = embed_.dim(1), d = shape_.head_dim;
        std::vector<float> x(n * width);
        for (std::size_t t = 0; t < n; ++t)
            std::copy_n(embed_.values.data() + static_cast<std::size_t>(tokens[t]) * width, width,
                        x.data() + t * width);
        const auto first = static_cast<position_t>(cache.seen());
        const auto rotated = [&](std::vector<float> rows, std::size_t heads) {
            for (std::size_t t = 0; t < n; ++t)
                rotate(rope_, first + static_cast<position_t>(t),
                       MatrixView<float>(rows.data() + t * heads * d, heads, d));
            return rows;
        };
        for (std::size_t layer = 0; layer < shape_.layers; ++layer) {
            const std::vector<float> q = rotated(times(x, wq_, layer), shape_.q_heads),
                                     k = rotated(times(x, wk_, layer), shape_.kv_heads),
                                     v = times(x, wv_, layer);
            std::vector<float> attended(q.size());
            cache.append(layer, token_major(k.data(), shape_.kv_heads, n, d),
                         token_major(v.data(), shape_.kv_heads, n, d));
            cache.attend(layer, token_major(q.data(), shape_.q_heads, n, d),
                         token_major(attended.data(), shape_.q_heads, n, d));
            const std::vector<float> added = times(attended, wo_, layer);
            for (std::size_t i = 0; i < x.size(); ++i) x[i] += added[i];
        }
        cache.end_step();
        return times({x.end() - static_cast<std::ptrdiff_t>(width), x.end()}, unembed_, 0);
    }

  private:
    /// x [n, rows] times a matrix [rows, cols], that of a layer if there are several.
    static std::vector<float> times(const std::vector<float>& x, const Array<float>& matrices,
                                    std::size_t layer) {
        const std::size_t axes = matrices.shape.size(), rows = matrices.dim(axes - 2),
                          cols = matrices.dim(axes - 1);
        const float* const matrix = matrices.values.data() + layer * rows * cols;
        std::vector<float> out(x.size() / rows * cols);
        for (std::size_t t = 0; t < x.size() / rows; ++t)
            for (std::size_t c = 0; c < cols; ++c) {
                double sum = 0;
                for (std::size_t i = 0; i < rows; ++i)
                    sum += static_cast<double>(x[t * rows + i]) * static_cast<double>(matrix[i * cols + c]);
                out[t * cols + c] = static_cast<float>(sum);
            }
        return out;
    }

    Array<float> embed_, unembed_, wq_, wk_, wv_, wo_;
    CacheShape shape_;
    Rope rope_;
};

std::int64_t best(const std::vector<float>& logits) {  // of equal logits the lowest id
    return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

/// Greedy tokens after a prompt whose last logits are given. @returns them and the logits that chose them.
template <class Cache>
std::pair<std::vector<std::int64_t>, std::vector<float>> decode(const ToyDecoder& model, Cache& cache,
                                                                std::vector<float> logits,
                                                                std::size_t count) {
    std::vector<std::int64_t> tokens;
    std::vector<float> all;
    while (tokens.size() < count) {
        if (!tokens.empty()) logits = model.forward(std::span(tokens).last(1), cache);
        append(all, logits);
        tokens.push_back(best(logits));
    }
    return {tokens, all};
}

template <class Cache>
std::vector<std::int64_t> model_positions(const Cache& cache) {
    std::vector<std::int64_t> all;
    for (std::size_t layer = 0; layer < cache.shape().layers; ++layer)
        for (std::size_t h = 0; h < cache.shape().kv_heads; ++h) append(all, cache.positions(layer, h));
    return all;
}

void compare_run(GoldenFile& file, const ToyDecoder& model, const Laq& policy, simd::Isa isa,
                 std::size_t chunk) {
    const auto prompt = file.array<std::int64_t>("in.tokens", 1);
    const std::size_t n = prompt.dim(0), budget = file.count("B"), copy = file.count("B1"),
                      steps = file.array<std::int64_t>("out.tokens", 1).dim(0);
    const double eos = file.real("eos");
    const CacheShape& shape = model.shape();
    const std::size_t layers = shape.layers, heads = shape.kv_heads, d = shape.head_dim;
    BlockPool pool({.block_rows = 5});
    KVCache inner(shape, policy, Budget{.tokens = budget}, pool);
    inner.set_kernels(simd::kernels_for(isa));
    LookaheadCache cache(std::move(inner));
    std::vector<float> logits;
    cache.begin_prompt(n);
    for (std::size_t at = 0; at < n; at += chunk)
        logits = model.forward(std::span(prompt.values).subspan(at, std::min(chunk, n - at)), cache);
    std::vector<std::int64_t> pseudo;
    if (cache.end_prefill()) {
        file.expect("out.keep1", {layers, heads, std::min(copy, n)}, model_positions(cache.fork()));
        auto ahead = cache.ahead();
        for (std::int64_t next = best(logits); pseudo.size() < policy.lookahead;) {
            pseudo.push_back(next);
            next = best(model.forward(std::span(&next, 1), ahead));
            if (static_cast<double>(next) == eos) break;
        }
        std::vector<float> queries, scores;
        const std::size_t candidates = n - policy.window;
        for (std::size_t layer = 0; layer < layers; ++layer) {
            const HeadsView<const float> q = cache.queries(layer);
            for (std::size_t h = 0; h < shape.q_heads; ++h)
                for (std::size_t i = 0; i < q.tokens; ++i)
                    queries.insert(queries.end(), q.row(h, i), q.row(h, i) + d);
            for (std::size_t h = 0; h < heads; ++h)
                append_scores(cache.cache(), layer, h, q, candidates, scores);
        }
        file.expect("out.q_pseudo", {layers, shape.q_heads, pseudo.size(), d}, queries);
        file.expect("out.score", {layers, heads, candidates}, scores);
        cache.end_lookahead();
    }
    file.expect("out.pseudo", {pseudo.size()}, pseudo);
    file.expect("out.keep", {layers, heads, std::min(budget, n)}, model_positions(cache.cache()));
    const auto [tokens, all] = decode(model, cache, logits, steps);
    file.expect("out.tokens", {steps}, tokens);
    file.expect("out.logits", {steps, model.vocabulary()}, all);
}

}  // namespace

void check_stage2(GoldenFile& file) {
    const double permille = file.has("permille") ? file.real("permille") : -1;
    if (permille < 0) return compare_stage2(file, Uniform{});
    compare_stage2(file, AdaKV<>{.alpha_permille = static_cast<std::size_t>(permille)});
}

void check_run(GoldenFile& file) {
    const ToyDecoder model(file);
    Laq policy = read_policy(file);
    policy.lookahead = file.count("L");
    policy.lookahead_window = file.count("w1");
    policy.lookahead_budget = file.count("B1");
    policy.lookahead_method = file.choice<Laq::Method>("lookahead", {{"snapkv", Laq::Method::snapkv},
                                                                     {"streaming", Laq::Method::streaming},
                                                                     {"full", Laq::Method::full}});
    const auto prompt = file.array<std::int64_t>("in.tokens", 1);
    for (const std::int64_t token : prompt.values)
        detail::check<error::format_error>(token >= 0 && static_cast<std::size_t>(token) < model.vocabulary(),
                                           "golden", "in.tokens", token,
                                           detail::text("0 to ", model.vocabulary() - 1));
    for (const simd::Isa isa : simd::all_isas) {
        if (!simd::available(isa)) continue;
        for (const std::size_t chunk : {prompt.dim(0), std::size_t{7}}) {
            file.begin_run("LookaheadCache on " + std::string(simd::name_of(isa)) + ", prompt in calls of " +
                           std::to_string(chunk));
            compare_run(file, model, policy, isa, chunk);
        }
    }
    const std::size_t steps = file.array<std::int64_t>("out.tokens_full", 1).dim(0);
    KVCache full(model.shape(), Full{});
    full.begin_prompt(prompt.dim(0));
    const std::vector<float> logits = model.forward(prompt.values, full);
    full.end_prompt();
    file.begin_run("full cache");
    file.expect("out.tokens_full", {steps}, decode(model, full, logits, steps).first);
}

}  // namespace kvcull::test::laq
