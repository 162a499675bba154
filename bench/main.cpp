/// Runs all cases. The table goes to the terminal, the same as JSON to --benchmark_out.

#include <benchmark/benchmark.h>

#include <string>
#include <vector>

#include "groups.hpp"
#include "kvcull/base/config.hpp"
#include "kvcull/simd/kernels.hpp"

namespace {

/// Names say shape, instruction set and threads themselves; what the library would append to them is how the
/// time was taken, the same for all cases.
template <class Reporter>
class Plain : public Reporter {
  public:
    using Reporter::Reporter;
    void ReportRuns(const std::vector<benchmark::BenchmarkReporter::Run>& runs) override {
        std::vector<benchmark::BenchmarkReporter::Run> plain = runs;
        for (auto& run : plain) {
            run.run_name.time_type.clear();
            run.run_name.iterations.clear();
        }
        Reporter::ReportRuns(plain);
    }
};

}  // namespace

int main(int argc, char** argv) {
    using kvcull::simd::name_of;
    bool to_file = false;
    for (int i = 1; i < argc; ++i) to_file |= std::string(argv[i]).starts_with("--benchmark_out=");
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
    std::string isas;
    for (const kvcull::simd::Isa isa : kvcull::simd::all_isas)
        if (kvcull::simd::available(isa)) isas.append(isas.empty() ? "" : " ").append(name_of(isa));
    benchmark::AddCustomContext("instruction_sets", isas);
#if defined(__clang__)
    benchmark::AddCustomContext("compiler", "clang " __clang_version__);
#else
    benchmark::AddCustomContext("compiler", "gcc " __VERSION__);
#endif
    kvcull::bench::add_attention();
    kvcull::bench::add_selection();
    kvcull::bench::add_policies();
    kvcull::bench::add_cache();
    kvcull::bench::add_paging();
    kvcull::bench::add_lookahead();
    kvcull::bench::add_episodes();
    kvcull::bench::add_redundancy();
    kvcull::bench::add_gates();
    kvcull::bench::add_views();
    Plain<benchmark::ConsoleReporter> table(benchmark::ConsoleReporter::OO_Tabular);
    Plain<benchmark::JSONReporter> file;
    benchmark::RunSpecifiedBenchmarks(&table, to_file ? &file : nullptr);
    benchmark::Shutdown();
}
