#include "kvcull/select/cluster.hpp"

#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/random.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

MatrixView<const float> rows_of(const std::vector<float>& values, std::size_t dim) {
    return {values.data(), values.size() / dim, dim};
}
Points random_points(std::size_t count, std::size_t dim, std::uint64_t seed) {
    return unit_points(rows_of(random_floats(count * dim, seed), dim), "test");
}
/// Squared distances to the nearest mean, with means and labels taken from scratch.
double inertia_of(const Points& points, const std::vector<std::size_t>& label, std::size_t clusters) {
    double sum = 0;
    for (std::size_t e = 0; e < clusters; ++e)
        for (std::size_t c = 0; c < points.dim(); ++c) {
            double mean = 0, count = 0;
            for (std::size_t i = 0; i < points.size(); ++i)
                if (label[i] == e) mean += points[i][c], ++count;
            for (std::size_t i = 0; i < points.size(); ++i)
                if (label[i] == e) sum += std::pow(points[i][c] - mean / count, 2);
        }
    return sum;
}
std::set<std::size_t> labels_of(const Clustering& clusters) {
    return {clusters.label.begin(), clusters.label.end()};
}

}  // namespace

TEST_CASE("segments cover all utterances once, and only the last may be shorter", "[property]") {
    for (std::size_t utterances = 0; utterances < 20; ++utterances)
        for (std::size_t window = 1; window < 25; ++window) {
            std::size_t end = 0;
            const auto segments = cut_segments(utterances, window);
            CAPTURE(utterances, window);
            REQUIRE(segments.size() == (utterances + window - 1) / window);
            for (const Segment& segment : segments) {
                REQUIRE(segment.begin == end);
                end = segment.end;
                REQUIRE((end - segment.begin == window || end == utterances));
            }
            REQUIRE(end == utterances);
        }
    CHECK(failure<error::config_error>([] { (void)cut_segments(3, 0); }) ==
          "cut_segments: window is 0, want at least 1");
}

TEST_CASE("Lloyd's iteration never raises the inertia and ends where nothing would change", "[property]") {
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
        const Points points = random_points(40, 5, seed);
        Points start(5);
        for (std::size_t e = 0; e < 4; ++e) start.add(points[e * 7]);
        double before = std::numeric_limits<double>::max();
        for (std::size_t iterations = 1; iterations < 8; ++iterations) {
            const Clustering now = lloyd(points, start, iterations);
            CAPTURE(seed, iterations);
            REQUIRE(now.inertia <= before + 1e-12);
            REQUIRE(std::abs(now.inertia - inertia_of(points, now.label, 4)) < 1e-12);
            before = now.inertia;
        }
        const Clustering end = lloyd(points, start);
        REQUIRE(end.iterations < 300);
        for (std::size_t i = 0; i < points.size(); ++i)
            for (std::size_t e = 0; e < 4; ++e)
                REQUIRE(detail::distance2(points[i], end.centroid[end.label[i]]) <=
                        detail::distance2(points[i], end.centroid[e]) + 1e-12);
    }
}

TEST_CASE("no cluster stays empty: the farthest point of those that are not alone moves in", "[property]") {
    // All points are nearest to the first centroid; 3 is farthest from it, then 0 (of 0 and 2 the lower one).
    Points points(1), centroids(1);
    for (const double x : {-2.0, 0.5, 2.0, 3.0}) points.add(std::array{x});
    for (const double x : {0.0, 100.0, 200.0}) centroids.add(std::array{x});
    CHECK(lloyd(points, centroids, 1).label == std::vector<std::size_t>{2, 0, 0, 1});

    for (std::size_t n = 1; n < 7; ++n)
        for (std::size_t clusters = 1; clusters <= n; ++clusters) {
            Points same(2);
            for (std::size_t i = 0; i < n; ++i) same.add(std::array{0.6, 0.8});
            const Clustering found = k_means(same, {.clusters = clusters});
            CAPTURE(n, clusters);
            REQUIRE(labels_of(found).size() == clusters);
            REQUIRE(found.inertia < 1e-30);
        }
}

TEST_CASE("k-means finds separated groups whatever the seed, and numbers them by their first point",
          "[property]") {
    const std::size_t dim = 12;
    std::vector<float> values;
    for (std::size_t i = 0; i < 40; ++i) {
        auto noise = random_floats(dim, i, 0.05F);
        noise[(i + 2) % 4] += 1.0F;
        values.insert(values.end(), noise.begin(), noise.end());
    }
    const Points points = unit_points(rows_of(values, dim), "test");
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
        const Clustering found = k_means(points, {.clusters = 4, .seed = seed});
        for (std::size_t i = 0; i < 40; ++i) REQUIRE(found.label[i] == i % 4);
        REQUIRE(found.label == k_means(points, {.clusters = 4, .seed = seed}).label);
        REQUIRE(std::abs(found.inertia - inertia_of(points, found.label, 4)) < 1e-12);
    }
}

TEST_CASE("more runs never give a worse clustering, and each run goes on with the stream", "[property]") {
    std::size_t bettered = 0;
    for (std::uint64_t seed = 0; seed < 10; ++seed) {
        const Points points = random_points(30, 6, 100 + seed);
        double before = std::numeric_limits<double>::max(), first = 0;
        for (const std::size_t restarts : {1U, 2U, 5U, 20U}) {
            const double now = k_means(points, {.clusters = 6, .seed = seed, .restarts = restarts}).inertia;
            REQUIRE(now <= before + 1e-12);
            if (restarts == 1) first = now;
            before = now;
        }
        bettered += before < first - 1e-9 ? 1 : 0;
    }
    REQUIRE(bettered > 0);
}

