#include "kvcull/cache/lookahead.hpp"

#include <algorithm>
#include <array>
#include <functional>
#include <new>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "kvcull/policies.hpp"
#include "kvcull/select/head_rules.hpp"
#include "support/catch.hpp"
#include "support/engine.hpp"
#include "support/failure.hpp"
#include "support/live.hpp"
#include "support/snapshot.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

const CacheShape shape{.layers = 2, .q_heads = 6, .kv_heads = 3, .head_dim = 16};
constexpr std::size_t prompt = 40, budget = 12, pseudo = 4;
const LaqPlus usual({.window = 3, .lookahead = pseudo, .lookahead_window = 5, .kernel = 3});

Stream usual_stream(std::uint64_t seed = 1) {
    return random_stream(shape, 80, seed);
}

template <class P = LaqPlus>
LookaheadCache<P> make(BlockPool& pool, const P& policy = usual, std::size_t tokens = budget) {
    return LookaheadCache(KVCache(shape, policy, Budget{.tokens = tokens}, pool));
}
template <class Cache>
void prefill(Cache& cache, const Stream& stream, std::size_t first = 0, std::size_t end = prompt,
             std::optional<std::size_t> total = std::nullopt) {
    cache.begin_prompt(total);
    for (std::size_t at = first; at < end; at += 13)
        feed(cache, stream, at, std::min<std::size_t>(13, end - at));
}
/// Pseudo tokens through the fork: tokens `first ..` of a stream stand for them.
template <class Cache>
void look_ahead(Cache& cache, const Stream& stream, std::size_t first = prompt, std::size_t count = pseudo) {
    auto ahead = cache.ahead();
    for (std::size_t i = 0; i < count; ++i) feed(ahead, stream, first + i, 1);
}
/// All that a cache is: rows, bits, scores and the counters.
template <class P, class Rule>
struct Everything {
    Snapshot rows;
    Live<P> live;

    explicit Everything(const LookaheadCache<P, Rule>& cache) : live(cache.cache().evictor().live()) {
        KVCache<P, Rule> copy = cache.cache().fork();
        rows = snapshot(copy);
    }
    friend bool operator==(const Everything& a, const Everything& b) {
        return a.rows == b.rows && same_live(a.live, b.live);
    }
};
template <class P, class Rule>
Everything(const LookaheadCache<P, Rule>&) -> Everything<P, Rule>;

}  // namespace

TEST_CASE("a look-ahead compresses, collects queries, evicts and leaves no pseudo token behind",
          "[property]") {
    using Stage = LookaheadCache<LaqPlus>::Stage;
    const Stream stream = usual_stream();
    BlockPool pool({.block_rows = 4});
    auto cache = make(pool);
    CHECK(cache.stage() == Stage::decoding);
    prefill(cache, stream);
    CHECK(cache.stage() == Stage::prefilling);
    REQUIRE(cache.end_prefill());
    CHECK(cache.stage() == Stage::looking_ahead);
    CHECK(cache.cache().rows(1, 2) == prompt);
    CHECK(cache.fork().rows(1, 2) == budget);
    CHECK(cache.fork().seen() == prompt);

    look_ahead(cache, stream);
    CHECK(cache.fork().rows(1, 2) == budget + pseudo);
    const HeadsView<const float> given = cache.queries(1), want = stream.queries(1, prompt, pseudo);
    REQUIRE(given.tokens == pseudo);
    for (std::size_t h = 0; h < shape.q_heads; ++h)
        for (std::size_t i = 0; i < pseudo; ++i)
            CHECK(same_bits(std::span(given.row(h, i), 16), std::span(want.row(h, i), 16)));

    KVCache<LaqPlus> expected = cache.cache().fork();
    expected.rescore(std::array{stream.queries(0, prompt, pseudo), stream.queries(1, prompt, pseudo)});
    cache.end_lookahead();
    CHECK(cache.stage() == Stage::decoding);
    CHECK((all_positions(cache.cache()) == all_positions(expected)));
    CHECK(cache.seen() == prompt);
    CHECK(rows_are_copies(cache.cache(), stream));
    for (const auto& positions : all_positions(cache.cache())) {
        CHECK(positions.size() == budget);
        CHECK(positions.back() == static_cast<position_t>(prompt - 1));
    }
    // Nothing is evicted later, and the next token has the prompt's next position.
    feed(cache, stream, prompt, 1);
    CHECK(cache.cache().positions(0, 0).back() == static_cast<position_t>(prompt));
    CHECK(cache.cache().rows(0, 0) == budget + 1);
}

