#include "compare.hpp"

#include <sstream>

#include "support/catch.hpp"
#include "world.hpp"

using namespace tiny_llama;

TEST_CASE("policies meet the same documents, which differ from seed to seed", "[tiny_llama][property]") {
    const Llama model(TINY_LLAMA_MODEL_DIR);
    const std::vector<std::string> policies{"full", "streaming"};
    std::vector<HeldBackRow> rows;
    const HeldBackOptions options{.cases = 1, .shares = {0.25, 2.0}};
    run_held_back(model, options, 1, policies, rows);
    run_held_back(model, options, 2, policies, rows);
    REQUIRE(rows.size() == 2 * world_tasks.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
        const HeldBackRow& row = rows[i];
        const std::size_t tokens = world_task(row.task, 1, 1).cases[0].size();
        CAPTURE(row.task, row.rows, tokens);
        CHECK(row.task == world_tasks[i / 2]);
        CHECK(row.rows == (i % 2 == 0 ? (tokens + 2) / 4 : 2 * tokens));
        REQUIRE(row.accuracy.size() == 2);
        REQUIRE(row.accuracy[0].size() == 2);
        // What holds every row answers as the full cache does; a quarter of them, the newest, does not.
        if (i % 2 == 1) CHECK(row.accuracy[0] == row.accuracy[1]);
        if (row.task == "needle" && i % 2 == 0) CHECK(row.accuracy[1][0] < row.accuracy[0][0]);
    }
    CHECK(world_task("needle", 1, 1).cases[0].prompt != world_task("needle", 2, 1).cases[0].prompt);
}

TEST_CASE("the table shows mean and standard deviation", "[tiny_llama][property]") {
    const std::vector<std::string> policies{"a", "b:c=1"};
    const std::vector<HeldBackRow> rows{{"needle", 48, {{0.5, 1.0, 0.6}, {0.25, 0.25, 0.25}}}};
    std::ostringstream out;
    print_held_back(out, policies, rows);
    CHECK(out.str() ==
          "| task | rows | `a` | `b:c=1` |\n| --- | --- | --- | --- |\n"
          "| `needle` | 48 | 0.70 +- 0.26 | 0.25 +- 0.00 |\n");
}
