#pragma once
/// Task files: prompts with questions, as model/README.md describes them.

#include <cstddef>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace tiny_llama {

struct Question {
    std::vector<int> ask = {}, answer = {};
    std::optional<int> topic = {};      ///< the token that names what it is about
    std::vector<float> embedding = {};  ///< what an encoder makes of it; empty: the file has none
};
/// A stretch of prompt and stream, tokens begin .. end - 1, about one thing.
struct TextSegment {
    std::size_t begin = 0, end = 0;
    std::vector<float> embedding = {};
};
/// The model reads `prompt` at once, then `stream` token by token; every question starts from that state.
struct Case {
    std::vector<int> prompt = {}, stream = {};
    std::vector<Question> questions = {};
    std::vector<TextSegment> segments = {};  ///< empty: the file does not say

    [[nodiscard]] std::size_t size() const noexcept { return prompt.size() + stream.size(); }
};
struct Task {
    std::string name = {};
    std::vector<Case> cases = {};
};

/// @param where       each a task file, a folder (the JSON files in it that have a `task` key), or the name
/// of a
///                    task in `home`; empty: `home`
/// @param vocabulary  token ids lie below
/// @throws kvcull::error::format_error for a malformed file, and for a task that is not there: it lists those
///         that are
[[nodiscard]] std::vector<Task> read_tasks(std::span<const std::string> where,
                                           const std::filesystem::path& home, std::size_t vocabulary);

/// What a token of the tiny world is part of (ids and sentences: model/README.md); `other` in a model of
/// another vocabulary.
enum class Kind { asked_fact, fact, filler, thought, other };

/// The kind of every token of prompt and stream. A fact is `asked` if a question of the case asks for it.
[[nodiscard]] std::vector<Kind> kinds(const Case& example, std::size_t vocabulary);

}  // namespace tiny_llama
