#include "kvcull/policies/skipkv.hpp"

#include <algorithm>
#include <set>
#include <span>
#include <vector>

#include "kvcull/cache/saved.hpp"
#include "kvcull/policies/h2o.hpp"
#include "kvcull/policies/keydiff.hpp"
#include "support/catch.hpp"
#include "support/conformance.hpp"
#include "support/failure.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

const CacheShape small{.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 16};
constexpr std::size_t tokens = 160, hidden_size = 12, prompt = 37, budget = 40;
const SentenceRules rules{.delimiters = {2, 3}, .markers = {5}};
const SkipKV<> skip{{.window = 6, .interval = 16, .kernel = 3}, rules};
/// Keeps all sentences, so that tables can be compared whatever was evicted.
const SkipKV<> recalling = [] {
    SkipKV<> policy = skip;
    policy.prune = false;
    return policy;
}();
const RKV plain{.window = 6, .interval = 16, .kernel = 3};

/// Sentences about one of four subjects; those about one subject have hidden states alike.
struct Text {
    std::vector<std::int32_t> ids;
    std::vector<float> hidden;  // [tokens, hidden_size]

    explicit Text(std::uint64_t seed, std::size_t count = tokens)
        : hidden(random_floats(count * hidden_size, seed, 0.1F)) {
        const std::vector<float> subjects = random_floats(4 * hidden_size, seed + 1);
        SplitMix64 random{seed};
        for (std::size_t t = 0, subject = 0, length = 0; t < count; ++t, ++length) {
            for (std::size_t c = 0; c < hidden_size; ++c)
                hidden[t * hidden_size + c] += subjects[subject * hidden_size + c];
            const bool ends = length >= 3 && random() % 4 == 0;
            ids.push_back(ends ? 2 : random() % 20 == 0 ? 5 : 10);
            if (!ends) continue;
            subject = random() % 4;
            length = 0;
        }
    }
    [[nodiscard]] StepInputs inputs(std::size_t first, std::size_t count) const {
        return {std::span(ids).subspan(first, count),
                {hidden.data() + first * hidden_size, count, hidden_size}};
    }
};
const Stream stream = random_stream(small, tokens, 1);
const Text text(7);

/// The prompt in calls of `chunk`, then calls of `call` tokens, all with the text.
template <class Cache>
void speak(Cache& cache, std::size_t begin, std::size_t end, std::size_t chunk = prompt, std::size_t call = 1,
           const Text& words = text) {
    if (begin == 0) cache.begin_prompt(prompt);
    for (std::size_t at = begin; at < end;) {
        const std::size_t count = at < prompt ? std::min(chunk, prompt - at) : std::min(call, end - at);
        feed(cache, stream, at, count, words.inputs(at, count));
        at += count;
        if (at == prompt) cache.end_prompt();
    }
}
template <class Cache>
const SentenceTable& table_of(const Cache& cache) {
    return cache.evictor().live().sequence;
}
bool same(const SentenceTable& a, const SentenceTable& b) {
    const auto equal = [](const Sentence& x, const Sentence& y) {
        return x.begin == y.begin && x.end == y.end && x.count == y.count && x.peer == y.peer &&
               same_bits(x.similarity, y.similarity) && x.non_execution == y.non_execution &&
               x.closed == y.closed && x.scored == y.scored && x.embedded == y.embedded;
    };
    const auto left = a.sentences(), right = b.sentences();
    if (!std::equal(left.begin(), left.end(), right.begin(), right.end(), equal)) return false;
    for (std::size_t i = 0; i < left.size(); ++i)
        if (!same_bits(a.embedding(i), b.embedding(i))) return false;
    return true;
}

}  // namespace

TEST_CASE("SkipKV over any base keeps the contract of a policy", "[property]") {
    const Promises seldom{
        .evictions = 2, .while_decoding = false, .chunks_do_not_matter = true, .tie_free_dim = 2};
    SECTION("over R-KV") {
        policy_conformance(SkipKV<>{{.window = 4, .interval = 8, .kernel = 3}, rules}, seldom);
    }
    SECTION("over H2O") {
        policy_conformance(SkipKV<H2O>{{}, rules});
    }
    SECTION("over KeyDiff, which reads along and follows what leaves") {
        policy_conformance(SkipKV<KeyDiff>{{}, rules}, {.tie_free_dim = 2});
    }
    SECTION("over SnapKV") {
        policy_conformance(SkipKV<SnapKV>{{.window = 4, .kernel = 3}, rules},
                           {.evictions = 1, .while_decoding = false, .chunks_do_not_matter = true});
    }
}

