#include "kvcull/simd/kernels.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#    include <sys/mman.h>
#    include <unistd.h>
#endif

#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/isas.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;
using simd::Isa;
using simd::Kernels;

namespace {

constexpr double epsilon = 0x1.0p-24;
const std::vector<std::size_t> lengths{0,  1,  7,  8,  9,  15,  16,  17,  31,  32,
                                       33, 63, 64, 65, 80, 127, 128, 129, 257, 512};

/// A [rows, dim] matrix whose rows lie `stride` apart, one element off every alignment; NaN in the gaps, so
/// that a kernel that reads one of them shows it.
struct Padded {
    std::size_t rows, dim, stride;
    std::vector<float> storage;

    Padded(std::size_t rows_, std::size_t dim_, std::uint64_t seed)
        : rows(rows_), dim(dim_), stride(dim_ + 3), storage(1 + rows_ * stride, quiet_nan()) {
        const std::vector<float> values = random_floats(rows * dim, seed);
        for (std::size_t i = 0; i < values.size(); ++i) row(i / dim)[i % dim] = values[i];
    }
    float* data() { return storage.data() + 1; }
    float* row(std::size_t j) { return data() + j * stride; }
};

/// 16-bit rows: the same numbers rounded to a type, beside their exact floats.
template <class T>
struct Narrow {
    std::vector<T> rows;
    std::vector<float> wide;

    explicit Narrow(const std::vector<float>& values) {
        for (const float x : values) {
            if constexpr (std::is_same_v<T, float16>)
                rows.push_back(to_float16(x));
            else
                rows.push_back(to_bfloat16(x));
            wide.push_back(to_float(rows.back()));
        }
    }
};

std::vector<Isa> compiled_isas() {
    std::vector<Isa> isas;
    std::copy_if(simd::all_isas.begin(), simd::all_isas.end(), std::back_inserter(isas), simd::compiled);
    return isas;
}

/// The kernels of every instruction set that this machine has, one after the other.
const Kernels& any_kernels() {
    return simd::kernels_for(GENERATE(from_range(available_isas())));
}

}  // namespace

TEST_CASE("an instruction set is found by its name, and an unknown name lists the known ones", "[contract]") {
    for (const Isa isa : simd::all_isas) REQUIRE(simd::parse_isa(simd::name_of(isa)) == isa);
    const std::string message = failure<error::config_error>([] { (void)simd::parse_isa("sse9"); });
    REQUIRE_THAT(message, contains_text("sse9"));
    for (const Isa isa : simd::all_isas)
        REQUIRE_THAT(message, contains_text(std::string(simd::name_of(isa))));
}

TEST_CASE("a cap lowers the choice and never raises it", "[contract]") {
    const auto capped = [](Isa best, Isa cap) {
        return simd::capped(best, std::string(simd::name_of(cap)).c_str());
    };
    const std::vector<Isa> isas = compiled_isas();
    for (const Isa best : isas) {
        REQUIRE(simd::capped(best, nullptr) == best);
        REQUIRE(simd::capped(best, "") == best);
        REQUIRE_THROWS_AS(simd::capped(best, "fast"), error::config_error);
        for (const Isa cap : isas) REQUIRE(capped(best, cap) == std::min(best, cap));
    }
    REQUIRE(isas.front() == Isa::scalar);
}

TEST_CASE("an instruction set of another architecture has a name, and its kernels are refused",
          "[contract]") {
    std::size_t foreign = 0;
    for (const Isa isa : simd::all_isas) {
        if (simd::compiled(isa)) continue;
        ++foreign;
        const std::string name(simd::name_of(isa));
        REQUIRE(simd::capped(Isa::scalar, name.c_str()) == isa);
        REQUIRE(failure<error::config_error>([&] { (void)simd::kernels_for(isa); }) ==
                "kernels_for: isa is " + name + ", want one that this machine has");
    }
    REQUIRE(foreign != 0);
}

TEST_CASE("the table in use is available and carries its own name", "[contract]") {
    REQUIRE(simd::kernels().isa <= simd::detect());
    REQUIRE(&simd::kernels() == &simd::kernels());
    for (const Isa isa : simd::all_isas) {
        if (simd::available(isa))
            REQUIRE(simd::kernels_for(isa).isa == isa);
        else
            REQUIRE_THROWS_AS(simd::kernels_for(isa), error::config_error);
    }
}

TEST_CASE("this machine can test every instruction set of this build", "[contract]") {
    for (const Isa isa : compiled_isas())
        if (!simd::available(isa)) KVCULL_SKIP("no kernels are tested for " << simd::name_of(isa));
}

TEST_CASE("dots agree with a double reference for every dim, group and number of rows", "[differential]") {
    const Kernels& kernels = any_kernels();
    for (const std::size_t dim : lengths) {
        for (const std::size_t group : {1U, 2U, 3U, 4U, 5U, 7U, 28U}) {
            for (const std::size_t rows : {0U, 1U, 2U, 3U, 7U, 8U, 9U, 17U, 65U}) {
                Padded q(group, dim, 1), k(rows, dim, 2);
                const std::size_t out_stride = rows + 2;
                std::vector<float> out(group * out_stride, 42.0F);
                kernels.dots_f32(q.data(), q.stride, group, k.data(), k.stride, rows, dim, 0.25F, out.data(),
                                 out_stride);
                CAPTURE(simd::name_of(kernels.isa), dim, group, rows);
                bool good = true;
                for (std::size_t g = 0; g < group; ++g) {
                    for (std::size_t j = 0; j < rows; ++j) {
                        double sum = 0, size = 0;
                        for (std::size_t c = 0; c < dim; ++c) {
                            const double term =
                                static_cast<double>(q.row(g)[c]) * static_cast<double>(k.row(j)[c]);
                            sum += term;
                            size += std::abs(term);
                        }
                        const double bound = (static_cast<double>(dim) / 8 + 4) * epsilon * size * 0.25;
                        good = good && close(out[g * out_stride + j], sum * 0.25, 0, bound + 1e-30);
                    }
                    good = good && out[g * out_stride + rows] == 42.0F &&
                           out[g * out_stride + rows + 1] == 42.0F;
                }
                REQUIRE(good);
            }
        }
    }
}

