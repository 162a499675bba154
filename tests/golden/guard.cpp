// Layouts of method `guard`: every output agrees exactly, but for the weights of Pleco.

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "kinds.hpp"
#include "kvcull/paging/guard.hpp"
#include "kvcull/paging/predictors.hpp"
#include "kvcull/paging/rules.hpp"
#include "kvcull/paging/tier.hpp"
#include "support/requests.hpp"

namespace kvcull::test::guard {
namespace {

using Numbers = std::vector<std::int64_t>;
using Mixture = CombineDeterministic<BlindOracle, Follow<Lru>>;

/// Draws that a file lists.
struct Listed {
    const Numbers* draws = nullptr;
    std::size_t used = 0;

    std::uint32_t operator()() {
        if (used >= draws->size()) throw Difference("more draws are taken than the file has");
        return static_cast<std::uint32_t>((*draws)[used++]);
    }
};

std::vector<page_t> to_pages(const Numbers& numbers) {
    return {numbers.begin(), numbers.end()};
}
std::vector<double> to_values(const Numbers& numbers) {
    return {numbers.begin(), numbers.end()};
}
std::int64_t victim_of(const Access& access) {
    return access.victim ? static_cast<std::int64_t>(*access.victim) : -1;
}

/// The true next request; of the last one at `t` the files say 2 n - t.
std::vector<double> true_next(const std::vector<page_t>& pages) {
    auto next = next_requests(pages);
    for (std::size_t t = 0; t < next.size(); ++t)
        if (next[t] == never_again) next[t] = static_cast<double>(2 * pages.size() - t);
    return next;
}
template <NextUse Predictor>
std::vector<double> guesses_of(Predictor predictor, const std::vector<page_t>& pages) {
    std::vector<double> values;
    for (std::size_t t = 0; t < pages.size(); ++t) values.push_back(predictor.next(pages[t], t));
    return values;
}

/// Columns of numbers by the name of the output.
using Columns = std::map<std::string, Numbers>;
template <class T>
void expect_as(GoldenFile& file, const std::string& output, const Numbers& numbers) {
    std::vector<T> narrow;
    for (const std::int64_t number : numbers) narrow.push_back(static_cast<T>(number));
    file.expect_exactly<T>(output, {narrow.size()}, narrow);
}
void compare(GoldenFile& file, const std::string& policy, const Columns& columns) {
    static const std::set<std::string> flags{"hit", "event", "write_back", "create_write_back"},
        small{"slot", "phase", "old"};
    for (const auto& [name, numbers] : columns) {
        std::string output = "out.";
        output += policy;
        output += '.';
        output += name;
        if (flags.contains(name))
            expect_as<std::uint8_t>(file, output, numbers);
        else if (small.contains(name))
            expect_as<std::int32_t>(file, output, numbers);
        else
            file.expect(output, {numbers.size()}, numbers);
    }
}

/// Runs a policy over the requests of a file; `more(cache, access, columns)` notes what else the layout has.
template <class Cache, class More>
Columns run(Cache& cache, const std::vector<page_t>& pages, const std::vector<double>& values,
            const More& more) {
    Columns columns;
    std::int64_t misses = 0;
    for (std::size_t t = 0; t < pages.size(); ++t) {
        const Access access = cache.request(pages[t], values[t]);
        misses += access.hit ? 0 : 1;
        columns["hit"].push_back(access.hit ? 1 : 0);
        columns["victim"].push_back(victim_of(access));
        columns["slot"].push_back(access.slot);
        more(cache, access, columns);
    }
    columns["misses"] = {misses};
    return columns;
}
template <class Cache>
Columns run(Cache cache, const std::vector<page_t>& pages, const std::vector<double>& values) {
    return run(cache, pages, values, [](const auto&, const Access&, Columns&) {});
}

template <class Base>
void check_guarded(GoldenFile& file, const std::string& policy, const std::vector<double>& values,
                   std::size_t guard_after = 1) {
    const auto pages = to_pages(file.array<std::int64_t>("in.pages", 1).values);
    const Numbers draws = file.array<std::int64_t>("in.draws", 1).values;
    Guard<Base, Listed> cache(file.count("k"), {guard_after, {&draws}});
    Columns columns = run(cache, pages, values, [](const auto& at, const Access& access, Columns& out) {
        out["event"].push_back(access.guard ? 1 : 0);
        out["phase"].push_back(static_cast<std::int64_t>(at.rule().phase()));
        out["old"].push_back(static_cast<std::int64_t>(at.rule().old().size()));
    });
    columns["draws_used"] = {static_cast<std::int64_t>(cache.rule().draws().used)};
    compare(file, policy, columns);
}

template <class Cache>
void check_drawing(GoldenFile& file, const std::string& policy) {
    const auto pages = to_pages(file.array<std::int64_t>("in.pages", 1).values);
    const auto next = to_values(file.array<std::int64_t>("in.next", 1).values);
    const Numbers draws = file.array<std::int64_t>("in.draws", 1).values;
    Cache cache(file.count("k"), {{&draws}});
    Columns columns = run(cache, pages, next, [](const auto&, const Access&, Columns&) {});
    columns["draws_used"] = {static_cast<std::int64_t>(cache.rule().draws().used)};
    compare(file, policy, columns);
}

/// Frames that hold the number of their page, and what went to the store: a tier that mixes up pages, writes
/// one twice or fetches what was never written is found.
struct Ledger {
    std::map<page_t, page_t>* stored = nullptr;
    std::vector<page_t>* frames = nullptr;

