#pragma once
/// What the demo shows: a table, results.json and two pictures.

#include <filesystem>
#include <iosfwd>
#include <span>
#include <string>
#include <vector>

#include "episodes.hpp"
#include "evaluate.hpp"

namespace tiny_llama {

/// Per task: accuracy, kilobytes and speed of every policy at every budget; if the model thought, how much.
void print_table(std::ostream& out, std::span<const Row> rows);

/// What the caches answered, a line each, and how much of the questions' attention they keep.
void print_episodes(std::ostream& out, const std::string& task, const Setting& setting,
                    const EpisodeComparison& comparison);

/// `{"rows": [{"task", "policy", "budget", "accuracy", "questions", "kv_bytes", "peak_bytes",
/// "tokens_per_second"}]}`, and "thought_tokens", "second_thoughts" if the model thought; a budget below 1 is
/// a ratio of the prompt.
void write_json(const std::filesystem::path& file, std::span<const Row> rows);

/// Accuracy against budget, a line per policy and a panel per task, drawn by gnuplot.
/// @returns false if there is no gnuplot
[[nodiscard]] bool write_accuracy_svg(const std::filesystem::path& file, std::span<const Row> rows,
                                      std::span<const Task> tasks);

/// The tokens that the KV heads still hold after prompt and stream of each task's first case: a panel per
/// task, a row per policy, at `budget`. `vocabulary`: the model's, which tells whether kinds are known.
void write_kept_svg(const std::filesystem::path& file, std::span<const Row> rows, std::span<const Task> tasks,
                    const kvcull::Budget& budget, std::size_t vocabulary);

}  // namespace tiny_llama
