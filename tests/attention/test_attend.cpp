#include "kvcull/attention/attend.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "kvcull/attention/softmax.hpp"
#include "support/catch.hpp"
#include "support/isas.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;
using simd::Kernels;

namespace {

std::vector<bfloat16> to_bfloat16s(const std::vector<float>& values) {
    std::vector<bfloat16> result;
    for (const float x : values) result.push_back(to_bfloat16(x));
    return result;
}
template <class T>
std::vector<float> to_floats(const std::vector<T>& values) {
    std::vector<float> result;
    for (const T x : values) result.push_back(to_float(x));
    return result;
}

const Kernels& any_kernels() {
    return simd::kernels_for(GENERATE(from_range(available_isas())));
}

/// Everything that attend can produce.
struct Results {
    std::size_t rows, n, value_dim;
    std::vector<float> attention, lse, logits, output, column_sum, column_max;

    Results(std::size_t rows_, std::size_t n_, std::size_t value_dim_)
        : rows(rows_),
          n(n_),
          value_dim(value_dim_),
          attention(rows * n, 42.0F),
          lse(rows, 42.0F),
          logits(rows * n, 42.0F),
          output(rows * value_dim, 42.0F),
          column_sum(n, 0.0F),
          column_max(n, 0.0F) {}
    AttentionRows all() {
        return {.attention = {attention.data(), rows, n},
                .lse = lse,
                .logits = {logits.data(), rows, n},
                .output = {output.data(), rows, value_dim},
                .column_sum = column_sum,
                .column_max = column_max};
    }
    friend bool same(const Results& x, const Results& y) {
        return same_bits(x.attention, y.attention) && same_bits(x.lse, y.lse) &&
               same_bits(x.logits, y.logits) && same_bits(x.output, y.output) &&
               same_bits(x.column_sum, y.column_sum) && same_bits(x.column_max, y.column_max);
    }
    std::span<const float> output_of(std::size_t row) const {
        return {output.data() + row * value_dim, value_dim};
    }
    std::span<const float> attention_of(std::size_t row) const { return {attention.data() + row * n, n}; }
};

/// Queries, keys and values of one KV head, and a pattern of visible entries.
struct Problem {
    std::size_t rows, n, dim, value_dim;
    std::vector<float> q, k, v;
    std::vector<Visible> visible;
    float scale;

    Problem(std::size_t rows_, std::size_t n_, std::size_t dim_, std::size_t value_dim_,
            std::uint64_t seed = 1)
        : rows(rows_),
          n(n_),
          dim(dim_),
          value_dim(value_dim_),
          q(random_floats(rows * dim, seed)),
          k(random_floats(n * dim, seed + 1)),
          v(random_floats(n * value_dim, seed + 2)),
          visible(rows, Visible{0, 0, n}),
          scale(1.0F / std::sqrt(static_cast<float>(dim))) {}

    MatrixView<const float> queries() const { return {q.data(), rows, dim}; }
    RowsView keys() const { return {k.data(), n, dim, dim}; }
    RowsView values() const { return {v.data(), n, value_dim, value_dim}; }
    Results solve(const Kernels& kernels) const { return solve(kernels, keys(), values()); }
    Results solve(const Kernels& kernels, const RowsView& key_rows, const RowsView& value_rows) const {
        Results results(rows, n, value_dim);
        attend(kernels, queries(), key_rows, value_rows, visible, scale, results.all());
        return results;
    }
};

enum class Pattern { full, causal, band, mixed };

/// `window` rows per query head see one entry more each, the heads of the group alike.
void set_pattern(Problem& problem, Pattern pattern, std::size_t window) {
    SplitMix64 random{99};
    const std::size_t n = problem.n;
    for (std::size_t row = 0; row < problem.rows; ++row) {
        Visible& visible = problem.visible[row];
        const std::size_t back = window - 1 - row % window;
        const std::size_t end = n > back ? n - back : 0;
        const auto anywhere = [&] { return static_cast<std::size_t>(random() % (n + 1)); };
        if (pattern == Pattern::full) visible = {0, 0, n};
        if (pattern == Pattern::causal) visible = {0, 0, end};
        if (pattern == Pattern::band) visible = {2, end > 20 ? end - 20 : 0, end};
        if (pattern == Pattern::mixed) visible = {anywhere(), anywhere(), anywhere()};
    }
}

/// A block table over a copy of `rows`, blocks of `block_rows` rows with `gap` unused elements between rows,
/// blocks in reverse order in memory; what no row uses is NaN.
struct Paged {
    std::vector<float> storage;
    std::vector<const std::byte*> blocks;
    RowsView view;

