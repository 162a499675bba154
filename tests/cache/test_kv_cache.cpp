#include "kvcull/cache/kv_cache.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "kvcull/policies.hpp"
#include "kvcull/select/head_rules.hpp"
#include "support/catch.hpp"
#include "support/counting.hpp"
#include "support/every_policy.hpp"
#include "support/failure.hpp"
#include "support/foreign.hpp"
#include "support/reference.hpp"
#include "support/stubs.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

constexpr CacheShape small{.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 8, .value_dim = 6};

static_assert(std::is_move_constructible_v<KVCache<H2O>> && !std::is_copy_constructible_v<KVCache<H2O>>);
static_assert(!std::is_copy_assignable_v<KVCache<H2O>> && !std::is_move_assignable_v<KVCache<H2O>>);

/// Bytes of one block, counted by hand: K, V and positions, each on a 64-byte boundary, and a header.
std::size_t block_bytes(const CacheShape& shape, std::size_t block_rows) {
    const auto aligned = [](std::size_t bytes) { return (bytes + 63) / 64 * 64; };
    const std::size_t element = shape.dtype == DType::f32 ? 4 : 2;
    return 64 + aligned(block_rows * shape.head_dim * element) +
           aligned(block_rows * shape.values() * element) + aligned(block_rows * 8);
}
/// Blocks that a head of `rows` rows takes, by counting up.
std::size_t blocks_of(std::size_t rows, std::size_t block_rows) {
    std::size_t blocks = 0;
    while (blocks * block_rows < rows) ++blocks;
    return blocks;
}

/// Evicts at the step's end, with a sequence state that does not grow.
struct LateLike {
    static constexpr std::string_view name = "late_like";
    using State = NoState;
    struct Sequence {
        std::size_t steps = 0;
    };

    static constexpr auto fields() { return std::tuple{}; }
    static constexpr Needs needs(Phase /*phase*/) { return {}; }
    static void observe(State& /*state*/, const HeadStep& /*step*/) {}
    static void end_step(Sequence& sequence, const StepInputs& /*inputs*/) { ++sequence.steps; }
    static void score(const State& /*state*/, const Sequence& sequence, const HeadStep& step,
                      std::span<float> out) {
        for (std::size_t j = 0; j < out.size(); ++j)
            out[j] = static_cast<float>(step.cached.position[j] % static_cast<position_t>(sequence.steps));
    }
};
static_assert(SequenceState<LateLike>);

/// Random without state, whose rows stay ascending.
struct OrderedRandom : Random {
    static constexpr bool ordered() { return true; }
};
static_assert(Ordered<OrderedRandom>);

/// All that can be seen of a cache.
template <class P>
struct Snapshot {
    Live<P> live;
    std::vector<std::vector<position_t>> positions;  // in slot order
    std::vector<std::vector<float>> k, v, scores;
    std::size_t bytes, pool_bytes;

    template <class R>
    explicit Snapshot(KVCache<P, R>& cache)
        : live(cache.shape()), bytes(cache.bytes()), pool_bytes(cache.pool().bytes()) {
        for (std::size_t layer = 0; layer < cache.shape().layers; ++layer)
            for (std::size_t head = 0; head < cache.shape().kv_heads; ++head) {
                const HeadView view = cache.view(layer, head);
                positions.push_back(to_vector(view.position));
                k.push_back(widened(view.k));
                v.push_back(widened(view.v));
                scores.push_back(cache.scores(layer, head));
            }
        live = cache.evictor().live();  // a policy may remember what it prepared for the scores
    }
    [[nodiscard]] bool same_rows(const Snapshot& other) const {
        const auto same = [](const auto& a, const auto& b) {
            return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                              [](const auto& x, const auto& y) { return same_bits(x, y); });
        };
        return positions == other.positions && same(k, other.k) && same(v, other.v) &&
               same(scores, other.scores) && same_live(live, other.live);
    }
    [[nodiscard]] bool operator==(const Snapshot& other) const {
        return same_rows(other) && bytes == other.bytes && pool_bytes == other.pool_bytes;
    }
};
template <class P, class R>
Snapshot(KVCache<P, R>&) -> Snapshot<P>;

/// One call of `count` tokens, and before each layer attends, attention over the same rows in the same slot
/// order in caches that never evicted, one per KV head. @returns whether all outputs agree bit for bit.
template <class P>
bool agrees_with_rebuilt(KVCache<P>& cache, const TokenStream& stream, std::size_t first, std::size_t count) {
    const CacheShape& shape = cache.shape();
    const std::size_t group = shape.group(), values = shape.values(), dim = shape.head_dim;
    bool good = true;
    for (std::size_t layer = 0; layer < shape.layers; ++layer) {
        cache.append(layer, stream.k(layer, first, count), stream.v(layer, first, count));
        const auto q = stream.q(layer, first, count);
        std::vector<std::vector<float>> expected;
        for (std::size_t head = 0; head < shape.kv_heads; ++head) {
            const HeadView view = cache.view(layer, head);
            const std::vector<float> k = widened(view.k), v = widened(view.v);
            const std::size_t old = view.rows() - count;
            CacheShape one = shape;
            one.layers = one.kv_heads = 1;
            one.q_heads = group;
            KVCache rebuilt(one, Full{});
            if (old > 0) {
                const std::vector<float> any(group * old * dim, 1.0F);
                std::vector<float> ignored(group * old * values);
                rebuilt.append(0, head_major(k.data(), 1, old, dim), head_major(v.data(), 1, old, values));
                rebuilt.attend(0, head_major(any.data(), group, old, dim),
                               head_major(ignored.data(), group, old, values));
                rebuilt.end_step();
            }
            std::vector<float>& out = expected.emplace_back(group * count * values, 5.0F);
            rebuilt.append(0, head_major(k.data() + old * dim, 1, count, dim),
                           head_major(v.data() + old * values, 1, count, values));
            HeadsView<const float> own = q;
            own.data = q.row(head * group, 0);
            own.heads = group;
            rebuilt.attend(0, own, head_major(out.data(), group, count, values));
        }
        Outputs out(shape, count);
        cache.attend(layer, q, out.layer(layer));
        for (std::size_t head = 0; head < shape.kv_heads; ++head)
            for (std::size_t g = 0; g < group; ++g)
                for (std::size_t i = 0; i < count; ++i)
                    good =
                        good &&
                        same_bits(std::span<const float>(out.layer(layer).row(head * group + g, i), values),
                                  std::span<const float>(&expected[head][(g * count + i) * values], values));
    }
    cache.end_step();
    return good;
}

