// expect: policy.rescore(state, step, q, out)
#include "kvcull/cache/lookahead.hpp"
#include "kvcull/policies.hpp"

kvcull::LookaheadCache<kvcull::SnapKV>* cache;  // SnapKV does not score by query rows that come later
