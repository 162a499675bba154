/// Plans for other rows, positions and numbers of tokens that no cache can hold: refused by name, before
/// anything changed.

#include <cstddef>
#include <limits>
#include <string>
#include <vector>

#include "kvcull/cache/joint_step.hpp"
#include "kvcull/cache/kv_cache.hpp"
#include "kvcull/policies.hpp"
#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/foreign.hpp"
#include "support/live.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

const CacheShape shape{.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 8};
constexpr std::size_t endless = std::numeric_limits<std::size_t>::max();
constexpr position_t last = std::numeric_limits<position_t>::max();

KVCache<H2O> cache_of(std::size_t tokens, BlockPool& pool) {
    KVCache cache(shape, H2O{.recent = 2}, Budget{.tokens = 30}, pool);
    const TokenStream stream(shape, tokens, 1);
    feed(cache, stream, 0, tokens);
    return cache;
}

/// One call of a stream's first tokens at positions of their own.
void feed_at(KVCache<H2O>& cache, const TokenStream& stream, const std::vector<position_t>& positions) {
    const std::size_t count = positions.size();
    Outputs out(shape, count);
    for (std::size_t layer = 0; layer < shape.layers; ++layer) {
        cache.append(layer, stream.k(layer, 0, count), stream.v(layer, 0, count), {.positions = positions});
        cache.attend(layer, stream.q(layer, 0, count), out.layer(layer));
    }
    cache.end_step();
}

/// The message, if the cache is afterwards what it was.
template <class Error, class Call>
std::string refused(KVCache<H2O>& cache, Call&& call) {
    const Live<H2O> before = cache.evictor().live();
    const std::size_t bytes = cache.bytes(), taken = cache.pool().bytes();
    std::string message = failure<Error>(call);
    const bool same =
        same_live(before, cache.evictor().live()) && cache.bytes() == bytes && cache.pool().bytes() == taken;
    return same ? message : message + " (and something changed)";
}

}  // namespace

TEST_CASE("a plan for other rows than those held is refused", "[contract]") {
    BlockPool pool({.block_rows = 4});
    KVCache cache = cache_of(8, pool);
    Evictor evictor(shape, H2O{}, Budget{.tokens = 30});
    Foreign rows(shape);
    feed(evictor, rows, TokenStream(shape, 8, 1), 0, 8);
    const std::vector<index_t> keep{0, 7};
    const auto check = [&](const Plan& plan, const std::string& message) {
        CHECK(refused<error::shape_error>(cache, [&] { (void)cache.fork(plan); }) ==
              "KVCache::fork: " + message);
        const Live<H2O> before = evictor.live();
        CHECK(failure<error::shape_error>([&] { evictor.commit(plan); }) == "Evictor::commit: " + message);
        CHECK(same_live(before, evictor.live()));
    };
    const auto plan_of = [&](std::size_t layer, std::size_t head, std::size_t held) {
        Plan plan;
        plan.add(1, 1, 8, keep, Compaction::fill);
        plan.add(layer, head, held, keep, Compaction::fill);
        return plan;
    };
    check(plan_of(2, 0, 8), "plan[1].layer is 2, want below 2");
    check(plan_of(0, 2, 8), "plan[1].head is 2, want below 2");
    check(plan_of(0, 1, 9), "plan[1].rows is 9, want 8");
    check(plan_of(1, 1, 8), "plan[1] is layer 1, head 1 again, want every head once");
    CHECK(cache.fork(plan_of(1, 0, 8)).rows(1, 0) == 2);
}

