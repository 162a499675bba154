#include "kvcull/policies/trimkv.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <string>
#include <vector>

#include "kvcull/integrations/registry.hpp"
#include "support/catch.hpp"
#include "support/conformance.hpp"
#include "support/failure.hpp"
#include "support/self_gated.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

const CacheShape shape{.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 3};
constexpr std::size_t tokens = 70, prompt = 33;

/// log beta of every stream and token, `[layers, kv_heads, tokens]`; some tokens never decay, some at once.
std::vector<float> hostile_rates(std::uint64_t seed, std::size_t streams = 4) {
    std::vector<float> rates = random_floats(streams * tokens, seed);
    for (std::size_t i = 0; i < rates.size(); ++i) {
        rates[i] = -std::abs(rates[i]) * (i % 3 == 0 ? 0.01F : 0.3F);
        if (i % 11 == 3) rates[i] = 0.0F;
        if (i % 13 == 5) rates[i] = negative_infinity();
        if (i % 17 == 7) rates[i] = -1e-8F;
    }
    return rates;
}

template <class Cache>
void feed_rates(Cache& cache, const Stream& stream, const std::vector<float>& rates, std::size_t first,
                std::size_t count) {
    const CacheShape& of = stream.shape;
    std::vector<float> out(of.q_heads * count * of.values());
    for (std::size_t layer = 0; layer < of.layers; ++layer) {
        const float* const rate = rates.data() + layer * of.kv_heads * stream.tokens + first;
        cache.append(layer, stream.keys(layer, first, count), stream.values(layer, first, count),
                     {.log_beta = {rate, of.kv_heads, count, stream.tokens}});
        cache.attend(layer, stream.queries(layer, first, count),
                     head_major(out.data(), of.q_heads, count, of.values()));
    }
    cache.end_step();
}
/// A prompt in calls of `chunk`, then one token per call. Calls `after(seen)`.
template <class Cache, class After>
void run(Cache& cache, const Stream& stream, const std::vector<float>& rates, std::size_t chunk,
         const After& after) {
    std::size_t seen = 0;
    cache.begin_prompt(prompt);
    for (; seen < prompt; after(seen)) {
        const std::size_t count = std::min(chunk, prompt - seen);
        feed_rates(cache, stream, rates, seen, count);
        seen += count;
    }
    cache.end_prompt();
    while (seen < stream.tokens) {
        feed_rates(cache, stream, rates, seen, 1);
        after(++seen);
    }
}

/// The method as its paper describes it: lists of positions, full sorts, double.
class Reference {
  public:
    using Rows = std::vector<std::vector<position_t>>;  // of all streams, ascending

    Reference(const TrimKV& policy, std::size_t budget, const std::vector<float>& rates, std::size_t layers,
              std::size_t kv_heads)
        : policy_(policy),
          budget_(budget),
          rates_(rates),
          kv_heads_(kv_heads),
          rows_(layers * kv_heads),
          tokens_(rates.size() / rows_.size()) {}

    void pass(std::size_t seen, std::size_t count) {
        for (std::size_t i = 0; i < rows_.size(); ++i)
            for (std::size_t t = seen - count; t < seen; ++t) rows_[i].push_back(static_cast<position_t>(t));
        newest_ = static_cast<position_t>(seen) - 1;
        const std::size_t together = policy_.mode == TrimKV::Mode::global  ? rows_.size()
                                     : policy_.mode == TrimKV::Mode::layer ? kv_heads_
                                                                           : 1;
        for (std::size_t first = 0; first < rows_.size(); first += together) {
            if (first / kv_heads_ < policy_.skip_layers) continue;
            if (policy_.mode == TrimKV::Mode::threshold)
                cut(first);
            else
                rank(first, together);
        }
    }
    [[nodiscard]] const Rows& all() const { return rows_; }

  private:
    struct Entry {
        double score;
        position_t position;
        std::size_t stream;

        bool operator<(const Entry& other) const {
            return std::tie(score, position, stream) > std::tie(other.score, other.position, other.stream);
        }
    };
    static constexpr double best = 1e300, worst = -1e300;

