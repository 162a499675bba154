#pragma once
/// Whether two sequences are in the same place.

#include <cstddef>
#include <vector>

#include "kvcull/cache/live.hpp"
#include "support/reference.hpp"

namespace kvcull::test {

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
    return a.rows == b.rows && a.sizes == b.sizes && a.layer_sizes == b.layer_sizes && a.since == b.since &&
           a.admitted == b.admitted && a.stepped == b.stepped && a.decided == b.decided &&
           ranges(a.pinned) == ranges(b.pinned) && a.seen == b.seen && a.call_tokens == b.call_tokens &&
           a.prompt_end == b.prompt_end && a.reach == b.reach && a.call_reach == b.call_reach &&
           a.phase == b.phase && a.resolved == b.resolved && a.hold == b.hold;
}

}  // namespace kvcull::test
