#pragma once
/// Records what a model's layers give to their cache, as a trace for kvcull-replay.

#include <cstddef>
#include <kvcull/base/types.hpp>
#include <vector>

#include "../replay/trace.hpp"
#include "llama.hpp"
#include "tasks.hpp"

namespace tiny_llama {

/// What to keep of a run.
struct Recording {
    std::vector<std::size_t> layers = {};  ///< of the model, in the trace's order; empty: all
    std::size_t decode = 0;                ///< tokens after the prompt; 0: as many as the case has
    kvcull::DType dtype = kvcull::DType::f16;
};

/// Runs a case without eviction: its prompt in one call; then, token by token, its stream, every question
/// with the model's own answer and, while that is fewer than `decode`, what the model says next.
/// @throws kvcull::error::config_error for a layer that the model lacks, and if there is nothing to decode
[[nodiscard]] replay::Trace record(const Llama& model, const Case& example, const Recording& what);

}  // namespace tiny_llama
