#include "replay.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <kvcull/base/memory.hpp>
#include <kvcull/paging/guard.hpp>
#include <kvcull/paging/predictors.hpp>
#include <kvcull/paging/rules.hpp>
#include <limits>
#include <map>
#include <string_view>

namespace page {
namespace {

using namespace kvcull;

using PageSpan = std::span<const page_t>;
using Values = std::vector<double>;

/// The true next request; the last one of a page at `t` counts as 2 n - t, later than all others.
Values truth(PageSpan pages, const Options&) {
    Values next = next_requests(pages);
    for (std::size_t t = 0; t < next.size(); ++t)
        if (next[t] == never_again) next[t] = static_cast<double>(2 * next.size() - t);
    return next;
}
Values noisy(PageSpan pages, const Options& options) {
    Values next = truth(pages, options);
    SplitMix64 random{~options.seed};  // not the stream that policies draw from
    for (double& value : next) value += static_cast<double>((random() >> 33U) % (options.noise + 1));
    return next;
}
/// The page needed soonest looks as if it were needed last.
Values adverse(PageSpan pages, const Options& options) {
    Values next = truth(pages, options);
    for (double& value : next) value = 4 * static_cast<double>(next.size()) - value;
    return next;
}
template <NextUse Predictor>
Values guesses(PageSpan pages, const Options&) {
    Predictor predictor;
    Values next(pages.size());
    for (std::size_t t = 0; t < pages.size(); ++t) next[t] = predictor.next(pages[t], t);
    return next;
}

struct NamedValues {
    std::string_view name;
    Values (*make)(PageSpan, const Options&);
};
constexpr std::array all_values{
    NamedValues{"true", truth},
    NamedValues{"noisy", noisy},
    NamedValues{"popularity", guesses<Popularity>},
    NamedValues{"pleco", guesses<Pleco>},
    NamedValues{"last_gap", guesses<LastGap>},
    NamedValues{"adverse", adverse},
};

struct Tally {
    std::uint64_t misses = 0, guards = 0;
    double seconds = 0;
};
template <PageCache Cache>
Tally run(PageSpan pages, const Values& values, std::size_t distinct, std::size_t slots, SplitMix64 draws) {
    typename Cache::Options options{};
    if constexpr (requires { options.draws; }) options.draws = draws;
    Cache cache(slots, options);
    cache.reserve(distinct);
    Tally tally;
    const auto begin = std::chrono::steady_clock::now();
    for (std::size_t t = 0; t < pages.size(); ++t) {
        const Access access = cache.request(pages[t], values[t]);
        tally.misses += access.hit ? 0 : 1;
        tally.guards += access.guard ? 1 : 0;
    }
    tally.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    return tally;
}

enum class Reads : std::uint8_t { nothing, truth, values };
struct NamedPolicy {
    std::string_view name;
    Reads reads;
    Tally (*run)(PageSpan, const Values&, std::size_t distinct, std::size_t slots, SplitMix64 draws);
};
/// A cache of yours is one more line.
constexpr std::array all_policies{
    NamedPolicy{"belady", Reads::truth, run<BlindOracle>},
    NamedPolicy{"lru", Reads::nothing, run<Follow<Lru>>},
    NamedPolicy{"fifo", Reads::nothing, run<Follow<Fifo>>},
    NamedPolicy{"rand", Reads::nothing, run<Rand<>>},
    NamedPolicy{"marker", Reads::nothing, run<Marker<>>},
    NamedPolicy{"guard_lru", Reads::nothing, run<Guard<Lru>>},
    NamedPolicy{"blind", Reads::values, run<BlindOracle>},
    NamedPolicy{"lmarker", Reads::values, run<LMarker<>>},
    NamedPolicy{"predictive_marker", Reads::values, run<PredictiveMarker<>>},
    NamedPolicy{"combine", Reads::values, run<CombineDeterministic<BlindOracle, Follow<Lru>>>},
    NamedPolicy{"guard", Reads::values, run<Guard<>>},
};

template <class Table>
std::vector<std::string> names_in(const Table& table) {
    std::vector<std::string> names;
    for (const auto& entry : table) names.emplace_back(entry.name);
    return names;
}
template <class Table>
const auto& named(const Table& table, const char* what, const std::string& name) {
    std::string known;
    for (const auto& entry : table) {
        if (entry.name == name) return entry;
        known.append(known.empty() ? "" : ", ").append(entry.name);
    }
    throw error::config_error(std::string(what) + " is \"" + name + "\", want one of " + known);
}

/// A policy that reads values runs with each kind of them.
struct Run {
    std::string name;
    const NamedPolicy* policy;
    std::string values;  // of those computed
};
std::vector<Run> runs_of(const Options& options) {
    for (const std::string& values : options.values) (void)named(all_values, "values", values);
    std::vector<Run> runs;
    for (const std::string& name : options.policies) {
        const NamedPolicy& policy = named(all_policies, "policy", name);
        if (policy.reads == Reads::values)
            for (const std::string& values : options.values)
                runs.push_back({name + "_" + values, &policy, values});
        else
            runs.push_back({name, &policy, "true"});
    }
    return runs;
}

}  // namespace

std::vector<std::string> policy_names() {
    return names_in(all_policies);
}
std::vector<std::string> value_names() {
    return names_in(all_values);
}

std::vector<Outcome> replay(PageSpan pages, const Options& options) {
    const std::vector<Run> runs = runs_of(options);
    std::map<std::string, Values> values{{"true", truth(pages, options)}};
    for (const Run& run : runs)
        if (!values.contains(run.values))
            values[run.values] = named(all_values, "values", run.values).make(pages, options);

    const std::size_t distinct = count_distinct(pages);
    const auto play = [&](const NamedPolicy& policy, const std::string& told, std::size_t slots) {
        return policy.run(pages, values.at(told), distinct, slots, SplitMix64{options.seed});
    };
    std::map<std::size_t, std::uint64_t> opt_misses;
    for (const std::size_t slots : options.slots)
        opt_misses[slots] = play(named(all_policies, "policy", "belady"), "true", slots).misses;

    std::vector<Outcome> outcomes;
    for (const std::size_t slots : options.slots)
        for (const Run& run : runs) {
            Tally tally;
            double least = std::numeric_limits<double>::max();
            for (std::size_t i = 0; i < options.repeats; ++i) {
                tally = play(*run.policy, run.values, slots);
                least = std::min(least, tally.seconds);
            }
            outcomes.push_back({run.name, slots, tally.misses, tally.guards, opt_misses.at(slots),
                                least * 1e9 / static_cast<double>(pages.size())});
        }
    return outcomes;
}

}  // namespace page