/// What a step of one token takes from the heap, into outputs that are there.
template <class Cache>
std::size_t allocations_of_step(Cache& cache, const TokenStream& stream, std::size_t token, Outputs& out,
                                const AppendInputs& inputs = {}) {
    const CountAllocations counter;
    for (std::size_t layer = 0; layer < cache.shape().layers; ++layer) {
        cache.append(layer, stream.k(layer, token, 1), stream.v(layer, token, 1), inputs);
        cache.attend(layer, stream.q(layer, token, 1), out.layer(layer));
    }
    cache.end_step();
    return counter.count();
}

}  // namespace

TEST_CASE("attention after evictions has the bits of a cache built from the kept rows in their slot order",
          "[differential]") {
    const DType dtype = GENERATE(DType::f32, DType::f16, DType::bf16, DType::int8, DType::int4);
    const std::size_t group = GENERATE(std::size_t{1}, 4, 7);
    const std::size_t dim = GENERATE(std::size_t{1}, 80, 128, 257);
    const std::size_t value_dim = dim == 128 ? dim : dim / 2 + 3;
    CAPTURE(name_of(dtype), group, dim);
    const CacheShape shape{.layers = 1,
                           .q_heads = 2 * group,
                           .kv_heads = 2,
                           .head_dim = dim,
                           .value_dim = value_dim,
                           .dtype = dtype};
    const TokenStream stream(shape, 50, dim + group);
    const auto run = [&](auto policy, std::size_t chunk) {
        CAPTURE(policy.name, chunk);
        BlockPool pool({.block_rows = 8});
        KVCache cache(shape, policy, Budget{.tokens = 12}, pool);
        cache.begin_prompt(30);
        in_chunks(30, chunk, [&](std::size_t first, std::size_t count) {
            REQUIRE(agrees_with_rebuilt(cache, stream, first, count));
        });
        cache.end_prompt();
        for (std::size_t token = 30; token < 40; ++token)
            REQUIRE(agrees_with_rebuilt(cache, stream, token, 1));
        REQUIRE(agrees_with_rebuilt(cache, stream, 40, 3));
        REQUIRE(cache.rows(0, 0) < 16);
        const auto held = to_vector(cache.view(0, 0).position);
        REQUIRE(std::is_sorted(held.begin(), held.end()) == is_ordered(policy));
    };
    run(H2O{}, 11);
    run(H2O{}, 30);
    run(SnapKV{.window = 4, .kernel = 3, .decode_interval = 2}, 11);
}

TEST_CASE("a policy whose rows may lie in any order moves at most two rows for each row that it evicts",
          "[property]") {
    for_every_policy([](auto policy) {
        if (is_ordered(policy)) return;
        CAPTURE(policy.name);
        const TokenStream stream(small, 80, 3);
        BlockPool pool({.block_rows = 4});
        KVCache cache(small, policy, Budget{.tokens = 9}, pool);
        std::size_t evicted = 0;
        const std::size_t row_bytes = (8 + 6) * 4 + 8;
        for (std::size_t first = 0; first < 80;) {
            const std::size_t count = first == 0 ? 25 : first % 3 == 0 ? 5 : 1;
            feed(cache, stream, first, std::min(count, 80 - first));
            first += std::min(count, 80 - first);
            evicted = 0;
            for (std::size_t i = 0; i < 4; ++i) evicted += first - cache.rows(i / 2, i % 2);
            REQUIRE(cache.bytes_moved() <= 2 * evicted * row_bytes);
        }
        if (!std::is_same_v<decltype(policy), Full>) {
            REQUIRE(evicted == 4 * (80 - 9));
            REQUIRE(cache.bytes_moved() > 0);
        }
    });
}

TEST_CASE("after reserve, no decode step takes anything from the heap, nor more blocks from the pool",
          "[property]") {
    const std::size_t slack = GENERATE(std::size_t{0}, 5);
    const bool threaded = GENERATE(false, true);  // an executor may allocate, the cache around it may not
    const auto run = [&](auto policy) {
        using P = decltype(policy);
        CAPTURE(policy.name, slack, threaded);
        const std::size_t tokens = 70, rows = 20 + slack;
        const TokenStream stream(small, tokens, 4);
        BlockPool pool({.block_rows = 4});
        const std::size_t budget = 14;
        KVCache cache(small, policy, Budget{.tokens = budget, .slack = slack}, pool);
        if (threaded)
            cache.set_executor([](std::size_t count, const std::function<void(std::size_t)>& body) {
                for (std::size_t i = count; i-- > 0;) body(i);
            });
        const std::array<float, 6> log_beta{-1.0F, -2.0F, -1.5F, -3.0F, -0.1F, -0.7F};
        // Some states take memory of a fixed size when they see the first token; any other begins cold.
        constexpr bool warm = std::is_same_v<P, SnapKV> || std::is_base_of_v<RKV, P> ||
                              std::is_same_v<P, CaoteLike<LastRowLike>> || QueriesKeys<P> || ReadsValues<P>;
        if (warm) feed(cache, stream, 0, 3);
        const bool full = std::is_same_v<P, Full>;
        cache.reserve(full ? tokens : rows);
        pool.set_limit(pool.bytes());  // what is reserved must do
        const std::size_t bytes = cache.bytes();
        Outputs out(small, 1);
        std::size_t most = 0;
        for (std::size_t token = warm ? 3 : 0; token < tokens; ++token) {
            const std::size_t count =
                allocations_of_step(cache, stream, token, out, {.log_beta = {&log_beta[token % 5], 2, 1}});
            CAPTURE(token);
            REQUIRE(count == 0);
            REQUIRE(cache.bytes() <= bytes);
            most = std::max(most, cache.rows(0, 0));
        }
        REQUIRE(most <= (full ? tokens : rows));
        if (!full) REQUIRE(most >= budget);
    };
    for_every_policy(run);
    run(TrimDynamicLike{});
    run(CaoteLike<LastRowLike>{});
    run(ObcLike{});
    if (slack == 0) run(EveryLike{});
}

TEST_CASE(
    "evictions in all layers at once, and under a rule that divides heads, take nothing from the heap either",
    "[property]") {
    const std::size_t tokens = 60;
    const TokenStream stream(small, tokens, 5);
    const auto run = [&](const auto& policy, const auto& rule, std::size_t warm) {
        KVCache cache(small, policy, Budget{.tokens = 10}, rule);
        if (warm > 0) feed(cache, stream, 0, warm);
        cache.reserve(14);
        Outputs out(small, 1);
        for (std::size_t token = warm; token < tokens; ++token)
            REQUIRE(allocations_of_step(cache, stream, token, out) == 0);
        REQUIRE(cache.rows(1, 1) == 10);
    };
    run(LateLike{}, Uniform{}, 3);
    run(H2O{.recent = 2}, AdaKV<>{}, 0);
}

