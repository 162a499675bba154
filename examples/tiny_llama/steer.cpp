/// kvcull-steer: the vector that keeps a model from second thoughts, from thoughts of its own.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <iomanip>
#include <iostream>

#include "../common/program.hpp"
#include "json.hpp"
#include "steering.hpp"

namespace {

using namespace tiny_llama;

struct Options {
    std::string model = TINY_LLAMA_MODEL_DIR, out = "steering.safetensors";
    std::size_t layer = 3, documents = 300, length = 384;
    Thinking thinking{.most = 384};
};

void add_options(CLI::App& app, Options& o) {
    const auto count = [&](const char* name, std::size_t& value, const char* help, std::size_t least) {
        app.add_option(name, value, help)
            ->check(CLI::Range(least, std::size_t{1'000'000}))
            ->capture_default_str();
    };
    app.add_option("--model", o.model, "Folder of a Llama checkpoint")->check(CLI::ExistingDirectory);
    app.add_option("--out", o.out, "Where the vector goes, for kvcull-demo --policy NAME:steer=FILE")
        ->capture_default_str();
    count("--layer", o.layer, "At whose input the model is steered; the number of layers: after the last", 0);
    count("--documents", o.documents, "Prompts that the model thinks about", 1);
    count("--length", o.length, "Tokens of the documents whose facts are the prompts", 64);
    count("--tokens", o.thinking.most, "The longest chain of thought", 1);
    app.add_option("--temperature", o.thinking.temperature, "Of its tokens; 0: always the likeliest")
        ->check(examples::number_of(0.0, 100.0))
        ->capture_default_str();
    app.add_option("--seed", o.thinking.seed, "Of documents and thoughts")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
}

/// What comes before the thoughts of a document that has some, or nothing.
std::vector<int> prompt_of(std::vector<int> document) {
    const auto thoughts = std::find(document.begin(), document.end(), int{word::think});
    if (thoughts == document.end()) return {};
    document.erase(thoughts, document.end());
    return document;
}

double norm(std::span<const float> vector) {
    double square = 0;
    for (const float x : vector) square += static_cast<double>(x) * static_cast<double>(x);
    return std::sqrt(square);
}

void run(const Options& o) {
    const Llama model(o.model);
    const auto list = read_json(std::filesystem::path(o.model) / "vocab.json");
    if (!list.is_array() ||
        !std::all_of(list.begin(), list.end(), [](const auto& word) { return word.is_string(); }))
        fail("vocab.json", "is no list of words");
    const auto words = list.get<std::vector<std::string>>();
    if (words.size() != model.config().vocabulary)
        fail("vocab.json", "holds " + std::to_string(words.size()) + " words, want " +
                               std::to_string(model.config().vocabulary));
    if (o.layer > model.config().layers)
        throw kvcull::error::config_error("--layer is " + std::to_string(o.layer) + ", want at most " +
                                          std::to_string(model.config().layers));
    Thoughts thoughts;
    kvcull::SplitMix64 seeds{o.thinking.seed};
    for (std::size_t done = 0; done < o.documents;) {
        Thinking how = o.thinking;
        how.seed = seeds();
        const std::vector<int> prompt = prompt_of(world_document(how.seed, o.length));
        if (prompt.empty()) continue;
        add_thoughts(model, prompt, how, words, o.layer, thoughts);
        ++done;
    }
    const std::size_t size = model.config().hidden, count = thoughts.labels.size();
    const kvcull::MatrixView<const float> hidden(thoughts.hidden.data(), count, size);
    const std::vector<float> vector = kvcull::steering_vector(hidden, thoughts.labels);
    double mean = 0;
    for (std::size_t i = 0; i < count; ++i) mean += norm(hidden[i]) / static_cast<double>(count);
    const auto second =
        std::count_if(thoughts.labels.begin(), thoughts.labels.end(),
                      [](kvcull::Thought each) { return each != kvcull::Thought::execution; });
    write_steering(o.out, vector, o.layer);
    std::cout << count << " thoughts about " << o.documents << " prompts, " << second
              << " of them second thoughts\n"
              << std::fixed << std::setprecision(3) << "vector:   of length " << norm(vector)
              << " at the input of layer " << o.layer << ", where hidden states have " << mean << '\n'
              << "steering: " << o.out << '\n';
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app("Builds a steering vector from a model's own thoughts (SkipKV)", "kvcull-steer");
    Options options;
    add_options(app, options);
    return examples::run_program(app, argc, argv, [&] { run(options); });
}
