/// Caches of int8 and int4 rows: they must do what a cache of floats does that was fed the numbers they read
/// as.

#include <cstddef>
#include <cstring>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "kvcull/cache/joint_step.hpp"
#include "kvcull/cache/kv_cache.hpp"
#include "kvcull/cache/saved.hpp"
#include "kvcull/kvcull.hpp"
#include "support/catch.hpp"
#include "support/every_policy.hpp"
#include "support/failure.hpp"
#include "support/foreign.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

constexpr std::size_t tokens = 44, prompt = 30;

CacheShape shape_of(DType dtype, std::size_t group, std::size_t dim = 40) {
    return {.layers = 2,
            .q_heads = 2 * group,
            .kv_heads = 2,
            .head_dim = dim,
            .value_dim = dim - 7,
            .dtype = dtype};
}

/// What rows of a type read as.
std::vector<float> as_stored(HeadsView<const float> rows, DType dtype) {
    std::vector<float> wide(rows.heads * rows.tokens * rows.dim);
    std::vector<std::byte> stored(row_bytes(dtype, rows.dim));
    for (std::size_t i = 0; i < rows.heads * rows.tokens; ++i) {
        simd::narrow(simd::kernels(), dtype, rows.row(i / rows.tokens, i % rows.tokens), rows.dim,
                     stored.data());
        RowsView(stored.data(), dtype, 1, rows.dim, 0)
            .widen(0, std::span(wide).subspan(i * rows.dim, rows.dim));
    }
    return wide;
}

/// One call of some tokens through both caches. @returns whether outputs and positions agree.
template <class P>
bool step(KVCache<P>& narrow, KVCache<P>& wide, const TokenStream& stream, std::size_t first,
          std::size_t count) {
    const CacheShape& shape = narrow.shape();
    Outputs a(shape, count), b(shape, count);
    bool good = true;
    for (std::size_t layer = 0; layer < shape.layers; ++layer) {
        const auto k = stream.k(layer, first, count), v = stream.v(layer, first, count);
        const std::vector<float> wide_k = as_stored(k, shape.dtype), wide_v = as_stored(v, shape.dtype);
        narrow.append(layer, k, v);
        wide.append(layer, head_major(wide_k.data(), k.heads, count, k.dim),
                    head_major(wide_v.data(), v.heads, count, v.dim));
        narrow.attend(layer, stream.q(layer, first, count), a.layer(layer));
        wide.attend(layer, stream.q(layer, first, count), b.layer(layer));
    }
    narrow.end_step();
    wide.end_step();
    for (std::size_t i = 0; i < shape.heads(); ++i) {
        const HeadView x = narrow.view(i / shape.kv_heads, i % shape.kv_heads),
                       y = wide.view(i / shape.kv_heads, i % shape.kv_heads);
        good = good && to_vector(x.position) == to_vector(y.position) &&
               same_bits(widened(x.k), widened(y.k)) && same_bits(widened(x.v), widened(y.v));
    }
    return good && same_bits(a.values, b.values);
}

}  // namespace

TEST_CASE("a cache of int8 or int4 rows keeps and answers what one of floats does that holds their numbers",
          "[differential]") {
    const DType dtype = GENERATE(DType::int8, DType::int4);
    const std::size_t group = GENERATE(std::size_t{1}, 4, 7);
    const CacheShape shape = shape_of(dtype, group);
    CacheShape floats = shape;
    floats.dtype = DType::f32;
    const TokenStream stream(shape, tokens, group);
    const auto check = [&](auto policy) {
        CAPTURE(policy.name, name_of(dtype), group);
        BlockPool pool({.block_rows = 8});
        KVCache narrow(shape, policy, Budget{.tokens = 9}, pool),
            wide(floats, policy, Budget{.tokens = 9}, pool);
        narrow.begin_prompt(prompt);
        wide.begin_prompt(prompt);
        for (std::size_t first = 0; first < prompt; first += 15)
            REQUIRE(step(narrow, wide, stream, first, 15));
        narrow.end_prompt();
        wide.end_prompt();
        for (std::size_t token = prompt; token < tokens; ++token)
            REQUIRE(step(narrow, wide, stream, token, 1));
        REQUIRE(narrow.rows(0, 0) < tokens);
    };
    check(H2O{});
    check(KeyDiff{});
    check(SnapKV{.window = 4, .kernel = 3, .decode_interval = 2});
    check(OBCache{.kind = OBCache::Score::joint, .recent = 3});
    check(Caote{});
    check(Caote<>{.fast = true});
    check(RKV{.window = 2, .interval = 4});
}

