#pragma once
/// What kvcull-replay shows: a table, JSON, the tokens kept, two pictures.

#include <filesystem>
#include <iosfwd>
#include <span>
#include <string>

#include "replay.hpp"

namespace replay {

void print_table(std::ostream& out, std::span<const Outcome> runs);

/// `{"trace": {..}, "runs": [{"policy", "budget", ..}]}`, the keys as in README.md.
void write_json(const std::filesystem::path& file, const std::string& name, const Trace& trace,
                std::span<const Outcome> runs);

/// `seen`, `positions` and per run `runs.<i>.until`, as docs/traces.md describes.
void write_kept(const std::filesystem::path& file, const Trace& trace, std::span<const Outcome> runs);

/// Mean error and mass against budget, a line per policy, drawn by gnuplot.
void write_error_svg(const std::filesystem::path& file, const Trace& trace, std::span<const Outcome> runs);

/// The positions kept over time at `budget`: a line of panels per policy, a panel per KV head (six at most,
/// evenly spread), drawn by gnuplot.
void write_kept_svg(const std::filesystem::path& file, const Trace& trace, std::span<const Outcome> runs,
                    const kvcull::Budget& budget);

}  // namespace replay
