#pragma once
/// Clusters of embeddings, their representatives, and the cluster that a query belongs to. All arithmetic in
/// double; the same input and seed give the same clusters everywhere.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "../base/error.hpp"
#include "../base/memory.hpp"
#include "../base/types.hpp"
#include "../views.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Utterances `begin .. end - 1` of a conversation.
struct Segment {
    std::size_t begin = 0, end = 0;
};
/// Cuts `utterances` every `window` of them; the last segment may be shorter. @throws config_error
[[nodiscard]] inline std::vector<Segment> cut_segments(std::size_t utterances, std::size_t window) {
    detail::check<error::config_error>(window >= 1, "cut_segments", "window", window, "at least 1");
    std::vector<Segment> segments;
    for (std::size_t begin = 0; begin < utterances; begin = segments.back().end)
        segments.push_back({begin, begin + std::min(window, utterances - begin)});
    return segments;
}

/// Points in one space: embeddings or centroids, a row each.
class Points {
  public:
    Points() = default;
    explicit Points(std::size_t dim) : dim_(dim) {}
    Points(std::size_t count, std::size_t dim) : dim_(dim), values_(count * dim) {}

    [[nodiscard]] std::size_t dim() const noexcept { return dim_; }
    [[nodiscard]] std::size_t size() const noexcept { return dim_ == 0 ? 0 : values_.size() / dim_; }
    [[nodiscard]] std::span<const double> values() const noexcept { return values_; }
    [[nodiscard]] std::span<double> operator[](std::size_t i) noexcept {
        return std::span(values_).subspan(i * dim_, dim_);
    }
    [[nodiscard]] std::span<const double> operator[](std::size_t i) const noexcept {
        return std::span(values_).subspan(i * dim_, dim_);
    }
    void add(std::span<const double> point) { values_.insert(values_.end(), point.begin(), point.end()); }

  private:
    std::size_t dim_ = 0;
    std::vector<double> values_;
};

namespace detail {

[[nodiscard]] inline double dot(std::span<const double> a, std::span<const double> b) noexcept {
    return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}
[[nodiscard]] inline double distance2(std::span<const double> a, std::span<const double> b) noexcept {
    double sum = 0;
    for (std::size_t c = 0; c < a.size(); ++c) sum += (a[c] - b[c]) * (a[c] - b[c]);
    return sum;
}
/// 0 where one of them has no direction.
[[nodiscard]] inline double cosine(std::span<const double> a, std::span<const double> b) noexcept {
    const double norm = std::sqrt(dot(a, a) * dot(b, b));
    return norm > 0 ? dot(a, b) / norm : 0.0;
}

}  // namespace detail

/// `embedding` at length 1. `what` names it in errors.
/// @throws config_error if a number is not finite or all are 0
[[nodiscard]] inline std::vector<double> unit_vector(std::span<const float> embedding, std::string_view where,
                                                     const auto& what) {
    double sum = 0;
    for (const float& x : embedding) {
        detail::check<error::config_error>(is_finite(x), where, what, "not finite", "finite numbers");
        sum += static_cast<double>(x) * static_cast<double>(x);
    }
    detail::check<error::config_error>(sum > 0, where, what, "zero", "a vector with a direction");
    std::vector<double> unit(embedding.begin(), embedding.end());
    const double norm = std::sqrt(sum);
    for (double& x : unit) x /= norm;
    return unit;
}
/// The same of every segment's embedding; errors name the segment. @param embeddings [K, D]
[[nodiscard]] inline Points unit_points(MatrixView<const float> embeddings, std::string_view where) {
    Points points(embeddings.cols);
    for (std::size_t i = 0; i < embeddings.rows; ++i)
        points.add(unit_vector(embeddings[i], where, detail::text("embedding of segment ", i)));
    return points;
}

/// An embedding without an encoder: the mean of the model's input-embedding rows. The weakest of those that
/// EpiCache's authors tried. @param table [vocabulary, D] @param out [D]
/// @throws shape_error
inline void mean_token_embedding(const RowsView& table, std::span<const std::int32_t> ids,
                                 std::span<float> out) {
    constexpr std::string_view where = "mean_token_embedding";
    detail::check_size(where, "out.size()", out.size(), table.dim());
    detail::check<error::shape_error>(!ids.empty(), where, "ids.size()", ids.size(), "at least 1");
    detail::check<error::shape_error>(table.rows() > 0, where, "table.rows()", 0, "at least 1");
    for (const std::int32_t id : ids)
        detail::check<error::shape_error>(id >= 0 && static_cast<std::size_t>(id) < table.rows(), where, "id",
                                          id, detail::text("0 .. ", table.rows() - 1));
    std::vector<double> sum(out.size());
    std::vector<float> row(out.size());
    for (const std::int32_t id : ids) {
        table.widen(static_cast<std::size_t>(id), row);
        for (std::size_t c = 0; c < sum.size(); ++c) sum[c] += static_cast<double>(row[c]);
    }
    for (std::size_t c = 0; c < sum.size(); ++c)
        out[c] = static_cast<float>(sum[c] / static_cast<double>(ids.size()));
}

