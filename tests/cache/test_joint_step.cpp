// Many sequences in one step: the same numbers as alone, a full pool that harms nobody, threads.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "kvcull/cache/joint_step.hpp"
#include "kvcull/policies.hpp"
#include "kvcull/select/head_rules.hpp"
#include "kvcull/select/layer_rules.hpp"
#include "support/catch.hpp"
#include "support/every_policy.hpp"
#include "support/failure.hpp"
#include "support/foreign.hpp"
#include "support/live.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

const CacheShape shape{.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 8, .value_dim = 6};

/// Two threads that take the next index when they are free.
void two_threads(std::size_t count, const std::function<void(std::size_t)>& body) {
    std::atomic<std::size_t> next{0};
    const auto work = [&] {
        for (std::size_t index = next++; index < count; index = next++) body(index);
    };
    std::thread other(work);
    work();
    other.join();
}

/// Tokens of one sequence in a joint step, and what they get out of it, as `feed` gives it.
struct Share {
    const TokenStream* stream = nullptr;
    std::size_t first = 0, count = 0;
    std::vector<float> out = {};
};

/// All layers of a joint step of `shares`, which were added in this order, through packed buffers.
void feed(JointStep& step, std::vector<Share>& shares, std::size_t layers = shape.layers) {
    const std::size_t total = step.tokens(), values = shape.values();
    std::vector<float> q(total * shape.q_heads * shape.head_dim), k(total * shape.kv_heads * shape.head_dim),
        v(total * shape.kv_heads * values), out(total * shape.q_heads * values, -77.0F);
    const auto pack = [&](HeadsView<const float> from, std::vector<float>& to, std::size_t first) {
        const auto packed = token_major(to.data(), from.heads, total, from.dim).slice(first, from.tokens);
        for (std::size_t h = 0; h < from.heads; ++h)
            for (std::size_t i = 0; i < from.tokens; ++i)
                std::copy(from.row(h, i), from.row(h, i) + from.dim, packed.row(h, i));
    };
    for (std::size_t layer = 0; layer < layers; ++layer) {
        for (std::size_t i = 0; i < shares.size(); ++i) {
            const Share& share = shares[i];
            pack(share.stream->q(layer, share.first, share.count), q, step.first(i));
            pack(share.stream->k(layer, share.first, share.count), k, step.first(i));
            pack(share.stream->v(layer, share.first, share.count), v, step.first(i));
        }
        step.attend(layer, token_major(q.data(), shape.q_heads, total, shape.head_dim),
                    token_major(k.data(), shape.kv_heads, total, shape.head_dim),
                    token_major(v.data(), shape.kv_heads, total, values),
                    token_major(out.data(), shape.q_heads, total, values));
        for (std::size_t i = 0; i < shares.size(); ++i) {
            const auto mine =
                token_major(out.data(), shape.q_heads, total, values).slice(step.first(i), shares[i].count);
            for (std::size_t h = 0; h < mine.heads; ++h)
                for (std::size_t token = 0; token < mine.tokens; ++token)
                    shares[i].out.insert(shares[i].out.end(), mine.row(h, token),
                                         mine.row(h, token) + values);
        }
    }
}

/// A sequence with a prompt in chunks and then one token per step; and its twin, which runs alone.
class Sequence {
  public:
    virtual ~Sequence() = default;
    virtual bool add(JointStep& step) = 0;
    virtual void after() = 0;
    virtual std::vector<float> alone() = 0;
    virtual bool same() = 0;

    std::unique_ptr<TokenStream> stream;
    std::size_t prompt = 0, chunk = 1, seen = 0;

    [[nodiscard]] std::size_t count() const { return seen < prompt ? std::min(chunk, prompt - seen) : 1; }
};

template <Policy P, BudgetRule Rule>
class SequenceOf final : public Sequence {
  public:
    SequenceOf(DType dtype, P policy, Budget budget, BlockPool& pool, BlockPool& other, Rule rule)
        : cache_(of(dtype), policy, budget, pool, rule), twin_(of(dtype), policy, budget, other, rule) {}

