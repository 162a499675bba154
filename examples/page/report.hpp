#pragma once
/// What kvcull-page shows: a table, JSON, a picture.

#include <cstddef>
#include <filesystem>
#include <iosfwd>
#include <nlohmann/json_fwd.hpp>
#include <span>

#include "replay.hpp"

namespace page {

/// @param steps  the requests are those of so many decode steps; 0: of none
void print_table(std::ostream& out, std::span<const Outcome> runs, std::size_t steps = 0);

/// `{"trace": .., "runs": [{"policy", "slots", ..}]}`, the keys as in README.md.
/// @throws std::runtime_error if the file cannot be written
void write_json(const std::filesystem::path& file, const nlohmann::ordered_json& trace,
                std::span<const Outcome> runs, std::size_t steps = 0);

/// Misses beside Belady's, or per step, and time per request, against slots; a line per policy, drawn by
/// gnuplot.
void write_svg(const std::filesystem::path& file, std::span<const Outcome> runs, std::size_t steps = 0);

}  // namespace page
