#include "kvcull/cache/saved.hpp"

#include <string>
#include <vector>

#include "kvcull/policies.hpp"
#include "support/catch.hpp"
#include "support/every_policy.hpp"
#include "support/failure.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

constexpr CacheShape shape{.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 12, .value_dim = 8};

static_assert(Savable<Full> && Savable<Streaming> && Savable<H2O> && Savable<KeyDiff> && Savable<SnapKV> &&
              Savable<OBCache> && Savable<Caote<>> && Savable<Caote<H2O>> && Savable<RKV> &&
              Savable<SkipKV<>> && Savable<TrimKV>);

template <class Cache>
void feed_prompt(Cache& cache, const TokenStream& stream, std::size_t first, std::size_t end,
                 std::size_t chunk) {
    cache.begin_prompt();
    in_chunks(end - first, chunk,
              [&](std::size_t at, std::size_t count) { feed(cache, stream, first + at, count); });
    cache.end_prompt();
}
template <class Cache>
std::vector<float> feed_decode(Cache& cache, const TokenStream& stream, std::size_t first, std::size_t end) {
    std::vector<float> all;
    for (std::size_t at = first; at < end; ++at) {
        const std::vector<float> out = feed(cache, stream, at, 1);
        all.insert(all.end(), out.begin(), out.end());
    }
    return all;
}

/// A small cache of two ragged heads.
KVCache<EpiCache> small(BlockPool& pool, std::size_t tokens = 9) {
    const CacheShape one{.layers = 1, .q_heads = 2, .kv_heads = 2, .head_dim = 2};
    const TokenStream stream(one, tokens + 2, 3);
    KVCache cache(one, EpiCache{}, Budget{.tokens = 4}, pool);
    feed_prompt(cache, stream, 0, tokens, 4);
    std::vector<float> out(2 * 2 * 2);
    cache.probe(0, stream.q(0, tokens, 2), stream.k(0, tokens, 2), stream.v(0, tokens, 2),
                head_major(out.data(), 2, 2, 2));
    return cache;
}

}  // namespace

TEST_CASE("a cache that was loaded holds the same and goes on the same, bit for bit", "[property]") {
    for (const DType dtype : all_dtypes) {
        CacheShape of = shape;
        of.dtype = dtype;
        const TokenStream stream(of, 60, 7);
        const auto check = [&]<Policy P>(const P& policy) {
            if constexpr (Savable<P>) {
                BlockPool pool({.block_rows = 5}), other({.block_rows = 8});
                KVCache cache(of, policy, Budget{.tokens = 10}, pool),
                    loaded(of, policy, Budget{.tokens = 10}, other);
                cache.pin(2, 4);
                feed_prompt(cache, stream, 0, 30, 7);
                feed_decode(cache, stream, 30, 40);
                const std::vector<std::byte> bytes = save(cache);
                feed_prompt(loaded, stream, 20, 45, 25);  // something else goes
                load(loaded, bytes);
                CAPTURE(P::name, name_of(dtype));
                REQUIRE(same_live(loaded.evictor().live(), cache.evictor().live()));
                REQUIRE(save(loaded) == bytes);
                REQUIRE(same_bits(feed_decode(loaded, stream, 40, 60), feed_decode(cache, stream, 40, 60)));
                REQUIRE(save(loaded) == save(cache));
            }
        };
        for_every_policy(check);
        check(EpiCache{.sinks = 1});
    }
}

