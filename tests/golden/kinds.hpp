#pragma once
/// The layouts of golden files that this project knows, by `method` and `kind` of a file's metadata.

#include <span>
#include <string_view>

#include "support/golden.hpp"

namespace kvcull::test {

struct Kind {
    std::string_view method, kind;
    /// Compares all outputs of a file; nullptr: the method is still to come.
    void (*check)(GoldenFile& file) = nullptr;
};
[[nodiscard]] std::span<const Kind> known_kinds();

// One file per method. What they throw counts as a failed check.
namespace baselines {
void check_scores(GoldenFile& file);
void check_h2o(GoldenFile& file);
void check_tova(GoldenFile& file);
void check_streaming(GoldenFile& file);
}  // namespace baselines
namespace budgets {
void check_pyramid(GoldenFile& file);
void check_ada(GoldenFile& file);
void check_critical(GoldenFile& file);
}  // namespace budgets
namespace caote {
void check_weights(GoldenFile& file);
void check_scores(GoldenFile& file);
void check_greedy(GoldenFile& file);
void check_decode(GoldenFile& file);
}  // namespace caote
namespace epicache {
void check_score(GoldenFile& file);
void check_prefill(GoldenFile& file);
void check_budget(GoldenFile& file);
void check_cluster(GoldenFile& file);
void check_route(GoldenFile& file);
}  // namespace epicache
namespace guard {
void check_deterministic(GoldenFile& file);
void check_guard(GoldenFile& file);
void check_random(GoldenFile& file);
void check_predictors(GoldenFile& file);
void check_tier(GoldenFile& file);
void check_misses(GoldenFile& file);
void check_ids(GoldenFile& file);
}  // namespace guard
namespace laq {
void check_stage2(GoldenFile& file);
void check_run(GoldenFile& file);
}  // namespace laq
namespace obcache {
void check_scores(GoldenFile& file);
void check_decode(GoldenFile& file);
}  // namespace obcache
namespace rkv {
void check_eviction(GoldenFile& file);
void check_trace(GoldenFile& file);
}  // namespace rkv
namespace skipkv {
void check_eviction(GoldenFile& file);
void check_trace(GoldenFile& file);
void check_steering(GoldenFile& file);
void check_batch(GoldenFile& file);
}  // namespace skipkv
namespace snapkv {
void check_evict(GoldenFile& file);
void check_decode(GoldenFile& file);
}  // namespace snapkv
namespace trimkv {
void check_gate(GoldenFile& file);
void check_attention(GoldenFile& file);
void check_capacity(GoldenFile& file);
void check_losses(GoldenFile& file);
void check_decode(GoldenFile& file);
void check_global(GoldenFile& file);
void check_block(GoldenFile& file);
void check_train(GoldenFile& file);
void check_checkpoint(GoldenFile& file);
}  // namespace trimkv

}  // namespace kvcull::test