TEST_CASE("a prompt within the budget needs no look-ahead and is not touched", "[property]") {
    const Stream stream = usual_stream();
    BlockPool pool({.block_rows = 4});
    auto cache = make(pool, usual, prompt);
    prefill(cache, stream);
    const Everything before(cache);
    const std::size_t bytes = pool.bytes();
    CHECK_FALSE(cache.end_prefill());
    CHECK(Everything(cache).rows == before.rows);
    CHECK(pool.bytes() == bytes);
    CHECK(failure<error::state_error>([&] {
              cache.end_lookahead();
          }).starts_with("LookaheadCache::end_lookahead"));
    feed(cache, stream, prompt, 1);

    auto held = make(pool);
    prefill(held, stream);
    held.writable().hold(true);
    CHECK_FALSE(held.end_prefill());
    CHECK(held.cache().rows(0, 0) == prompt);
}

TEST_CASE("the fork is what a cache of its rows alone would be", "[differential]") {
    const Stream stream = usual_stream(2);
    BlockPool pool({.block_rows = 4});
    auto cache = make(pool);
    prefill(cache, stream);
    REQUIRE(cache.end_prefill());
    CHECK(rows_are_copies(cache.fork(), stream));

    KVCache snap(shape, SnapKV{.window = 5, .kernel = 3}, Budget{.tokens = budget}, pool);
    feed_prompt(snap, stream, 0, prompt, 13);
    CHECK((all_positions(cache.fork()) == all_positions(snap)));
    auto ahead = cache.ahead();
    for (std::size_t i = 0; i < pseudo; ++i)
        CHECK(same_bits(feed(ahead, stream, prompt + i, 1), feed(snap, stream, prompt + i, 1)));
}

TEST_CASE("a full copy sees what the full cache sees", "[differential]") {
    const Stream stream = usual_stream(3);
    BlockPool pool({.block_rows = 4});
    const Laq full{.lookahead_method = Laq::Method::full},
        wide{.lookahead_window = 5, .lookahead_budget = 60};
    for (const Laq& policy : {full, wide}) {
        auto cache = make(pool, policy);
        prefill(cache, stream);
        KVCache all(shape, Full{}, {}, pool);
        feed_prompt(all, stream, 0, prompt, 13);
        REQUIRE(cache.end_prefill());
        auto ahead = cache.ahead();
        for (std::size_t i = 0; i < pseudo; ++i)
            CHECK(same_bits(feed(ahead, stream, prompt + i, 1), feed(all, stream, prompt + i, 1)));
        cache.end_lookahead();
        CHECK(cache.cache().rows(1, 1) == budget);
    }
}

TEST_CASE("a cancelled look-ahead leaves everything as it was, after any number of steps", "[property]") {
    const Stream stream = usual_stream(4);
    for (const std::size_t steps : {std::size_t{0}, std::size_t{1}, std::size_t{9}}) {
        BlockPool pool({.block_rows = 4});
        auto cache = make(pool);
        auto alone = make(pool);
        prefill(cache, stream);
        prefill(alone, stream);
        REQUIRE(alone.end_prefill());
        alone.cancel_lookahead();
        const std::size_t bytes = pool.bytes();
        REQUIRE(cache.end_prefill());
        look_ahead(cache, stream, prompt, steps);
        if (steps == 9) cache.push_query(1, stream.queries(1, 0, 1));  // stray
        cache.cancel_lookahead();
        CHECK(pool.bytes() == bytes);
        CHECK(Everything(cache) == Everything(alone));
        for (std::size_t token = prompt; token < prompt + 5; ++token)
            CHECK(same_bits(feed(cache, stream, token, 1), feed(alone, stream, token, 1)));
        cache.writable().make_room(0);
        CHECK(cache.cache().rows(0, 1) == budget);
    }
}

TEST_CASE("every turn's prompt may look ahead", "[property]") {
    const Stream stream = usual_stream(5);
    BlockPool pool({.block_rows = 4});
    auto cache = make(pool);
    prefill(cache, stream);
    REQUIRE(cache.end_prefill());
    look_ahead(cache, stream);
    cache.end_lookahead();
    for (std::size_t token = prompt; token < prompt + 6; ++token) feed(cache, stream, token, 1);
    prefill(cache, stream, prompt + 6, prompt + 8, 2);  // shorter than the window
    REQUIRE(cache.end_prefill());
    look_ahead(cache, stream, prompt + 8);
    cache.end_lookahead();
    CHECK(cache.seen() == prompt + 8);
    CHECK(rows_are_copies(cache.cache(), stream));
    for (const auto& positions : all_positions(cache.cache())) {
        REQUIRE(positions.size() == budget);
        for (std::size_t i = 0; i < 3; ++i)
            CHECK(positions[budget - 3 + i] == static_cast<position_t>(prompt + 5 + i));
    }
}