    Paged(const std::vector<float>& rows, std::size_t dim, std::size_t block_rows, std::size_t gap) {
        const std::size_t n = rows.size() / dim, stride = dim + gap,
                          count = (n + block_rows - 1) / block_rows;
        constexpr std::size_t offset = 3;
        const std::size_t block = offset + block_rows * stride;
        storage.assign(count * block, quiet_nan());
        for (std::size_t b = 0; b < count; ++b)
            blocks.push_back(reinterpret_cast<const std::byte*>(storage.data() + (count - 1 - b) * block));
        for (std::size_t j = 0; j < n; ++j)
            std::copy_n(
                rows.data() + j * dim, dim,
                storage.data() + (count - 1 - j / block_rows) * block + offset + j % block_rows * stride);
        view = RowsView(blocks.data(), offset * sizeof(float), DType::f32, block_rows, n, dim, stride);
    }
};

void require_close(const Results& got, const Problem& problem, const ReferenceAttention& wanted) {
    bool good = true;
    for (std::size_t i = 0; i < got.logits.size(); ++i) {
        good = good && close(got.logits[i], wanted.logits[i], 1e-5, 1e-5);
        good = good && close(got.attention[i], wanted.attention[i], 2e-5, 1e-7);
    }
    REQUIRE(good);
    for (std::size_t i = 0; i < got.output.size(); ++i)
        good = good && close(got.output[i], wanted.output[i], 1e-5, 1e-5);
    REQUIRE(good);
    for (std::size_t row = 0; row < got.rows; ++row) {
        if (problem.visible[row].count() == 0)
            REQUIRE(same_bits(got.lse[row], negative_infinity()));
        else
            REQUIRE(close(got.lse[row], wanted.lse[row], 1e-5, 1e-5));
    }
    for (std::size_t j = 0; j < got.n; ++j) {
        double sum = 0, largest = 0;
        for (std::size_t row = 0; row < got.rows; ++row) {
            sum += wanted.attention[row * got.n + j];
            largest = std::max(largest, wanted.attention[row * got.n + j]);
            if (!is_visible(problem.visible[row], j)) {
                good = good && got.attention[row * got.n + j] == 0.0F && got.logits[row * got.n + j] == 0.0F;
            }
        }
        good = good && close(got.column_sum[j], sum, 3e-5, 1e-6) &&
               close(got.column_max[j], largest, 2e-5, 1e-7);
    }
    REQUIRE(good);
}

}  // namespace

TEST_CASE("attention agrees with naive double loops for every length, group and pattern", "[differential]") {
    const Kernels& kernels = any_kernels();
    const auto pattern = GENERATE(Pattern::full, Pattern::causal, Pattern::band, Pattern::mixed);
    for (const std::size_t n : {1U, 7U, 8U, 9U, 16U, 17U, 33U, 65U, 129U}) {
        for (const auto& [rows, window] : {std::pair{1U, 1U}, {4U, 1U}, {7U, 7U}, {28U, 7U}}) {
            Problem problem(rows, n, 20, 12, n + rows);
            set_pattern(problem, pattern, window);
            CAPTURE(simd::name_of(kernels.isa), static_cast<int>(pattern), n, rows);
            require_close(problem.solve(kernels), problem,
                          reference_attention(problem.q, problem.k, problem.v, problem.visible, n, 20, 12,
                                              static_cast<double>(problem.scale)));
        }
    }
}