TEST_CASE("a dot depends neither on the group, nor on the rows beside it, nor on where a call is split",
          "[property]") {
    const Kernels& kernels = any_kernels();
    for (const std::size_t dim : {1U, 8U, 13U, 80U, 128U}) {
        // Tiles of four and three queries, or five; more than one chunk of rows at dim 128.
        const std::size_t group = GENERATE(11U, 13U), rows = 150;
        Padded q(group, dim, 3), k(rows, dim, 4);
        const Narrow<float16> half(random_floats(rows * dim, 5));
        const Narrow<bfloat16> brain(random_floats(rows * dim, 5));
        std::vector<float> all(group * rows), all_half(group * rows), all_brain(group * rows), one(1);
        kernels.dots_f32(q.data(), q.stride, group, k.data(), k.stride, rows, dim, 0.3F, all.data(), rows);
        kernels.dots_f16(q.data(), q.stride, group, half.rows.data(), dim, rows, dim, 0.3F, all_half.data(),
                         rows);
        kernels.dots_bf16(q.data(), q.stride, group, brain.rows.data(), dim, rows, dim, 0.3F,
                          all_brain.data(), rows);
        CAPTURE(simd::name_of(kernels.isa), dim);
        bool same = true;
        for (std::size_t g = 0; g < group; ++g) {
            for (std::size_t j = 0; j < rows; ++j) {
                kernels.dots_f32(q.row(g), q.stride, 1, k.row(j), k.stride, 1, dim, 0.3F, one.data(), 1);
                same = same && same_bits(one[0], all[g * rows + j]);
                kernels.dots_f16(q.row(g), q.stride, 1, half.rows.data() + j * dim, dim, 1, dim, 0.3F,
                                 one.data(), 1);
                same = same && same_bits(one[0], all_half[g * rows + j]);
                kernels.dots_bf16(q.row(g), q.stride, 1, brain.rows.data() + j * dim, dim, 1, dim, 0.3F,
                                  one.data(), 1);
                same = same && same_bits(one[0], all_brain[g * rows + j]);
            }
        }
        REQUIRE(same);
        for (const std::size_t split : {1U, 5U, 64U, 149U}) {
            std::vector<float> parts(group * rows);
            kernels.dots_f32(q.data(), q.stride, group, k.data(), k.stride, split, dim, 0.3F, parts.data(),
                             rows, k.row(split));
            kernels.dots_f32(q.data(), q.stride, group, k.row(split), k.stride, rows - split, dim, 0.3F,
                             parts.data() + split, rows);
            REQUIRE(same_bits(parts, all));
        }
    }
}

TEST_CASE("distances agree with a double reference for every dim, group and number of rows",
          "[differential]") {
    const Kernels& kernels = any_kernels();
    for (const std::size_t dim : lengths) {
        for (const std::size_t group : {1U, 2U, 3U, 4U, 5U, 7U, 28U}) {
            for (const std::size_t rows : {0U, 1U, 2U, 3U, 7U, 8U, 9U, 65U, 150U}) {
                Padded o(group, dim, 21), v(rows, dim, 22), z(group, rows, 23);
                for (const bool stretched : {false, true}) {
                    const std::size_t out_stride = rows + 1;
                    std::vector<float> out(group * out_stride, 42.0F);
                    kernels.distances_f32(o.data(), o.stride, group, v.data(), v.stride, rows, dim,
                                          stretched ? z.data() : nullptr, z.stride, out.data(), out_stride);
                    CAPTURE(simd::name_of(kernels.isa), dim, group, rows, stretched);
                    bool good = true;
                    for (std::size_t g = 0; g < group; ++g) {
                        for (std::size_t j = 0; j < rows; ++j) {
                            double sum = 0, size = 0;
                            for (std::size_t c = 0; c < dim; ++c) {
                                const double value = static_cast<double>(v.row(j)[c]);
                                const double apart = value - static_cast<double>(o.row(g)[c]);
                                const double factor = static_cast<double>(z.row(g)[j]);
                                const double term = stretched ? value + factor * apart : apart;
                                const double parts = stretched
                                                         ? std::abs(value) + 2 * std::abs(factor * apart)
                                                         : std::abs(apart);
                                sum += term * term;
                                size += parts * parts;
                            }
                            const double bound = (static_cast<double>(dim) / 8 + 8) * epsilon * size;
                            good = good && out[g * out_stride + j] >= 0 &&
                                   close(out[g * out_stride + j], sum, 0, bound + 1e-30);
                        }
                        good = good && out[g * out_stride + rows] == 42.0F;
                    }
                    REQUIRE(good);
                }
            }
        }
    }
}

TEST_CASE("a distance depends neither on the group, nor on where a call is split, nor on the row's type",
          "[property]") {
    const Kernels& kernels = any_kernels();
    for (const std::size_t dim : {1U, 8U, 13U, 80U, 128U}) {
        constexpr std::size_t group = 11, rows = 150;
        const std::vector<float> o = random_floats(group * dim, 24), z = random_floats(group * rows, 25);
        const Narrow<float16> half(random_floats(rows * dim, 26));
        const Narrow<bfloat16> brain(random_floats(rows * dim, 26));
        CAPTURE(simd::name_of(kernels.isa), dim);
        for (const float* factors : {static_cast<const float*>(nullptr), z.data()}) {
            const auto all = [&](const auto& distances, const auto& v) {
                std::vector<float> out(group * rows);
                distances(o.data(), dim, group, v.data(), dim, rows, dim, factors, rows, out.data(), rows);
                return out;
            };
            const auto one_by_one = [&](const auto& distances, const auto& v) {
                std::vector<float> out(group * rows);
                for (std::size_t i = 0; i < group * rows; ++i)
                    distances(o.data() + i / rows * dim, dim, 1, v.data() + i % rows * dim, dim, 1, dim,
                              factors == nullptr ? nullptr : factors + i, rows, &out[i], 1);
                return out;
            };
            REQUIRE(same_bits(all(kernels.distances_f16, half.rows), all(kernels.distances_f32, half.wide)));
            REQUIRE(
                same_bits(all(kernels.distances_bf16, brain.rows), all(kernels.distances_f32, brain.wide)));
            REQUIRE(same_bits(one_by_one(kernels.distances_f32, half.wide),
                              all(kernels.distances_f32, half.wide)));
            REQUIRE(same_bits(one_by_one(kernels.distances_bf16, brain.rows),
                              all(kernels.distances_bf16, brain.rows)));
        }
    }
}

TEST_CASE("16-bit rows give what their widened copy gives, bit for bit", "[property]") {
    const Kernels& kernels = any_kernels();
    constexpr std::size_t rows = 19;
    for (const std::size_t dim : lengths) {
        for (const std::size_t group : {1U, 2U, 3U, 4U, 7U}) {
            const Narrow<float16> half(random_floats(rows * dim, 6));
            const Narrow<bfloat16> brain(random_floats(rows * dim, 6));
            const std::vector<float> q = random_floats(group * dim, 7), w = random_floats(group * rows, 8);
            const auto logits = [&](const auto& dots, const auto& k) {
                std::vector<float> out(group * rows);
                dots(q.data(), dim, group, k.data(), dim, rows, dim, 0.5F, out.data(), rows);
                return out;
            };
            const auto output = [&](const auto& weighted_sum, const auto& v) {
                std::vector<float> out(group * dim, 0.5F);
                weighted_sum(w.data(), rows, group, v.data(), dim, rows, dim, out.data(), dim);
                return out;
            };
            CAPTURE(simd::name_of(kernels.isa), dim, group);
            REQUIRE(same_bits(logits(kernels.dots_f16, half.rows), logits(kernels.dots_f32, half.wide)));
            REQUIRE(same_bits(logits(kernels.dots_bf16, brain.rows), logits(kernels.dots_f32, brain.wide)));
            REQUIRE(same_bits(output(kernels.weighted_sum_f16, half.rows),
                              output(kernels.weighted_sum_f32, half.wide)));
            REQUIRE(same_bits(output(kernels.weighted_sum_bf16, brain.rows),
                              output(kernels.weighted_sum_f32, brain.wide)));
        }
    }
}

