#include "steering.hpp"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <kvcull/base/safetensors.hpp>
#include <kvcull/cache/kv_cache.hpp>
#include <kvcull/policies/streaming.hpp>
#include <string>
#include <vector>

#include <unistd.h>

#include "evaluate.hpp"
#include "full_cache.hpp"
#include "shipped.hpp"
#include "support/catch.hpp"

namespace {

using namespace tiny_llama;
using kvcull::Thought;
using tiny_llama::test::model;

/// A file of this process, gone with the value.
struct File {
    std::string path =
        (std::filesystem::temp_directory_path() / ("kvcull_steering_" + std::to_string(::getpid()))).string();

    ~File() { std::filesystem::remove(path); }
};
/// Facts to think about.
const std::vector<int> facts{1, 12, 113, 248, 2, 12, 40, 170, 2, 12, 77, 201, 2};

/// A word for every token, so that thoughts are told by "wait".
std::vector<std::string> words() {
    std::vector<std::string> all(model().config().vocabulary, "word");
    all[word::wait] = "Wait";
    return all;
}

TEST_CASE("a chain of thought is what the model says, up to a length", "[tiny_llama][property]") {
    const auto thought = [&](const Thinking& how, std::size_t& read) {
        FullCache cache(model().config().layers, model().config().kv_heads);
        Reader reader{model()};
        reader.read(facts, cache);
        const std::vector<int> said = think(reader, cache, how);
        read = cache.seen();
        return said;
    };
    std::size_t read = 0;
    const Thinking how{.most = 40, .temperature = 1.0, .seed = 5};
    const std::vector<int> said = thought(how, read);
    CHECK(read == facts.size() + said.size() + 2);
    CHECK(said.size() <= 40);
    CHECK(std::count(said.begin(), said.end(), int{word::end_think}) == 0);
    CHECK(thought(how, read) == said);
    CHECK(thought({.most = 40, .temperature = 1.0, .seed = 6}, read) != said);
    const std::vector<int> likeliest = thought({.most = 12, .temperature = 0.0}, read),
                           cold = thought({.most = 12, .temperature = 1e-6, .seed = 9}, read);
    CHECK(cold == likeliest);
    // In the tiny world a thought restates a fact or is filler.
    CHECK(std::count(said.begin(), said.end(), int{word::stop}) > 3);
}

TEST_CASE("thoughts are labelled by their words and known by the full stop before them",
          "[tiny_llama][differential]") {
    const Thinking how{.most = 60, .seed = 3};
    for (const std::size_t layer : {std::size_t{0}, std::size_t{2}, model().config().layers}) {
        Thoughts thoughts;
        add_thoughts(model(), facts, how, words(), layer, thoughts);

        // All of it again, at once.
        std::vector<int> text = facts;
        {
            FullCache cache(model().config().layers, model().config().kv_heads);
            Reader reader{model()};
            reader.read(facts, cache);
            const std::vector<int> said = think(reader, cache, how);
            text.push_back(word::think);
            text.insert(text.end(), said.begin(), said.end());
        }
        std::vector<float> want;
        std::vector<Thought> labels;
        FullCache cache(model().config().layers, model().config().kv_heads);
        RowMajorMatrix logits;
        model().forward(text, cache, logits, Llama::Logits::last, [&](const LayerInput& at) {
            if (at.layer != layer) return;
            for (std::size_t t = facts.size(); t + 1 < text.size(); ++t) {
                const auto next = text.begin() + static_cast<std::ptrdiff_t>(t + 1);
                if (text[t] != word::stop || std::find(next, text.end(), int{word::stop}) == text.end())
                    continue;
                want.insert(want.end(), at.hidden[t].begin(), at.hidden[t].end());
                labels.push_back(*next == word::wait ? Thought::reflection : Thought::execution);
            }
        });
        CAPTURE(layer);
        REQUIRE(labels.size() > 5);
        CHECK(thoughts.labels == labels);
        REQUIRE(thoughts.hidden.size() == want.size());
        bool near = true;
        for (std::size_t i = 0; i < want.size(); ++i)
            near = near && std::fabs(thoughts.hidden[i] - want[i]) < 1e-3F + 1e-3F * std::fabs(want[i]);
        CHECK(near);
    }
}

TEST_CASE("a vector comes back from its file with the words of the tiny world", "[tiny_llama][property]") {
    const File file;
    const std::vector<float> vector{1.0F, -2.0F, 0.25F};
    write_steering(file.path, vector, 3);
    const kvcull::Steering steering = read_steering(file.path);
    CHECK(steering.vector == vector);
    CHECK(steering.layer == 3);
    CHECK(steering.delimiters.contains(word::stop));
    CHECK(steering.markers.contains(word::wait));
    CHECK(steering.steer_at.contains(word::stop));
    CHECK(steering.think_start == word::think);
    CHECK(steering.think_end == word::end_think);
    kvcull::SafeTensors::write(file.path, {{"layer", "x"}},
                               {{kvcull::Tensor::of<float>("vector", {3}, vector)}});
    CHECK_THROWS_WITH(read_steering(file.path), contains_text("'layer' is x, want a number"));
    kvcull::SafeTensors::write(file.path, {}, {{kvcull::Tensor::of<float>("vector", {3}, vector)}});
    CHECK_THROWS_WITH(read_steering(file.path), contains_text("'layer' is missing"));
    kvcull::SafeTensors::write(file.path,
                               {{"layer", "0"},
                                {"delimiters", "2+5"},
                                {"markers", "3+5"},
                                {"steer_at", "2"},
                                {"think_start", "4"},
                                {"think_end", "6"}},
                               {{kvcull::Tensor::of<float>("vector", {3}, vector)}});
    CHECK_THROWS_WITH(read_steering(file.path),
                      contains_text("'markers' is 3+5, want ids that end no sentence, as 2+5 do"));
}

TEST_CASE("the model is steered at full stops of its thoughts, in one layer, and nowhere else",
          "[tiny_llama][property]") {
    const std::size_t size = model().config().hidden;
    const kvcull::Steering by{.vector = std::vector<float>(size, 1.0F),
                              .layer = 2,
                              .steer_at = {word::stop},
                              .think_start = word::think,
                              .think_end = word::end_think,
                              .alpha0 = 0.5F};
    /// Which rows of a call are moved.
    const auto moved = [&](Hook& hook, std::size_t layer, kvcull::position_t at, std::vector<int> tokens) {
        std::vector<float> rows(tokens.size() * size);
        hook({layer, at, tokens, {rows.data(), tokens.size(), size}});
        std::vector<bool> all;
        for (std::size_t t = 0; t < tokens.size(); ++t) {
            all.push_back(rows[t * size] != 0.0F);
            for (std::size_t c = 0; c < size; ++c) CHECK(rows[t * size + c] == (all.back() ? 0.5F : 0.0F));
        }
        return all;
    };
    using Rows = std::vector<bool>;
    Hook hook = steer(model(), by, 6);
    CHECK((moved(hook, 2, 0, {word::think, 9, word::stop}) == Rows{false, false, false}));  // more follows
    CHECK((moved(hook, 2, 3, {9, word::stop, word::stop}) == Rows{false, false, true}));
    CHECK((moved(hook, 1, 6, {word::stop}) == Rows{false}));
    CHECK((moved(hook, 2, 6, {word::stop}) == Rows{true}));
    CHECK((moved(hook, 2, 7, {9}) == Rows{false}));
    Hook other = hook;
    CHECK((moved(hook, 2, 8, {word::end_think}) == Rows{false}));
    CHECK((moved(hook, 2, 9, {word::stop}) == Rows{false}));
    CHECK((moved(other, 2, 8, {word::stop}) == Rows{true}));  // a copy remembers for itself

    kvcull::Steering wrong = by;
    wrong.vector.pop_back();
    CHECK_THROWS_AS(steer(model(), wrong, 6), kvcull::error::config_error);
    wrong = by;
    wrong.layer = 5;
    CHECK_THROWS_AS(steer(model(), wrong, 6), kvcull::error::config_error);
    wrong.layer = 4;
    CHECK_NOTHROW(steer(model(), wrong, 6));
}

TEST_CASE("any policy takes a vector, and its strength", "[tiny_llama][property]") {
    const File file;
    const std::size_t size = model().config().hidden;
    std::vector<float> vector(size);
    const Task task = tiny_llama::test::task("thoughts");
    const auto run = [&](const std::string& policy, std::size_t most = 48) {
        return run_task(model(), {policy, {.tokens = 64}}, task, 2, 0, 1, {.most = most});
    };
    const auto same = [](const Row& a, const Row& b) {
        return a.thought_tokens == b.thought_tokens && a.second_thoughts == b.second_thoughts &&
               a.kept == b.kept && a.accuracy == b.accuracy;
    };
    write_steering(file.path, vector, 2);
    const std::string steer = "steer=" + file.path;
    for (const std::string policy : {"h2o", "rkv:interval=16", "laq++"}) {
        const Row plain = run(policy);
        CHECK(plain.thought_tokens > 0);
        CHECK(plain.second_thoughts > 0);
        const std::string steered = policy + (policy.find(':') == std::string::npos ? ":" : ",") + steer;
        CHECK(same(run(steered), plain));  // by a vector of zeros
    }
    // Away from "wait" after the last norm: after a full stop it says that no more.
    for (std::size_t c = 0; c < size; ++c)
        vector[c] = -model().head()(word::wait, static_cast<Eigen::Index>(c));
    write_steering(file.path, vector, 4);
    CHECK(run("h2o").second_thoughts > 1);
    CHECK(run("h2o:alpha0=100," + steer).second_thoughts <= 1);  // the first one follows no full stop
    CHECK(run("h2o:alpha0=0,gamma=0," + steer).second_thoughts == run("h2o").second_thoughts);
    CHECK(run("h2o:alpha0=100,alpha_max=0," + steer).second_thoughts == run("h2o").second_thoughts);
    CHECK_THROWS_AS(run("h2o:steer=" + file.path + ".none"), kvcull::error::format_error);
    CHECK_THROWS_AS(run("h2o:alpha0=-1," + steer), kvcull::error::config_error);
    write_steering(file.path, std::span(vector).first(size - 1), 4);
    CHECK_THROWS_AS(check(model(), {"h2o:" + steer, {.tokens = 64}}, 65), kvcull::error::config_error);
}

}  // namespace
