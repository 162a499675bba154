/// kvcull-record: the queries, keys and values of a run of the model, as a trace for kvcull-replay.

#include <CLI/CLI.hpp>
#include <charconv>
#include <iostream>
#include <sstream>
#include <string>
#include <system_error>
#include <vector>

#include "../common/program.hpp"
#include "recorder.hpp"

namespace {

using namespace tiny_llama;

struct Options {
    std::string trace, model = TINY_LLAMA_MODEL_DIR, task, dtype = "f16";
    std::size_t number = 0;
    std::string prompt;
    Recording what;
};

void add_options(CLI::App& app, Options& options) {
    app.add_option("TRACE", options.trace, "Safetensors file to write: docs/traces.md has the layout")
        ->required();
    app.add_option("--model", options.model, "Folder of a Llama checkpoint")->check(CLI::ExistingDirectory);
    auto* text = app.add_option_group("text")->require_option(1);
    auto* task =
        text->add_option("--task", options.task, "A task file, or the name of a task in the model's folder");
    text->add_option("--prompt", options.prompt, "Token ids, by commas");
    app.add_option("--case", options.number, "Which case of the task, from 0")
        ->needs(task)
        ->check(CLI::Range(0, 1'000'000'000))
        ->capture_default_str();
    app.add_option(
           "--decode", options.what.decode,
           "Tokens after the prompt: first those of the case (its stream; its questions, answered by the "
           "model), then what the model says; 0: as many as the case has")
        ->check(CLI::Range(0, 1'000'000'000))
        ->capture_default_str();
    app.add_option("--layers", options.what.layers, "Layers to record, by commas (default: all)")
        ->check(CLI::Range(0, 1'000'000'000))
        ->delimiter(',');
    app.add_option("--dtype", options.dtype, "Type of the numbers in the file")
        ->check(CLI::IsMember({"f32", "f16", "bf16"}))
        ->capture_default_str();
}

std::vector<int> tokens_of(const std::string& text, std::size_t vocabulary) {
    std::vector<int> tokens;
    std::string part;
    for (std::istringstream parts(text + ","); std::getline(parts, part, ',');) {
        int token = -1;
        const char* const end = part.data() + part.size();
        const auto [stop, error] = std::from_chars(part.data(), end, token);
        if (error != std::errc() || stop != end || token < 0 || static_cast<std::size_t>(token) >= vocabulary)
            throw kvcull::error::config_error("--prompt: token " + std::to_string(tokens.size()) + " is '" +
                                              part + "', want 0 to " + std::to_string(vocabulary - 1));
        tokens.push_back(token);
    }
    return tokens;
}

Case case_of(const Options& options, const Llama& model) {
    const std::size_t vocabulary = model.config().vocabulary;
    if (options.task.empty()) return {.prompt = tokens_of(options.prompt, vocabulary)};
    const std::vector<std::string> where{options.task};
    const std::vector<Task> tasks = read_tasks(where, options.model, vocabulary);
    if (tasks.size() != 1)
        throw kvcull::error::config_error("--task names " + std::to_string(tasks.size()) +
                                          " tasks, want one: " + options.task);
    const Task& task = tasks.front();
    if (options.number >= task.cases.size())
        throw kvcull::error::config_error("--case is " + std::to_string(options.number) + ", want below " +
                                          std::to_string(task.cases.size()));
    return task.cases[options.number];
}

void run(Options options) {
    using kvcull::DType;
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
        if (options.dtype == name_of(dtype)) options.what.dtype = dtype;
    const Llama model(options.model);
    replay::Trace trace = record(model, case_of(options, model), options.what);
    trace.notes["source"] =
        options.task.empty() ? "--prompt" : options.task + " " + std::to_string(options.number);
    write_trace(options.trace, trace);
    std::cout << options.trace << ": " << describe(trace) << '\n';
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app("Records queries, keys and values of a trained Llama model", "kvcull-record");
    Options options;
    add_options(app, options);
    return examples::run_program(app, argc, argv, [&] { run(options); });
}
