#include "kvcull/score/link_screen.hpp"

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "support/catch.hpp"
#include "support/isas.hpp"
#include "support/random.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

/// Unit keys. `rest`: what all channels but the first are above a whole number of steps.
std::vector<float> unit_keys(std::size_t count, std::size_t dim, std::uint64_t seed, float rest) {
    std::vector<float> keys = random_floats(count * dim, seed);
    for (std::size_t j = 0; j < count; ++j) {
        float* const key = keys.data() + j * dim;
        for (std::size_t c = 0; rest != 0.0F && c < dim; ++c)
            key[c] = c == 0 ? 127.0F : static_cast<float>(20 + j % 3) + rest;
        double square = 0.0;
        for (std::size_t c = 0; c < dim; ++c)
            square += static_cast<double>(key[c]) * static_cast<double>(key[c]);
        const bool zero = rest == 0.0F && j % 19 == 7;
        for (std::size_t c = 0; c < dim; ++c)
            key[c] = zero ? 0.0F : static_cast<float>(static_cast<double>(key[c]) / std::sqrt(square));
    }
    return keys;
}
/// 0.501 steps in every channel, of keys in steps of the largest channel.
float rest_of(std::span<const float> keys, std::size_t dim) {
    float most = 0.0F;
    for (const float x : keys) most = std::max(most, std::abs(x));
    return 0.501F * most / 127.0F * std::sqrt(static_cast<float>(dim));
}

}  // namespace

TEST_CASE("no product of floats exceeds its bound, which exceeds few by more than it has to",
          "[property][differential]") {
    bool held = true, close = true;
    for (const simd::Isa isa : available_isas()) {
        const simd::Kernels& kernels = simd::kernels_for(isa);
        for (const std::size_t dim : {1U, 3U, 16U, 80U, 128U, 257U})
            for (const std::size_t near_count : {1U, 16U, 17U, 64U, 100U, 128U})
                for (const float rest : {0.0F, 0.49F, -0.49F}) {
                    const std::size_t count = near_count % 7 + 3, tile = std::max(near_count, count);
                    const std::vector<float> near = unit_keys(near_count, dim, 1 + dim, rest),
                                             far = unit_keys(count, dim, 2 + dim, rest);
                    std::vector<float> scaled = far;
                    for (float& x : scaled) x *= 8.0F;
                    std::vector<float> scratch(detail::LinkScreen::scratch(tile, dim) + 1, 7.5F),
                        highest(count);
                    detail::LinkScreen screen(kernels, tile, dim, scratch.data());
                    screen.take_tile(near.data(), near_count);
                    for (std::size_t a = 0; a < count; ++a) screen.take(a, scaled.data() + a * dim, 0.125F);
                    screen.bound(count, highest.data());
                    CHECK(scratch.back() == 7.5F);
                    const float near_rest = rest_of(near, dim);
                    for (std::size_t a = 0; a < count; ++a) {
                        float most = -2.0F;
                        for (std::size_t b = 0; b < near_count; ++b) {
                            float product = 0.0F;
                            kernels.weighted_sum_f32(&far[a * dim], dim, 1, &near[b * dim], 1, dim, 1,
                                                     &product, 1);
                            most = std::max(most, product);
                        }
                        const float own_rest = rest_of(std::span(far).subspan(a * dim, dim), dim);
                        held = held && highest[a] >= most;
                        // Keys of zeros fill a tile up.
                        close = close &&
                                highest[a] <= std::max(most, 0.0F) + 2.1F * (near_rest + own_rest) + 0.003F;
                    }
                    CAPTURE(simd::name_of(isa), dim, near_count, rest);
                    REQUIRE(held);
                    REQUIRE(close);
                }
    }
}
