#include "page/replay.hpp"

#include <kvcull/base/error.hpp>
#include <map>

#include "support/catch.hpp"

namespace {

using page::Options;
using page::Outcome;
using page::Pages;

Options everything() {
    Options options;
    options.policies = page::policy_names();
    options.values = page::value_names();
    options.repeats = 1;
    return options;
}
/// By policy; of one size.
std::map<std::string, Outcome> by_name(const Pages& pages, std::size_t slots,
                                       Options options = everything()) {
    options.slots = {slots};
    std::map<std::string, Outcome> outcomes;
    for (const Outcome& outcome : page::replay(pages, options)) outcomes[outcome.policy] = outcome;
    return outcomes;
}

TEST_CASE("misses are those counted by hand", "[page][differential]") {
    constexpr kvcull::page_t z = ~kvcull::page_t{0};
    const auto got = by_name({0, 1, z, 0, 1, 0, 1}, 2);
    const auto misses = [&](const char* policy) { return got.at(policy).misses; };
    CHECK(misses("belady") == 4);         // z takes the place of 1, which takes it back
    CHECK(misses("lru") == 5);            // z takes that of 0, 0 that of 1, 1 that of z
    CHECK(misses("fifo") == 5);           // as LRU: nothing is hit before both are back
    CHECK(misses("blind_true") == 4);     // told the truth
    CHECK(misses("guard_true") == 4);     // and so never wrong
    CHECK(misses("blind_adverse") == 7);  // told the opposite: the page needed next goes out each time
    CHECK(got.at("guard_true").guards == 0);
    CHECK(got.at("guard_adverse").guards > 0);
    for (const auto& [name, outcome] : got) CHECK(outcome.opt_misses == 4);
}

TEST_CASE("nothing misses less than Belady, and guards are Guard's alone", "[page][property]") {
    const std::string trace = GENERATE("zipf:pages=60,requests=3000", "uniform:pages=60,requests=3000",
                                       "loop:pages=60,requests=3000");
    const std::size_t slots = GENERATE(1U, 7U, 40U, 60U, 1000U);
    CAPTURE(trace, slots);
    const Pages pages = page::make_trace(trace);
    const auto got = by_name(pages, slots);
    CHECK(got.size() == 6 + 5 * 6);
    for (const auto& [name, outcome] : got) {
        CAPTURE(name);
        CHECK(outcome.slots == slots);
        CHECK(outcome.misses >= outcome.opt_misses);
        CHECK(outcome.ratio() >= 1);
        CHECK(outcome.misses >= page::count_distinct(pages));
        CHECK(outcome.misses <= pages.size());
        CHECK(outcome.ns > 0);
        if (!name.starts_with("guard")) CHECK(outcome.guards == 0);
        if (slots >= 60) CHECK(outcome.misses == page::count_distinct(pages));
    }
    for (const char* optimal : {"belady", "blind_true", "guard_true"})
        CHECK(got.at(optimal).misses == got.at(optimal).opt_misses);
    if (slots == 7 && !trace.starts_with("loop")) {  // in a loop no page returns within a phase
        CHECK(got.at("blind_noisy").misses > got.at("belady").misses);
        CHECK(got.at("guard_adverse").misses < got.at("blind_adverse").misses);
        CHECK(got.at("guard_adverse").guards > 0);
    }
}

TEST_CASE("the same seed gives the same run, and noise of 0 the truth", "[page][property]") {
    const Pages pages = page::make_trace("zipf:pages=60,requests=3000");
    Options other = everything(), quiet = everything();
    other.seed = 1;
    quiet.noise = 0;
    quiet.repeats = 2;
    const auto first = by_name(pages, 8), second = by_name(pages, 8), seeded = by_name(pages, 8, other),
               exact = by_name(pages, 8, quiet);
    for (const auto& [name, outcome] : first) CHECK(second.at(name).misses == outcome.misses);
    for (const char* random : {"rand", "marker", "blind_noisy"})
        CHECK(seeded.at(random).misses != first.at(random).misses);
    CHECK(exact.at("blind_noisy").misses == exact.at("belady").misses);
    CHECK(exact.at("guard_adverse").misses == first.at("guard_adverse").misses);
}

TEST_CASE("runs come size by size, as the options list them", "[page][contract]") {
    Options options;
    options.slots = {16, 4};
    options.policies = {"guard", "lru"};
    options.values = {"pleco", "true"};
    std::string order;
    for (const Outcome& run : page::replay(page::make_trace("zipf:pages=60,requests=300"), options))
        order += run.policy + ":" + std::to_string(run.slots) + " ";
    CHECK(order == "guard_pleco:16 guard_true:16 lru:16 guard_pleco:4 guard_true:4 lru:4 ");
}

TEST_CASE("unknown names are refused by those that exist", "[page][contract]") {
    Options options;
    options.policies = {"lru", "arc"};
    CHECK_THROWS_WITH(page::replay(Pages{1}, options),
                      contains_text("policy is \"arc\", want one of belady, lru, fifo"));
    options.policies = {"lru"};  // reads none, and still
    options.values = {"guess"};
    CHECK_THROWS_WITH(page::replay(Pages{1}, options),
                      contains_text("values is \"guess\", want one of true, noisy, popularity"));
    options.values = {"true"};
    options.slots = {0};
    CHECK_THROWS_AS(page::replay(Pages{1}, options), kvcull::error::config_error);
}

}  // namespace
