#pragma once
/// What the command lines of the programs here have in common.

#include <CLI/CLI.hpp>
#include <cstddef>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include "named_policies.hpp"

namespace examples {

/// A number of `least .. most`: not NaN, as `CLI::Range` would have it.
[[nodiscard]] inline CLI::Validator number_of(double least, double most) {
    return CLI::Validator(
        [least, most](std::string& text) {
            double value = 0;
            const bool number = CLI::detail::lexical_cast(text, value);
            if (number && value >= least && value <= most) return std::string();
            return "is " + text + ", want " + std::to_string(least) + " to " + std::to_string(most);
        },
        "NUMBER");
}

/// What a program that compares policies is told about them.
struct Comparison {
    std::vector<std::string> policies = NamedPolicies::names();
    std::vector<std::string> budgets;
    std::string rule;
    std::size_t chunk = 0;
};

inline void add_options(CLI::App& app, Comparison& options) {
    app.add_option("--policy", options.policies,
                   "NAME or NAME:key=value,...; repeatable (default: all that need no file)")
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
}

/// Parses the command line and runs `body()`. @returns what `main` should
template <class Body>
int run_program(CLI::App& app, int argc, char** argv, Body&& body) {
    try {
        app.parse(argc, argv);
        body();
        return 0;
    } catch (const CLI::Error& e) {
        return app.exit(e);
    } catch (const std::exception& e) {
        std::cerr << app.get_name() << ": " << e.what() << '\n';
        return 1;
    }
}

}  // namespace examples