TEST_CASE("bytes and their peak are what the pool counts", "[property]") {
    const std::size_t block_rows = GENERATE(std::size_t{1}, 4, 16);
    const bool ordered = GENERATE(true, false);
    CAPTURE(block_rows, ordered);
    const TokenStream stream(small, 200, 6);
    BlockPool pool({.block_rows = block_rows});
    const std::size_t block = block_bytes(small, block_rows);
    // Policies without state, so that blocks are all there is.
    const auto run = [&](auto policy) {
        KVCache cache(small, policy, Budget{.tokens = 10}, pool);
        REQUIRE(cache.bytes() == 0);
        std::size_t peak = 0, next = 0;
        // What the step leaves in the end, and one layer before it has evicted.
        const auto step = [&](std::size_t count) {
            std::size_t blocks = 0, passing = 0;
            for (std::size_t layer = 0; layer < 2; ++layer) {
                std::size_t before = 0, whole = 0, after = 0;
                for (std::size_t head = 0; head < 2; ++head) {
                    const std::size_t rows = cache.rows(layer, head);
                    before += blocks_of(rows, block_rows);
                    whole += blocks_of(rows + count, block_rows);
                    after += blocks_of(std::min<std::size_t>(rows + count, 10), block_rows);
                }
                blocks += std::max(before, after);
                passing = std::max(passing, whole - std::max(before, after));
            }
            peak = std::max(peak, (blocks + passing) * block);
            feed(cache, stream, next, count);
            next += count;
        };
        const auto check = [&] {
            REQUIRE(cache.bytes() == pool.bytes());
            REQUIRE(cache.peak_bytes() == pool.peak_bytes());
            REQUIRE(cache.peak_bytes() >= cache.bytes());
        };
        for (const std::size_t count : {7U, 20U, 1U, 1U, 3U, 1U}) {
            step(count);
            std::size_t blocks = 0;
            for (std::size_t i = 0; i < 4; ++i) blocks += blocks_of(cache.rows(i / 2, i % 2), block_rows);
            REQUIRE(cache.bytes() == blocks * block);
            REQUIRE(cache.peak_bytes() == peak);
            check();
        }
        // Marks count, whatever else happens to the rows.
        const Mark mark = cache.mark();
        check();
        step(1);
        check();
        cache.make_room(5);
        check();
        const Mark second = cache.mark();
        step(5);
        cache.truncate(3);
        check();
        cache.rollback(mark);
        check();
        step(2);
        cache.release(second);
        check();
        cache.reserve(30);
        check();
        REQUIRE(cache.bytes() >= 4 * blocks_of(30, block_rows) * block);
        step(1);
        check();
        cache.release(mark);
        check();
        cache.trim();
        std::size_t blocks = 0;
        for (std::size_t i = 0; i < 4; ++i) blocks += blocks_of(cache.rows(i / 2, i % 2), block_rows);
        REQUIRE(cache.bytes() == blocks * block);
        check();
    };
    if (ordered)
        run(OrderedRandom{});
    else
        run(Random{});
    REQUIRE(pool.bytes() == 0);
}

TEST_CASE("policy state counts too", "[property]") {
    const TokenStream stream(small, 20, 7);
    BlockPool pool;
    KVCache cache(small, Vatp{.sinks = 1}, Budget{.tokens = 6}, pool);
    feed(cache, stream, 0, 20);
    REQUIRE(cache.bytes() >= pool.bytes() + 4 * 2 * 6 * sizeof(float));
    REQUIRE(cache.bytes() <= pool.bytes() + 4 * 2 * 2 * 20 * sizeof(float));
    REQUIRE(cache.peak_bytes() >= pool.peak_bytes() + 4 * 20 * sizeof(float));
}

namespace {

/// What happens to a cache between a mark and a rollback.
template <class P, class R>
std::vector<float> wander(KVCache<P, R>& cache, const TokenStream& stream, std::size_t first) {
    std::vector<float> outputs;
    const auto step = [&](std::size_t count) {
        const std::vector<float> out = feed(cache, stream, first, count);
        outputs.insert(outputs.end(), out.begin(), out.end());
        first += count;
    };
    for (std::size_t i = 0; i < 4; ++i) step(1);
    step(6);
    cache.make_room(2);
    step(2);
    cache.truncate(1);
    step(1);
    cache.begin_prompt(5);
    step(5);
    cache.end_prompt();
    for (std::size_t i = 0; i < 4; ++i) step(1);
    return outputs;
}

}  // namespace

TEST_CASE("rollback restores rows, positions, statistics and what follows, bit for bit", "[property]") {
    for_every_policy([](auto policy) {
        CAPTURE(policy.name);
        const TokenStream stream(small, 80, 8);
        BlockPool pool({.block_rows = 4});
        KVCache cache(small, policy, Budget{.tokens = 9}, pool);
        cache.pin(4, 5);
        cache.begin_prompt(20);
        feed(cache, stream, 0, 13);
        const Mark within_prompt = cache.mark();  // between chunks
        const Snapshot there(cache);
        feed(cache, stream, 13, 7);
        cache.end_prompt();
        for (std::size_t token = 20; token < 24; ++token) feed(cache, stream, token, 1);
        const Mark mark = cache.mark();
        const Snapshot before(cache);
        const std::vector<float> outputs = wander(cache, stream, 24);
        const Snapshot after(cache);
        for (int i = 0; i < 2; ++i) {
            cache.rollback(mark);
            REQUIRE(Snapshot(cache).same_rows(before));
            REQUIRE(pool.bytes() == before.pool_bytes);
            REQUIRE(same_bits(wander(cache, stream, 24), outputs));
            REQUIRE(Snapshot(cache).same_rows(after));
        }
        // From within a step, at each of its points, and under another hold.
        for (std::size_t point = 0; point < 4; ++point) {
            if (point == 3) cache.hold(true);
            Outputs out(small, 2);
            cache.append(0, stream.k(0, 60, 2), stream.v(0, 60, 2));
            if (point > 0) cache.attend(0, stream.q(0, 60, 2), out.layer(0));
            if (point > 1) cache.append(1, stream.k(1, 60, 2), stream.v(1, 60, 2));
            cache.rollback(mark);
            REQUIRE(Snapshot(cache).same_rows(before));
            REQUIRE(same_bits(wander(cache, stream, 24), outputs));
        }
        // An older mark, and then the newer one again.
        cache.rollback(within_prompt);
        REQUIRE(Snapshot(cache).same_rows(there));
        feed(cache, stream, 13, 7);
        cache.end_prompt();
        for (std::size_t token = 20; token < 24; ++token) feed(cache, stream, token, 1);
        REQUIRE(Snapshot(cache).same_rows(before));
        cache.rollback(mark);
        REQUIRE(Snapshot(cache).same_rows(before));
        REQUIRE(same_bits(wander(cache, stream, 24), outputs));
    });
}

