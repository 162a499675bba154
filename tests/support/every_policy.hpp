#pragma once
/// The shipped policies with parameters that make a short sequence evict, and ways to compare what they did.

#include <cstddef>
#include <functional>
#include <thread>
#include <vector>

#include "kvcull/cache/kv_cache.hpp"
#include "kvcull/policies.hpp"
#include "support/foreign.hpp"
#include "support/reference.hpp"

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
    visit(OBCache{.recent = 3});
    visit(OBCache{.kind = OBCache::Score::joint, .base = OBCache::Base::snapkv, .recent = 3, .lagged = true});
    visit(Caote{});
    visit(Caote<>{.base = {.base = PerHeadAttention::Rows::h2o}, .fast = true});
    visit(Caote<H2O>{.base = {.recent = 2}});
}

/// Bits of the arrays of a policy's state, in the order in which it lists them.
template <class State>
std::vector<float> state_values(const State& state) {
    std::vector<float> all;
    detail::for_each_array(const_cast<State&>(state), [&](const auto& array) {
        for (const auto x : array.values()) all.push_back(static_cast<float>(x));
    });
    return all;
}

/// The two sequences are in the same place: counters, sizes and states.
template <class P>
bool same_live(const Live<P>& a, const Live<P>& b) {
    const auto ranges = [](const std::vector<PositionRange>& pinned) {
        std::vector<position_t> all;
        for (const PositionRange& range : pinned) all.insert(all.end(), {range.begin, range.end});
        return all;
    };
    for (std::size_t i = 0; i < a.states.size(); ++i)
        if (!same_bits(state_values(a.states[i]), state_values(b.states[i]))) return false;
    return a.rows == b.rows && a.sizes == b.sizes && a.since == b.since && a.admitted == b.admitted &&
           a.stepped == b.stepped && a.decided == b.decided && ranges(a.pinned) == ranges(b.pinned) &&
           a.seen == b.seen && a.call_tokens == b.call_tokens && a.prompt_end == b.prompt_end &&
           a.next_position == b.next_position && a.call_next == b.call_next && a.phase == b.phase &&
           a.resolved == b.resolved && a.hold == b.hold;
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
