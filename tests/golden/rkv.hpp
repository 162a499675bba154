#pragma once
/// What the layouts of R-KV and of SkipKV share.

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "kvcull/policies/rkv.hpp"
#include "streams.hpp"

namespace kvcull::test::rkv {

inline RKV read_policy(const GoldenFile& file) {
    return {.window = file.count("window"),
            .interval = file.count("interval", 128),
            .kernel = file.count("kernel"),
            .sigma = static_cast<float>(file.real("sigma")),
            .key_threshold = static_cast<float>(file.real("key_threshold")),
            .retain = read_named<Retain>(file, "retain")};
}

inline constexpr Tolerance tolerance{.relative = 1e-4, .absolute = 1e-6};

/// One decision from the last m queries [Hq, m, d], the keys [Hkv, n, d] and positions [Hkv, n].
/// @param score  `score(state, step, out)`
template <class Score>
void compare_eviction(GoldenFile& file, const RKV& policy, const std::vector<position_t>& positions,
                      const Score& score) {
    const auto q = file.array<float>("in.q", 3), k = file.array<float>("in.k", 3);
    const std::size_t rows = q.dim(1), heads = k.dim(0), n = k.dim(1), dim = k.dim(2),
                      budget = file.count("budget");
    detail::check_size("golden", "in.q.shape[2]", q.dim(2), dim);
    detail::check<error::format_error>(rows >= 1 && rows <= policy.window && rows <= n, "golden",
                                       "in.q.shape[1]", rows, "1 to the window");
    detail::check<error::format_error>(heads > 0 && q.dim(0) % heads == 0, "golden", "in.q.shape[0]",
                                       q.dim(0), "a multiple of in.k.shape[0]");
    detail::check_size("golden", "positions", positions.size(), heads * n);
    policy.check(budget);
    const std::size_t group = q.dim(0) / heads, candidates = n - std::min(policy.window, n);
    const CacheShape shape{.layers = 1, .q_heads = q.dim(0), .kv_heads = heads, .head_dim = dim};

    for (const simd::Isa isa : simd::all_isas) {
        if (!simd::available(isa)) continue;
        file.begin_run(std::string(simd::name_of(isa)));
        std::vector<float> importance, redundancy, scores;
        std::vector<std::int64_t> keep;
        for (std::size_t h = 0; h < heads; ++h) {
            Scratch<float> workspace;
            const RowsView keys(k.values.data() + h * n * dim, n, dim, dim);
            const std::span<const position_t> at(positions.data() + h * n, n);
            const HeadStep step{.head = h,
                                .group = group,
                                .next_position = at.back() + 1,
                                .added = rows,
                                .cached = {keys, keys, at},
                                .scale = shape.logit_scale(),
                                .tokens = rows,
                                .q = {q.values.data() + h * group * rows * dim, group * rows, dim},
                                .kernels = &simd::kernels_for(isa),
                                .workspace = &workspace};
            RKV::State state;
            policy.observe(state, step);
            std::vector<float> some(candidates), all(n), scratch(RKV::redundancy_memory(n, dim));
            (void)policy.importance(state, step, some);
            append(importance, some);
            policy.redundancy(state, step, all, scratch.data());
            append(redundancy, all);
            score(state, step, all);
            scores.insert(scores.end(), all.begin(), all.begin() + static_cast<std::ptrdiff_t>(candidates));
            std::vector<index_t> kept;
            Selector().head({all, at, budget, policy.protect(budget)}, {}, kept);
            keep.insert(keep.end(), kept.begin(), kept.end());
        }
        file.expect("out.importance", {heads, candidates}, importance, tolerance);
        file.expect("out.redundancy", {heads, n}, redundancy, tolerance);
        file.expect("out.score", {heads, candidates}, scores, tolerance);
        file.expect("out.keep", {heads, std::min(n, budget)}, keep);
    }
}

/// in.q [L, Hq, T, d], in.k [L, Hkv, T, d]; values do not matter.
inline Stream read_layers(const GoldenFile& file) {
    auto q = file.array<float>("in.q", 4), k = file.array<float>("in.k", 4);
    for (const std::size_t axis : {0U, 2U, 3U})
        detail::check_size("golden", "in.q.shape[" + std::to_string(axis) + "]", q.dim(axis), k.dim(axis));
    return {.shape = {.layers = k.dim(0), .q_heads = q.dim(1), .kv_heads = k.dim(1), .head_dim = k.dim(3)},
            .tokens = k.dim(2),
            .q = std::move(q.values),
            .k = k.values,
            .v = k.values};
}

/// Feeds a prompt, in one call and in chunks, then a token per call; looks at what is left after each.
/// @param feed_call  `feed_call(cache, first, count)` @param at_end  `at_end(cache)`
template <Policy P, class Feed, class AtEnd>
void compare_trace(GoldenFile& file, const P& policy, const Stream& stream, const Feed& feed_call,
                   const AtEnd& at_end) {
    const CacheShape& shape = stream.shape;
    const std::size_t prompt = file.count("prompt"), budget = file.count("budget");
    detail::check<error::format_error>(prompt <= stream.tokens, "golden", "prompt", prompt,
                                       detail::text("at most the ", stream.tokens, " tokens of in.k"));
    for (const std::size_t chunk : {std::max<std::size_t>(prompt, 1), std::size_t{5}})
        for_each_driver(shape, policy, {.tokens = budget}, [&](auto& cache, const std::string& driver) {
            file.begin_run(driver + ", prompt in calls of " + std::to_string(chunk));
            std::vector<std::int64_t> seen, positions;
            std::size_t rows = 0;
            const auto look = [&](std::size_t tokens, std::size_t added) {
                rows += added;
                if (cache.evictor().live().rows[0] == rows) return;
                rows = cache.evictor().live().rows[0];
                seen.push_back(static_cast<std::int64_t>(tokens));
                for (std::size_t layer = 0; layer < shape.layers; ++layer)
                    for (std::size_t h = 0; h < shape.kv_heads; ++h)
                        append(positions, positions_of(cache.view(layer, h)));
            };
            const bool announced = driver.starts_with("KVCache");
            cache.begin_prompt(announced ? std::optional(prompt) : std::nullopt);
            for (std::size_t at = 0; at < prompt; at += chunk)
                feed_call(cache, at, std::min(chunk, prompt - at));
            cache.end_prompt();
            look(prompt, prompt);
            for (std::size_t token = prompt; token < stream.tokens; ++token) {
                feed_call(cache, token, 1);
                look(token + 1, 1);
            }
            file.expect("out.evict_seen", {seen.size()}, seen);
            file.expect("out.position", {seen.size(), shape.layers, shape.kv_heads, budget}, positions);
            at_end(cache);
        });
}

}  // namespace kvcull::test::rkv