TEST_CASE("a mark costs no rows until they change, and release frees what only it held", "[property]") {
    const TokenStream stream(small, 80, 9);
    BlockPool pool({.block_rows = 4});
    KVCache cache(small, Streaming{.sinks = 1}, Budget{.tokens = 16}, pool);
    feed(cache, stream, 0, 16);
    const std::size_t bytes = pool.bytes();
    const Mark mark = cache.mark(), twin = cache.mark();
    REQUIRE(pool.bytes() == bytes);
    for (std::size_t token = 16; token < 40; ++token) feed(cache, stream, token, 1);
    REQUIRE(pool.bytes() > bytes);
    REQUIRE(pool.bytes() <= 2 * bytes);
    cache.release(mark);
    REQUIRE(pool.bytes() > bytes);  // its twin holds the same blocks
    const std::string released =
        "mark is " + std::to_string(mark.serial) + ", want a mark of this cache that was not released";
    REQUIRE(failure<error::state_error>([&] { cache.rollback(mark); }) == "KVCache::rollback: " + released);
    REQUIRE(failure<error::state_error>([&] { cache.release(mark); }) == "KVCache::release: " + released);
    REQUIRE(failure<error::state_error>([&] { cache.rollback(Mark{}); }) ==
            "KVCache::rollback: mark is 0, want a mark of this cache that was not released");
    {
        KVCache other = cache.fork();
        const Mark own = other.mark();
        REQUIRE_THROWS_AS(other.rollback(twin), error::state_error);  // not another mark in its place
        REQUIRE_THROWS_AS(cache.rollback(own), error::state_error);
    }
    cache.rollback(twin);
    cache.release(twin);
    REQUIRE(pool.bytes() == bytes);
    const Mark third = cache.mark();
    REQUIRE(third.serial > twin.serial);  // serials are not used twice
    cache.append(0, stream.k(0, 40, 1), stream.v(0, 40, 1));
    REQUIRE(failure<error::state_error>([&] { (void)cache.mark(); }) ==
            "KVCache::mark: call is inside a step, want after end_step");
}

TEST_CASE("forks share the blocks of their prompt, and eviction in one never changes the other",
          "[property]") {
    CacheShape typed = small;
    typed.dtype = GENERATE(DType::f32, DType::int8);
    for_every_policy([&](auto policy) {
        CAPTURE(policy.name);
        const TokenStream stream(small, 100, 10), other(small, 100, 11);
        BlockPool pool({.block_rows = 4});
        KVCache cache(typed, policy, Budget{.tokens = 20}, pool);
        KVCache twin(typed, policy, Budget{.tokens = 20});  // never forked
        for (KVCache<decltype(policy)>* one : {&cache, &twin}) {
            one->begin_prompt(50);
            feed(*one, stream, 0, 50);
            one->end_prompt();
        }
        const std::size_t bytes = pool.bytes();
        KVCache fork = cache.fork();
        KVCache third = fork.fork();
        REQUIRE(pool.bytes() == bytes);
        REQUIRE(fork.bytes() <= cache.bytes());
        REQUIRE(fork.peak_bytes() == fork.bytes());
        REQUIRE(Snapshot(fork).same_rows(Snapshot(cache)));
        const Snapshot untouched(third);
        for (std::size_t token = 50; token < 90; ++token) {
            const std::vector<float> expected = feed(twin, stream, token, 1);
            REQUIRE(same_bits(feed(cache, stream, token, 1), expected));
            feed(fork, other, token, 1);  // goes another way
            // Rows that must stay in order move along with their neighbours, so more blocks are copied; a
            // step that may evict at its end copies them before its layers know what leaves.
            const std::size_t most = decides_late<decltype(policy)> ? 4 : is_ordered(policy) ? 3 : 2;
            if (token == 51) REQUIRE(pool.bytes() < most * bytes);
            if (token == 70) fork.make_room(10);
        }
        REQUIRE(Snapshot(cache).same_rows(Snapshot(twin)));
        REQUIRE(Snapshot(third).same_rows(untouched));
        for (std::size_t token = 50; token < 60; ++token)  // a late start from the same prompt
            feed(third, other, token, 1);
    });
}

TEST_CASE("a fork that will not evict asks for no blocks to evict with", "[property]") {
    const TokenStream stream(small, 80, 12);
    BlockPool pool({.block_rows = 4});
    const std::size_t block = block_bytes(small, 4);
    const auto run = [&](auto policy, Budget budget) {
        CAPTURE(policy.name);
        KVCache cache(small, policy, budget, pool);
        cache.begin_prompt();
        feed(cache, stream, 0, 40);
        cache.end_prompt();
        KVCache fork = cache.fork();
        // These steps need a new block per head, and a copy of the last one where that is partly filled.
        pool.set_limit(pool.bytes() + 8 * block);
        for (std::size_t token = 40; token < 44; ++token) REQUIRE_NOTHROW(feed(fork, stream, token, 1));
        pool.set_limit(SIZE_MAX);
    };
    run(Full{}, {});
    run(SnapKV{.window = 4}, {.tokens = 13});
    run(LaqLike{}, {.tokens = 13});
    run(EpiLike{}, {.tokens = 13});
    run(H2O{}, {.tokens = 60});
}

TEST_CASE("what copies no shared block asks a full pool for none", "[property]") {
    const TokenStream stream(small, 80, 12);
    const auto run = [&](auto policy, std::size_t budget, const auto& call) {
        CAPTURE(policy.name);
        BlockPool pool({.block_rows = 4});
        KVCache cache(small, policy, Budget{.tokens = budget}, pool);
        cache.begin_prompt();
        feed(cache, stream, 0, 42);
        const KVCache sharer = cache.fork();
        pool.set_limit(pool.bytes());
        REQUIRE_NOTHROW(call(cache));
        pool.set_limit(SIZE_MAX);
    };
    const auto end = [](auto& cache) { cache.end_prompt(); };
    const auto take_back = [](auto& cache) { cache.truncate(9); };
    const auto make_room = [](auto& cache) { cache.make_room(8); };
    run(H2O{}, 60, end);
    run(H2O{}, 60, take_back);
    run(H2O{}, 60, make_room);
    run(Streaming{}, 42, end);
    run(SnapKV{.window = 4}, 60, take_back);
}

