// What a cache costs the process, and caches in parallel on one pool.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <optional>
#include <thread>
#include <vector>

#include "kvcull/cache/kv_cache.hpp"
#include "kvcull/policies.hpp"
#include "support/catch.hpp"
#include "support/every_policy.hpp"
#include "support/foreign.hpp"
#include "support/reference.hpp"
#include "support/resident.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {
constexpr std::size_t mib = std::size_t{1} << 20U;

/// What the allocator may add over time. The address sanitizer keeps freed memory for a while.
#if defined(__SANITIZE_ADDRESS__)
#    define KVCULL_TEST_ASAN 1
#elif defined(__has_feature)
#    if __has_feature(address_sanitizer)
#        define KVCULL_TEST_ASAN 1
#    endif
#endif
#if defined(KVCULL_TEST_ASAN)
constexpr std::size_t drift = 16 * mib;
#else
constexpr std::size_t drift = mib / 2;
#endif
}  // namespace

TEST_CASE("resident memory falls when a long prompt is cut and the cache is trimmed", "[property]") {
    if (!resident_bytes()) KVCULL_SKIP("this system does not tell how much memory is resident");
    // Wide rows, so that the prompt is large and its attention is not.
    const CacheShape shape{.layers = 8, .q_heads = 2, .kv_heads = 2, .head_dim = 1024};
    const std::size_t chunk = 32, prompt = 512;
    const std::size_t prompt_bytes = 16 * prompt * 1024 * 2 * sizeof(float);
    const TokenStream stream(shape, chunk + 1, 1);
    BlockPool pool;
    KVCache cache(shape, SnapKV{.window = 8}, Budget{.tokens = 32}, pool);
    Outputs out(shape, chunk);  // one for all calls: a sanitizer keeps freed memory for a while
    const auto feed_chunk = [&] {
        for (std::size_t layer = 0; layer < 8; ++layer) {
            cache.append(layer, stream.k(layer, 0, chunk), stream.v(layer, 0, chunk));
            cache.attend(layer, stream.q(layer, 0, chunk), out.layer(layer));
        }
        cache.end_step();
    };
    feed_chunk();  // what is used once, is resident from now on
    const std::size_t before = resident_bytes().value();
    cache.begin_prompt();
    for (std::size_t done = 0; done < prompt; done += chunk) feed_chunk();
    const std::size_t whole = resident_bytes().value();
    REQUIRE(whole > before + prompt_bytes * 9 / 10);
    cache.end_prompt();
    REQUIRE(cache.rows(7, 1) == 32);
    cache.trim();
    REQUIRE(resident_bytes().value() < before + prompt_bytes / 4);
    REQUIRE(pool.mapped_bytes() < prompt_bytes / 2);
    feed(cache, stream, chunk, 1);
    REQUIRE(cache.peak_bytes() > prompt_bytes);
}

TEST_CASE("a prompt that is cut chunk by chunk never needs the whole", "[property]") {
    const CacheShape shape{.layers = 8, .q_heads = 2, .kv_heads = 2, .head_dim = 256};
    const std::size_t chunk = 32, prompt = 512;
    const TokenStream stream(shape, chunk, 2);
    BlockPool pool({.block_rows = 16});
    KVCache cache(shape, KeyDiff{}, Budget{.tokens = 64}, pool);
    cache.begin_prompt(prompt);
    for (std::size_t done = 0; done < prompt; done += chunk) feed(cache, stream, 0, chunk);
    cache.end_prompt();
    const std::size_t row_bytes = 256 * 2 * sizeof(float) + 8;
    REQUIRE(pool.peak_bytes() <= 16 * (64 + chunk) * row_bytes * 11 / 10);
}

TEST_CASE("resident memory stays flat over ten thousand decode steps", "[property]") {
    if (!resident_bytes()) KVCULL_SKIP("this system does not tell how much memory is resident");
    const CacheShape shape{.layers = 2, .q_heads = 2, .kv_heads = 1, .head_dim = 16};
    const TokenStream stream(shape, 64, 3);
    const auto run = [&](auto policy, std::size_t slack) {
        CAPTURE(policy.name);
        BlockPool pool({.block_rows = 16});
        KVCache cache(shape, policy, Budget{.tokens = 48, .slack = slack}, pool);
        Outputs out(shape, 1);
        const auto decode = [&](std::size_t steps) {
            for (std::size_t i = 0; i < steps; ++i) {
                for (std::size_t layer = 0; layer < 2; ++layer) {
                    cache.append(layer, stream.k(layer, i % 64, 1), stream.v(layer, i % 64, 1));
                    cache.attend(layer, stream.q(layer, i % 64, 1), out.layer(layer));
                }
                cache.end_step();
                if (i % 50 == 0) {  // answers that are tried and taken back
                    const Mark mark = cache.mark();
                    feed(cache, stream, 0, 2);
                    cache.rollback(mark);
                    cache.release(mark);
                }
                if (i % 70 == 0) {
                    auto fork = cache.fork();
                    feed(fork, stream, 0, 2);
                }
            }
        };
        cache.begin_prompt(60);
        feed(cache, stream, 0, 60);
        cache.end_prompt();
        decode(500);
        const std::size_t before = resident_bytes().value(), bytes = cache.bytes(), blocks = pool.bytes();
        decode(10000);
        REQUIRE(resident_bytes().value() <= before + drift);
        REQUIRE(cache.bytes() <= bytes + 4096);
        REQUIRE(pool.bytes() <= blocks + 4096);
        REQUIRE(cache.seen() == 60 + 10500);
    };
    run(H2O{}, 0);
    run(H2O{}, 20);
    run(SnapKV{.window = 8, .decode_interval = 16}, 0);
}