TEST_CASE("attention agrees with naive double loops for every dim", "[differential]") {
    const Kernels& kernels = any_kernels();
    for (const std::size_t dim :
         {1U, 7U, 8U, 9U, 15U, 16U, 17U, 31U, 32U, 33U, 63U, 64U, 65U, 80U, 127U, 128U, 129U, 257U, 512U}) {
        for (const std::size_t value_dim : {dim, std::size_t{24}}) {
            Problem problem(6, 21, dim, value_dim, dim);
            set_pattern(problem, Pattern::causal, 3);
            CAPTURE(simd::name_of(kernels.isa), dim, value_dim);
            require_close(problem.solve(kernels), problem,
                          reference_attention(problem.q, problem.k, problem.v, problem.visible, 21, dim,
                                              value_dim, static_cast<double>(problem.scale)));
        }
    }
}

TEST_CASE("a row's result does not depend on the other rows of the call", "[property]") {
    const Kernels& kernels = any_kernels();
    const auto pattern = GENERATE(Pattern::full, Pattern::causal, Pattern::band, Pattern::mixed);
    Problem problem(28, 150, 40, 24);
    set_pattern(problem, pattern, 7);
    const Results together = problem.solve(kernels);
    CAPTURE(simd::name_of(kernels.isa), static_cast<int>(pattern));
    for (std::size_t row = 0; row < problem.rows; ++row) {
        Problem alone = problem;
        alone.rows = 1;
        alone.q.assign(problem.q.begin() + static_cast<std::ptrdiff_t>(row * 40),
                       problem.q.begin() + static_cast<std::ptrdiff_t>((row + 1) * 40));
        alone.visible = {problem.visible[row]};
        const Results one = alone.solve(kernels);
        REQUIRE(same_bits(one.output_of(0), together.output_of(row)));
        REQUIRE(same_bits(one.attention_of(0), together.attention_of(row)));
        REQUIRE(same_bits(one.lse[0], together.lse[row]));
    }
}

TEST_CASE("rows in blocks give what the same rows give in one piece, bit for bit", "[property]") {
    const Kernels& kernels = any_kernels();
    const auto pattern = GENERATE(Pattern::full, Pattern::causal, Pattern::band, Pattern::mixed);
    Problem problem(8, 75, 33, 20);  // 75 rows: the last block of 16 is partly filled
    set_pattern(problem, pattern, 2);
    const Results whole = problem.solve(kernels);
    for (const std::size_t block_rows : {1U, 3U, 16U, 128U}) {
        const Paged k(problem.k, 33, block_rows, 2), v(problem.v, 20, block_rows, 5);
        CAPTURE(simd::name_of(kernels.isa), static_cast<int>(pattern), block_rows);
        REQUIRE(same(problem.solve(kernels, k.view, v.view), whole));
    }
}

TEST_CASE("16-bit rows give what their widened copy gives, bit for bit", "[property]") {
    const Kernels& kernels = any_kernels();
    Problem problem(5, 40, 19, 30);
    set_pattern(problem, Pattern::causal, 5);
    const auto same_as_wide = [&](DType dtype, const auto& k, const auto& v) {
        problem.k = to_floats(k);
        problem.v = to_floats(v);
        CAPTURE(name_of(dtype), simd::name_of(kernels.isa));
        REQUIRE(same(problem.solve(kernels, {k.data(), dtype, 40, 19, 19}, {v.data(), dtype, 40, 30, 30}),
                     problem.solve(kernels)));
    };
    same_as_wide(DType::f16, to_float16s(problem.k), to_float16s(problem.v));
    same_as_wide(DType::bf16, to_bfloat16s(random_floats(40 * 19, 8)),
                 to_bfloat16s(random_floats(40 * 30, 9)));
}