    bool add(JointStep& step) override {
        if (seen == 0) cache_.begin_prompt(prompt);
        return step.add(cache_, count());
    }
    void after() override {
        seen += count();
        if (seen == prompt) cache_.end_prompt();
    }
    std::vector<float> alone() override {
        if (seen == 0) twin_.begin_prompt(prompt);
        std::vector<float> out = test::feed(twin_, *stream, seen, count());
        if (seen + count() == prompt) twin_.end_prompt();
        return out;
    }
    bool same() override {
        bool same = same_live(cache_.evictor().live(), twin_.evictor().live());
        for (std::size_t i = 0; i < shape.heads(); ++i)
            same = same && cache_.positions(i / shape.kv_heads, i % shape.kv_heads) ==
                               twin_.positions(i / shape.kv_heads, i % shape.kv_heads);
        return same && cache_.bytes() == twin_.bytes();
    }

  private:
    static CacheShape of(DType dtype) {
        CacheShape typed = shape;
        typed.dtype = dtype;
        return typed;
    }

    KVCache<P, Rule> cache_, twin_;
};

template <Policy P, BudgetRule Rule = Uniform>
std::unique_ptr<Sequence> sequence(DType dtype, P policy, std::size_t prompt, std::size_t chunk,
                                   BlockPool& pool, BlockPool& other, Rule rule = {}) {
    auto made = std::make_unique<SequenceOf<P, Rule>>(dtype, std::move(policy), Budget{.tokens = 9}, pool,
                                                      other, rule);
    made->stream = std::make_unique<TokenStream>(shape, prompt + 20, prompt * 100 + chunk);
    made->prompt = prompt;
    made->chunk = chunk;
    return made;
}

std::vector<float> bits(const KVCache<Full>& cache) {
    std::vector<float> all = widened(cache.view(0, 0).k);
    for (const position_t at : cache.positions(1, 1)) all.push_back(static_cast<float>(at));
    return all;
}

}  // namespace

TEST_CASE("a joint step gives every sequence what it gets alone, bit for bit", "[threads][differential]") {
    constexpr std::array types{DType::f32, DType::int8, DType::f16, DType::int4};
    for (std::size_t turn = 0; const Executor& executor : {Executor{}, Executor{two_threads}, threads()}) {
        ++turn;
        BlockPool pool({.block_rows = 4}), other({.block_rows = 4});
        std::vector<std::unique_ptr<Sequence>> sequences;
        for_every_policy([&](auto policy) {
            const std::size_t number = sequences.size();
            sequences.push_back(sequence(types[(turn + number) % types.size()], policy, 5 + 3 * number % 17,
                                         1 + number % 6, pool, other));
        });
        sequences.push_back(
            sequence(DType::f32, SnapKV{.window = 3, .kernel = 1}, 18, 18, pool, other, AdaKV<>{}));
        sequences.push_back(sequence(DType::bf16, H2O{}, 14, 5, pool, other, Pyramid{.beta = 3}));
        JointStep step(executor);
        for (std::size_t round = 0; round < 20; ++round) {
            CAPTURE(round);
            // Not everybody in every step.
            std::vector<Share> shares;
            std::vector<Sequence*> in;
            for (std::size_t i = 0; i < sequences.size(); ++i)
                if ((i + round) % 5 != 0) {
                    REQUIRE(sequences[i]->add(step));
                    shares.push_back({sequences[i]->stream.get(), sequences[i]->seen, sequences[i]->count()});
                    in.push_back(sequences[i].get());
                }
            feed(step, shares);
            step.end();
            for (std::size_t i = 0; i < in.size(); ++i) {
                CAPTURE(i);
                REQUIRE(same_bits(shares[i].out, in[i]->alone()));
                in[i]->after();
                REQUIRE(in[i]->same());
            }
        }
    }
}

