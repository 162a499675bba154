// Layouts of method `snapkv`.

#include <algorithm>
#include <string>
#include <vector>

#include "kinds.hpp"
#include "kvcull/policies.hpp"
#include "streams.hpp"

namespace kvcull::test::snapkv {
namespace {

SnapKV read_policy(const GoldenFile& file) {
    SnapKV policy{
        .window = file.count("w"),
        .kernel = file.count("kernel"),
        .pool = file.choice<Pool>("pooling", {{"none", Pool::none}, {"max", Pool::max}, {"avg", Pool::avg}}),
        .gqa = file.choice<Group>("gqa", {{"mean", Group::mean}, {"max", Group::max}, {"sum", Group::sum}}),
        .sinks = file.count("sinks", 0),
        .decode_interval = file.count("interval", 0)};
    if (policy.pool == Pool::none) policy.kernel = 1;  // whatever a file says there has no meaning
    return policy;
}

CacheShape read_shape(const Array<float>& q, const Array<float>& k, const Array<float>& v) {
    detail::check_size("golden", "in.q.shape[2]", q.dim(2), k.dim(2));
    detail::check_size("golden", "in.v.shape[0]", v.dim(0), k.dim(0));
    detail::check_size("golden", "in.v.shape[1]", v.dim(1), k.dim(1));
    return {
        .layers = 1, .q_heads = q.dim(0), .kv_heads = k.dim(0), .head_dim = k.dim(2), .value_dim = v.dim(2)};
}

/// Feeds a prompt in calls that end at the given tokens. Nothing is evicted before `end_prompt`.
template <class Cache>
void feed_calls(Cache& cache, const Stream& stream, const std::vector<std::size_t>& ends) {
    std::size_t first = 0;
    for (const std::size_t end : ends) {
        if (end > first) feed(cache, stream, first, end - first);
        first = std::max(first, end);
    }
}

/// The votes of the window before they are pooled.
template <class Cache>
std::vector<float> votes_of(const Cache& cache, const SnapKV& policy, std::size_t head) {
    const HeadView held = cache.view(0, head);
    std::vector<float> votes(held.rows());
    with_head_step(cache, head,
                   [&](const HeadStep& step) { policy.votes(cache.evictor().state(0, head), step, votes); });
    return sorted_by_position(held, votes);
}

template <class Cache>
void compare_evict(GoldenFile& file, Cache& cache, const SnapKV& policy, const Stream& stream,
                   std::size_t candidates, std::size_t budget, const std::vector<std::size_t>& ends) {
    const CacheShape& shape = stream.shape;
    const std::size_t heads = shape.kv_heads, left = std::min(stream.tokens, budget);
    cache.begin_prompt();
    cache.hold(true);
    feed_calls(cache, stream, ends);
    std::vector<float> raw, scores, k, v;
    std::vector<std::int64_t> keep;
    for (std::size_t h = 0; h < heads; ++h) {
        const auto first = [&](std::vector<float> numbers) {
            numbers.resize(candidates);
            return numbers;
        };
        append(raw, first(votes_of(cache, policy, h)));
        append(scores, first(sorted_by_position(cache.view(0, h), cache.scores(0, h))));
    }
    cache.hold(false);
    cache.end_prompt();
    for (std::size_t h = 0; h < heads; ++h) {
        const HeadView held = cache.view(0, h);
        append(keep, positions_of(held));
        append(k, rows_by_position(held.k, held));
        append(v, rows_by_position(held.v, held));
    }
    file.expect("out.raw", {heads, candidates}, raw);
    file.expect("out.score", {heads, candidates}, scores);
    file.expect("out.keep", {heads, left}, keep);
    file.expect_bits("out.k", {heads, left, shape.head_dim}, k);
    file.expect_bits("out.v", {heads, left, shape.values()}, v);
}

}  // namespace

void check_evict(GoldenFile& file) {
    const auto q = file.array<float>("in.q_window", 3), k = file.array<float>("in.k", 3),
               v = file.array<float>("in.v", 3);
    const SnapKV policy = read_policy(file);
    const CacheShape shape = read_shape(q, k, v);
    const std::size_t n = k.dim(1), rows = q.dim(1), dim = shape.head_dim, budget = file.count("B");
    detail::check_size("golden", "in.q_window.shape[1]", rows, std::min(policy.window, n));
    // Only the window's queries are known; those before it have no say.
    Stream stream{.shape = shape,
                  .tokens = n,
                  .q = std::vector<float>(shape.q_heads * n * dim),
                  .k = k.values,
                  .v = v.values};
    for (std::size_t h = 0; h < shape.q_heads; ++h)
        std::copy_n(q.values.data() + h * rows * dim, rows * dim, stream.q.data() + (h * n + n - rows) * dim);

    std::vector<std::size_t> small;  // calls that split the window
    for (std::size_t end = 3; end < n; end += 3) small.push_back(end);
    small.push_back(n);
    const std::pair<std::string, std::vector<std::size_t>> ways[] = {
        {"one call", {n}}, {"window apart", {n - rows, n}}, {"calls of 3", small}};
    for (const auto& way : ways)
        for_each_driver(shape, policy, {.tokens = budget}, [&](auto& cache, const std::string& driver) {
            file.begin_run(driver + ", " + way.first);
            compare_evict(file, cache, policy, stream, n - rows, budget, way.second);
        });
}

void check_decode(GoldenFile& file) {
    const auto q = file.array<float>("in.q", 3), k = file.array<float>("in.k", 3),
               v = file.array<float>("in.v", 3);
    const SnapKV policy = read_policy(file);
    const CacheShape shape = read_shape(q, k, v);
    const std::size_t prompt = file.count("n0"), budget = file.count("B");
    const Stream stream{.shape = shape, .tokens = k.dim(1), .q = q.values, .k = k.values, .v = v.values};
    detail::check_size("golden", "in.q.shape[1]", q.dim(1), stream.tokens);
    detail::check<error::format_error>(prompt <= stream.tokens, "golden", "n0", prompt,
                                       detail::text("at most the ", stream.tokens, " tokens of in.k"));
    for (const std::size_t chunk : {std::max<std::size_t>(prompt, 1), std::size_t{5}})
        for_each_driver(shape, policy, {.tokens = budget}, [&](auto& cache, const std::string& driver) {
            file.begin_run(driver + ", prompt in calls of " + std::to_string(chunk));
            std::vector<std::int64_t> positions;
            std::size_t evictions = 0, rows = 0;
            const auto record = [&](std::size_t added) {
                rows += added;
                if (cache.rows(0, 0) == rows) return;
                rows = cache.rows(0, 0);
                ++evictions;
                for (std::size_t h = 0; h < shape.kv_heads; ++h)
                    append(positions, positions_of(cache.view(0, h)));
            };
            feed_prompt(cache, stream, 0, prompt, chunk, driver.starts_with("KVCache"));
            record(prompt);
            for (std::size_t token = prompt; token < stream.tokens; ++token) {
                feed(cache, stream, token, 1);
                record(1);
            }
            file.expect("out.positions", {evictions, shape.kv_heads, budget}, positions);
        });
}

}  // namespace kvcull::test::snapkv
