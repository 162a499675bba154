#pragma once
/// The caches of the targets `saved` and `episodes` and of their seeds: small, so that a file is.

#include <array>
#include <cstddef>

#include "kvcull/cache/kv_cache.hpp"
#include "kvcull/policies.hpp"

namespace fuzz {

inline constexpr kvcull::CacheShape saved_shape{.layers = 1, .q_heads = 2, .kv_heads = 1, .head_dim = 2};
inline constexpr std::size_t saved_budget = 6;

template <class Visit>
void for_every_saved_policy(const Visit& visit) {
    visit(kvcull::Streaming{.sinks = 1});
    visit(kvcull::H2O{.recent = 2});
    visit(kvcull::Vatp{.sinks = 1, .window = 2});
    visit(kvcull::KeyNorm{.recent = 1});
    visit(kvcull::EpiCache{.sinks = 1});
    visit(kvcull::KeyDiff{.sinks = 1});
    visit(kvcull::SnapKV{.window = 3, .kernel = 3, .decode_interval = 4});
    visit(kvcull::RKV{.window = 3, .interval = 4, .kernel = 3});
    visit(kvcull::SkipKV<>{{.window = 3, .interval = 4, .kernel = 3}, {.delimiters = {2}}});
    visit(kvcull::OBCache{.kind = kvcull::OBCache::Score::joint, .recent = 2, .lagged = true});
    visit(kvcull::Caote<>{.base = {.base = kvcull::PerHeadAttention::Rows::h2o}});
    visit(kvcull::FastCaote<>{});
}

/// A token, always the same.
inline auto query() {
    static constexpr std::array<float, 4> q{1, 0.5F, -1, 2};
    return kvcull::head_major(q.data(), 2, 1, 2);
}
inline auto key() {
    static constexpr std::array<float, 2> k{0.5F, -1};
    return kvcull::head_major(k.data(), 1, 1, 2);
}
inline auto value() {
    static constexpr std::array<float, 2> v{2, 1};
    return kvcull::head_major(v.data(), 1, 1, 2);
}
template <class Cache>
void decode(Cache& cache, std::size_t tokens) {
    std::array<float, 4> out{};
    for (std::size_t token = 0; token < tokens; ++token) {
        cache.append(0, key(), value());
        cache.attend(0, query(), kvcull::head_major(out.data(), 2, 1, 2));
        cache.end_step();
    }
}

}  // namespace fuzz
