#include "episodes.hpp"

#include <unistd.h>

#include <fstream>
#include <kvcull/base/error.hpp>
#include <kvcull/base/memory.hpp>
#include <nlohmann/json.hpp>

#include "shipped.hpp"
#include "support/catch.hpp"
#include "support/failure.hpp"

namespace {

namespace fs = std::filesystem;
using kvcull::test::failure;
using nlohmann::json;
using tiny_llama::Asked;
using tiny_llama::EpisodeComparison;
using tiny_llama::EpisodeMethod;
using tiny_llama::Setting;
using tiny_llama::Task;
using tiny_llama::test::model;
using tiny_llama::test::model_folder;
using tiny_llama::test::task;

double accuracy(const EpisodeComparison& all, Asked asked) {
    return all[asked].right / static_cast<double>(all[asked].questions);
}
double kept(const EpisodeComparison& all, Asked asked) {
    return all[asked].kept / static_cast<double>(all[asked].questions);
}
double topic_kept(const EpisodeComparison& all, Asked asked) {
    return all[asked].topic_kept / static_cast<double>(all[asked].questions);
}
EpisodeComparison compare(const std::string& policy, std::size_t budget, const Task& of, std::size_t cases) {
    return compare_episodes(model(), *tiny_llama::episode_method(policy), {policy, {.tokens = budget}}, of,
                            cases, 1);
}

/// A conversation of `topics` in `segments`, sentence by sentence, in a file of its own.
struct Talk {
    const fs::path path = fs::temp_directory_path() / ("kvcull_test_episodes_" + std::to_string(::getpid()));
    ~Talk() { fs::remove(path); }
    Talk(const Talk&) = delete;
    Talk& operator=(const Talk&) = delete;