TEST_CASE("a prompt that is taken back in part and goes on is evicted at its end", "[property]") {
    const TokenStream stream(small, 80, 13);
    const auto run = [&](auto policy) {
        for (const bool announced : {true, false}) {
            CAPTURE(policy.name, announced);
            BlockPool pool({.block_rows = 4});
            KVCache cache(small, policy, Budget{.tokens = 14}, pool);
            cache.begin_prompt(announced ? std::optional<std::size_t>{40} : std::nullopt);
            feed(cache, stream, 0, 40);
            cache.truncate(11);
            feed(cache, stream, 29, 11);
            cache.end_prompt();
            for (std::size_t i = 0; i < 4; ++i) REQUIRE(cache.rows(i / 2, i % 2) == 14);
        }
    };
    run(SnapKV{.window = 4});
    run(Tova{});
    run(H2O{.recent = 3});
    run(KeyDiff{});
}

TEST_CASE("a budget or a slack beyond what heads can hold is no limit, also where heads share it",
          "[property]") {
    const TokenStream stream(small, 80, 14);
    for (const std::size_t tokens : {SIZE_MAX, SIZE_MAX / 2 + 1, SIZE_MAX / 4 + 1}) {
        BlockPool pool({.block_rows = 4});
        KVCache cache(small, TrimDynamicLike{}, Budget{.tokens = tokens}, pool);
        KVCache waits(small, TrimDynamicLike{}, Budget{.tokens = 4, .slack = tokens}, pool);
        for (std::size_t token = 0; token < 20; ++token)
            for (auto* const one : {&cache, &waits}) {
                Outputs out(small, 1);
                for (std::size_t layer = 0; layer < small.layers; ++layer) {
                    one->append(layer, stream.k(layer, token, 1), stream.v(layer, token, 1),
                                {.log_beta = {stream.k(layer, token, 1).data, 2, 1}});
                    one->attend(layer, stream.q(layer, token, 1), out.layer(layer));
                }
                one->end_step();
            }
        for (std::size_t i = 0; i < 4; ++i) {
            CHECK(cache.rows(i / 2, i % 2) == 20);
            CHECK(waits.rows(i / 2, i % 2) == 20);
        }
    }
}

TEST_CASE("a fork of a plan holds what the plan keeps, and a plan for other rows is refused", "[contract]") {
    for_every_policy([](auto policy) {
        CAPTURE(policy.name);
        const TokenStream stream(small, 60, 13);
        BlockPool pool({.block_rows = 4});
        KVCache cache(small, policy, Budget{.tokens = 40}, pool);
        feed(cache, stream, 0, 30);
        const Snapshot before(cache);
        KVCache fork = cache.fork(cache.propose(9));
        REQUIRE(Snapshot(cache).same_rows(before));
        REQUIRE(fork.seen() == 30);
        std::vector<std::vector<position_t>> kept;
        for (std::size_t i = 0; i < 4; ++i) {
            REQUIRE(fork.rows(i / 2, i % 2) == 9);
            kept.push_back(fork.positions(i / 2, i % 2));
            // Statistics went along.
            const HeadView small_view = fork.view(i / 2, i % 2);
            const auto state = state_values(fork.evictor().live().states[i]);
            const auto whole = state_values(before.live.states[i]);
            for (std::size_t j = 0; j < 9 && !whole.empty() && whole.size() == 30; ++j)
                REQUIRE(same_bits(state[j], whole[static_cast<std::size_t>(small_view.position[j])]));
        }
        REQUIRE(pool.bytes() < 2 * before.pool_bytes);
        for (std::size_t token = 30; token < 33; ++token) feed(fork, stream, token, 1);
        for (std::size_t i = 0; i < 4; ++i) {
            REQUIRE(fork.rows(i / 2, i % 2) == 12);
            kept[i].insert(kept[i].end(), {30, 31, 32});
            REQUIRE(fork.positions(i / 2, i % 2) == kept[i]);
        }
        REQUIRE(Snapshot(cache).same_rows(before));

        const Plan stale = cache.propose(9);
        feed(cache, stream, 30, 1);
        REQUIRE(failure<error::shape_error>([&] { (void)cache.fork(stale); }) ==
                "KVCache::fork: plan[0].rows is 30, want 31");
        cache.append(0, stream.k(0, 31, 1), stream.v(0, 31, 1));
        REQUIRE(failure<error::state_error>([&] { (void)cache.fork(); }) ==
                "KVCache::fork: call is inside a step, want after end_step");
    });
}

TEST_CASE("truncate drops the newest tokens, shared blocks or not", "[contract]") {
    const bool shared = GENERATE(true, false);
    for_every_policy([&](auto policy) {
        CAPTURE(policy.name, shared);
        const TokenStream stream(small, 60, 14);
        BlockPool pool({.block_rows = 4});
        KVCache cache(small, policy, Budget{.tokens = 12}, pool);
        feed(cache, stream, 0, 20);
        std::optional<KVCache<decltype(policy)>> fork;
        if (shared) fork.emplace(cache.fork());
        const Snapshot before(cache);
        for (const std::size_t count : {0U, 1U, 5U, 9U}) {
            std::vector<std::vector<position_t>> expected;
            const auto end = static_cast<position_t>(cache.seen() - count);
            for (std::size_t i = 0; i < 4; ++i) {
                expected.push_back(cache.positions(i / 2, i % 2));
                std::erase_if(expected.back(), [&](position_t p) { return p >= end; });
            }
            cache.truncate(count);
            REQUIRE(cache.seen() == static_cast<std::size_t>(end));
            for (std::size_t i = 0; i < 4; ++i) REQUIRE(cache.positions(i / 2, i % 2) == expected[i]);
        }
        REQUIRE(failure<error::shape_error>([&] { cache.truncate(6); }) ==
                "Evictor::truncate: tokens is 6, want at most the 5 seen since the last gap in positions");
        feed(cache, stream, 5, 1);
        const auto held = cache.positions(0, 0);
        REQUIRE(held.back() == 5);
        if (shared) REQUIRE(Snapshot(*fork).same_rows(before));
    });
}

