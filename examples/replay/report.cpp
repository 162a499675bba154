#include "report.hpp"

#include <algorithm>
#include <iomanip>
#include <kvcull/base/safetensors.hpp>
#include <map>
#include <nlohmann/json.hpp>
#include <ostream>
#include <sstream>

#include "../common/budget_text.hpp"
#include "../common/gnuplot.hpp"
#include "../common/write_file.hpp"

namespace replay {
namespace {

using examples::quoted;
using examples::text_of;

std::vector<std::string> policies_of(std::span<const Outcome> runs) {
    std::vector<std::string> names;
    for (const Outcome& run : runs)
        if (std::find(names.begin(), names.end(), run.setting.policy) == names.end())
            names.push_back(run.setting.policy);
    return names;
}

}  // namespace

void print_table(std::ostream& out, std::span<const Outcome> runs) {
    std::size_t longest = 6;
    for (const Outcome& run : runs) longest = std::max(longest, run.setting.policy.size());
    const int name = static_cast<int>(longest);
    out << std::left << std::setw(name) << "" << std::right << "           output error     mass kept"
        << "       rows held         KB held      us per step\n"
        << std::left << std::setw(name) << "policy" << std::right << "  budget   mean   worst   mean  least"
        << "     end    peak     end    peak  policy    full\n";
    for (const Outcome& run : runs) {
        const auto cell = [&](int width, int digits, double value) {
            out << ' ' << std::fixed << std::setprecision(digits) << std::setw(width) << value;
        };
        out << std::left << std::setw(name) << run.setting.policy << std::right << ' ' << std::setw(7)
            << text_of(run.setting.budget);
        cell(6, 3, run.mean_error);
        cell(7, 3, run.worst_error);
        cell(6, 3, run.mean_mass);
        cell(6, 3, run.least_mass);
        cell(7, 1, run.rows);
        cell(7, 0, static_cast<double>(run.peak_rows));
        cell(7, 0, static_cast<double>(run.bytes) / 1e3);
        cell(7, 0, static_cast<double>(run.peak_bytes) / 1e3);
        cell(7, 0, run.seconds * 1e6);
        cell(7, 0, run.full_seconds * 1e6);
        out << '\n';
    }
}

void write_json(const std::filesystem::path& file, const std::string& name, const Trace& trace,
                std::span<const Outcome> runs) {
    const kvcull::CacheShape& shape = trace.shape;
    nlohmann::ordered_json whole;
    whole["trace"] = {{"file", name},
                      {"tokens", trace.size()},
                      {"prompt_tokens", trace.prompt},
                      {"layers", shape.layers},
                      {"q_heads", shape.q_heads},
                      {"kv_heads", shape.kv_heads},
                      {"head_dim", shape.head_dim},
                      {"value_dim", shape.values()},
                      {"dtype", name_of(shape.dtype)}};
    whole["runs"] = nlohmann::ordered_json::array();
    for (const Outcome& run : runs) {
        nlohmann::ordered_json item{{"policy", run.setting.policy}};
        if (run.setting.budget.tokens > 0)
            item["budget"] = run.setting.budget.tokens;
        else
            item["budget"] = run.setting.budget.ratio;
        if (!run.setting.rule.empty()) item["rule"] = run.setting.rule;
        if (run.setting.rows) item["rows_dtype"] = name_of(*run.setting.rows);
        item.update({{"mean_error", run.mean_error},
                     {"worst_error", run.worst_error},
                     {"mean_mass", run.mean_mass},
                     {"least_mass", run.least_mass},
                     {"rows", run.rows},
                     {"peak_rows", run.peak_rows},
                     {"bytes", run.bytes},
                     {"peak_bytes", run.peak_bytes},
                     {"full_bytes", run.full_bytes},
                     {"us_per_step", run.seconds * 1e6},
                     {"full_us_per_step", run.full_seconds * 1e6}});
        whole["runs"].push_back(std::move(item));
    }
    examples::write_file(file, whole.dump(1) + '\n');
}

void write_kept(const std::filesystem::path& file, const Trace& trace, std::span<const Outcome> runs) {
    using kvcull::Tensor;
    const std::vector<std::int64_t>& seen = runs.front().seen;
    std::vector<Tensor> tensors{Tensor::of<std::int64_t>("seen", {seen.size()}, seen),
                                Tensor::of<std::int64_t>("positions", {trace.size()}, trace.positions)};
    kvcull::SafeTensors::Metadata metadata;
    for (std::size_t i = 0; i < runs.size(); ++i) {
        const std::string name = "runs." + std::to_string(i) + ".";
        tensors.push_back(Tensor::of<std::int64_t>(
            name + "until", {trace.shape.layers, trace.shape.kv_heads, trace.size()}, runs[i].until));
        metadata[name + "policy"] = runs[i].setting.policy;
        metadata[name + "budget"] = text_of(runs[i].setting.budget);
    }
    kvcull::SafeTensors::write(file.string(), metadata, tensors);
}

void write_error_svg(const std::filesystem::path& file, const Trace& trace, std::span<const Outcome> runs) {
    std::vector<examples::Line> lines;
    std::map<std::size_t, std::string> budgets;  // by their tokens
    for (const std::string& policy : policies_of(runs)) {
        examples::Line& line = lines.emplace_back(examples::Line{policy, {}});
        for (const Outcome& run : runs)
            if (run.setting.policy == policy) {
                const std::size_t tokens = budget_tokens(run.setting.budget, trace.prompt);
                budgets[tokens] = text_of(run.setting.budget);
                line.points.push_back({static_cast<double>(tokens), {run.mean_error, run.mean_mass}});
            }
        std::sort(line.points.begin(), line.points.end(),
                  [](const auto& a, const auto& b) { return a.x < b.x; });
    }
    std::string tics;
    for (const auto& [tokens, text] : budgets)
        tics += (tics.empty() ? "" : ", ") + quoted(text) + ' ' + std::to_string(tokens);
    examples::draw_panels(file, "budget per KV head", tics, lines,
                          {{{"error of the output, mean", "set yrange [0:*]"},
                            {"attention mass kept, mean", "set yrange [0:1.03]"}}});
}

void write_kept_svg(const std::filesystem::path& file, const Trace& trace, std::span<const Outcome> runs,
                    const kvcull::Budget& budget) {
    std::vector<const Outcome*> shown;
    for (const Outcome& run : runs)
        if (text_of(run.setting.budget) == text_of(budget)) shown.push_back(&run);
    const std::size_t heads = trace.shape.heads(), columns = std::min<std::size_t>(heads, 6);
    const auto lines = static_cast<double>(shown.size()), size = static_cast<double>(trace.size());
    const double width = 75 + 190 * static_cast<double>(columns), height = 122 + 185 * lines;
    double tic = 1;  // 1, 2, 5, 10, ..: at most four on an axis
    for (int i = 0; size > 4 * tic; ++i) tic *= i % 3 == 1 ? 2.5 : 2;

    std::ostringstream plot;
    plot << "set multiplot layout " << shown.size() << ',' << columns << " margins screen " << 60 / width
         << ',' << 1 - 15 / width << ',' << 62 / height << ',' << 1 - 60 / height << " spacing screen "
         << 20 / width << ',' << 30 / height << "\nset label 1 'Tokens kept at a budget of "
         << text_of(budget) << " per KV head' at screen 0.5,screen " << 1 - 18 / height
         << " center font ',15'\n"
         << "set label 2 'tokens seen' at screen 0.5,screen " << 14 / height << " center\n"
         << "set label 3 'position' at screen " << 14 / width << ",screen 0.5 center rotate\n"
         << "set xrange [0:" << size << "]\nset yrange [0:" << size << "]\nset xtics " << tic
         << " format ''\nset ytics " << tic << "\nset tics nomirror out scale 0.5 textcolor rgb '#404040'\n"
         << "set border 3 lc rgb '#808080'\nset key off\n"
         << "set arrow from " << trace.prompt << ",graph 0 to " << trace.prompt
         << ",graph 1 nohead dt 2 lc rgb '#b0b0b0'\n";
    for (std::size_t line = 0; line < shown.size(); ++line)
        for (std::size_t column = 0; column < columns; ++column) {
            const Outcome& run = *shown[line];
            const std::size_t head = column * heads / columns;
            plot << "$kept << EOD\n0 0 0 0\n";  // gnuplot wants a point where nothing was kept
            for (std::size_t t = 0; t < trace.size(); ++t) {
                const std::int64_t until = run.until[head * trace.size() + t];
                const auto step =
                    std::upper_bound(run.seen.begin(), run.seen.end(), static_cast<std::int64_t>(t));
                const std::int64_t from = step == run.seen.begin() ? 0 : *(step - 1);
                if (until > from)
                    plot << from << ' ' << static_cast<double>(t) + 0.5 << ' ' << until - from << " 0\n";
            }
            plot << "EOD\nset title "
                 << quoted(run.setting.policy + ", layer " + std::to_string(head / trace.shape.kv_heads) +
                           " head " + std::to_string(head % trace.shape.kv_heads))
                 << " noenhanced font ',11' offset 0,-0.7\nset format y '" << (column == 0 ? "%g" : "")
                 << "'\nset format x '" << (line + 1 == shown.size() ? "%g" : "")
                 << "'\nplot $kept with vectors nohead lw " << std::max(0.5, 150 / size) << " lc rgb '"
                 << examples::color_of(run.setting.policy, line)
                 << "'\nunset label 1\nunset label 2\nunset label 3\n";
        }
    plot << "unset multiplot\n";
    examples::draw_svg(file, width, height, plot.str());
}

}  // namespace replay
