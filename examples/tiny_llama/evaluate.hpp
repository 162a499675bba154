#pragma once
/// Accuracy, bytes and time of a model under a policy and a budget.

#include <cstddef>
#include <kvcull/cache/blocks.hpp>
#include <kvcull/select/budget.hpp>
#include <span>
#include <string>
#include <vector>

#include "tasks.hpp"
#include "thoughts.hpp"

namespace tiny_llama {

/// A policy by name, `snapkv` or `snapkv:window=16,kernel=5`, and what it may keep. Any of them takes
/// `steer=FILE`: the model's thoughts are steered by a vector of kvcull-steer.
struct Setting {
    std::string policy = {};
    kvcull::Budget budget = {};
    std::string rule =
        {};  ///< how layers and heads divide the budget: `pyramid`, `ada:skip=1`; empty: evenly
};

/// What one case gave.
struct Outcome {
    std::size_t correct = 0, questions = 0;
    std::size_t tokens = 0;                               ///< processed, questions included
    std::size_t kv_bytes = 0, peak_bytes = 0;             ///< after prompt and stream; the most ever
    std::size_t thought_tokens = 0, second_thoughts = 0;  ///< that the model said by itself
    std::vector<float> kept =
        {};  ///< [prompt + stream or thoughts]: share of all KV heads that hold the token then
};

/// The means and sums of many cases.
struct Row {
    std::string task = {};
    Setting setting = {};
    double accuracy = 0;
    std::size_t questions = 0;
    double kv_bytes = 0;         ///< mean over the cases
    std::size_t peak_bytes = 0;  ///< the largest
    double tokens_per_second = 0;
    double thought_tokens = 0, second_thoughts = 0;  ///< means over the cases
    std::vector<float> kept = {};                    ///< of the first case
};

/// Whether `setting` is legal for a prompt of this model and this length. Nothing is computed.
/// @throws kvcull::error::config_error that says what exists or what is wanted
void check(const Llama& model, const Setting& setting, std::size_t prompt_tokens);

/// Reads prompt and stream under `setting`, then answers every question from the state after them, with
/// eviction on hold.
/// @param chunk  tokens of a prompt call; 0: the whole prompt at once
/// @param how    if the model thinks, what it says takes the place of the stream
[[nodiscard]] Outcome run_case(const Llama& model, const Setting& setting, const Case& example,
                               std::size_t chunk, kvcull::BlockPool& pool, const Thinking& how = {});

/// The first `cases` cases of a task, `threads` at a time, each with its own cache on one pool and its own
/// seed.
[[nodiscard]] Row run_task(const Llama& model, const Setting& setting, const Task& task, std::size_t cases,
                           std::size_t chunk, std::size_t threads, const Thinking& how = {});

}  // namespace tiny_llama
