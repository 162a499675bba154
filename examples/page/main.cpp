/// kvcull-page: page caches over a trace of requests.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "../common/gnuplot.hpp"
#include "../common/program.hpp"
#include "attention.hpp"
#include "report.hpp"

namespace {

namespace fs = std::filesystem;

struct Options : page::Options {
    std::string trace, json, out;
    std::vector<std::string> generate;
    page::Paging paging;
    bool sized = false;
};

std::string listed(const std::vector<std::string>& names) {
    std::string list;
    for (const std::string& name : names) list += (list.empty() ? "" : ", ") + name;
    return list;
}

void add_options(CLI::App& app, Options& options) {
    auto* source = app.add_option_group("requests")->require_option(1);
    source
        ->add_option("TRACE", options.trace,
                     "Text with one 64-bit id per line, FILE.safetensors with a tensor `pages`, or attention "
                     "recorded by kvcull-record")
        ->check(CLI::ExistingFile);
    source
        ->add_option("--generate", options.generate,
                     "zipf, loop or uniform, as in zipf:pages=4096,requests=100000,exponent=1,seed=0; "
                     "repeatable: a table each, all in one picture")
        ->allow_extra_args(false);
    app.add_option(
           "--slots", options.slots,
           "Sizes of the fast tier, in pages; default for recorded attention: an eighth, a quarter and "
           "half of all pages")
        ->each([&](const std::string&) { options.sized = true; })
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
    app.add_option("--seed", options.seed, "Of the random victims and the noise")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    app.add_option("--noise", options.noise, "The values `noisy` are up to so many requests too late")
        ->check(CLI::Range(0, 1'000'000'000))
        ->capture_default_str();
    app.add_option("--repeats", options.repeats, "Replays per line; the fastest one's time counts")
        ->check(CLI::Range(1, 1000))
        ->capture_default_str();
    app.add_option("--page-tokens", options.paging.page_tokens, "Recorded attention: tokens per page")
        ->check(CLI::Range(1, 1'000'000))
        ->capture_default_str();
    app.add_option("--read", options.paging.read,
                   "Recorded attention: pages that a step reads per layer and KV head, by Quest's bound")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    app.add_option("--json", options.json, "File for the numbers");
    app.add_option("--out", options.out, "Folder for the picture page.svg");
    app.footer(
        "misses  requests for pages that were not there, the first of each included\n"
        "/ OPT   the same beside Belady's rule, which knows the future: 1 is the best there is\n"
        "/ step  misses per decode step, of recorded attention\n"
        "guards  wrong evictions that Guard made up for\n"
        "ns      per request, of the replay alone: values are computed beforehand");
}

/// All pages there are, not only those that a step chose, for this is what fast memory is compared with.
std::size_t count_pages(const replay::Trace& trace, const page::Paging& paging) {
    const std::size_t per_head = (trace.size() + paging.page_tokens - 1) / paging.page_tokens;
    return per_head * trace.layers.size() * trace.shape.kv_heads;
}

page::Requests read(Options& options, std::ostream& about) {
    if (!page::holds_attention(options.trace)) return {page::read_trace(options.trace)};
    const replay::Trace trace = replay::read_trace(options.trace);
    page::Requests requests = page::requests_of(trace, options.paging);
    const std::size_t all = count_pages(trace, options.paging);
    if (!options.sized) {
        options.slots.clear();
        for (const std::size_t share : {8U, 4U, 2U})
            options.slots.push_back(std::max<std::size_t>(all / share, 1));
    }
    about << describe(trace) << '\n'
          << all << " pages of " << options.paging.page_tokens << " tokens; " << requests.steps << " steps, ";
    return requests;
}

/// Replays the requests, prints their table and writes their numbers.
std::vector<page::Outcome> show(const std::string& source, const page::Requests& requests,
                                const Options& options, const std::string& about) {
    const std::size_t distinct = page::count_distinct(requests.pages);
    std::cout << source << ": " << about << requests.pages.size() << " requests of " << distinct
              << " pages\n\n";
    std::vector<page::Outcome> runs = page::replay(requests.pages, options);
    print_table(std::cout, runs, requests.steps);
    if (!options.json.empty()) {
        nlohmann::ordered_json trace{{"source", source},
                                     {"requests", requests.pages.size()},
                                     {"pages", distinct},
                                     {"seed", options.seed}};
        if (requests.steps > 0) trace["steps"] = requests.steps;
        write_json(options.json, trace, runs, requests.steps);
    }
    if (options.generate.size() > 1)
        for (page::Outcome& run : runs) run.policy += ", " + std::to_string(distinct) + " pages";
    return runs;
}

void run(Options options) {
    if (options.generate.size() > 1 && !options.json.empty())
        throw kvcull::error::config_error("--json takes the numbers of one trace");
    if (const fs::path folder = fs::path(options.json).parent_path(); !folder.empty())
        fs::create_directories(folder);
    if (!options.out.empty()) fs::create_directories(options.out);

    std::vector<page::Outcome> runs;
    page::Requests requests;
    if (options.trace.empty()) {
        for (const std::string& source : options.generate) {
            requests.pages = page::make_trace(source);
            const auto more = show(source, requests, options, {});
            runs.insert(runs.end(), more.begin(), more.end());
        }
    } else {
        std::ostringstream about;
        requests = read(options, about);
        runs = show(options.trace, requests, options, about.str());
    }
    if (options.out.empty()) return;
    const fs::path picture = fs::path(options.out) / "page.svg";
    if (examples::have_gnuplot()) {
        write_svg(picture, runs, requests.steps);
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