KVCULL_PRECISE_BEGIN
TEST_CASE("AVX2 and NEON give the same bits: eight lanes of fused multiply-adds and one tree over them",
          "[differential]") {
    const Kernels& kernels = any_kernels();
    if (kernels.isa != Isa::avx2 && kernels.isa != Isa::neon) return;
    const auto sum_channels = [](std::size_t dim, const auto& add) {
        float lane[8] = {};
        for (std::size_t c = 0; c < dim; ++c) lane[c % 8] = add(c, lane[c % 8]);
        return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
    };
    constexpr std::size_t group = 3, rows = 10;
    for (const std::size_t dim : lengths) {
        const std::vector<float> q = random_floats(group * dim, 27), k = random_floats(rows * dim, 28);
        const std::vector<float> w = random_floats(group * rows, 29);
        std::vector<float> logits(group * rows), apart(logits), stretched(logits), sums(group * dim);
        kernels.dots_f32(q.data(), dim, group, k.data(), dim, rows, dim, 0.3F, logits.data(), rows);
        kernels.distances_f32(q.data(), dim, group, k.data(), dim, rows, dim, nullptr, 0, apart.data(), rows);
        kernels.distances_f32(q.data(), dim, group, k.data(), dim, rows, dim, w.data(), rows,
                              stretched.data(), rows);
        kernels.weighted_sum_f32(w.data(), rows, group, k.data(), dim, rows, dim, sums.data(), dim);
        bool same = true;
        for (std::size_t i = 0; i < group * rows; ++i) {
            const float* query = q.data() + i / rows * dim;
            const float* row = k.data() + i % rows * dim;
            const float logit =
                sum_channels(dim, [&](std::size_t c, float sum) { return std::fma(query[c], row[c], sum); });
            const float distance = sum_channels(dim, [&](std::size_t c, float sum) {
                const float term = row[c] - query[c];
                return std::fma(term, term, sum);
            });
            const float stretch = sum_channels(dim, [&](std::size_t c, float sum) {
                const float term = std::fma(w[i], row[c] - query[c], row[c]);
                return std::fma(term, term, sum);
            });
            same = same && same_bits(logits[i], logit * 0.3F) && same_bits(apart[i], distance) &&
                   same_bits(stretched[i], stretch);
        }
        for (std::size_t i = 0; i < group * dim; ++i) {
            float sum = 0;
            for (std::size_t j = 0; j < rows; ++j)
                sum = std::fma(w[i / dim * rows + j], k[j * dim + i % dim], sum);
            same = same && same_bits(sums[i], sum);
        }
        CAPTURE(simd::name_of(kernels.isa), dim);
        REQUIRE(same);
    }
}
KVCULL_PRECISE_END

TEST_CASE("rows with gaps give what rows without gaps give, bit for bit", "[property]") {
    const Kernels& kernels = any_kernels();
    for (const std::size_t dim : {8U, 24U, 33U, 128U}) {
        constexpr std::size_t rows = 37, group = 4;
        Padded gaps(rows, dim, 9);
        std::vector<float> dense;
        for (std::size_t j = 0; j < rows; ++j) dense.insert(dense.end(), gaps.row(j), gaps.row(j) + dim);
        const std::vector<float> q = random_floats(group * dim, 10), w = random_floats(group * rows, 11);
        const auto both = [&](const float* x, std::size_t stride) {
            std::vector<float> out(group * (rows + dim));
            kernels.dots_f32(q.data(), dim, group, x, stride, rows, dim, 1.0F, out.data(), rows);
            kernels.weighted_sum_f32(w.data(), rows, group, x, stride, rows, dim, out.data() + group * rows,
                                     dim);
            return out;
        };
        REQUIRE(same_bits(both(gaps.data(), gaps.stride), both(dense.data(), dim)));
    }
}

TEST_CASE("weighted sums agree with a double reference for every dim, group and number of rows",
          "[differential]") {
    const Kernels& kernels = any_kernels();
    for (const std::size_t dim : lengths) {
        for (const std::size_t group : {1U, 2U, 3U, 4U, 5U, 7U, 28U}) {
            for (const std::size_t rows : {0U, 1U, 7U, 8U, 9U, 65U}) {
                Padded w(group, rows, 9), v(rows, dim, 10), out(group, dim, 11);
                const Padded before = out;
                kernels.weighted_sum_f32(w.data(), w.stride, group, v.data(), v.stride, rows, dim, out.data(),
                                         out.stride);
                CAPTURE(simd::name_of(kernels.isa), dim, group, rows);
                bool good = true;
                for (std::size_t g = 0; g < group; ++g) {
                    for (std::size_t c = 0; c < out.stride; ++c) {
                        const float start = before.storage[1 + g * before.stride + c];
                        if (c >= dim) {
                            good = good && same_bits(out.row(g)[c], start);
                            continue;
                        }
                        double sum = static_cast<double>(start), size = std::abs(sum);
                        for (std::size_t j = 0; j < rows; ++j) {
                            const double term =
                                static_cast<double>(w.row(g)[j]) * static_cast<double>(v.row(j)[c]);
                            sum += term;
                            size += std::abs(term);
                        }
                        good = good &&
                               close(out.row(g)[c], sum, 0, (static_cast<double>(rows) + 2) * epsilon * size);
                    }
                }
                REQUIRE(good);
            }
        }
    }
}

TEST_CASE("a weighted sum depends neither on the group nor on where its rows are split", "[property]") {
    const Kernels& kernels = any_kernels();
    for (const std::size_t dim : {1U, 8U, 13U, 40U, 128U}) {
        constexpr std::size_t group = 11, rows = 150;
        const std::vector<float> w = random_floats(group * rows, 12), v = random_floats(rows * dim, 13);
        std::vector<float> all(group * dim);
        kernels.weighted_sum_f32(w.data(), rows, group, v.data(), dim, rows, dim, all.data(), dim);
        CAPTURE(simd::name_of(kernels.isa), dim);
        for (const std::size_t split : {1U, 5U, 64U, 149U}) {
            std::vector<float> parts(group * dim);
            kernels.weighted_sum_f32(w.data(), rows, group, v.data(), dim, split, dim, parts.data(), dim);
            kernels.weighted_sum_f32(w.data() + split, rows, group, v.data() + split * dim, dim, rows - split,
                                     dim, parts.data(), dim);
            REQUIRE(same_bits(parts, all));
        }
        std::vector<float> apart(group * dim);
        for (std::size_t g = 0; g < group; ++g)
            kernels.weighted_sum_f32(w.data() + g * rows, rows, 1, v.data(), dim, rows, dim,
                                     apart.data() + g * dim, dim);
        REQUIRE(same_bits(apart, all));
    }
}