TEST_CASE("windows and latent values come back too", "[property]") {
    CacheShape of{.layers = 3, .q_heads = 4, .kv_heads = 2, .head_dim = 12, .value_dim = 8};
    of.latent = true;
    of.traits = {{.window = 16}, {}, {.evicts = false}};
    const TokenStream stream(of, 60, 9);
    KVCache cache(of, H2O{}, Budget{.tokens = 10}), loaded(of, H2O{}, Budget{.tokens = 10});
    const auto decode = [&](auto& into, std::size_t first, std::size_t end) {
        std::vector<float> all;
        for (std::size_t at = first; at < end; ++at)
            for (std::size_t layer = 0; layer < of.layers; ++layer) {
                std::vector<float> out(of.q_heads * of.values());
                into.append(layer, stream.k(layer, at, 1), {});
                into.attend(layer, stream.q(layer, at, 1),
                            head_major(out.data(), of.q_heads, 1, of.values()));
                all.insert(all.end(), out.begin(), out.end());
                if (layer + 1 == of.layers) into.end_step();
            }
        return all;
    };
    decode(cache, 0, 40);
    const std::vector<std::byte> bytes = save(cache);
    load(loaded, bytes);
    REQUIRE(same_bits(decode(loaded, 40, 60), decode(cache, 40, 60)));
    REQUIRE(save(loaded) == save(cache));
    CHECK(failure<error::shape_error>([&] { loaded.truncate(30); }).find("window of layer 0") !=
          std::string::npos);

    of.traits[0].window = 17;
    KVCache other(of, H2O{}, Budget{.tokens = 10});
    CHECK(failure<error::format_error>([&] { load(other, bytes); }) ==
          "load: windows is 16 0 0, want 17 0 0");
}

TEST_CASE("an empty cache and one with empty heads come back too", "[property]") {
    BlockPool pool({.block_rows = 3});
    KVCache empty(shape, EpiCache{}, Budget{.tokens = 4}, pool);
    KVCache loaded(shape, EpiCache{}, Budget{.tokens = 4}, pool);
    feed(loaded, TokenStream(shape, 3, 1), 0, 3);
    load(loaded, save(empty));
    CHECK(loaded.seen() == 0);
    CHECK(loaded.rows(1, 1) == 0);
    CHECK(loaded.bytes() == 0);
    feed(loaded, TokenStream(shape, 3, 1), 0, 3);
    loaded.truncate(1);
    CHECK(loaded.rows(1, 1) == 2);
}

TEST_CASE("loading takes no more than the larger cache, gives the rest back and releases marks",
          "[property]") {
    BlockPool pool({.block_rows = 4}), other({.block_rows = 4});
    const TokenStream stream(shape, 50, 2);
    KVCache large(shape, Full{}, Budget{}, pool), small_one(shape, Full{}, Budget{}, other);
    feed(large, stream, 0, 40);
    feed(small_one, stream, 0, 9);
    const std::size_t full = large.bytes();
    const Mark mark = large.mark();
    load(large, save(small_one));
    CHECK(large.bytes() == small_one.bytes());
    CHECK(pool.bytes() == other.bytes());
    CHECK_THROWS_AS(large.rollback(mark), error::state_error);
    KVCache again(shape, Full{}, Budget{}, other);
    feed(again, stream, 0, 40);
    load(small_one, save(again));
    CHECK(small_one.peak_bytes() == full);
}

TEST_CASE("no byte may be cut off or changed: an error, and the cache stays as it was", "[contract]") {
    BlockPool pool({.block_rows = 3});
    KVCache<EpiCache> cache = small(pool), target = small(pool, 6);
    const std::vector<std::byte> before = save(target);
    const std::vector<std::byte> bytes = save(cache);
    std::size_t accepted = 0;
    const auto attempt = [&](std::span<const std::byte> some) {
        try {
            load(target, some);
            ++accepted;
        } catch (const error::format_error&) {
        }
    };
    for (std::size_t length = 0; length < bytes.size(); ++length) attempt(std::span(bytes).first(length));
    for (std::size_t i = 0; i < bytes.size(); ++i) {
        std::vector<std::byte> altered = bytes;
        altered[i] ^= std::byte{1} << (i % 8);
        attempt(altered);
    }
    CHECK(accepted == 0);
    CHECK(save(target) == before);
    load(target, bytes);
    CHECK(save(target) == save(cache));
}

