// Layouts of method `budgets`.

#include <algorithm>
#include <string>
#include <vector>

#include "kinds.hpp"
#include "kvcull/attention/attend.hpp"
#include "kvcull/policies.hpp"
#include "kvcull/select/head_rules.hpp"
#include "kvcull/select/layer_rules.hpp"
#include "streams.hpp"

namespace kvcull::test::budgets {
namespace {

/// Scores that the file gives, per head and position; the window has none and stays.
struct Given {
    static constexpr std::string_view name = "given";
    using State = NoState;

    const Array<float>* score_of = nullptr;  // [Hkv, c]
    std::size_t window = 0;

    static constexpr auto fields() { return std::tuple{}; }
    static constexpr Needs needs(Phase /*phase*/) { return {}; }
    [[nodiscard]] Protected protect(std::size_t /*budget*/) const { return {0, window}; }
    [[nodiscard]] static bool due(const Moment& moment) {
        return moment.prompt_end && moment.rows > moment.budget;
    }
    static void observe(State& /*state*/, const HeadStep& /*step*/) {}
    void score(const State& /*state*/, const HeadStep& step, std::span<float> out) const {
        const std::size_t c = score_of->dim(1);
        for (std::size_t j = 0; j < out.size(); ++j) {
            const auto token = static_cast<std::size_t>(step.cached.position[j]);
            out[j] = token < c ? score_of->values[step.head * c + token] : 0.0F;
        }
    }
};

/// Rows [heads, n, d] of the file, or of one zero each.
Array<float> rows_or_zeros(const GoldenFile& file, const std::string& name, std::size_t heads,
                           std::size_t n) {
    if (file.contains(name)) return file.array<float>(name, 3);
    return {{heads, n, 1}, std::vector<float>(heads * n)};
}

/// What the file has of a prompt of n tokens. Queries before the window's are zero and have no say.
Stream read_prompt(const GoldenFile& file, std::size_t kv_heads, std::size_t n) {
    auto k = rows_or_zeros(file, "in.k", kv_heads, n), v = rows_or_zeros(file, "in.v", kv_heads, n);
    const Array<float> q = rows_or_zeros(file, "in.q", kv_heads, 0);
    for (const Array<float>* one : {&k, &v}) {
        detail::check_size("golden", "in.k or in.v.shape[0]", one->dim(0), kv_heads);
        detail::check_size("golden", "in.k or in.v.shape[1]", one->dim(1), n);
    }
    Stream stream{.shape = {.layers = 1,
                            .q_heads = q.dim(0),
                            .kv_heads = kv_heads,
                            .head_dim = k.dim(2),
                            .value_dim = v.dim(2)},
                  .tokens = n,
                  .q = std::vector<float>(q.dim(0) * n * k.dim(2)),
                  .k = {},
                  .v = {}};
    const std::size_t rows = q.dim(1), dim = k.dim(2);
    if (rows > 0) detail::check_size("golden", "in.q.shape[2]", q.dim(2), dim);
    detail::check<error::format_error>(rows <= n, "golden", "in.q.shape[1]", rows, n);
    for (std::size_t h = 0; h < q.dim(0); ++h)
        std::copy_n(q.values.data() + h * rows * dim, rows * dim, stream.q.data() + (h * n + n - rows) * dim);
    stream.k = std::move(k.values);
    stream.v = std::move(v.values);
    return stream;
}

/// Attention of one more token over what every head holds: [q_heads, value_dim].
template <class Cache>
std::vector<float> next_output(const Cache& cache, const Array<float>& q_next) {
    const CacheShape& shape = cache.shape();
    std::vector<float> out(shape.q_heads * shape.values());
    for (std::size_t h = 0; h < shape.q_heads; ++h) {
        const HeadView held = cache.view(0, h / shape.group());
        std::vector<float> attention(held.rows()),
            q(q_next.values.begin() + static_cast<std::ptrdiff_t>(h * shape.head_dim),
              q_next.values.begin() + static_cast<std::ptrdiff_t>((h + 1) * shape.head_dim));
        float lse = 0;
        const Visible all{0, 0, held.rows()};
        attend(simd::kernels(), {q.data(), 1, q.size()}, held.k, held.v, std::span(&all, 1),
               shape.logit_scale(),
               {.attention = {attention.data(), 1, held.rows()},
                .lse = {&lse, 1},
                .output = {out.data() + h * shape.values(), 1, shape.values()}});
    }
    return out;
}

/// The scores come from SnapKV over the window's queries.
void check_scores(GoldenFile& file, const Stream& stream, const Array<float>& score, std::size_t budget,
                  std::size_t window) {
    SnapKV policy{
        .window = window,
        .kernel = file.count("kernel"),
        .pool = file.choice<Pool>("pooling", {{"none", Pool::none}, {"max", Pool::max}, {"avg", Pool::avg}}),
        .gqa = file.choice<Group>("gqa", {{"mean", Group::mean}, {"max", Group::max}, {"sum", Group::sum}})};
    if (policy.pool == Pool::none) policy.kernel = 1;  // whatever a file says there has no meaning
    for_each_driver(stream.shape, policy, {.tokens = budget}, [&](auto& cache, const std::string& driver) {
        file.begin_run("SnapKV, " + driver);
        cache.begin_prompt();
        cache.hold(true);
        feed(cache, stream, 0, stream.tokens);
        std::vector<float> scores;
        for (std::size_t h = 0; h < stream.shape.kv_heads; ++h) {
            auto one = sorted_by_position(cache.view(0, h), cache.scores(0, h));
            one.resize(score.dim(1));
            append(scores, one);
        }
        file.expect("in.score", score.shape, scores, {.relative = 1e-4, .absolute = 1e-6});
    });
}

template <class Cache>
void compare_ragged(GoldenFile& file, const Cache& cache, std::size_t window, const std::string& suffix) {
    const std::size_t heads = cache.shape().kv_heads;
    std::vector<std::int64_t> capacity, keep, cu_len{0};
    for (std::size_t h = 0; h < heads; ++h) {
        append(keep, positions_of(cache.view(0, h)));
        cu_len.push_back(static_cast<std::int64_t>(keep.size()));
        capacity.push_back(static_cast<std::int64_t>(cache.rows(0, h) - std::min(cache.rows(0, h), window)));
    }
    file.expect("out.capacity" + suffix, {heads}, capacity);
    file.expect("out.keep" + suffix, {keep.size()}, keep);
    file.expect("out.cu_len" + suffix, {heads + 1}, cu_len);
}

}  // namespace

void check_pyramid(GoldenFile& file) {
    const auto cases = file.array<std::int64_t>("in.cases", 2);
    detail::check_size("golden", "in.cases.shape[1]", cases.dim(1), std::size_t{5});
    std::size_t most = 0;
    const auto number = [&](std::size_t row, std::size_t column) {
        return static_cast<std::size_t>(cases.values[row * 5 + column]);
    };
    for (std::size_t i = 0; i < cases.dim(0); ++i) most = std::max(most, number(i, 0));
    for (const Rounding rounding : {Rounding::exact, Rounding::authors}) {
        std::vector<std::int64_t> all(cases.dim(0) * most, -1);
        for (std::size_t i = 0; i < cases.dim(0); ++i) {
            const std::size_t n = number(i, 3);
            std::vector<std::size_t> sizes(number(i, 0));
            Pyramid{.beta = number(i, 4), .rounding = rounding}.layer_sizes(number(i, 1), n,
                                                                            {0, number(i, 2)}, sizes);
            for (std::size_t l = 0; l < sizes.size(); ++l)
                all[i * most + l] = static_cast<std::int64_t>(std::min(n, sizes[l]));
        }
        file.expect(rounding == Rounding::exact ? "out.size" : "out.size_authors", {cases.dim(0), most}, all);
    }
}

void check_ada(GoldenFile& file) {
    const auto score = file.array<float>("in.score", 2);
    const std::size_t heads = score.dim(0), c = score.dim(1), w = file.count("w"), budget = file.count("B");
    const Stream stream = read_prompt(file, heads, c + w);
    AdaKV<> rule{.mode = file.choice<AdaMode>(
                     "mode", {{"interpolate", AdaMode::interpolate}, {"floor_fill", AdaMode::floor_fill}}),
                 .alpha_permille = file.count("permille"),
                 .normalize = file.choice<bool>("normalize", {{"0", false}, {"1", true}})};
    if (file.contains("in.q")) check_scores(file, stream, score, budget, w);

    std::vector<std::vector<position_t>> positions(heads, std::vector<position_t>(c + w));
    std::vector<std::vector<float>> scores(heads, std::vector<float>(c + w));
    std::vector<Candidates> candidates;
    for (std::size_t h = 0; h < heads; ++h) {
        for (std::size_t j = 0; j < c + w; ++j) positions[h][j] = static_cast<position_t>(j);
        std::copy_n(score.values.data() + h * c, c, scores[h].data());
        candidates.push_back({scores[h], PositionsView(positions[h]), budget, {0, w}});
    }
    std::vector<std::size_t> counts(heads);
    rule.counts(candidates, budget, counts);
    std::vector<std::int64_t> count;
    for (const std::size_t one : counts) count.push_back(static_cast<std::int64_t>(std::min(one, c)));
    file.begin_run("counts");
    file.expect("out.count", {heads}, count);

    for (const Rounding rounding : {Rounding::exact, Rounding::authors}) {
        const std::string suffix = rounding == Rounding::exact ? "" : "_authors";
        if (!file.contains("out.keep" + suffix)) continue;
        rule.head_rounding = rounding;
        for (const std::size_t chunk : {c + w, std::size_t{7}})
            for_each_driver(
                stream.shape, Given{&score, w}, {.tokens = budget},
                [&](auto& cache, const std::string& driver) {
                    file.begin_run(driver + ", prompt in calls of " + std::to_string(chunk));
                    feed_prompt(cache, stream, 0, c + w, chunk, driver.starts_with("KVCache"));
                    compare_ragged(file, cache, w, suffix);
                    if (!file.contains("out.o_next") || rounding != Rounding::exact) return;
                    file.expect("out.o_next", {stream.shape.q_heads, stream.shape.values()},
                                next_output(cache, file.array<float>("in.q_next", 2)));
                },
                rule);
    }
}

void check_critical(GoldenFile& file) {
    const auto score = file.array<float>("in.score", 2), wo = file.array<float>("in.wo", 3);
    const std::size_t heads = score.dim(0), c = score.dim(1), w = file.count("w"), n = c + w,
                      budget = file.count("B"), alpha = file.count("permille");
    Stream stream = read_prompt(file, heads, n);
    stream.shape.q_heads = wo.dim(0);
    stream.q.assign(wo.dim(0) * n * stream.shape.head_dim, 0.0F);
    detail::check_size("golden", "in.wo.shape[1]", wo.dim(1), stream.shape.values());
    const MatrixView<const float> projection[] = {
        {wo.values.data(), wo.dim(0) * wo.dim(1), wo.dim(2), wo.dim(2)}};
    Critical<Given> policy{
        {&score, w}, projection, file.count("half"), 0, static_cast<float>(file.real("eps"))};
    for_each_driver(stream.shape, policy, {.tokens = budget}, [&](auto& cache, const std::string& driver) {
        file.begin_run(driver);
        cache.begin_prompt();
        cache.hold(true);
        feed(cache, stream, 0, n);
        std::vector<float> norms, scratch(projected_scratch(wo.dim(1), wo.dim(2)));
        for (std::size_t h = 0; h < heads; ++h)
            with_head_step(cache, h, [&](const HeadStep& step) {
                std::vector<float> one(n);
                policy.norms(step, one, scratch.data());
                append(norms, sorted_by_position(step.cached, one));
            });
        file.expect("out.norm", {heads, n}, norms);
        cache.hold(false);
        cache.end_prompt();
        file.expect("out.keep_uniform", {heads, std::min(n, budget)}, kept_positions(cache));
    });
    policy.safe = alpha * budget / 1000;
    for_each_driver(
        stream.shape, policy, {.tokens = budget},
        [&](auto& cache, const std::string& driver) {
            file.begin_run(driver);
            feed_prompt(cache, stream, 0, n, n, driver.starts_with("KVCache"));
            compare_ragged(file, cache, w, "");
        },
        AdaKV<>{.mode = AdaMode::floor_fill, .alpha_permille = alpha});
}

}  // namespace kvcull::test::budgets
