#include "recorder.hpp"

#include <algorithm>
#include <kvcull/cache/kv_cache.hpp>
#include <kvcull/policies/streaming.hpp>
#include <numeric>
#include <sstream>
#include <string>

namespace tiny_llama {
namespace {

/// A cache that keeps everything and copies the rows of some layers to a trace on the way.
class Recorder {
  public:
    Recorder(const kvcull::CacheShape& shape, const std::vector<std::size_t>& layers, replay::Trace& trace)
        : cache_(shape, {}, {.tokens = 1}), layers_(layers), trace_(trace) {}

    [[nodiscard]] std::size_t seen() const { return cache_.seen(); }
    void append(std::size_t layer, kvcull::HeadsView<const float> k, kvcull::HeadsView<const float> v,
                const kvcull::AppendInputs& inputs) {
        copy(layer, &replay::Trace::Layer::k, k);
        copy(layer, &replay::Trace::Layer::v, v);
        cache_.append(layer, k, v, inputs);
    }
    void attend(std::size_t layer, kvcull::HeadsView<const float> q, kvcull::HeadsView<float> out) {
        copy(layer, &replay::Trace::Layer::q, q);
        cache_.attend(layer, q, out);
    }
    void end_step(const kvcull::StepInputs& inputs) { cache_.end_step(inputs); }

  private:
    void copy(std::size_t layer, std::vector<float> replay::Trace::Layer::*array,
              const kvcull::HeadsView<const float>& rows) {
        for (std::size_t i = 0; i < layers_.size(); ++i) {
            if (layers_[i] != layer) continue;
            std::vector<float>& to = trace_.layers[i].*array;
            to.resize(rows.heads * trace_.size() * rows.dim);
            for (std::size_t head = 0; head < rows.heads; ++head)
                for (std::size_t t = 0; t < rows.tokens; ++t)
                    std::copy_n(rows.row(head, t), rows.dim,
                                to.data() + (head * trace_.size() + seen() + t) * rows.dim);
        }
    }

    kvcull::KVCache<kvcull::Full> cache_;
    const std::vector<std::size_t>& layers_;
    replay::Trace& trace_;
};

/// What comes after the prompt; `own` stands for what the model says.
constexpr int own = -1;
std::vector<int> script_of(const Case& example, std::size_t decode) {
    std::vector<int> script = example.stream;
    for (const Question& question : example.questions) {
        script.insert(script.end(), question.ask.begin(), question.ask.end());
        script.insert(script.end(), question.answer.size(), own);
    }
    if (decode != 0) script.resize(decode, own);
    return script;
}

std::string text_of(const std::vector<double>& numbers) {
    std::ostringstream out;
    out.precision(12);
    for (const double number : numbers) out << (out.tellp() == 0 ? "" : ",") << number;
    return out.str();
}

}  // namespace

replay::Trace record(const Llama& model, const Case& example, const Recording& what) {
    const Config& config = model.config();
    const auto refuse = [](const std::string& why) { throw kvcull::error::config_error("record: " + why); };
    const std::vector<int> script = script_of(example, what.decode);
    if (script.empty()) refuse("decode is 0 and nothing follows the prompt, want at least 1 token");
    std::vector<std::size_t> layers = what.layers;
    if (layers.empty()) {
        layers.resize(config.layers);
        std::iota(layers.begin(), layers.end(), std::size_t{0});
    }
    for (const std::size_t layer : layers)
        if (layer >= config.layers)
            refuse("layer is " + std::to_string(layer) + ", want below " + std::to_string(config.layers));

    replay::Trace trace;
    trace.shape = {.layers = layers.size(),
                   .q_heads = config.q_heads,
                   .kv_heads = config.kv_heads,
                   .head_dim = config.head_dim,
                   .dtype = what.dtype};
    trace.prompt = example.prompt.size();
    trace.positions.resize(trace.prompt + script.size());
    std::iota(trace.positions.begin(), trace.positions.end(), kvcull::position_t{0});
    trace.layers.resize(layers.size());
    trace.notes["rope_pairing"] =
        config.rope.pairing == kvcull::Pairing::half_split ? "half_split" : "interleaved";
    trace.notes["rope_frequencies"] = text_of(config.rope.frequencies);
    trace.notes["model_layers"] = text_of({layers.begin(), layers.end()});

    kvcull::CacheShape shape = trace.shape;
    shape.layers = config.layers;
    shape.dtype = kvcull::DType::f32;
    Recorder cache(shape, layers, trace);
    RowMajorMatrix logits;
    const auto read = [&](std::span<const int> tokens) {
        model.forward(tokens, cache, logits);
        trace.tokens.insert(trace.tokens.end(), tokens.begin(), tokens.end());
    };
    read(example.prompt);
    for (int token : script) {
        if (token == own) {
            Eigen::Index best = 0;
            logits.row(0).maxCoeff(&best);
            token = static_cast<int>(best);
        }
        read({&token, 1});
    }
    return trace;
}

}  // namespace tiny_llama
