#include "trainer.hpp"

#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <kvcull/score/gates.hpp>

#include "shipped.hpp"
#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/reference.hpp"
#include "world.hpp"

namespace {

using tiny_llama::GateTrainer;
using tiny_llama::TrainingOptions;
using tiny_llama::test::model;

const TrainingOptions quick{.width = 3,
                            .budget = 8,
                            .every_token = true,
                            .length = 64,
                            .batch = 3,
                            .steps = 4,
                            .warmup = 1,
                            .rate = 1e-2};

/// All gates' numbers.
std::vector<float> numbers_of(GateTrainer& trainer) {
    std::vector<float> all;
    for (const auto& gate : trainer.gates())
        all.insert(all.end(), gate.values().begin(), gate.values().end());
    return all;
}
std::filesystem::path temporary(const std::string& name) {
    return std::filesystem::temp_directory_path() /
           ("kvcull_trainer_" + std::to_string(::getpid()) + name + ".safetensors");
}

}  // namespace

TEST_CASE("the gradient of the loss through all layers agrees with differences of the loss",
          "[tiny_llama][differential]") {
    TrainingOptions options = quick;
    options.capacity_weight = 0.5;
    options.budget = 1.5;  // all rows but the first exceed it by far: their count carries no gradient
    GateTrainer trainer(model(), options);
    const std::vector<int> tokens = tiny_llama::world_document(5, 64);
    for (auto& gate : trainer.gates())
        for (float& x : gate.view().bias) x = 3.0F;  // so that tokens do decay
    const auto loss = [&] {
        const auto report = trainer.learn(tokens, {});
        return 0.5 * (report.kl + report.ntp) + 0.5 * report.capacity;
    };
    std::vector<GateTrainer::Gate> gradient(4, GateTrainer::Gate(192, 3, 2));
    trainer.learn(tokens, gradient);
    for (std::size_t layer = 0; layer < 4; ++layer) {
        // Along the gradient itself the loss changes most, and rounding least matters.
        const auto values = trainer.gates()[layer].values();
        const auto slope = gradient[layer].values();
        const std::vector<float> before(values.begin(), values.end());
        double square = 0;
        for (const float g : slope) square += static_cast<double>(g) * static_cast<double>(g);
        REQUIRE(square > 1e-8);
        const double step = 1e-2 / std::sqrt(square);
        const auto at = [&](double distance) {
            for (std::size_t i = 0; i < values.size(); ++i)
                values[i] = before[i] + static_cast<float>(distance * static_cast<double>(slope[i]));
            const double here = loss();
            std::copy(before.begin(), before.end(), values.begin());
            return here;
        };
        CAPTURE(layer, square);
        CHECK(std::abs((at(step) - at(-step)) / (2 * step) / square - 1) < 0.02);
    }
}

TEST_CASE("a run that was stopped and resumed ends with the same bits on any number of threads",
          "[tiny_llama][property]") {
    const std::filesystem::path state = temporary("state");
    GateTrainer whole(model(), quick), first(model(), quick), second(model(), quick);
    for (int step = 0; step < 4; ++step) whole.step(1);
    for (int step = 0; step < 2; ++step) first.step(2);
    first.save(state);
    second.resume(state);
    REQUIRE(second.steps_done() == 2);
    for (int step = 0; step < 2; ++step) second.step(3);
    CHECK(kvcull::test::same_bits(numbers_of(second), numbers_of(whole)));

    TrainingOptions other = quick;
    other.budget = 9;
    GateTrainer stranger(model(), other);
    CHECK_THROWS_AS(stranger.resume(state), kvcull::error::format_error);
    CHECK(stranger.steps_done() == 0);
    std::filesystem::remove(state);
}

TEST_CASE("options that no step could be made with are refused when the trainer is made",
          "[tiny_llama][contract]") {
    TrainingOptions options = quick;
    options.budget = 0;
    CHECK(kvcull::test::failure<kvcull::error::config_error>([&] { GateTrainer(model(), options); }) ==
          "GateTrainer: budget is 0.000000, want above 0");
}

TEST_CASE("gates are written as policies read them", "[tiny_llama][property]") {
    const std::filesystem::path file = temporary("gates");
    GateTrainer trainer(model(), quick);
    trainer.write_gates(file);
    const auto gates = kvcull::Gates::read(file.string());
    REQUIRE(gates.layers() == 4);
    CHECK(gates.kv_heads() == 2);
    const auto want = trainer.gates()[3].view();
    CHECK(kvcull::test::same_bits(gates[3].w1[2][191], want.w1[2][191]));
    CHECK(kvcull::test::same_bits(gates[3].bias[1], static_cast<float>(std::log(50.0 * 64))));
    CHECK(std::filesystem::exists(file));
    CHECK_FALSE(std::filesystem::exists(file.string() + ".part"));
    std::filesystem::remove(file);
}

TEST_CASE("untrained gates change nothing and the capacity loss pulls them down", "[tiny_llama][property]") {
    TrainingOptions options = quick;
    options.steps = 20;
    GateTrainer trainer(model(), options);
    const auto before = trainer.learn(tiny_llama::world_document(1, 64), {});
    CHECK(before.kl < 1e-4);
    CHECK(before.soft_size > 60);
    for (int step = 0; step < 20; ++step) trainer.step(2);
    const auto after = trainer.learn(tiny_llama::world_document(1, 64), {});
    CHECK(after.soft_size < before.soft_size - 5);
    CHECK(after.capacity < before.capacity);
}

TEST_CASE("only what can be recalled counts as a prediction unless all tokens shall",
          "[tiny_llama][property]") {
    TrainingOptions options = quick;
    options.every_token = false;
    const GateTrainer all(model(), quick), answers(model(), options);
    // The model knows the answers, and cannot know which filler comes.
    const std::vector<int> tokens = tiny_llama::world_document(5, 64);
    CHECK(answers.learn(tokens, {}).ntp < 0.2 * all.learn(tokens, {}).ntp);
    const std::vector<int> filler(tokens.size(), 300);
    CHECK(all.learn(filler, {}).ntp > 0);
    CHECK(answers.learn(filler, {}).ntp == 0);
    CHECK(answers.learn(filler, {}).kl == 0);
}