#if defined(__linux__)
TEST_CASE("no kernel touches the page behind its last element", "[property]") {
    const Kernels& kernels = any_kernels();
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    void* const memory = mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    char* const end = static_cast<char*>(memory) + page;
    REQUIRE(mprotect(end, page, PROT_NONE) == 0);
    for (const std::size_t dim : {1U, 3U, 8U, 12U, 15U, 31U}) {
        constexpr std::size_t rows = 9, group = 4;
        float* const f32 = reinterpret_cast<float*>(end) - rows * dim;
        float16* const f16 = reinterpret_cast<float16*>(end) - rows * dim;
        float* const row = reinterpret_cast<float*>(end) - dim;
        const std::vector<float> q = random_floats(group * dim, 14);
        std::vector<float> logits(group * rows), out(group * dim), wide(rows * dim), q_copy = q;
        std::fill_n(f32, rows * dim, 0.5F);
        kernels.dots_f32(q.data(), dim, group, f32, dim, rows, dim, 1.0F, logits.data(), rows);
        kernels.weighted_sum_f32(logits.data(), rows, group, f32, dim, rows, dim, out.data(), dim);
        kernels.distances_f32(q.data(), dim, group, f32, dim, rows, dim, wide.data(), 0, logits.data(), rows);
        kernels.dots_f32(row, dim, 1, wide.data(), dim, rows, dim, 1.0F, logits.data(), rows);
        kernels.weighted_sum_f32(logits.data(), rows, 1, wide.data(), dim, rows, dim, row, dim);
        kernels.add(row, q.data(), dim);
        kernels.maximum(row, q.data(), dim);
        kernels.add_squares(q_copy.data(), f32, dim, f32, dim, f32, dim, rows, dim);
        kernels.add_squares(row, q.data(), dim, nullptr, 0, q.data(), 0, group, dim);
        (void)kernels.expand_squares(row, row, row, 1.0F, dim);
        kernels.odds(row, row, dim, 0.5F);
        float lse = 0;
        kernels.softmax(row, dim, &lse);
        std::fill_n(f16, rows * dim, float16{0x3800});
        kernels.dots_f16(q.data(), dim, group, f16, dim, rows, dim, 1.0F, logits.data(), rows);
        kernels.weighted_sum_f16(logits.data(), rows, group, f16, dim, rows, dim, out.data(), dim);
        kernels.distances_f16(q.data(), dim, group, f16, dim, rows, dim, nullptr, 0, logits.data(), rows);
        kernels.widen_f16(f16, wide.data(), rows * dim);
        kernels.narrow_f16(wide.data(), f16, rows * dim);
        REQUIRE(to_float(f16[rows * dim - 1]) == 0.5F);
        bfloat16* const bf16 = reinterpret_cast<bfloat16*>(end) - rows * dim;
        kernels.narrow_bf16(wide.data(), bf16, rows * dim);
        kernels.dots_bf16(q.data(), dim, group, bf16, dim, rows, dim, 1.0F, logits.data(), rows);
        kernels.weighted_sum_bf16(logits.data(), rows, group, bf16, dim, rows, dim, out.data(), dim);
        kernels.distances_bf16(q.data(), dim, group, bf16, dim, rows, dim, nullptr, 0, logits.data(), rows);
        kernels.widen_bf16(bf16, wide.data(), rows * dim);
        REQUIRE(wide[rows * dim - 1] == 0.5F);
        const std::size_t groups = (dim + 31) / 32;
        int8_group* const int8 = reinterpret_cast<int8_group*>(end) - rows * groups;
        int4_group* const int4 = reinterpret_cast<int4_group*>(end) - rows * groups;
        for (std::size_t j = 0; j < rows; ++j) kernels.narrow_int8(q.data(), int8 + j * groups, dim);
        kernels.widen_int8(int8, groups, rows, dim, wide.data(), dim, nullptr);
        for (std::size_t j = 0; j < rows; ++j) kernels.narrow_int4(q.data(), int4 + j * groups, dim);
        kernels.widen_int4(int4, groups, rows, dim, wide.data(), dim, nullptr);
        REQUIRE(is_finite(wide[rows * dim - 1]));
    }
    munmap(memory, 2 * page);
}
#endif

TEST_CASE("softmax agrees with a double reference and gives the log-sum-exp", "[differential]") {
    const Kernels& kernels = any_kernels();
    std::vector<std::size_t> sizes = lengths;
    sizes.insert(sizes.end(), {511, 513, 519, 520, 521, 1023, 1024, 1025, 1030, 1039, 1040, 2050});
    for (const std::size_t n : sizes) {
        for (const float scale : {0.1F, 3.0F, 30.0F}) {
            std::vector<float> row = random_floats(n + 2, 15, scale);
            const std::vector<float> logits = row;
            float lse = 42.0F;
            kernels.softmax(row.data(), n, &lse);
            CAPTURE(simd::name_of(kernels.isa), n, scale);
            REQUIRE(same_bits(row[n], logits[n]));
            REQUIRE(same_bits(row[n + 1], logits[n + 1]));
            if (n == 0) {
                REQUIRE(same_bits(lse, negative_infinity()));
                continue;
            }
            double largest = -1e300, sum = 0;
            for (std::size_t j = 0; j < n; ++j) largest = std::max(largest, static_cast<double>(logits[j]));
            for (std::size_t j = 0; j < n; ++j) sum += std::exp(static_cast<double>(logits[j]) - largest);
            REQUIRE(close(lse, largest + std::log(sum), 1e-6, 1e-6));
            bool good = true;
            for (std::size_t j = 0; j < n; ++j) {
                const double distance = largest - static_cast<double>(logits[j]);
                // the difference to the maximum is itself rounded; weights below 2^-126 may be flushed to 0
                good = good && close(row[j], std::exp(-distance) / sum, (10 + distance) * epsilon, 1.2e-38);
            }
            REQUIRE(good);
        }
    }
}

TEST_CASE("the exponential inside softmax stays within a few roundings over its whole range",
          "[differential]") {
    const Kernels& kernels = any_kernels();
    constexpr std::size_t n = 20000;
    std::vector<float> row(n);
    for (std::size_t j = 0; j < n; ++j) row[j] = -87.3F * static_cast<float>(j) / static_cast<float>(n);
    const std::vector<float> logits = row;
    float lse = 0;
    kernels.softmax(row.data(), n, &lse);
    double sum = 0;
    for (const float x : logits) sum += std::exp(static_cast<double>(x));
    // The largest logit is 0, so differences are exact. Weights that end below 2^-126 lose bits: leave them
    // out.
    for (std::size_t j = 0; j < n; ++j) {
        const double wanted = std::exp(static_cast<double>(logits[j])) / sum;
        if (wanted < 1e-37) continue;
        if (!close(row[j], wanted, 5 * epsilon, 0)) {
            CAPTURE(simd::name_of(kernels.isa), j, logits[j], row[j], wanted);
            FAIL("weight too far off");
        }
    }
}