TEST_CASE("heads may divide the budget by the second stage's scores", "[property]") {
    const Stream stream = usual_stream(6);
    BlockPool pool({.block_rows = 4});
    LookaheadCache cache(KVCache(shape, usual, Budget{.tokens = budget}, pool, AdaKV<>{.alpha_permille = 0}));
    prefill(cache, stream);
    REQUIRE(cache.end_prefill());
    CHECK(cache.fork().rows(0, 0) == budget);  // the copy is even
    look_ahead(cache, stream);
    cache.end_lookahead();
    bool uneven = false;
    for (std::size_t layer = 0; layer < 2; ++layer) {
        std::size_t sum = 0;
        for (std::size_t h = 0; h < 3; ++h) {
            sum += cache.cache().rows(layer, h);
            uneven = uneven || cache.cache().rows(layer, h) != budget;
        }
        CHECK(sum == 3 * budget);
    }
    CHECK(uneven);
}

TEST_CASE("OBCache and CAOTE rank by the rows of a look-ahead", "[property]") {
    const Stream stream = usual_stream(7);
    BlockPool pool({.block_rows = 4});
    const auto run = [&](const auto& policy) {
        auto cache = make(pool, policy);
        prefill(cache, stream);
        REQUIRE(cache.end_prefill());
        look_ahead(cache, stream);
        cache.end_lookahead();
        for (const auto& positions : all_positions(cache.cache())) {
            CHECK(positions.size() == budget);
            CHECK(positions.back() == static_cast<position_t>(prompt - 1));
        }
        return all_positions(cache.cache());
    };
    const auto plain = run(usual);
    CHECK(run(LaqThen<OBCache>{usual, {.recent = 0, .window = 7}}) != plain);
    CHECK(run(LaqThen<Caote<>>{usual, {}}) != plain);
    CHECK(run(LaqThen<FastCaote<>>{usual, {}}) != plain);
}

TEST_CASE("calls out of order are refused and change nothing", "[contract]") {
    const Stream stream = usual_stream();
    BlockPool pool({.block_rows = 4});
    auto cache = make(pool);
    const auto refused = [&](const std::function<void()>& call) { return failure<error::state_error>(call); };
    const auto q = stream.queries(0, prompt, 1), k = stream.keys(0, prompt, 1),
               v = stream.values(0, prompt, 1);
    std::vector<float> out(6 * 16);
    const std::string idle = ": stage is not looking ahead, want end_prefill first, and that it returns true";
    CHECK(refused([&] { (void)cache.fork(); }) == "LookaheadCache::fork" + idle);
    CHECK(refused([&] { (void)cache.ahead(); }) == "LookaheadCache::ahead" + idle);
    CHECK(refused([&] { cache.push_query(0, q); }) == "LookaheadCache::push_query" + idle);
    CHECK(refused([&] { cache.end_lookahead(); }) == "LookaheadCache::end_lookahead" + idle);
    CHECK(refused([&] { cache.cancel_lookahead(); }) == "LookaheadCache::cancel_lookahead" + idle);
    CHECK(refused([&] { (void)cache.end_prefill(); }).starts_with("Evictor::end_prompt: phase"));
    prefill(cache, stream, 0, prompt, prompt + 1);  // a token is missing
    CHECK(refused([&] { (void)cache.end_prefill(); }).starts_with("Evictor::end_prompt: tokens seen"));
    feed(cache, stream, prompt, 1);

    REQUIRE(cache.end_prefill());
    const Everything before(cache);
    const std::string busy = ": stage is looking ahead, want end_lookahead or cancel_lookahead first";
    CHECK(refused([&] { cache.append(0, k, v); }) == "LookaheadCache::append" + busy);
    CHECK(refused([&] { cache.attend(0, q, head_major(out.data(), 6, 1, 16)); }) ==
          "LookaheadCache::attend" + busy);
    CHECK(refused([&] { cache.end_step(); }) == "LookaheadCache::end_step" + busy);
    CHECK(refused([&] { cache.begin_prompt(); }) == "LookaheadCache::begin_prompt" + busy);
    CHECK(refused([&] { (void)cache.end_prefill(); }) == "LookaheadCache::end_prefill" + busy);
    CHECK(refused([&] { (void)cache.writable(); }) == "LookaheadCache::writable" + busy);

    CHECK(failure<error::shape_error>([&] { cache.push_query(2, q); }) ==
          "LookaheadCache::push_query: layer is 2, want below 2");
    CHECK(failure<error::shape_error>([&] { cache.push_query(0, k); }) ==
          "LookaheadCache::push_query: q.heads is 3, want 6");
    CHECK(failure<error::shape_error>([&] { cache.push_query(0, stream.queries(0, prompt, 2)); }) ==
          "LookaheadCache::push_query: q.tokens is 2, want 1");
    CHECK(failure<error::shape_error>([&] { (void)cache.queries(2); }) ==
          "LookaheadCache::queries: layer is 2, want below 2");
    CHECK(failure<error::shape_error>([&] {
              cache.ahead().append(0, stream.keys(0, prompt, 2), stream.values(0, prompt, 2));
          }) == "LookaheadCache::Ahead::append: k.tokens is 2, want 1");
    CHECK(cache.fork().evictor().live().call_tokens == 0);
    CHECK(refused([&] { cache.end_lookahead(); }) ==
          "LookaheadCache::end_lookahead: number of pseudo tokens is 0, want at least 1");
    cache.push_query(0, q);
    CHECK(refused([&] { cache.end_lookahead(); }) ==
          "LookaheadCache::end_lookahead: number of queries of layer 0 is 1, want 0");
    feed(cache.fork(), stream, prompt + 1, 1);
    CHECK(refused([&] { cache.end_lookahead(); }) ==
          "LookaheadCache::end_lookahead: number of queries of layer 1 is 0, want 1");
    cache.push_query(1, stream.queries(1, prompt, 1));
    cache.fork().append(0, k, v);
    CHECK(refused([&] { cache.end_lookahead(); }).starts_with("LookaheadCache::end_lookahead: fork"));
    CHECK(Everything(cache) == before);
}

