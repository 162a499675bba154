#include "kinds.hpp"

namespace kvcull::test {

std::span<const Kind> known_kinds() {
    static constexpr Kind kinds[] = {
        {"baselines", "scores", baselines::check_scores},
        {"baselines", "h2o", baselines::check_h2o},
        {"baselines", "tova", baselines::check_tova},
        {"baselines", "streaming_reposition", baselines::check_streaming},
        {"snapkv", "evict", snapkv::check_evict},
        {"snapkv", "decode", snapkv::check_decode},
        {"budgets", "pyramid", budgets::check_pyramid},
        {"budgets", "ada", budgets::check_ada},
        {"budgets", "critical", budgets::check_critical},
        {"caote", "weights", caote::check_weights},
        {"caote", "scores", caote::check_scores},
        {"caote", "greedy", caote::check_greedy},
        {"caote", "decode", caote::check_decode},
        {"epicache", "score", epicache::check_score},
        {"epicache", "prefill", epicache::check_prefill},
        {"epicache", "budget", epicache::check_budget},
        {"epicache", "cluster", epicache::check_cluster},
        {"epicache", "route", epicache::check_route},
        {"guard", "deterministic", guard::check_deterministic},
        {"guard", "guard", guard::check_guard},
        {"guard", "random", guard::check_random},
        {"guard", "predictors", guard::check_predictors},
        {"guard", "tier", guard::check_tier},
        {"guard", "misses", guard::check_misses},
        {"guard", "ids", guard::check_ids},
        {"laq", "stage2", laq::check_stage2},
        {"laq", "run", laq::check_run},
        {"obcache", "scores", obcache::check_scores},
        {"obcache", "decode", obcache::check_decode},
        {"rkv", "eviction", rkv::check_eviction},
        {"rkv", "trace", rkv::check_trace},
        {"skipkv", "eviction", skipkv::check_eviction},
        {"skipkv", "trace", skipkv::check_trace},
        {"skipkv", "steering", skipkv::check_steering},
        {"skipkv", "batch", skipkv::check_batch},
        {"trimkv", "gate", trimkv::check_gate},
        {"trimkv", "attention", trimkv::check_attention},
        {"trimkv", "capacity", trimkv::check_capacity},
        {"trimkv", "losses", trimkv::check_losses},
        {"trimkv", "decode", trimkv::check_decode},
        {"trimkv", "global", trimkv::check_global},
        {"trimkv", "block", trimkv::check_block},
        {"trimkv", "train", trimkv::check_train},
        {"trimkv", "checkpoint", trimkv::check_checkpoint},
        {"tiny_llama", "logits"},
    };
    return kinds;
}

}  // namespace kvcull::test