TEST_CASE("bytes of another cache are refused by what differs", "[contract]") {
    BlockPool pool;
    KVCache<EpiCache> cache = small(pool);
    const CacheShape of = cache.shape();
    const std::vector<std::byte> bytes = save(cache);
    const auto refusal = [&](CacheShape other, const auto& policy) {
        KVCache target(other, policy, Budget{.tokens = 4}, pool);
        return failure<error::format_error>([&] { load(target, bytes); });
    };
    CacheShape other = of;
    other.head_dim = 4;
    CHECK(refusal(other, EpiCache{}) == "load: head_dim is 2, want 4");
    other = of;
    other.dtype = DType::bf16;
    CHECK(refusal(other, EpiCache{}) == "load: dtype is f32, want bf16");
    other = of;
    other.scale = 0.5F;
    CHECK_THAT(refusal(other, EpiCache{}),
               contains_text("load: scale is 0.7071") && contains_text("want 0.5"));
    other = of;
    other.softcap = 30.0F;
    CHECK(refusal(other, EpiCache{}) == "load: softcap is 0, want 30");
    other = of;
    other.traits.assign(of.layers, {});
    other.traits[0].evicts = false;
    CHECK(refusal(other, EpiCache{}) == "load: spared_layers is , want 0");
    CHECK(refusal(of, Streaming{}) == "load: policy is epicache, want streaming");
    const std::vector<std::byte> foreign = SafeTensors::serialize({{"format", "pt"}}, {});
    CHECK(failure<error::format_error>([&] { load(cache, foreign); }) == "load: dtype is missing, want f32");
}

TEST_CASE("a policy's state is read back only with the sizes that it has in this cache, and consistent",
          "[contract]") {
    const CacheShape one{.layers = 1, .q_heads = 4, .kv_heads = 2, .head_dim = 6};
    const TokenStream stream(one, 30, 4);
    KVCache cache(one, SnapKV{.window = 4, .kernel = 3, .decode_interval = 3}, Budget{.tokens = 10});
    feed_prompt(cache, stream, 0, 20, 7);
    const std::vector<std::byte> bytes = save(cache);
    KVCache wider(one, SnapKV{.window = 5, .kernel = 3, .decode_interval = 3}, Budget{.tokens = 10});
    CHECK(failure<error::format_error>([&] { load(wider, bytes); }) ==
          "load: size of 'layer.0.head.0.state.1' is 48, want 60");  // window * group * head_dim

    const SafeTensors file(std::span<const std::byte>{bytes});
    const std::uint64_t beyond = 4;  // slots are 0 to 3
    std::vector<Tensor> tensors = file.tensors();
    for (Tensor& tensor : tensors)
        if (tensor.name == "layer.0.head.1.state.3") tensor.bytes = std::as_bytes(std::span(&beyond, 1));
    SafeTensors::Metadata metadata = file.metadata();
    metadata["checksum"] = detail::checksum(metadata, tensors);
    const auto forged = SafeTensors::serialize(metadata, tensors);
    CHECK(failure<error::format_error>([&] { load(cache, forged); }) ==
          "load: state of layer 0, head 1 is inconsistent, want one that this policy leaves behind");
}

TEST_CASE("layers whose policy was shown nothing come back as such", "[property]") {
    CacheShape of = shape;
    of.traits = {{.evicts = false}, {}};
    const TokenStream stream(of, 40, 6);
    KVCache cache(of, OBCache{.recent = 3}, Budget{.tokens = 10}),
        loaded(of, OBCache{.recent = 3}, Budget{.tokens = 10});
    feed_decode(cache, stream, 0, 20);
    load(loaded, save(cache));
    REQUIRE(same_bits(feed_decode(loaded, stream, 20, 40), feed_decode(cache, stream, 20, 40)));
    REQUIRE(save(loaded) == save(cache));
}

