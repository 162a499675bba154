/// Writes a first corpus, a small whole file or two per target: kvcull-fuzz-seeds FOLDER

#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "kvcull/base/safetensors.hpp"
#include "kvcull/cache/saved.hpp"
#include "kvcull/paging/file_store.hpp"
#include "saved_shape.hpp"
#include "stored_episodes.hpp"

namespace {

using namespace kvcull;
namespace fs = std::filesystem;

fs::path corpus;

void put(const std::string& target, const std::string& name, std::string_view bytes) {
    fs::create_directories(corpus / target);
    std::ofstream(corpus / target / name, std::ios::binary) << bytes;
}
std::string text(std::span<const std::byte> bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// Tensors of the same few bytes, as far as each needs.
struct Named {
    std::string name;
    ElementType dtype;
    std::vector<std::size_t> shape;
};
std::string file_of(const SafeTensors::Metadata& metadata, const std::vector<Named>& tensors) {
    static constexpr std::array<std::byte, 512> zeros{};
    std::vector<Tensor> all;
    for (const Named& one : tensors) {
        std::size_t size = size_of(one.dtype);
        for (const std::size_t dim : one.shape) size *= dim;
        all.push_back({one.name, one.dtype, one.shape, std::span(zeros).first(size)});
    }
    return text(SafeTensors::serialize(metadata, all));
}

void put_saved() {
    fuzz::for_every_saved_policy([]<class P>(P policy) {
        KVCache<P> cache(fuzz::saved_shape, std::move(policy), Budget{.tokens = fuzz::saved_budget});
        fuzz::decode(cache, 9);
        put("saved", std::string(P::name), text(save(cache)));
    });
}

void put_episodes() {
    fuzz::Talk talk;
    talk.episodes.build(talk.history, talk.segments);
    put("episodes", "built", text(talk.store.get(0)));
    for (int turn = 0; turn < 3; ++turn) talk.say(0);
    talk.episodes.write_back();
    put("episodes", "talked", text(talk.store.get(0)));
}

/// Headers and pages of 16 bytes, without what fills their blocks.
void put_pages() {
    using Header = detail::RecordHeader;
    using Kind = Header::Kind;
    constexpr std::string_view page = "sixteen bytes...";
    const auto header = [](const Header& one) { return text(one.copies()); };
    const auto file = [&](std::size_t records) {
        return header({.kind = Kind::file, .page = records, .payload_bytes = page.size()});
    };
    const auto record = [&](page_t number, std::uint64_t generation) {
        return header({.kind = Kind::page,
                       .page = number,
                       .generation = generation,
                       .payload_bytes = page.size(),
                       .payload_checksum = detail::crc32c(std::as_bytes(std::span(page)))}) +
               std::string(page);
    };
    put("pages", "none", file(0));
    put("pages", "three",
        file(4) + record(1, 1) + record(2, 3) + header({}) + std::string(page) + record(9, 2));
    put("pages", "twice", file(2) + record(7, 4) + record(7, 5));  // a crash before the older one was free
}

void put_gates() {
    const std::string layer = "model.layers.0.self_attn.retention_gate.";
    put("gates", "rg",
        file_of({}, {{layer + "linear1.weight", ElementType::bf16, {3, 2}},
                     {layer + "linear1.bias", ElementType::bf16, {3}},
                     {layer + "linear2.weight", ElementType::bf16, {1, 3}},
                     {layer + "bias", ElementType::bf16, {1}}}));
    put("gates", "rg10",
        file_of({{"hidden_act", "silu"}}, {{layer + "linear1.weight", ElementType::f32, {3, 2}},
                                           {layer + "linear1.bias", ElementType::f32, {3}},
                                           {layer + "linear2.weight", ElementType::f32, {3, 3}},
                                           {layer + "linear2.bias", ElementType::f32, {3}},
                                           {layer + "linear3.weight", ElementType::f32, {1, 3}},
                                           {layer + "bias", ElementType::f32, {1}}}));
}

void put_traces() {
    put("trace", "two_tokens",
        file_of({{"kvcull_trace", "1"}, {"prompt_tokens", "1"}, {"scale", "0.5"}},
                {{"layers.0.q", ElementType::f32, {2, 2, 2}},
                 {"layers.0.k", ElementType::f16, {1, 2, 2}},
                 {"layers.0.v", ElementType::f16, {1, 2, 2}},
                 {"tokens", ElementType::i32, {2}}}));
    put("requests", "text", "t# three requests of two pages\n7\n1\n7\n");
    put("requests", "numbers", "n" + file_of({}, {{"in.pages", ElementType::i64, {3}}}));
}

void put_steering() {
    put("steering", "vector",
        file_of({{"layer", "1"},
                 {"delimiters", "2"},
                 {"markers", "3+5"},
                 {"steer_at", "2"},
                 {"think_start", "4"},
                 {"think_end", "6"}},
                {{"vector", ElementType::f32, {4}}}));
}

void put_golden() {
    put("golden", "one",
        file_of({{"method", "h2o"}, {"kind", "decode"}, {"budget", "8"}, {"eps", "1e-5"}},
                {{"in.q", ElementType::f32, {1, 2, 2}}, {"out.keep", ElementType::i64, {2}}}));
}

constexpr std::string_view config = R"({"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 4,
"intermediate_size": 2, "vocab_size": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2,
"rms_norm_eps": 1e-5, "tie_word_embeddings": true})";