    [[nodiscard]] double score(std::size_t stream, position_t position) const {
        if (recent(stream, position)) return best;
        const float rate = rates_[stream * tokens_ + static_cast<std::size_t>(position)];
        const double age = static_cast<double>(newest_ - position) + static_cast<double>(policy_.newest_age);
        if (!is_finite(rate)) return age == 0.0 ? 0.0 : worst;
        double worth = 0.0;  // sum of beta^s over the next steps, without the age
        for (std::size_t step = 0; step < policy_.lookahead; ++step)
            worth += std::exp(static_cast<double>(rate) * static_cast<double>(step));
        return static_cast<double>(static_cast<float>(age * static_cast<double>(rate) + std::log(worth)));
    }
    [[nodiscard]] bool recent(std::size_t stream, position_t position) const {
        const auto& own = rows_[stream];
        return own.end() - std::lower_bound(own.begin(), own.end(), position) <=
               static_cast<std::ptrdiff_t>(policy_.window);
    }
    [[nodiscard]] std::vector<Entry> ranked(std::size_t first, std::size_t count) const {
        std::vector<Entry> entries;
        for (std::size_t i = first; i < first + count; ++i)
            for (const position_t p : rows_[i]) entries.push_back({score(i, p), p, i});
        std::sort(entries.begin(), entries.end());
        return entries;
    }
    void keep(const std::vector<Entry>& entries, std::size_t first, std::size_t count) {
        for (std::size_t i = first; i < first + count; ++i) rows_[i].clear();
        for (const Entry& entry : entries) rows_[entry.stream].push_back(entry.position);
        for (std::size_t i = first; i < first + count; ++i) std::sort(rows_[i].begin(), rows_[i].end());
    }
    void rank(std::size_t first, std::size_t count) {
        std::vector<Entry> entries = ranked(first, count);
        if (entries.size() < count * (budget_ + std::max<std::size_t>(policy_.buffer, 1))) return;
        entries.resize(count * (budget_ - policy_.floor));
        if (policy_.floor > 0) {
            std::vector<Entry> all;
            for (std::size_t i = first; i < first + count; ++i) {
                std::vector<Entry> own = ranked(i, 1);
                const auto taken = static_cast<std::size_t>(std::count_if(
                    entries.begin(), entries.end(), [&](const Entry& e) { return e.stream == i; }));
                own.resize(std::min(own.size(), taken + policy_.floor));
                all.insert(all.end(), own.begin(), own.end());
            }
            entries = all;
        }
        keep(entries, first, count);
    }
    void cut(std::size_t stream) {
        std::vector<Entry> entries = ranked(stream, 1);
        std::erase_if(entries, [&](const Entry& e) {
            return e.score < static_cast<double>(std::log(policy_.threshold));
        });
        keep(entries, stream, 1);
    }

    TrimKV policy_;
    std::size_t budget_;
    const std::vector<float>& rates_;
    std::size_t kv_heads_;
    Rows rows_;
    std::size_t tokens_;
    position_t newest_ = 0;
};

/// Runs every driver beside the reference and compares what is held after every pass. @returns cuts of a run.
std::size_t check_against_reference(const TrimKV& policy, std::size_t budget, const std::vector<float>& rates,
                                    std::size_t chunk) {
    const Stream stream = random_stream(shape, tokens, 3);
    std::size_t cuts = 0;
    for_each_driver(shape, policy, {.tokens = budget}, [&](auto& cache, const std::string& driver) {
        CAPTURE(driver);
        Reference reference(policy, budget, rates, shape.layers, shape.kv_heads);
        std::size_t last = 0, wrong = 0;
        cuts = 0;
        run(cache, stream, rates, chunk, [&](std::size_t seen) {
            const std::size_t before = reference.all()[3].size() + seen - last;
            reference.pass(seen, seen - last);
            cuts += reference.all()[3].size() < before ? 1 : 0;
            last = seen;
            wrong += all_positions(cache) == reference.all() ? 0 : 1;
        });
        CHECK(wrong == 0);
        CHECK(rows_are_copies(cache, stream));
        CHECK(states_fit(cache));
    });
    return cuts;
}

/// A model with gates: weights, and what enters them.
struct GatedModel {
    static constexpr std::size_t input = 5, width = 3;
    std::vector<float> w1 = random_floats(2 * width * input, 21), b1 = random_floats(2 * width, 22),
                       w_out = random_floats(2 * 2 * width, 23), bias = random_floats(2 * 2, 24),
                       x = random_floats(tokens * input, 25);