struct Clustering {
    std::vector<std::size_t> label;  // [K]: the cluster of each point
    Points centroid;                 // [E, D]: plain means of the members
    double inertia = 0;              // squared distances to the own centroid, summed
    std::size_t iterations = 0;

    /// Points of one cluster, ascending.
    [[nodiscard]] std::vector<std::size_t> members(std::size_t cluster) const {
        std::vector<std::size_t> members;
        for (std::size_t i = 0; i < label.size(); ++i)
            if (label[i] == cluster) members.push_back(i);
        return members;
    }
};

struct KMeans {
    std::size_t clusters = 4;  // at most as many as points
    std::uint64_t seed = 42;
    std::size_t restarts = 10, max_iter = 300;
};

namespace detail {

/// Moves into every empty cluster the point farthest from its centroid of those that are not alone.
inline void repair(std::vector<std::size_t>& label, std::span<const double> distance,
                   std::vector<std::size_t>& count) {
    for (std::size_t empty = 0; empty < count.size(); ++empty) {
        if (count[empty] > 0) continue;
        std::optional<std::size_t> farthest;
        for (std::size_t i = 0; i < label.size(); ++i)
            if (count[label[i]] >= 2 && (!farthest || distance[i] > distance[*farthest])) farthest = i;
        --count[label[*farthest]];
        label[*farthest] = empty;
        count[empty] = 1;
    }
}

/// Greedy k-means++: each next centre is the best of 2 + ln(count) draws by squared distance.
/// @returns indices of points
[[nodiscard]] inline std::vector<std::size_t> choose_centres(const Points& points, std::size_t count,
                                                             SplitMix64& random) {
    const std::size_t n = points.size();
    const auto trials = 2 + static_cast<std::size_t>(std::log(static_cast<double>(count)));
    std::vector<std::size_t> chosen{static_cast<std::size_t>(random.uniform() * static_cast<double>(n))};
    std::vector<double> nearest(n), sums(n), best, trial(n);
    for (std::size_t i = 0; i < n; ++i) nearest[i] = distance2(points[i], points[chosen[0]]);
    while (chosen.size() < count) {
        std::partial_sum(nearest.begin(), nearest.end(), sums.begin());
        double best_sum = 0;
        std::size_t best_index = n;
        for (std::size_t t = 0; t < trials; ++t) {
            const double mark = random.uniform() * sums.back();
            std::size_t index = 0;
            while (index < n && !(sums[index] > mark)) ++index;
            if (index == n)  // all points lie on centres
                for (index = 0; std::find(chosen.begin(), chosen.end(), index) != chosen.end();) ++index;
            for (std::size_t i = 0; i < n; ++i)
                trial[i] = std::min(nearest[i], distance2(points[i], points[index]));
            const double sum = std::accumulate(trial.begin(), trial.end(), 0.0);
            if (best_index < n && !(sum < best_sum)) continue;
            best_sum = sum;
            best_index = index;
            best = trial;
        }
        chosen.push_back(best_index);
        nearest = best;
    }
    return chosen;
}

}  // namespace detail

