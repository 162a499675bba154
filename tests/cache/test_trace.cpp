// Every row that leaves is told once, with the score that the decision saw.

#include "kvcull/cache/trace.hpp"

#include <algorithm>
#include <cstddef>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "kvcull/cache/kv_cache.hpp"
#include "kvcull/policies.hpp"
#include "support/catch.hpp"
#include "support/engine.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

using Head = std::pair<std::size_t, std::size_t>;

/// One ranking over a layer or the model.
template <Scope ranked>
struct Ranked : H2O {
    static constexpr Scope scope() { return ranked; }
};

/// What heads hold, by what they were given and what the trace says.
struct Ledger {
    std::map<Head, std::vector<position_t>> held;
    std::vector<Eviction> evictions;

    void append(const CacheShape& shape, position_t position) {
        for (std::size_t layer = 0; layer < shape.layers; ++layer)
            for (std::size_t h = 0; h < shape.kv_heads; ++h) held[{layer, h}].push_back(position);
    }
    EvictionTrace trace() {
        return [this](const Eviction& eviction) {
            evictions.push_back(eviction);
            auto& rows = held[{eviction.layer, eviction.head}];
            const auto found = std::find(rows.begin(), rows.end(), eviction.position);
            if (found == rows.end())
                ++strangers;
            else
                rows.erase(found);
        };
    }
    std::size_t strangers = 0;

    template <class Cache>
    void require_same(const Cache& cache) const {
        REQUIRE(strangers == 0);
        for (const auto& [head, rows] : held)
            REQUIRE(positions_of(cache.view(head.first, head.second)) == rows);
    }
};

}  // namespace

TEST_CASE("what was appended, less what the trace tells, is what every head holds", "[property]") {
    const CacheShape shape{.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 8};
    const Stream stream = random_stream(shape, 60, 3);
    const auto check = [&](const auto& policy) {
        for_each_driver(shape, policy, {.tokens = 12}, [&](auto& cache, const std::string& name) {
            INFO(policy.name << ", " << name);
            Ledger ledger;
            cache.set_trace(ledger.trace());
            cache.begin_prompt(30);
            for (std::size_t token = 0; token < 60; ++token) {
                ledger.append(shape, static_cast<position_t>(token));
                feed(cache, stream, token, 1);
                if (token == 29) cache.end_prompt();
                ledger.require_same(cache);
            }
            REQUIRE_FALSE(ledger.evictions.empty());
            cache.make_room(3);
            ledger.require_same(cache);
            cache.truncate(2);
            ledger.require_same(cache);
            REQUIRE(ledger.evictions.back().reason == Reason::truncated);
            REQUIRE(ledger.evictions.back().seen == 60);
        });
    };
    check(Streaming{});
    check(H2O{});
    check(Tova{});
    check(SnapKV{.window = 4});
    check(RKV{.window = 4, .interval = 7});
    check(KeyDiff{.recent = 4});
    check(Caote<>{.order = Caote<>::Order::greedy});
    check(Ranked<Scope::layer_pooled>{});
    check(Ranked<Scope::model_pooled>{});
}

TEST_CASE("the trace has the scores by which rows left", "[differential]") {
    const CacheShape shape{.layers = 1, .q_heads = 4, .kv_heads = 2, .head_dim = 8};
    const Stream stream = random_stream(shape, 30, 4);
    KVCache cache(shape, H2O{.recent = 2}, Budget{.tokens = 9, .slack = 100});
    feed(cache, stream, 0, 30);
    std::map<Head, std::map<position_t, float>> score;
    for (std::size_t h = 0; h < 2; ++h) {
        const std::vector<float> all = cache.scores(0, h);
        for (std::size_t j = 0; j < all.size(); ++j) score[{0, h}][cache.view(0, h).position[j]] = all[j];
    }
    std::vector<Eviction> told;
    cache.set_trace([&](const Eviction& eviction) { told.push_back(eviction); });
    cache.make_room(0);
    REQUIRE(told.size() == 2 * 21);
    for (const Eviction& one : told) {
        CHECK(one.score == score[{0, one.head}][one.position]);
        CHECK(one.seen == 30);
        CHECK(one.reason == Reason::ranked_out);
    }
}

TEST_CASE("the trace tells windows from ranks, and proposals and forks tell nothing", "[contract]") {
    CacheShape shape{.layers = 2, .q_heads = 2, .kv_heads = 1, .head_dim = 4};
    shape.traits = {{.window = 8}, {}};
    const Stream stream = random_stream(shape, 40, 5);
    KVCache cache(shape, H2O{}, Budget{.tokens = 10});
    std::size_t by_window = 0, by_rank = 0;
    cache.set_trace([&](const Eviction& one) {
        (one.reason == Reason::out_of_window ? by_window : by_rank) += 1;
        CHECK(one.layer == (one.reason == Reason::out_of_window ? 0U : 1U));
        CHECK((one.reason == Reason::ranked_out || is_nan(one.score)));
    });
    feed(cache, stream, 0, 30);
    CHECK(by_window == 30 - 7);
    CHECK(by_rank == 30 - 10);
    (void)cache.propose(5);
    KVCache fork = cache.fork();
    feed_decode(fork, stream, 30, 40);
    CHECK(by_window + by_rank == 43);
    feed(cache, stream, 30, 1);
    CHECK(by_rank == 21);
    cache.set_trace({});
    feed(cache, stream, 31, 1);
    CHECK(by_rank == 21);
}
