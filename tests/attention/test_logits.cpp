// Softcap and bias: what becomes of dot products before softmax.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "kvcull/attention/attend.hpp"
#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

TEST_CASE("a softcap is cap * tanh(logit / cap) for small, large and huge logits", "[property]") {
    for (const float cap : {0.5F, 30.0F, 50.0F, 1e4F}) {
        std::vector<float> logits{0.0F,         1e-30F, -1e-6F,      0.29F * cap, 0.3F * cap,
                                  -0.31F * cap, cap,    -9.0F * cap, 3e38F};
        for (const float x : random_floats(500, 7, 2.0F * cap)) logits.push_back(x);
        std::vector<float> capped = logits;
        detail::soft_cap(capped.data(), capped.size(), cap);
        for (std::size_t j = 0; j < logits.size(); ++j) {
            INFO("cap " << cap << ", logit " << logits[j]);
            const double want = cap * std::tanh(static_cast<double>(logits[j]) / static_cast<double>(cap));
            CHECK(close(capped[j], want, 4e-7, 0.0));
        }
    }
}

TEST_CASE("a softcap leaves NaN a NaN and makes infinities finite") {
    std::vector<float> logits{quiet_nan(), std::bit_cast<float>(0x7F800000U),
                              std::bit_cast<float>(0xFF800000U)};
    detail::soft_cap(logits.data(), logits.size(), 20.0F);
    CHECK(is_nan(logits[0]));
    CHECK(logits[1] == 20.0F);
    CHECK(logits[2] == -20.0F);
}

TEST_CASE("attention applies scale, softcap and bias in this order to what each row sees", "[differential]") {
    constexpr std::size_t rows = 3, n = 41, dim = 24, values = 7;
    constexpr float scale = 0.4F, cap = 1.5F;
    const auto q = random_floats(rows * dim, 1), k = random_floats(n * dim, 2),
               v = random_floats(n * values, 3);
    const Visible visible[rows] = {{0, 0, n}, {2, 30, 40}, {0, 5, 17}};
    const auto bias_of = [](std::size_t row, std::size_t j) {
        return 0.1F * static_cast<float>(row) - 0.03F * static_cast<float>(j);
    };
    std::vector<int> asked(rows * n, 0);
    const auto add = [&](std::size_t row, std::size_t first, std::span<float> logits) {
        for (std::size_t j = 0; j < logits.size(); ++j) {
            logits[j] += bias_of(row, first + j);
            ++asked[row * n + first + j];
        }
    };
    std::vector<float> attention(rows * n), logits(rows * n), lse(rows), out(rows * values);
    attend(simd::kernels(), {q.data(), rows, dim}, RowsView(k.data(), n, dim, dim),
           RowsView(v.data(), n, values, values), visible, LogitRule(scale, cap, RowBias(add)),
           {.attention = {attention.data(), rows, n},
            .lse = lse,
            .logits = {logits.data(), rows, n},
            .output = {out.data(), rows, values}});

    for (std::size_t row = 0; row < rows; ++row) {
        std::vector<double> want(n, 0.0), output(values, 0.0);
        double total = 0;
        for (std::size_t j = 0; j < n; ++j) {
            REQUIRE(asked[row * n + j] == (is_visible(visible[row], j) ? 1 : 0));
            if (!is_visible(visible[row], j)) continue;
            double dot = 0;
            for (std::size_t c = 0; c < dim; ++c)
                dot += static_cast<double>(q[row * dim + c]) * static_cast<double>(k[j * dim + c]);
            want[j] = static_cast<double>(cap) *
                          std::tanh(dot * static_cast<double>(scale) / static_cast<double>(cap)) +
                      static_cast<double>(bias_of(row, j));
            CHECK(close(logits[row * n + j], want[j], 1e-5, 1e-6));
            total += std::exp(want[j]);
        }
        CHECK(close(lse[row], std::log(total), 1e-5, 1e-6));
        for (std::size_t j = 0; j < n; ++j)
            if (is_visible(visible[row], j))
                for (std::size_t c = 0; c < values; ++c)
                    output[c] += std::exp(want[j]) / total * static_cast<double>(v[j * values + c]);
        for (std::size_t c = 0; c < values; ++c) CHECK(close(out[row * values + c], output[c], 1e-4, 1e-6));
    }
}

TEST_CASE("ALiBi wants a slope for every query head", "[contract]") {
    const Bias bias = alibi({0.5F, 0.25F});
    const std::vector<position_t> keys{3, 9, 4};
    const PositionsView positions(keys);
    std::vector<float> logits{1.0F, 1.0F};
    bias({0, 1, 9, positions, 1, logits});
    CHECK(logits == std::vector<float>{1.0F, -0.25F});
    CHECK(failure<error::shape_error>([&] {
              bias({0, 2, 9, positions, 0, logits});
          }) == "alibi: slopes.size() is 2, want more than query head 2");
}
