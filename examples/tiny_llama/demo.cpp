/// kvcull-demo: what policies and budgets do to a trained model.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <iostream>
#include <thread>

#include "../common/budget_text.hpp"
#include "../common/program.hpp"
#include "report.hpp"

namespace {

using namespace tiny_llama;

struct Options : examples::Comparison {
    std::string model = TINY_LLAMA_MODEL_DIR, json, out = ".";
    std::vector<std::string> tasks;
    Thinking thinking;
    std::size_t cases = 24, threads = std::max(1U, std::thread::hardware_concurrency());

    Options() { budgets = {"384", "192", "96", "48"}; }
};

void add_options(CLI::App& app, Options& options) {
    app.add_option("--model", options.model, "Folder of a Llama checkpoint")->check(CLI::ExistingDirectory);
    app.add_option(
        "--tasks", options.tasks,
        "Task files, folders of task files, or names of tasks in the model's folder (default: all there)");
    examples::add_options(app, options);
    app.add_option("--cases", options.cases, "The first so many cases of every task")
        ->check(CLI::Range(1, 1'000'000))
        ->capture_default_str();
    app.add_option("--threads", options.threads, "Cases that run at a time")
        ->check(CLI::Range(1, 1'000'000))
        ->capture_default_str();
    app.add_option("--think", options.thinking.most,
                   "The model thinks by itself, so many tokens at most, instead of reading the tasks' "
                   "streams; 0: it does not")
        ->check(CLI::Range(0, 1'000'000))
        ->capture_default_str();
    app.add_option("--temperature", options.thinking.temperature,
                   "Of thoughts; 0: always the likeliest token")
        ->check(examples::number_of(0.0, 100.0))
        ->capture_default_str();
    app.add_option("--seed", options.thinking.seed, "Of thoughts")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    app.add_option("--json", options.json, "Where the numbers go (default: results.json in --out)");
    app.add_option("--out", options.out, "Folder of the pictures")->capture_default_str();
}

/// Nothing runs before all of it is known to be legal.
void check_all(const Llama& model, const std::vector<Setting>& settings, const std::vector<Task>& tasks,
               std::size_t cases, const Thinking& thinking) {
    if (thinking.most > 0 && model.config().vocabulary <= word::wait)
        throw std::runtime_error("--think: the vocabulary is " + std::to_string(model.config().vocabulary) +
                                 ", want the tiny world's words for thoughts, ids up to " +
                                 std::to_string(word::wait));
    for (const Setting& setting : settings) {
        if (thinking.most > 0 && episode_method(setting.policy))
            throw std::runtime_error("--think: " + setting.policy +
                                     " reads a conversation that is given, want 0");
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
}

/// Episodes are made of segments: where some method asks for them, tasks without are left out.
std::vector<Task> with_segments(std::vector<Task> tasks, const std::vector<Setting>& settings) {
    const auto needed = [](const Setting& setting) { return episode_method(setting.policy).has_value(); };
    if (std::none_of(settings.begin(), settings.end(), needed)) return tasks;
    std::erase_if(tasks, [](const Task& task) {
        const bool whole = std::all_of(task.cases.begin(), task.cases.end(), [](const Case& example) {
            return !example.segments.empty() && !example.questions.empty();
        });
        if (!whole) std::fprintf(stderr, "no segments, so not for epicache: %s\n", task.name.c_str());
        return !whole;
    });
    if (tasks.empty()) throw std::runtime_error("no task has segments, and epicache needs them");
    return tasks;
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
            Row row = same != rows.end() ? *same
                                         : run_task(model, setting, task, options.cases, options.chunk,
                                                    options.threads, options.thinking);
            row.setting = setting;
            rows.push_back(std::move(row));
            std::fprintf(stderr, "[%3zu/%zu] %-9s %-10s %5s  %.3f\n", rows.size(), total, task.name.c_str(),
                         setting.policy.c_str(), examples::text_of(setting.budget).c_str(),
                         rows.back().accuracy);
        }
    return rows;
}

void run(const Options& options) {
    std::vector<Setting> settings;
    std::vector<kvcull::Budget> budgets;
    for (const std::string& budget : options.budgets)
        budgets.push_back(examples::parse_budget("--budget", budget));
    for (const std::string& policy : options.policies)
        for (const kvcull::Budget& budget : budgets) settings.push_back({policy, budget, options.rule});

    const Llama model(options.model);
    const std::vector<Task> tasks =
        with_segments(read_tasks(options.tasks, options.model, model.config().vocabulary), settings);
    check_all(model, settings, tasks, options.cases, options.thinking);
    const std::filesystem::path out = options.out;
    const std::filesystem::path json =
        options.json.empty() ? out / "results.json" : std::filesystem::path(options.json);
    std::filesystem::create_directories(out);
    if (json.has_parent_path()) std::filesystem::create_directories(json.parent_path());

    const std::vector<Row> rows = run_all(model, settings, tasks, options);
    if (!options.rule.empty()) std::cout << "rule: " << options.rule << "\n\n";
    print_table(std::cout, rows);
    for (const Setting& setting : settings)
        if (const auto method = episode_method(setting.policy))
            for (const Task& task : tasks)
                print_episodes(
                    std::cout, task.name, setting,
                    compare_episodes(model, *method, setting, task, options.cases, options.threads));
    write_json(json, rows);
    std::cout << "\nnumbers:  " << json.string() << '\n';
    if (write_accuracy_svg(out / "accuracy.svg", rows, tasks))
        std::cout << "pictures: " << (out / "accuracy.svg").string() << '\n';
    else
        std::cout << "pictures: no gnuplot, so no accuracy.svg\n";
    if (options.thinking.most > 0) return;  // every policy has a text of its own
    write_kept_svg(out / "kept.svg", rows, tasks,
                   examples::telling_budget(budgets, tasks[0].cases[0].prompt.size()),
                   model.config().vocabulary);
    std::cout << "          " << (out / "kept.svg").string() << '\n';
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app("Accuracy, bytes and time of a trained Llama model under KV-cache eviction", "kvcull-demo");
    Options options;
    add_options(app, options);
    return examples::run_program(app, argc, argv, [&] { run(options); });
}