    [[nodiscard]] Gates gates(std::size_t layers = 2) const {
        std::vector<Gates::View> all;
        for (std::size_t i = 0; i < layers; ++i)
            all.push_back({.w1 = {w1.data() + i * width * input, width, input},
                           .b1 = {b1.data() + i * width, width},
                           .w2 = {},
                           .b2 = {},
                           .w_out = {w_out.data() + i * 2 * width, 2, width},
                           .bias = {bias.data() + i * 2, 2}});
        return Gates(std::move(all));
    }
    [[nodiscard]] MatrixView<const float> inputs(std::size_t first, std::size_t count) const {
        return {x.data() + first * input, count, input};
    }
};

}  // namespace

TEST_CASE("TRIM-KV keeps the contract of every policy", "[property]") {
    policy_conformance(SelfGated{});
}

TEST_CASE("TRIM-KV keeps what full sorts of all scores keep, at every cut", "[differential]") {
    const std::vector<float> rates = hostile_rates(1);
    const std::size_t chunk = GENERATE(std::size_t{prompt}, 7);
    CAPTURE(chunk);
    SECTION("per head, with every option") {
        for (const std::size_t newest_age : {0U, 1U, 2U, 3U}) {
            CAPTURE(newest_age);
            CHECK(check_against_reference({.newest_age = newest_age}, 9, rates, chunk) > 30);
        }
        CHECK(check_against_reference({.buffer = 0}, 9, rates, chunk) > 30);
        CHECK(check_against_reference({.buffer = 6}, 9, rates, chunk) > 5);
        CHECK(check_against_reference({.buffer = 4, .window = 3}, 9, rates, chunk) > 5);
        CHECK(check_against_reference({.window = 9}, 9, rates, chunk) > 30);
        CHECK(check_against_reference({.window = 50}, 9, rates, chunk) > 30);
        CHECK(check_against_reference({.newest_age = 3, .lookahead = 8}, 9, rates, chunk) > 30);
        CHECK(check_against_reference({.lookahead = 2}, 9, rates, chunk) > 30);
        CHECK(check_against_reference({.skip_layers = 1}, 9, rates, chunk) > 30);
        CHECK(check_against_reference({}, 1, rates, chunk) > 30);
    }
    SECTION("a budget for a layer or for the model") {
        for (const TrimKV::Mode mode : {TrimKV::Mode::layer, TrimKV::Mode::global})
            for (const std::size_t floor : {0U, 1U, 4U, 8U}) {
                CAPTURE(static_cast<int>(mode), floor);
                CHECK(check_against_reference({.mode = mode, .floor = floor}, 9, rates, chunk) > 10);
                CHECK(check_against_reference({.buffer = 5, .window = 1, .mode = mode, .floor = floor}, 9,
                                              rates, chunk) > 5);
            }
        CHECK(check_against_reference({.mode = TrimKV::Mode::layer, .skip_layers = 1}, 9, rates, chunk) > 30);
    }
    SECTION("a threshold") {
        for (const float threshold : {1e-4F, 0.3F, 0.999F, 1.0F}) {
            CAPTURE(threshold);
            const TrimKV policy{.mode = TrimKV::Mode::threshold, .threshold = threshold};
            CHECK(check_against_reference(policy, 9, rates, chunk) > 5);
            CHECK(check_against_reference({.window = 4, .mode = policy.mode, .threshold = threshold}, 9,
                                          rates, chunk) > 5);
        }
    }
    SECTION("ties go to the newer token and then to the later stream") {
        std::vector<float> equal(rates.size(), -0.25F);
        equal[1] = -1e-4F;  // takes a place for good, so that ties between streams are cut apart
        const std::vector<float> zeros(rates.size());
        for (const TrimKV::Mode mode : {TrimKV::Mode::head, TrimKV::Mode::layer, TrimKV::Mode::global})
            for (const std::vector<float>& tied : {zeros, equal})
                CHECK(check_against_reference({.buffer = 3, .mode = mode}, 9, tied, chunk) > 5);
    }
}

TEST_CASE("a threshold needs no budget and a budget changes nothing in it", "[property]") {
    const std::vector<float> rates = hostile_rates(2);
    const Stream stream = random_stream(shape, tokens, 3);
    const TrimKV policy{.mode = TrimKV::Mode::threshold, .threshold = 0.2F};
    KVCache free(shape, policy), bound(shape, policy, Budget{.tokens = 2});
    run(free, stream, rates, 9, [](std::size_t) {});
    run(bound, stream, rates, 9, [](std::size_t) {});
    CHECK((all_positions(free) == all_positions(bound)));
    CHECK(free.rows(1, 1) < tokens);
    CHECK(free.rows(1, 1) > 2);
    KVCache twin = free.fork();  // blocks are shared: what goes must be copied first
    const Snapshot before = snapshot(free);
    twin.begin_prompt();
    std::vector<float> gone(rates.size(), negative_infinity());
    for (int step = 0; step < 3; ++step) feed_rates(twin, stream, gone, 0, 1);
    CHECK((snapshot(free) == before));
}

