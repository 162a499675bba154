// Layouts of method `epicache`.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "kinds.hpp"
#include "kvcull/cache/episodes.hpp"
#include "kvcull/policies.hpp"
#include "kvcull/select/cluster.hpp"
#include "kvcull/select/layer_profile.hpp"
#include "kvcull/select/layer_rules.hpp"
#include "streams.hpp"

namespace kvcull::test::epicache {
namespace {

template <class Number>
std::vector<std::int64_t> whole(const std::vector<Number>& numbers) {
    return {numbers.begin(), numbers.end()};
}
std::vector<float> floats(std::span<const double> numbers) {
    std::vector<float> all;
    for (const double x : numbers) all.push_back(static_cast<float>(x));
    return all;
}
MatrixView<const float> matrix(const Array<float>& array) {
    return {array.values.data(), array.dim(0), array.dim(1)};
}
Points as_points(const Array<float>& array) {
    Points points(array.dim(0), array.dim(1));
    for (std::size_t i = 0; i < points.size(); ++i)
        std::copy(matrix(array)[i].begin(), matrix(array)[i].end(), points[i].begin());
    return points;
}

/// out.representative of all clusters: ascending, -1 for those that there are not.
std::vector<std::int64_t> representatives(const Points& points, const Clustering& clusters,
                                          std::size_t count) {
    std::vector<std::int64_t> all;
    for (std::size_t e = 0; e < clusters.centroid.size(); ++e) {
        auto found = whole(nearest_members(points, clusters.members(e), clusters.centroid[e], count));
        std::sort(found.begin(), found.end());
        found.resize(count, -1);
        append(all, found);
    }
    return all;
}

/// The layers' own sizes.
struct Sizes {
    std::vector<std::size_t> of_layer;

    void layer_sizes(std::size_t /*mean*/, std::size_t /*prompt*/, Protected /*policy*/,
                     std::span<std::size_t> out) const {
        std::copy(of_layer.begin(), of_layer.end(), out.begin());
    }
};

/// A cache of one layer that holds the file's rows: ragged heads, one after the other.
template <Policy P>
KVCache<P> ragged_cache(const P& policy, std::size_t q_heads, const Array<float>& k,
                        const std::vector<std::int64_t>& lengths, const std::vector<position_t>& positions,
                        std::size_t budget, std::size_t seen) {
    const std::size_t dim = k.dim(1);
    const CacheShape shape{.layers = 1, .q_heads = q_heads, .kv_heads = lengths.size(), .head_dim = dim};
    KVCache<P> cache(shape, policy, {.tokens = budget});
    Live<P> live = cache.evictor().live();
    std::vector<HeadView> views;
    std::size_t first = 0;
    for (std::size_t h = 0; h < lengths.size(); ++h) {
        const auto rows = static_cast<std::size_t>(lengths[h]);
        const RowsView held(k.values.data() + first * dim, rows, dim, dim);
        views.push_back({held, held, std::span(positions).subspan(first, rows)});
        live.rows[h] = rows;
        resize_state(live.states[h], rows);
        first += rows;
    }
    detail::check_size("golden", "in.k.shape[0]", k.dim(0), first);
    live.seen = seen;
    live.reach = live.call_reach = {static_cast<position_t>(seen), seen};
    cache.restore(std::move(live), {views, shape.kv_heads});
    return cache;
}
/// Probes with q[Hq, p, d]; the rows' own keys are zero and have no say.
template <class Cache>
void probe(Cache& cache, std::size_t layer, HeadsView<const float> q) {
    const CacheShape& shape = cache.shape();
    const std::vector<float> zeros(shape.kv_heads * q.tokens * shape.head_dim);
    std::vector<float> out(shape.q_heads * q.tokens * shape.values());
    const auto own = head_major(zeros.data(), shape.kv_heads, q.tokens, shape.head_dim);
    cache.probe(layer, q, own, own, head_major(out.data(), shape.q_heads, q.tokens, shape.values()));
}
/// Rows that are left of `lengths` rows per head, as indices within the head, and how many.
template <class Cache>
void expect_keep(GoldenFile& file, const std::string& name, const Cache& cache,
                 const std::vector<std::int64_t>& lengths, const std::vector<position_t>& positions) {
    std::vector<std::int64_t> kept_len, keep;
    auto first = positions.begin();
    for (std::size_t h = 0; h < lengths.size(); ++h) {
        const auto end = first + lengths[h];
        kept_len.push_back(static_cast<std::int64_t>(cache.rows(0, h)));
        for (const position_t position : cache.positions(0, h))
            keep.push_back(std::find(first, end, position) - first);
        first = end;
    }
    if (name != "keydiff") file.expect("out." + name + "_len", {lengths.size()}, kept_len);
    file.expect("out." + name + "_keep", {keep.size()}, keep);
}

/// The file's rows in place of a model's: token t of the history has the position t.
struct Rows {
    struct Layer {
        Array<float> k, v, prompt_q;
    };
    std::vector<Layer> layers;
    std::size_t block;
    std::vector<std::size_t> peak = std::vector<std::size_t>(layers.size());

