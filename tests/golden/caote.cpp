// Layouts of method `caote`.

#include <algorithm>
#include <string>
#include <vector>

#include "kinds.hpp"
#include "kvcull/policies/caote.hpp"
#include "streams.hpp"

namespace kvcull::test::caote {
namespace {

using Gqa = Caote<>::Gqa;

/// Calls `use(kernels)` for every instruction set of this machine.
template <class Use>
void for_each_isa(GoldenFile& file, Use&& use) {
    for (const simd::Isa isa : simd::all_isas) {
        if (!simd::available(isa)) continue;
        file.begin_run(std::string(simd::name_of(isa)));
        use(simd::kernels_for(isa));
    }
}

Caote<> read_policy(const GoldenFile& file) {
    return {.base = {.base = read_named<PerHeadAttention::Rows>(file, "base"),
                     .recent = file.count("recent", 0),
                     .sinks = file.count("sinks", 0),
                     .window = file.count("window", 0),
                     .kernel = file.count("kernel", 1),
                     .pool = read_pool(file)},
            .fast = file.count("fast", 0) != 0,
            .gqa = read_named<Gqa>(file, "gqa"),
            .order = read_named<Caote<>::Order>(file, "order")};
}

/// Notes the scores of every decision.
struct Recording : Caote<> {
    std::vector<std::vector<float>>* heads = nullptr;

