#include "compare.hpp"

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <numeric>
#include <ostream>

#include "world.hpp"

namespace tiny_llama {
namespace {

/// Rows for a share of the mean document.
std::size_t rows_of(double share, const Task& task) {
    std::size_t tokens = 0;
    for (const Case& example : task.cases) tokens += example.size();
    return static_cast<std::size_t>(
        std::lround(share * static_cast<double>(tokens) / static_cast<double>(task.cases.size())));
}

}  // namespace

void run_held_back(const Llama& model, const HeldBackOptions& options, std::uint64_t seed,
                   std::span<const std::string> policies, std::vector<HeldBackRow>& rows) {
    std::size_t next = 0;
    for (const std::string_view name : world_tasks) {
        const Task task = world_task(name, seed, options.cases);
        for (const double share : options.shares) {
            const std::size_t budget = rows_of(share, task);
            if (next == rows.size())
                rows.push_back({task.name, budget, std::vector<std::vector<double>>(policies.size())});
            HeldBackRow& row = rows[next++];
            for (std::size_t i = 0; i < policies.size(); ++i)
                row.accuracy[i].push_back(run_task(model,
                                                   {.policy = policies[i], .budget = {.tokens = budget}},
                                                   task, options.cases, 0, options.threads)
                                              .accuracy);
        }
    }
}

void print_held_back(std::ostream& out, std::span<const std::string> policies,
                     std::span<const HeldBackRow> rows) {
    out << "| task | rows |";
    for (const std::string& policy : policies) out << " `" << policy << "` |";
    out << "\n| --- | --- |";
    for (std::size_t i = 0; i < policies.size(); ++i) out << " --- |";
    out << '\n' << std::fixed << std::setprecision(2);
    for (const HeldBackRow& row : rows) {
        out << "| `" << row.task << "` | " << row.rows << " |";
        for (const std::vector<double>& seeds : row.accuracy) {
            const auto count = static_cast<double>(seeds.size());
            const double mean = std::accumulate(seeds.begin(), seeds.end(), 0.0) / count;
            double squares = 0;
            for (const double x : seeds) squares += (x - mean) * (x - mean);
            out << ' ' << mean << " +- " << std::sqrt(squares / std::max(1.0, count - 1)) << " |";
        }
        out << '\n';
    }
}

}  // namespace tiny_llama