TEST_CASE("a saved cache goes on with its sentences, bit for bit", "[property]") {
    for (const std::size_t cut : {prompt, std::size_t{101}}) {
        KVCache cache(small, skip, Budget{.tokens = budget}), loaded(small, skip, Budget{.tokens = budget});
        speak(cache, 0, cut);
        load(loaded, save(cache));
        REQUIRE(same(table_of(loaded), table_of(cache)));
        speak(cache, cut, tokens);
        speak(loaded, cut, tokens);
        REQUIRE(table_of(cache).any_redundant());
        CHECK((snapshot(loaded) == snapshot(cache)));
        CHECK(save(loaded) == save(cache));
    }
}

TEST_CASE("without sentences said again SkipKV is its base, bit for bit", "[property]") {
    KVCache want(small, plain, Budget{.tokens = budget});
    speak(want, 0, tokens);
    const auto check = [&](const SkipKV<>& policy, const Text* words) {
        KVCache cache(small, policy, Budget{.tokens = budget});
        Text silent = text;
        if (words == nullptr) silent.hidden.clear();
        cache.begin_prompt(prompt);
        for (std::size_t at = 0; at < tokens; ++at) {
            StepInputs inputs = (words == nullptr ? text : *words).inputs(at, 1);
            if (words == nullptr) inputs.hidden = {};
            feed(cache, stream, at, 1, inputs);
            if (at + 1 == prompt) cache.end_prompt();
        }
        return snapshot(cache) == snapshot(want);
    };
    SkipKV<> never = skip, whole = skip;
    never.sentences.tau = 1.0F;
    whole.sentences.delimiters = {};
    CHECK(check(never, &text));
    CHECK(check(whole, &text));
    CHECK(check(skip, nullptr));
    CHECK_FALSE(check(skip, &text));
    KVCache mute(small, skip, Budget{.tokens = budget});
    feed_prompt(mute, stream, 0, prompt, prompt);
    feed_decode(mute, stream, prompt, tokens);
    CHECK((snapshot(mute) == snapshot(want)));
}

TEST_CASE("tokens of sentences said again leave before all others, eviction after eviction", "[property]") {
    for_each_driver(small, skip, {.tokens = budget}, [&](auto& cache, const std::string& driver) {
        CAPTURE(driver);
        speak(cache, 0, prompt);
        std::size_t evictions = 0, sentences_decided = 0;
        for (std::size_t at = prompt; at < tokens; ++at) {
            std::vector<std::vector<position_t>> before = all_positions(cache);
            speak(cache, at, at + 1);
            const std::vector<std::vector<position_t>> after = all_positions(cache);
            for (std::size_t i = 0; i < before.size(); ++i) {
                before[i].push_back(static_cast<position_t>(at));
                if (after[i].size() == before[i].size()) continue;
                ++evictions;
                REQUIRE(after[i].size() == budget);
                std::size_t candidates = 0, gone = 0, good_gone = 0;
                for (std::size_t j = 0; j < before[i].size(); ++j) {
                    const bool redundant = table_of(cache).similarity_at(before[i][j]) > 0.0F;
                    const bool left = !std::binary_search(after[i].begin(), after[i].end(), before[i][j]);
                    if (j + skip.window >= before[i].size())
                        CHECK_FALSE(left);
                    else
                        candidates += redundant ? 1 : 0;
                    gone += left ? 1 : 0;
                    good_gone += left && !redundant ? 1 : 0;
                }
                CHECK(good_gone == gone - std::min(candidates, gone));
                sentences_decided += candidates > 0 ? 1 : 0;
            }
        }
        CHECK(evictions >= 4 * 7);
        CHECK(sentences_decided >= 4 * 5);
    });
}

TEST_CASE("the table depends on tokens and hidden states alone, however they are cut into calls",
          "[property]") {
    KVCache one(small, recalling, Budget{.tokens = budget});
    speak(one, 0, tokens);
    REQUIRE(table_of(one).any_redundant());
    for (const std::size_t chunk : {1U, 5U, 16U})
        for (const std::size_t call : {1U, 3U, 7U}) {
            KVCache other(small, recalling, Budget{.tokens = budget});
            speak(other, 0, tokens, chunk, call);
            CAPTURE(chunk, call);
            CHECK(same(table_of(other), table_of(one)));
        }
    SkipKV<> different = recalling;
    different.sigma = 0.7F;
    KVCache larger(small, different, Budget{.tokens = 90});
    speak(larger, 0, tokens);
    CHECK(same(table_of(larger), table_of(one)));
}