    template <class Cache>
    void forward(Cache& cache, std::span<const std::int32_t> tokens) {
        const CacheShape& shape = cache.shape();
        const std::size_t first = cache.seen(), c = tokens.size();
        const std::vector<float> q(shape.q_heads * c * shape.head_dim);
        std::vector<float> out(shape.q_heads * c * shape.values());
        for (std::size_t l = 0; l < layers.size(); ++l) {
            const Layer& layer = layers[l];
            const std::size_t n = layer.k.dim(1), d = shape.head_dim, dv = shape.values();
            cache.append(l, {layer.k.values.data() + first * d, shape.kv_heads, c, d, n * d, d},
                         {layer.v.values.data() + first * dv, shape.kv_heads, c, dv, n * dv, dv});
            std::size_t rows = 0;
            for (std::size_t h = 0; h < shape.kv_heads; ++h) rows += cache.rows(l, h);
            peak[l] = std::max(peak[l], rows);
            cache.attend(l, head_major(q.data(), shape.q_heads, c, d),
                         head_major(out.data(), shape.q_heads, c, dv));
        }
        cache.end_step();
    }
    template <class Cache>
    void probe(Cache& cache, std::span<const std::int32_t> tokens) {
        for (std::size_t l = 0; l < layers.size(); ++l) {
            const Array<float>& q = layers[l].prompt_q;
            const std::size_t rows = tokens.size(), d = q.dim(3), at = (cache.seen() - 1) / block;
            epicache::probe(cache, l,
                            head_major(q.values.data() + at * q.dim(1) * rows * d, q.dim(1), rows, d));
        }
    }
};

/// A model of one layer and head whose rows are zeros: where only their number counts.
struct Counter {
    static constexpr CacheShape shape{.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 1};