TEST_CASE("what K and V hold where a row cannot see never reaches its result", "[property]") {
    const Kernels& kernels = any_kernels();
    const auto pattern = GENERATE(Pattern::causal, Pattern::band, Pattern::mixed);
    const float& poison = GENERATE(quiet_nan(), negative_infinity(), 3e38F);
    Problem problem(6, 60, 24, 24);
    set_pattern(problem, pattern, 6);
    const Results clean = problem.solve(kernels);
    for (std::size_t row = 0; row < problem.rows; ++row) {
        Problem poisoned = problem;
        for (std::size_t j = 0; j < problem.n; ++j) {
            if (is_visible(problem.visible[row], j)) continue;
            std::fill_n(poisoned.k.begin() + static_cast<std::ptrdiff_t>(j * 24), 24, poison);
            std::fill_n(poisoned.v.begin() + static_cast<std::ptrdiff_t>(j * 24), 24, poison);
        }
        const Results results = poisoned.solve(kernels);
        CAPTURE(simd::name_of(kernels.isa), static_cast<int>(pattern), row);
        REQUIRE(same_bits(results.output_of(row), clean.output_of(row)));
        REQUIRE(same_bits(results.attention_of(row), clean.attention_of(row)));
        REQUIRE(same_bits(results.lse[row], clean.lse[row]));
    }
}

TEST_CASE("a query row with a NaN or infinity is bad alone: it votes for nothing", "[property]") {
    const Kernels& kernels = any_kernels();
    for (const float& bad : {quiet_nan(), std::bit_cast<float>(0x7F800000U), negative_infinity()}) {
        Problem problem(5, 33, 16, 16);
        const std::size_t row = 3;
        Problem without = problem;
        problem.q[row * 16 + 5] = bad;
        without.visible[row] = {0, 0, 0};
        const Results results = problem.solve(kernels), expected = without.solve(kernels);
        REQUIRE(is_nan(results.lse[row]));
        REQUIRE(same_bits(results.attention_of(row), std::vector<float>(33, 0.0F)));
        for (const float& x : results.output_of(row)) REQUIRE(is_nan(x));
        REQUIRE(same_bits(results.column_sum, expected.column_sum));
        REQUIRE(same_bits(results.column_max, expected.column_max));
        REQUIRE(same_bits(results.output_of(2), expected.output_of(2)));
        REQUIRE(same_bits(results.output_of(4), expected.output_of(4)));
    }
}

TEST_CASE("a key row with a NaN makes bad exactly the query rows that see it", "[property]") {
    const Kernels& kernels = any_kernels();
    Problem problem(4, 20, 16, 16);
    for (std::size_t row = 0; row < 4; ++row) problem.visible[row].end = 17 + row;
    problem.k[18 * 16 + 7] = quiet_nan();
    const Results results = problem.solve(kernels);
    REQUIRE(is_finite(results.lse[0]));
    REQUIRE(is_finite(results.lse[1]));
    REQUIRE(is_nan(results.lse[2]));
    REQUIRE(is_nan(results.lse[3]));
    for (const float& x : results.output_of(1)) REQUIRE(is_finite(x));
    for (const float& x : results.output_of(2)) REQUIRE(is_nan(x));
    for (const float& x : results.column_sum) REQUIRE(is_finite(x));
}

TEST_CASE("a value row with a NaN spoils its channel for the rows that see it, and nothing else",
          "[property]") {
    const Kernels& kernels = any_kernels();
    Problem problem(2, 20, 16, 16);
    problem.visible[0].end = 19;
    const Results clean = problem.solve(kernels);
    problem.v[19 * 16 + 7] = quiet_nan();
    const Results results = problem.solve(kernels);
    REQUIRE(same_bits(results.output_of(0), clean.output_of(0)));
    for (std::size_t c = 0; c < 16; ++c) {
        if (c == 7)
            REQUIRE(is_nan(results.output_of(1)[c]));
        else
            REQUIRE(same_bits(results.output_of(1)[c], clean.output_of(1)[c]));
    }
    REQUIRE(same_bits(results.attention, clean.attention));
}