TEST_CASE("a long row of equal logits keeps its full precision", "[property]") {
    const Kernels& kernels = any_kernels();
    constexpr std::size_t n = 200003;
    std::vector<float> row(n, 7.0F);
    float lse = 42.0F;
    kernels.softmax(row.data(), n, &lse);
    REQUIRE(close(lse, 7.0 + std::log(static_cast<double>(n)), 1e-7, 0));
    bool good = true;
    for (const float x : row) good = good && close(x, 1.0 / static_cast<double>(n), 2e-7, 0);
    REQUIRE(good);
}

TEST_CASE("one NaN or +Inf anywhere makes a row bad: zeros and a NaN", "[property]") {
    const Kernels& kernels = any_kernels();
    const float positive_infinity = std::bit_cast<float>(0x7F800000U);
    const float signed_nan = std::bit_cast<float>(0xFFC12345U);
    for (const std::size_t n : {1U, 7U, 8U, 9U, 17U, 520U}) {
        for (std::size_t at = 0; at < n; at += n < 20 ? 1 : 37) {
            for (const float& bad : {quiet_nan(), signed_nan, positive_infinity}) {
                std::vector<float> row = random_floats(n, 16);
                row[at] = bad;
                float lse = 42.0F;
                kernels.softmax(row.data(), n, &lse);
                CAPTURE(simd::name_of(kernels.isa), n, at);
                REQUIRE(is_nan(lse));
                REQUIRE(same_bits(row, std::vector<float>(n, 0.0F)));
            }
        }
    }
}

TEST_CASE("a -Inf logit has weight 0 and changes nothing else; only -Inf gives zeros and -Inf",
          "[property]") {
    const Kernels& kernels = any_kernels();
    for (const std::size_t n : {1U, 7U, 8U, 9U, 17U, 520U}) {
        std::vector<float> row(n, negative_infinity());
        float lse = 42.0F;
        kernels.softmax(row.data(), n, &lse);
        REQUIRE(same_bits(lse, negative_infinity()));
        REQUIRE(same_bits(row, std::vector<float>(n, 0.0F)));
        if (n == 1) continue;
        for (std::size_t at = 0; at < n; at += n < 20 ? 1 : 37) {
            row = random_floats(n, 17);
            row[at] = -1e30F;  // far below: weight 0 as well
            std::vector<float> infinite = row;
            infinite[at] = negative_infinity();
            float far_lse = 42.0F;
            kernels.softmax(row.data(), n, &far_lse);
            float infinite_lse = 42.0F;
            kernels.softmax(infinite.data(), n, &infinite_lse);
            CAPTURE(simd::name_of(kernels.isa), n, at);
            REQUIRE(infinite[at] == 0.0F);
            REQUIRE(same_bits(infinite_lse, far_lse));
            REQUIRE(same_bits(infinite, row));
        }
    }
}

TEST_CASE("softmax takes logits at the ends of the range of float", "[property]") {
    const Kernels& kernels = any_kernels();
    std::vector<float> row{3e38F, -3e38F, 3e38F};
    float lse = 0;
    kernels.softmax(row.data(), row.size(), &lse);
    REQUIRE(lse == 3e38F);
    REQUIRE(row == std::vector<float>{0.5F, 0.0F, 0.5F});
}

TEST_CASE("add and maximum do what they say, and no more than n entries of it", "[differential]") {
    const Kernels& kernels = any_kernels();
    for (const std::size_t n : lengths) {
        const std::vector<float> x = random_floats(n + 1, 18), start = random_floats(n + 1, 19);
        std::vector<float> sum = start, largest = start;
        kernels.add(sum.data(), x.data(), n);
        kernels.maximum(largest.data(), x.data(), n);
        bool good = sum[n] == start[n] && largest[n] == start[n];
        for (std::size_t j = 0; j < n; ++j) {
            const float wanted = x[j] + start[j];
            good = good && sum[j] == wanted && largest[j] == std::max(x[j], start[j]);
        }
        CAPTURE(simd::name_of(kernels.isa), n);
        REQUIRE(good);
    }
}

TEST_CASE("adding rows at once gives what adding them one after the other gives, bit for bit", "[property]") {
    const Kernels& kernels = any_kernels();
    for (const std::size_t n : lengths) {
        for (const std::size_t rows : {0U, 1U, 4U, 7U, 8U, 9U, 30U}) {
            Padded x(rows, n, 22);
            const std::vector<float> start = random_floats(n + 1, 23);
            std::vector<float> at_once = start, one_by_one = start;
            kernels.add_rows(at_once.data(), x.data(), x.stride, rows, n);
            for (std::size_t r = 0; r < rows; ++r)
                for (std::size_t j = 0; j < n; ++j) one_by_one[j] += x.row(r)[j];
            CAPTURE(simd::name_of(kernels.isa), n, rows);
            REQUIRE(same_bits(at_once, one_by_one));
        }
    }
}

TEST_CASE(
    "squares agree with a double reference for every length and number of rows, with and without factors",
    "[differential]") {
    const Kernels& kernels = any_kernels();
    for (const std::size_t n : lengths) {
        for (const std::size_t rows : {0U, 1U, 2U, 4U, 7U, 9U}) {
            Padded a(rows, n, 24), z(rows, n, 25), d(rows, n, 26);
            const std::vector<float> start = random_floats(n + 1, 27);
            struct Factors {
                bool z, d, shared;  // shared: one row of d for all
            };
            for (const Factors& with :
                 {Factors{false, false, false}, Factors{true, false, false}, Factors{false, true, false},
                  Factors{true, true, false}, Factors{false, true, true}, Factors{true, true, true}}) {
                if (with.shared && rows == 0) continue;
                std::vector<float> out = start;
                kernels.add_squares(out.data(), a.data(), a.stride, with.z ? z.data() : nullptr, z.stride,
                                    with.d ? d.data() : nullptr, with.shared ? 0 : d.stride, rows, n);
                CAPTURE(simd::name_of(kernels.isa), n, rows, with.z, with.d, with.shared);
                bool good = same_bits(out[n], start[n]);
                for (std::size_t j = 0; j < n; ++j) {
                    double sum = static_cast<double>(start[j]), size = std::abs(sum);
                    for (std::size_t r = 0; r < rows; ++r) {
                        double factor = static_cast<double>(a.row(r)[j]);
                        if (with.z) factor *= static_cast<double>(z.row(r)[j]);
                        double term = factor * factor;
                        if (with.d) term *= static_cast<double>(d.row(with.shared ? 0 : r)[j]);
                        sum += term;
                        size += std::abs(term);
                    }
                    good = good && close(out[j], sum, 0, (static_cast<double>(rows) + 5) * epsilon * size);
                }
                REQUIRE(good);
            }
        }
    }
}