TEST_CASE("a refused call leaves the cache as it was", "[contract]") {
    const TokenStream stream(small, 40, 15);
    BlockPool pool({.block_rows = 4});
    KVCache cache(small, H2O{}, Budget{.tokens = 8}, pool);
    KVCache twin(small, H2O{}, Budget{.tokens = 8});
    for (KVCache<H2O>* one : {&cache, &twin}) feed(*one, stream, 0, 14);
    KVCache fork = cache.fork();  // so that evictions would need blocks
    const Snapshot before(cache);
    Outputs out(small, 2);
    using error::shape_error, error::state_error;
    const auto k = stream.k(0, 14, 1), v = stream.v(0, 14, 1), q = stream.q(0, 14, 1);
    const std::vector<std::pair<std::string, std::string>> results{
        {"KVCache::append: layer is 2, want below 2", failure<shape_error>([&] { cache.append(2, k, v); })},
        {"KVCache::append: tokens is 0, want at least 1",
         failure<shape_error>([&] { cache.append(0, stream.k(0, 14, 0), stream.v(0, 14, 0)); })},
        {"KVCache::append: k.heads is 4, want 2", failure<shape_error>([&] { cache.append(0, q, v); })},
        {"KVCache::append: v.dim is 8, want 6", failure<shape_error>([&] { cache.append(0, k, k); })},
        {"KVCache::append: v.tokens is 2, want 1",
         failure<shape_error>([&] { cache.append(0, k, stream.v(0, 14, 2)); })},
        {"KVCache::append: v.data is null, want a pointer", failure<shape_error>([&] {
             auto none = v;
             none.data = nullptr;
             cache.append(0, k, none);
         })},
        {"KVCache::append: inputs.positions.size() is 2, want 1", failure<shape_error>([&] {
             cache.append(0, k, v, {.positions = std::array<position_t, 2>{14, 15}});
         })},
        {"KVCache::append: inputs.positions is 13, want beyond 13",
         failure<shape_error>([&] { cache.append(0, k, v, {.positions = std::array<position_t, 1>{13}}); })},
        {"KVCache::append: inputs.positions is 20, want beyond 20", failure<shape_error>([&] {
             cache.append(0, stream.k(0, 14, 2), stream.v(0, 14, 2),
                          {.positions = std::array<position_t, 2>{20, 20}});
         })},
        {"KVCache::attend: layer is 2, want below 2",
         failure<shape_error>([&] { cache.attend(2, q, out.layer(0)); })},
        {"KVCache::attend: layer 0 is without new rows, want append first",
         failure<state_error>([&] { cache.attend(0, q, out.layer(0)); })},
        {"Evictor::end_step: layer 0 is not stepped, want every layer once before end_step",
         failure<state_error>([&] { cache.end_step(); })},
        {"Evictor::end_prompt: phase is not a prompt, want begin_prompt first",
         failure<state_error>([&] { cache.end_prompt(); })},
        {"Evictor::make_room: tokens is 9, want at most the budget 8",
         failure<shape_error>([&] { cache.make_room(9); })},
        {"Evictor::truncate: tokens is 15, want at most the 14 seen since the last gap in positions",
         failure<shape_error>([&] { cache.truncate(15); })},
        {"KVCache::probe: layer is 2, want below 2",
         failure<shape_error>([&] { cache.probe(2, q, k, v, out.layer(0)); })},
        {"Evictor::probe: q.heads is 2, want 4",
         failure<shape_error>([&] { cache.probe(0, k, k, v, out.layer(0)); })},
        {"KVCache::rows: layer is 2, want below 2", failure<shape_error>([&] { (void)cache.rows(2, 0); })},
        {"KVCache::view: head is 2, want below 2", failure<shape_error>([&] { (void)cache.view(0, 2); })},
        {"KVCache::view: layer is 9, want below 2",
         failure<shape_error>([&] { (void)cache.positions(9, 0); })},
        {"KVCache::rows: head is 2, want below 2", failure<shape_error>([&] { (void)cache.scores(0, 2); })},
        {"Evictor::state: head is 2, want below 2",
         failure<shape_error>([&] { (void)cache.evictor().state(0, 2); })},
        {"Evictor::size: layer is 3, want below 2",
         failure<shape_error>([&] { (void)cache.evictor().size(3, 0); })},
    };
    for (const auto& [wanted, got] : results) REQUIRE(got == wanted);
    REQUIRE(Snapshot(cache) == before);

    // Within a step.
    cache.append(0, k, v);
    REQUIRE(failure<state_error>([&] { cache.append(0, k, v); }) ==
            "KVCache::append: layer 0 is already in this step, want end_step first");
    REQUIRE(failure<shape_error>([&] { cache.append(1, stream.k(1, 14, 2), stream.v(1, 14, 2)); }) ==
            "KVCache::append: tokens is 2, want 1");
    REQUIRE(failure<shape_error>([&] {
                cache.append(1, stream.k(1, 14, 1), stream.v(1, 14, 1),
                             {.positions = std::array<position_t, 1>{15}});
            }) == "KVCache::append: inputs.positions is another list, want that of the step's first layer");
    REQUIRE(failure<shape_error>([&] { cache.attend(0, q, {}); }) ==
            "KVCache::attend: out.data is null, want a pointer");
    REQUIRE(failure<shape_error>([&] { cache.attend(0, stream.q(0, 14, 2), out.layer(0)); }) ==
            "Evictor::step: q.tokens is 2, want 1");
    REQUIRE(failure<state_error>([&] { cache.attend(1, stream.q(1, 14, 1), out.layer(1)); }) ==
            "KVCache::attend: layer 1 is without new rows, want append first");
    REQUIRE(failure<state_error>([&] { cache.make_room(1); }) ==
            "Evictor::make_room: call is inside a step, want after end_step");
    REQUIRE(failure<state_error>([&] { cache.hold(false); }) ==
            "Evictor::hold: call is inside a step, want after end_step");
    REQUIRE(failure<state_error>([&] { cache.trim(); }) ==
            "KVCache::trim: call is inside a step, want after end_step");
    Outputs one(small, 1);
    cache.attend(0, q, one.layer(0));
    REQUIRE(failure<state_error>([&] { cache.attend(0, q, one.layer(0)); }) ==
            "Evictor::step: layer 0 is already in this step, want end_step first");
    REQUIRE(failure<state_error>([&] { cache.end_step(); }) ==
            "Evictor::end_step: layer 1 is not stepped, want every layer once before end_step");
    cache.append(1, stream.k(1, 14, 1), stream.v(1, 14, 1));
    cache.attend(1, stream.q(1, 14, 1), one.layer(1));
    cache.end_step();
    feed(twin, stream, 14, 1);
    for (std::size_t token = 15; token < 30; ++token)
        REQUIRE(same_bits(feed(cache, stream, token, 1), feed(twin, stream, token, 1)));
    REQUIRE(Snapshot(cache).same_rows(Snapshot(twin)));
}

namespace {

/// A run in single calls, each of which may be refused by the pool and made again.
template <class P>
struct Script {
    BlockPool pool{{.block_rows = 4}};
    KVCache<P> cache;
    std::vector<KVCache<P>> forks;  // so that blocks are shared
    std::vector<float> outputs;
    std::optional<Mark> mark;
    const TokenStream& stream;

