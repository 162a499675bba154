#pragma once
/// Documents in the language of the tiny world (model/README.md): to train on, and tasks to be measured by.

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "tasks.hpp"

namespace tiny_llama {

/// Tokens of the language: ids below it.
inline constexpr std::size_t world_vocabulary = 448;

/// Words of the language that have a meaning of their own.
namespace word {
enum : int { begin_text = 1, stop, ask, think, end_think, wait, so };
}

/// A document of `length` tokens: facts among filler, thoughts that restate facts, or runs about one topic,
/// and questions until the end. The same seed gives the same document everywhere.
[[nodiscard]] std::vector<int> world_document(std::uint64_t seed, std::size_t length);

/// Whether what follows a token can be recalled: it is the name in a question or in a thought.
/// @returns [tokens.size()], not 0 for those tokens
[[nodiscard]] std::vector<std::uint8_t> recalls(std::span<const int> tokens);

/// What `world_task` makes.
inline constexpr std::array<std::string_view, 4> world_tasks{"asked", "needle", "thoughts", "topics"};
/// Cases of a task as model/make/make_tasks.py makes them, on documents that `world_document` never makes.
/// The same seed gives the same cases everywhere. @throws kvcull::error::config_error that lists the tasks
[[nodiscard]] Task world_task(std::string_view name, std::uint64_t seed, std::size_t cases);

}  // namespace tiny_llama
