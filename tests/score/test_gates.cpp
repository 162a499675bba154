#include "kvcull/score/gates.hpp"

#include <map>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

/// A checkpoint that tests spoil: tensors by name, in F32.
struct File {
    struct Entry {
        std::vector<std::size_t> shape;
        std::vector<float> numbers;
    };
    std::map<std::string, Entry> tensors;
    SafeTensors::Metadata metadata;

    explicit File(bool deep, std::size_t layers = 2) {
        for (std::size_t i = 0; i < layers; ++i) {
            const std::string at = prefix(i);
            add(at + "linear1.weight", {3, 4});
            add(at + "linear1.bias", {3});
            add(at + "linear2.weight",
                deep ? std::vector<std::size_t>{3, 3} : std::vector<std::size_t>{2, 3});
            if (deep) {
                add(at + "linear2.bias", {3});
                add(at + "linear3.weight", {2, 3});
            }
            add(at + "bias", {2});
        }
    }
    static std::string prefix(std::size_t layer) {
        return "model.layers." + std::to_string(layer) + ".self_attn.retention_gate.";
    }
    void add(const std::string& name, const std::vector<std::size_t>& shape) {
        std::size_t count = 1;
        for (const std::size_t dim : shape) count *= dim;
        tensors[name] = {shape, random_floats(count, tensors.size() + 1)};
    }
    [[nodiscard]] std::vector<std::byte> bytes() const {
        std::vector<Tensor> list;
        for (const auto& [name, entry] : tensors)
            list.push_back(Tensor::of<float>(name, entry.shape, entry.numbers));
        return SafeTensors::serialize(metadata, list);
    }
    [[nodiscard]] Gates load() const { return Gates::load(SafeTensors(bytes()), "file"); }
    [[nodiscard]] std::string failure() const {
        return test::failure<error::format_error>([&] { (void)load(); });
    }
};

}  // namespace

TEST_CASE("gates come from the released tensor names, both variants, in any order", "[property]") {
    for (const bool deep : {false, true}) {
        File file(deep);
        file.add("model.layers.0.self_attn.q_proj.weight", {1});
        file.metadata = {{"hidden_act", "silu"}};
        const Gates gates = file.load();
        const Gates copy = gates;
        REQUIRE(copy.layers() == 2);
        CHECK(copy.input() == 4);
        CHECK(copy.kv_heads() == 2);
        CHECK(copy[1].deep() == deep);
        const auto same = [&](std::span<const float> got, const std::string& name) {
            const auto& want = file.tensors.at(File::prefix(1) + name).numbers;
            return same_bits(std::vector(got.begin(), got.end()), want);
        };
        std::vector<std::string> names{"linear1.weight", "linear1.bias", "linear2.weight", "bias"};
        if (deep) names.insert(names.begin() + 3, {"linear2.bias", "linear3.weight"});
        std::size_t next = 0;
        copy[1].for_each_tensor([&](std::string_view, std::span<const float> numbers, bool decays) {
            CHECK(same(numbers, names[next]));
            CHECK(decays == names[next].ends_with("weight"));
            ++next;
        });
        CHECK(next == names.size());
    }
}

TEST_CASE("half and brain floats are widened exactly", "[property]") {
    const File file(false, 1);
    std::vector<Tensor> list;
    std::vector<std::vector<float16>> halves;
    std::vector<std::vector<bfloat16>> brains;
    for (const auto& [name, entry] : file.tensors) {
        auto& half = halves.emplace_back();
        auto& brain = brains.emplace_back();
        for (const float x : entry.numbers) {
            half.push_back(to_float16(x));
            brain.push_back(to_bfloat16(x));
        }
        if (halves.size() % 2 == 0)
            list.push_back(Tensor::of<float16>(name, entry.shape, half));
        else
            list.push_back(Tensor::of<bfloat16>(name, entry.shape, brain));
    }
    const Gates gates = Gates::load(SafeTensors(SafeTensors::serialize({}, list)));
    // In the map's order: bias, linear1.bias, linear1.weight, linear2.weight.
    CHECK(same_bits(gates[0].bias[1], to_float(brains[0][1])));
    CHECK(same_bits(gates[0].b1[2], to_float(halves[1][2])));
    CHECK(same_bits(gates[0].w1[2][3], to_float(brains[2][11])));
    CHECK(same_bits(gates[0].w_out[1][2], to_float(halves[3][5])));
}

