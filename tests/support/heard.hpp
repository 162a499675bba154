#pragma once
/// Calls in which a policy hears no attention, and who is asked again because of it.

#include <cstddef>
#include <vector>

#include "catch.hpp"
#include "conformance.hpp"
#include "engine.hpp"

namespace kvcull::test {

/// A call of an engine that attends by itself: no attention is made.
template <class Cache>
void feed_silently(Cache& engine, const Stream& stream, std::size_t first, std::size_t count) {
    for (std::size_t layer = 0; layer < stream.shape.layers; ++layer) {
        engine.append(layer, stream.keys(layer, first, count), stream.values(layer, first, count));
        engine.attend(layer, stream.queries(layer, first, count), {});
    }
    engine.end_step();
}
/// Query tokens before the newest whose logits are computed in a call: those that are asked again.
struct AskedAgain {
    std::size_t count = 0;
    position_t newest = 0;

    [[nodiscard]] Bias bias() {
        return [this](const BiasRow& row) { count += row.query < newest ? 1 : 0; };
    }
};

/// A cache whose policy hears attention and an engine where it does not, after the same prompt: who is
/// asked again in either, while they must hold the same rows.
template <class P>
struct HeardOrAsked {
    HeardOrAsked(const Stream& tokens, const P& policy, Budget budget, std::size_t prompt)
        : stream(tokens),
          at(prompt),
          cache(stream.shape, policy, budget),
          engine(stream.shape, policy, budget) {
        all([&](auto& one) { feed_prompt(one, stream, 0, prompt, prompt); });
        cache.set_bias(heard.bias());
        engine.set_bias(silent.bias());
    }
    HeardOrAsked(const HeardOrAsked&) = delete;  // the biases know where it is
    HeardOrAsked& operator=(const HeardOrAsked&) = delete;

    /// `call(one)` of both.
    template <class Call>
    void all(const Call& call) {
        call(cache);
        call(engine);
    }
    /// Counts those asked again in these calls.
    void decode(std::size_t calls, std::size_t count = 1) {
        heard.count = silent.count = 0;
        for (; calls > 0; --calls, at += count) {
            heard.newest = silent.newest = stream.position(at + count - 1);
            feed(cache, stream, at, count);
            feed_silently(engine, stream, at, count);
        }
        REQUIRE((all_positions(cache) == all_positions(engine)));
    }
    void truncate(std::size_t tokens) {
        all([&](auto& one) { one.truncate(tokens); });
        at -= tokens;
    }

    const Stream& stream;
    std::size_t at;
    AskedAgain heard, silent;
    KVCache<P> cache;
    Engine<P> engine;
};

/// A cache whose policy hears attention, an engine where it never does, and one where it misses some: they
/// must hold the same rows and give them the same scores, bit for bit, after every call.
template <class P>
class Listeners {
  public:
    Listeners(const Stream& stream, const P& policy, Budget budget, simd::Isa isa)
        : hears_(stream.shape, policy, budget),
          asks_(stream.shape, policy, budget),
          hears_some_(stream.shape, policy, budget),
          stream_(stream) {
        all([&](auto& cache) { cache.set_kernels(simd::kernels_for(isa)); });
    }

    [[nodiscard]] std::size_t tokens() const noexcept { return at_; }
    /// `call(cache)` of each of them.
    template <class Call>
    void all(const Call& call) {
        call(hears_);
        call(asks_);
        call(hears_some_);
    }
    void decode(std::size_t calls, std::size_t count) {
        for (; calls > 0; --calls, at_ += count) {
            feed(hears_, stream_, at_, count);
            feed_silently(asks_, stream_, at_, count);
            if (at_ % 20 == 3)
                feed_silently(hears_some_, stream_, at_, count);
            else
                feed(hears_some_, stream_, at_, count);
            REQUIRE((all_positions(hears_) == all_positions(asks_)));
            REQUIRE((all_positions(hears_some_) == all_positions(asks_)));
            const std::size_t heads = stream_.shape.kv_heads;
            for (std::size_t i = 0; i < stream_.shape.heads(); ++i) {
                const std::vector<float> want = asks_.scores(i / heads, i % heads);
                REQUIRE(same_bits(hears_.scores(i / heads, i % heads), want));
                REQUIRE(same_bits(hears_some_.scores(i / heads, i % heads), want));
            }
        }
    }
    void prompt(std::size_t calls, std::size_t count) {
        all([](auto& cache) { cache.begin_prompt(); });
        decode(calls, count);
        all([](auto& cache) { cache.end_prompt(); });
    }
    void truncate(std::size_t tokens) {
        all([&](auto& cache) { cache.truncate(tokens); });
        at_ -= tokens;
    }
    void make_room(std::size_t tokens) {
        all([&](auto& cache) { cache.make_room(tokens); });
    }
    void hold(bool on) {
        all([&](auto& cache) { cache.hold(on); });
    }

  private:
    KVCache<P> hears_;
    Engine<P> asks_, hears_some_;
    const Stream& stream_;
    std::size_t at_ = 0;
};

}  // namespace kvcull::test