    Script(const P& policy, const TokenStream& numbers)
        : cache(small, policy, Budget{.tokens = 9}, pool), stream(numbers) {}

    using Call = std::function<void(Script&)>;
    static void step(std::vector<Call>& calls, std::size_t first, std::size_t count) {
        // Most steps layer by layer, those of two tokens with all appends first.
        const auto append = [&](std::size_t layer) {
            calls.push_back([=](Script& s) {
                s.cache.append(layer, s.stream.k(layer, first, count), s.stream.v(layer, first, count),
                               {.log_beta = {s.stream.k(layer, first, count).data, 2, count}});
            });
        };
        const auto attend = [&](std::size_t layer) {
            calls.push_back([=](Script& s) {
                Outputs out(small, count);
                s.cache.attend(layer, s.stream.q(layer, first, count), out.layer(layer));
                s.outputs.insert(s.outputs.end(), out.values.begin(), out.values.end());
            });
        };
        append(0);
        if (count == 2) append(1);
        attend(0);
        if (count != 2) append(1);
        attend(1);
        calls.push_back([=](Script& s) {
            const std::vector<std::int32_t> ids(count, 3);
            s.cache.end_step({ids, {s.stream.k(0, first, count).data, count, 1}});
        });
    }
    static std::vector<Call> calls() {
        std::vector<Call> all;
        std::size_t next = 0;
        const auto steps = [&](std::initializer_list<std::size_t> counts) {
            for (const std::size_t count : counts) {
                step(all, next, count);
                next += count;
            }
        };
        const auto fork = [&] { all.push_back([](Script& s) { s.forks.push_back(s.cache.fork()); }); };
        const auto probes = [&] {
            for (std::size_t layer = 0; layer < 2; ++layer)
                all.push_back([layer, at = next](Script& s) {
                    Outputs out(small, 2);
                    s.cache.probe(layer, s.stream.q(layer, at, 2), s.stream.k(layer, at, 2),
                                  s.stream.v(layer, at, 2), out.layer(layer));
                    s.outputs.insert(s.outputs.end(), out.values.begin(), out.values.end());
                });
        };
        all.push_back([](Script& s) { s.cache.begin_prompt(); });
        steps({7, 11});
        fork();
        probes();
        steps({3});
        fork();
        all.push_back([](Script& s) { s.cache.end_prompt(); });
        fork();
        steps({1, 1, 2});
        all.push_back([](Script& s) { s.mark = s.cache.mark(); });
        steps({1, 4});
        if constexpr (Lookahead<P>)
            all.push_back([](Script& s) {
                s.cache.rescore(std::array{s.stream.q(0, 60, 3), s.stream.q(1, 60, 3)});
            });
        all.push_back([](Script& s) { s.cache.make_room(3); });
        all.push_back([](Script& s) { s.forks.push_back(s.cache.fork(s.cache.propose(5))); });
        steps({1});
        fork();
        all.push_back([](Script& s) { s.cache.truncate(4); });
        steps({1});
        all.push_back([](Script& s) { s.cache.rollback(*s.mark); });
        steps({2});
        fork();
        all.push_back([](Script& s) { s.cache.reserve(30); });
        steps({1, 1});
        probes();
        return all;
    }
};

}  // namespace

TEST_CASE("when the pool is exhausted, the call throws and nothing has changed, wherever that happens",
          "[contract]") {
    const TokenStream stream(small, 70, 16);
    const auto run = [&](auto policy) {
        using P = decltype(policy);
        CAPTURE(policy.name);
        const auto calls = Script<P>::calls();
        Script<P> undisturbed(policy, stream);
        for (const auto& call : calls) call(undisturbed);
        const Snapshot wanted(undisturbed.cache);
        const std::size_t block = block_bytes(small, 4);
        std::size_t refusals = 1, total = 0;
        for (std::size_t spare = 0; refusals > 0; ++spare) {
            Script<P> script(policy, stream);
            refusals = 0;
            for (std::size_t i = 0; i < calls.size(); ++i) {
                CAPTURE(spare, i);
                const Snapshot before(script.cache);
                const std::size_t forks = script.forks.size();
                script.pool.set_limit(script.pool.bytes() + spare * block);
                bool refused = false;
                try {
                    calls[i](script);
                } catch (const error::capacity_error&) {
                    refused = true;
                }
                script.pool.set_limit(SIZE_MAX);
                if (!refused) continue;
                ++refusals;
                REQUIRE(Snapshot(script.cache) == before);
                REQUIRE(script.forks.size() == forks);
                REQUIRE_NOTHROW(calls[i](script));
            }
            REQUIRE(same_bits(script.outputs, undisturbed.outputs));
            REQUIRE(Snapshot(script.cache) == wanted);
            REQUIRE(script.cache.peak_bytes() == undisturbed.cache.peak_bytes());
            if (spare == 0) REQUIRE(refusals >= 8);
            total += refusals;
        }
        REQUIRE(total > 20);
    };
    for_every_policy(run);
    run(EpiLike{});
    run(LaqLike{});
    run(TrimDynamicLike{});
    run(SkipLike{});
}

TEST_CASE("what the first layer of a step gets is enough for the whole step", "[property]") {
    for_every_policy([](auto policy) {
        CAPTURE(policy.name);
        const CacheShape shape{.layers = 4, .q_heads = 2, .kv_heads = 2, .head_dim = 8};
        const TokenStream stream(shape, 150, 23);
        BlockPool pool({.block_rows = 4});
        KVCache cache(shape, policy, Budget{.tokens = 13}, pool);
        std::vector<KVCache<decltype(policy)>> forks;
        std::size_t first = 0;
        for (const std::size_t count : {30U, 1U, 1U, 17U, 5U, 1U, 1U, 1U, 40U, 1U}) {
            if (count % 2 == 1 && first > 30) forks.push_back(cache.fork());
            Outputs out(shape, count);
            for (std::size_t layer = 0; layer < 4; ++layer) {
                cache.append(layer, stream.k(layer, first, count), stream.v(layer, first, count));
                pool.set_limit(pool.bytes());
                cache.attend(layer, stream.q(layer, first, count), out.layer(layer));
            }
            cache.end_step();
            pool.set_limit(SIZE_MAX);
            first += count;
        }
        REQUIRE(cache.seen() == first);
    });
}

