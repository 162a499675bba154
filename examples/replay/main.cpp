/// kvcull-replay: any policy over a recorded trace of q, k and v.

#include <CLI/CLI.hpp>
#include <iostream>
#include <optional>

#include "../common/budget_text.hpp"
#include "../common/gnuplot.hpp"
#include "../common/program.hpp"
#include "report.hpp"

namespace {

namespace fs = std::filesystem;

struct Options : examples::Comparison {
    std::string trace, json, kept, out, dtype;

    Options() { budgets = {"192", "96", "48"}; }
};

constexpr const char* measures =
    "What is measured, over the rows decoded after the prompt, one per token, layer and query head:\n"
    "  output error  |o - f| / |f|: o is the row's attention output from the policy's cache, f that from a\n"
    "                cache that keeps everything; both read the recorded q, k and v, so errors do not add "
    "up\n"
    "  mass kept     share of the row's attention weights over the full cache that lies on tokens which the\n"
    "                policy's cache holds when the row attends\n"
    "  rows held     per KV head, after the last step (mean over heads); the most that one head had while\n"
    "                attending, in the prompt too\n"
    "  KB held       allocated for rows and the policy's state, after the last step; the most ever\n"
    "  us per step   append, attend and end_step of all layers: median over the tokens, policy and full "
    "cache";

void add_options(CLI::App& app, Options& options) {
    app.add_option("TRACE", options.trace, "A trace: docs/traces.md has the layout, kvcull-record writes one")
        ->required();
    examples::add_options(app, options);
    std::vector<std::string> types;
    for (const kvcull::DType type : kvcull::all_dtypes) types.emplace_back(name_of(type));
    app.add_option("--dtype", options.dtype, "How the policy's cache stores rows; default: as the trace")
        ->check(CLI::IsMember(types));
    app.add_option("--json", options.json, "File for the numbers");
    app.add_option("--kept", options.kept, "Safetensors file for the tokens kept, per layer, head and step");
    app.add_option("--out", options.out, "Folder for the pictures error.svg and kept.svg");
    app.footer(measures);
}

/// Nothing runs before all of it is known to be legal.
std::vector<replay::Setting> settings_of(const Options& options, const replay::Trace& trace) {
    std::optional<kvcull::DType> rows;
    for (const kvcull::DType type : kvcull::all_dtypes)
        if (name_of(type) == options.dtype) rows = type;
    std::vector<replay::Setting> settings;
    for (const std::string& policy : options.policies)
        for (const std::string& budget : options.budgets) {
            settings.push_back({policy, examples::parse_budget("--budget", budget), options.rule, rows});
            try {
                check(trace, settings.back());
            } catch (const kvcull::error::config_error& e) {
                throw std::runtime_error("--policy " + policy + " --budget " + budget +
                                         (options.rule.empty() ? "" : " --rule " + options.rule) + ": " +
                                         e.what());
            }
        }
    return settings;
}

void make_folder_of(const std::string& file) {
    if (const fs::path folder = fs::path(file).parent_path(); !folder.empty()) fs::create_directories(folder);
}

void draw(const fs::path& folder, const replay::Trace& trace, const std::vector<replay::Outcome>& runs) {
    if (!examples::have_gnuplot()) {
        std::cout << "pictures: none without gnuplot\n";
        return;
    }
    write_error_svg(folder / "error.svg", trace, runs);
    std::vector<kvcull::Budget> budgets;
    for (const replay::Outcome& run : runs)
        if (run.setting.policy == runs.front().setting.policy) budgets.push_back(run.setting.budget);
    write_kept_svg(folder / "kept.svg", trace, runs, examples::telling_budget(budgets, trace.prompt));
    std::cout << "pictures: " << (folder / "error.svg").string() << ' ' << (folder / "kept.svg").string()
              << '\n';
}

void run(const Options& options) {
    const replay::Trace trace = replay::read_trace(options.trace);
    const std::vector<replay::Setting> settings = settings_of(options, trace);
    for (const std::string& file : {options.json, options.kept}) make_folder_of(file);
    if (!options.out.empty()) fs::create_directories(options.out);

    std::cout << options.trace << ": " << describe(trace) << "\n\n";
    std::vector<replay::Outcome> runs;
    for (const replay::Setting& setting : settings)
        runs.push_back(replay::run(trace, setting, options.chunk));
    if (!options.dtype.empty()) std::cout << "rows: " << options.dtype << "\n\n";
    if (!options.rule.empty()) std::cout << "rule: " << options.rule << "\n\n";
    print_table(std::cout, runs);
    if (!options.json.empty()) write_json(options.json, options.trace, trace, runs);
    if (!options.kept.empty()) write_kept(options.kept, trace, runs);
    if (!options.out.empty()) draw(options.out, trace, runs);
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app("Error, attention kept, bytes and time of KV-cache eviction over a recorded trace",
                 "kvcull-replay");
    Options options;
    add_options(app, options);
    return examples::run_program(app, argc, argv, [&] { run(options); });
}
