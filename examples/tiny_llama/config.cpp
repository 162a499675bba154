#include "config.hpp"

#include <algorithm>

#include "json.hpp"

namespace tiny_llama {
namespace {

void refuse_partial(const Object& object) {
    if (object.get("partial_rotary_factor", 1.0) != 1.0) object.wrong("partial_rotary_factor", "1");
}

kvcull::Rope read_rope(const Object& config, std::size_t head_dim) {
    // transformers 5 gathers all in rope_parameters; before, rope_theta stood beside rope_scaling
    const std::string key = config.has("rope_parameters") ? "rope_parameters" : "rope_scaling";
    if (config.has("rope_parameters") && config.has("rope_scaling"))
        config.wrong("rope_scaling", "none beside rope_parameters");
    double base = config.get<double>("rope_theta", 10000.0);
    if (!config.has(key)) return kvcull::rope(head_dim, base);

    const Object scaling = config.object(key);
    base = scaling.get<double>("rope_theta", base);
    refuse_partial(scaling);
    const bool old = scaling.has("type") && !scaling.has("rope_type");
    const std::string type_key = old ? "type" : "rope_type";
    const auto type = scaling.get<std::string>(type_key);
    const kvcull::Rope plain = kvcull::rope(head_dim, base);
    if (type == "default") return plain;
    if (type == "linear") return kvcull::scale_linear(plain, scaling.get<double>("factor"));
    if (type == "llama3")
        return kvcull::scale_llama3(
            plain, scaling.get<double>("factor"), scaling.get<double>("low_freq_factor"),
            scaling.get<double>("high_freq_factor"), scaling.get<double>("original_max_position_embeddings"));
    scaling.wrong(type_key, "default, linear or llama3");
}

/// Settings that this example does not compute, at the one value with which they change nothing.
void refuse_the_rest(const Object& config) {
    if (const auto type = config.get<std::string>("model_type"); type != "llama")
        config.wrong("model_type", "\"llama\"");
    if (config.has("architectures")) {
        const auto& list = config.at("architectures");
        if (std::find(list.begin(), list.end(), "LlamaForCausalLM") == list.end())
            config.wrong("architectures", "[\"LlamaForCausalLM\"]");
    }
    if (config.get<std::string>("hidden_act", "silu") != "silu") config.wrong("hidden_act", "\"silu\"");
    for (const char* key : {"attention_bias", "mlp_bias"})
        if (config.get(key, false)) config.wrong(key, "false");
    if (config.has("quantization_config")) config.wrong("quantization_config", "none");
    for (const char* key :
         {"logits_scaling", "embedding_multiplier", "attention_multiplier", "residual_multiplier"})
        if (config.get(key, 1.0) != 1.0) config.wrong(key, "1");
    for (const char* key : {"attn_logit_softcapping", "final_logit_softcapping", "sliding_window"})
        if (config.has(key)) config.wrong(key, "none");
    if (config.has("layer_types")) {
        const auto& types = config.at("layer_types");
        if (std::any_of(types.begin(), types.end(), [](const auto& one) { return one != "full_attention"; }))
            config.wrong("layer_types", "\"full_attention\" in all layers");
    }
    refuse_partial(config);
}

}  // namespace

Config read_config(const std::filesystem::path& file) {
    const nlohmann::json json = read_json(file);
    const Object object(json, file.string());
    refuse_the_rest(object);

    const auto positive = [&](const char* key, std::size_t most = 1'000'000'000) {
        const auto value = object.get<std::size_t>(key);
        if (value == 0 || value > most) object.wrong(key, "1 to " + std::to_string(most));
        return value;
    };
    constexpr std::size_t widest_head = 65536;  // of which rope makes a table
    Config config;
    config.layers = positive("num_hidden_layers");
    config.hidden = positive("hidden_size");
    config.intermediate = positive("intermediate_size");
    config.vocabulary = positive("vocab_size");
    config.q_heads = positive("num_attention_heads");
    config.kv_heads = object.has("num_key_value_heads") ? positive("num_key_value_heads") : config.q_heads;
    if (config.q_heads % config.kv_heads != 0)
        object.wrong("num_key_value_heads", "a divisor of num_attention_heads");
    if (object.has("head_dim"))
        config.head_dim = positive("head_dim", widest_head);
    else if (config.hidden % config.q_heads == 0)
        config.head_dim = config.hidden / config.q_heads;
    else
        object.wrong("hidden_size", "a multiple of num_attention_heads, as there is no head_dim");
    if (config.head_dim > widest_head)
        object.wrong("hidden_size", "at most " + std::to_string(widest_head) + " per head");
    config.rms_norm_eps = static_cast<float>(object.get<double>("rms_norm_eps", 1e-6));
    if (!(config.rms_norm_eps >= 0.0F)) object.wrong("rms_norm_eps", "a number, not negative");
    config.tied_head = object.get("tie_word_embeddings", false);
    try {
        config.rope = read_rope(object, config.head_dim);
    } catch (const kvcull::error::config_error& e) {
        fail(file.string(), e.what());
    }
    return config;
}

}  // namespace tiny_llama