TEST_CASE("squares of rows at once are those of rows one after the other, bit for bit", "[property]") {
    const Kernels& kernels = any_kernels();
    for (const std::size_t n : lengths) {
        constexpr std::size_t rows = 7;
        Padded a(rows, n, 28), z(rows, n, 29), d(rows, n, 30);
        const std::vector<float> start = random_floats(n, 31);
        std::vector<float> at_once = start, one_by_one = start, in_parts = start;
        kernels.add_squares(at_once.data(), a.data(), a.stride, z.data(), z.stride, d.data(), d.stride, rows,
                            n);
        for (std::size_t r = 0; r < rows; ++r)
            kernels.add_squares(one_by_one.data(), a.row(r), 0, z.row(r), 0, d.row(r), 0, 1, n);
        const std::size_t split = n / 3;
        kernels.add_squares(in_parts.data(), a.data(), a.stride, z.data(), z.stride, d.data(), d.stride, rows,
                            split);
        kernels.add_squares(in_parts.data() + split, a.data() + split, a.stride, z.data() + split, z.stride,
                            d.data() + split, d.stride, rows, n - split);
        CAPTURE(simd::name_of(kernels.isa), n);
        REQUIRE(same_bits(at_once, one_by_one));
        REQUIRE(same_bits(at_once, in_parts));
    }
}

TEST_CASE("a weight of zero adds nothing, whatever its factors are; a tiny one and a NaN count",
          "[property]") {
    const Kernels& kernels = any_kernels();
    const float infinity = std::bit_cast<float>(0x7F800000U), tiny = std::bit_cast<float>(1U);
    for (const std::size_t n : {1U, 7U, 8U, 9U, 15U, 16U, 17U, 33U}) {
        for (std::size_t at = 0; at < n; ++at) {
            for (const float& bad : {quiet_nan(), infinity, -infinity}) {
                for (const float& zero : {0.0F, -0.0F}) {
                    std::vector<float> a = random_floats(n, 32), z = random_floats(n, 33),
                                       d = random_floats(n, 34), out = random_floats(n, 35);
                    const std::vector<float> before = out;
                    a[at] = zero;
                    z[at] = d[at] = 0.0F;
                    std::vector<float> wanted = out;
                    kernels.add_squares(wanted.data(), a.data(), n, z.data(), n, d.data(), n, 1, n);
                    z[at] = d[at] = bad;
                    kernels.add_squares(out.data(), a.data(), n, z.data(), n, d.data(), n, 1, n);
                    CAPTURE(simd::name_of(kernels.isa), n, at);
                    REQUIRE(same_bits(out, wanted));
                    REQUIRE(same_bits(out[at], before[at]));
                    a[at] = tiny;
                    kernels.add_squares(out.data(), a.data(), n, nullptr, 0, d.data(), n, 1, n);
                    REQUIRE_FALSE(is_finite(out[at]));
                    out = before;
                    a[at] = quiet_nan();
                    kernels.add_squares(out.data(), a.data(), n, nullptr, 0, nullptr, 0, 1, n);
                    REQUIRE(is_nan(out[at]));
                }
            }
        }
    }
}

TEST_CASE("squares are expanded from products, and those whose terms cancel are marked", "[differential]") {
    const Kernels& kernels = any_kernels();
    for (const std::size_t n : lengths) {
        for (const bool stretched : {false, true}) {
            // Products of every size that the norms allow, and every fifth such that the square is 0.
            const float own = 2.5F;
            std::vector<float> norm = random_floats(n, 36), z = random_floats(n, 37);
            std::vector<float> x = random_floats(n + 1, 38);
            for (std::size_t j = 0; j < n; ++j) {
                norm[j] = 0.01F + norm[j] * norm[j];
                x[j] = std::sin(9.0F * x[j]) * std::sqrt(norm[j] * own);
                if (j % 5 != 2) continue;
                norm[j] = own;
                z[j] = -0.5F;
                x[j] = stretched ? -own : own;
            }
            const std::vector<float> before = x;
            const bool all =
                kernels.expand_squares(x.data(), norm.data(), stretched ? z.data() : nullptr, own, n);
            CAPTURE(simd::name_of(kernels.isa), n, stretched);
            bool good = same_bits(x[n], before[n]), none = true;
            for (std::size_t j = 0; j < n; ++j) {
                const double b = stretched ? static_cast<double>(z[j]) : 1.0, a = stretched ? 1.0 + b : 1.0;
                const double terms = a * a * static_cast<double>(norm[j]) + b * b * static_cast<double>(own);
                const double square = terms - 2.0 * a * b * static_cast<double>(before[j]);
                const bool marked = same_bits(x[j], -1.0F);
                none = none && !marked;
                good = good && (marked ? square < terms * (1.0 / 32 + 1e-5)
                                       : square > terms * (1.0 / 32 - 1e-5) &&
                                             close(x[j], square, 0, 8 * epsilon * terms));
            }
            CHECK(good);
            CHECK(all == none);
            CHECK((n < 3 || !none));
        }
    }
}

TEST_CASE("a square of terms that are not finite is marked and harms no other", "[property]") {
    const Kernels& kernels = any_kernels();
    const float infinity = std::bit_cast<float>(0x7F800000U);
    for (const std::size_t n : {1U, 7U, 8U, 9U, 15U, 16U, 17U, 33U}) {
        for (std::size_t at = 0; at < n; ++at) {
            for (const float& bad : {quiet_nan(), infinity, -infinity, 3e38F}) {
                std::vector<float> x(n, 0.5F), norm(n, 2.0F), z(n, 3.0F), wanted = x;
                REQUIRE(kernels.expand_squares(wanted.data(), norm.data(), z.data(), 1.0F, n));
                for (std::vector<float>* const row : {&x, &norm, &z}) {
                    if (row != &z && same_bits(bad, -infinity)) continue;  // no norm; no sign of cancelling
                    std::vector<float> got(n, 0.5F);
                    if (row == &x) got[at] = bad;
                    const float was = (*row)[at];
                    (*row)[at] = bad;
                    const bool all = kernels.expand_squares(got.data(), norm.data(), z.data(), 1.0F, n);
                    (*row)[at] = was;
                    CAPTURE(simd::name_of(kernels.isa), n, at);
                    REQUIRE_FALSE(all);
                    REQUIRE(same_bits(got[at], -1.0F));
                    got[at] = wanted[at];
                    REQUIRE(same_bits(got, wanted));
                }
            }
        }
    }
}

TEST_CASE("maximum ignores a NaN that comes in", "[property]") {
    const Kernels& kernels = any_kernels();
    for (const std::size_t n : {1U, 7U, 8U, 9U, 16U}) {
        const std::vector<float> x(n, quiet_nan());
        std::vector<float> out = random_floats(n, 20);
        const std::vector<float> before = out;
        kernels.maximum(out.data(), x.data(), n);
        REQUIRE(same_bits(out, before));
    }
}

