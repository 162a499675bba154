/// kvcull-train: retention gates of TRIM-KV for a frozen model.

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <thread>

#include "../common/program.hpp"
#include "trainer.hpp"

namespace {

using namespace tiny_llama;

struct Options : TrainingOptions {
    std::string model = TINY_LLAMA_MODEL_DIR, out = "gates.safetensors", state;
    std::size_t threads = std::max(1U, std::thread::hardware_concurrency()), every = 25, stop = 0;
};

void add_options(CLI::App& app, Options& o) {
    const auto count = [&](const char* name, std::size_t& value, const char* help, std::size_t least = 1) {
        app.add_option(name, value, help)
            ->check(CLI::Range(least, std::size_t{1'000'000}))
            ->capture_default_str();
    };
    const auto number = [&](const char* name, double& value, const char* help) {
        app.add_option(name, value, help)->check(CLI::Range(0.0, 1e9))->capture_default_str();
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
    app.add_option("--seed", o.seed, "Of weights and documents")->capture_default_str();
    count("--threads", o.threads, "Documents at a time; changes no bit of the result");
    count("--every", o.every, "Steps between two progress lines");
    count("--stop", o.stop, "End after so many steps as if killed; 0: never", 0);
}

void run(const Options& o) {
    const Llama model(o.model);
    GateTrainer trainer(model, o);
    if (!o.state.empty() && std::filesystem::exists(o.state)) trainer.resume(o.state);
    using Clock = std::chrono::steady_clock;
    const auto begin = Clock::now();
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
    std::printf("gates: %s\n", o.out.c_str());
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app("Trains retention gates (TRIM-KV) over a frozen Llama model of the tiny world",
                 "kvcull-train");
    Options options;
    add_options(app, options);
    return examples::run_program(app, argc, argv, [&] { run(options); });
}