TEST_CASE("a row that sees nothing has output 0 and log-sum-exp -Inf, an empty cache too", "[property]") {
    const Kernels& kernels = any_kernels();
    Problem problem(3, 9, 8, 8);
    problem.visible = {Visible{0, 0, 0}, Visible{0, 5, 5}, Visible{0, 0, 9}};
    const Results results = problem.solve(kernels);
    for (const std::size_t row : {0U, 1U}) {
        REQUIRE(same_bits(results.lse[row], negative_infinity()));
        REQUIRE(same_bits(results.output_of(row), std::vector<float>(8, 0.0F)));
        REQUIRE(same_bits(results.attention_of(row), std::vector<float>(9, 0.0F)));
    }
    REQUIRE(is_finite(results.lse[2]));

    const Results empty = Problem(3, 0, 8, 8).solve(kernels);
    REQUIRE(same_bits(empty.lse, std::vector<float>(3, negative_infinity())));
    REQUIRE(same_bits(empty.output, std::vector<float>(24, 0.0F)));

    const Results none = Problem(0, 9, 8, 8).solve(kernels);
    REQUIRE(none.lse.empty());
}

TEST_CASE("only what is asked for is written, and V is not read without an output", "[contract]") {
    const Kernels& kernels = any_kernels();
    Problem problem(3, 17, 8, 8);
    const Results all = problem.solve(kernels);
    Results some(3, 17, 8);
    AttentionRows want = some.all();
    want.logits = {};
    want.output = {};
    want.column_sum = {};
    want.column_max = {};
    attend(kernels, problem.queries(), problem.keys(), RowsView(), problem.visible, problem.scale, want);
    REQUIRE(same_bits(some.attention, all.attention));
    REQUIRE(same_bits(some.lse, all.lse));
    REQUIRE(some.logits[0] == 42.0F);
    REQUIRE(some.output[0] == 42.0F);
    REQUIRE(some.column_sum[0] == 0.0F);
}

TEST_CASE("column sums and maxima continue from what they hold, row after row", "[property]") {
    const Kernels& kernels = any_kernels();
    Problem problem(4, 30, 8, 8);
    const Results whole = problem.solve(kernels);
    Results parts(4, 30, 8);
    for (std::size_t row = 0; row < 4; ++row) {
        const AttentionRows want{.attention = {parts.attention.data() + row * 30, 1, 30},
                                 .lse = std::span(parts.lse).subspan(row, 1),
                                 .logits = {},
                                 .output = {},
                                 .column_sum = parts.column_sum,
                                 .column_max = parts.column_max};
        attend(kernels, {problem.q.data() + row * 8, 1, 8}, problem.keys(), RowsView(),
               std::span(problem.visible).subspan(row, 1), problem.scale, want);
    }
    REQUIRE(same_bits(parts.column_sum, whole.column_sum));
    REQUIRE(same_bits(parts.column_max, whole.column_max));
}