TEST_CASE("long heads of some sequences run in parts beside others, with the same bits",
          "[threads][property]") {
    const std::size_t rows = 6200;  // two parts
    const TokenStream stream(shape, rows + 10, 5);
    const auto check = [&](auto policy) {
        CAPTURE(policy.name);
        Evictor evictor(shape, policy, Budget{.tokens = rows + 50});
        Foreign held(shape);
        for (std::size_t layer = 0; layer < shape.layers; ++layer) {  // no outputs: costs no attention
            held.append(layer, stream.k(layer, 0, rows), stream.v(layer, 0, rows), 0);
            evictor.step(layer, held.layer(layer), stream.q(layer, 0, rows));
        }
        evictor.end_step(held.view());
        const auto run = [&](const Executor& executor) {
            KVCache longer(shape, policy, Budget{.tokens = rows + 50});
            KVCache shorter(shape, H2O{}, Budget{.tokens = 20});
            longer.restore(evictor.live(), held.view());
            std::vector<float> all;
            JointStep step(executor);
            for (std::size_t token = 0; token < 3; ++token) {
                REQUIRE(step.add(shorter, 12));
                REQUIRE(step.add(longer, 1));
                std::vector<Share> shares{{&stream, 40 + token, 12}, {&stream, rows + token, 1}};
                feed(step, shares);
                step.end();
                for (const Share& share : shares) all.insert(all.end(), share.out.begin(), share.out.end());
            }
            const std::vector<float> scores = longer.scores(1, 1);
            all.insert(all.end(), scores.begin(), scores.end());
            return all;
        };
        const std::vector<float> serial = run({});
        REQUIRE(same_bits(serial, run(two_threads)));
        REQUIRE(same_bits(serial, run(threads())));
        KVCache alone(shape, policy, Budget{.tokens = rows + 50});
        alone.restore(evictor.live(), held.view());
        alone.set_executor(two_threads);
        for (std::size_t token = 0; token < 3; ++token) test::feed(alone, stream, rows + token, 1);
        const std::vector<float> scores = alone.scores(1, 1);
        REQUIRE(same_bits(scores, std::span(serial).last(scores.size())));
    };
    check(Tova{});
    check(KeyNorm{});
}

TEST_CASE("a full pool refuses a sequence in `add`, and harms neither it nor the others", "[contract]") {
    const TokenStream stream(shape, 60, 7);
    BlockPool pool({.block_rows = 4});
    KVCache<Full> grows(shape, {}, {}, pool), twin(shape);
    KVCache bounded(shape, Streaming{.sinks = 1}, Budget{.tokens = 8}, pool);
    auto finished = std::make_unique<KVCache<Full>>(shape, Full{}, Budget{}, pool);
    JointStep step;
    const auto both = [&](std::size_t token) {
        REQUIRE(step.add(bounded, 1));
        const bool in = step.add(grows, 1);
        std::vector<Share> shares{{&stream, token, 1}};
        if (in) shares.push_back({&stream, grows.seen(), 1});
        feed(step, shares);
        step.end();
        if (in) REQUIRE(same_bits(shares[1].out, test::feed(twin, stream, twin.seen(), 1)));
        return in;
    };
    test::feed(*finished, stream, 0, 30);
    for (std::size_t token = 0; token < 12; ++token) REQUIRE(both(token));
    pool.set_limit(pool.bytes() + 2 * bounded.step_bytes(1) + 64);
    std::size_t refused = 0;
    for (std::size_t token = 12; token < 24; ++token) {
        const std::vector<float> before = bits(grows);
        const std::size_t bytes = grows.bytes(), seen = grows.seen();
        if (both(token)) continue;
        ++refused;
        REQUIRE(same_bits(before, bits(grows)));
        REQUIRE(grows.bytes() == bytes);
        REQUIRE(grows.seen() == seen);
    }
    REQUIRE(refused > 4);
    REQUIRE(bounded.seen() == 24);
    REQUIRE(pool.bytes() <= pool.limit());
    finished.reset();  // its blocks are free at once
    for (std::size_t token = 24; token < 30; ++token) REQUIRE(both(token));
}

