#pragma once
/// Documents in the language of the tiny world (model/README.md), to train on.

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tiny_llama {

/// Words of the language that have a meaning of their own.
namespace word {
enum : int { begin_text = 1, stop, ask, think, end_think, wait, so };
}

/// A document of `length` tokens: facts among filler, thoughts that restate facts, or runs about one topic,
/// and questions until the end. The same seed gives the same document everywhere.
[[nodiscard]] std::vector<int> world_document(std::uint64_t seed, std::size_t length);

}  // namespace tiny_llama