TEST_CASE("widening is exact for all 16-bit numbers", "[differential]") {
    const Kernels& kernels = any_kernels();
    const auto exact = [](const auto& widen, auto type) {
        std::vector<decltype(type)> narrow(65536 + 3);
        for (std::size_t i = 0; i < narrow.size(); ++i) narrow[i].bits = static_cast<std::uint16_t>(i);
        std::vector<float> wide(narrow.size());
        widen(narrow.data(), wide.data(), narrow.size());
        bool good = true;
        for (std::size_t i = 0; i < narrow.size(); ++i) {
            const float wanted = to_float(narrow[i]);
            // a signalling NaN may come back quiet
            good = good && (is_nan(wanted) ? is_nan(wide[i]) : same_bits(wide[i], wanted));
        }
        return good;
    };
    REQUIRE(exact(kernels.widen_f16, float16{}));
    REQUIRE(exact(kernels.widen_bf16, bfloat16{}));
}

TEST_CASE("narrowing gives the bits of to_float16 and to_bfloat16, ties and NaN included", "[differential]") {
    const Kernels& kernels = any_kernels();
    SplitMix64 random{21};
    std::vector<float> wide;
    for (int i = 0; i < 50000; ++i)
        wide.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(random())));
    for (std::uint32_t half = 0; half < 0x7C00U; half += 3) {  // halves and the ties between neighbours
        const float x = to_float(float16{static_cast<std::uint16_t>(half)});
        const float y = to_float(float16{static_cast<std::uint16_t>(half + 1)});
        wide.push_back(x);
        if (is_finite(y)) wide.push_back(0.5F * x + 0.5F * y);
    }
    for (std::uint32_t brain = 0; brain < 0x10000U; brain += 7)  // bfloat16 numbers and ties of both kinds
        for (const std::uint32_t low : {0U, 0x7FFFU, 0x8000U, 0x8001U})
            wide.push_back(std::bit_cast<float>(brain << 16U | low));
    wide.push_back(65519.996F);
    wide.push_back(65520.0F);
    std::vector<float16> half(wide.size());
    kernels.narrow_f16(wide.data(), half.data(), wide.size());
    bool good = true;
    for (std::size_t i = 0; i < wide.size(); ++i) good = good && half[i].bits == to_float16(wide[i]).bits;
    REQUIRE(good);
    std::vector<bfloat16> brain(wide.size());
    kernels.narrow_bf16(wide.data(), brain.data(), wide.size());
    for (std::size_t i = 0; i < wide.size(); ++i) good = good && brain[i].bits == to_bfloat16(wide[i]).bits;
    REQUIRE(good);
}

namespace {

/// What the kernels say of a group, in double and without a word about vectors.
template <class Group>
void check_group(const std::vector<float>& x, const Group& group, double steps) {
    double most = 0;
    for (const float number : x) most = std::max(most, std::abs(static_cast<double>(number)));
    const double scale = std::abs(static_cast<double>(to_float(group.scale)));
    REQUIRE(std::abs(scale - most / steps) <= most / steps / 2048 + 0x1.0p-25);
    const bool normal = scale >= 0x1.0p-14;
    for (std::size_t c = 0; c < group_channels; ++c) {
        const double wide = static_cast<double>(to_float(group.scale)) * integer_of(group, c);
        if (c >= x.size()) REQUIRE(integer_of(group, c) == 0);
        // The far end of int4 is a step that one sign lacks.
        else if (normal && (steps == 127 || wide * static_cast<double>(x[c]) >= 0))
            REQUIRE(std::abs(wide - static_cast<double>(x[c])) <=
                    scale * (std::abs(integer_of(group, c)) == 7 ? 1.01 : 0.501));
    }
}

}  // namespace

TEST_CASE("a group is narrowed to the nearest steps of its scale", "[differential]") {
    const Kernels& kernels = any_kernels();
    for (const std::size_t n : {1U, 15U, 16U, 17U, 31U, 32U}) {
        for (const float scale : {1e-9F, 1e-6F, 1e-3F, 1.0F, 300.0F}) {
            const std::vector<float> x = random_floats(n, n, scale);
            int8_group int8;
            int4_group int4;
            kernels.narrow_int8(x.data(), &int8, n);
            kernels.narrow_int4(x.data(), &int4, n);
            CAPTURE(simd::name_of(kernels.isa), n, scale);
            check_group(x, int8, 127);
            check_group(x, int4, 8);
        }
    }
}

TEST_CASE("narrowing to groups goes to the even step from a tie, and to -8 steps with the largest magnitude",
          "[contract]") {
    const Kernels& kernels = any_kernels();
    const std::vector<float> x{127, 0.5F, 1.5F, -0.5F, -1.5F, -127, 126.5F};
    int8_group int8;
    kernels.narrow_int8(x.data(), &int8, x.size());
    CHECK(to_float(int8.scale) == 1);
    const int wanted8[] = {127, 0, 2, 0, -2, -127, 126};
    for (std::size_t c = 0; c < x.size(); ++c) CHECK(integer_of(int8, c) == wanted8[c]);
    int4_group int4;
    const std::vector<float> y{8, 0.5F, 1.5F, -2.5F, -7.5F, 7.5F};
    kernels.narrow_int4(y.data(), &int4, y.size());
    CHECK(to_float(int4.scale) == -1);
    const int wanted4[] = {-8, 0, -2, 2, 7, -8};
    for (std::size_t c = 0; c < y.size(); ++c) CHECK(integer_of(int4, c) == wanted4[c]);
    const std::vector<float> both{8, -8};
    kernels.narrow_int4(both.data(), &int4, 2);
    CHECK(to_float(int4.scale) == 1);
    CHECK(integer_of(int4, 0) == 7);
    CHECK(integer_of(int4, 1) == -8);
}

TEST_CASE("a group with a number that is not finite, or too large for its scale, reads as NaN",
          "[contract]") {
    const Kernels& kernels = any_kernels();
    for (const float& bad : {quiet_nan(), negative_infinity(), positive_infinity(), 1e30F, -1e30F}) {
        std::vector<float> x = random_floats(70, 3), wide(70);
        std::memcpy(&x[40], &bad, sizeof bad);
        std::vector<int8_group> int8(3);
        std::vector<int4_group> int4(3);
        kernels.narrow_int8(x.data(), int8.data(), 70);
        kernels.narrow_int4(x.data(), int4.data(), 70);
        const auto check = [&] {
            for (std::size_t c = 0; c < 70; ++c) REQUIRE(is_nan(wide[c]) == (c >= 32 && c < 64));
        };
        kernels.widen_int8(int8.data(), 3, 1, 70, wide.data(), 70, nullptr);
        check();
        kernels.widen_int4(int4.data(), 3, 1, 70, wide.data(), 70, nullptr);
        check();
    }
}

