// Layouts of method `baselines`: H2O, TOVA, KeyDiff, key norm, VATP, StreamingLLM.

#include <algorithm>
#include <string>
#include <vector>

#include "kinds.hpp"
#include "kvcull/attention/rope.hpp"
#include "kvcull/policies.hpp"
#include "support/engine.hpp"

namespace kvcull::test::baselines {
namespace {

/// in.q [Hq, T, d], in.k [Hkv, T, d], in.v [Hkv, T, dv], in.position [T] (optional).
Stream read_stream(const GoldenFile& file) {
    auto q = file.array<float>("in.q", 3), k = file.array<float>("in.k", 3), v = file.array<float>("in.v", 3);
    Stream stream{.shape = {.layers = 1,
                            .q_heads = q.dim(0),
                            .kv_heads = k.dim(0),
                            .head_dim = k.dim(2),
                            .value_dim = v.dim(2)},
                  .tokens = k.dim(1),
                  .q = {},
                  .k = {},
                  .v = {}};
    detail::check_size("golden", "in.q.shape[1]", q.dim(1), stream.tokens);
    detail::check_size("golden", "in.q.shape[2]", q.dim(2), k.dim(2));
    detail::check_size("golden", "in.v.shape[0]", v.dim(0), k.dim(0));
    detail::check_size("golden", "in.v.shape[1]", v.dim(1), stream.tokens);
    if (file.contains("in.position")) {
        stream.positions = file.array<std::int64_t>("in.position", 1).values;
        detail::check_size("golden", "in.position.shape[0]", stream.positions.size(), stream.tokens);
    }
    stream.q = std::move(q.values);
    stream.k = std::move(k.values);
    stream.v = std::move(v.values);
    return stream;
}

Pool read_pool(const GoldenFile& file) {
    if (!file.has("pool")) return Pool::none;
    return file.choice<Pool>("pool", {{"none", Pool::none}, {"max", Pool::max}, {"avg", Pool::avg}});
}

Tolerance score_tolerance(const GoldenFile& file, const std::string& name) {
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

/// Every head's row is the mean over the heads.
void share(std::vector<float>& scores, std::size_t heads) {
    const std::size_t n = scores.size() / heads;
    for (std::size_t j = 0; j < n; ++j) {
        double sum = 0;
        for (std::size_t h = 0; h < heads; ++h) sum += static_cast<double>(scores[h * n + j]);
        for (std::size_t h = 0; h < heads; ++h)
            scores[h * n + j] = static_cast<float>(sum / static_cast<double>(heads));
    }
}

/// One full causal prompt: the scores at its end, and what is kept of it.
template <Policy P>
void check_one_shot(GoldenFile& file, const Stream& stream, const P& policy, const std::string& name,
                    bool scored, bool shared = false) {
    const std::size_t heads = stream.shape.kv_heads, n = stream.tokens;
    const Budget budget{.tokens = file.count("budget")};
    for_each_driver(stream.shape, policy, budget, [&](auto& cache, const std::string& driver) {
        file.begin_run(driver);
        cache.begin_prompt();
        cache.hold(true);
        if (n > 0) feed(cache, stream, 0, n);
        if (scored) {
            std::vector<float> scores;
            for (std::size_t h = 0; h < heads; ++h)
                append(scores, sorted_by_position(cache.view(0, h), cache.scores(0, h)));
            if (shared) share(scores, heads);
            file.expect("out.score_" + name, {heads, n}, scores, score_tolerance(file, "out.score_" + name));
        }
        cache.hold(false);
        cache.end_prompt();
        file.expect("out.keep_" + name, {heads, std::min(n, budget.tokens)}, kept_indices(cache, stream));
    });
}

/// A prompt in calls of `chunk` tokens (0: one call), then one token per call.
/// @param unpooled  whether the policy's score is its state; else the state itself is compared.
template <Policy P>
void check_over_time(GoldenFile& file, const P& policy, bool unpooled, bool shared) {
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

        const std::size_t end = std::min(stream.tokens, budget.tokens);
        file.expect("out.position", {shape.kv_heads, end}, kept_positions(cache));
        std::vector<float> scores;
        for (std::size_t h = 0; h < shape.kv_heads; ++h) {
            const HeadView held = cache.view(0, h);
            std::vector<float> head(held.rows());
            for (std::size_t j = 0; j < head.size(); ++j)
                head[j] = cache.evictor().state(0, h).mass[j] / static_cast<float>(shape.group());
            if (unpooled) head = cache.scores(0, h);
            append(scores, sorted_by_position(held, head));
        }
        if (shared) share(scores, shape.kv_heads);
        file.expect("out.score", {shape.kv_heads, end}, scores, score_tolerance(file, "out.score"));
    });
}

}  // namespace

