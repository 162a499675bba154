#include "llama.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>

#include "full_cache.hpp"
#include "support/catch.hpp"

namespace {

using kvcull::SafeTensors;
using tiny_llama::Llama;
using tiny_llama::RowMajorMatrix;

const std::filesystem::path model_folder = TINY_LLAMA_MODEL_DIR;

FullCache cache_for(const Llama& model) {
    return {model.config().layers, model.config().kv_heads};
}
std::vector<int> tokens_of(const SafeTensors& file) {
    const auto tokens = file.tensor("in.tokens").to_vector<std::int64_t>();
    return {tokens.begin(), tokens.end()};
}
/// Largest excess of |x - y| over the model's documented tolerance 1e-3 + 1e-3 |y|; negative if there is
/// none.
float excess(const RowMajorMatrix& x, const RowMajorMatrix& y) {
    return ((x - y).array().abs() - 1e-3F * y.array().abs()).maxCoeff() - 1e-3F;
}

TEST_CASE("logits agree with those of another implementation", "[tiny_llama][golden]") {
    const auto file = SafeTensors::read((model_folder / "logits.safetensors").string());
    const std::vector<int> tokens = tokens_of(file);
    const auto numbers = file.tensor("out.logits").to_vector<float>();
    const Llama model(model_folder);
    const auto n = static_cast<Eigen::Index>(tokens.size());
    const auto vocabulary = static_cast<Eigen::Index>(model.config().vocabulary);
    REQUIRE(numbers.size() == tokens.size() * model.config().vocabulary);
    const Eigen::Map<const RowMajorMatrix> want(numbers.data(), n, vocabulary);

    FullCache cache = cache_for(model);
    RowMajorMatrix got;
    model.forward(tokens, cache, got, Llama::Logits::all);
    REQUIRE(got.rows() == n);
    CHECK(excess(got, want) < 0);

    SECTION("in calls of any size, the last token's only") {
        const auto chunk = GENERATE(std::size_t{1}, std::size_t{7}, std::size_t{64});
        FullCache chunked = cache_for(model);
        for (std::size_t i = 0; i < tokens.size();) {
            const auto part = std::span(tokens).subspan(i, std::min(chunk, tokens.size() - i));
            model.forward(part, chunked, got);
            i += part.size();
            CAPTURE(i);
            REQUIRE(got.rows() == 1);
            REQUIRE(excess(got, want.row(static_cast<Eigen::Index>(i) - 1)) < 0);
        }
    }
}

TEST_CASE("a cache hears the tokens and final hidden states of every step, however they are cut",
          "[tiny_llama][contract]") {
    struct Listener : FullCache {
        using FullCache::FullCache;
        std::vector<int> tokens;
        std::vector<float> hidden;

        void end_step(const kvcull::StepInputs& inputs) {
            FullCache::end_step(inputs);
            tokens.insert(tokens.end(), inputs.tokens.begin(), inputs.tokens.end());
            for (std::size_t row = 0; row < inputs.hidden.rows; ++row)
                hidden.insert(hidden.end(), inputs.hidden[row].begin(), inputs.hidden[row].end());
        }
    };
    const Llama model(model_folder);
    const std::vector<int> text{1, 12, 113, 248, 2, 23, 84, 190, 2, 3, 113};
    Listener whole(model.config().layers, model.config().kv_heads), single = whole;
    RowMajorMatrix logits, last;
    model.forward(text, whole, logits);
    for (const int& token : text) model.forward({&token, 1}, single, last);
    CHECK(whole.tokens == text);
    CHECK(single.tokens == text);
    REQUIRE(whole.hidden.size() == text.size() * model.config().hidden);
    REQUIRE(single.hidden.size() == whole.hidden.size());
    float apart = 0, size = 0;
    for (std::size_t i = 0; i < whole.hidden.size(); ++i) {
        apart = std::max(apart, std::fabs(whole.hidden[i] - single.hidden[i]));
        size = std::max(size, std::fabs(whole.hidden[i]));
    }
    CHECK(apart < 1e-3F);
    CHECK(size > 0.1F);
    CHECK(excess(last, logits) < 0);
}

TEST_CASE("a token beyond the vocabulary or an empty call changes nothing", "[tiny_llama][contract]") {
    const Llama model(model_folder);
    FullCache cache = cache_for(model);
    RowMajorMatrix logits;
    for (const int token : {-1, 448}) {
        CHECK_THROWS_AS(model.forward(std::vector{1, token}, cache, logits), std::out_of_range);
        CHECK(cache.seen() == 0);
    }
    CHECK_THROWS_AS(model.forward({}, cache, logits), std::invalid_argument);
    CHECK(cache.seen() == 0);
}

/// A copy of the model's folder to be spoilt.
class Folder {
  public:
    Folder() {
        std::filesystem::remove_all(path);
        std::filesystem::create_directories(path);
        std::filesystem::copy(model_folder / "config.json", path);
        std::filesystem::copy(model_folder / "model.safetensors", path);
    }
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;
    ~Folder() { std::filesystem::remove_all(path); }