TEST_CASE("widening groups is exact, bad scales included, and writes no channel past the last",
          "[differential]") {
    const Kernels& kernels = any_kernels();
    SplitMix64 random{4};
    const auto check = [&]<class Group>(const auto& widen, Group) {
        for (const std::size_t dim : {1U, 7U, 8U, 16U, 17U, 31U, 32U, 33U, 80U, 128U, 257U}) {
            constexpr std::size_t rows = 5;
            const std::size_t stride = (dim + 31) / 32 + 1;
            std::vector<Group> groups(rows * stride);
            for (auto& group : groups)
                for (std::size_t at = 0; at < sizeof group; ++at)
                    reinterpret_cast<unsigned char*>(&group)[at] = static_cast<unsigned char>(random());
            std::vector<float> out(rows * (dim + 2), 42.0F), wanted = out;
            widen(groups.data(), stride, rows, dim, out.data(), dim + 2, groups.data());
            bool good = true;
            for (std::size_t i = 0; i < out.size(); ++i) {
                const std::size_t c = i % (dim + 2);
                const Group& group = groups[i / (dim + 2) * stride + c / 32];
                if (c < dim)
                    wanted[i] = to_float(group.scale) * static_cast<float>(integer_of(group, c % 32));
                good = good && (is_nan(wanted[i]) ? is_nan(out[i]) : same_bits(out[i], wanted[i]));
            }
            CAPTURE(simd::name_of(kernels.isa), dim, sizeof(Group));
            REQUIRE(good);
        }
    };
    check(kernels.widen_int8, int8_group{});
    check(kernels.widen_int4, int4_group{});
}

TEST_CASE("a summary holds the extremes and a sum that does not lose precision with length",
          "[differential]") {
    const Kernels& kernels = any_kernels();
    for (const std::size_t n : {0U, 1U, 7U, 8U, 17U, 511U, 512U, 513U, 1025U, 100003U}) {
        std::vector<float> x = random_floats(n, 31);
        float least = 42, most = 42;
        double sum = 42;
        kernels.summarise(x.data(), n, &least, &most, &sum);
        double want = 0, size = 0;
        float low = 0, high = 0;
        for (const float entry : x) {
            want += static_cast<double>(entry);
            size += std::abs(static_cast<double>(entry));
            low = std::min(low, entry);
            high = std::max(high, entry);
        }
        CAPTURE(simd::name_of(kernels.isa), n);
        REQUIRE(least == low);
        REQUIRE(most == high);
        REQUIRE(std::abs(sum - want) <= 70 * epsilon * size);
        if (n == 0) continue;
        x[n / 2] = quiet_nan();
        kernels.summarise(x.data(), n, &least, &most, &sum);
        REQUIRE(is_nan(static_cast<float>(sum)));
    }
}

TEST_CASE("odds and square roots change every entry and nothing behind the last", "[differential]") {
    const Kernels& kernels = any_kernels();
    for (const std::size_t n : lengths) {
        std::vector<float> x(n + 1), roots(n + 1);
        for (std::size_t j = 0; j <= n; ++j) x[j] = roots[j] = static_cast<float>(j) / 1024.0F;
        if (n > 1) roots[0] = positive_infinity();
        const std::vector<float> before = x;
        kernels.odds(x.data(), x.data(), n, 0.5F);
        kernels.square_roots(roots.data(), n);
        CAPTURE(simd::name_of(kernels.isa), n);
        bool good = same_bits(x[n], before[n]) && same_bits(roots[n], n > 1 ? before[n] : roots[n]);
        for (std::size_t j = 0; j < n; ++j) {
            const double weight = 0.5 * static_cast<double>(before[j]);
            good = good && close(x[j], weight / (1 - weight), 1e-6, 0);
            if (j > 0) good = good && close(roots[j], std::sqrt(static_cast<double>(before[j])), 1e-7, 0);
        }
        REQUIRE(good);
        if (n > 1) REQUIRE(same_bits(roots[0], positive_infinity()));
    }
}

TEST_CASE("codes of a row have the same bits everywhere and are off by half a step at most",
          "[differential]") {
    for (const std::size_t n : lengths) {
        for (const float scale : {0.0F, 1e-30F, 1e-3F, 1.0F, 1e30F}) {
            for (const float least : {0x1p-60F, 0.02F}) {
                Padded x(1, n, 7 + n);
                for (std::size_t c = 0; c < n; ++c) x.data()[c] *= scale;
                if (n > 3) x.data()[n / 2] = -4.0F * scale;
                std::vector<std::uint8_t> first;
                for (const Isa isa : available_isas()) {
                    std::vector<std::uint8_t> codes(n + 1, 77);
                    float step = -1.0F;
                    simd::kernels_for(isa).to_codes(x.data(), n, least, codes.data(), &step);
                    float most = 0.0F;
                    for (std::size_t c = 0; c < n; ++c) most = std::max(most, std::abs(x.data()[c]));
                    CAPTURE(simd::name_of(isa), n, scale, least);
                    REQUIRE(step == std::max(least, most / 127.0F));
                    REQUIRE(codes.back() == 77);
                    bool near = true;
                    for (std::size_t c = 0; c < n; ++c) {
                        const int code = codes[c] - 128;
                        near =
                            near && std::abs(code) <= 127 &&
                            std::abs(static_cast<double>(x.data()[c]) - code * static_cast<double>(step)) <=
                                0.501 * static_cast<double>(step);
                    }
                    REQUIRE(near);
                    if (first.empty()) first = codes;
                    REQUIRE(codes == first);
                }
            }
        }
    }
}

TEST_CASE("the largest products of bytes are exact", "[differential]") {
    SplitMix64 random{21};
    for (const std::size_t dim : {4U, 8U, 80U, 128U, 260U, 65536U}) {
        for (const std::size_t count : {16U, 48U, 64U, 80U, 128U, 208U}) {
            if (dim > 1000 && count > 64) continue;
            const std::size_t rows = count % 7 + 2, stride = dim + 3;
            const bool extreme = dim > 1000 || count == 80;
            std::vector<std::uint8_t> x(rows * stride);
            std::vector<std::int8_t> y(dim * count);
            std::vector<std::int32_t> start(count);
            for (auto& code : x) code = extreme ? 255 : static_cast<std::uint8_t>(random());
            for (auto& code : y) code = extreme ? 127 : static_cast<std::int8_t>(random() % 255 - 127);
            for (auto& from : start) from = static_cast<std::int32_t>(random() % 2000000) - 1000000;
            std::vector<std::int32_t> wanted(rows);
            for (std::size_t a = 0; a < rows; ++a) {
                std::int64_t largest = std::numeric_limits<std::int64_t>::min();
                for (std::size_t b = 0; b < count; ++b) {
                    std::int64_t sum = start[b];
                    for (std::size_t c = 0; c < dim; ++c)
                        sum += x[a * stride + c] * y[(c / 4 * count + b) * 4 + c % 4];
                    largest = std::max(largest, sum);
                }
                wanted[a] = static_cast<std::int32_t>(largest);
            }
            for (const Isa isa : available_isas()) {
                std::vector<std::int32_t> out(rows + 1, 5);
                simd::kernels_for(isa).largest_products(x.data(), stride, rows, y.data(), start.data(), count,
                                                        dim, out.data());
                CAPTURE(simd::name_of(isa), dim, count);
                REQUIRE(out.back() == 5);
                out.pop_back();
                REQUIRE(out == wanted);
            }
        }
    }
}
