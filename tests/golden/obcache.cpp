// Layouts of method `obcache`.

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "kinds.hpp"
#include "kvcull/policies/obcache.hpp"
#include "streams.hpp"

namespace kvcull::test::obcache {
namespace {

OBCache read_policy(const GoldenFile& file) {
    if (file.has("gqa")) file.require("gqa", "sum");
    return {.recent = file.count("recent"),
            .sinks = file.count("sinks", 0),
            .window = file.count("window"),
            .kernel = file.count("kernel", 1),
            .pool = read_pool(file),
            .decode_evict = file.count("decode_evict", 1) != 0};
}

/// A policy that notes the logits and outputs it is shown, [group, tokens, ..] per head.
struct Listening : OBCache {
    struct Seen {
        std::vector<float> logits, output;
    };
    std::vector<Seen>* heads = nullptr;

    void observe(State& state, const HeadStep& step) const {
        OBCache::observe(state, step);
        Seen& seen = (*heads)[step.head];
        const auto note = [&](std::vector<float>& all, MatrixView<const float> rows) {
            all.clear();
            for (std::size_t r = 0; r < rows.rows; ++r) all.insert(all.end(), rows[r].begin(), rows[r].end());
        };
        note(seen.logits, step.logits);
        note(seen.output, step.output);
    }
};

/// Scores, before and after pooling, of the rows of the last call; then what is kept.
template <class Cache>
void compare_scores(GoldenFile& file, Cache& cache, const OBCache& policy, const Stream& stream,
                    std::size_t rows, const std::string& name) {
    const std::size_t heads = stream.shape.kv_heads, n = stream.tokens;
    cache.begin_prompt();
    cache.hold(true);
    if (n > rows) feed(cache, stream, 0, n - rows);
    feed(cache, stream, n - rows, rows);
    OBCache plain = policy;
    plain.pool = Pool::none;
    std::vector<float> unpooled;
    for (std::size_t h = 0; h < heads; ++h) {
        const HeadView held = cache.view(0, h);
        std::vector<float> head(n);
        with_head_step(cache, h,
                       [&](const HeadStep& step) { plain.score(cache.evictor().state(0, h), step, head); });
        append(unpooled, sorted_by_position(held, head));
    }
    file.expect("out.score_" + name, {heads, n}, unpooled, score_tolerance(file, "out.score_" + name));
    if (policy.pool != Pool::none)
        file.expect("out.pooled_" + name, {heads, n}, all_scores(cache),
                    score_tolerance(file, "out.pooled_" + name));
    cache.hold(false);
    cache.end_prompt();
    file.expect("out.keep_" + name, {heads, std::min(n, file.count("budget"))}, kept_indices(cache, stream));
}

}  // namespace

void check_scores(GoldenFile& file) {
    const Stream stream = read_stream(file);
    const CacheShape& shape = stream.shape;
    const std::size_t rows = file.array<float>("in.q", 3).dim(1), n = stream.tokens;
    const Budget budget{.tokens = file.count("budget")};
    OBCache policy = read_policy(file);
    const std::size_t window = *policy.window == 0 ? rows : *policy.window;
    policy.window = window;
    const auto names = names_of(OBCache::Score{});
    for (std::size_t i = 0; i < names.size(); ++i) {
        const std::string name(names[i]);
        if (!file.contains("out.score_" + name)) continue;
        policy.kind = static_cast<OBCache::Score>(i);
        for (const auto norms : {OBCache::Norms::kept, OBCache::Norms::recomputed}) {
            policy.norms = norms;
            for_each_driver(shape, policy, budget, [&](auto& cache, const std::string& driver) {
                file.begin_run(driver);
                compare_scores(file, cache, policy, stream, rows, name);
            });
        }
    }

    policy.kind = OBCache::Score::key;
    std::vector<Listening::Seen> heads(shape.kv_heads);
    Listening listening{policy};
    listening.heads = &heads;
    for_each_driver(shape, listening, budget, [&](auto& cache, const std::string& driver) {
        file.begin_run(driver);
        cache.begin_prompt();
        cache.hold(true);
        if (n > rows) feed(cache, stream, 0, n - rows);
        feed(cache, stream, n - rows, rows);
        std::vector<float> logits, output;
        for (const Listening::Seen& seen : heads) {
            append(logits, seen.logits);
            append(output, seen.output);
        }
        file.expect("out.logits", {shape.q_heads, window, n}, logits);
        file.expect("out.output", {shape.q_heads, window, shape.values()}, output);
    });
}

void check_decode(GoldenFile& file) {
    OBCache policy = read_policy(file);
    policy.kind = read_named<OBCache::Score>(file, "score");
    policy.base = read_named<OBCache::Base>(file, "base");
    if (policy.base == OBCache::Base::tova) policy.window = 1;
    using Score = OBCache::Score;
    const bool reads_values =
        policy.kind == Score::key || policy.kind == Score::joint || policy.kind == Score::separate;
    for (const bool lagged : {false, true}) {
        if (lagged && !reads_values) continue;
        policy.lagged = lagged;
        check_over_time(
            file, policy,
            [&](auto& cache) {
                const std::size_t heads = cache.shape().kv_heads;
                OBCache plain = policy;
                plain.pool = Pool::none;
                std::vector<float> scores;
                std::size_t compared = 0;
                for (std::size_t h = 0; h < heads; ++h) {
                    std::vector<float> head(cache.rows(0, h));
                    with_head_step(cache, h, [&](const HeadStep& step) {
                        plain.score(cache.evictor().state(0, h), step, head);
                    });
                    head = sorted_by_position(cache.view(0, h), head);
                    compared = std::min(head.size(), file.count("budget"));
                    head.resize(compared);
                    append(scores, head);
                }
                file.expect("out.score", {heads, compared}, scores, score_tolerance(file, "out.score"));
            },
            !policy.decode_evict);
    }
}

}  // namespace kvcull::test::obcache