void check_scores(GoldenFile& file) {
    Stream stream = read_stream(file);
    const std::size_t recent = file.count("recent"), sinks = file.count("sinks", 0);
    check_one_shot(file, stream, H2O{.recent = recent, .sinks = sinks}, "h2o", true);
    check_one_shot(file, stream, Tova{.sinks = sinks}, "tova", true, true);
    check_one_shot(file, stream, KeyDiff{.sinks = sinks}, "keydiff", true);
    check_one_shot(file, stream, KeyNorm{.sinks = sinks}, "knorm", true);
    check_one_shot(file, stream, Vatp{.recent = recent, .sinks = sinks}, "vatp", true);
    check_one_shot(file, stream, Streaming{.sinks = file.count("sinks_streaming")}, "streaming", false);
    // Rows that could see a token are told by positions, so these must count the rows.
    stream.positions.clear();
    check_one_shot(file, stream, H2O{.recent = recent, .sinks = sinks, .by_queries = true}, "h2o_by_queries",
                   true);
}

void check_h2o(GoldenFile& file) {
    if (file.has("reduce")) file.require("reduce", "mean");
    const H2O policy{.recent = file.count("recent"),
                     .sinks = file.count("sinks", 0),
                     .window = file.count("window"),
                     .kernel = file.count("kernel", 1),
                     .pool = read_pool(file)};
    check_over_time(file, policy, policy.kernel == 1 || policy.pool == Pool::none, false);
}

void check_tova(GoldenFile& file) {
    auto scope = Tova::Share::layer;
    if (file.has("reduce"))
        scope = file.choice<Tova::Share>("reduce",
                                         {{"layer", Tova::Share::layer}, {"mean", Tova::Share::kv_head}});
    (void)file.choice<int>("window", {{"0", 0}, {"1", 1}});  // the last row counts, whatever a call brings
    const Tova policy{.share = scope,
                      .sinks = file.count("sinks", 0),
                      .recent = file.count("recent", 0),
                      .kernel = file.count("kernel", 1),
                      .pool = read_pool(file)};
    check_over_time(file, policy, policy.kernel == 1 || policy.pool == Pool::none,
                    scope == Tova::Share::layer);
}

void check_streaming(GoldenFile& file) {
    auto k = file.array<float>("in.k", 3);
    const std::size_t heads = k.dim(0), n = k.dim(1), dim = k.dim(2);
    const Stream stream{.shape = {.layers = 1, .q_heads = heads, .kv_heads = heads, .head_dim = dim},
                        .tokens = n,
                        .q = std::vector<float>(k.values.size()),
                        .k = k.values,
                        .v = k.values,
                        .positions = file.array<std::int64_t>("in.position", 1).values};
    detail::check_size("golden", "in.position.shape[0]", stream.positions.size(), n);
    const auto pairing = file.choice<Pairing>(
        "rope_convention", {{"half", Pairing::half_split}, {"interleaved", Pairing::interleaved}});
    const Rope frequencies = rope(dim, file.real("rope_base"), pairing);
    const Budget budget{.tokens = file.count("budget")};
    const std::size_t left = std::min(n, budget.tokens);
    for_each_driver(stream.shape, Streaming{.sinks = file.count("sinks")}, budget,
                    [&](auto& cache, const std::string& driver) {
                        file.begin_run(driver);
                        feed_prompt(cache, stream, 0, n, n);
                        file.expect("out.keep", {heads, left}, kept_indices(cache, stream));
                        std::vector<float> keys;
                        for (std::size_t h = 0; h < heads; ++h) {
                            const HeadView held = cache.view(0, h);
                            std::vector<float> rows = rows_by_position(held.k, held);
                            const std::vector<position_t> positions = positions_of(held);
                            for (std::size_t slot = 0; slot < positions.size(); ++slot)
                                rotate(frequencies, static_cast<position_t>(slot) - positions[slot],
                                       std::span(rows).subspan(slot * dim, dim));
                            append(keys, rows);
                        }
                        file.expect("out.k", {heads, left, dim}, keys);
                        std::vector<std::int64_t> slots(left);
                        for (std::size_t slot = 0; slot < left; ++slot)
                            slots[slot] = static_cast<std::int64_t>(slot);
                        file.expect("out.slot", {left}, slots);
                    });
}

}  // namespace kvcull::test::baselines
