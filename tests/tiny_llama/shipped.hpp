#pragma once
/// The model that ships, read once per test program, and its tasks.

#include <filesystem>
#include <string>
#include <vector>

#include "llama.hpp"
#include "tasks.hpp"

namespace tiny_llama::test {

inline const std::filesystem::path model_folder = TINY_LLAMA_MODEL_DIR;

[[nodiscard]] inline const Llama& model() {
    static const Llama loaded(model_folder);
    return loaded;
}
/// @param where  a task's name, or a file
[[nodiscard]] inline Task task(const std::string& where) {
    const std::vector<std::string> one{where};
    return read_tasks(one, model_folder, model().config().vocabulary)[0];
}

}  // namespace tiny_llama::test