TEST_CASE("equal rates make a sliding window, and tokens that never decay are sinks", "[property]") {
    const Stream stream = random_stream(shape, tokens, 3);
    std::vector<float> rates(4 * tokens, -0.02F);
    const auto held = [&] {
        KVCache cache(shape, TrimKV{}, Budget{.tokens = 8});
        run(cache, stream, rates, 5, [](std::size_t) {});
        return positions_of(cache.view(1, 0));
    };
    std::vector<position_t> want(8);
    std::iota(want.begin(), want.end(), static_cast<position_t>(tokens - 8));
    CHECK((held() == want));
    for (std::size_t i = 0; i < rates.size(); ++i)
        if (i % tokens < 3) rates[i] = 0.0F;
    std::iota(want.begin(), want.begin() + 3, position_t{0});
    CHECK((held() == want));
}

TEST_CASE("rates that round to the same beta are still told apart", "[property]") {
    const Stream stream = random_stream({.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 2}, tokens, 3);
    std::vector<float> rates(tokens, -2e-8F);
    rates[4] = -1e-8F;
    REQUIRE(same_bits(std::exp(rates[3]), std::exp(rates[4])));
    KVCache cache(stream.shape, TrimKV{}, Budget{.tokens = 1});
    cache.begin_prompt();
    feed_rates(cache, stream, rates, 0, 8);  // the age of token 4 is 5, that of token 7 is 2
    CHECK(cache.positions(0, 0) == std::vector<position_t>{7});
    rates[4] = -0.7e-8F;
    KVCache other(stream.shape, TrimKV{}, Budget{.tokens = 1});
    other.begin_prompt();
    feed_rates(other, stream, rates, 0, 8);
    CHECK(other.positions(0, 0) == std::vector<position_t>{4});
}

TEST_CASE("ages are distances between positions, whatever lies in the gaps", "[property]") {
    const CacheShape one{.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 3};
    const Stream stream = random_stream(one, 3, 3);
    const std::vector<position_t> positions{2, 5, position_t{1} << 33};
    const std::vector<float> rates{-1e-3F, -2e-3F, -1e-12F};
    std::vector<float> out(9);
    KVCache cache(one, TrimKV{.newest_age = 1}, Budget{.tokens = 3});
    cache.append(0, stream.keys(0, 0, 3), stream.values(0, 0, 3),
                 {.positions = positions, .log_beta = {rates.data(), 1, 3}});
    cache.attend(0, stream.queries(0, 0, 3), head_major(out.data(), 1, 3, 3));
    cache.end_step();
    const std::vector<float> scores = cache.scores(0, 0);
    for (std::size_t i = 0; i < 3; ++i)
        CHECK(close(scores[i],
                    static_cast<double>(positions[2] - positions[i] + 1) * static_cast<double>(rates[i]),
                    1e-6, 0));
}

TEST_CASE("the key's norm weighs a token where it is asked for", "[property]") {
    const CacheShape one{.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 2};
    Stream stream = random_stream(one, 6, 3);
    const std::vector<float> rates(6, -0.1F);
    for (std::size_t t = 0; t < 6; ++t) {
        stream.k[2 * t] = 0.0F;
        stream.k[2 * t + 1] = t == 1 ? 50.0F : t == 4 ? 0.0F : 1.0F;
    }
    for_each_driver(
        one, TrimKV{.key_norm = true}, {.tokens = 3}, [&](auto& cache, const std::string& driver) {
            CAPTURE(driver);
            cache.begin_prompt();
            feed_rates(cache, stream, rates, 0, 6);
            CHECK((positions_of(cache.view(0, 0)) == std::vector<position_t>{1, 3, 5}));
            const std::vector<float> scores = sorted_by_position(cache.view(0, 0), cache.scores(0, 0));
            CHECK(close(scores[0], -0.1 * 6.0 + std::log(50.0), 1e-6, 1e-6));
        });
}

