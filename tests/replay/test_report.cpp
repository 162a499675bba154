#include "replay/report.hpp"

#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "common/gnuplot.hpp"
#include "random_trace.hpp"
#include "support/catch.hpp"

namespace {

using replay::Outcome;
using replay::test::Folder;

const replay::Trace& trace() {
    static const replay::Trace made = replay::test::random_trace();
    return made;
}
const std::vector<Outcome>& runs() {
    static const std::vector<Outcome> made{run(trace(), {"full", {.tokens = 8}}, 10),
                                           run(trace(), {"full", {.ratio = 0.5}}, 10),
                                           run(trace(), {"streaming:sinks=2", {.tokens = 8}}, 10),
                                           run(trace(), {"streaming:sinks=2", {.ratio = 0.5}}, 10)};
    return made;
}
std::string text_of(const std::string& file) {
    std::ostringstream out;
    out << std::ifstream(file).rdbuf();
    return out.str();
}

TEST_CASE("JSON holds the trace and every run with the documented keys", "[replay][contract]") {
    const Folder folder;
    write_json(folder.file("r.json"), "some.safetensors", trace(), runs());
    const auto json = nlohmann::ordered_json::parse(std::ifstream(folder.file("r.json")));
    CHECK(json.at("trace").dump() ==
          R"({"file":"some.safetensors","tokens":40,"prompt_tokens":25,"layers":2,"q_heads":4,"kv_heads":2,)"
          R"("head_dim":8,"value_dim":6,"dtype":"f32"})");
    REQUIRE(json.at("runs").size() == 4);
    const auto& last = json.at("runs")[3];
    CHECK(last.at("policy") == "streaming:sinks=2");
    CHECK(last.at("budget") == 0.5);
    CHECK(json.at("runs")[2].at("budget") == 8);
    CHECK(last.at("mean_error") == runs()[3].mean_error);
    CHECK(last.at("least_mass") == runs()[3].least_mass);
    CHECK(last.at("rows") == 12.0);
    CHECK(last.at("peak_rows") == 20);
    CHECK(last.at("peak_bytes") == runs()[3].peak_bytes);
    CHECK(last.at("us_per_step") == runs()[3].seconds * 1e6);
    CHECK(last.size() == 13);
    CHECK_THROWS_WITH(write_json(folder.file("none/r.json"), "", trace(), runs()),
                      contains_text("cannot be written"));
}

TEST_CASE("the table has a line per run", "[replay][contract]") {
    std::ostringstream out;
    print_table(out, runs());
    CHECK_THAT(out.str(),
               contains_text("full                    8  0.000   0.000  1.000  1.000    40.0      40"));
    CHECK_THAT(out.str(), contains_text("streaming:sinks=2     0.5"));
    CHECK_THAT(out.str(), contains_text("12.0      20"));
}

TEST_CASE("the file of kept tokens says what every head held after every step", "[replay][contract]") {
    const Folder folder;
    write_kept(folder.file("k"), trace(), runs());
    const auto file = kvcull::SafeTensors::read(folder.file("k"));
    CHECK(file.tensor("seen").to_vector<std::int64_t>() == runs()[0].seen);
    CHECK(file.tensor("seen").size() == 3 + 15);  // chunks and tokens
    CHECK(file.tensor("positions").to_vector<std::int64_t>() == trace().positions);
    CHECK(file.tensor("runs.2.until").shape == std::vector<std::size_t>{2, 2, 40});
    CHECK(file.metadata().at("runs.2.policy") == "streaming:sinks=2");
    CHECK(file.metadata().at("runs.3.budget") == "0.5");
    const auto until = file.tensor("runs.2.until").to_vector<std::int64_t>();
    for (const std::int64_t seen : runs()[0].seen)  // as the page says: held if t < seen <= until[t]
        for (std::size_t head = 0; head < 4; ++head) {
            std::int64_t held = 0;
            for (std::int64_t t = 0; t < 40; ++t)
                held += t < seen && seen <= until[head * 40 + static_cast<std::size_t>(t)] ? 1 : 0;
            CHECK(held == std::min<std::int64_t>(seen, 8));
        }
}

TEST_CASE("pictures are drawn where there is gnuplot", "[replay][contract]") {
    if (!examples::have_gnuplot()) KVCULL_SKIP("no gnuplot");
    const Folder folder;
    write_error_svg(folder.file("e.svg"), trace(), runs());
    CHECK_THAT(text_of(folder.file("e.svg")), contains_text("streaming:sinks=2") && contains_text("</svg>"));
    write_kept_svg(folder.file("k.svg"), trace(), runs(), {.ratio = 0.5});
    CHECK_THAT(text_of(folder.file("k.svg")), contains_text("budget of 0.5") &&
                                                  contains_text("streaming:sinks=2, layer 1 head 1") &&
                                                  contains_text("</svg>"));
    CHECK_THROWS(write_error_svg(folder.file("none/e.svg"), trace(), runs()));
}

}  // namespace
