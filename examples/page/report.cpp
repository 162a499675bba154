#include "report.hpp"

#include <algorithm>
#include <iomanip>
#include <nlohmann/json.hpp>
#include <ostream>
#include <set>

#include "../common/gnuplot.hpp"
#include "../common/write_file.hpp"

namespace page {

namespace {

double per_step(const Outcome& run, std::size_t steps) {
    return static_cast<double>(run.misses) / static_cast<double>(steps);
}

}  // namespace

void print_table(std::ostream& out, std::span<const Outcome> runs, std::size_t steps) {
    std::size_t longest = 6;
    for (const Outcome& run : runs) longest = std::max(longest, run.policy.size());
    const int name = static_cast<int>(longest);
    out << std::left << std::setw(name) << "policy" << std::right << "   slots     misses  / OPT"
        << (steps > 0 ? "  / step" : "") << "     guards     ns\n";
    for (const Outcome& run : runs) {
        out << std::left << std::setw(name) << run.policy << std::right << std::setw(8) << run.slots
            << std::setw(11) << run.misses << std::fixed << std::setprecision(3) << std::setw(7)
            << run.ratio();
        if (steps > 0) out << std::setprecision(2) << std::setw(8) << per_step(run, steps);
        out << std::setw(11) << run.guards << std::setprecision(1) << std::setw(7) << run.ns << '\n';
    }
}

void write_json(const std::filesystem::path& file, const nlohmann::ordered_json& trace,
                std::span<const Outcome> runs, std::size_t steps) {
    nlohmann::ordered_json whole{{"trace", trace}, {"runs", nlohmann::ordered_json::array()}};
    for (const Outcome& run : runs) {
        whole["runs"].push_back({{"policy", run.policy},
                                 {"slots", run.slots},
                                 {"misses", run.misses},
                                 {"opt_misses", run.opt_misses},
                                 {"misses_over_opt", run.ratio()},
                                 {"guards", run.guards},
                                 {"ns_per_request", run.ns}});
        if (steps > 0) whole["runs"].back()["misses_per_step"] = per_step(run, steps);
    }
    examples::write_file(file, whole.dump(1) + '\n');
}

void write_svg(const std::filesystem::path& file, std::span<const Outcome> runs, std::size_t steps) {
    std::vector<examples::Line> lines;
    std::set<std::size_t> sizes;
    for (const Outcome& run : runs) {
        auto line = std::find_if(lines.begin(), lines.end(),
                                 [&](const examples::Line& known) { return known.name == run.policy; });
        if (line == lines.end()) line = lines.insert(line, {run.policy, {}});
        line->points.push_back(
            {static_cast<double>(run.slots), {steps > 0 ? per_step(run, steps) : run.ratio(), run.ns}});
        sizes.insert(run.slots);
    }
    for (examples::Line& line : lines)
        std::sort(line.points.begin(), line.points.end(),
                  [](const auto& a, const auto& b) { return a.x < b.x; });
    std::string tics;
    for (const std::size_t slots : sizes) tics += (tics.empty() ? "" : ", ") + std::to_string(slots);
    const examples::Panel misses = steps > 0 ? examples::Panel{"misses per step", "set yrange [0:*]"}
                                             : examples::Panel{"misses / OPT", "set yrange [1:*]"};
    examples::draw_panels(file, "slots", tics, lines, {{misses, {"ns per request", "set yrange [0:*]"}}});
}

}  // namespace page
