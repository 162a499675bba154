#include "kvcull/score/redundancy.hpp"

#include <cmath>
#include <numeric>
#include <vector>

#include "support/catch.hpp"
#include "support/isas.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

/// The definition, with the whole n x n matrix in doubles.
std::vector<double> naive(std::span<const float> keys, std::size_t dim, double threshold, Retain retain) {
    const std::size_t n = keys.size() / dim;
    std::vector<double> unit(keys.begin(), keys.end()), mean(n), similarity(n * n);
    for (std::size_t j = 0; j < n; ++j) {
        double square = 0;
        for (std::size_t c = 0; c < dim; ++c) square += unit[j * dim + c] * unit[j * dim + c];
        for (std::size_t c = 0; c < dim; ++c) unit[j * dim + c] /= std::sqrt(square) + 1e-8;
    }
    for (std::size_t i = 0; i < n; ++i) {
        double* const row = similarity.data() + i * n;
        std::size_t spared = n;
        for (std::size_t j = 0; j < n; ++j) {
            for (std::size_t c = 0; c < dim && j != i; ++c) row[j] += unit[i * dim + c] * unit[j * dim + c];
            if (row[j] > threshold && (spared == n || retain == Retain::last)) spared = j;
        }
        row[spared == n ? 0 : spared] = 0;
        for (std::size_t j = 0; j < n; ++j) mean[j] += row[j] / static_cast<double>(n);
    }
    double sum = 0;
    for (double& x : mean) sum += x = std::exp(x);
    for (double& x : mean) x /= sum;
    return mean;
}
/// From nothing; all NaN where a key is not finite.
std::vector<float> redundancies(const simd::Kernels& kernels, const RowsView& keys, float threshold,
                                Retain retain) {
    const std::size_t n = keys.rows(), dim = keys.dim();
    std::vector<float> out(n, quiet_nan()),
        scratch(std::max(redundancy_scratch(n, dim), link_scratch(n, dim)) + 1, 7.5F);
    std::vector<position_t> position(n);
    std::iota(position.begin(), position.end(), 3);
    KeyLinks links;
    resize_state(links, n);
    if (find_links(kernels, keys, PositionsView(position), {threshold, retain}, links, scratch.data()))
        CHECK(redundancy(kernels, keys, PositionsView(position), links, out, scratch.data()));
    CHECK(same_bits(scratch.back(), 7.5F));
    return out;
}
std::vector<float> redundancies(std::span<const float> keys, std::size_t dim, float threshold = 0.5F,
                                Retain retain = Retain::last) {
    return redundancies(simd::kernels(), RowsView(keys.data(), keys.size() / dim, dim, dim), threshold,
                        retain);
}
bool near(std::span<const float> got, std::span<const double> want) {
    bool good = got.size() == want.size();
    for (std::size_t j = 0; good && j < got.size(); ++j) good = close(got[j], want[j], 1e-4, 1e-7);
    return good;
}
/// Keys around a few directions, which one in `stray` does not follow.
std::vector<float> alike_keys(std::size_t n, std::size_t dim, std::uint64_t seed, float noise,
                              std::size_t stray) {
    const std::vector<float> centres = random_floats(3 * dim, seed);
    std::vector<float> keys = random_floats(n * dim, seed + 1, noise);
    SplitMix64 random{seed + 2};
    for (std::size_t j = 0; j < n; ++j) {
        const std::size_t centre = random() % 3;
        for (std::size_t c = 0; c < dim && random() % stray != 0; ++c)
            keys[j * dim + c] += centres[centre * dim + c];
    }
    return keys;
}

}  // namespace

TEST_CASE("redundancy agrees with the whole matrix in doubles at every size on every instruction set",
          "[differential]") {
    // One tile, its edges, several tiles; keys that all find a link at once, some late, none at all.
    const auto n = GENERATE(std::size_t{1}, 2, 5, 127, 128, 129, 400);
    const auto dim = GENERATE(std::size_t{3}, 16, 33);
    const std::vector<std::vector<float>> kinds{random_floats(n * dim, n + dim),
                                                alike_keys(n, dim, n, 0.3F, 1000000),
                                                alike_keys(n, dim, n + 7, 0.8F, 40)};
    for (const simd::Isa isa : simd::all_isas) {
        if (!simd::available(isa)) continue;
        for (std::size_t kind = 0; kind < kinds.size(); ++kind)
            for (const float threshold : {-1.0F, -0.3F, 0.0F, 0.5F, 0.9F, 1.0F})
                for (const Retain retain : {Retain::last, Retain::first}) {
                    CAPTURE(n, dim, simd::name_of(isa), kind, threshold, retain == Retain::last);
                    const RowsView keys(kinds[kind].data(), n, dim, dim);
                    CHECK(near(redundancies(simd::kernels_for(isa), keys, threshold, retain),
                               naive(kinds[kind], dim, static_cast<double>(threshold), retain)));
                }
    }
}