TEST_CASE("what a step may need is what `prepare` takes, and enough however full the pool is then",
          "[property]") {
    const TokenStream stream(shape, 80, 8);
    for_every_policy([&](auto policy) {
        CAPTURE(policy.name);
        BlockPool pool({.block_rows = 4});
        KVCache cache(shape, policy, Budget{.tokens = 9, .slack = 3}, pool);
        const auto call = [&](std::size_t first, std::size_t count) {
            const std::size_t bytes = cache.step_bytes(count), before = pool.bytes();
            if (bytes > 0) {
                pool.set_limit(before + bytes - 1);
                REQUIRE_THROWS_AS(cache.prepare(count), error::capacity_error);
                REQUIRE(pool.bytes() == before);
            }
            pool.set_limit(before + bytes);
            cache.prepare(count);
            REQUIRE(pool.bytes() == before + bytes);
            REQUIRE(cache.step_bytes(count) == 0);
            cache.prepare(0);
            REQUIRE(pool.bytes() == before);
            cache.prepare(count);
            pool.set_limit(0);
            test::feed(cache, stream, first, count);
            pool.set_limit(SIZE_MAX);
        };
        cache.begin_prompt(24);
        for (std::size_t first = 0; first < 24; first += 8) call(first, 8);
        cache.end_prompt();
        for (std::size_t token = 24; token < 40; ++token) call(token, 1);
        const auto fork = cache.fork();  // every block is shared now
        for (std::size_t token = 40; token < 46; ++token) call(token, 1);
    });
}

TEST_CASE("what cannot be a joint step is refused before any cache changes", "[contract]") {
    const TokenStream stream(shape, 30, 9);
    KVCache a(shape, H2O{}, Budget{.tokens = 9});
    KVCache b(shape, Tova{}, Budget{.tokens = 9});
    CacheShape wider = shape;
    wider.head_dim = 12;
    KVCache other(wider, H2O{}, Budget{.tokens = 9});
    JointStep step;
    REQUIRE(step.add(a, 2));
    REQUIRE_THROWS_AS(step.add(a, 1), error::state_error);
    REQUIRE_THROWS_AS(step.add(b, 0), error::shape_error);
    REQUIRE_THROWS_AS(step.add(other, 1), error::shape_error);
    REQUIRE(step.add(b, 1));
    REQUIRE(step.size() == 2);
    REQUIRE(step.tokens() == 3);
    REQUIRE(step.first(1) == 2);
    Outputs out(shape, 3);
    const auto bad = [&](std::size_t layer, HeadsView<const float> q, HeadsView<const float> k,
                         HeadsView<const float> v, const AppendInputs& inputs = {}) {
        REQUIRE_THROWS_AS(step.attend(layer, q, k, v, out.layer(0), inputs), error::shape_error);
        REQUIRE(a.rows(0, 0) == 0);
        REQUIRE(b.rows(0, 0) == 0);
    };
    const auto q = stream.q(0, 0, 3), k = stream.k(0, 0, 3), v = stream.v(0, 0, 3);
    bad(2, q, k, v);
    bad(0, q.slice(0, 2), k, v);
    bad(0, q, k.slice(0, 2), v);
    bad(0, q, k, v.slice(0, 2));
    const std::vector<position_t> twice{0, 1, -1};
    bad(0, q, k, v, {.positions = std::span(twice).first(2)});
    bad(0, q, k, v, {.positions = twice});
    step.attend(0, q, k, v, out.layer(0));
    REQUIRE_THROWS_AS(step.attend(0, q, k, v, out.layer(0)), error::state_error);
    REQUIRE_THROWS_AS(step.add(other, 1), error::state_error);
    REQUIRE(failure<error::state_error>([&] { step.end(); }) ==
            "JointStep::end: layers attended is 1, want 2");
    step.attend(1, stream.q(1, 0, 3), stream.k(1, 0, 3), stream.v(1, 0, 3), out.layer(1));
    const std::vector<std::int32_t> ids(2);
    REQUIRE_THROWS_AS(step.end({.tokens = ids}), error::shape_error);
    step.end();
    REQUIRE(a.seen() == 2);
    REQUIRE(b.seen() == 1);
    REQUIRE(step.size() == 0);
}

