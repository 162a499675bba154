#pragma once
/// Trains retention gates of TRIM-KV over a frozen model.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <kvcull/train/adamw.hpp>
#include <kvcull/train/capacity.hpp>
#include <kvcull/train/gate.hpp>
#include <span>
#include <vector>

#include "llama.hpp"

namespace tiny_llama {

struct TrainingOptions {
    std::size_t width = 32;      ///< of a gate's hidden layer
    double budget = 48;          ///< rows per KV head that the capacity loss allows
    double capacity_weight = 1;  ///< of the capacity loss beside distillation and next token
    bool every_token = false;    ///< all predictions count; else only what can be recalled, as only replies
                                 ///< do in the paper
    std::size_t length = 256;    ///< tokens of a document
    std::size_t batch = 2;       ///< documents of a step
    std::size_t steps = 500, warmup = 50;
    double rate = 5e-3, least_rate = 1e-5, weight_decay = 1e-5, clip = 1;
    std::uint64_t seed = 1;
};

/// What a step saw, as means over its documents.
struct StepReport {
    double kl = 0, ntp = 0, capacity = 0;
    double soft_size = 0;  ///< of the last token, mean over the KV heads
    double norm = 0, rate = 0;
};

/// Every layer runs gated attention, so later gates see what earlier gates made. A step depends on options
/// and step number alone: a run that was stopped and resumed ends with the same bits.
class GateTrainer {
  public:
    using Gate = kvcull::train::GateTensors<float>;

    GateTrainer(const Llama& model, const TrainingOptions& options);

    [[nodiscard]] std::size_t steps_done() const noexcept { return done_; }
    [[nodiscard]] std::vector<Gate>& gates() noexcept { return gates_; }
    /// Teacher, student, losses, backward, AdamW; documents of the step on `threads` threads.
    StepReport step(std::size_t threads);

    /// Losses of one document, and, if `gradient` is not empty, their gradient added to it, a gate per layer.
    StepReport learn(std::span<const int> tokens, std::span<Gate> gradient) const;

    /// The gates under the released tensor names; replaces the file as a whole or not at all.
    void write_gates(const std::filesystem::path& file) const;
    /// Gates, moments, step number and options; likewise.
    void save(const std::filesystem::path& file) const;
    /// @throws kvcull::error::format_error if the file is of another model or other options
    void resume(const std::filesystem::path& file);

  private:
    struct Tape;
    void forward(std::span<const int> tokens, bool gated, Tape& tape) const;
    void backward(Tape& tape, std::span<Gate> gradient) const;
    [[nodiscard]] std::vector<Gate> blank() const;

    const Llama& model_;
    TrainingOptions options_;
    std::vector<Gate> gates_, mean_, variance_;
    std::size_t done_ = 0;
};

}  // namespace tiny_llama