TEST_CASE("a gate tensor that is missing, left over or misshapen is a format_error that names it",
          "[contract]") {
    const std::string first = File::prefix(0), second = File::prefix(1);
    SECTION("missing") {
        for (const bool deep : {false, true})
            for (const auto& [name, entry] : File(deep).tensors) {
                if (name.ends_with("linear3.weight")) continue;  // says the variant, below
                File file(deep);
                file.tensors.erase(name);
                CHECK(file.failure().find("no tensor '" + name + "'") != std::string::npos);
            }
        File file(true);
        file.tensors.erase(second + "linear3.weight");
        CHECK(file.failure().find("no tensor '" + second + "linear3.weight'") != std::string::npos);
    }
    SECTION("a layer between others has none") {
        File file(false, 3);
        for (const char* name : {"linear1.weight", "linear1.bias", "linear2.weight", "bias"})
            file.tensors.erase(second + name);
        CHECK(file.failure().find("no tensor '" + second + "linear1.weight'") != std::string::npos);
    }
    SECTION("none at all") {
        File file(false, 0);
        file.add("other", {1});
        CHECK(file.failure() == "file: no tensor '" + first + "linear1.weight': there are no gates");
    }
    SECTION("left over") {
        for (const std::string& name : {first + "linear2.bias", second + "linear4.weight",
                                        std::string("model.layers.x.self_attn.retention_gate.bias"),
                                        std::string("model.layers.01.self_attn.retention_gate.bias")}) {
            File file(false);
            file.add(name, {2});
            CHECK(file.failure() == "file: tensor '" + name + "' belongs to no gate of variant rg");
        }
    }
    SECTION("a layer far beyond the others") {
        File file(false);
        file.add("model.layers.18446744073709551615.self_attn.retention_gate.bias", {2});
        CHECK(file.failure().find("no tensor '" + File::prefix(2) + "linear1.weight'") != std::string::npos);
    }
    SECTION("of another shape") {
        for (const bool deep : {false, true})
            for (const auto& [name, entry] : File(deep).tensors) {
                File file(deep);
                file.tensors.erase(name);
                std::vector<std::size_t> shape = entry.shape;
                shape.push_back(1);
                file.add(name, shape);
                CHECK(file.failure().find("' has shape [") != std::string::npos);
            }
        File file(false);
        file.add(second + "linear1.weight", {3, 5});
        CHECK(file.failure() == "file: '" + second + "linear1.weight' has shape [3, 5], want [3, 4]");
        File empty(false, 1);
        empty.add(first + "linear1.weight", {3, 0});
        CHECK(empty.failure() == "file: '" + first + "linear1.weight' has shape [3, 0], want numbers in it");
    }
    SECTION("numbers that are none") {
        File file(true);
        file.tensors.at(second + "linear2.weight").numbers[4] = quiet_nan();
        CHECK(file.failure() == "file: '" + second + "linear2.weight' holds a number that is not finite");
    }
    SECTION("of a type without meaning here") {
        const std::vector<double> wide(12);
        std::vector<Tensor> list{Tensor::of<double>(first + "linear1.weight", {3, 4}, wide)};
        const std::vector<float> two(2);
        list.push_back(Tensor::of<float>(first + "bias", {2}, two));
        CHECK(test::failure<error::format_error>([&] {
                  (void)Gates::load(SafeTensors(SafeTensors::serialize({}, list)), "file");
              }) == "file: '" + first + "linear1.weight' is F64, want BF16, F16 or F32");
    }
    SECTION("another activation") {
        File file(false);
        file.metadata = {{"hidden_act", "gelu"}};
        CHECK(file.failure() == "file: hidden_act is 'gelu', want 'silu'");
    }
}

TEST_CASE("a gate that overflows names layer, head and token", "[contract]") {
    File file(false);
    for (auto& [name, entry] : file.tensors)
        for (float& x : entry.numbers) x = name.ends_with("bias") ? 0.0F : 3e38F;
    const Gates gates = file.load();
    const std::vector<float> x{0, 0, 0, 0, 1, 1, 1, 1};
    std::vector<float> out(4);
    Scratch<float> workspace;
    CHECK(test::failure<error::shape_error>([&] {
              gates.log_beta(simd::kernels(), 1, {x.data(), 2, 4}, {out.data(), 2, 2}, workspace);
          }).starts_with("Gates::log_beta: gate of layer 1, head 0, token 1 is "));
    CHECK(test::failure<error::shape_error>([&] {
              gates.log_beta(simd::kernels(), 2, {x.data(), 2, 4}, {out.data(), 2, 2}, workspace);
          }) == "Gates::log_beta: layer is 2, want below 2");
}

TEST_CASE("views of the caller's weights make gates, if all layers are alike", "[contract]") {
    const File file(false), narrow(false, 1);
    const Gates gates = file.load();
    CHECK(Gates({gates[0], gates[1]}).layers() == 2);
    CHECK(Gates().empty());
    auto other = gates[1];
    other.w_out = {other.w_out.data, 1, 3};
    other.bias = other.bias.first(1);
    CHECK(test::failure<error::shape_error>([&] {
              (void)Gates({gates[0], other});
          }) == "Gates: kv_heads of layer 1 is 1, want 2");
    other = gates[1];
    other.b1 = other.b1.first(2);
    CHECK(test::failure<error::shape_error>([&] {
              (void)Gates({gates[0], other});
          }) == "Gates: b1.size() is 2, want 3");
}
