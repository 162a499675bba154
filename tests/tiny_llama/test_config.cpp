#include "config.hpp"

#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "support/catch.hpp"

namespace {

using nlohmann::json;
using tiny_llama::Config;

const json smallest{{"model_type", "llama"},   {"num_hidden_layers", 2},   {"hidden_size", 64},
                    {"intermediate_size", 96}, {"num_attention_heads", 4}, {"vocab_size", 10}};

Config read(const std::string& text) {
    const auto path = std::filesystem::temp_directory_path() /
                      ("kvcull_test_config_" + std::to_string(::getpid()) + ".json");
    std::ofstream(path) << text;
    struct Remove {
        const std::filesystem::path& path;
        ~Remove() { std::filesystem::remove(path); }
    } const remove{path};
    return tiny_llama::read_config(path);
}
Config read(const json& value) {
    return read(value.dump());
}
json with(const char* key, const json& value, json object = smallest) {
    object[key] = value;
    return object;
}
template <class Text>
std::string complaint(const Text& value) {
    try {
        read(value);
        return "";
    } catch (const kvcull::error::format_error& e) {
        return e.what();
    }
}
auto says(const std::string& text) {
    return contains_text(text);
}

TEST_CASE("absent and null keys take the defaults of transformers", "[tiny_llama][contract]") {
    for (const json& value :
         {smallest, with("num_key_value_heads", nullptr, with("head_dim", nullptr, smallest)),
          with("rope_scaling", nullptr)}) {
        const Config config = read(value);
        CHECK(config.layers == 2);
        CHECK(config.kv_heads == 4);
        CHECK(config.head_dim == 16);
        CHECK(config.rms_norm_eps == 1e-6F);
        CHECK_FALSE(config.tied_head);
        CHECK(config.rope.frequencies == kvcull::rope(16, 10000.0).frequencies);
        CHECK(config.rope.pairing == kvcull::Pairing::half_split);
    }
}

TEST_CASE("given keys are taken", "[tiny_llama][contract]") {
    json value = with("num_key_value_heads", 2, with("head_dim", 32));
    value["rms_norm_eps"] = 1e-5;
    value["rope_theta"] = 500000;
    value["tie_word_embeddings"] = true;
    value["architectures"] = {"LlamaForCausalLM"};
    const Config config = read(value);
    CHECK(config.kv_heads == 2);
    CHECK(config.head_dim == 32);
    CHECK(config.rms_norm_eps == 1e-5F);
    CHECK(config.tied_head);
    CHECK(config.rope.frequencies == kvcull::rope(32, 500000.0).frequencies);
}

TEST_CASE("rope scaling is linear, llama3 or refused by name", "[tiny_llama][contract]") {
    const kvcull::Rope plain = kvcull::rope(16, 10000.0);
    const auto scaled = [](const json& scaling) {
        return read(with("rope_scaling", scaling)).rope.frequencies;
    };
    CHECK(scaled({{"type", "linear"}, {"factor", 4.0}}) == kvcull::scale_linear(plain, 4).frequencies);
    CHECK(scaled({{"rope_type", "default"}}) == plain.frequencies);
    const json llama3{{"rope_type", "llama3"},
                      {"factor", 8},
                      {"low_freq_factor", 1},
                      {"high_freq_factor", 4},
                      {"original_max_position_embeddings", 64}};
    // compared loosely: the compiler may contract the same formula differently here and there
    CHECK_THAT(scaled(llama3), Catch::Matchers::Approx(kvcull::scale_llama3(plain, 8, 1, 4, 64).frequencies));
    CHECK(scaled(llama3) != plain.frequencies);
    CHECK(
        read(with("rope_parameters", {{"rope_type", "default"}, {"rope_theta", 5000.0}})).rope.frequencies ==
        kvcull::rope(16, 5000.0).frequencies);

    const auto refused = [](const json& scaling) { return complaint(with("rope_scaling", scaling)); };
    CHECK_THAT(refused({{"type", "yarn"}, {"factor", 4.0}}),
               says("'type' is \"yarn\", want default, linear or"));
    CHECK_THAT(refused({{"rope_type", "dynamic"}, {"factor", 4.0}}), says("'rope_type' is \"dynamic\""));
    CHECK_THAT(refused({{"type", "linear"}}), says("rope_scaling: 'factor' is missing"));
    CHECK_THAT(refused({{"type", "linear"}, {"factor", 0}}), says("factor"));
    CHECK_THAT(refused({{"factor", 2.0}}), says("'rope_type' is missing"));
    CHECK_THAT(refused("linear"), says("want an object"));
    json cut = llama3;
    cut.erase("low_freq_factor");
    CHECK_THAT(refused(cut), says("'low_freq_factor' is missing"));
}

TEST_CASE("a setting that would change the numbers is refused by name", "[tiny_llama][contract]") {
    CHECK_THAT(complaint(with("model_type", "mistral")), says("'model_type' is \"mistral\", want \"llama\""));
    CHECK_THAT(complaint(with("architectures", {"LlamaForSequenceClassification"})), says("architectures"));
    CHECK_THAT(complaint(with("hidden_act", "gelu")), says("'hidden_act' is \"gelu\", want \"silu\""));
    CHECK_THAT(complaint(with("attention_bias", true)), says("'attention_bias' is true, want false"));
    CHECK_THAT(complaint(with("mlp_bias", true)), says("'mlp_bias' is true"));
    CHECK_THAT(complaint(with("quantization_config", {{"bits", 4}})), says("quantization_config"));
    CHECK_THAT(complaint(with("partial_rotary_factor", 0.5)), says("partial_rotary_factor"));
    CHECK_THAT(complaint(with("rope_parameters", {{"rope_type", "default"}, {"partial_rotary_factor", 0.5}})),
               says("rope_parameters: 'partial_rotary_factor' is 0.5, want 1"));
    CHECK_THAT(complaint(with("rope_parameters", {{"rope_theta", 1e4}})), says("'rope_type' is missing"));
    json both = with("rope_parameters", {{"rope_type", "default"}});
    both["rope_scaling"] = {{"type", "linear"}, {"factor", 4.0}};
    CHECK_THAT(complaint(both), says("want none beside rope_parameters"));
    CHECK_THAT(complaint(with("logits_scaling", 8.0)), says("'logits_scaling' is 8.0, want 1"));
    CHECK_THAT(complaint(with("final_logit_softcapping", 30.0)), says("final_logit_softcapping"));
    CHECK_THAT(complaint(with("sliding_window", 4096)), says("'sliding_window' is 4096, want none"));
    CHECK_THAT(complaint(with("layer_types", {"full_attention", "sliding_attention"})), says("layer_types"));
    CHECK_NOTHROW(complaint(with("layer_types", {"full_attention", "full_attention"})));
    CHECK_THAT(complaint(with("rms_norm_eps", -1.0)), says("'rms_norm_eps' is -1.0, want a number"));
    std::string deep = smallest.dump();  // deeper than a recursion could go
    deep.back() = ',';
    deep += "\"mlp_bias\":" + std::string(200000, '[') + std::string(200000, ']') + '}';
    CHECK_THAT(complaint(deep), says("'mlp_bias' is a list of 1, want true"));
}

TEST_CASE("missing and ill-typed keys are named with what was got and wanted", "[tiny_llama][contract]") {
    for (const auto& [key, _] : smallest.items()) {
        json value = smallest;
        value.erase(key);
        CHECK_THAT(complaint(value), says("'" + key + "' is missing"));
    }
    CHECK_THAT(complaint(with("hidden_size", "64")), says("'hidden_size' is \"64\", want an integer"));
    CHECK_THAT(complaint(with("hidden_size", -64)), says("want an integer"));
    CHECK_THAT(complaint(with("hidden_size", 64.0)), says("want an integer"));
    CHECK_THAT(complaint(with("hidden_size", 0)), says("'hidden_size' is 0, want 1 to 1000000000"));
    CHECK_THAT(complaint(with("vocab_size", 1'000'000'000'000)), says("want 1 to 1000000000"));
    CHECK_THAT(complaint(with("head_dim", 65537)), says("'head_dim' is 65537, want 1 to 65536"));
    CHECK_THAT(complaint(with("hidden_size", 66)), says("'hidden_size' is 66, want a multiple"));
    CHECK_THAT(complaint(with("num_key_value_heads", 3)), says("want a divisor of num_attention_heads"));
    CHECK_THAT(complaint(with("num_key_value_heads", 0)), says("want 1 to"));
    CHECK_THAT(complaint(with("head_dim", 15)), says("dims is 15, want an even number"));
    CHECK_THAT(complaint(with("tie_word_embeddings", 1)), says("want true or false"));
    CHECK_THAT(complaint(with("rms_norm_eps", "small")), says("want a number"));
    CHECK_THAT(complaint(json::array()), says("want an object"));
    CHECK_THROWS_AS(tiny_llama::read_config("/nonexistent/config.json"), kvcull::error::format_error);
}

}  // namespace