void put_models() {
    put("config", "plain", config);
    put("config", "llama3", R"({"model_type": "llama", "architectures": ["LlamaForCausalLM"],
"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 9, "num_attention_heads": 4,
"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
"original_max_position_embeddings": 8192}, "rope_theta": 500000.0})");
    const std::string layer = "model.layers.0.", attention = layer + "self_attn.", mlp = layer + "mlp.";
    const auto f16 = ElementType::f16;
    put("checkpoint", "one_layer",
        std::string(config) + '\0' +
            file_of({}, {{"model.embed_tokens.weight", f16, {3, 4}},
                         {"model.norm.weight", f16, {4}},
                         {layer + "input_layernorm.weight", f16, {4}},
                         {layer + "post_attention_layernorm.weight", f16, {4}},
                         {attention + "q_proj.weight", f16, {4, 4}},
                         {attention + "k_proj.weight", f16, {2, 4}},
                         {attention + "v_proj.weight", f16, {2, 4}},
                         {attention + "o_proj.weight", f16, {4, 4}},
                         {mlp + "gate_proj.weight", f16, {2, 4}},
                         {mlp + "up_proj.weight", f16, {2, 4}},
                         {mlp + "down_proj.weight", f16, {4, 2}}}));
    put("config", "huge_head", R"({"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 4,
"intermediate_size": 2, "vocab_size": 3, "num_attention_heads": 2, "head_dim": 1000000000000})");
    put("checkpoint", "huge_vocabulary",
        R"({"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 4,
"intermediate_size": 2, "vocab_size": 999999999, "num_attention_heads": 2})" +
            std::string(1, '\0') + file_of({}, {}));
    put("tasks", "needle", R"({"task": "needle", "cases": [{"prompt": [1, 8, 24, 152, 2], "stream": [3],
"questions": [{"ask": [5, 24], "answer": [152]}]}]})");
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::cerr << "usage: kvcull-fuzz-seeds FOLDER\n";
        return 2;
    }
    corpus = argv[1];
    put("safetensors", "empty", file_of({}, {}));
    put("safetensors", "two",
        file_of({{"a", "b \u00e9"}}, {{"x", ElementType::u8, {3}}, {"y", ElementType::f32, {2, 0}}}));
    put_saved();
    put_episodes();
    put_pages();
    put_gates();
    put_traces();
    put_steering();
    put_golden();
    put_models();
}