    void read(page_t page, slot_t frame) {
        if (!stored->contains(page)) throw Difference("a page is fetched that was never written");
        (*frames)[frame] = stored->at(page);
    }
    void write(page_t page, slot_t frame) { (*stored)[page] = (*frames)[frame]; }
    void erase(page_t page) { stored->erase(page); }
};

template <class Cache>
void check_tier_of(GoldenFile& file, const std::string& policy, Cache cache) {
    const auto column = [&](const char* name) { return file.array<std::int64_t>(name, 1).values; };
    const Numbers page = column("in.page"), next = column("in.next"), offset = column("in.step_offset"),
                  create = column("in.create"), create_next = column("in.create_next"),
                  erase = column("in.erase"), pin = column("in.pin");
    const std::size_t steps = create.size();
    /// Predictions by page, as the file lists them step by step.
    struct Told {
        std::map<page_t, double>* values;
        double next(page_t id, std::uint64_t) const { return values->at(id); }
    };
    std::map<page_t, double> told;
    std::map<page_t, page_t> stored;
    std::vector<page_t> frames(cache.slots());
    std::set<page_t> pinned;
    PageTier<Cache, Ledger, Told> tier(std::move(cache), {&stored, &frames}, {&told});
    Columns columns;
    for (std::size_t s = 0; s < steps; ++s) {
        if (erase[s] >= 0) {
            const auto id = static_cast<page_t>(erase[s]);
            if (pinned.erase(id) > 0) tier.unpin(id);
            tier.erase(id);
        }
        std::vector<page_t> pages;
        for (auto row = static_cast<std::size_t>(offset[s]); row < static_cast<std::size_t>(offset[s + 1]);
             ++row) {
            pages.push_back(static_cast<page_t>(page[row]));
            told[pages.back()] = static_cast<double>(next[row]);
        }
        std::optional<page_t> created;
        if (create[s] >= 0) {
            created = static_cast<page_t>(create[s]);
            told[*created] = static_cast<double>(create_next[s]);
        }
        const auto visits = tier.step(pages, created);
        for (const PageVisit& visit : visits.first(pages.size())) {
            columns["hit"].push_back(visit.access.hit ? 1 : 0);
            columns["victim"].push_back(victim_of(visit.access));
            columns["write_back"].push_back(visit.write_back ? 1 : 0);
        }
        columns["create_victim"].push_back(created ? victim_of(visits.back().access) : -1);
        columns["create_write_back"].push_back(created && visits.back().write_back ? 1 : 0);
        if (created) frames[tier.frame(*created)] = *created;
        for (const page_t id : pages)
            if (frames[tier.frame(id)] != id) throw Difference("a frame holds another page");
        if (pin[s] >= 0) {
            tier.pin(static_cast<page_t>(pin[s]));
            pinned.insert(static_cast<page_t>(pin[s]));
        }
        tier.end_step();
    }
    const auto number = [](std::uint64_t count) { return static_cast<std::int64_t>(count); };
    const PageCounts& counts = tier.counts();
    columns["counts"] = {number(counts.fetches), number(counts.evictions), number(counts.write_backs),
                         number(counts.guards)};
    compare(file, policy, columns);
}

}  // namespace

void check_deterministic(GoldenFile& file) {
    const auto pages = to_pages(file.array<std::int64_t>("in.pages", 1).values);
    const auto next = to_values(file.array<std::int64_t>("in.next", 1).values);
    const auto truth = to_values(file.array<std::int64_t>("in.true_next", 1).values);
    const std::size_t k = file.count("k");
    compare(file, "belady", run(BlindOracle(k), pages, truth));
    compare(file, "lru", run(Follow<Lru>(k), pages, next));
    compare(file, "fifo", run(Follow<Fifo>(k), pages, next));
    compare(file, "blind_oracle", run(BlindOracle(k), pages, next));
    compare(file, "combine_a", run(Mixture(k, {.bound = file.real("bound_a")}), pages, next));
    compare(file, "combine_b", run(Mixture(k, {.bound = file.real("bound_b")}), pages, next));
}

void check_guard(GoldenFile& file) {
    const auto next = to_values(file.array<std::int64_t>("in.next", 1).values);
    const auto labels = file.array<std::uint8_t>("in.label", 1).values;
    check_guarded<Furthest>(file, "blind_oracle", next);
    check_guarded<Furthest>(file, "blind_oracle_after3", next, 3);
    check_guarded<Lru>(file, "lru", next);
    check_guarded<Labels>(file, "labels", {labels.begin(), labels.end()});
}

void check_random(GoldenFile& file) {
    check_drawing<Rand<Listed>>(file, "rand");
    check_drawing<Marker<Listed>>(file, "marker");
    check_drawing<LMarker<Listed>>(file, "lmarker");
    check_drawing<PredictiveMarker<Listed>>(file, "predictive_marker");
}

void check_predictors(GoldenFile& file) {
    const auto pages = to_pages(file.array<std::int64_t>("in.pages", 1).values);
    const std::size_t n = pages.size();
    file.expect("out.popularity", {n}, guesses_of(Popularity(), pages), 0);
    file.expect("out.pleco", {n}, guesses_of(Pleco(), pages), 1e-9);
    file.expect("out.last_gap", {n}, guesses_of(LastGap(), pages), 0);
    Numbers truth, labels, draws;
    for (const double next : true_next(pages)) truth.push_back(static_cast<std::int64_t>(next));
    for (const double label : belady_labels(pages, file.count("k")))
        labels.push_back(static_cast<std::int64_t>(label));
    SplitMix64 source{file.count("seed")};
    for (int i = 0; i < 64; ++i) draws.push_back(draw_32(source));
    file.expect("out.true_next", {n}, truth);
    expect_as<std::uint8_t>(file, "out.labels", labels);
    file.expect("out.draws", {draws.size()}, draws);
}

void check_tier(GoldenFile& file) {
    const std::size_t k = file.count("k");
    const Numbers draws = file.array<std::int64_t>("in.draws", 1).values;
    check_tier_of(file, "guard", Guard<Furthest, Listed>(k, {1, {&draws}}));
    check_tier_of(file, "guard_lru", Guard<Lru, Listed>(k, {1, {&draws}}));
    check_tier_of(file, "blind_oracle", BlindOracle(k));
    check_tier_of(file, "lru", Follow<Lru>(k));
}

namespace {

/// Replays over `k` slots, with the draws where the policy takes some.
template <class Cache>
Tally replay_with(std::size_t k, SplitMix64 draws, const std::vector<page_t>& pages,
                  const std::vector<double>& values) {
    typename Cache::Options options{};
    if constexpr (requires { options.draws; }) options.draws = draws;
    return replay(Cache(k, options), pages, values);
}

std::vector<std::string> words(const std::string& list) {
    std::vector<std::string> all;
    std::istringstream in(list);
    for (std::string word; std::getline(in, word, ',');) all.push_back(word);
    return all;
}

}  // namespace

void check_misses(GoldenFile& file) {
    const auto ids = file.array<std::int32_t>("in.pages", 1).values;
    const std::vector<page_t> pages(ids.begin(), ids.end());
    const auto truth = true_next(pages);
    std::map<std::string, std::vector<double>> guesses{{"true", truth},
                                                       {"popularity", guesses_of(Popularity(), pages)},
                                                       {"last_gap", guesses_of(LastGap(), pages)}};
    const SplitMix64 draws{file.count("draw_seed")};
    SplitMix64 noise{file.count("noise_seed")};
    for (const double next : truth) {
        guesses["noisy"].push_back(next + static_cast<double>((noise() >> 33U) % (file.count("width") + 1)));
        guesses["adverse"].push_back(4 * static_cast<double>(pages.size()) - next);
    }
    using Run = Tally (*)(std::size_t, SplitMix64, const std::vector<page_t>&, const std::vector<double>&);
    static const std::map<std::string, Run> plain{
        {"belady", replay_with<BlindOracle>}, {"lru", replay_with<Follow<Lru>>},
        {"fifo", replay_with<Follow<Fifo>>},  {"rand", replay_with<Rand<>>},
        {"marker", replay_with<Marker<>>},    {"guard_lru", replay_with<Guard<Lru>>},
    };
    static const std::map<std::string, Run> predicting{
        {"blind_", replay_with<BlindOracle>},
        {"lmarker_", replay_with<LMarker<>>},
        {"predictive_marker_", replay_with<PredictiveMarker<>>},
        {"combine_", replay_with<Mixture>},
        {"guard_", replay_with<Guard<>>},
    };
    const auto policies = words(file.text("policies")), sizes = words(file.text("k"));
    Numbers misses, guards;
    for (const std::string& policy : policies) {
        Run run = nullptr;
        std::string values = "true";
        if (const auto found = plain.find(policy); found != plain.end()) run = found->second;
        for (const auto& [prefix, made] : predicting) {
            if (run == nullptr && policy.starts_with(prefix)) {
                run = made;
                values = policy.substr(prefix.size());
            }
        }
        if (run == nullptr || !guesses.contains(values))
            throw error::format_error("policy '" + policy + "' is unknown");
        for (const std::string& size : sizes) {
            const Tally total = run(std::stoul(size), draws, pages, guesses.at(values));
            misses.push_back(static_cast<std::int64_t>(total.misses));
            guards.push_back(static_cast<std::int64_t>(total.guards));
        }
    }
    file.expect("out.misses", {policies.size(), sizes.size()}, misses);
    file.expect("out.guards", {policies.size(), sizes.size()}, guards);
}

/// Data only: the ids are read, and there is nothing to compare.
void check_ids(GoldenFile& file) {
    (void)file.array<std::int32_t>("in.pages", 1);
}

}  // namespace kvcull::test::guard
