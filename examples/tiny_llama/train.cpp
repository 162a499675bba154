/// kvcull-train: retention gates of TRIM-KV for a frozen model, and what they are worth.

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <iostream>
#include <thread>

#include "../common/program.hpp"
#include "compare.hpp"
#include "trainer.hpp"

#if defined(__GLIBC__)
#    include <malloc.h>
#endif

namespace {

using namespace tiny_llama;

struct Options : TrainingOptions {
    std::string model = TINY_LLAMA_MODEL_DIR, out = "gates.safetensors", state;
    std::size_t threads = std::max(1U, std::thread::hardware_concurrency()), every = 25, stop = 0,
                compare = 0, cases = 24;
};

void add_options(CLI::App& app, Options& o) {
    const auto count = [&](const char* name, std::size_t& value, const char* help, std::size_t least = 1) {
        app.add_option(name, value, help)
            ->check(CLI::Range(least, std::size_t{1'000'000}))
            ->capture_default_str();
    };
    const auto number = [&](const char* name, double& value, const char* help) {
        app.add_option(name, value, help)->check(examples::number_of(0.0, 1e9))->capture_default_str();
    };
    app.add_option("--model", o.model, "Folder of a Llama checkpoint")->check(CLI::ExistingDirectory);
    app.add_option("--out", o.out, "Where the gates go, for kvcull-demo --policy trimkv:gates=FILE")
        ->capture_default_str();
    app.add_option("--state", o.state,
                   "Saved every --every steps; a run that finds it there goes on from it");
    number("--budget", o.budget, "Rows per KV head that are free; below 1 a share of the document");
    number("--capacity", o.capacity_weight, "Weight of the capacity loss");
    count("--width", o.width, "Width of a gate");
    count("--length", o.length, "Tokens of a document", 64);
    count("--batch", o.batch, "Documents of a step");
    count("--steps", o.steps, "Steps");
    count("--warmup", o.warmup, "Steps until the rate is reached", 0);
    number("--rate", o.rate, "Learning rate");
    app.add_flag("--every-token", o.every_token, "All predictions count, not only what can be recalled");
    app.add_option("--seed", o.seed, "Of weights and documents")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    count("--threads", o.threads, "Documents at a time; changes no bit of the result");
    count("--every", o.every, "Steps between two progress lines");
    count("--stop", o.stop, "End after so many steps as if killed; 0: never", 0);
    count("--compare", o.compare,
          "Train so many gates, seeds from --seed on, and show their answers on documents held back beside "
          "those of other policies; 0: train gates, no more",
          0);
    count("--cases", o.cases, "Documents held back per task and seed");
}

void train(const Llama& model, const Options& o) {
    GateTrainer trainer(model, o);
    if (!o.state.empty() && std::filesystem::exists(o.state)) trainer.resume(o.state);
    using Clock = std::chrono::steady_clock;
    const auto begin = Clock::now();
    const std::clock_t busy = std::clock();
    const std::size_t first = trainer.steps_done();
    while (trainer.steps_done() < o.steps) {
        const StepReport report = trainer.step(o.threads);
        const std::size_t done = trainer.steps_done();
        if (done % o.every == 0 || done == o.steps) {
            const std::chrono::duration<double> spent = Clock::now() - begin;
            const double left =
                spent.count() / static_cast<double>(done - first) * static_cast<double>(o.steps - done);
            std::printf(
                "step %5zu/%zu  kl %.4f  ntp %.4f  capacity %.4f  soft size %6.1f  norm %.2e  %4.0f s left\n",
                done, o.steps, report.kl, report.ntp, report.capacity, report.soft_size, report.norm, left);
            std::fflush(stdout);
            if (!o.state.empty()) trainer.save(o.state);
        }
        if (done == o.stop) return;
    }
    trainer.write_gates(o.out);
    const auto steps = static_cast<double>(std::max<std::size_t>(1, o.steps - first));
    const std::chrono::duration<double, std::milli> spent = Clock::now() - begin;
    std::printf("gates: %s, %.1f ms per step, processor time %.1f ms\n", o.out.c_str(), spent.count() / steps,
                1e3 * static_cast<double>(std::clock() - busy) / CLOCKS_PER_SEC / steps);
    std::fflush(stdout);
}

/// `gates.safetensors` -> `gates-2.safetensors`
std::string with_seed(const std::string& file, std::uint64_t seed) {
    if (file.empty()) return file;
    const std::filesystem::path path = file;
    return (path.parent_path() / (path.stem().string() + "-" + std::to_string(seed))).string() +
           path.extension().string();
}

void run(const Options& options) {
    const Llama model(options.model);
    if (options.compare == 0) return train(model, options);
    const std::vector<std::string> policies{"trimkv", "streaming", "h2o", "snapkv:decode_interval=16",
                                            "keydiff"};
    std::vector<HeldBackRow> rows;
    for (std::size_t i = 0; i < options.compare; ++i) {
        Options one = options;
        one.seed += i;
        one.out = with_seed(options.out, one.seed);
        one.state = with_seed(options.state, one.seed);
        train(model, one);
        std::vector<std::string> of_seed = policies;
        of_seed[0] += ":gates=" + one.out;
        run_held_back(model, {.cases = options.cases, .threads = options.threads}, one.seed, of_seed, rows);
    }
    print_held_back(std::cout, policies, rows);
}

}  // namespace

int main(int argc, char** argv) {
#if defined(__GLIBC__)
    // A step allocates what the one before gave back: the system need not take it and clear it in between.
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
    CLI::App app("Trains retention gates (TRIM-KV) over a frozen Llama model of the tiny world",
                 "kvcull-train");
    Options options;
    add_options(app, options);
    return examples::run_program(app, argc, argv, [&] { run(options); });
}
