#include "tasks.hpp"

#include <unistd.h>

#include <fstream>
#include <kvcull/base/error.hpp>
#include <nlohmann/json.hpp>

#include "support/catch.hpp"

namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using tiny_llama::Case;
using tiny_llama::Kind;
using tiny_llama::Task;

const fs::path model_folder = TINY_LLAMA_MODEL_DIR;
constexpr std::size_t vocabulary = 448;
using Names = std::vector<std::string>;

Names names_of(const std::vector<Task>& tasks) {
    Names names;
    for (const Task& task : tasks) names.push_back(task.name);
    return names;
}
std::vector<Task> read(const Names& where, const fs::path& home = model_folder) {
    return tiny_llama::read_tasks(where, home, vocabulary);
}
std::string complaint(const Names& where, const fs::path& home = model_folder) {
    try {
        read(where, home);
        return "";
    } catch (const kvcull::error::format_error& e) {
        return e.what();
    }
}
auto says(const std::string& text) {
    return contains_text(text);
}

struct Folder {
    const fs::path path = fs::temp_directory_path() / ("kvcull_test_tasks_" + std::to_string(::getpid()));
    Folder() {
        fs::remove_all(path);
        fs::create_directories(path);
    }
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;
    ~Folder() { fs::remove_all(path); }
    std::string write(const std::string& name, const json& value) const {
        std::ofstream(path / name) << value;
        return (path / name).string();
    }
};

TEST_CASE("tasks are found by folder, file and name", "[tiny_llama][contract]") {
    const Names all{"asked", "needle", "thoughts", "topics"};
    CHECK(names_of(read({})) == all);
    CHECK(names_of(read({model_folder.string()})) == all);
    CHECK(names_of(read({"topics", "needle"})) == Names{"topics", "needle"});
    CHECK(names_of(read({(model_folder / "asked.json").string()})) == Names{"asked"});

    const std::vector<Task> thoughts = read({"thoughts"});
    REQUIRE(thoughts[0].cases.size() == 48);
    CHECK(thoughts[0].cases[0].prompt.size() == 65);
    CHECK(thoughts[0].cases[0].stream.size() == 356);
    CHECK(thoughts[0].cases[0].size() == 421);
    CHECK(thoughts[0].cases[0].questions.size() == 8);
    CHECK(thoughts[0].cases[0].questions[0].ask.size() == 2);
    CHECK(thoughts[0].cases[0].segments.empty());

    const tiny_llama::Case talk = read({"topics"})[0].cases[0];
    REQUIRE(talk.segments.size() == 12);
    CHECK(talk.segments[1].begin == 36);
    CHECK(talk.segments[11].end == talk.prompt.size());
    CHECK(talk.segments[0].embedding.empty());
    CHECK(talk.questions[0].topic == 9);
}

TEST_CASE("a task that is not there is an error that lists those that are", "[tiny_llama][contract]") {
    CHECK_THAT(complaint({"nedle"}), says("task nedle") && says("are: asked, needle, thoughts, topics"));
    CHECK_THAT(complaint({"needle", "needle"}), says("'needle' is given twice"));
    CHECK_THAT(complaint({(model_folder / "vocab.json").string()}), says("want an object"));
    CHECK_THAT(complaint({(model_folder / "config.json").string()}), says("'task' is missing"));
    const Folder folder;
    CHECK_THAT(complaint({folder.path.string()}), says("holds no JSON file"));
    CHECK_THAT(complaint({}, folder.path), says("holds no JSON file"));
}

