#include "world.hpp"

#include <algorithm>
#include <kvcull/base/error.hpp>
#include <map>
#include <set>

#include "support/catch.hpp"

namespace {

bool in(int token, int first, int count) {
    return token >= first && token < first + count;
}
/// Sentences, each with its full stop; what thinking begins and ends with is one of its own.
std::vector<std::vector<int>> sentences(const std::vector<int>& tokens) {
    std::vector<std::vector<int>> all(1);
    for (std::size_t t = 1; t < tokens.size(); ++t) {
        all.back().push_back(tokens[t]);
        if (tokens[t] == 2 || tokens[t] == 4 || tokens[t] == 5) all.emplace_back();
    }
    all.pop_back();  // cut off, or empty
    return all;
}

}  // namespace

TEST_CASE("documents are made of the language's sentences and a name has one value",
          "[tiny_llama][property]") {
    std::map<char, int> seen;
    for (std::uint64_t seed = 0; seed < 60; ++seed) {
        const std::vector<int> tokens = tiny_llama::world_document(seed, 200);
        REQUIRE(tokens.size() == 200);
        REQUIRE(tokens[0] == 1);
        REQUIRE(tokens == tiny_llama::world_document(seed, 200));
        std::map<int, int> value;
        bool thinking = false;
        for (const std::vector<int>& s : sentences(tokens)) {
            char kind = '?';
            const auto recalls = [&](std::size_t at) {
                return value.contains(s[at]) && value[s[at]] == s[at + 1];
            };
            if (s.size() == 1 && (s[0] == 4 || s[0] == 5)) {
                kind = 't';
                thinking = s[0] == 4;
            } else if (s.size() == 4 && in(s[0], 8, 16) && in(s[1], 24, 128) && in(s[2], 152, 128)) {
                kind = value.emplace(s[1], s[2]).second ? 'f' : '!';
            } else if (in(s[0], 8, 16) && s.size() >= 4 && s.size() <= 8 &&
                       std::all_of(s.begin() + 1, s.end() - 1, [](int t) { return in(t, 280, 168); })) {
                kind = 'w';
            } else if (s.size() == 4 && (s[0] == 6 || s[0] == 7)) {
                kind = thinking && recalls(1) ? 'r' : '!';
            } else if (s.size() == 4 && s[0] == 3 && s[1] == 3) {
                kind = value.contains(s[2]) ? 'a' : '!';
            } else if (s.size() == 4 && s[0] == 3) {
                kind = recalls(1) ? 'q' : '!';
            }
            ++seen[kind];
        }
    }
    CHECK(seen['!'] == 0);
    CHECK(seen['?'] == 0);
    for (const char kind : {'f', 'w', 'r', 'a', 'q', 't'}) CHECK(seen[kind] > 10);
    CHECK(tiny_llama::world_document(1, 200) != tiny_llama::world_document(2, 200));
}

TEST_CASE("a name recalls its value in questions and thoughts, not in facts and announcements",
          "[tiny_llama][property]") {
    const std::vector<int> tokens{1, 8, 24, 152, 2, 3, 24, 152, 2, 3, 3, 24, 2, 6, 24, 152, 2, 3, 24};
    std::vector<std::uint8_t> want(tokens.size());
    want[6] = want[14] = 1;  // the last question was cut off before its answer
    CHECK(tiny_llama::recalls(tokens) == want);
    CHECK(tiny_llama::recalls({}).empty());
}

TEST_CASE("the questions of a task ask for what its document says", "[tiny_llama][property]") {
    for (const std::string_view name : tiny_llama::world_tasks) {
        const tiny_llama::Task task = tiny_llama::world_task(name, 3, 4);
        CAPTURE(task.name);
        REQUIRE(task.cases.size() == 4);
        CHECK(task.cases[0].prompt != task.cases[1].prompt);
        CHECK(task.cases[0].prompt == tiny_llama::world_task(name, 3, 1).cases[0].prompt);
        for (const tiny_llama::Case& made : task.cases) {
            std::vector<int> tokens = made.prompt;
            tokens.insert(tokens.end(), made.stream.begin(), made.stream.end());
            CHECK(tokens[0] == 1);
            CHECK((tokens.size() > 380 && tokens.size() < 600));
            CHECK(made.stream.empty() == (name != "thoughts"));
            CHECK((made.questions.size() == 1) == (name == "asked"));
            std::map<int, int> value;
            for (const std::vector<int>& s : sentences(tokens))
                if (s.size() == 4 && in(s[0], 8, 16) && in(s[1], 24, 128)) value[s[1]] = s[2];
            std::set<int> asked;
            for (const tiny_llama::Question& question : made.questions) {
                REQUIRE(question.ask.size() == 2);
                CHECK(question.ask[0] == 3);
                CHECK(asked.insert(question.ask[1]).second);
                CHECK(question.answer == std::vector{value.at(question.ask[1])});
            }
            if (name == "asked") {
                const std::vector<int> last(tokens.end() - 4, tokens.end());
                CHECK(last == std::vector{3, 3, made.questions[0].ask[1], 2});
            }
        }
    }
    CHECK_THROWS_AS(tiny_llama::world_task("needles", 1, 1), kvcull::error::config_error);
}