TEST_CASE("a prompt is one step: it is evicted first, and its sentences are compared after it",
          "[property]") {
    const Text words(11);
    const auto spoken = [&](std::size_t length, bool announced) {
        SkipKV<> policy = skip;
        KVCache cache(small, policy, Budget{.tokens = 20});
        KVCache base(small, plain, Budget{.tokens = 20});
        cache.begin_prompt(announced ? std::optional(length) : std::nullopt);
        base.begin_prompt(announced ? std::optional(length) : std::nullopt);
        for (std::size_t at = 0; at < length; at += 8) {  // calls that end at multiples of the interval
            feed(cache, stream, at, 8, words.inputs(at, 8));
            feed(base, stream, at, 8);
            CHECK_FALSE(table_of(cache).any_redundant());
        }
        cache.end_prompt();
        base.end_prompt();
        CHECK((all_positions(cache) == all_positions(base)));
        return table_of(cache).any_redundant();
    };
    for (const bool announced : {true, false}) {
        CHECK(spoken(64, announced));        // a multiple of 16: compared at the prompt's end
        CHECK_FALSE(spoken(72, announced));  // not one
    }
}

TEST_CASE("on a long stream the table holds what the heads still hold, and nothing else changes",
          "[property]") {
    constexpr std::size_t length = 1600;
    const Stream long_stream = random_stream(small, length, 21);
    const Text long_text(22, length);
    const auto check = [&](const auto& base) {
        using Skip = SkipKV<std::remove_cvref_t<decltype(base)>>;
        Skip forgets{base, rules, 16}, recalls{base, rules, 16};
        recalls.prune = false;
        KVCache cache(small, forgets, Budget{.tokens = budget}),
            all(small, recalls, Budget{.tokens = budget});
        std::vector<std::size_t> sizes;
        for (std::size_t at = 0; at < length; at += 16) {
            for (std::size_t i = at; i < at + 16; ++i) {
                feed(cache, long_stream, i, 1, long_text.inputs(i, 1));
                feed(all, long_stream, i, 1, long_text.inputs(i, 1));
            }
            REQUIRE((snapshot(cache) == snapshot(all)));
            REQUIRE(table_of(cache).non_execution_count() == table_of(all).non_execution_count());
            sizes.push_back(table_of(cache).sentences().size());
        }
        // No more sentences than rows that could hold one each, after any number of tokens.
        const std::size_t rows = small.heads() * (budget + 2 * 16);
        CHECK(*std::max_element(sizes.begin(), sizes.end()) <= rows);
        CHECK(*std::max_element(sizes.begin() + 50, sizes.end()) <
              *std::max_element(sizes.begin(), sizes.begin() + 50) + 10);
        CHECK(table_of(all).sentences().size() > 2 * sizes.back());
    };
    check(plain);
    check(H2O{});
}

TEST_CASE("with the trigger newline a head evicts where a sentence ends, however calls are cut",
          "[property]") {
    SkipKV<> policy = skip;
    policy.trigger = Trigger::newline;
    for (const std::size_t call : {1U, 3U, 7U})
        for_each_driver(small, policy, {.tokens = budget}, [&](auto& cache, const std::string& driver) {
            CAPTURE(driver, call);
            speak(cache, 0, prompt);
            std::size_t evictions = 0, waits = 0;
            for (std::size_t at = prompt; at < tokens; at += call) {
                const std::size_t count = std::min(call, tokens - at), before = cache.rows(1, 0) + count;
                speak(cache, at, at + count, prompt, call);
                const auto first = text.ids.begin() + static_cast<std::ptrdiff_t>(at);
                const bool ends = std::count(first, first + static_cast<std::ptrdiff_t>(count), 2) > 0;
                CHECK(cache.rows(1, 0) == (ends ? std::min(before, budget) : before));
                evictions += ends && before > budget ? 1 : 0;
                waits += !ends && before > budget ? 1 : 0;
            }
            CHECK(evictions > 5);
            CHECK(waits > (call == 7 ? 0 : 5));
        });
}