TEST_CASE("a malformed task names file, place, got and want", "[tiny_llama][contract]") {
    const Folder folder;
    const json question{{"ask", {3, 4}}, {"answer", {5}}};
    const json good{{"task", "t"}, {"cases", {{{"prompt", {1, 2}}, {"questions", {question}}}}}};
    const auto with = [&](const char* pointer, const json& value) {
        json changed = good;
        changed[json::json_pointer(pointer)] = value;
        return complaint({folder.write("t.json", changed)});
    };
    REQUIRE(complaint({folder.write("t.json", good)}).empty());
    CHECK_THAT(with("/cases/0/prompt/1", 448),
               says("t.json: cases[0]: 'prompt[1]' is 448, want a token id below 448"));
    CHECK_THAT(with("/cases/0/prompt/1", -1), says("'prompt[1]' is -1, want a token id"));
    CHECK_THAT(with("/cases/0/prompt/1", "a"), says("'prompt[1]' is \"a\", want a token id"));
    CHECK_THAT(with("/cases/0/prompt", json::array()), says("'prompt' is [], want at least one token"));
    CHECK_THAT(with("/cases/0/prompt", nullptr), says("'prompt' is missing"));
    CHECK_THAT(with("/cases/0/stream", 1), says("'stream' is 1, want a list"));
    CHECK_THAT(with("/cases/0/questions/0/ask", json::array()), says("cases[0]: questions[0]: 'ask' is []"));
    CHECK_THAT(with("/cases/0/questions/0/answer", json::array()), says("'answer' is []"));
    CHECK_THAT(with("/cases/0/questions/0", 7), says("is 7, want an object"));
    CHECK_THAT(with("/cases/0/segments", json::parse("[[0,3]]")), says("pairs begin < end, not beyond 2"));
    CHECK_THAT(with("/cases/0/segments", json::parse("[[1,1]]")), says("pairs begin < end"));
    CHECK_THAT(with("/cases/0/segments", json::parse(R"([[0,"b"]])")), says("pairs begin < end"));
    CHECK_THAT(with("/cases/0/questions/0/topic", 448), says("want a token id below 448"));
    CHECK_THAT(with("/cases/0/questions/0/embedding", json{1, "a"}),
               says("'embedding' is [1,\"a\"], want numbers"));
    CHECK_THAT(with("/cases", json::array()), says("'cases' is [], want at least one case"));
    CHECK_THAT(with("/task", 3), says("'task' is 3, want a string"));
    CHECK_THAT(with("/cases", nullptr), says("'cases' is missing"));
    std::ofstream(folder.path / "t.json") << "{\"task\": ";
    CHECK_THAT(complaint({(folder.path / "t.json").string()}), says("t.json: ") && says("parse error"));
}

TEST_CASE("a file may bring embeddings, one for each of its segments", "[tiny_llama][contract]") {
    const Folder folder;
    const json question{{"ask", {3, 4}}, {"answer", {5}}, {"embedding", {0.5, 2}}};
    json example{{"prompt", {1, 2, 3}}, {"questions", {question}}, {"segments", {{0, 1}, {1, 3}}}};
    example["embeddings"] = {{1, 0.5}, {0, 1}};
    const auto file = [&] {
        return folder.write("t.json", {{"task", "t"}, {"cases", json::array({example})}});
    };
    const tiny_llama::Case one = read({file()})[0].cases[0];
    CHECK(one.segments[0].embedding == std::vector<float>{1, 0.5F});
    CHECK(one.segments[1].embedding == std::vector<float>{0, 1});
    CHECK(one.questions[0].embedding == std::vector<float>{0.5F, 2});
    example["embeddings"].erase(1);
    CHECK_THAT(complaint({file()}), says("want one for each of 2 segments"));
    example["embeddings"] = {{1, 0.5}, {0, 1, 2}};
    CHECK_THAT(complaint({file()}), says("want one number of channels, as the first has: 2"));
    example["embeddings"] = {{1, 0.5}, {0, 0}};
    CHECK_THAT(complaint({file()}), says("want a direction, so not zeros alone"));
    example["embeddings"] = {{1, 0.5, 3}, {0, 1, 2}};
    CHECK_THAT(complaint({file()}), says("questions[0]: 'embedding' is [0.5,2], want 3 numbers"));
    example["questions"][0].erase("embedding");
    CHECK_THAT(complaint({file()}), says("questions[0]: 'embedding' is missing"));
    example.erase("embeddings");
    CHECK(complaint({file()}).empty());
}

TEST_CASE("files of a folder that are no JSON are none of its tasks", "[tiny_llama][contract]") {
    const Folder folder;
    const json question{{"ask", {3, 4}}, {"answer", {5}}};
    folder.write("t.json", {{"task", "t"}, {"cases", {{{"prompt", {1, 2}}, {"questions", {question}}}}}});
    std::ofstream(folder.path / "state.json") << R"({"loss": NaN})";
    CHECK(read({folder.path.string()}).size() == 1);
    folder.write("typo.json", {{"task", "u"}, {"case", json::array()}});
    CHECK_THAT(complaint({folder.path.string()}), says("typo.json: 'cases' is missing"));
}

TEST_CASE("sentences of the tiny world are told apart", "[tiny_llama][property]") {
    // <s>, fact, filler, asked fact, <think>, thought, </think>, announcement
    const Case example{.prompt = {1, 8, 24, 152, 2, 9, 280, 281, 2, 10, 25, 153, 2},
                       .stream = {4, 6, 24, 152, 2, 5, 3, 3, 25, 2},
                       .questions = {{.ask = {3, 25}, .answer = {153}}}};
    std::string letters;
    for (const Kind kind : tiny_llama::kinds(example, 448))
        letters += "Af.to"[static_cast<std::size_t>(kind)];
    CHECK(letters == "offff....AAAAottttooooo");
}

}  // namespace
