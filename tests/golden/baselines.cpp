// Layouts of method `baselines`: H2O, TOVA, KeyDiff, key norm, VATP, StreamingLLM.

#include <algorithm>
#include <string>
#include <vector>

#include "kinds.hpp"
#include "kvcull/attention/rope.hpp"
#include "kvcull/policies.hpp"
#include "streams.hpp"

namespace kvcull::test::baselines {
namespace {

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
            std::vector<float> scores = all_scores(cache);
            if (shared) share(scores, heads);
            file.expect("out.score_" + name, {heads, n}, scores, score_tolerance(file, "out.score_" + name));
        }
        cache.hold(false);
        cache.end_prompt();
        file.expect("out.keep_" + name, {heads, std::min(n, budget.tokens)}, kept_indices(cache, stream));
    });
}

/// @param unpooled  whether the policy's score is its state; else the state itself is compared.
template <Policy P>
void check_received(GoldenFile& file, const P& policy, bool unpooled, bool shared) {
    check_over_time(file, policy, [&](auto& cache) {
        const CacheShape& shape = cache.shape();
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
        const std::size_t end = scores.size() / shape.kv_heads;
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
    check_received(file, policy, policy.kernel == 1 || policy.pool == Pool::none, false);
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
    check_received(file, policy, policy.kernel == 1 || policy.pool == Pool::none,
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
    auto pairing = Pairing::half_split;
    if (file.has("rope_convention"))
        pairing = file.choice<Pairing>(
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