TEST_CASE("caches on one pool run in parallel, forks of one prompt among them", "[threads]") {
    const CacheShape shape{.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 8};
    constexpr std::size_t workers = 4, rounds = 12;
    const TokenStream stream(shape, 80, 4);
    const auto run = [&](auto policy) {
        using Cache = KVCache<decltype(policy)>;
        CAPTURE(policy.name);
        BlockPool pool({.block_rows = 4});
        Cache prompt(shape, policy, Budget{.tokens = 12}, pool);
        prompt.begin_prompt(30);
        feed(prompt, stream, 0, 30);
        prompt.end_prompt();
        // One sequence: a fork of the prompt goes its own way, with marks and forks of its own.
        const auto work = [&](Cache& cache, std::size_t worker) {
            std::vector<float> outputs;
            const auto take = [&](std::vector<float> out) {
                outputs.insert(outputs.end(), out.begin(), out.end());
            };
            for (std::size_t round = 0; round < rounds; ++round) {
                const std::size_t first = 30 + (worker * 7 + round * 3) % 45;
                take(feed(cache, stream, first, 1 + worker % 3));
                const Mark mark = cache.mark();
                Cache fork = cache.fork();
                take(feed(cache, stream, first, 4));
                cache.rollback(mark);
                cache.release(mark);
                take(feed(fork, stream, first + 1, 2));
                Cache own(shape, policy, Budget{.tokens = 8}, pool);
                take(feed(own, stream, first, 5));
                if (round % 4 == 0) cache.make_room(2);
            }
            return outputs;
        };
        std::vector<Cache> caches, serial;
        for (std::size_t i = 0; i < workers; ++i) {
            caches.push_back(prompt.fork());
            serial.push_back(prompt.fork());
        }
        std::vector<std::vector<float>> results(workers);
        std::atomic<std::size_t> running{workers};
        {
            std::vector<std::thread> all;
            for (std::size_t i = 0; i < workers; ++i)
                all.emplace_back([&, i] {
                    results[i] = work(caches[i], i);
                    --running;
                });
            all.emplace_back([&] {
                while (running > 0) {
                    pool.trim();
                    std::this_thread::yield();
                }
            });
            for (std::thread& thread : all) thread.join();
        }
        for (std::size_t i = 0; i < workers; ++i) REQUIRE(same_bits(results[i], work(serial[i], i)));
        caches.clear();
        serial.clear();
        REQUIRE(prompt.bytes() == pool.bytes() + prompt.evictor().bytes());
    };
    run(H2O{});
    run(SnapKV{.window = 4, .kernel = 3, .decode_interval = 3});
    run(KeyDiff{});
}

TEST_CASE("threads that compete for a full pool get their blocks or a clean refusal", "[threads]") {
    const CacheShape shape{.layers = 1, .q_heads = 2, .kv_heads = 1, .head_dim = 8};
    constexpr std::size_t workers = 4, steps = 60;
    const TokenStream stream(shape, steps, 5);
    KVCache reference(shape, Streaming{.sinks = 2}, Budget{.tokens = 14});
    for (std::size_t token = 0; token < steps; ++token) feed(reference, stream, token, 1);
    BlockPool pool({.block_rows = 4});
    pool.set_limit(10 * (64 + 2 * 4 * 8 * 4 + 64));  // ten blocks for four sequences that want four each
    std::atomic<std::size_t> refused{0};
    std::vector<std::vector<position_t>> held(workers);
    std::vector<std::thread> all;
    for (std::size_t i = 0; i < workers; ++i)
        all.emplace_back([&, i] {
            for (bool done = false; !done;) {
                KVCache cache(shape, Streaming{.sinks = 2}, Budget{.tokens = 14}, pool);
                try {
                    for (std::size_t token = 0; token < steps; ++token) feed(cache, stream, token, 1);
                    held[i] = cache.positions(0, 0);
                    done = true;
                } catch (const error::capacity_error&) {
                    ++refused;  // gives all back and begins again
                    std::this_thread::yield();
                }
            }
        });
    for (std::thread& thread : all) thread.join();
    for (const auto& positions : held) REQUIRE(positions == reference.positions(0, 0));
    REQUIRE(pool.bytes() == 0);
    REQUIRE(pool.peak_bytes() <= pool.limit());
}