TEST_CASE("fewer points than clusters are a cluster each; one, and none, are legal", "[contract]") {
    const Points points = random_points(3, 4, 1);
    CHECK(k_means(points, {.clusters = 5}).label == std::vector<std::size_t>{0, 1, 2});
    CHECK(k_means(points, {.clusters = 1}).label == std::vector<std::size_t>{0, 0, 0});
    CHECK(k_means(random_points(1, 4, 1), {.clusters = 4}).label == std::vector<std::size_t>{0});
    const Clustering none = k_means(Points(4), {});
    CHECK(none.label.empty());
    CHECK(none.centroid.size() == 0);
}

TEST_CASE("of a cluster of two, which always ties, the earlier one stands for it", "[property]") {
    for (std::uint64_t seed = 0; seed < 50; ++seed) {
        const Points points = random_points(2, 9, seed);
        const Clustering one = k_means(points, {.clusters = 1});
        CHECK(nearest_members(points, {0, 1}, one.centroid[0], 8) == std::vector<std::size_t>{0, 1});
    }
    Points points(2);  // along the centroid, off it, a little nearer than that
    for (const auto& point : {std::array{0.6, 0.8}, std::array{1.0, 0.0}, std::array{0.8, 0.6}})
        points.add(point);
    CHECK(nearest_members(points, {0, 1, 2}, std::array{2.0, 0.0}, 2) == std::vector<std::size_t>{1, 2});
    CHECK(nearest_members(points, {0, 1, 2}, std::array{0.0, 0.0}, 2) == std::vector<std::size_t>{0, 1});
    CHECK(nearest_members(points, {}, std::array{1.0, 0.0}, 2).empty());
}

TEST_CASE("cosine ignores a centroid's length, the dot product favours a long one", "[property]") {
    Points centroids(2);
    centroids.add(std::array{0.1, 0.0});
    centroids.add(std::array{0.8, 0.6});
    centroids.add(std::array{0.0, 0.0});
    const std::array query{1.0, 0.0};
    const auto cosine = likeness_to(centroids, query, Likeness::cosine),
               dot = likeness_to(centroids, query, Likeness::dot);
    CHECK(std::abs(cosine[0] - 1.0) < 1e-12);
    CHECK(std::abs(cosine[1] - 0.8) < 1e-12);
    CHECK(cosine[2] == 0.0);
    CHECK(dot == std::vector<double>{0.1, 0.8, 0.0});
}

TEST_CASE("an embedding without a direction is refused by the number of its segment", "[contract]") {
    const auto refusal = [](const std::vector<float>& values) {
        return failure<error::config_error>([&] { (void)unit_points(rows_of(values, 2), "here"); });
    };
    CHECK(refusal({1, 2, 0, 0}) == "here: embedding of segment 1 is zero, want a vector with a direction");
    for (const float bad : {quiet_nan(), positive_infinity(), negative_infinity()})
        CHECK(refusal({1, 2, 3, 4, bad, 1}) ==
              "here: embedding of segment 2 is not finite, want finite numbers");
    const Points large = unit_points(rows_of({3e38F, 4e37F, 1e-30F, 1e-30F}, 2), "here");
    for (std::size_t i = 0; i < 2; ++i) CHECK(std::abs(detail::dot(large[i], large[i]) - 1.0) < 1e-12);
}

TEST_CASE("the mean of token embeddings reads every type of table", "[differential]") {
    const std::vector<float> table{1, 2, 3, 4, 5, 6};
    const std::vector<float16> halves = to_float16s(table);
    const std::vector<std::int32_t> ids{2, 0, 2};
    std::vector<float> a(2), b(2);
    mean_token_embedding({table.data(), 3, 2, 2}, ids, a);
    mean_token_embedding({halves.data(), DType::f16, 3, 2, 2}, ids, b);
    CHECK(a == std::vector<float>{11.0F / 3, 14.0F / 3});
    CHECK(b == a);
    const auto refusal = [&](const std::vector<std::int32_t>& list) {
        return failure<error::shape_error>([&] { mean_token_embedding({table.data(), 3, 2, 2}, list, a); });
    };
    CHECK(refusal({}) == "mean_token_embedding: ids.size() is 0, want at least 1");
    CHECK(refusal({0, 3}) == "mean_token_embedding: id is 3, want 0 .. 2");
    CHECK(refusal({-1}) == "mean_token_embedding: id is -1, want 0 .. 2");
}

TEST_CASE("clustering refuses parameters that mean nothing", "[contract]") {
    const Points points = random_points(3, 4, 1);
    const auto refusal = [&](const KMeans& settings) {
        return failure<error::config_error>([&] { (void)k_means(points, settings); });
    };
    CHECK(refusal({.clusters = 0}) == "k_means: clusters is 0, want at least 1");
    CHECK(refusal({.restarts = 0}) == "k_means: restarts is 0, want at least 1");
    CHECK(refusal({.max_iter = 0}) == "k_means: max_iter is 0, want at least 1");
    CHECK(failure<error::shape_error>([&] { (void)lloyd(points, Points(4, 4)); }) ==
          "lloyd: centroids.size() is 4, want 1 .. 3, the number of points");
    CHECK(failure<error::shape_error>([&] { (void)lloyd(points, Points(1, 5)); }) ==
          "lloyd: centroids.dim() is 5, want 4");
}
