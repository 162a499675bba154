// Attention over a long head in parts against naive double loops.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "kvcull/attention/parts.hpp"
#include "support/catch.hpp"
#include "support/isas.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

constexpr std::size_t group = 3, dim = 4, value_dim = 5;

/// Attention of one token's rows, part by part.
struct Cut {
    Parts parts;
    std::vector<float> attention, logits, lse, output, part_lse, part_output;

    Cut(const simd::Kernels& kernels, std::span<const float> q, std::span<const float> k,
        std::span<const float> v, const Parts& cut, const LogitRule& rule)
        : parts(cut),
          attention(group * k.size() / dim, 7.0F),
          logits(attention.size()),
          lse(group),
          output(group * value_dim),
          part_lse(cut.count() * group),
          part_output(cut.count() * output.size()) {
        const std::size_t n = k.size() / dim;
        const RowsView keys(k.data(), n, dim, dim), values(v.data(), n, value_dim, value_dim);
        for (std::size_t part = parts.count(); part-- > 0;)
            detail::attend_part(kernels, {q.data(), group, dim}, keys, values, parts.first(part),
                                parts.first(part + 1), rule,
                                {.attention = {attention.data(), group, n},
                                 .lse = {part_lse.data() + part * group, group},
                                 .logits = {logits.data(), group, n},
                                 .output = {part_output.data() + part * output.size(), group, value_dim}});
        detail::merge_parts(parts, {part_lse.data(), parts.count(), group},
                            {part_output.data(), parts.count() * group, value_dim}, true,
                            {.attention = {attention.data(), group, n},
                             .lse = lse,
                             .output = {output.data(), group, value_dim}});
    }
};

}  // namespace

TEST_CASE("the cut covers every row once, in parts of about the usual size that begin at multiples of 64",
          "[property]") {
    for (const std::size_t begin : {0U, 5U, 700U})
        for (const std::size_t n : {0U, 1U, 4096U, 6143U, 6144U, 10239U, 10240U, 100000U}) {
            CAPTURE(begin, n);
            const Parts parts{begin, begin + n};
            REQUIRE(parts.first(0) == begin);
            REQUIRE(parts.first(parts.count()) == begin + n);
            REQUIRE((parts.count() > 1) == (n >= 6144));
            for (std::size_t part = 1; part < parts.count(); ++part) {
                REQUIRE(parts.first(part) % 64 == 0);
                REQUIRE(parts.first(part) > parts.first(part - 1) + 2000);
                REQUIRE(parts.first(part + 1) > parts.first(part) + 2000);
                REQUIRE(parts.first(part + 1) < parts.first(part) + 6300);
            }
        }
}

TEST_CASE("parts merge to attention over all rows", "[differential]") {
    const std::size_t n = 9000;
    const auto q = random_floats(group * dim, 1), k = random_floats(n * dim, 2),
               v = random_floats(n * value_dim, 3);
    for (const simd::Isa isa : available_isas())
        for (const std::size_t begin : {std::size_t{0}, std::size_t{1234}}) {
            CAPTURE(simd::name_of(isa), begin);
            const Cut cut(simd::kernels_for(isa), q, k, v, {begin, n - 3}, 0.7F);
            REQUIRE(cut.parts.count() == 2);
            const std::vector<Visible> visible(group, Visible{0, begin, n - 3});
            const ReferenceAttention want =
                reference_attention(q, k, v, visible, n, dim, value_dim, static_cast<double>(0.7F));
            bool good = true;
            for (std::size_t i = 0; i < group * n; ++i) {
                good = good && close(cut.attention[i], want.attention[i], 1e-4, 1e-9);
                if (i % n >= begin && i % n < n - 3)
                    good = good && close(cut.logits[i], want.logits[i], 1e-4, 1e-5);
            }
            REQUIRE(good);
            for (std::size_t i = 0; i < group; ++i) REQUIRE(close(cut.lse[i], want.lse[i], 1e-5, 1e-5));
            for (std::size_t i = 0; i < group * value_dim; ++i)
                REQUIRE(close(cut.output[i], want.output[i], 1e-4, 1e-5));
        }
}

TEST_CASE("a part that is biased away counts for nothing, and a bad row is bad in all parts", "[property]") {
    const std::size_t n = 8192;
    const auto q = random_floats(group * dim, 4), k = random_floats(n * dim, 5),
               v = random_floats(n * value_dim, 6);
    const auto add = [&](std::size_t row, std::size_t first, std::span<float> logits) {
        for (std::size_t j = 0; j < logits.size(); ++j) {
            if (row == 0 && first + j < 4096) logits[j] = negative_infinity();
            if (row == 1 && first + j == 5000) logits[j] = quiet_nan();
        }
    };
    const Cut cut(simd::kernels(), q, k, v, {0, n}, LogitRule(1.0F, 0.0F, RowBias(add)));
    REQUIRE(cut.parts.first(1) == 4096);
    double late = 0.0;
    bool nothing = true, zeros = true;
    for (std::size_t j = 0; j < n; ++j) {
        if (j < 4096)
            nothing = nothing && same_bits(cut.attention[j], 0.0F);
        else
            late += static_cast<double>(cut.attention[j]);
        zeros = zeros && same_bits(cut.attention[n + j], 0.0F);
    }
    REQUIRE(nothing);
    REQUIRE(zeros);
    REQUIRE(std::abs(late - 1.0) < 1e-4);
    REQUIRE(is_nan(cut.lse[1]));
    for (std::size_t c = 0; c < value_dim; ++c) {
        REQUIRE(is_finite(cut.output[c]));
        REQUIRE(is_nan(cut.output[value_dim + c]));
        REQUIRE(is_finite(cut.output[2 * value_dim + c]));
    }
}
