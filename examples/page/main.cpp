/// kvcull-page: page caches over a trace of requests.

#include <CLI/CLI.hpp>
#include <iostream>
#include <nlohmann/json.hpp>

#include "../common/gnuplot.hpp"
#include "../common/program.hpp"
#include "report.hpp"

namespace {

namespace fs = std::filesystem;

struct Options : page::Options {
    std::string trace, generate, json, out;
};

std::string listed(const std::vector<std::string>& names) {
    std::string list;
    for (const std::string& name : names) list += (list.empty() ? "" : ", ") + name;
    return list;
}

void add_options(CLI::App& app, Options& options) {
    auto* source = app.add_option_group("requests")->require_option(1);
    source->add_option("TRACE", options.trace,
                       "Text with one 64-bit id per line, or FILE.safetensors with a tensor `pages`");
    source->add_option("--generate", options.generate,
                       "zipf, loop or uniform, as in zipf:pages=4096,requests=100000,exponent=1,seed=0");
    app.add_option("--slots", options.slots, "Sizes of the fast tier, in pages")
        ->delimiter(',')
        ->check(CLI::Range(1, 1'000'000'000))
        ->capture_default_str();
    app.add_option("--policy", options.policies, "Of " + listed(page::policy_names()))
        ->delimiter(',')
        ->capture_default_str();
    app.add_option("--values", options.values,
                   "What blind, lmarker, predictive_marker, combine and guard are told: of " +
                       listed(page::value_names()))
        ->delimiter(',')
        ->capture_default_str();
    app.add_option("--seed", options.seed, "Of the random victims and the noise")->capture_default_str();
    app.add_option("--noise", options.noise, "The values `noisy` are up to so many requests too late")
        ->check(CLI::Range(0, 1'000'000'000))
        ->capture_default_str();
    app.add_option("--repeats", options.repeats, "Replays per line; the fastest one's time counts")
        ->check(CLI::Range(1, 1000))
        ->capture_default_str();
    app.add_option("--json", options.json, "File for the numbers");
    app.add_option("--out", options.out, "Folder for the picture page.svg");
    app.footer(
        "misses  requests for pages that were not there, the first of each included\n"
        "/ OPT   the same beside Belady's rule, which knows the future: 1 is the best there is\n"
        "guards  wrong evictions that Guard made up for\n"
        "ns      per request, of the replay alone: values are computed beforehand");
}

void run(const Options& options) {
    if (const fs::path folder = fs::path(options.json).parent_path(); !folder.empty())
        fs::create_directories(folder);
    if (!options.out.empty()) fs::create_directories(options.out);

    const bool made = options.trace.empty();
    const page::Pages pages = made ? page::make_trace(options.generate) : page::read_trace(options.trace);
    const std::string& source = made ? options.generate : options.trace;
    const std::size_t distinct = page::count_distinct(pages);
    std::cout << source << ": " << pages.size() << " requests of " << distinct << " pages\n\n";
    const std::vector<page::Outcome> runs = page::replay(pages, options);
    print_table(std::cout, runs);
    if (!options.json.empty())
        write_json(
            options.json,
            {{"source", source}, {"requests", pages.size()}, {"pages", distinct}, {"seed", options.seed}},
            runs);
    if (options.out.empty()) return;
    const fs::path picture = fs::path(options.out) / "page.svg";
    if (examples::have_gnuplot()) {
        write_svg(picture, runs);
        std::cout << "picture: " << picture.string() << '\n';
    } else {
        std::cout << "picture: none without gnuplot\n";
    }
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app(
        "Misses and time of page caches over a trace of requests: Guard and what it is compared with",
        "kvcull-page");
    Options options;
    add_options(app, options);
    return examples::run_program(app, argc, argv, [&] { run(options); });
}