    Talk(std::size_t topics, std::size_t segments, std::size_t facts, bool embeddings) {
        kvcull::SplitMix64 random{7};
        const auto of = [&](int first, int count) {
            return first + static_cast<int>(random.uniform() * count);
        };
        json prompt{1}, spans = json::array(), vectors = json::array(), questions = json::array();
        int name = 24;
        for (std::size_t s = 0; s < segments; ++s) {
            const std::size_t begin = s == 0 ? 0 : prompt.size(), about = s % topics;
            const int topic = 8 + static_cast<int>(about);
            std::vector<double> unit(topics, 0.1);
            unit[about] = 1;
            for (std::size_t i = 0; i < facts; ++i) {
                const int value = of(152, 128);
                for (const int token : {topic, name, value, 2}) prompt.push_back(token);
                for (const int token : {topic, of(280, 168), of(280, 168), of(280, 168), 2})
                    prompt.push_back(token);
                json question{{"ask", {3, name}}, {"answer", {value}}};
                if (embeddings)
                    question["embedding"] = unit;  // and no word of what the question is about
                else
                    question["topic"] = topic;
                if (i == 0) questions.push_back(question);
                ++name;
            }
            spans.push_back(json::array({begin, prompt.size()}));
            vectors.push_back(unit);
        }
        json example{{"prompt", prompt}, {"segments", spans}, {"questions", questions}};
        if (embeddings) example["embeddings"] = vectors;
        std::ofstream(path) << json{{"task", "talk"}, {"cases", json::array({example})}};
    }
};

TEST_CASE("the matched episode keeps what a question looks at, another one does not",
          "[tiny_llama][property]") {
    const EpisodeComparison all = compare("epicache:episodes=4", 96, task("topics"), 2);
    for (const Asked asked : {Asked::single, Asked::infinipot, Asked::kvzip, Asked::snapkv, Asked::oracle,
                              Asked::keydiff, Asked::streaming, Asked::routed, Asked::matched})
        CHECK(all[asked].questions == all[Asked::full].questions);
    CHECK(all[Asked::wrong].questions == 3 * all[Asked::full].questions);
    CHECK(accuracy(all, Asked::full) == 1);
    CHECK(kept(all, Asked::full) == Approx(1).margin(1e-6));
    for (const auto share : {kept, topic_kept}) {
        CHECK(share(all, Asked::matched) > share(all, Asked::single));
        CHECK(share(all, Asked::single) > share(all, Asked::wrong));
    }
    CHECK(topic_kept(all, Asked::full) == Approx(1).margin(1e-6));
    CHECK(topic_kept(all, Asked::matched) > topic_kept(all, Asked::wrong) + 0.1);
    CHECK(kept(all, Asked::oracle) > kept(all, Asked::matched));
    CHECK(accuracy(all, Asked::matched) > accuracy(all, Asked::wrong) + 0.2);
}

TEST_CASE(
    "other conversations work: more topics and segments, or fewer, with the file's embeddings or without",
    "[tiny_llama][property]") {
    const bool embeddings = GENERATE(false, true);
    const auto [topics, segments, facts] =
        GENERATE(table<std::size_t, std::size_t, std::size_t>({{2, 5, 3}, {6, 18, 2}}));
    CAPTURE(embeddings, topics, segments);
    const Talk talk(topics, segments, facts, embeddings);
    const Task of = task(talk.path.string());
    REQUIRE(of.cases[0].segments.size() == segments);
    const std::string policy = "epicache:episodes=" + std::to_string(topics);
    const EpisodeComparison all = compare(policy, 48, of, 1);
    CHECK(all[Asked::full].questions == segments);
    CHECK(all[Asked::wrong].questions == (topics - 1) * segments);
    CHECK(kept(all, Asked::matched) > kept(all, Asked::wrong));
    CHECK(all.found == segments);  // routing finds the episode: by the file's vectors or the topic's word
    const Setting setting{policy, {.tokens = 48}};
    kvcull::BlockPool pool;
    const auto outcome = tiny_llama::run_case(model(), setting, of.cases[0], 0, pool);
    CHECK(outcome.questions == segments);
    CHECK(static_cast<double>(outcome.correct) == all[Asked::routed].right);
}

TEST_CASE("a budget that holds the history answers as the full cache does, in every episode",
          "[tiny_llama][property]") {
    const EpisodeComparison all = compare("epicache:episodes=3,block=100", 1000, task("topics"), 1);
    for (std::size_t i = 0; i < all.answers.size(); ++i) {
        CAPTURE(tiny_llama::asked_names[i]);
        const auto asked = static_cast<Asked>(i);
        CHECK(accuracy(all, asked) == 1);
        CHECK(kept(all, asked) == Approx(1).margin(1e-6));
    }
}

TEST_CASE("a method is read from its name, and what is wrong with it is said", "[tiny_llama][contract]") {
    CHECK(!tiny_llama::episode_method("snapkv"));
    CHECK(!tiny_llama::episode_method("epicaches"));
    CHECK(tiny_llama::episode_method("epicache")->episodes == 4);
    const EpisodeMethod method = *tiny_llama::episode_method(
        "epicache:episodes=2,block=7,route=dot,embedding=mean,heads=uniform,recent=3");
    CHECK(method.settings().episodes == 2);
    CHECK(method.settings().block == 7);
    CHECK(method.settings().route == kvcull::Likeness::dot);
    CHECK(method.embedding == tiny_llama::Embedding::mean);
    CHECK(method.policy.heads == kvcull::HeadBudget::uniform);
    CHECK(method.policy.recent == 3);
    CHECK_THAT(
        failure<kvcull::error::config_error>([] { (void)tiny_llama::episode_method("epicache:lag=2"); }),
        contains_text("\"lag\", want one of episodes, representatives, block"));
    kvcull::BlockPool pool;
    CHECK(failure<kvcull::error::config_error>([&] {
              (void)tiny_llama::run_case(model(), {"epicache", {.tokens = 96}}, task("needle").cases[0], 0,
                                         pool);
          }) == "epicache: segments is empty, want a case with segments");
    CHECK_THROWS_AS(tiny_llama::check(model(), {"epicache:episodes=0", {.tokens = 96}}, 100),
                    kvcull::error::config_error);
    CHECK_THROWS_AS(tiny_llama::check(model(), {"epicache:recent=100", {.tokens = 96}}, 100),
                    kvcull::error::config_error);
}

}  // namespace
