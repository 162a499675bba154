/// kvcull-foresee: how much of the attention that comes after a prompt lies on what a policy kept of it.

#include <CLI/CLI.hpp>
#include <cmath>
#include <iomanip>
#include <iostream>
#include <string>
#include <vector>

#include "../common/program.hpp"
#include "later.hpp"
#include "reader.hpp"
#include "tasks.hpp"

namespace {

using namespace tiny_llama;

struct Options {
    std::string model = TINY_LLAMA_MODEL_DIR;
    std::vector<std::string> tasks{"needle", "topics"}, policies{"snapkv", "laq++", "laq"};
    std::vector<std::size_t> budgets{48, 96};
    std::size_t cases = 1000, tokens = 16;
};

/// Mean and its standard error.
struct Mean {
    double sum = 0, squares = 0, count = 0;

    void add(double x) {
        sum += x;
        squares += x * x;
        ++count;
    }
    friend std::ostream& operator<<(std::ostream& out, const Mean& m) {
        if (m.count < 2) return out << '-';
        const double mean = m.sum / m.count;
        return out << std::fixed << std::setprecision(3) << mean << " +- "
                   << std::sqrt((m.squares / m.count - mean * mean) / (m.count - 1));
    }
};

void run(const Options& options) {
    const Llama model(options.model);
    const std::size_t settings = options.policies.size() * options.budgets.size();
    std::vector<Mean> goes_on(settings), asked(settings);
    for (const Task& task : read_tasks(options.tasks, options.model, model.config().vocabulary))
        for (std::size_t c = 0; c < std::min(options.cases, task.cases.size()); ++c)
            for (std::size_t quarters = 2; quarters <= 4; ++quarters) {
                const Case& one = task.cases[c];
                const std::span<const int> prompt =
                    std::span(one.prompt).first(one.prompt.size() * quarters / 4);
                if (prompt.empty()) continue;
                kvcull::KVCache full(shape_of(model), kvcull::Full{});
                Reader reader{model};
                full.begin_prompt(prompt.size());
                reader.read(prompt, full);
                full.end_prompt();
                const auto mark = full.mark();
                Later model_goes_on(full, prompt.size()), user_asks(full, prompt.size());
                for (std::size_t i = 0; i < options.tokens; ++i) {
                    const int token = argmax(reader.logits);
                    reader.read({&token, 1}, model_goes_on);
                }
                for (const Question& question : one.questions) {
                    full.rollback(mark);
                    std::vector<int> text = question.ask;
                    text.insert(text.end(), question.answer.begin(), question.answer.end());
                    reader.read(text, user_asks);
                }
                for (std::size_t s = 0; s < settings; ++s)
                    examples::NamedPolicies::with(
                        options.policies[s / options.budgets.size()], [&](auto policy) {
                            Reader again{model};
                            after_prompt(
                                again, prompt, 0,
                                kvcull::KVCache(
                                    shape_of(model), std::move(policy),
                                    kvcull::Budget{.tokens = options.budgets[s % options.budgets.size()]}),
                                [&](auto& kept, std::size_t) {
                                    goes_on[s].add(model_goes_on.share(kept));
                                    asked[s].add(user_asks.share(kept));
                                });
                        });
            }
    std::cout << "share of the attention to the prompt that lies on what is kept, mean +- standard error of "
              << goes_on[0].count << " prompts\n"
              << std::left << std::setw(24) << "policy" << std::setw(8) << "budget" << std::setw(20)
              << "the model goes on"
              << "the user asks\n";
    for (std::size_t s = 0; s < settings; ++s)
        std::cout << std::setw(24) << options.policies[s / options.budgets.size()] << std::setw(8)
                  << options.budgets[s % options.budgets.size()] << goes_on[s] << "      " << asked[s]
                  << '\n';
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app("Attention after a prompt that lies on what a policy kept of it", "kvcull-foresee");
    Options options;
    app.add_option("--model", options.model, "Folder of a Llama checkpoint")->check(CLI::ExistingDirectory);
    app.add_option("--tasks", options.tasks, "Task files, or names of tasks in the model's folder")
        ->capture_default_str();
    app.add_option("--policy", options.policies, "NAME or NAME:key=value,...; repeatable")
        ->allow_extra_args(false)
        ->capture_default_str();
    app.add_option("--budget", options.budgets, "Tokens per KV head; several by commas")
        ->delimiter(',')
        ->check(CLI::Range(1, 1'000'000'000))
        ->capture_default_str();
    app.add_option("--cases", options.cases,
                   "The first so many cases of every task, by half, three quarters "
                   "and all of their prompts")
        ->check(CLI::Range(1, 1'000'000))
        ->capture_default_str();
    app.add_option("--tokens", options.tokens, "Greedy tokens after a prompt")
        ->check(CLI::Range(1, 1'000'000))
        ->capture_default_str();
    return examples::run_program(app, argc, argv, [&] { run(options); });
}
