#pragma once
/// What layouts of several methods share: a stream of tokens, what is left of it, a prompt and then decoding.

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "kvcull/integrations/registry.hpp"
#include "kvcull/score/pool.hpp"
#include "support/engine.hpp"
#include "support/golden.hpp"

namespace kvcull::test {

/// in.q [Hq, m, d], in.k [Hkv, T, d], in.v [Hkv, T, dv], in.position [T] (optional). Of m < T queries, which
/// are those of the last m tokens, the ones before them are zero: they must have no say.
inline Stream read_stream(const GoldenFile& file) {
    const auto q = file.array<float>("in.q", 3);
    auto k = file.array<float>("in.k", 3), v = file.array<float>("in.v", 3);
    const std::size_t tokens = k.dim(1), rows = q.dim(1), dim = k.dim(2);
    detail::check<error::format_error>(rows <= tokens, "golden", "in.q.shape[1]", rows,
                                       detail::text("at most the ", tokens, " tokens of in.k"));
    detail::check_size("golden", "in.q.shape[2]", q.dim(2), dim);
    detail::check_size("golden", "in.v.shape[0]", v.dim(0), k.dim(0));
    detail::check_size("golden", "in.v.shape[1]", v.dim(1), tokens);
    Stream stream{.shape = {.layers = 1,
                            .q_heads = q.dim(0),
                            .kv_heads = k.dim(0),
                            .head_dim = dim,
                            .value_dim = v.dim(2)},
                  .tokens = tokens,
                  .q = std::vector<float>(q.dim(0) * tokens * dim),
                  .k = {},
                  .v = {}};
    for (std::size_t h = 0; h < q.dim(0); ++h)
        std::copy_n(q.values.data() + h * rows * dim, rows * dim,
                    stream.q.data() + (h * tokens + tokens - rows) * dim);
    if (file.contains("in.position")) {
        stream.positions = file.array<std::int64_t>("in.position", 1).values;
        detail::check_size("golden", "in.position.shape[0]", stream.positions.size(), tokens);
    }
    stream.k = std::move(k.values);
    stream.v = std::move(v.values);
    return stream;
}

/// A parameter that is called in the file what the library calls it.
template <class T>
T read_named(const GoldenFile& file, const std::string& key) {
    return detail::parse_value<T>("golden", key, file.text(key));
}
inline Pool read_pool(const GoldenFile& file) {
    return file.has("pool") ? read_named<Pool>(file, "pool") : Pool::none;
}

inline Tolerance score_tolerance(const GoldenFile& file, const std::string& name) {
    return {.relative = 1e-4, .absolute = 1e-6 * file.magnitude(name)};
}

/// Appends the list of one head to those of the heads before it; all must have the same length.
template <class T>
void append(std::vector<T>& all, const std::vector<T>& one) {
    all.insert(all.end(), one.begin(), one.end());
}

/// Positions of all heads, as indices into the stream.
template <class Cache>
std::vector<std::int64_t> kept_indices(const Cache& cache, const Stream& stream) {
    std::vector<std::int64_t> all;
    for (std::size_t h = 0; h < stream.shape.kv_heads; ++h) {
        std::int64_t token = 0;
        for (const position_t position : positions_of(cache.view(0, h))) {
            while (stream.position(static_cast<std::size_t>(token)) != position) ++token;
            all.push_back(token);
        }
    }
    return all;
}
template <class Cache>
std::vector<std::int64_t> kept_positions(const Cache& cache) {
    std::vector<std::int64_t> all;
    for (std::size_t h = 0; h < cache.shape().kv_heads; ++h) append(all, positions_of(cache.view(0, h)));
    return all;
}
/// The scores of all heads, by position.
template <class Cache>
std::vector<float> all_scores(Cache& cache) {
    std::vector<float> all;
    for (std::size_t h = 0; h < cache.shape().kv_heads; ++h)
        append(all, sorted_by_position(cache.view(0, h), cache.scores(0, h)));
    return all;
}

/// Calls `use(step)` with what a policy sees of one head of a cache between two steps.
template <class Cache, class Use>
void with_head_step(const Cache& cache, std::size_t head, Use&& use, std::size_t layer = 0) {
    Scratch<float> workspace, wrapper;
    use(HeadStep{.layer = layer,
                 .head = head,
                 .group = cache.shape().group(),
                 .next_position = cache.evictor().next_position(),
                 .cached = cache.view(layer, head),
                 .scale = cache.shape().logit_scale(),
                 .protect = protected_rows(cache.evictor().policy(), cache.evictor().size(layer, head)),
                 .kernels = &simd::kernels(),
                 .workspace = &workspace,
                 .wrapper_workspace = &wrapper});
}

/// A prompt in calls of `chunk` tokens (0: one call), then one token per call: out.prefill_position,
/// out.output, out.position; `at_end(cache)` compares the rest. @param grows  decoding evicts nothing.
template <Policy P, class AtEnd>
void check_over_time(GoldenFile& file, const P& policy, AtEnd&& at_end, bool grows = false) {
    const Stream stream = read_stream(file);
    const CacheShape& shape = stream.shape;
    const Budget budget{.tokens = file.count("budget")};
    const std::size_t prompt = file.count("prompt"), chunk = file.count("chunk");
    detail::check<error::format_error>(prompt <= stream.tokens, "golden", "prompt", prompt,
                                       detail::text("at most the ", stream.tokens, " tokens of in.k"));
    for_each_driver(shape, policy, budget, [&](auto& cache, const std::string& driver) {
        file.begin_run(driver);
        const bool announced = driver.starts_with("KVCache");
        feed_prompt(cache, stream, 0, prompt, chunk == 0 ? std::max<std::size_t>(prompt, 1) : chunk,
                    announced);
        const std::size_t after = std::min(prompt, budget.tokens);
        file.expect("out.prefill_position", {shape.kv_heads, after}, kept_positions(cache));

        const std::size_t steps = stream.tokens - prompt, row = shape.values();
        const std::vector<float> outputs = feed_decode(cache, stream, prompt, stream.tokens);
        std::vector<float> by_head(outputs.size());
        for (std::size_t step = 0; step < steps; ++step)
            for (std::size_t h = 0; h < shape.q_heads; ++h)
                std::copy_n(outputs.data() + (step * shape.q_heads + h) * row, row,
                            by_head.data() + (h * steps + step) * row);
        file.expect("out.output", {shape.q_heads, steps, row}, by_head);

        const std::size_t end = grows ? after + steps : std::min(stream.tokens, budget.tokens);
        file.expect("out.position", {shape.kv_heads, end}, kept_positions(cache));
        at_end(cache);
    });
}

}  // namespace kvcull::test
