#include "replay/trace.hpp"

#include <fstream>
#include <functional>
#include <limits>
#include <map>

#include "random_trace.hpp"
#include "support/catch.hpp"

namespace {

using kvcull::DType;
using kvcull::SafeTensors;
using kvcull::Tensor;
using replay::Trace;
using replay::test::Folder;
using replay::test::random_trace;

/// A file in the making: what another program might write.
struct Draft {
    SafeTensors::Metadata metadata{{"kvcull_trace", "1"}, {"prompt_tokens", "3"}};
    std::vector<float> q = kvcull::test::random_floats(4 * 5 * 2, 1),
                       kv = kvcull::test::random_floats(2 * 5 * 2, 2);
    std::vector<std::int64_t> integers{0, 1, 2, 3, 4};
    std::map<std::string, Tensor> tensors;

    Draft() {
        add("layers.0.q", {4, 5, 2}, q);
        add("layers.0.k", {2, 5, 2}, kv);
        add("layers.0.v", {2, 5, 2}, kv);
    }
    template <class T>
    void add(const std::string& name, std::vector<std::size_t> shape, const std::vector<T>& values) {
        tensors[name] = Tensor::of<T>(name, std::move(shape), values);
    }
    void write(const std::string& path) const {
        std::vector<Tensor> list;
        for (const auto& [name, tensor] : tensors) list.push_back(tensor);
        SafeTensors::write(path, metadata, list);
    }
};

TEST_CASE("a trace comes back as it was written", "[replay][property]") {
    const Folder folder;
    Trace trace = random_trace();
    trace.tokens.assign(40, 7);
    trace.positions.back() = 1000;
    trace.shape.scale = 0.1F;
    trace.notes["source"] = "made up";
    write_trace(folder.file("t"), trace);
    const Trace back = replay::read_trace(folder.file("t"));
    CHECK(back.shape.layers == 2);
    CHECK(back.shape.q_heads == 4);
    CHECK(back.shape.kv_heads == 2);
    CHECK(back.shape.head_dim == 8);
    CHECK(back.shape.value_dim == 6);
    CHECK(back.shape.dtype == DType::f32);
    CHECK(back.shape.scale == 0.1F);
    CHECK(back.prompt == 25);
    CHECK(back.positions == trace.positions);
    CHECK(back.tokens == trace.tokens);
    CHECK(back.notes == trace.notes);
    for (std::size_t layer = 0; layer < 2; ++layer) {
        CHECK(back.layers[layer].q == trace.layers[layer].q);
        CHECK(back.layers[layer].k == trace.layers[layer].k);
        CHECK(back.layers[layer].v == trace.layers[layer].v);
    }
    CHECK(describe(back) == "25 + 15 tokens, 2 layers, 4 query heads on 2 KV heads of 8, f32");
}

TEST_CASE("a trace in 16 bits is read as the numbers that the file has", "[replay][property]") {
    const Folder folder;
    const DType dtype = GENERATE(DType::f16, DType::bf16);
    Trace trace = random_trace(dtype);
    write_trace(folder.file("t"), trace);
    const Trace back = replay::read_trace(folder.file("t"));
    CHECK(back.shape.dtype == dtype);
    for (std::size_t i = 0; i < trace.layers[1].v.size(); ++i) {
        const float x = trace.layers[1].v[i];
        CHECK(back.layers[1].v[i] ==
              (dtype == DType::f16 ? to_float(kvcull::to_float16(x)) : to_float(kvcull::to_bfloat16(x))));
    }
    trace.layers[0].k[5] = dtype == DType::f16 ? 1e6F : std::numeric_limits<float>::max();
    CHECK_THROWS_WITH(write_trace(folder.file("t"), trace),
                      contains_text("number 5 of 'layers.0.k'") && contains_text("want finite as"));
}

TEST_CASE("positions, ids and scale may be left out, and other tensors may be there", "[replay][contract]") {
    const Folder folder;
    Draft draft;
    draft.add("hidden", {5}, draft.integers);
    draft.write(folder.file("t"));
    const Trace trace = replay::read_trace(folder.file("t"));
    CHECK(trace.positions == std::vector<kvcull::position_t>{0, 1, 2, 3, 4});
    CHECK(trace.tokens.empty());
    CHECK(trace.shape.scale == 0);
    CHECK(trace.layers[0].k == draft.kv);
}

TEST_CASE("a file that is no trace is refused by tensor or key", "[replay][contract]") {
    const Folder folder;
    const auto complaint = [&](const std::function<void(Draft&)>& spoil) {
        Draft draft;
        spoil(draft);
        draft.write(folder.file("t"));
        try {
            (void)replay::read_trace(folder.file("t"));
        } catch (const kvcull::error::format_error& e) {
            return std::string(e.what());
        }
        return std::string("nothing");
    };
    const std::vector<float> few = kvcull::test::random_floats(2 * 4 * 2, 1), bad(20, kvcull::quiet_nan());
    const std::vector<double> wide(40);
    const std::vector<kvcull::float16> half(20);
    const std::vector<std::int64_t> twice{0, 1, 1, 3, 4}, negative{-1, 0, 1, 2, 3},
        large{0, 1, 2, 3, std::int64_t{1} << 60U};
    CHECK(complaint([](Draft&) {}) == "nothing");

    const auto lacks = [&](const char* name) {
        return complaint([&](Draft& draft) { draft.tensors.erase(name); });
    };
    CHECK_THAT(lacks("layers.0.q"), contains_text("no tensor 'layers.0.q'"));
    CHECK_THAT(lacks("layers.0.v"), contains_text("no tensor 'layers.0.v'"));
    const auto has = [&](const char* name, std::vector<std::size_t> shape, const auto& values) {
        return complaint([&](Draft& draft) { draft.add(name, shape, values); });
    };
    CHECK_THAT(has("layers.0.k", {2, 4, 2}, few),
               contains_text("shape of tensor 'layers.0.k' is [2, 4, 2], want [2, 5, 2]"));
    CHECK_THAT(has("layers.0.k", {2, 8}, few), contains_text("is [2, 8], want [heads, tokens, channels]"));
    CHECK_THAT(has("layers.0.q", {4, 5, 2}, wide),
               contains_text("dtype of tensor 'layers.0.q' is F64, want F32"));
    CHECK_THAT(has("layers.0.v", {2, 5, 2}, half),
               contains_text("dtype of tensor 'layers.0.v' is f16, want f32"));
    CHECK_THAT(has("layers.0.v", {2, 5, 2}, bad), contains_text("number 0 of tensor 'layers.0.v' is NaN"));
    CHECK_THAT(has("layers.0.k", {4, 5, 1}, bad), contains_text("want [4, 5, 2]"));
    CHECK_THAT(has("layers.2.q", {2, 5, 2}, bad), contains_text("no tensor 'layers.1.q'"));
    CHECK_THAT(has("layers.0.o", {2, 5, 2}, bad), contains_text("no tensor 'layers.1.q'"));
    CHECK_THAT(has("layers.0.q", {0, 5, 2}, std::vector<float>{}), contains_text("is [0, 5, 2]"));
    CHECK_THAT(has("positions", {5}, twice),
               contains_text("number 2 of tensor 'positions' is 1, want 2 to 9007199254740992"));
    CHECK_THAT(has("positions", {5}, large), contains_text("want 4 to 9007199254740992"));
    CHECK_THAT(has("tokens", {5}, large), contains_text("number 4 of tensor 'tokens'"));
    CHECK_THAT(has("positions", {5}, negative), contains_text("number 0 of tensor 'positions' is -1"));
    CHECK_THAT(has("positions", {5}, std::vector<float>(5)),
               contains_text("'positions' is F32, want I64 or I32"));
    CHECK_THAT(has("tokens", {1}, std::vector<std::int32_t>(1)), contains_text("'tokens' is [1], want [5]"));
    CHECK_THAT(complaint([&](Draft& draft) {
                   draft.add("layers.0.q", {3, 5, 2}, std::vector<float>(30));
               }),
               contains_text("heads of tensor 'layers.0.q' is 3, want a multiple of the 2"));

    const auto says = [&](const char* key, const char* value) {
        return complaint([&](Draft& draft) { draft.metadata[key] = value; });
    };
    CHECK_THAT(complaint([](Draft& draft) { draft.metadata.clear(); }),
               contains_text("metadata 'kvcull_trace' is missing, want 1"));
    CHECK_THAT(says("kvcull_trace", "2"), contains_text("'kvcull_trace' is 2, want 1"));
    CHECK_THAT(complaint([](Draft& draft) { draft.metadata.erase("prompt_tokens"); }),
               contains_text("'prompt_tokens' is missing, want 1 to 4"));
    for (const char* prompt : {"0", "5", "-1", "3.0", "", "99999999999999999999"})
        CHECK_THAT(says("prompt_tokens", prompt), contains_text("want 1 to 4"));
    for (const char* scale : {"0", "inf", "nan", "1e99", "x"})
        CHECK_THAT(says("scale", scale), contains_text("metadata 'scale' is"));
}

TEST_CASE("a truncated or foreign file is refused", "[replay][contract]") {
    using kvcull::error::format_error;
    const Folder folder;
    Draft().write(folder.file("t"));
    const auto whole = std::filesystem::file_size(folder.file("t"));
    for (const std::uintmax_t size : {whole - 1, whole / 2, std::uintmax_t{9}, std::uintmax_t{0}}) {
        std::filesystem::resize_file(folder.file("t"), size);
        CHECK_THROWS_AS(replay::read_trace(folder.file("t")), format_error);
    }
    std::ofstream(folder.file("t")) << "{\"layers\": []}";
    CHECK_THROWS_AS(replay::read_trace(folder.file("t")), format_error);
    CHECK_THROWS_AS(replay::read_trace(folder.file("none")), format_error);
    CHECK_THROWS_AS(replay::read_trace(folder.path.string()), format_error);
}

}  // namespace