TEST_CASE("redundancy reads rows of any type, with gaps and in blocks", "[differential]") {
    constexpr std::size_t n = 150, dim = 24, stride = 31, block = 16;
    const std::vector<float> keys = alike_keys(n, dim, 3, 0.7F, 20);
    const std::vector<float16> half = to_float16s(keys);
    const std::vector<float> rounded = to_floats(half);
    const std::vector<float> want = redundancies(rounded, dim);
    CHECK(same_bits(
        redundancies(simd::kernels(), RowsView(half.data(), DType::f16, n, dim, dim), 0.5F, Retain::last),
        want));
    std::vector<float> wide(n * stride, quiet_nan());
    std::vector<const std::byte*> blocks;
    for (std::size_t j = 0; j < n; ++j) {
        std::copy_n(rounded.data() + j * dim, dim, wide.data() + j * stride);
        if (j % block == 0) blocks.push_back(reinterpret_cast<const std::byte*>(wide.data() + j * stride));
    }
    CHECK(
        same_bits(redundancies(simd::kernels(), RowsView(blocks.data(), 0, DType::f32, block, n, dim, stride),
                               0.5F, Retain::last),
                  want));
}

TEST_CASE("redundancy sums to 1, is positive, and does not see the length of a key", "[property]") {
    constexpr std::size_t n = 200, dim = 16;
    std::vector<float> keys = alike_keys(n, dim, 5, 0.5F, 30);
    const std::vector<float> before = redundancies(keys, dim);
    CHECK(std::abs(std::accumulate(before.begin(), before.end(), 0.0) - 1.0) < 1e-5);
    CHECK(std::all_of(before.begin(), before.end(), [](float x) { return x > 0.0F; }));
    for (std::size_t j = 0; j < n; ++j)
        for (std::size_t c = 0; c < dim; ++c) keys[j * dim + c] *= j % 2 == 0 ? 100.0F : 0.03F;
    const std::vector<float> after = redundancies(keys, dim);
    CHECK(near(after, std::vector<double>(before.begin(), before.end())));
}

TEST_CASE("of identical keys the spared one is the least redundant", "[property]") {
    constexpr std::size_t dim = 8;
    std::vector<float> keys(12 * dim);
    for (std::size_t j = 0; j < 12; ++j) keys[j * dim + j % 4 + 1] = 1.0F;  // four groups of three
    for (std::size_t c = 0; c < dim; ++c) keys[5 * dim + c] = keys[8 * dim + c] = keys[10 * dim + c] = c == 0;
    const std::vector<float> last = redundancies(keys, dim),
                             first = redundancies(keys, dim, 0.5F, Retain::first);
    CHECK(last[10] < last[8]);
    CHECK(last[8] <= last[5]);
    CHECK(first[5] < first[8]);
    CHECK(first[8] <= first[10]);
}

TEST_CASE("zero keys repeat nobody, and one key that is not finite makes all unknown", "[property]") {
    constexpr std::size_t n = 140, dim = 8;
    std::vector<float> keys = random_floats(n * dim, 11);
    std::fill_n(keys.begin() + 7 * dim, dim, 0.0F);
    CHECK(near(redundancies(keys, dim), naive(keys, dim, 0.5, Retain::last)));
    const std::vector<float> zeros(n * dim);
    CHECK(near(redundancies(zeros, dim), std::vector<double>(n, 1.0 / n)));
    for (const float bad : {quiet_nan(), negative_infinity()}) {
        std::vector<float> spoiled = keys;
        spoiled[130 * dim + 3] = bad;
        const std::vector<float> got = redundancies(spoiled, dim);
        CHECK(std::all_of(got.begin(), got.end(), [](const float& x) { return is_nan(x); }));
    }
    CHECK(redundancies(std::span<const float>{}, dim).empty());
}