TEST_CASE("where no token ids are given the trigger newline evicts after every call", "[property]") {
    SkipKV<> policy = skip;
    policy.trigger = Trigger::newline;
    KVCache cache(small, policy, Budget{.tokens = budget});
    feed_prompt(cache, stream, 0, prompt, prompt);
    feed_decode(cache, stream, prompt, 100);
    CHECK(cache.rows(0, 0) == budget);
    feed_decode(cache, stream, 100, 101);
    CHECK(cache.rows(0, 0) == budget);
}

TEST_CASE("marks and forks take the sentences along", "[property]") {
    KVCache cache(small, skip, Budget{.tokens = budget}), alone(small, skip, Budget{.tokens = budget});
    const Text other(99);
    speak(alone, 0, tokens);
    speak(cache, 0, 90);
    const SentenceTable before = table_of(cache);
    const Mark mark = cache.mark();
    KVCache fork = cache.fork();
    speak(cache, 90, tokens, prompt, 1, other);
    CHECK_FALSE(same(table_of(cache), table_of(alone)));
    CHECK(same(table_of(fork), before));
    cache.rollback(mark);
    CHECK(same(table_of(cache), before));
    speak(cache, 90, tokens);
    speak(fork, 90, tokens);
    CHECK(same(table_of(cache), table_of(alone)));
    CHECK(same(table_of(fork), table_of(alone)));
    CHECK((snapshot(cache) == snapshot(alone)));
    CHECK((snapshot(fork) == snapshot(alone)));
}

TEST_CASE("tokens that are taken back are said anew", "[property]") {
    KVCache cache(small, skip, Budget{.tokens = 1000});
    speak(cache, 0, 100);
    cache.truncate(30);
    const Text other(5);
    speak(cache, 70, tokens, prompt, 1, other);
    const auto sentences = table_of(cache).sentences();
    for (std::size_t i = 1; i < sentences.size(); ++i) CHECK(sentences[i].begin == sentences[i - 1].end + 1);
    CHECK(sentences.back().end == tokens - 1);
    // What begins after the cut is as if nothing else had ever been said.
    KVCache fresh(small, skip, Budget{.tokens = 1000});
    Text joined = text;
    std::copy(other.ids.begin() + 70, other.ids.end(), joined.ids.begin() + 70);
    std::copy(other.hidden.begin() + 70 * hidden_size, other.hidden.end(),
              joined.hidden.begin() + 70 * hidden_size);
    speak(fresh, 0, tokens, prompt, 1, joined);
    const auto want = table_of(fresh).sentences();
    REQUIRE(sentences.size() == want.size());
    for (std::size_t i = 0; i < want.size(); ++i) {
        CHECK(sentences[i].begin == want[i].begin);
        CHECK(sentences[i].end == want[i].end);
        if (sentences[i].begin >= 70)
            CHECK(same_bits(table_of(cache).embedding(i), table_of(fresh).embedding(i)));
    }
}

TEST_CASE("sentences are found by the positions that the caller gives", "[property]") {
    const auto position_of = [](std::size_t t) {
        return static_cast<position_t>(3 * t + (t > 60 ? 1000 : 0));
    };
    Stream gaps = stream;
    for (std::size_t t = 0; t < tokens; ++t) gaps.positions.push_back(position_of(t));
    KVCache cache(small, recalling, Budget{.tokens = budget}),
        want(small, recalling, Budget{.tokens = budget});
    speak(want, 0, tokens);
    cache.begin_prompt(prompt);
    for (std::size_t at = 0; at < tokens;) {
        const std::size_t count = at == 0 ? prompt : std::min<std::size_t>(3, tokens - at);
        feed(cache, gaps, at, count, text.inputs(at, count));
        at += count;
        if (at == prompt) cache.end_prompt();
    }
    const auto given = table_of(cache).sentences(), counted = table_of(want).sentences();
    REQUIRE(given.size() == counted.size());
    for (std::size_t i = 0; i < given.size(); ++i) {
        CHECK(given[i].begin == position_of(static_cast<std::size_t>(counted[i].begin)));
        CHECK(given[i].end == position_of(static_cast<std::size_t>(counted[i].end)));
    }
}