TEST_CASE("a step that is called off gives its memory back", "[contract]") {
    BlockPool pool({.block_rows = 4});
    KVCache cache(shape, H2O{}, Budget{.tokens = 9}, pool);
    JointStep step;
    REQUIRE(step.add(cache, 5));
    REQUIRE(pool.bytes() > 0);
    step.cancel();
    REQUIRE(pool.bytes() == 0);
    REQUIRE(step.size() == 0);
    REQUIRE(step.add(cache, 1));
    REQUIRE(failure<error::state_error>([&] { step.end(); }) ==
            "JointStep::end: layers attended is 0, want 2");
    step.cancel();

    const TokenStream stream(shape, 4, 21);
    const Mark mark = cache.mark();
    Outputs out(shape, 1);
    REQUIRE(step.add(cache, 1));
    step.attend(0, stream.q(0, 0, 1), stream.k(0, 0, 1), stream.v(0, 0, 1), out.layer(0));
    step.cancel();  // as where the engine failed
    REQUIRE(step.size() == 0);
    cache.rollback(mark);
    std::vector<Share> shares{{&stream, 0, 1}};
    REQUIRE(step.add(cache, 1));
    feed(step, shares);
    step.end();
    REQUIRE(cache.seen() == 1);
}

TEST_CASE("what a sequence's own callback throws takes that sequence out alone", "[threads][contract]") {
    const TokenStream stream(shape, 30, 10);
    for (const Executor& executor : {Executor{}, Executor{two_threads}}) {
        const auto h2o = [] { return KVCache(shape, H2O{}, Budget{.tokens = 9}); };
        const auto keydiff = [] { return KVCache(shape, KeyDiff{}, Budget{.tokens = 9}); };
        auto a = h2o(), bad = h2o(), twin_a = h2o();
        auto c = keydiff(), twin_c = keydiff();
        bad.set_bias([](const BiasRow& row) {
            if (row.layer == 1) throw std::runtime_error("no bias for layer 1");
        });
        JointStep step(executor);
        REQUIRE(step.add(a, 2));
        REQUIRE(step.add(bad, 3));
        REQUIRE(step.add(c, 1));
        std::vector<Share> shares{{&stream, 0, 2}, {&stream, 2, 3}, {&stream, 5, 1}};
        Outputs out(shape, 6);
        step.attend(0, stream.q(0, 0, 6), stream.k(0, 0, 6), stream.v(0, 0, 6), out.layer(0));
        REQUIRE_FALSE(step.failed(1));
        REQUIRE_THROWS_WITH(
            step.attend(1, stream.q(1, 0, 6), stream.k(1, 0, 6), stream.v(1, 0, 6), out.layer(1)),
            "no bias for layer 1");
        REQUIRE_FALSE(step.failed(0));
        REQUIRE(step.failed(1));
        REQUIRE_FALSE(step.failed(2));
        step.end();
        test::feed(twin_a, stream, 0, 2);
        test::feed(twin_c, stream, 5, 1);
        REQUIRE(same_live(a.evictor().live(), twin_a.evictor().live()));
        REQUIRE(same_live(c.evictor().live(), twin_c.evictor().live()));
        REQUIRE(bad.seen() == 0);
    }
}

