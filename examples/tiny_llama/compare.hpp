#pragma once
/// Policies on documents that no training saw: means and spreads over seeds.

#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <span>
#include <string>
#include <vector>

#include "evaluate.hpp"

namespace tiny_llama {

/// A task at a budget.
struct HeldBackRow {
    std::string task = {};
    std::size_t rows = 0;                            ///< per KV head; of the first seed's documents
    std::vector<std::vector<double>> accuracy = {};  ///< [policies][seeds]
};

struct HeldBackOptions {
    std::size_t cases = 24, threads = 1;
    /// Rows per KV head, as shares of the tokens of prompt and stream.
    std::vector<double> shares = {1.0 / 8, 1.0 / 4, 1.0 / 2};
};

/// Runs every task on the documents of `seed`, and adds what each policy got right to `rows`: empty at first,
/// then as the last seed left them. The policies of a later seed may differ in their parameters.
void run_held_back(const Llama& model, const HeldBackOptions& options, std::uint64_t seed,
                   std::span<const std::string> policies, std::vector<HeldBackRow>& rows);

/// Mean and standard deviation over the seeds, as Markdown.
void print_held_back(std::ostream& out, std::span<const std::string> policies,
                     std::span<const HeldBackRow> rows);

}  // namespace tiny_llama