/// Lloyd's iteration from given centroids (ties: the lower cluster), in which no cluster stays empty. Stops
/// when no point changes its cluster. Cost: K E D per iteration.
/// @throws shape_error if there are more centroids than points, or none, or of another dimension
[[nodiscard]] inline Clustering lloyd(const Points& points, Points centroids, std::size_t max_iter = 300) {
    constexpr std::string_view where = "lloyd";
    const std::size_t n = points.size(), clusters = centroids.size();
    detail::check_size(where, "centroids.dim()", centroids.dim(), points.dim());
    detail::check<error::shape_error>(clusters >= 1 && clusters <= n, where, "centroids.size()", clusters,
                                      detail::text("1 .. ", n, ", the number of points"));
    detail::check<error::config_error>(max_iter >= 1, where, "max_iter", max_iter, "at least 1");
    Clustering now{.label = {}, .centroid = std::move(centroids)};
    std::vector<std::size_t> label(n);
    std::vector<double> distance(n);
    for (bool settled = false; !settled && now.iterations < max_iter; ++now.iterations) {
        std::vector<std::size_t> count(clusters);
        for (std::size_t i = 0; i < n; ++i) {
            for (std::size_t e = 0; e < clusters; ++e) {
                const double to = detail::distance2(points[i], now.centroid[e]);
                if (e > 0 && !(to < distance[i])) continue;
                distance[i] = to;
                label[i] = e;
            }
            ++count[label[i]];
        }
        detail::repair(label, distance, count);
        settled = label == now.label;
        now.label = label;
        now.centroid = Points(clusters, points.dim());
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t c = 0; c < points.dim(); ++c) now.centroid[label[i]][c] += points[i][c];
        for (std::size_t e = 0; e < clusters; ++e)
            for (double& x : now.centroid[e]) x /= static_cast<double>(count[e]);
    }
    for (std::size_t i = 0; i < n; ++i)
        now.inertia += detail::distance2(points[i], now.centroid[now.label[i]]);
    return now;
}

/// The best of several runs of k-means by inertia, clusters numbered by the first point that they contain.
/// @throws config_error for a parameter that is 0; no points: no clusters
[[nodiscard]] inline Clustering k_means(const Points& points, const KMeans& settings) {
    constexpr std::string_view where = "k_means";
    for (const auto& [what, value] :
         {std::pair{"clusters", settings.clusters}, std::pair{"restarts", settings.restarts},
          std::pair{"max_iter", settings.max_iter}})
        detail::check<error::config_error>(value >= 1, where, what, value, "at least 1");
    const std::size_t clusters = std::min(settings.clusters, points.size());
    Clustering best{.label = {}, .centroid = Points(points.dim())};
    if (clusters == 0) return best;
    SplitMix64 random{settings.seed};
    for (std::size_t run = 0; run < settings.restarts; ++run) {
        Points centres(points.dim());
        for (const std::size_t i : detail::choose_centres(points, clusters, random)) centres.add(points[i]);
        Clustering one = lloyd(points, std::move(centres), settings.max_iter);
        if (run == 0 || one.inertia < best.inertia * (1 - 1e-12)) best = std::move(one);
    }
    std::vector<std::size_t> number(clusters, clusters);
    Points centroid(points.dim());
    for (std::size_t& label : best.label) {
        if (number[label] == clusters) {
            number[label] = centroid.size();
            centroid.add(best.centroid[label]);
        }
        label = number[label];
    }
    best.centroid = std::move(centroid);
    return best;
}

/// Up to `count` members of a cluster by their cosine to its centroid, in the order found: the first is the
/// medoid. Of values within 1e-9 of the largest the earlier member counts: a cluster of two always ties.
[[nodiscard]] inline std::vector<std::size_t> nearest_members(const Points& points,
                                                              std::vector<std::size_t> members,
                                                              std::span<const double> centroid,
                                                              std::size_t count) {
    std::vector<double> likeness;
    for (const std::size_t i : members) likeness.push_back(detail::cosine(points[i], centroid));
    std::vector<std::size_t> found;
    while (found.size() < count && !members.empty()) {
        const double enough = *std::max_element(likeness.begin(), likeness.end()) - 1e-9;
        const auto first =
            std::find_if(likeness.begin(), likeness.end(), [&](double x) { return x >= enough; });
        const auto at = members.begin() + (first - likeness.begin());
        found.push_back(*at);
        members.erase(at);
        likeness.erase(first);
    }
    return found;
}

/// How a query meets a centroid: cosine, or the dot product with the centroid as it is, which favours tight
/// clusters.
enum class Likeness : std::uint8_t { cosine, dot };
[[nodiscard]] constexpr auto names_of(Likeness /*any*/) noexcept {
    return std::array<std::string_view, 2>{"cosine", "dot"};
}

/// Likeness of a query of length 1 to every centroid; [E].
[[nodiscard]] inline std::vector<double> likeness_to(const Points& centroids, std::span<const double> query,
                                                     Likeness measure) {
    std::vector<double> likeness(centroids.size());
    for (std::size_t e = 0; e < likeness.size(); ++e)
        likeness[e] = measure == Likeness::cosine ? detail::cosine(query, centroids[e])
                                                  : detail::dot(query, centroids[e]);
    return likeness;
}

}  // namespace kvcull::inline KVCULL_ABI
