#pragma once
/// The battery that every policy must pass, through KVCache and through Evictor on foreign buffers.

#include <algorithm>
#include <cstddef>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kvcull/cache/kv_cache.hpp"
#include "support/catch.hpp"
#include "support/engine.hpp"
#include "support/reference.hpp"
#include "support/snapshot.hpp"

namespace kvcull::test {

/// What a policy promises beyond the common contract. Budgets below are in rows per head.
struct Promises {
    std::size_t budget = 12;
    /// Fewest evictions of a head over a prompt in three calls and 40 decoded tokens. 0: it never evicts
    /// by itself.
    std::size_t evictions = 3;
    /// It evicts when it is probed, which the battery does not do.
    bool when_probed = false;
    /// A head holds min(n, budget) rows after every decoded token; if not, only after the prompt.
    bool while_decoding = true;
    /// A prompt in chunks ends like one in a single call.
    bool chunks_do_not_matter = false;
    /// A head's fate depends on its numbers and not on its index.
    bool heads_are_alike = true;
    /// Below this head_dim scores tie, and the order of rounding decides.
    std::size_t tie_free_dim = 1;
};

namespace conformance {

/// Groups of 1, 4 and 7, and head sizes on both sides of every vector width.
inline std::vector<CacheShape> shapes() {
    return {{.layers = 2, .q_heads = 3, .kv_heads = 3, .head_dim = 1},
            {.layers = 1, .q_heads = 8, .kv_heads = 2, .head_dim = 80, .value_dim = 48},
            {.layers = 2, .q_heads = 14, .kv_heads = 2, .head_dim = 128},
            {.layers = 1, .q_heads = 4, .kv_heads = 1, .head_dim = 257}};
}
inline constexpr std::size_t prompt = 35, decoded = 40, chunk = 13;

/// The sequence that most cases run: a prompt in three calls, then one token per call.
template <class Cache>
void run(Cache& cache, const Stream& stream) {
    feed_prompt(cache, stream, 0, prompt, chunk);
    feed_decode(cache, stream, prompt, prompt + decoded);
}

/// What a plan must be: the right number of rows, in order, in range, and all that is protected.
inline bool sound(const HeadPlan& plan, const HeadView& head, std::size_t size, Protected protect) {
    const std::size_t kept = std::min(plan.rows, size);
    if (plan.rows != head.rows() || plan.keep.size() != kept) return false;
    std::set<position_t> positions;
    for (std::size_t i = 0; i < plan.keep.size(); ++i) {
        if (plan.keep[i] < 0 || static_cast<std::size_t>(plan.keep[i]) >= plan.rows) return false;
        if (i > 0 && plan.keep[i] <= plan.keep[i - 1]) return false;
        positions.insert(head.position[static_cast<std::size_t>(plan.keep[i])]);
    }
    const std::vector<position_t> all = positions_of(head);
    const std::size_t recent = std::min(protect.recent, kept), sinks = std::min(protect.sinks, kept - recent);
    return std::all_of(all.end() - static_cast<std::ptrdiff_t>(recent), all.end(),
                       [&](position_t p) { return positions.contains(p); }) &&
           std::all_of(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(sinks),
                       [&](position_t p) { return positions.contains(p); });
}

/// The case that most checks run: its cache, its budget, its sequence.
template <Policy P>
struct Setup {
    P policy;
    Promises promises;
    Budget budget{.tokens = promises.budget};
    CacheShape shape{.layers = 2, .q_heads = 6, .kv_heads = 3, .head_dim = 16};
    Stream stream = random_stream(shape, prompt + decoded, 5);