TEST_CASE("a full pool fails the one call of a look-ahead, wherever it comes", "[property]") {
    const Stream stream = usual_stream(8);
    // Every number of blocks that the pool may have beyond the prompt, until nothing fails any more.
    std::optional<std::vector<std::vector<position_t>>> want;
    std::size_t failed_fork = 0, failed_step = 0;
    for (std::size_t more = 0;; ++more) {
        BlockPool pool({.block_rows = 4});
        auto cache = make(pool);
        prefill(cache, stream);
        const Everything before(cache);
        const std::size_t bytes = pool.bytes(), block = bytes / (6 * (prompt / 4));
        pool.set_limit(bytes + more * block);
        try {
            const bool wanted = cache.end_prefill();
            REQUIRE(wanted);
        } catch (const error::capacity_error&) {
            ++failed_fork;
            CHECK(cache.stage() == LookaheadCache<LaqPlus>::Stage::prefilling);
            CHECK(Everything(cache) == before);
            CHECK(pool.bytes() == bytes);
            continue;
        }
        const Everything looking(cache);
        CHECK(looking.rows == before.rows);
        try {
            look_ahead(cache, stream, prompt, 8);
        } catch (const error::capacity_error&) {
            ++failed_step;
            CHECK(Everything(cache) == looking);
            cache.cancel_lookahead();
            CHECK(Everything(cache) == looking);
            CHECK(pool.bytes() == bytes);
            continue;
        }
        cache.end_lookahead();
        want = all_positions(cache.cache());
        CHECK(more * 4 <= 6 * (budget + 8) + 6 * 4);  // rows of the copy and a block for each of its heads
        break;
    }
    CHECK(failed_fork > 0);
    CHECK(failed_step > 0);
    BlockPool pool({.block_rows = 4});
    auto free = make(pool);
    prefill(free, stream);
    REQUIRE(free.end_prefill());
    look_ahead(free, stream, prompt, 8);
    free.end_lookahead();
    CHECK((want == all_positions(free.cache())));
}

namespace {

struct Fault : std::runtime_error {
    Fault() : std::runtime_error("the policy's own") {}
};
/// LAQ that throws in its n-th scoring of a head.
struct Faulty : Laq {
    int* left = nullptr;

    void count() const {
        if (left != nullptr && (*left)-- == 0) throw Fault();
    }
    void score(const State& state, const HeadStep& step, std::span<float> out) const {
        count();
        Laq::score(state, step, out);
    }
    void rescore(const State& state, const HeadStep& step, MatrixView<const float> q,
                 std::span<float> out) const {
        count();
        Laq::rescore(state, step, q, out);
    }
};

}  // namespace