TEST_CASE("rows of a wider matrix are read and written in place", "[property]") {
    const Kernels& kernels = any_kernels();
    Problem problem(5, 23, 12, 12);
    const Results packed = problem.solve(kernels);
    std::vector<float> q(5 * 20, quiet_nan()), attention(5 * 30, 42.0F), output(5 * 20, 42.0F), lse(5);
    for (std::size_t row = 0; row < 5; ++row)
        std::copy_n(problem.q.data() + row * 12, 12, q.data() + row * 20);
    attend(kernels, {q.data(), 5, 12, 20}, problem.keys(), problem.values(), problem.visible, problem.scale,
           {.attention = {attention.data(), 5, 23, 30},
            .lse = lse,
            .logits = {},
            .output = {output.data(), 5, 12, 20},
            .column_sum = {},
            .column_max = {}});
    for (std::size_t row = 0; row < 5; ++row) {
        REQUIRE(same_bits(std::span(attention).subspan(row * 30, 23), packed.attention_of(row)));
        REQUIRE(attention[row * 30 + 23] == 42.0F);
        REQUIRE(same_bits(std::span(output).subspan(row * 20, 12), packed.output_of(row)));
        REQUIRE(output[row * 20 + 12] == 42.0F);
    }
}

TEST_CASE("attention over two parts of a cache, merged, equals attention over the whole", "[property]") {
    const Kernels& kernels = any_kernels();
    Problem problem(4, 70, 16, 16);
    const Results whole = problem.solve(kernels);
    for (const std::size_t split : {0U, 1U, 33U, 70U}) {
        Problem first = problem, second = problem;
        for (Visible& visible : first.visible) visible = {0, 0, split};
        for (Visible& visible : second.visible) visible = {0, split, 70};
        Results merged = first.solve(kernels);
        const Results other = second.solve(kernels);
        for (std::size_t row = 0; row < 4; ++row) {
            merge(std::span(merged.output).subspan(row * 16, 16), merged.lse[row], other.output_of(row),
                  other.lse[row]);
            CAPTURE(split, row);
            REQUIRE(close(merged.lse[row], static_cast<double>(whole.lse[row]), 1e-6, 1e-6));
            for (std::size_t c = 0; c < 16; ++c)
                REQUIRE(close(merged.output_of(row)[c], static_cast<double>(whole.output_of(row)[c]), 1e-5,
                              1e-6));
        }
    }
}

TEST_CASE("a reader's own query meets all keys beside the others, whose results it does not change",
          "[property]") {
    struct Reader {
        std::vector<float>* got;
        bool queries = true;

        void products(std::span<const float> of_keys) const { got->assign(of_keys.begin(), of_keys.end()); }
        static void values(const RowsView::Run& /*piece*/) noexcept {}
    };
    const Kernels& kernels = any_kernels();
    for (const std::size_t rows : {1U, 2U, 3U, 4U, 7U}) {
        const std::size_t n = 67;
        Problem problem(rows + 1, n, 80, 24);
        const Results want = problem.solve(kernels);
        --problem.rows;
        problem.visible.pop_back();
        std::vector<float> got;
        const auto solve = [&] {
            Results results(rows, n, problem.value_dim);
            results.attention.resize((rows + 1) * n);
            attend(kernels, problem.queries(), problem.keys(), problem.values(), problem.visible,
                   problem.scale, results.all(), Reader{&got});
            results.attention.resize(rows * n);
            return results;
        };
        CAPTURE(simd::name_of(kernels.isa), rows);
        CHECK(same(solve(), problem.solve(kernels)));
        CHECK(same_bits(got, std::span(want.logits).subspan(rows * n)));
        got.clear();
        problem.visible[rows / 2].end = n - 1;  // a row that does not see all
        CHECK(same(solve(), problem.solve(kernels)));
        CHECK(got.empty());
    }
}