TEST_CASE("a log beta that is none is refused by name, and nothing has changed", "[contract]") {
    const Stream stream = random_stream(shape, tokens, 3);
    for (const float bad : {0.5F, 1e-30F, positive_infinity(), quiet_nan(), -quiet_nan()}) {
        std::vector<float> rates(4 * tokens, -0.1F);
        KVCache cache(shape, TrimKV{}, Budget{.tokens = 8});
        cache.begin_prompt();
        feed_rates(cache, stream, rates, 0, 20);
        const Snapshot before = snapshot(cache);
        const std::size_t bytes = cache.bytes();
        rates[1 * tokens + 22] = bad;  // layer 0, head 1, the third new token
        const std::string text =
            failure<error::shape_error>([&] { feed_rates(cache, stream, rates, 20, 5); });
        CHECK(text.starts_with("TrimKV: log_beta of layer 0, head 1, token 2 is "));
        CHECK(text.ends_with(", want at most 0"));
        CHECK((snapshot(cache) == before));
        CHECK(cache.bytes() == bytes);
        rates[1 * tokens + 22] = -0.0F;
        feed_rates(cache, stream, rates, 20, 5);
        CHECK(cache.seen() == 25);
    }
}

TEST_CASE("a rollback brings evicted tokens and their rates back", "[property]") {
    const Stream stream = random_stream(shape, tokens, 3);
    const std::vector<float> rates = hostile_rates(4);
    KVCache cache(shape, TrimKV{.mode = TrimKV::Mode::global, .floor = 1}, Budget{.tokens = 8});
    cache.begin_prompt();
    feed_rates(cache, stream, rates, 0, 30);
    const Mark mark = cache.mark();
    const Snapshot before = snapshot(cache);
    for (std::size_t t = 30; t < 50; ++t) feed_rates(cache, stream, rates, t, 1);
    const Snapshot after = snapshot(cache);
    cache.rollback(mark);
    CHECK((snapshot(cache) == before));
    for (std::size_t t = 30; t < 50; ++t) feed_rates(cache, stream, rates, t, 1);
    CHECK((snapshot(cache) == after));
}

TEST_CASE("gates make of the attention input what their log beta would have been", "[differential]") {
    const GatedModel model;
    const Stream stream = random_stream(shape, tokens, 3);
    std::vector<float> rates(4 * tokens);
    Scratch<float> workspace;
    for (std::size_t layer = 0; layer < 2; ++layer)
        model.gates().log_beta(simd::kernels(), layer, model.inputs(0, tokens),
                               {rates.data() + layer * 2 * tokens, 2, tokens}, workspace);
    KVCache by_rates(shape, TrimKV{}, Budget{.tokens = 8});
    run(by_rates, stream, rates, 11, [](std::size_t) {});

    KVCache gated(shape, TrimKV{.gates = model.gates()}, Budget{.tokens = 8});
    const auto feed_inputs = [&](auto& cache, std::size_t first, std::size_t count) {
        std::vector<float> out(shape.q_heads * count * shape.head_dim);
        for (std::size_t layer = 0; layer < 2; ++layer) {
            cache.append(layer, stream.keys(layer, first, count), stream.values(layer, first, count),
                         {.attention_input = model.inputs(first, count)});
            cache.attend(layer, stream.queries(layer, first, count),
                         head_major(out.data(), shape.q_heads, count, shape.head_dim));
        }
        cache.end_step();
    };
    gated.begin_prompt(prompt);
    for (std::size_t at = 0; at < prompt; at += 11) feed_inputs(gated, at, 11);
    gated.end_prompt();
    for (std::size_t at = prompt; at < tokens; ++at) feed_inputs(gated, at, 1);
    CHECK((all_positions(gated) == all_positions(by_rates)));

    SECTION("a log beta that is given goes before the gates") {
        KVCache both(shape, TrimKV{.gates = model.gates()}, Budget{.tokens = 8});
        run(both, stream, rates, 11, [](std::size_t) {});
        CHECK((snapshot(both) == snapshot(by_rates)));
    }
    SECTION("an input that is not finite, missing or of another width is refused by name") {
        GatedModel bad;
        bad.x[(prompt + 1) * GatedModel::input + 2] = quiet_nan();
        const auto append = [&](KVCache<TrimKV>& cache, const AppendInputs& inputs) {
            cache.append(0, stream.keys(0, prompt, 2), stream.values(0, prompt, 2), inputs);
        };
        KVCache cache(shape, TrimKV{.gates = model.gates()}, Budget{.tokens = 8});
        cache.begin_prompt();
        feed_inputs(cache, 0, 20);
        const Snapshot before = snapshot(cache);
        CHECK(failure<error::shape_error>([&] {
                  append(cache, {.attention_input = bad.inputs(prompt, 2)});
              }).starts_with("Gates::log_beta: attention_input of layer 0, token 1 is "));
        CHECK(failure<error::shape_error>([&] {
                  append(cache, {.attention_input = {bad.x.data(), 2, 4}});
              }) == "Gates::log_beta: attention_input.cols of layer 0 is 4, want 5");
        CHECK(failure<error::state_error>([&] { append(cache, {}); }) ==
              "KVCache::append: attention_input is missing, want given with the tokens: trimkv needs it");
        CHECK((snapshot(cache) == before));
        feed_inputs(cache, 20, 2);
        CHECK(cache.seen() == 22);
        KVCache bare(shape, TrimKV{}, Budget{.tokens = 8});
        CHECK(failure<error::state_error>([&] { append(bare, {.attention_input = model.inputs(0, 2)}); }) ==
              "KVCache::append: log_beta is missing, want given with the tokens: trimkv needs it");
    }
    SECTION("gates of another model are refused when a cache takes them") {
        CHECK(failure<error::config_error>([&] {
                  KVCache cache(shape, TrimKV{.gates = model.gates(1)}, Budget{.tokens = 8});
              }) == "TrimKV: gates.layers() is 1, want 2");
        CacheShape wide = shape;
        wide.kv_heads = 4;
        CHECK(failure<error::config_error>([&] {
                  KVCache cache(wide, TrimKV{.gates = model.gates()}, Budget{.tokens = 8});
              }) == "TrimKV: gates.kv_heads() is 2, want 4");
    }
}