TEST_CASE("an exception of the user's at each scoring leaves the cache as it was", "[property]") {
    const Stream stream = usual_stream(9);
    BlockPool pool({.block_rows = 4});
    for (int at = 0; at < 12; ++at) {  // six heads in each of both stages
        CAPTURE(at);
        int left = -1;
        Faulty policy{usual, &left};
        LookaheadCache cache(
            KVCache(shape, policy, Budget{.tokens = budget}, pool, AdaKV<>{.alpha_permille = 0}));
        prefill(cache, stream);
        const std::size_t bytes = pool.bytes();
        Live<Faulty> live = cache.cache().evictor().live();
        left = at;
        if (at < 6) {
            REQUIRE_THROWS_AS(cache.end_prefill(), Fault);
            CHECK(same_live(live, cache.cache().evictor().live()));
            CHECK(pool.bytes() == bytes);
        }
        left = -1;
        REQUIRE(cache.end_prefill());
        look_ahead(cache, stream);
        live = cache.cache().evictor().live();
        if (at >= 6) {
            left = at - 6;
            REQUIRE_THROWS_AS(cache.end_lookahead(), Fault);
            CHECK(same_live(live, cache.cache().evictor().live()));
            CHECK(rows_are_copies(cache.cache(), stream));
            CHECK(cache.cache().rows(0, 0) == prompt);
            CHECK(cache.fork().seen() == prompt + pseudo);
        }
        left = -1;
        cache.end_lookahead();
        CHECK(states_fit(cache.cache()));
    }
}

TEST_CASE("an engine that throws in the middle of a pseudo token loses nothing", "[property]") {
    const Stream stream = usual_stream(10);
    for (std::size_t stop = 0; stop < 4; ++stop) {
        BlockPool pool({.block_rows = 4});
        auto cache = make(pool);
        prefill(cache, stream);
        REQUIRE(cache.end_prefill());
        const Everything before(cache);
        look_ahead(cache, stream, prompt, 2);
        auto ahead = cache.ahead();
        std::vector<float> out(6 * 16);
        for (std::size_t call = 0; call < stop; ++call) {  // append, attend of layer 0, then of layer 1
            const std::size_t layer = call / 2;
            if (call % 2 == 0)
                ahead.append(layer, stream.keys(layer, prompt + 2, 1), stream.values(layer, prompt + 2, 1));
            else
                ahead.attend(layer, stream.queries(layer, prompt + 2, 1), head_major(out.data(), 6, 1, 16));
        }
        if (stop > 0) CHECK_THROWS_AS(cache.end_lookahead(), error::state_error);
        cache.cancel_lookahead();
        CHECK(Everything(cache) == before);
        feed(cache, stream, prompt, 1);
    }
}

TEST_CASE("bad parameters surface when the budget is known, before anything has changed", "[contract]") {
    const Stream stream = usual_stream();
    BlockPool pool({.block_rows = 4});
    LookaheadCache cache(
        KVCache(shape, usual, Budget{.ratio = 0.1}, pool));  // 4 rows of 40: below the copy's 5
    prefill(cache, stream);
    const Everything before(cache);
    CHECK_THROWS_AS(cache.end_prefill(), error::config_error);
    CHECK(Everything(cache) == before);
}

TEST_CASE("without pseudo tokens asked for, none must come", "[property]") {
    const Stream stream = usual_stream(11);
    BlockPool pool({.block_rows = 4});
    auto cache = make(pool, LaqPlus({.window = 5, .lookahead = 0, .kernel = 3}));
    prefill(cache, stream);
    REQUIRE(cache.end_prefill());
    cache.end_lookahead();
    KVCache snap(shape, SnapKV{.window = 5, .kernel = 3}, Budget{.tokens = budget}, pool);
    feed_prompt(snap, stream, 0, prompt, 13);
    CHECK((all_positions(cache.cache()) == all_positions(snap)));
}

TEST_CASE("a look-ahead passes over layers that the policy has no say in", "[property]") {
    CacheShape of{.layers = 3, .q_heads = 6, .kv_heads = 3, .head_dim = 16};
    of.softcap = 8.0F;
    of.traits = {{}, {.window = 8}, {.evicts = false}};
    const Stream stream = random_stream(of, 80, 21);
    BlockPool pool({.block_rows = 4});
    LookaheadCache cache(KVCache(of, usual, Budget{.tokens = budget}, pool));
    prefill(cache, stream);
    REQUIRE(cache.end_prefill());
    CHECK(cache.fork().rows(0, 0) == budget);
    CHECK(cache.fork().rows(2, 0) == prompt);
    look_ahead(cache, stream);
    cache.end_lookahead();
    for (std::size_t h = 0; h < of.kv_heads; ++h) {
        CHECK(cache.cache().rows(0, h) == budget);
        CHECK(cache.cache().rows(1, h) <= 9);
        CHECK(cache.cache().rows(2, h) == prompt);
    }
}