TEST_CASE("the layers of a step may come in any order", "[property]") {
    const CacheShape shape{.layers = 3, .q_heads = 4, .kv_heads = 2, .head_dim = 8};
    const TokenStream stream(shape, 120, 22);
    // One call; `order` names each layer twice: to append, then to attend.
    const auto feed_in = [&](auto& cache, std::size_t first, std::size_t count,
                             const std::vector<std::size_t>& order) {
        Outputs out(shape, count);
        std::vector<bool> appended(3, false);
        for (const std::size_t layer : order) {
            if (!appended[layer])
                cache.append(layer, stream.k(layer, first, count), stream.v(layer, first, count));
            else
                cache.attend(layer, stream.q(layer, first, count), out.layer(layer));
            appended[layer] = true;
        }
        cache.end_step();
        return std::move(out.values);
    };
    const auto run = [&](auto policy) {
        for (const std::vector<std::size_t>& order : {std::vector<std::size_t>{2, 2, 1, 1, 0, 0},
                                                      {0, 1, 2, 0, 1, 2},
                                                      {0, 1, 2, 2, 1, 0},
                                                      {1, 0, 0, 2, 1, 2}}) {
            CAPTURE(policy.name, order);
            BlockPool pool({.block_rows = 4});
            KVCache cache(shape, policy, Budget{.tokens = 10}, pool),
                twin(shape, policy, Budget{.tokens = 10});
            // Layer 0 has more rows than may stay, the first of which a fork shares; in the others a probe
            // has evicted already where the policy does that.
            const auto prepare = [&](auto& one, bool share) {
                std::vector<std::decay_t<decltype(one)>> forks;
                one.hold(true);
                feed(one, stream, 0, 12);
                if (share) forks.push_back(one.fork());
                feed(one, stream, 12, 38);
                one.hold(false);
                Outputs out(shape, 1);
                for (std::size_t layer = 1; layer < 3; ++layer)
                    one.probe(layer, stream.q(layer, 80, 1), stream.k(layer, 80, 1), stream.v(layer, 80, 1),
                              out.layer(layer));
                return forks;
            };
            const auto forks = prepare(cache, true);
            prepare(twin, false);
            std::size_t first = 50;
            for (const std::size_t count : {9U, 1U, 17U, 1U, 1U}) {
                REQUIRE(same_bits(feed_in(cache, first, count, order), feed(twin, stream, first, count)));
                first += count;
            }
            REQUIRE(Snapshot(cache).same_rows(Snapshot(twin)));
            REQUIRE(forks[0].rows(2, 1) == 12);
        }
    };
    for_every_policy(run);
}

TEST_CASE("a cache may be moved, with its marks and a pool of its own", "[contract]") {
    const TokenStream stream(small, 30, 17);
    auto cache = std::make_unique<KVCache<H2O>>(small, H2O{}, Budget{.tokens = 8});
    feed(*cache, stream, 0, 12);
    const Mark mark = cache->mark();
    const Snapshot before(*cache);
    feed(*cache, stream, 12, 3);
    KVCache<H2O> moved(std::move(*cache));
    cache.reset();
    moved.rollback(mark);
    REQUIRE(Snapshot(moved).same_rows(before));
    KVCache fork = moved.fork();  // shares the pool, whichever of the two goes first
    { const KVCache gone(std::move(moved)); }
    feed(fork, stream, 12, 3);
    REQUIRE(fork.rows(1, 1) == 8);
}

TEST_CASE("deduction finds policy and rule", "[contract]") {
    BlockPool pool;
    static_assert(std::is_same_v<decltype(KVCache(small, Tova{}, Budget{.tokens = 4}, pool)), KVCache<Tova>>);
    static_assert(std::is_same_v<decltype(KVCache(small, Full{})), KVCache<Full>>);
    static_assert(std::is_same_v<decltype(KVCache(small, H2O{}, Budget{.tokens = 4}, pool, PyramidLike{})),
                                 KVCache<H2O, PyramidLike>>);
    const KVCache cache(small, Full{});
    REQUIRE(cache.shape().values() == 6);
    REQUIRE(cache.seen() == 0);
    REQUIRE(cache.positions(1, 1).empty());
}

namespace {
constexpr CacheShape two_heads{.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 8, .value_dim = 6};
}

TEST_CASE("what a cache reserved, no other cache on the pool can take, through steps, eviction and rollback",
          "[contract]") {
    for_every_policy([](auto policy) {
        CAPTURE(policy.name);
        const TokenStream stream(two_heads, 60, 21);
        BlockPool pool({.block_rows = 4});
        KVCache cache(two_heads, policy, Budget{.tokens = 12}, pool);
        feed(cache, stream, 0, 3);
        const bool full = std::is_same_v<decltype(policy), Full>;
        cache.reserve(full ? 60 : 16);
        const std::size_t reserved = pool.bytes();
        KVCache greedy(two_heads, Full{}, {},
                       pool);  // takes all that it can get, between the layers of a step
        std::size_t eaten = 0;
        const auto eat = [&] {
            pool.set_limit(reserved);
            REQUIRE_THROWS_AS(greedy.append(0, stream.k(0, 0, 1), stream.v(0, 0, 1)), error::capacity_error);
            ++eaten;
        };
        Outputs out(two_heads, 1);
        for (std::size_t token = 3; token < 60; ++token) {
            for (std::size_t layer = 0; layer < 2; ++layer) {
                cache.append(layer, stream.k(layer, token, 1), stream.v(layer, token, 1));
                eat();
                cache.attend(layer, stream.q(layer, token, 1), out.layer(layer));
                eat();
            }
            cache.end_step();
            eat();
            REQUIRE(cache.bytes() - cache.evictor().bytes() == reserved);
            REQUIRE(pool.bytes() == reserved);
        }
        for (const std::size_t room : {8U, 3U}) {  // nor what evictions between steps free
            cache.make_room(full ? 0 : room);
            eat();
            if (!full)
                for (std::size_t token = 0; token < 6; ++token) feed(cache, stream, token, 1);
            eat();
            REQUIRE(pool.bytes() == reserved);
        }
        // Nor after a rollback: the mark's own copies come on top, and go with it.
        pool.set_limit(SIZE_MAX);
        const Mark mark = cache.mark();
        for (int round = 0; round < 3; ++round) {
            for (std::size_t token = 0; token < 5 && !full; ++token) feed(cache, stream, token, 1);
            cache.rollback(mark);
        }
        cache.release(mark);
        REQUIRE(cache.bytes() - cache.evictor().bytes() >= reserved);
        if (full) return;
        pool.set_limit(pool.bytes());
        for (std::size_t token = 0; token < 20; ++token)
            REQUIRE(allocations_of_step(cache, stream, token, out) == 0);
        REQUIRE(pool.bytes() == reserved);
        cache.trim();
        REQUIRE(pool.bytes() <= reserved);
    });
}
