// Layouts of method `epicache`.

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "kinds.hpp"
#include "kvcull/select/cluster.hpp"
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

}  // namespace

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

}  // namespace kvcull::test::epicache
