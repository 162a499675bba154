#include "report.hpp"

#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "support/catch.hpp"

namespace {

namespace fs = std::filesystem;
using tiny_llama::Row;
using tiny_llama::Task;

struct Folder {
    const fs::path path = fs::temp_directory_path() / ("kvcull_test_report_" + std::to_string(::getpid()));
    Folder() { fs::create_directories(path); }
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;
    ~Folder() { fs::remove_all(path); }
};
std::string text_of(const fs::path& file) {
    std::ostringstream out;
    out << std::ifstream(file).rdbuf();
    return out.str();
}
auto says(const std::string& text) {
    return contains_text(text);
}

const std::vector<Task> tasks{
    {.name = "a<b",
     .cases = {{.prompt = {1, 8, 24, 152, 2, 9, 280, 2}, .questions = {{.ask = {3, 24}, .answer = {152}}}}}}};
const std::vector<Row> rows{{.task = "a<b",
                             .setting = {"full", {.tokens = 96}},
                             .accuracy = 1,
                             .questions = 3,
                             .kv_bytes = 2000,
                             .peak_bytes = 2500,
                             .tokens_per_second = 100.25,
                             .kept = std::vector<float>(8, 1.0F)},
                            {.task = "a<b",
                             .setting = {"full", {.ratio = 0.25}},
                             .accuracy = 1,
                             .questions = 3,
                             .kv_bytes = 2000,
                             .peak_bytes = 2500,
                             .tokens_per_second = 100.25,
                             .kept = std::vector<float>(8, 1.0F)},
                            {.task = "a<b",
                             .setting = {"snapkv:window=8", {.tokens = 96}},
                             .accuracy = 2.0 / 3,
                             .questions = 3,
                             .kv_bytes = 1234.4,
                             .peak_bytes = 2500,
                             .tokens_per_second = 99,
                             .kept = {1, 0, 0.5F, 0.5F, 0, 0, 0, 1}},
                            {.task = "a<b",
                             .setting = {"snapkv:window=8", {.ratio = 0.25}},
                             .accuracy = 0,
                             .questions = 3,
                             .kv_bytes = 500,
                             .peak_bytes = 2500,
                             .tokens_per_second = 98,
                             .kept = {1, 0, 0, 0, 0, 0, 0, 1}}};

TEST_CASE("results.json holds every row with the documented keys", "[tiny_llama][contract]") {
    const Folder folder;
    write_json(folder.path / "r.json", rows);
    const auto json = nlohmann::ordered_json::parse(std::ifstream(folder.path / "r.json"));
    CHECK(json.at("rows").size() == 4);
    CHECK(
        json.at("rows")[2].dump() ==
        R"({"task":"a<b","policy":"snapkv:window=8","budget":96,"accuracy":0.6666666666666666,"questions":3,)"
        R"("kv_bytes":1234,"peak_bytes":2500,"tokens_per_second":99.0})");
    CHECK(json.at("rows")[3].at("budget") == 0.25);
    CHECK_THROWS(write_json(folder.path / "none" / "r.json", rows));
}

TEST_CASE("the table shows every policy at every budget", "[tiny_llama][contract]") {
    std::ostringstream out;
    print_table(out, rows);
    CHECK_THAT(out.str(), says("a<b (3 questions)"));
    CHECK_THAT(out.str(), says("budget                96   0.25"));
    CHECK_THAT(out.str(), says("snapkv:window=8    0.667  0.000        1      0"));
    std::vector<Row> large(rows.begin(), rows.end());
    for (Row& row : large) row.kv_bytes = 2e12;
    out.str("");
    print_table(out, large);
    CHECK_THAT(out.str(), says(" 2000000000 2000000000 "));
}

TEST_CASE("kept.svg draws a row per policy and colours what is kept", "[tiny_llama][contract]") {
    const Folder folder;
    write_kept_svg(folder.path / "k.svg", rows, tasks, {.tokens = 96}, 448);
    const std::string svg = text_of(folder.path / "k.svg");
    CHECK_THAT(svg, says("<svg ") && says("</svg>") && says("a&lt;b") && !says("a<b"));
    CHECK_THAT(svg, says(">the text<") && says(">full<") && says(">snapkv:window=8<"));
    const char* const half_asked = "fill='#b3001b' fill-opacity='0.5'";  // of the heads hold the asked fact
    CHECK_THAT(svg, says(half_asked));
    write_kept_svg(folder.path / "k.svg", rows, tasks, {.tokens = 96}, 1000);  // another model's words
    CHECK_THAT(text_of(folder.path / "k.svg"), !says(half_asked));
}

TEST_CASE("accuracy.svg is drawn where there is gnuplot", "[tiny_llama][contract]") {
    const Folder folder;
    const bool drawn = write_accuracy_svg(folder.path / "a.svg", rows, tasks);
    CHECK(drawn == (std::system("gnuplot --version > /dev/null 2>&1") == 0));
    CHECK(drawn == fs::exists(folder.path / "a.svg"));
    if (drawn) CHECK_THAT(text_of(folder.path / "a.svg"), says("snapkv:window=8") && says("</svg>"));
}

}  // namespace