    [[nodiscard]] bool evicts() const { return promises.evictions > 0; }
    [[nodiscard]] KVCache<P> cache(BlockPool& pool) const { return {shape, policy, budget, pool}; }
    [[nodiscard]] Engine<P> engine() const { return {shape, policy, budget}; }
    /// Calls `use(cache)` for every driver on every instruction set.
    template <class Use>
    void for_each_driver(const Use& use) const {
        test::for_each_driver(shape, policy, budget, [&](auto& cache, const std::string& driver) {
            CAPTURE(driver);
            use(cache);
        });
    }
};

/// Runs the sequence on foreign buffers and looks at every plan and at every state after every call.
template <Policy P>
void check_run(const Setup<P>& with, const CacheShape& shape, const Budget& budget, bool ascending) {
    const Stream stream = random_stream(shape, prompt + decoded, 11);
    Engine<P> engine(shape, with.policy, budget, ascending);
    std::vector<std::size_t> evictions(shape.heads());
    bool good = true;
    engine.on_plan = [&](const HeadPlan& plan, const HeadView& head) {
        Protected protect = protected_rows(with.policy, budget.tokens);
        protect.sinks = std::max(protect.sinks, budget.sinks);
        protect.recent = std::max(protect.recent, budget.recent);
        good = good && sound(plan, head, budget.tokens, protect);
        ++evictions[plan.layer * shape.kv_heads + plan.head];
    };
    const auto check = [&](std::size_t seen, bool at_budget) {
        good = good && states_fit(engine) && engine.gaps_are_untouched();
        for (std::size_t layer = 0; layer < shape.layers && at_budget; ++layer)
            for (std::size_t h = 0; h < shape.kv_heads; ++h) {
                const std::size_t want = with.evicts() ? std::min(seen, budget.tokens) : seen;
                good = good && engine.rows(layer, h) == want;
            }
    };
    engine.begin_prompt(prompt);
    for (std::size_t at = 0; at < prompt; at += chunk) {
        feed(engine, stream, at, std::min(chunk, prompt - at));
        check(at + chunk, false);
    }
    engine.end_prompt();
    check(prompt, true);
    for (std::size_t at = prompt; at < prompt + decoded; ++at) {
        feed(engine, stream, at, 1);
        check(at + 1, with.promises.while_decoding);
    }
    CHECK(good);
    CHECK(rows_are_copies(engine, stream));
    for (const std::size_t count : evictions) CHECK(count >= with.promises.evictions);
}

/// A call that must throw `Error`.
template <class Error, class Call>
void refuses(const Call& call) {
    CHECK_THROWS_AS(call(), Error);
}

/// A budget rule whose heads end with different sizes.
struct Uneven {
    static void layer_sizes(std::size_t mean, std::size_t /*prompt*/, Protected /*policy*/,
                            std::span<std::size_t> out) {
        std::fill(out.begin(), out.end(), mean);
    }
    static void head_sizes(std::size_t /*layer*/, std::span<const Candidates> /*heads*/, std::size_t size,
                           std::span<std::size_t> out) {
        for (std::size_t h = 0; h < out.size(); ++h) out[h] = h % 2 == 0 ? size - 1 : size + 1;
    }
};
static_assert(HeadBudgetRule<Uneven>);

template <Policy P>
void check_plans(const Setup<P>& with) {
    for (const CacheShape& shape : shapes())
        for (const bool ascending : {false, true}) {
            CAPTURE(shape.q_heads, shape.kv_heads, shape.head_dim, ascending);
            check_run(with, shape, with.budget, ascending);
            if (with.evicts())
                check_run(with, shape, {.tokens = with.promises.budget, .sinks = 2, .recent = 3}, ascending);
        }
}

template <Policy P>
void check_drivers_agree(const Setup<P>& with) {
    for (const CacheShape& shape : shapes()) {
        CAPTURE(shape.q_heads, shape.kv_heads, shape.head_dim);
        if (shape.head_dim < with.promises.tie_free_dim) continue;
        const Stream numbers = random_stream(shape, prompt + decoded, 17);
        std::vector<std::vector<std::vector<position_t>>> want;
        std::vector<float> want_out;
        for_each_driver(shape, with.policy, with.budget, [&](auto& cache, const std::string& driver) {
            CAPTURE(driver);
            std::vector<std::vector<std::vector<position_t>>> held;
            feed_prompt(cache, numbers, 0, prompt, chunk);
            held.push_back(all_positions(cache));
            std::vector<float> out;
            for (std::size_t at = prompt; at < prompt + decoded; ++at) {
                const std::vector<float> one = feed(cache, numbers, at, 1);
                out.insert(out.end(), one.begin(), one.end());
                held.push_back(all_positions(cache));
            }
            if (want.empty()) {
                want = held;
                want_out = out;
            }
            CHECK((held == want));
            CHECK(rows_are_copies(cache, numbers));
            bool near = out.size() == want_out.size();
            for (std::size_t i = 0; near && i < out.size(); ++i)
                near = close(out[i], static_cast<double>(want_out[i]), 1e-4, 1e-5);
            CHECK(near);
        });
    }
}

template <Policy P>
void check_full_budget(const Setup<P>& with) {
    with.for_each_driver([&](auto& cache) {
        feed_prompt(cache, with.stream, 0, with.promises.budget, 5);
        const Snapshot before = snapshot(cache);
        std::vector<position_t> order;
        for (std::size_t i = 0; i < with.shape.heads(); ++i)
            for (std::size_t j = 0; j < with.promises.budget; ++j)
                order.push_back(static_cast<position_t>(j));
        CHECK((before.positions == order));
        CHECK(rows_are_copies(cache, with.stream));
        cache.make_room(0);
        CHECK((snapshot(cache) == before));
    });
}

template <Policy P>
void check_no_budget(const Setup<P>& with) {
    BlockPool pool;
    if (with.evicts() || Lookahead<P> || with.promises.when_probed) {
        refuses<error::config_error>([&] { KVCache cache(with.shape, with.policy, Budget{}, pool); });
        refuses<error::config_error>([&] { Engine<P> engine(with.shape, with.policy, Budget{}); });
    } else {
        KVCache cache(with.shape, with.policy, Budget{}, pool);
        run(cache, with.stream);
        CHECK(cache.rows(0, 0) == prompt + decoded);
    }
}

template <Policy P>
void check_empty(const Setup<P>& with) {
    with.for_each_driver([&](auto& cache) {
        CHECK(cache.scores(1, 2).empty());
        for (const bool announced : {true, false}) feed_prompt(cache, with.stream, 0, 0, 1, announced);
        cache.make_room(1);
        CHECK(cache.rows(0, 0) == 0);
        feed_decode(cache, with.stream, 0, prompt);
        CHECK(cache.rows(1, 2) >= std::min(prompt, with.promises.budget));
        CHECK(states_fit(cache));
    });
}

template <Policy P>
void check_permuted_heads(const Setup<P>& with) {
    if (with.promises.heads_are_alike && scope_of(with.policy) == Scope::head) {
        const std::vector<std::size_t> order{2, 0, 1};
        const Stream permuted = permute_heads(with.stream, order);
        BlockPool pool;
        KVCache<P> cache = with.cache(pool), other = with.cache(pool);
        run(cache, with.stream);
        run(other, permuted);
        for (std::size_t layer = 0; layer < with.shape.layers; ++layer)
            for (std::size_t h = 0; h < with.shape.kv_heads; ++h)
                CHECK((other.positions(layer, h) == cache.positions(layer, order[h])));
    }
}

template <Policy P>
void check_scoring(const Setup<P>& with) {
    BlockPool pool;
    KVCache<P> cache = with.cache(pool), asked = with.cache(pool);
    run(cache, with.stream);
    asked.begin_prompt(prompt);
    for (std::size_t at = 0; at < prompt + decoded;) {
        const std::size_t count = at < prompt ? std::min(chunk, prompt - at) : 1;
        feed(asked, with.stream, at, count);
        at += count;
        const std::vector<float> first = asked.scores(1, 0), second = asked.scores(1, 0);
        CHECK(same_bits(first, second));
        if (at == prompt) asked.end_prompt();
    }
    CHECK((snapshot(asked) == snapshot(cache)));
}

template <Policy P>
void check_forks(const Setup<P>& with) {
    BlockPool pool;
    KVCache<P> alone = with.cache(pool), parent = with.cache(pool);
    const Stream other = random_stream(with.shape, prompt + decoded, 77);
    run(alone, with.stream);
    feed_prompt(parent, with.stream, 0, prompt, chunk);
    feed_decode(parent, with.stream, prompt, prompt + 7);
    KVCache twin = parent.fork(), stranger = parent.fork();
    const std::vector<float> strange = feed_decode(stranger, other, prompt + 7, prompt + decoded);
    const std::vector<float> out = feed_decode(parent, with.stream, prompt + 7, prompt + decoded);
    CHECK_FALSE(same_bits(strange, out));
    CHECK(same_bits(feed_decode(twin, with.stream, prompt + 7, prompt + decoded), out));
    CHECK((snapshot(parent) == snapshot(alone)));
    CHECK((snapshot(twin) == snapshot(alone)));

    Engine<P> engine = with.engine(), reference = with.engine();
    run(reference, with.stream);
    feed_prompt(engine, with.stream, 0, prompt, chunk);
    Engine<P> copy = engine;
    feed_decode(copy, other, prompt, prompt + decoded);
    feed_decode(engine, with.stream, prompt, prompt + decoded);
    CHECK((snapshot(engine) == snapshot(reference)));
}

template <Policy P>
void check_rollback(const Setup<P>& with) {
    BlockPool pool;
    KVCache<P> cache = with.cache(pool);
    feed_prompt(cache, with.stream, 0, prompt, chunk);
    feed_decode(cache, with.stream, prompt, prompt + 7);
    const Snapshot marked = snapshot(cache);
    const Mark mark = cache.mark();
    const std::vector<float> out = feed_decode(cache, with.stream, prompt + 7, prompt + decoded);
    const Snapshot end = snapshot(cache);
    for (int again = 0; again < 2; ++again) {
        cache.rollback(mark);
        CHECK((snapshot(cache) == marked));
        CHECK(same_bits(feed_decode(cache, with.stream, prompt + 7, prompt + decoded), out));
        CHECK((snapshot(cache) == end));
    }
    cache.release(mark);
    CHECK((snapshot(cache) == end));
}

template <Policy P>
void check_wrong_lengths(const Setup<P>& with) {
    using error::shape_error, error::state_error;
    BlockPool pool;
    KVCache<P> cache = with.cache(pool), clean = with.cache(pool);
    run(clean, with.stream);
    feed_prompt(cache, with.stream, 0, prompt, chunk);
    const std::size_t dim = with.shape.head_dim;
    std::vector<float> out(with.shape.q_heads * 2 * dim);
    const auto out_of = [&](std::size_t heads, std::size_t tokens, std::size_t width) {
        return head_major(out.data(), heads, tokens, width);
    };
    for (std::size_t at = prompt; at < prompt + decoded; ++at) {
        auto k = with.stream.keys(0, at, 1), v = with.stream.values(0, at, 1),
             q = with.stream.queries(0, at, 1);
        const auto resized = [](auto view, std::size_t heads, std::size_t tokens, std::size_t width) {
            view.heads = heads;
            view.tokens = tokens;
            view.dim = width;
            return view;
        };
        const std::vector<position_t> late{5}, many{200, 201};
        refuses<shape_error>([&] { cache.append(with.shape.layers, k, v); });
        refuses<shape_error>([&] { cache.append(0, resized(k, 2, 1, dim), v); });
        refuses<shape_error>([&] { cache.append(0, resized(k, 3, 1, dim - 1), v); });
        refuses<shape_error>([&] { cache.append(0, k, resized(v, 3, 2, dim)); });
        refuses<shape_error>([&] { cache.append(0, k, resized(v, 3, 1, dim + 1)); });
        refuses<shape_error>([&] { cache.append(0, resized(k, 3, 0, dim), resized(v, 3, 0, dim)); });
        refuses<shape_error>([&] { cache.append(0, k, v, {.positions = late}); });
        refuses<shape_error>([&] { cache.append(0, k, v, {.positions = many}); });
        refuses<state_error>([&] { cache.attend(0, q, out_of(6, 1, dim)); });
        for (std::size_t layer = 0; layer < with.shape.layers; ++layer) {
            q = with.stream.queries(layer, at, 1);
            cache.append(layer, with.stream.keys(layer, at, 1), with.stream.values(layer, at, 1));
            refuses<state_error>([&] { cache.append(layer, k, v); });
            refuses<shape_error>([&] { cache.attend(layer, resized(q, 3, 1, dim), out_of(6, 1, dim)); });
            refuses<shape_error>([&] { cache.attend(layer, resized(q, 6, 2, dim), out_of(6, 2, dim)); });
            refuses<shape_error>([&] { cache.attend(layer, resized(q, 6, 1, dim + 1), out_of(6, 1, dim)); });
            refuses<shape_error>([&] { cache.attend(layer, q, out_of(6, 1, dim - 1)); });
            refuses<shape_error>([&] { cache.attend(layer, q, {}); });
            refuses<state_error>([&] { cache.end_step(); });
            cache.attend(layer, q, out_of(6, 1, dim));
            refuses<state_error>([&] { cache.attend(layer, q, out_of(6, 1, dim)); });
        }
        refuses<state_error>([&] { cache.end_prompt(); });
        cache.end_step();
        refuses<state_error>([&] { cache.end_prompt(); });
    }
    CHECK((snapshot(cache) == snapshot(clean)));

    // The evictor sees views that an engine made: rows, widths and positions may all be wrong.
    Evictor<P> evictor(with.shape, with.policy, with.budget);
    const std::vector<position_t> two{0, 1}, backwards{1, 0};
    const auto layer_of = [&](std::size_t k_rows, std::size_t v_rows, std::size_t width,
                              std::span<const position_t> positions) {
        return std::vector<HeadView>(with.shape.kv_heads,
                                     {RowsView(with.stream.k.data(), k_rows, width, dim),
                                      RowsView(with.stream.v.data(), v_rows, dim, dim), positions});
    };
    const auto q = with.stream.queries(0, 0, 2);
    refuses<shape_error>([&] { (void)evictor.step(0, layer_of(3, 2, dim, two), q); });
    refuses<shape_error>([&] { (void)evictor.step(0, layer_of(2, 1, dim, two), q); });
    refuses<shape_error>([&] { (void)evictor.step(0, layer_of(2, 2, dim - 1, two), q); });
    refuses<shape_error>([&] { (void)evictor.step(0, layer_of(2, 2, dim, std::span(two).first(1)), q); });
    refuses<shape_error>([&] { (void)evictor.step(0, layer_of(2, 2, dim, backwards), q); });
    refuses<shape_error>([&] { (void)evictor.step(0, LayerView(layer_of(2, 2, dim, two)).first(2), q); });
    refuses<shape_error>([&] { (void)evictor.step(with.shape.layers, layer_of(2, 2, dim, two), q); });
    refuses<state_error>([&] { (void)evictor.end_step(); });
    std::vector<float> score(1);
    refuses<shape_error>([&] { evictor.scores(0, 0, {}, score); });
    CHECK(evictor.seen() == 0);
    const std::vector<HeadView> right = layer_of(2, 2, dim, two);
    CHECK(evictor.step(0, right, q).empty());
}

template <Policy P>
void check_chunks(const Setup<P>& with) {
    if (with.promises.chunks_do_not_matter)
        with.for_each_driver([&](auto& cache) {
            BlockPool pool;
            KVCache<P> whole = with.cache(pool);
            feed_prompt(whole, with.stream, 0, prompt, prompt);
            feed_prompt(cache, with.stream, 0, prompt, 4);
            CHECK((all_positions(cache) == all_positions(whole)));
        });
}

template <Policy P>
void check_room_hold_truncate(const Setup<P>& with) {
    with.for_each_driver([&](auto& cache) {
        feed_prompt(cache, with.stream, 0, prompt, chunk);
        cache.make_room(3);
        if (with.evicts()) CHECK(cache.rows(1, 1) == with.promises.budget - 3);
        CHECK(states_fit(cache));
        cache.hold(true);
        const std::size_t before = cache.rows(1, 1);
        feed_decode(cache, with.stream, prompt, prompt + 20);
        CHECK(cache.rows(1, 1) == before + 20);
        cache.truncate(15);
        CHECK(cache.rows(1, 1) == before + 5);
        CHECK(positions_of(cache.view(1, 1)).back() == static_cast<position_t>(prompt + 4));
        CHECK(states_fit(cache));
        cache.hold(false);
        feed_decode(cache, with.stream, prompt + 5, prompt + decoded);
        CHECK(states_fit(cache));
        CHECK(rows_are_copies(cache, with.stream));
        if (with.evicts() && with.promises.while_decoding) CHECK(cache.rows(1, 1) == with.promises.budget);
    });
}

template <Policy P>
void check_ragged(const Setup<P>& with) {
    if (scope_of(with.policy) == Scope::head && with.evicts()) {
        BlockPool pool({.block_rows = 5});
        KVCache<P, Uneven> cache(with.shape, with.policy, with.budget, pool);
        Engine<P, Uneven> engine(with.shape, with.policy, with.budget);
        const auto check = [&](auto& one) {
            feed_prompt(one, with.stream, 0, prompt, prompt);
            for (std::size_t h = 0; h < with.shape.kv_heads; ++h)
                CHECK(one.rows(1, h) == with.promises.budget - 1 + 2 * (h % 2));
            feed_decode(one, with.stream, prompt, prompt + decoded);
            for (std::size_t h = 0; h < with.shape.kv_heads && with.promises.while_decoding; ++h)
                CHECK(one.rows(1, h) == with.promises.budget - 1 + 2 * (h % 2));
            CHECK(states_fit(one));
            CHECK(rows_are_copies(one, with.stream));
        };
        check(cache);
        check(engine);
        CHECK((all_positions(cache) == all_positions(engine)));
    }
}

}  // namespace conformance

/// Fails the test case that calls it where the policy breaks the contract.
template <Policy P>
void policy_conformance(const P& policy, const Promises& promises = {}) {
    const conformance::Setup<P> with{policy, promises};
    INFO("policy " << P::name);
    SECTION("plans are sound and states follow them, at every shape") {
        conformance::check_plans(with);
    }
    SECTION("KVCache and Evictor on foreign buffers agree on every instruction set") {
        conformance::check_drivers_agree(with);
    }
    SECTION("as many rows as the budget change nothing, bit for bit") {
        conformance::check_full_budget(with);
    }
    SECTION("a budget of no row is refused") {
        conformance::check_no_budget(with);
    }
    SECTION("empty heads and empty prompts are legal") {
        conformance::check_empty(with);
    }
    SECTION("permuting KV heads with their groups permutes the result") {
        conformance::check_permuted_heads(with);
    }
    SECTION("scoring changes nothing") {
        conformance::check_scoring(with);
    }
    SECTION("a fork goes its own way and leaves its parent alone") {
        conformance::check_forks(with);
    }
    SECTION("after a rollback everything goes as it went before") {
        conformance::check_rollback(with);
    }
    SECTION("wrong lengths throw and leave all as it was") {
        conformance::check_wrong_lengths(with);
    }
    SECTION("chunks of a prompt do not matter") {
        conformance::check_chunks(with);
    }
    SECTION("make_room leaves room, hold keeps all, truncate takes back") {
        conformance::check_room_hold_truncate(with);
    }
    SECTION("heads may differ in length") {
        conformance::check_ragged(with);
    }
}

}  // namespace kvcull::test