TEST_CASE("shared ranges cover what every row sees, once, ascending within a row", "[property]") {
    for (std::uint64_t seed = 0; seed < 200; ++seed) {
        SplitMix64 random{seed};
        const std::size_t rows = random() % 9, n = random() % 20;
        const auto anywhere = [&] { return static_cast<std::size_t>(random() % (n + 1)); };
        std::vector<Visible> visible(rows);
        for (Visible& row : visible) row = {anywhere(), anywhere(), anywhere()};
        std::vector<std::vector<std::size_t>> seen(rows);
        const auto visit = [&](std::size_t first, std::size_t last, std::size_t begin, std::size_t end) {
            for (std::size_t row = first; row < last; ++row)
                for (std::size_t j = begin; j < end; ++j) seen[row].push_back(j);
        };
        detail::for_each_shared(visible, detail::Part::head, 0, rows, 0, n, visit);
        detail::for_each_shared(visible, detail::Part::band, 0, rows, 0, n, visit);
        for (std::size_t row = 0; row < rows; ++row) {
            std::vector<std::size_t> wanted;
            for (std::size_t j = 0; j < n; ++j)
                if (is_visible(visible[row], j)) wanted.push_back(j);
            CAPTURE(seed, row, visible[row].sinks, visible[row].begin, visible[row].end);
            REQUIRE(seen[row] == wanted);
            REQUIRE(visible[row].count() == wanted.size());
        }
    }
}

TEST_CASE("rows that see the same entries are visited together", "[property]") {
    const std::vector<Visible> visible(28, Visible{2, 30, 100});
    std::size_t calls = 0;
    const auto visit = [&](std::size_t first, std::size_t last, std::size_t, std::size_t) {
        ++calls;
        REQUIRE(first == 0);
        REQUIRE(last == 28);
    };
    detail::for_each_shared(visible, detail::Part::head, 0, 28, 0, 100, visit);
    detail::for_each_shared(visible, detail::Part::band, 0, 28, 0, 100, visit);
    REQUIRE(calls == 2);
}

TEST_CASE("sizes that do not fit are errors that name the argument, and nothing is written", "[contract]") {
    const Kernels& kernels = simd::kernels();
    Problem problem(3, 10, 8, 6);
    Results results(3, 10, 6);
    const auto message = [&](const AttentionRows& want, const RowsView& k, const RowsView& v,
                             std::span<const Visible> visible) -> std::string {
        try {
            attend(kernels, problem.queries(), k, v, visible, 1.0F, want);
        } catch (const error::shape_error& error) {
            return error.what();
        }
        return "no error";
    };
    const auto names = [&](const char* argument, auto change) {
        AttentionRows want = results.all();
        RowsView k = problem.keys(), v = problem.values();
        std::vector<Visible> visible = problem.visible;
        change(want, k, v, visible);
        const std::string text = message(want, k, v, visible);
        CAPTURE(argument, text);
        REQUIRE(text.find("attend") != std::string::npos);
        REQUIRE(text.find(argument) != std::string::npos);
    };
    names("q.cols", [&](auto&, auto& k, auto&, auto&) { k = RowsView(problem.k.data(), 10, 7, 8); });
    names("visible.size()", [](auto&, auto&, auto&, auto& visible) { visible.pop_back(); });
    names("visible[2].end", [](auto&, auto&, auto&, auto& visible) { visible[2].end = 11; });
    names("v.rows()", [&](auto&, auto&, auto& v, auto&) { v = RowsView(problem.v.data(), 9, 6, 6); });
    names("want.attention.cols", [](auto& want, auto&, auto&, auto&) { want.attention.cols = 9; });
    names("want.attention.rows", [](auto& want, auto&, auto&, auto&) { want.attention.rows = 2; });
    names("want.lse.size()", [](auto& want, auto&, auto&, auto&) { want.lse = want.lse.first(2); });
    names("want.logits.cols", [](auto& want, auto&, auto&, auto&) { want.logits.cols = 9; });
    names("want.output.cols", [](auto& want, auto&, auto&, auto&) { want.output.cols = 5; });
    names("want.output.rows", [](auto& want, auto&, auto&, auto&) { want.output.rows = 4; });
    names("want.column_sum.size()",
          [](auto& want, auto&, auto&, auto&) { want.column_sum = want.column_sum.first(9); });
    names("want.column_max.size()",
          [](auto& want, auto&, auto&, auto&) { want.column_max = want.column_max.first(9); });
    REQUIRE(same(results, Results(3, 10, 6)));
}