TEST_CASE("evictions move int8 and int4 rows bit for bit", "[property]") {
    const DType dtype = GENERATE(DType::int8, DType::int4);
    const CacheShape shape = shape_of(dtype, 2);
    const TokenStream stream(shape, tokens, 3);
    const auto check = [&](auto policy) {
        CAPTURE(policy.name, name_of(dtype));
        BlockPool pool({.block_rows = 4});
        KVCache cache(shape, policy, Budget{.tokens = 9}, pool);
        using Bytes = std::vector<std::byte>;
        std::map<std::pair<std::size_t, position_t>, std::pair<Bytes, Bytes>> written;
        const auto visit = [&](const auto& see) {
            for (std::size_t i = 0; i < shape.heads(); ++i) {
                const HeadView head = cache.view(i / 2, i % 2);
                for (std::size_t j = 0; j < head.rows(); ++j) {
                    const auto bytes = [&](const RowsView& rows) {
                        return Bytes(rows.row(j), rows.row(j) + rows.row_bytes());
                    };
                    see(std::pair(i, head.position[j]), std::pair(bytes(head.k), bytes(head.v)));
                }
            }
        };
        for (std::size_t token = 0; token < tokens; ++token) {
            for (std::size_t layer = 0; layer < shape.layers; ++layer) {
                cache.append(layer, stream.k(layer, token, 1), stream.v(layer, token, 1));
                visit([&](const auto& key, const auto& bytes) { written.emplace(key, bytes); });
                Outputs out(shape, 1);
                cache.attend(layer, stream.q(layer, token, 1), out.layer(layer));
            }
            cache.end_step();
            visit([&](const auto& key, const auto& bytes) { REQUIRE(written.at(key) == bytes); });
        }
        REQUIRE(cache.rows(0, 0) < tokens);
        REQUIRE(cache.bytes_moved() > 0);
    };
    check(H2O{});
    check(KeyDiff{});
    check(SnapKV{.window = 4, .kernel = 3, .decode_interval = 2});
    check(OBCache{.recent = 3});
    check(Caote{});
}

TEST_CASE("latent values of int8 and int4 rows are the first channels of their keys", "[differential]") {
    const DType dtype = GENERATE(DType::int8, DType::int4);
    CacheShape shape{
        .layers = 1, .q_heads = 4, .kv_heads = 1, .head_dim = 72, .value_dim = 40, .dtype = dtype};
    shape.latent = true;
    CacheShape apart = shape;
    apart.latent = false;
    apart.dtype = DType::f32;
    const TokenStream stream(shape, 20, 5);
    KVCache latent(shape, H2O{}, Budget{.tokens = 8}), wide(apart, H2O{}, Budget{.tokens = 8});
    CHECK(shape.row_bytes() == row_bytes(dtype, 72) + 8);
    for (std::size_t token = 0; token < 20; ++token) {
        const std::vector<float> k = as_stored(stream.k(0, token, 1), dtype);
        std::vector<float> a(4 * 40), b(4 * 40);
        latent.append(0, stream.k(0, token, 1), {});
        wide.append(0, head_major(k.data(), 1, 1, 72), head_major(k.data(), 1, 1, 40));
        latent.attend(0, stream.q(0, token, 1), head_major(a.data(), 4, 1, 40));
        wide.attend(0, stream.q(0, token, 1), head_major(b.data(), 4, 1, 40));
        latent.end_step();
        wide.end_step();
        REQUIRE(same_bits(a, b));
    }
}

TEST_CASE("bytes of int8 and int4 rows are counted as they lie", "[property]") {
    CHECK(shape_of(DType::int8, 1, 128).row_bytes() == 4 * 34 + 4 * 34 + 8);
    CHECK(shape_of(DType::int4, 1, 128).row_bytes() == 4 * 18 + 4 * 18 + 8);
    // A budget of bytes buys rows at what they take.
    const CacheShape shape = shape_of(DType::int4, 1, 128);
    const TokenStream stream(shape, tokens, 2);
    KVCache cache(shape, H2O{}, Budget{.bytes = shape.heads() * shape.row_bytes() * 9});
    for (std::size_t token = 0; token < tokens; ++token) feed(cache, stream, token, 1);
    for (std::size_t head = 0; head < 2; ++head) CHECK(cache.rows(0, head) == 9);
}

TEST_CASE("a saved cache of int8 rows is not one of int4 rows, nor one of another size", "[contract]") {
    const CacheShape shape = shape_of(DType::int8, 1);
    const TokenStream stream(shape, 8, 2);
    KVCache cache(shape, H2O{}, Budget{.tokens = 8});
    feed(cache, stream, 0, 8);
    const std::vector<std::byte> bytes = save(cache);
    KVCache other(shape_of(DType::int4, 1), H2O{}, Budget{.tokens = 8});
    CHECK(failure<error::format_error>([&] { load(other, bytes); }) == "load: dtype is int8, want int4");
    const SafeTensors file(bytes, "test");
    CHECK(file.tensor("layer.0.k").dtype == ElementType::u8);
    CHECK(file.tensor("layer.0.k").shape == std::vector<std::size_t>{16, row_bytes(DType::int8, 40)});
}