TEST_CASE("what a file says must make sense even if its checksum holds", "[contract]") {
    BlockPool pool;
    KVCache<EpiCache> cache = small(pool);
    cache.pin(2, 3);
    cache.pin(7, 9);
    const std::vector<std::byte> bytes = save(cache);
    const SafeTensors file(std::span<const std::byte>{bytes});
    const auto refusal = [&](const std::string& name, std::size_t at, std::int64_t value) {
        std::vector<Tensor> tensors = file.tensors();
        std::vector<std::int64_t> numbers;
        for (Tensor& tensor : tensors)
            if (tensor.name == name) {
                numbers = tensor.to_vector<std::int64_t>();
                numbers.at(at) = value;
                tensor.bytes = std::as_bytes(std::span(numbers));
            }
        SafeTensors::Metadata metadata = file.metadata();
        metadata["checksum"] = detail::checksum(metadata, tensors);
        const auto forged = SafeTensors::serialize(metadata, tensors);
        return failure<error::format_error>([&] { load(cache, forged); });
    };
    const auto first = file.tensor("layer.0.position").to_vector<std::int64_t>()[0];
    CHECK(refusal("layer.0.head_len", 0, 100) == "load: rows of head 0 is 100, want at most the 8 left of 8");
    CHECK(refusal("layer.0.head_len", 0, -1).find("rows of head 0 is 18446744073709551615") !=
          std::string::npos);
    CHECK(refusal("layer.0.head_len", 1, 0).find("size of 'layer.0.head.1.state.0'") != std::string::npos);
    CHECK(refusal("layer.0.position", 1, first) ==
          "load: positions of head 0 is out of range or repeated, want each once, below 9");
    CHECK(refusal("layer.0.position", 7, 9) ==
          "load: positions of head 1 is out of range or repeated, want each once, below 9");
    CHECK(refusal("layer.0.position", 0, -1).find("positions of head 0") != std::string::npos);
    const std::string apart =
        "load: pinned is ranges that overlap or end before they begin, want ranges that are apart";
    CHECK(refusal("pinned", 0, -1) == apart);
    CHECK(refusal("pinned", 0, 3) == apart);
    CHECK(refusal("pinned", 1, 8) == apart);
    CHECK(refusal("pinned", 3, std::int64_t{1} << 62U).starts_with("load: pinned is 4611686018427387898, "));
    CHECK(refusal("pinned", 3, 11) == "load: pinned is 5, want at most the budget 4");
    CHECK(refusal("live", 3, 2) == "load: phase is 2, want 0 or 1");
    CHECK(refusal("live", 6, 10) == "load: tokens without a gap is 10, want at most 9");
}

TEST_CASE("a pool without room for it leaves the cache as it was", "[contract]") {
    const TokenStream stream(shape, 60, 2);
    BlockPool pool({.block_rows = 4}), tight({.bytes = 20000, .block_rows = 4});
    KVCache large(shape, Full{}, Budget{}, pool), target(shape, Full{}, Budget{}, tight);
    feed(large, stream, 0, 60);
    feed(target, stream, 0, 10);
    const Mark mark = target.mark();
    feed(target, stream, 10, 3);
    const std::vector<std::byte> before = save(target);
    const std::size_t held = tight.bytes();
    REQUIRE_THROWS_AS(load(target, save(large)), error::capacity_error);
    CHECK(save(target) == before);
    CHECK(tight.bytes() == held);
    target.rollback(mark);
    CHECK(target.seen() == 10);
}

TEST_CASE("a cache is saved between two steps, and the caller's tensors need names of their own",
          "[contract]") {
    const TokenStream stream(shape, 4, 2);
    KVCache cache(shape, Full{});
    const std::vector<double> numbers{1, 2};
    const Tensor mine = Tensor::of("mine", {2}, std::span<const double>(numbers)),
                 taken = Tensor::of("live", {2}, std::span<const double>(numbers));
    const auto bytes = save(cache, std::span(&mine, 1));
    CHECK(open_saved(cache, bytes).tensor("mine").to_vector<double>() == numbers);
    CHECK_THROWS_AS(save(cache, std::span(&taken, 1)), error::format_error);
    cache.append(0, stream.k(0, 0, 2), stream.v(0, 0, 2));
    CHECK(failure<error::state_error>([&] { (void)save(cache); }) ==
          "save: call is inside a step, want after end_step");
    CHECK_THROWS_AS(load(cache, bytes), error::state_error);
}
