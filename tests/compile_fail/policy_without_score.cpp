// expect: policy.score(now, step, out)
#include "kvcull/cache/kv_cache.hpp"

struct NoScore {
    static constexpr const char* name = "no_score";
    using State = kvcull::NoState;
    static constexpr auto fields() { return std::tuple{}; }
    static constexpr kvcull::Needs needs(kvcull::Phase) { return {}; }
    static void observe(State&, const kvcull::HeadStep&) {}
};

kvcull::KVCache<NoScore>* cache;
