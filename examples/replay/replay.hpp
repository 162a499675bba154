#pragma once
/// Runs a policy over a trace, beside a cache that keeps everything, and measures what the policy costs.

#include <cstddef>
#include <cstdint>
#include <kvcull/select/budget.hpp>
#include <optional>
#include <string>
#include <vector>

#include "trace.hpp"

namespace replay {

/// A policy by name, `snapkv` or `snapkv:window=16`, and what it may keep.
struct Setting {
    std::string policy = {};
    kvcull::Budget budget = {};
    std::string rule =
        {};  ///< how layers and heads divide the budget: `pyramid`, `ada:skip=1`; empty: evenly
    std::optional<kvcull::DType> rows = {};  ///< how the policy's cache stores rows; nothing: as the trace
};

/// What a policy did to a trace. The four measures go over all rows decoded after the prompt: one per token,
/// layer and query head. The prompt's own rows only fill the caches.
struct Outcome {
    Setting setting = {};
    /// |o - f| / |f|, with o the row's attention output from the policy's cache and f that from the full one:
    /// 0 if they are equal, 1 if only f is zero.
    double mean_error = 0, worst_error = 0;
    /// Share of the row's attention weights over the full cache that lies on tokens which the policy's cache
    /// holds when the row attends, its own among them: 1 if nothing that matters is gone.
    double mean_mass = 0, least_mass = 0;

    double rows = 0;            ///< per KV head after the last step, mean
    std::size_t peak_rows = 0;  ///< the most that one KV head has held while attending, in the prompt too
    std::size_t bytes = 0, peak_bytes = 0, full_bytes = 0;  ///< allocated after the last step; the most ever
    double seconds = 0, full_seconds = 0;                   ///< per decoded token, all layers; median

    std::vector<std::int64_t> seen = {};  ///< [steps] tokens after each step; a step is a call of the cache
    /// [layers, kv_heads, tokens]: how many tokens had been seen after the last step that left this one in
    /// the cache; 0 if its own step evicted it. Nothing comes back, so this says what was kept at any time.
    std::vector<std::int64_t> until = {};
};

/// Whether `setting` is legal for this trace. Nothing is computed.
/// @throws kvcull::error::config_error that says what exists or what is wanted
void check(const Trace& trace, const Setting& setting);

/// @param chunk  tokens of a prompt call; 0: the whole prompt at once
[[nodiscard]] Outcome run(const Trace& trace, const Setting& setting, std::size_t chunk = 0);

}  // namespace replay
