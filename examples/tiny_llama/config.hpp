#pragma once
/// What a Hugging Face `config.json` says about a Llama model.

#include <cstddef>
#include <filesystem>
#include <kvcull/attention/rope.hpp>

namespace tiny_llama {

/// Only what this example computes: a setting that would change the numbers and is not here is refused by
/// name.
struct Config {
    std::size_t layers = 0, hidden = 0, intermediate = 0, q_heads = 0, kv_heads = 0, head_dim = 0,
                vocabulary = 0;
    float rms_norm_eps = 0;
    kvcull::Rope rope;
    bool tied_head = false;  ///< the embedding is the output matrix too
};

/// Absent keys take the defaults of transformers' LlamaConfig.
/// @throws kvcull::error::format_error that names the key, its value and what is wanted
[[nodiscard]] Config read_config(const std::filesystem::path& file);

}  // namespace tiny_llama