    void score(const State& state, const HeadStep& step, std::span<float> out) const {
        Caote::score(state, step, out);
        (*heads)[step.head] = sorted_by_position(step.cached, out);
    }
};

/// Base scores of one head, each query head's divided by their sum; [group, n] by position.
template <class Cache>
std::vector<float> distribution_of(const Cache& cache, const PerHeadAttention& base, std::size_t head) {
    const HeadView held = cache.view(0, head);
    const std::size_t n = held.rows(), group = cache.shape().group();
    std::vector<float> numbers(group * n), all;
    const MatrixView<float> shares(numbers.data(), group, n);
    with_head_step(cache, head, [&](const HeadStep& step) {
        detail::normalise(simd::kernels(), "golden",
                          base.distribution(cache.evictor().state(0, head).base, step, shares), shares);
    });
    for (std::size_t g = 0; g < group; ++g)
        append(all, sorted_by_position(held, std::span(numbers).subspan(g * n, n)));
    return all;
}

/// A prompt of which only the last `rows` tokens are asked, in a call of their own.
template <class Cache>
void feed_asked(Cache& cache, const Stream& stream, std::size_t rows) {
    cache.begin_prompt();
    cache.hold(true);
    if (stream.tokens > rows) feed(cache, stream, 0, stream.tokens - rows);
    feed(cache, stream, stream.tokens - rows, rows);
    cache.hold(false);
}

}  // namespace

void check_weights(GoldenFile& file) {
    const auto base = file.array<float>("in.base", 2), v = file.array<float>("in.v", 3);
    const std::size_t heads = base.dim(0), n = base.dim(1), dim = v.dim(2);
    detail::check_size("golden", "in.v.shape[0]", v.dim(0), heads);
    detail::check_size("golden", "in.v.shape[1]", v.dim(1), n);
    const Tolerance every{.relative = 1e-4, .absolute = 0};
    for_each_isa(file, [&](const simd::Kernels& kernels) {
        std::vector<float> weights = base.values, exact(heads * n), fast(heads * n),
                           scratch(removal_scratch(1, dim));
        const MatrixView<float> shares(weights.data(), heads, n);
        detail::normalise(kernels, "golden", shares, shares);
        file.expect("out.distribution", {heads, n}, weights, every);
        const std::vector<float> uniform(n, 1.0F / static_cast<float>(n));
        for (std::size_t h = 0; h < heads; ++h) {
            const RowsView values(v.values.data() + h * n * dim, n, dim, dim);
            const auto errors = [&](const float* mean_weights, bool plain, std::span<float> out) {
                std::vector<float> one(weights.begin() + static_cast<std::ptrdiff_t>(h * n),
                                       weights.begin() + static_cast<std::ptrdiff_t>((h + 1) * n)),
                    point(dim);
                detail::weighted_mean(kernels, {mean_weights, 1, n}, values, {point.data(), 1, dim});
                const MatrixView<float> row(one.data(), 1, n);
                removal_errors(kernels, "golden", row, row, values,
                               {.points = {point.data(), 1, dim}, .plain = plain}, Changes::norm, out,
                               scratch.data());
            };
            errors(weights.data() + h * n, false, std::span(exact).subspan(h * n, n));
            errors(uniform.data(), true, std::span(fast).subspan(h * n, n));
        }
        file.expect("out.caote", {heads, n}, exact, every);
        file.expect("out.fast", {heads, n}, fast, every);
        for (std::size_t set = 0; file.contains("in.set" + std::to_string(set)); ++set) {
            std::vector<index_t> removed;
            for (const std::int64_t row : file.array<std::int64_t>("in.set" + std::to_string(set), 1).values)
                removed.push_back(static_cast<index_t>(row));
            std::vector<float> error;
            for (std::size_t h = 0; h < heads; ++h)
                error.push_back(
                    static_cast<float>(set_error(std::span(weights).subspan(h * n, n),
                                                 {v.values.data() + h * n * dim, n, dim, dim}, removed)));
            const std::string name = "out.set_error" + std::to_string(set);
            file.expect(name, {heads}, error, score_tolerance(file, name));
        }
    });
}

void check_scores(GoldenFile& file) {
    const Stream stream = read_stream(file);
    const CacheShape& shape = stream.shape;
    const std::size_t rows = file.array<float>("in.q", 3).dim(1), n = stream.tokens;
    const Budget budget{.tokens = file.count("budget")};
    for (const std::string base_name : {"tova", "h2o", "snapkv"}) {
        Caote<> policy{.base = {.recent = file.count("recent"), .sinks = file.count("sinks", 0)}};
        policy.base.base = detail::parse_value<PerHeadAttention::Rows>("golden", "base", base_name);
        if (base_name == "h2o") policy.base.window = rows;  // the rows before them are unknown
        if (base_name == "snapkv") {
            policy.base.window = file.count("window");
            policy.base.kernel = file.count("kernel");
            policy.base.pool = read_pool(file);
        }
        for (const bool fast : {false, true}) {
            for (const std::string gqa : {"rss", "mean", "pre"}) {
                const std::string name = (fast ? "fast_" : "caote_") + base_name + "_" + gqa;
                policy.fast = fast;
                policy.gqa = detail::parse_value<Gqa>("golden", "gqa", gqa);
                for_each_driver(shape, policy, budget, [&](auto& cache, const std::string& driver) {
                    file.begin_run(driver);
                    feed_asked(cache, stream, rows);
                    std::vector<float> distributions;
                    for (std::size_t h = 0; h < shape.kv_heads; ++h)
                        append(distributions, distribution_of(cache, policy.base, h));
                    file.expect("out.base_" + base_name, {shape.q_heads, n}, distributions);
                    file.expect("out.score_" + name, {shape.kv_heads, n}, all_scores(cache),
                                score_tolerance(file, "out.score_" + name));
                    cache.end_prompt();
                    file.expect("out.keep_" + name, {shape.kv_heads, std::min(n, budget.tokens)},
                                kept_indices(cache, stream));
                });
            }
        }
    }
}

void check_greedy(GoldenFile& file) {
    const Stream stream = read_stream(file);
    const CacheShape& shape = stream.shape;
    const std::size_t rows = file.array<float>("in.q", 3).dim(1), n = stream.tokens,
                      count = file.count("count");
    detail::check<error::format_error>(count < n, "golden", "count", count, detail::text("below n = ", n));
    Caote<> policy = read_policy(file);
    policy.base.window = rows;
    for_each_driver(shape, policy, {.tokens = n - count}, [&](auto& cache, const std::string& driver) {
        file.begin_run(driver);
        feed_asked(cache, stream, rows);
        std::vector<std::int64_t> victims, expected_left;
        std::vector<float> errors;
        const std::vector<std::uint8_t> fixed(n, 0);
        for (std::size_t h = 0; h < shape.kv_heads; ++h) {
            std::vector<index_t> removed;
            with_head_step(cache, h, [&](const HeadStep& step) {
                policy.remove(cache.evictor().state(0, h), step, fixed, count, removed);
            });
            const std::vector<float> weights = distribution_of(cache, policy.base, h);
            for (std::size_t g = 0; g < shape.group(); ++g)
                errors.push_back(static_cast<float>(
                    set_error(std::span(weights).subspan(g * n, n), cache.view(0, h).v, removed)));
            std::vector<std::uint8_t> gone(n, 0);
            for (const index_t row : removed) {
                victims.push_back(row);
                gone[static_cast<std::size_t>(row)] = 1;
            }
            for (std::size_t j = 0; j < n; ++j)
                if (gone[j] == 0) expected_left.push_back(static_cast<std::int64_t>(j));
        }
        file.expect("out.victims", {shape.kv_heads, count}, victims);
        file.expect("out.set_error", {shape.q_heads}, errors, score_tolerance(file, "out.set_error"));
        cache.end_prompt();
        if (kept_indices(cache, stream) != expected_left)
            throw Difference("what the cache keeps is not what greedy removal leaves (" + driver + ")");
    });
}

void check_decode(GoldenFile& file) {
    Recording policy{read_policy(file)};
    std::vector<std::vector<float>> heads(file.array<float>("in.k", 3).dim(0));
    policy.heads = &heads;
    check_over_time(file, policy, [&](auto& cache) {
        std::vector<float> scores;
        for (const std::vector<float>& head : heads) append(scores, head);
        file.expect("out.last_score", {cache.shape().kv_heads, file.count("budget") + 1}, scores,
                    score_tolerance(file, "out.last_score"));
    });
}

}  // namespace kvcull::test::caote
