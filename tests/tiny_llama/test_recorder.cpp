#include "recorder.hpp"

#include <algorithm>
#include <cmath>
#include <kvcull/base/error.hpp>

#include "full_cache.hpp"
#include "shipped.hpp"
#include "support/catch.hpp"

namespace {

using replay::Trace;
using tiny_llama::Case;
using tiny_llama::test::model;

Case first_case(const std::string& task) {
    return tiny_llama::test::task(task).cases[0];
}

TEST_CASE("the shipped traces are what the shipped model gives", "[tiny_llama][golden]") {
    const auto [task, decode] = GENERATE(table<std::string, std::size_t>({{"needle", 0}, {"thoughts", 240}}));
    const Trace shipped = replay::read_trace(KVCULL_TRACES_DIR "/" + task + ".safetensors");
    const Trace made = record(model(), first_case(task), {.layers = {1, 3}, .decode = decode});
    CHECK(shipped.tokens == made.tokens);
    CHECK(shipped.positions == made.positions);
    CHECK(shipped.prompt == made.prompt);
    CHECK(describe(shipped) == describe(made));
    REQUIRE(shipped.layers.size() == made.layers.size());
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
        return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float x, float y) {
            return std::fabs(x - y) <=
                   1e-3F + 2e-3F * std::fabs(y);  // two units of f16, and another processor's sums
        });
    };
    for (std::size_t i = 0; i < made.layers.size(); ++i) {
        CHECK(same(shipped.layers[i].q, made.layers[i].q));
        CHECK(same(shipped.layers[i].k, made.layers[i].k));
        CHECK(same(shipped.layers[i].v, made.layers[i].v));
    }
}

TEST_CASE("a recording holds what the layers gave to their cache", "[tiny_llama][differential]") {
    struct Spy : FullCache {  // the rows of layer 2, head by head
        using FullCache::FullCache;
        std::vector<std::vector<float>> k{2}, v{2}, q{4};
        static void add(std::vector<std::vector<float>>& to, const kvcull::HeadsView<const float>& rows) {
            for (std::size_t head = 0; head < rows.heads; ++head)
                for (std::size_t t = 0; t < rows.tokens; ++t)
                    to[head].insert(to[head].end(), rows.row(head, t), rows.row(head, t) + rows.dim);
        }
        void append(std::size_t layer, kvcull::HeadsView<const float> new_k,
                    kvcull::HeadsView<const float> new_v, const kvcull::AppendInputs& /*inputs*/) {
            if (layer == 2) add(k, new_k), add(v, new_v);
            FullCache::append(layer, new_k, new_v);
        }
        void attend(std::size_t layer, kvcull::HeadsView<const float> new_q, kvcull::HeadsView<float> out) {
            if (layer == 2) add(q, new_q);
            FullCache::attend(layer, new_q, out);
        }
    };
    Case example{
        .prompt = {1, 8, 24, 152, 2, 9, 30, 160, 2}, .stream = {6, 24}, .questions = {{{3, 24}, {152}}}};
    const Trace trace =
        record(model(), example, {.layers = {3, 2}, .decode = 7, .dtype = kvcull::DType::f32});
    REQUIRE(trace.size() == 16);
    CHECK(trace.prompt == 9);
    CHECK(std::equal(example.prompt.begin(), example.prompt.end(), trace.tokens.begin()));
    CHECK(std::vector(trace.tokens.begin() + 9, trace.tokens.begin() + 13) == std::vector{6, 24, 3, 24});
    CHECK(trace.notes.at("model_layers") == "3,2");

    Spy spy(4, 2);
    tiny_llama::RowMajorMatrix logits;
    for (std::size_t t = 0; t < trace.size(); ++t) {
        if (t >= 13) {  // an answer of one token, and two that nobody asked for
            Eigen::Index best = 0;
            logits.row(0).maxCoeff(&best);
            CHECK(trace.tokens[t] == static_cast<int>(best));
        }
        model().forward(std::span(trace.tokens).subspan(t, 1), spy, logits);
    }
    const auto same = [&](const std::vector<float>& recorded, const std::vector<std::vector<float>>& seen) {
        std::vector<float> all;
        for (const auto& head : seen) all.insert(all.end(), head.begin(), head.end());
        return std::equal(all.begin(), all.end(), recorded.begin(), recorded.end(),
                          [](float x, float y) { return std::fabs(x - y) <= 1e-4F + 1e-4F * std::fabs(y); });
    };
    CHECK(same(trace.layers[1].q, spy.q));
    CHECK(same(trace.layers[1].k, spy.k));
    CHECK(same(trace.layers[1].v, spy.v));
}

TEST_CASE("what cannot be recorded is refused", "[tiny_llama][contract]") {
    using kvcull::error::config_error;
    const Case example{.prompt = {1, 8}};
    CHECK_THROWS_AS(record(model(), example, {}), config_error);
    CHECK_THROWS_AS(record(model(), example, {.layers = {4}, .decode = 1}), config_error);
    CHECK_THROWS_AS(record(model(), {}, {.decode = 1}), std::invalid_argument);
}

}  // namespace
