#pragma once
/// The policies that are measured. A new one is a line here.

#include "kvcull/policies.hpp"

namespace kvcull::bench {

/// The most rows that a policy is measured with.
template <class P>
inline constexpr std::size_t most_rows = 32768;
template <>
inline constexpr std::size_t most_rows<RKV> = 4096;  // at first it compares every key with every other

/// Calls `visit(policy)` for one value of each.
template <class Visit>
void for_each_policy(const Visit& visit) {
    visit(Full{});
    visit(Streaming{});
    visit(Random{});
    visit(H2O{});
    visit(Tova{});
    visit(Vatp{});
    visit(OBCache{});
    visit(Caote<>{});
    visit(FastCaote<>{});
    visit(KeyDiff{});
    visit(KeyNorm{});
    visit(TrimKV{});
    visit(RKV{});
    visit(SnapKV{.decode_interval = 128});  // else it lets a decoding cache grow
}

}  // namespace kvcull::bench