TEST_CASE("parameters that exclude each other are refused", "[contract]") {
    using Mode = TrimKV::Mode;
    const auto text = [](const TrimKV& policy) {
        return failure<error::config_error>([&] { KVCache cache(shape, policy, Budget{.tokens = 8}); });
    };
    CHECK(text({.newest_age = 4}) == "TrimKV: newest_age is 4, want 0 to 3");
    CHECK(text({.lookahead = 0}) == "TrimKV: lookahead is 0, want at least 1");
    CHECK(text({.floor = 1}) == "TrimKV: floor is 1, want 0 unless mode is layer or global");
    CHECK(text({.mode = Mode::global, .floor = 8}) == "TrimKV: floor is 8, want less than the budget 8");
    CHECK(text({.window = 6, .mode = Mode::layer, .floor = 3}) ==
          "TrimKV: window is 6, want at most budget - floor = 5 where heads are ranked together");
    CHECK(text({.mode = Mode::threshold}).ends_with("want in (0, 1]"));
    CHECK(text({.mode = Mode::threshold, .threshold = 1.5F}).ends_with("want in (0, 1]"));
    CHECK(text({.mode = Mode::threshold, .threshold = quiet_nan()}).ends_with("want in (0, 1]"));
    CHECK(text({.threshold = 0.5F}).ends_with("want 0 unless mode is threshold"));
    CHECK(text({.mode = Mode::global, .skip_layers = 1}) ==
          "TrimKV: skip_layers is 1, want 0 if mode is global");
    CHECK(failure<error::config_error>([] { KVCache cache(shape, TrimKV{}); }).starts_with("Budget: tokens"));
}

TEST_CASE("TRIM-KV is chosen by name, its gates by a path", "[contract]") {
    const TrimKV policy = parse_policy<TrimKV>(
        "buffer=32,newest_age=0,window=4,lookahead=16,mode=global,floor=2,key_norm=true");
    CHECK(policy.buffer == 32);
    CHECK(policy.newest_age == 0);
    CHECK(policy.window == 4);
    CHECK(policy.lookahead == 16);
    CHECK((policy.mode == TrimKV::Mode::global));
    CHECK(policy.floor == 2);
    CHECK(policy.key_norm);
    CHECK_FALSE(policy.gated());
    CHECK(parse_policy<TrimKV>("gates=" KVCULL_TESTS_DIR "/data/golden/trimkv/checkpoint.safetensors")
              .gates.layers() == 2);
    CHECK(failure<error::format_error>([] { (void)parse_policy<TrimKV>("gates=none.safetensors"); }) ==
          "none.safetensors: cannot be opened");
}