    template <class Cache>
    void forward(Cache& cache, std::span<const std::int32_t> tokens) {
        std::vector<float> zeros(tokens.size()), out(tokens.size());
        const auto rows = head_major<const float>(zeros.data(), 1, tokens.size(), 1);
        cache.append(0, rows, rows);
        cache.attend(0, rows, head_major(out.data(), 1, tokens.size(), 1));
        cache.end_step();
    }
    template <class Cache>
    void probe(Cache& cache, std::span<const std::int32_t> tokens) {
        const std::vector<float> zeros(tokens.size());
        epicache::probe(cache, 0, head_major(zeros.data(), 1, tokens.size(), 1));
    }
};

}  // namespace

void check_route(GoldenFile& file) {
    const auto centroid = file.array<float>("in.centroid", 2), query = file.array<float>("in.query", 2),
               embedding = file.array<float>("in.turn_embedding", 2);
    const auto members = file.array<std::int64_t>("in.members", 1),
               length = file.array<std::int64_t>("in.length", 1),
               turn_tokens = file.array<std::int64_t>("in.turn_tokens", 1);
    const std::size_t episodes = centroid.dim(0), dim = centroid.dim(1), turns = query.dim(0);
    const std::size_t budget = file.count("budget"), block = file.count("block");
    const auto make = [&] { return KVCache(Counter::shape, EpiCache{}, Budget{.tokens = budget}); };
    Counter model;
    MemoryBytes store;
    for (std::size_t e = 0; e < episodes; ++e) {
        auto cache = make();
        model.forward(cache, std::vector<std::int32_t>(static_cast<std::size_t>(length.values[e])));
        const auto mean = matrix(centroid)[e];
        const std::vector<double> wide(mean.begin(), mean.end());
        const Tensor extra[] = {Tensor::of("episode.centroid", {dim}, std::span(wide)),
                                Tensor::of("episode.count", {1}, std::span(members.values).subspan(e, 1)),
                                Tensor::of("episode.members", {0}, std::span<const std::int64_t>()),
                                Tensor::of("episode.turns", {0}, std::span<const std::int32_t>())};
        store.put(e, save(cache, extra));
    }
    Episodes conversation(make, model, store, {.block = block, .tau = file.real("tau")});
    conversation.reopen(std::vector<std::int32_t>(budget), {}, episodes);

    std::vector<std::int64_t> episode, action, written_back, refresh, rows;
    std::vector<double> similarity;
    for (std::size_t t = 0; t < turns; ++t) {
        const auto turn = conversation.begin_turn(matrix(query)[t]);
        const std::vector<std::int32_t> tokens(static_cast<std::size_t>(turn_tokens.values[t]));
        if (!tokens.empty()) model.forward(conversation.cache(), tokens);
        const auto own = matrix(embedding)[t];
        const EpisodeSegment segment{{own.begin(), own.end()}, {0}};
        refresh.push_back(conversation.end_turn(tokens, std::span(&segment, 1)) ? 1 : 0);
        episode.push_back(static_cast<std::int64_t>(turn.episode));
        similarity.push_back(turn.likeness);
        action.push_back(static_cast<std::int64_t>(turn.action));
        written_back.push_back(turn.written_back ? static_cast<std::int64_t>(*turn.written_back) : -1);
        rows.push_back(static_cast<std::int64_t>(conversation.cache().rows(0, 0)));
    }
    file.expect("out.episode", {turns}, episode);
    file.expect("out.similarity", {turns}, floats(similarity));
    file.expect("out.action", {turns}, action);
    file.expect("out.written_back", {turns}, written_back);
    file.expect("out.refresh", {turns}, refresh);
    file.expect("out.length", {turns}, rows);
    std::vector<float> centroids;
    for (std::size_t e = 0; e < conversation.size(); ++e) append(centroids, floats(conversation.centroid(e)));
    file.expect("out.centroid", {conversation.size(), dim}, centroids);
}

void check_score(GoldenFile& file) {
    const auto q = file.array<float>("in.q", 3), k = file.array<float>("in.k", 2);
    const auto lengths = file.array<std::int64_t>("in.head_len", 1).values,
               positions = file.array<std::int64_t>("in.position", 1).values;
    const std::size_t budget = file.count("budget"), seen = file.count("seen"), q_heads = q.dim(0);
    for (const HeadBudget heads : {HeadBudget::uniform, HeadBudget::pooled}) {
        auto cache = ragged_cache(EpiCache{.heads = heads}, q_heads, k, lengths, positions, budget, seen);
        const auto rows = head_major(q.values.data(), q_heads, q.dim(1), q.dim(2));
        cache.hold(true);
        probe(cache, 0, rows);
        file.expect("out.score", {positions.size()}, all_scores(cache));
        cache.hold(false);
        probe(cache, 0, rows);
        expect_keep(file, heads == HeadBudget::pooled ? "pooled" : "uniform", cache, lengths, positions);
    }
    KVCache<KeyDiff> cache = ragged_cache(KeyDiff{}, q_heads, k, lengths, positions, budget, seen);
    Live<KeyDiff> live = cache.evictor().live();
    std::vector<HeadView> views;
    std::vector<double>
        mean_norm;  // by which the library's score, a cosine, is larger: the order is the same
    for (std::size_t h = 0; h < lengths.size(); ++h) {
        const HeadView& head = views.emplace_back(cache.view(0, h));
        std::vector<float> row(head.k.dim());
        std::vector<double> mean(row.size());
        for (std::size_t j = 0; j < head.rows(); ++j) {
            head.k.widen(j, row);
            live.states[h].inverse[j] = inverse_norm(simd::kernels(), row);
            for (std::size_t c = 0; c < row.size(); ++c)
                mean[c] += static_cast<double>(row[c] * live.states[h].inverse[j]) /
                           static_cast<double>(head.rows());
        }
        mean_norm.push_back(std::sqrt(detail::dot(mean, mean)));
    }
    KVCache<KeyDiff> known(cache.shape(), KeyDiff{}, {.tokens = budget});
    known.restore(std::move(live), {views, lengths.size()});
    std::vector<float> scores;
    for (std::size_t h = 0; h < lengths.size(); ++h)
        for (const float cosine : known.scores(0, h))
            scores.push_back(static_cast<float>(static_cast<double>(cosine) * mean_norm[h]));
    file.expect("out.keydiff_score", {scores.size()}, scores);
    known.make_room(0);
    expect_keep(file, "keydiff", known, lengths, positions);
}

void check_prefill(GoldenFile& file) {
    const EpiCache policy{.heads = read_named<HeadBudget>(file, "head_budget"),
                          .sinks = file.count("sinks"),
                          .recent = file.count("recent")};
    const std::size_t layers = file.count("layers"), block = file.count("block");
    Sizes sizes;
    std::istringstream list(file.text("budget"));
    for (std::string one; std::getline(list, one, ',');) sizes.of_layer.push_back(std::stoul(one));
    detail::check_size("golden", "number of layers in budget", sizes.of_layer.size(), layers);

    Rows model{.layers = {}, .block = block};
    for (std::size_t l = 0; l < layers; ++l) {
        const std::string at = "in.l" + std::to_string(l) + ".";
        model.layers.push_back({file.array<float>(at + "k", 3), file.array<float>(at + "v", 3),
                                file.array<float>(at + "prompt_q", 4)});
    }
    const Rows::Layer& first = model.layers.at(0);
    const std::size_t n = first.k.dim(1), kv_heads = first.k.dim(0), blocks = first.prompt_q.dim(0);
    const CacheShape shape{.layers = layers,
                           .q_heads = first.prompt_q.dim(1),
                           .kv_heads = kv_heads,
                           .head_dim = first.k.dim(2),
                           .value_dim = first.v.dim(2)};
    const Budget budget{.tokens = *std::min_element(sizes.of_layer.begin(), sizes.of_layer.end())};
    for (const std::size_t block_rows : {3U, 64U}) {
        file.begin_run("storage in blocks of " + std::to_string(block_rows));
        BlockPool pool({.block_rows = block_rows});
        KVCache<EpiCache, Sizes> cache(shape, policy, budget, pool, sizes);
        model.peak.assign(layers, 0);
        std::vector<std::vector<std::int64_t>> lengths(layers), positions(layers);
        const std::vector<std::int32_t> history(n);
        FixedPrompt prompt{std::vector<std::int32_t>(first.prompt_q.dim(2))};
        for (std::size_t from = 0; from < n; from += block) {
            block_prefill(cache, model, std::span(history).subspan(from, std::min(block, n - from)), block,
                          prompt);
            for (std::size_t l = 0; l < layers; ++l)
                for (std::size_t h = 0; h < kv_heads; ++h) {
                    append(positions[l], cache.positions(l, h));
                    lengths[l].push_back(static_cast<std::int64_t>(cache.rows(l, h)));
                }
        }
        KVCache<EpiCache, Sizes> at_once(shape, policy, budget, pool, sizes);
        block_prefill(at_once, model, history, block, prompt);
        file.expect("out.peak_rows", {layers}, whole(model.peak));
        for (std::size_t l = 0; l < layers; ++l) {
            const std::string in = "in.l" + std::to_string(l) + ".", out = "out.l" + std::to_string(l) + ".";
            file.expect(out + "block_len", {blocks, kv_heads}, lengths[l]);
            file.expect(out + "block_position", {positions[l].size()}, positions[l]);
        }
        std::vector<std::vector<float>> outputs;
        std::size_t tokens = 0;
        for (std::size_t l = 0; l < layers; ++l) {
            const std::string in = "in.l" + std::to_string(l) + ".";
            const auto q = file.array<float>(in + "decode_q", 3), k = file.array<float>(in + "decode_k", 3),
                       v = file.array<float>(in + "decode_v", 3);
            tokens = q.dim(1);
            for (auto* one : {&cache, &at_once}) {
                outputs.emplace_back(shape.q_heads * tokens * shape.values());
                one->append(l, head_major(k.values.data(), kv_heads, tokens, shape.head_dim),
                            head_major(v.values.data(), kv_heads, tokens, shape.values()));
                one->attend(l, head_major(q.values.data(), shape.q_heads, tokens, shape.head_dim),
                            head_major(outputs.back().data(), shape.q_heads, tokens, shape.values()));
                file.expect("out.l" + std::to_string(l) + ".decode", {shape.q_heads, tokens, shape.values()},
                            outputs.back());
            }
        }
    }
}

void check_cluster(GoldenFile& file) {
    const auto embedding = file.array<float>("in.embedding", 2),
               init = file.array<float>("in.centroid_init", 2), query = file.array<float>("in.query", 2);
    const std::size_t count = file.count("representatives"), episodes = file.count("episodes"),
                      window = file.count("window"), utterances = file.count("utterances");
    std::vector<std::int64_t> segments;
    for (const auto& [begin, end] : cut_segments(utterances, window))
        append(segments, whole(std::vector{begin, end}));
    file.expect("out.segment", {segments.size() / 2, 2}, segments);

    const Points points = unit_points(matrix(embedding), "golden");
    const std::size_t n = points.size(), dim = points.dim();
    file.expect("out.label_first", {n}, whole(lloyd(points, as_points(init), 1).label));
    const Clustering given = lloyd(points, as_points(init));
    const std::size_t clusters = given.centroid.size();
    file.expect("out.label", {n}, whole(given.label));
    file.expect("out.centroid", {clusters, dim}, floats(given.centroid.values()));
    file.expect("out.inertia", {1}, floats(std::vector{given.inertia}));
    file.expect("out.iterations", {1}, std::vector{static_cast<std::int64_t>(given.iterations)});
    file.expect("out.representative", {clusters, count}, representatives(points, given, count));
    std::vector<std::int64_t> medoids;
    for (std::size_t e = 0; e < clusters; ++e)
        append(medoids, whole(nearest_members(points, given.members(e), given.centroid[e], 1)));
    file.expect("out.medoid", {clusters}, medoids);
    for (const Likeness measure : {Likeness::cosine, Likeness::dot}) {
        const std::string name(names_of(measure)[static_cast<std::size_t>(measure)]);
        std::vector<float> all;
        std::vector<std::int64_t> route;
        const Points units = unit_points(matrix(query), "golden");
        for (std::size_t i = 0; i < units.size(); ++i) {
            const auto likeness = likeness_to(given.centroid, units[i], measure);
            append(all, floats(likeness));
            route.push_back(std::max_element(likeness.begin(), likeness.end()) - likeness.begin());
        }
        file.expect("out.similarity_" + name, {units.size(), clusters}, all);
        file.expect("out.route_" + name, {units.size()}, route);
    }

    const KMeans settings{
        .clusters = episodes, .seed = file.count("seed"), .restarts = file.count("restarts")};
    SplitMix64 random{settings.seed};
    std::vector<double> uniform;
    for (int i = 0; i < 16; ++i) uniform.push_back(random.uniform());
    file.expect("out.uniform", {16}, floats(uniform));
    const Clustering seeded = k_means(points, settings);
    const std::size_t found = seeded.centroid.size();
    random = {settings.seed};
    file.expect("out.seeded_first_run", {found}, whole(detail::choose_centres(points, found, random)));
    file.expect("out.seeded_label", {n}, whole(seeded.label));
    file.expect("out.seeded_centroid", {found, dim}, floats(seeded.centroid.values()));
    file.expect("out.seeded_inertia", {1}, floats(std::vector{seeded.inertia}));
    file.expect("out.seeded_representative", {found, count}, representatives(points, seeded, count));
}

void check_budget(GoldenFile& file) {
    const auto full = file.array<float>("in.k_full", 4), masked = file.array<float>("in.k_block", 4);
    const std::size_t layers = full.dim(0), kv_heads = full.dim(1), n = full.dim(2), dim = full.dim(3);
    detail::check<error::shape_error>(masked.shape == full.shape, "golden", "shape of in.k_block", "another",
                                      "that of in.k_full");
    const auto views_of = [&](const Array<float>& keys) {
        std::vector<HeadView> views;
        for (std::size_t i = 0; i < layers * kv_heads; ++i)
            views.push_back({.k = {keys.values.data() + i * n * dim, n, dim, dim}, .v = {}, .position = {}});
        return views;
    };
    const auto full_views = views_of(full), masked_views = views_of(masked);
    for (const KeySimilarity measure : {KeySimilarity::token, KeySimilarity::window})
        file.expect("out.sigma_" + std::string(names_of(measure)[static_cast<std::size_t>(measure)]),
                    {layers},
                    layer_similarity({full_views, kv_heads}, {masked_views, kv_heads}, measure,
                                     file.count("window")));

    const BlockMask mask{
        .block = file.count("block"), .sinks = file.count("sinks"), .overlap = file.count("overlap")};
    std::vector<std::uint8_t> sees(n * n);
    for (std::size_t i = 0; i < n; ++i) {
        const Visible row = mask.row(i);
        for (std::size_t j = 0; j < row.end; ++j) sees[i * n + j] = j < row.sinks || j >= row.begin ? 1 : 0;
    }
    file.expect_exactly<std::uint8_t>("out.mask", {n, n}, sees);

    const auto sigma = file.array<float>("in.sigma", 1), alpha = file.array<float>("in.alpha", 1);
    const auto mean = file.array<std::int64_t>("in.mean_budget", 1);
    for (const auto weights :
         {BySimilarity::Weights::bounded, BySimilarity::Weights::paper, BySimilarity::Weights::repo}) {
        std::vector<std::int64_t> all;
        for (std::size_t r = 0; r < alpha.dim(0); ++r) {
            std::vector<std::size_t> sizes(sigma.dim(0));
            BySimilarity{.similarity = sigma.values,
                         .weights = weights,
                         .alpha = static_cast<double>(alpha.values[r]),
                         .min_fraction = file.real("min_fraction")}
                .layer_sizes(static_cast<std::size_t>(mean.values[r]), 0, {}, sizes);
            append(all, whole(sizes));
        }
        file.expect("out.budget_" + std::string(names_of(weights)[static_cast<std::size_t>(weights)]),
                    {alpha.dim(0), sigma.dim(0)}, all);
    }
}

}  // namespace kvcull::test::epicache
