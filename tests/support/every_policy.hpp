#pragma once
/// The shipped policies with parameters that make a short sequence evict, and ways to compare what they did.

#include <cstddef>
#include <functional>
#include <thread>
#include <vector>

#include "kvcull/cache/kv_cache.hpp"
#include "kvcull/policies.hpp"
#include "support/foreign.hpp"
#include "support/live.hpp"
#include "support/reference.hpp"
#include "support/self_gated.hpp"

namespace kvcull::test {

/// Calls `visit(policy)` for each of them; with budgets of 8 rows and more all of them are legal.
template <class Visit>
void for_every_policy(Visit&& visit) {
    visit(Full{});
    visit(Streaming{.sinks = 2});
    visit(Random{.seed = 7});
    visit(H2O{});
    visit(H2O{.recent = 2, .sinks = 1, .by_queries = true, .kernel = 3, .pool = Pool::avg});
    visit(Tova{});
    visit(Tova{.share = Tova::Share::kv_head, .protect_newest = true});
    visit(KeyDiff{.sinks = 1});
    visit(KeyNorm{.recent = 2});
    visit(Vatp{.sinks = 2, .window = 3});
    visit(SnapKV{.window = 4, .kernel = 3, .decode_interval = 3});
    visit(SnapKV{.window = 3, .kernel = 3, .decode_interval = 4});
    visit(RKV{.window = 4, .interval = 3, .kernel = 3});
    visit(SkipKV<>{{.window = 3, .interval = 3}, {.delimiters = {2}}});
    visit(OBCache{.recent = 3});
    visit(OBCache{.kind = OBCache::Score::joint, .base = OBCache::Base::snapkv, .recent = 3, .lagged = true});
    visit(OBCache{.kind = OBCache::Score::value, .base = OBCache::Base::tova, .recent = 3});
    visit(Caote{});
    visit(Caote<>{.fast = true});
    visit(Caote<>{.base = {.base = PerHeadAttention::Rows::h2o}, .fast = true});
    visit(Caote<H2O>{.base = {.recent = 2}});
    visit(SelfGated{});
}

/// One thread per index.
inline Executor threads() {
    return [](std::size_t count, const std::function<void(std::size_t)>& body) {
        std::vector<std::thread> all;
        for (std::size_t i = 0; i < count; ++i) all.emplace_back([&body, i] { body(i); });
        for (std::thread& thread : all) thread.join();
    };
}

}  // namespace kvcull::test
