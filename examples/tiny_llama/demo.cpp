/// kvcull-demo: what policies and budgets do to a trained model.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <iostream>
#include <thread>

#include "../common/budget_text.hpp"
#include "../common/named_policies.hpp"
#include "report.hpp"

namespace {

using namespace tiny_llama;

struct Options {
    std::string model = TINY_LLAMA_MODEL_DIR, rule, json, out = ".";
    std::vector<std::string> tasks;
    std::vector<std::string> policies = examples::NamedPolicies::names();
    std::vector<std::string> budgets{"384", "192", "96", "48"};
    std::size_t chunk = 0, cases = 24, threads = std::max(1U, std::thread::hardware_concurrency());
};

void add_options(CLI::App& app, Options& options) {
    app.add_option("--model", options.model, "Folder of a Llama checkpoint")->check(CLI::ExistingDirectory);
    app.add_option(
        "--tasks", options.tasks,
        "Task files, folders of task files, or names of tasks in the model's folder (default: all there)");
    app.add_option("--policy", options.policies, "NAME or NAME:key=value,...; repeatable (default: all)")
        ->allow_extra_args(false);
    app.add_option("--budget", options.budgets,
                   "Tokens per KV head, or below 1 the ratio of the prompt; several by commas")
        ->delimiter(',')
        ->capture_default_str();
    app.add_option("--rule", options.rule,
                   "How layers and heads divide the budget: NAME or NAME:key=value,... (default: evenly)");
    app.add_option("--chunk", options.chunk, "Prompt tokens per call; 0: the whole prompt at once")
        ->check(CLI::Range(0, 1'000'000'000))
        ->capture_default_str();
    app.add_option("--cases", options.cases, "The first so many cases of every task")
        ->check(CLI::Range(1, 1'000'000))
        ->capture_default_str();
    app.add_option("--threads", options.threads, "Cases that run at a time")
        ->check(CLI::Range(1, 1'000'000))
        ->capture_default_str();
    app.add_option("--json", options.json, "Where the numbers go (default: results.json in --out)");
    app.add_option("--out", options.out, "Folder of the pictures")->capture_default_str();
}

/// Nothing runs before all of it is known to be legal.
void check_all(const Llama& model, const std::vector<Setting>& settings, const std::vector<Task>& tasks,
               std::size_t cases) {
    for (const Setting& setting : settings)
        for (const Task& task : tasks) {
            try {
                for (std::size_t i = 0; i < std::min(cases, task.cases.size()); ++i)
                    check(model, setting, task.cases[i].prompt.size());
            } catch (const kvcull::error::config_error& e) {
                throw std::runtime_error("policy " + setting.policy + ", budget " +
                                         examples::text_of(setting.budget) +
                                         (setting.rule.empty() ? "" : ", rule " + setting.rule) + ", task " +
                                         task.name + ": " + e.what());
            }
        }
}

std::vector<Row> run_all(const Llama& model, const std::vector<Setting>& settings,
                         const std::vector<Task>& tasks, const Options& options) {
    std::vector<Row> rows;
    const std::size_t total = settings.size() * tasks.size();
    for (const Task& task : tasks)
        for (const Setting& setting : settings) {
            // a budget means nothing to `full`: what it gave once holds for all
            const auto same = std::find_if(rows.begin(), rows.end(), [&](const Row& row) {
                return setting.policy == "full" && row.setting.policy == "full" && row.task == task.name;
            });
            Row row = same != rows.end()
                          ? *same
                          : run_task(model, setting, task, options.cases, options.chunk, options.threads);
            row.setting = setting;
            rows.push_back(std::move(row));
            std::fprintf(stderr, "[%3zu/%zu] %-9s %-10s %5s  %.3f\n", rows.size(), total, task.name.c_str(),
                         setting.policy.c_str(), examples::text_of(setting.budget).c_str(),
                         rows.back().accuracy);
        }
    return rows;
}

int run(const Options& options) {
    std::vector<Setting> settings;
    std::vector<kvcull::Budget> budgets;
    for (const std::string& budget : options.budgets)
        budgets.push_back(examples::parse_budget("--budget", budget));
    for (const std::string& policy : options.policies)
        for (const kvcull::Budget& budget : budgets) settings.push_back({policy, budget, options.rule});

    const Llama model(options.model);
    const std::vector<Task> tasks = read_tasks(options.tasks, options.model, model.config().vocabulary);
    check_all(model, settings, tasks, options.cases);
    const std::filesystem::path out = options.out;
    const std::filesystem::path json =
        options.json.empty() ? out / "results.json" : std::filesystem::path(options.json);
    std::filesystem::create_directories(out);
    if (json.has_parent_path()) std::filesystem::create_directories(json.parent_path());

    const std::vector<Row> rows = run_all(model, settings, tasks, options);
    if (!options.rule.empty()) std::cout << "rule: " << options.rule << "\n\n";
    print_table(std::cout, rows);
    write_json(json, rows);
    std::cout << "\nnumbers:  " << json.string() << '\n';
    if (write_accuracy_svg(out / "accuracy.svg", rows, tasks))
        std::cout << "pictures: " << (out / "accuracy.svg").string() << '\n';
    else
        std::cout << "pictures: no gnuplot, so no accuracy.svg\n";
    // the second smallest budget shows the most: the smallest keeps next to nothing
    std::sort(budgets.begin(), budgets.end(), [&](const kvcull::Budget& a, const kvcull::Budget& b) {
        const std::size_t prompt = tasks[0].cases[0].prompt.size();
        return budget_tokens(a, prompt) < budget_tokens(b, prompt);
    });
    write_kept_svg(out / "kept.svg", rows, tasks, budgets[budgets.size() > 1 ? 1 : 0]);
    std::cout << "          " << (out / "kept.svg").string() << '\n';
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app("Accuracy, bytes and time of a trained Llama model under KV-cache eviction", "kvcull-demo");
    Options options;
    add_options(app, options);
    try {
        app.parse(argc, argv);
        return run(options);
    } catch (const CLI::Error& e) {
        return app.exit(e);
    } catch (const std::exception& e) {
        std::cerr << "kvcull-demo: " << e.what() << '\n';
        return 1;
    }
}