TEST_CASE("a position must leave one for the next token", "[contract]") {
    BlockPool pool({.block_rows = 4});
    const TokenStream stream(shape, 8, 2);
    KVCache cache = cache_of(3, pool);
    const std::string most = std::to_string(last);
    const auto append = [&](std::size_t count, const std::vector<position_t>& positions) {
        return refused<error::shape_error>(cache, [&] {
            cache.append(0, stream.k(0, 0, count), stream.v(0, 0, count), {.positions = positions});
        });
    };
    CHECK(append(1, {last}) == "KVCache::append: inputs.positions is " + most + ", want below " + most);
    CHECK(append(2, {5, last}) == "KVCache::append: inputs.positions is " + most + ", want below " + most);
    feed_at(cache, stream, {last - 3});
    CHECK(append(3, {}) == "KVCache::append: tokens is 3, want at most the 2 positions left");
    feed(cache, stream, 0, 2);
    CHECK(cache.evictor().next_position() == last);
    CHECK(append(1, {}) == "KVCache::append: tokens is 1, want at most the 0 positions left");

    Evictor evictor(shape, H2O{}, Budget{.tokens = 30});
    Foreign rows(shape);
    rows.append(0, stream.k(0, 0, 2), stream.v(0, 0, 2), std::vector<position_t>{4, last});
    CHECK(failure<error::shape_error>([&] { evictor.step(0, rows.layer(0), stream.q(0, 0, 2)); }) ==
          "Evictor::step: cached[0].position of a new row is " + most + ", want below " + most);
    CHECK(evictor.live().admitted[0] == 0);
}

TEST_CASE("more tokens than rows have numbers are refused, whatever the pool has", "[contract]") {
    const bool limited = GENERATE(false, true);
    BlockPool pool({.bytes = limited ? std::size_t{1} << 20U : endless, .block_rows = 4});
    KVCache cache = cache_of(8, pool);
    for (const std::size_t tokens :
         {endless, endless - 3, std::size_t{1} << 40U, (std::size_t{1} << 31U) - 8}) {
        const std::string beyond =
            "tokens is " + std::to_string(tokens) + ", want at most 2147483639 beyond the 8 rows of a head";
        CAPTURE(limited, tokens);
        CHECK(refused<error::capacity_error>(cache, [&] { (void)cache.step_bytes(tokens); }) ==
              "KVCache::step_bytes: " + beyond);
        CHECK(refused<error::capacity_error>(cache, [&] { cache.prepare(tokens); }) ==
              "KVCache::prepare: " + beyond);
        CHECK(refused<error::capacity_error>(cache, [&] {
                  cache.append(0, {nullptr, 2, tokens, 8, 8, 8}, {nullptr, 2, tokens, 8, 8, 8});
              }) == "KVCache::append: " + beyond);
        JointStep step;
        CHECK(refused<error::capacity_error>(cache, [&] {
                  if (step.add(cache, tokens)) throw error::state_error("taken");
              }) == "no error");
        CHECK(step.size() == 0);
    }
    CHECK(refused<error::capacity_error>(cache, [&] {
              cache.reserve(endless);
          }).starts_with("KVCache::reserve: rows is 18446744073709551615, want at most 2147483647"));
    const std::string total =
        "Evictor::begin_prompt: total is 18446744073709551607, want below 18446744073709551607";
    CHECK(refused<error::shape_error>(cache, [&] { cache.begin_prompt(endless - 8); }) == total);
}

TEST_CASE("tokens are taken back up to the last gap in positions, and no further", "[contract]") {
    BlockPool pool({.block_rows = 4});
    const TokenStream stream(shape, 8, 3);
    KVCache<H2O> gaps(shape, H2O{}, Budget{.tokens = 30}, pool);
    const auto too_many = [&](std::size_t tokens, std::size_t most) {
        CHECK(refused<error::shape_error>(gaps, [&] { gaps.truncate(tokens); }) ==
              "Evictor::truncate: tokens is " + std::to_string(tokens) + ", want at most the " +
                  std::to_string(most) + " seen since the last gap in positions");
    };
    feed_at(gaps, stream, {1000, 1001, 1002});  // a sequence may begin anywhere
    too_many(4, 3);
    gaps.truncate(1);
    CHECK(gaps.seen() == 2);
    CHECK(gaps.evictor().next_position() == 1002);
    feed_at(gaps, stream, {1002, 1005, 1006});
    too_many(3, 2);
    feed_at(gaps, stream, {1007});
    feed(gaps, stream, 0, 1);
    too_many(5, 4);
    gaps.truncate(4);
    CHECK(gaps.seen() == 3);
    CHECK(gaps.evictor().next_position() == 1005);
    CHECK(gaps.positions(1, 1) == std::vector<position_t>{1000, 1001, 1002});
    too_many(1, 0);
    feed_at(gaps, stream, {2000});
    feed_at(gaps, stream, {2002});
    too_many(2, 1);
}
