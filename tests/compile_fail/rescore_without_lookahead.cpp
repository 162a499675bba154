// expect: policy.rescore(state, step, q, out)
#include "kvcull/cache/kv_cache.hpp"
#include "kvcull/policies.hpp"

void decide(kvcull::KVCache<kvcull::H2O>& cache, std::span<const kvcull::HeadsView<const float>> q) {
    cache.rescore(q);  // H2O has no scores for query rows that come later
}
