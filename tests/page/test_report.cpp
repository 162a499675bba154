#include "page/report.hpp"

#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "common/gnuplot.hpp"
#include "folder.hpp"
#include "support/catch.hpp"

namespace {

using page::Outcome;
using page::test::Folder;

const std::vector<Outcome> runs{{"belady", 8, 40, 0, 40, 12.25},
                                {"guard_true", 8, 60, 7, 40, 20.5},
                                {"belady", 64, 10, 0, 10, 15},
                                {"guard_true", 64, 11, 3, 10, 21}};

TEST_CASE("the table has a line per run", "[page][contract]") {
    std::ostringstream out;
    page::print_table(out, runs);
    CHECK(
        out.str().starts_with("policy       slots     misses  / OPT     guards     ns\n"
                              "belady           8         40  1.000          0   12.2\n"
                              "guard_true       8         60  1.500          7   20.5\n"));
}

TEST_CASE("JSON holds the trace and every run with the documented keys", "[page][contract]") {
    const Folder folder;
    page::write_json(folder.file("r.json"), {{"source", "t"}}, runs);
    const auto json = nlohmann::ordered_json::parse(std::ifstream(folder.file("r.json")));
    CHECK(json.at("trace").dump() == R"({"source":"t"})");
    REQUIRE(json.at("runs").size() == 4);
    CHECK(json.at("runs")[1].dump() ==
          R"({"policy":"guard_true","slots":8,"misses":60,"opt_misses":40,"misses_over_opt":1.5,)"
          R"("guards":7,"ns_per_request":20.5})");
    CHECK_THROWS_WITH(page::write_json(folder.file("none/r.json"), {}, runs),
                      contains_text("cannot be written"));
}

TEST_CASE("the picture is drawn where there is gnuplot", "[page][contract]") {
    if (!examples::have_gnuplot()) KVCULL_SKIP("no gnuplot");
    const Folder folder;
    page::write_svg(folder.file("p.svg"), runs);
    std::ostringstream text;
    text << std::ifstream(folder.file("p.svg")).rdbuf();
    for (const char* wanted : {"guard_true", "misses / OPT", "ns per request", "</svg>"})
        CHECK_THAT(text.str(), contains_text(wanted));
    CHECK_THROWS(page::write_svg(folder.file("none/p.svg"), runs));
}

}  // namespace