    [[nodiscard]] nlohmann::json config() const {
        return nlohmann::json::parse(std::ifstream(path / "config.json"));
    }
    void config(const nlohmann::json& value) const { std::ofstream(path / "config.json") << value; }
    [[nodiscard]] std::string complaint() const {
        try {
            const Llama model(path);
            return "";
        } catch (const kvcull::error::format_error& e) {
            return e.what();
        }
    }
    const std::filesystem::path path =
        std::filesystem::temp_directory_path() / ("kvcull_test_llama_" + std::to_string(::getpid()));
};
auto says(const std::string& text) {
    return contains_text(text);
}

TEST_CASE("weights that do not fit the config are errors that name tensor, file, got and want",
          "[tiny_llama][contract]") {
    const Folder folder;
    const nlohmann::json config = folder.config();
    REQUIRE(folder.complaint().empty());
    const auto with = [&](const char* key, const nlohmann::json& value) {
        nlohmann::json changed = config;
        changed[key] = value;
        folder.config(changed);
        return folder.complaint();
    };
    CHECK_THAT(with("vocab_size", 449), says("model.safetensors: tensor 'model.embed_tokens.weight'") &&
                                            says("shape is [448, 192], want [449, 192]"));
    CHECK_THAT(with("intermediate_size", 128), says("'model.layers.0.mlp.gate_proj.weight'"));
    CHECK_THAT(with("num_hidden_layers", 5),
               says("no tensor 'model.layers.4.input_layernorm.weight', want one of shape [192]"));
    CHECK_THAT(with("num_hidden_layers", 3), says("'model.layers.3.") && says("belongs to no part"));
    CHECK_THAT(with("tie_word_embeddings", false),
               says("no tensor 'lm_head.weight', want one of shape [448, 192]"));
    CHECK_THAT(with("head_dim", nullptr), says("q_proj.weight': shape is [256, 192], want [192, 192]"));
}

/// All tensors of the shipped model in another type, some renamed or dropped by `rename` (to "").
template <class T, class Convert, class Rename>
std::vector<std::byte> converted(Convert&& convert, Rename&& rename) {
    const auto file = SafeTensors::read((model_folder / "model.safetensors").string());
    std::vector<std::vector<T>> numbers;
    std::vector<kvcull::Tensor> tensors;
    numbers.reserve(2 * file.tensors().size());
    for (const auto& tensor : file.tensors())
        for (const std::string& name : rename(tensor.name)) {
            auto& copy = numbers.emplace_back();
            for (const auto x : tensor.template as<kvcull::float16>())
                copy.push_back(convert(kvcull::to_float(x)));
            tensors.push_back(kvcull::Tensor::of(name, tensor.shape, std::span<const T>(copy)));
        }
    return SafeTensors::serialize({}, tensors);
}
void save(const std::filesystem::path& path, const std::vector<std::byte>& bytes) {
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}
RowMajorMatrix logits_of(const std::filesystem::path& folder) {
    const Llama model(folder);
    FullCache cache = cache_for(model);
    RowMajorMatrix logits;
    model.forward(std::vector{1, 12, 113, 248, 2, 23, 84, 190, 2, 3, 113}, cache, logits);
    return logits;
}
using Names = std::vector<std::string>;

TEST_CASE("a hook sees what enters every layer and what leaves the last, and may change it",
          "[tiny_llama][property]") {
    const Llama model(model_folder);
    const std::vector<int> first{1, 12, 113, 248, 2}, next{3, 113};
    const std::size_t layers = model.config().layers;
    RowMajorMatrix want, got;
    const auto run = [&](RowMajorMatrix& logits, const tiny_llama::Hook& hook) {
        FullCache cache = cache_for(model);
        model.forward(first, cache, logits, Llama::Logits::last, hook);
        model.forward(next, cache, logits, Llama::Logits::all, hook);
    };
    run(want, {});

    SECTION("it is called in order, and reading changes nothing") {
        std::vector<std::size_t> seen;
        run(got, [&](const tiny_llama::LayerInput& at) {
            seen.push_back(at.layer);
            const bool prompt = seen.size() <= layers + 1;
            const std::vector<int>& tokens = prompt ? first : next;
            CHECK(at.position == (prompt ? 0 : 5));
            CHECK(std::equal(at.tokens.begin(), at.tokens.end(), tokens.begin(), tokens.end()));
            REQUIRE(at.hidden.rows == tokens.size());
            REQUIRE(at.hidden.cols == model.config().hidden);
            if (at.layer == 0) CHECK(at.hidden[1][3] == model.embedding()(tokens[1], 3));
            if (at.layer == layers && !prompt) {
                const Eigen::Map<const RowMajorMatrix> hidden(at.hidden.data, 2,
                                                              static_cast<Eigen::Index>(at.hidden.cols));
                CHECK(excess(hidden.lazyProduct(model.head().transpose()), want) < 0);
            }
        });
        CHECK((seen == std::vector<std::size_t>{0, 1, 2, 3, 4, 0, 1, 2, 3, 4}));
        CHECK(got == want);
    }
    SECTION("what it changes goes on from there") {
        for (std::size_t layer = 0; layer <= layers; ++layer) {
            run(got, [&](const tiny_llama::LayerInput& at) {
                if (at.layer == layer && at.tokens.size() == 2)
                    for (float& x : at.hidden[1]) x = -2.0F * x + 1.0F;
            });
            CAPTURE(layer);
            CHECK(got.row(0) == want.row(0));  // an earlier token knows nothing of it
            CHECK(got.row(1) != want.row(1));
        }
        run(got, [&](const tiny_llama::LayerInput& at) {
            if (at.layer == layers) std::fill_n(at.hidden.data, at.hidden.rows * at.hidden.cols, 0.0F);
        });
        CHECK(got.isZero(0.0F));
    }
    SECTION("logits that are no numbers are an error, not a token") {
        const auto spoil = [&](const tiny_llama::LayerInput& at) {
            if (at.layer == layers) at.hidden[0][0] = kvcull::quiet_nan();
        };
        CHECK_THROWS_AS(run(got, spoil), kvcull::error::state_error);
    }
}

TEST_CASE("f32 and bf16 weights, shards and an untied head give what they should",
          "[tiny_llama][differential]") {
    const Folder folder;
    const RowMajorMatrix want = logits_of(model_folder);
    const auto same = [](const std::string& name) { return Names{name}; };
    const auto keep = [](float x) { return x; };

    SECTION("f32") {
        save(folder.path / "model.safetensors", converted<float>(keep, same));
        CHECK(logits_of(folder.path) == want);
    }
    SECTION("bf16") {
        save(folder.path / "model.safetensors", converted<kvcull::bfloat16>(kvcull::to_bfloat16, same));
        const RowMajorMatrix rounded = logits_of(folder.path);
        CHECK((rounded - want).array().abs().maxCoeff() > 0);
        CHECK((rounded - want).array().abs().maxCoeff() < 0.05F * want.array().abs().maxCoeff());
    }
    SECTION("an untied head of its own") {
        save(folder.path / "model.safetensors", converted<float>(keep, [](const std::string& name) {
                 return name == "model.embed_tokens.weight" ? Names{name, "lm_head.weight"} : Names{name};
             }));
        nlohmann::json config = folder.config();
        config["tie_word_embeddings"] = false;
        folder.config(config);
        CHECK(logits_of(folder.path) == want);
    }
    SECTION("shards") {
        std::filesystem::remove(folder.path / "model.safetensors");
        const auto shard_of = [](const std::string& name) {
            return name.find("layers.2.") == std::string::npos ? "a.safetensors" : "b.safetensors";
        };
        nlohmann::json map = nlohmann::json::object();
        for (const auto& name : SafeTensors::read((model_folder / "model.safetensors").string()).names())
            map[name] = shard_of(name);
        for (const char* file : {"a.safetensors", "b.safetensors"})
            save(folder.path / file, converted<float>(keep, [&](const std::string& name) {
                     return shard_of(name) == std::string(file) ? Names{name} : Names{};
                 }));
        const auto index = folder.path / "model.safetensors.index.json";
        std::ofstream(index) << nlohmann::json{{"weight_map", map}};
        CHECK(logits_of(folder.path) == want);

        nlohmann::json wrong = map;
        wrong["model.norm.weight"] = "b.safetensors";
        std::ofstream(index) << nlohmann::json{{"weight_map", wrong}};
        CHECK_THAT(folder.complaint(), says("b.safetensors: has no tensor 'model.norm.weight'"));
        wrong["model.norm.weight"] = "../b.safetensors";
        std::ofstream(index) << nlohmann::json{{"weight_map", wrong}};
        CHECK_THAT(folder.complaint(), says("want a file name"));
        std::ofstream(index) << "{}";
        CHECK_THAT(folder.complaint(), says("'weight_map' is missing"));
        std::filesystem::remove(index);
        CHECK_THAT(folder.complaint(), says("has neither model.safetensors nor"));
    }
    SECTION("a type that is no weight") {
        save(folder.path / "model.safetensors",
             converted<std::int16_t>([](float) { return std::int16_t{0}; }, same));
        CHECK_THAT(folder.complaint(), says("dtype is I16, want F32, F16 or BF16"));
    }
    SECTION("a bias that the config does not announce") {
        save(folder.path / "model.safetensors", converted<float>(keep, [](const std::string& name) {
                 return name == "model.norm.weight" ? Names{name, "model.layers.0.self_attn.q_proj.bias"}
                                                    : Names{name};
             }));
        CHECK_THAT(folder.complaint(), says("'model.layers.0.self_attn.q_proj.bias' belongs to no part"));
    }
    SECTION("a file cut short") {
        std::filesystem::resize_file(folder.path / "model.safetensors", 1000);
        CHECK_THAT(folder.complaint(), says("model.safetensors"));
        std::filesystem::resize_file(folder.path / "model.safetensors", 0);
        CHECK_THAT(folder.complaint(), says("0 bytes are too few"));
    }
}

}  // namespace