TEST_CASE("the penalty decides over bases of any scale", "[property]") {
    const auto check = [&](const auto& base, float scale) {
        Stream loud = stream;
        for (float& x : loud.k) x *= scale;
        using Base = std::remove_cvref_t<decltype(base)>;
        KVCache cache(small, SkipKV<Base>{base, rules, 16}, Budget{.tokens = 1000});
        KVCache bare(small, base, Budget{.tokens = 1000});
        for (std::size_t at = 0; at < tokens; ++at) {
            feed(cache, loud, at, 1, text.inputs(at, 1));
            feed(bare, loud, at, 1);
        }
        REQUIRE(table_of(cache).any_redundant());
        float worst_good = 1e30F, best_redundant = -1e30F;
        const std::vector<float> score = cache.scores(1, 1), alone = bare.scores(1, 1);
        for (std::size_t j = 0; j < tokens; ++j) {
            const bool redundant = table_of(cache).similarity_at(static_cast<position_t>(j)) > 0.0F;
            if (redundant)
                best_redundant = std::max(best_redundant, score[j]);
            else
                worst_good = std::min(worst_good, score[j]);
            if (!redundant) CHECK(same_bits(score[j], alone[j]));
        }
        CHECK(best_redundant <= worst_good);
    };
    check(H2O{}, 1.0F);  // sums grow with the stream
    check(KeyNorm{}, 1e4F);
    check(KeyNorm{}, 1e-4F);
    check(KeyDiff{}, 1.0F);
}

TEST_CASE("hidden states of another size are refused, and nothing has changed", "[contract]") {
    KVCache cache(small, skip, Budget{.tokens = budget}), clean(small, skip, Budget{.tokens = budget});
    speak(cache, 0, 50);
    speak(clean, 0, tokens);
    std::vector<float> out(4 * 16);
    for (std::size_t layer = 0; layer < 2; ++layer) {
        cache.append(layer, stream.keys(layer, 50, 1), stream.values(layer, 50, 1));
        cache.attend(layer, stream.queries(layer, 50, 1), head_major(out.data(), 4, 1, 16));
    }
    StepInputs wrong = text.inputs(50, 1);
    wrong.hidden.cols = 11;
    CHECK(failure<error::shape_error>([&] { cache.end_step(wrong); }) ==
          "SkipKV: inputs.hidden.cols is 11, want 12");
    cache.end_step(text.inputs(50, 1));
    speak(cache, 51, tokens);
    CHECK((snapshot(cache) == snapshot(clean)));
    CHECK(same(table_of(cache), table_of(clean)));
}

TEST_CASE("hidden states that are not finite spoil their sentence and no other", "[property]") {
    Text bad = text;
    const SentenceTable clean = [&] {
        KVCache cache(small, recalling, Budget{.tokens = budget});
        speak(cache, 0, tokens);
        return table_of(cache);
    }();
    std::size_t hit = clean.sentences().size() / 3;
    bad.hidden[static_cast<std::size_t>(clean.sentences()[hit].begin) * hidden_size] = quiet_nan();
    KVCache cache(small, recalling, Budget{.tokens = budget});
    speak(cache, 0, tokens, prompt, 1, bad);
    CHECK_FALSE(table_of(cache).sentences()[hit].embedded);
    for (std::size_t i = 0; i < clean.sentences().size(); ++i)
        if (i != hit) CHECK(same_bits(table_of(cache).embedding(i), clean.embedding(i)));
    CHECK(cache.rows(1, 1) == budget);
}

TEST_CASE("parameters of SkipKV that make no sense are refused", "[contract]") {
    const auto refused = [](const SkipKV<>& policy, std::size_t rows = 100) {
        return failure<error::config_error>([&] { KVCache cache(small, policy, Budget{.tokens = rows}); });
    };
    CHECK(refused({{.window = 8}}, 8) == "RKV: budget is 8, want more than window = 8");
    CHECK(refused({{}, {.tau = -1.0F}}) == "SkipKV: tau is -1.000000, want a finite number, not negative");
    CHECK(refused({{}, {}, 0}) == "SkipKV: compare_interval is 0, want at least 1");
    CHECK(refused({{}, {.delimiters = {4}, .markers = {4}}}) ==
          "SkipKV: markers is a delimiter too, want tokens that end no sentence");
    SkipKV<> endless{{.window = 4}};
    endless.trigger = Trigger::newline;
    CHECK(refused(endless) ==
          "SkipKV: delimiters is none, want what ends a sentence, as the trigger is newline");
    KVCache good(small, skip, Budget{.tokens = 7});
}
