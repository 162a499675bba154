#pragma once
/// The policies that are measured at every size. A new one is a line here. An eviction of R-KV, which
/// compares keys with each other, has cases of its own in bench_redundancy.cpp.

#include "kvcull/policies.hpp"

namespace kvcull::bench {

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
    visit(SnapKV{.decode_interval = 128});  // else it lets a decoding cache grow
}

}  // namespace kvcull::bench