TEST_CASE("servers on one small pool refuse, wait, preempt and finish, and every answer is right",
          "[threads]") {
    constexpr std::size_t servers = 3, requests = 5;
    const TokenStream stream(shape, 60, 11);
    BlockPool pool({.block_rows = 4});
    const std::size_t block = 64 + 64 + 4 * (shape.head_dim + shape.values()) * sizeof(float);
    KVCache system(shape, SnapKV{.window = 3, .kernel = 3}, Budget{.tokens = 12}, pool);
    system.begin_prompt(20);
    test::feed(system, stream, 0, 20);
    system.end_prompt();
    using Cache = KVCache<SnapKV>;
    constexpr std::size_t question = 6, answer = 14;
    // One request alone: the end of the system prompt's fork.
    const auto wanted = [&](std::size_t number) {
        Cache cache = system.fork();
        std::vector<float> out;
        const auto take = [&](std::size_t first, std::size_t count) {
            const std::vector<float> some = test::feed(cache, stream, first, count);
            out.insert(out.end(), some.begin(), some.end());
        };
        take(20 + number, question);
        for (std::size_t i = 0; i < answer; ++i) take(26 + number + i, 1);
        return out;
    };
    std::vector<std::vector<float>> want;
    for (std::size_t number = 0; number < servers * requests; ++number) want.push_back(wanted(number));
    pool.set_limit(pool.bytes() + 4 * 16 * block);

    std::vector<std::vector<float>> got(want.size());
    std::atomic<std::size_t> refused{0};
    std::vector<std::thread> all;
    for (std::size_t server = 0; server < servers; ++server)
        all.emplace_back([&, server] {
            struct Running {
                std::size_t number;
                std::unique_ptr<Cache> cache;
                std::size_t step = 0;
                std::vector<float> out = {};
            };
            std::deque<std::size_t> waiting;
            for (std::size_t i = 0; i < requests; ++i) waiting.push_back(server * requests + i);
            std::vector<Running> running;
            JointStep step(server == 0 ? Executor{two_threads} : Executor{});
            bool starved = false;
            while (!waiting.empty() || !running.empty()) {
                if (!waiting.empty() && !std::exchange(starved, false)) {
                    running.push_back({waiting.front(), std::make_unique<Cache>(system.fork())});
                    waiting.pop_front();
                }
                std::vector<Share> shares;
                std::vector<Running*> in;
                for (Running& one : running) {
                    const std::size_t count = one.step == 0 ? question : 1;
                    if (!step.add(*one.cache, count)) {
                        ++refused;
                        continue;
                    }
                    shares.push_back(
                        {&stream, one.step == 0 ? 20 + one.number : 25 + one.number + one.step, count});
                    in.push_back(&one);
                }
                if (in.empty()) {  // nobody fits: the newest begins again later
                    waiting.push_back(running.back().number);
                    running.pop_back();
                    starved = !running.empty();
                    std::this_thread::yield();
                    continue;
                }
                feed(step, shares);
                step.end();
                for (std::size_t i = 0; i < in.size(); ++i) {
                    in[i]->out.insert(in[i]->out.end(), shares[i].out.begin(), shares[i].out.end());
                    if (++in[i]->step <= answer) continue;
                    got[in[i]->number] = std::move(in[i]->out);
                    in[i]->cache.reset();
                }
                std::erase_if(running, [](const Running& one) { return one.cache == nullptr; });
            }
        });
    for (std::thread& thread : all) thread.join();
    for (std::size_t number = 0; number < want.size(); ++number)
        REQUIRE(same_bits(got[number], want[number]));
    REQUIRE(refused > 0);
    REQUIRE(pool.peak_bytes() <= pool.limit());
    REQUIRE(pool.bytes() == system.bytes() - system.evictor().bytes());
}

TEST_CASE("several threads may ask a cache with marks for its bytes at once", "[threads]") {
    const TokenStream stream(shape, 30, 12);
    KVCache cache(shape, H2O{}, Budget{.tokens = 9});
    test::feed(cache, stream, 0, 12);
    (void)cache.mark();
    test::feed(cache, stream, 12, 4);
    const std::size_t bytes = cache.bytes();
    std::atomic<std::size_t> wrong{0};
    threads()(4, [&](std::size_t) {
        for (std::size_t i = 0; i < 50; ++i)
            if (cache.bytes() != bytes) ++wrong;
    });
    REQUIRE(wrong == 0);
}
