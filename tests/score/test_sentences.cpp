#include "kvcull/score/sentences.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

const SentenceRules rules{.delimiters = {2, 3}, .markers = {5}};
constexpr std::size_t dim = 6;

/// Feeds `tokens` from position `first` on; token t has the hidden state `direction(t)`.
void feed(SentenceTable& table, const std::vector<std::int32_t>& tokens, std::size_t first = 0,
          const SentenceRules& by = rules) {
    for (std::size_t i = 0; i < tokens.size(); ++i) {
        // Tokens point along axes, delimiters nowhere.
        std::vector<float> hidden(dim);
        if (tokens[i] >= 10) hidden[static_cast<std::size_t>(tokens[i]) % dim] = 1.0F;
        table.feed(by, static_cast<position_t>(first + i), tokens[i], hidden);
    }
}
using Positions = std::vector<std::vector<position_t>>;
Positions spans(const SentenceTable& table) {
    Positions all;
    for (const Sentence& one : table.sentences()) all.push_back({one.begin, one.end});
    return all;
}
SentenceTable scored(const std::vector<std::int32_t>& tokens, const SentenceRules& by = rules) {
    SentenceTable table;
    feed(table, tokens, 0, by);
    table.score(by, simd::kernels());
    return table;
}
std::vector<std::ptrdiff_t> peers(const SentenceTable& table) {
    std::vector<std::ptrdiff_t> all;
    for (const Sentence& one : table.sentences()) {
        const auto sentences = table.sentences();
        const auto peer = std::find_if(sentences.begin(), sentences.end(),
                                       [&](const Sentence& other) { return other.end == one.peer; });
        all.push_back(peer == sentences.end() ? -1 : peer - sentences.begin());
    }
    return all;
}
/// Heads that hold these positions.
void prune(SentenceTable& table, const Positions& held) {
    const std::vector<float> row(1);
    std::vector<HeadView> heads;
    for (const std::vector<position_t>& positions : held) {
        const RowsView rows(row.data(), positions.size(), 1, 0);
        heads.push_back({rows, rows, std::span(positions)});
    }
    table.prune({heads, 1});
}
using Peers = std::vector<std::ptrdiff_t>;

}  // namespace

TEST_CASE("a set of ids is read from text and knows its members", "[property]") {
    const TokenSet set{7, 2, 7, 300};
    for (const std::int32_t id : {2, 7, 300}) CHECK(set.contains(id));
    for (const std::int32_t id : {0, 3, 301, -2}) CHECK_FALSE(set.contains(id));
    CHECK(set.overlaps({1, 300}));
    CHECK_FALSE(set.overlaps({1, 3}));
    CHECK_FALSE(TokenSet{}.overlaps(set));
    const auto read = TokenSet::parse("300+2");
    REQUIRE(read.has_value());
    CHECK(read->contains(300));
    CHECK(read->contains(2));
    CHECK_FALSE(read->contains(30));
    REQUIRE(TokenSet::parse("").has_value());
    CHECK(TokenSet::parse("")->empty());
    for (const char* wrong : {"x", "2,3", "2+", "+2", "2++3", "2 3", "99999999999"})
        CHECK_FALSE(TokenSet::parse(wrong).has_value());
}

TEST_CASE("a stream falls into sentences at delimiters, and a run of them is one end", "[property]") {
    SentenceTable table;
    feed(table, {10, 11, 2, 12, 13, 3, 2, 2, 14, 15});
    CHECK((spans(table) == Positions{{0, 2}, {3, 7}, {8, 9}}));
    CHECK(table.sentences()[1].count == 5);
    CHECK(table.sentences()[1].closed);
    CHECK_FALSE(table.sentences()[2].closed);

    SentenceRules apart = rules;
    apart.merge = false;
    SentenceTable each;
    feed(each, {10, 11, 2, 12, 13, 3, 2, 2, 14, 15}, 0, apart);
    CHECK((spans(each) == Positions{{0, 2}, {3, 5}, {6, 6}, {7, 7}, {8, 9}}));
}

TEST_CASE("delimiters before any sentence, or after a comparison, are sentences of their own", "[property]") {
    SentenceTable table;
    feed(table, {2, 3, 3});
    CHECK((spans(table) == Positions{{0, 2}}));  // the first one is a sentence, which the others extend
    table.score(rules, simd::kernels());
    feed(table, {2, 10}, 3);
    CHECK((spans(table) == Positions{{0, 2}, {3, 3}, {4, 4}}));
    table.score(rules, simd::kernels());
    CHECK(table.sentences()[0].embedded);  // three tokens without direction
    CHECK_FALSE(table.sentences()[1].embedded);
    CHECK(table.sentences()[1].scored);
    CHECK_FALSE(table.sentences()[2].scored);
    CHECK_FALSE(table.any_redundant());
}

TEST_CASE("the earlier of two sentences alike is redundant, and the latest like it counts", "[property]") {
    const SentenceTable table = scored({10, 10, 2, 11, 11, 2, 10, 10, 10, 2, 11, 12, 2, 10, 2, 10, 10});
    CHECK((peers(table) == Peers{4, -1, 4, -1, -1, -1}));
    CHECK(table.any_redundant());
    for (const position_t inside : {0, 1, 2, 6, 9}) CHECK(table.similarity_at(inside) == Approx(1.0));
    for (const position_t outside : {3, 5, 10, 13, 15, 16, 100, -1})
        CHECK(same_bits(table.similarity_at(outside), 0.0F));
    // Half of it is about something else: the cosine is 1 / sqrt 2.
    SentenceRules loose = rules;
    loose.tau = 0.7F;
    const SentenceTable half = scored({10, 2, 10, 11, 2}, loose);
    CHECK(half.similarity_at(1) == Approx(std::sqrt(0.5)));
    loose.tau = 0.71F;
    CHECK_FALSE(scored({10, 2, 10, 11, 2}, loose).any_redundant());
    loose.tau = 1.0F;
    CHECK_FALSE(scored({10, 2, 10, 2}, loose).any_redundant());
}

TEST_CASE("a similarity that was found is overwritten by later sentences only", "[property]") {
    SentenceRules loose = rules;
    loose.tau = 0.6F;
    SentenceTable table;
    feed(table, {10, 10, 2}, 0, loose);
    table.score(loose, simd::kernels());
    feed(table, {10, 10, 2}, 3, loose);
    table.score(loose, simd::kernels());
    CHECK(table.similarity_at(0) == Approx(1.0));
    feed(table, {10, 11, 2, 12, 12, 2}, 6, loose);
    table.score(loose, simd::kernels());
    CHECK((peers(table) == Peers{2, 2, -1, -1}));
    CHECK(table.similarity_at(0) == Approx(std::sqrt(0.5)));  // the latest, not the largest
}

TEST_CASE("markers are counted once their sentence is closed", "[property]") {
    SentenceTable table;
    feed(table, {5, 10, 2, 10, 5, 5});
    CHECK(table.non_execution_count() == 1);
    feed(table, {2, 11, 2}, 6);
    CHECK(table.non_execution_count() == 2);
    CHECK(table.sentences()[1].non_execution);
    CHECK_FALSE(table.sentences()[2].non_execution);
}

TEST_CASE("sentences without all their hidden states, too short or not finite are like no other",
          "[property]") {
    for (const float bad : {quiet_nan(), -negative_infinity()}) {
        SentenceTable table;
        const std::vector<float> good{1, 0, 0, 0, 0, 0}, spoiled{1, bad, 0, 0, 0, 0};
        const auto say = [&](std::vector<std::span<const float>> rows) {
            for (std::size_t i = 0; i < rows.size(); ++i) {
                const position_t at = table.sentences().empty() ? 0 : table.sentences().back().end + 1;
                table.feed(rules, at, i + 1 == rows.size() ? 2 : 10, rows[i]);
            }
        };
        say({std::span<const float>{}, std::span<const float>{}});  // before the size is known
        say({good, good});
        say({good, spoiled});
        say({good, std::span<const float>{}});
        table.score(rules, simd::kernels());
        say({good});
        table.score(rules, simd::kernels());
        say({good, good});
        table.score(rules, simd::kernels());
        CHECK((peers(table) == Peers{-1, 5, -1, -1, -1, -1}));
        for (const std::size_t none : {0U, 2U, 3U, 4U}) {
            CHECK_FALSE(table.sentences()[none].embedded);
            CHECK(same_bits(table.embedding(none), std::vector<float>(dim)));
        }
    }
}

TEST_CASE("embeddings and similarities agree with doubles on every instruction set", "[differential]") {
    constexpr std::size_t wide = 37, tokens = 900;
    SentenceRules loose = rules;
    loose.tau = 0.5F;
    const std::vector<float> subjects = random_floats(5 * wide, 1),
                             noise = random_floats(tokens * wide, 2, 0.8F);
    std::vector<float> hidden = noise;
    std::vector<std::int32_t> ids;
    SplitMix64 random{3};
    std::vector<std::vector<double>> means;  // of sentences
    for (std::size_t t = 0, subject = 0; t < tokens; ++t) {
        for (std::size_t c = 0; c < wide; ++c) hidden[t * wide + c] += subjects[subject * wide + c];
        const bool ends = t > 0 && ids.back() != 2 && random() % 5 == 0;
        ids.push_back(ends ? 2 : 10);
        if (ends) subject = random() % 5;
    }
    for (std::size_t t = 0, begin = 0; t < tokens; ++t) {
        if (ids[t] != 2) continue;
        std::vector<double> mean(wide);
        for (std::size_t i = begin; i <= t; ++i)
            for (std::size_t c = 0; c < wide; ++c) mean[c] += static_cast<double>(hidden[i * wide + c]);
        double square = 0;
        for (const double x : mean) square += x * x;
        for (double& x : mean) x /= std::sqrt(square);
        means.push_back(mean);
        begin = t + 1;
    }
    REQUIRE(means.size() > 130);  // several tiles of earlier sentences
    for (const simd::Isa isa : simd::all_isas) {
        if (!simd::available(isa)) continue;
        SentenceTable table;
        for (std::size_t t = 0; t < tokens; ++t) {
            table.feed(loose, static_cast<position_t>(t), ids[t], std::span(hidden).subspan(t * wide, wide));
            if (t % 100 == 99) table.score(loose, simd::kernels_for(isa));
        }
        bool near = true;
        std::size_t redundant = 0, compared = 0;
        for (const Sentence& one : table.sentences()) compared += one.scored ? 1 : 0;
        for (std::size_t i = 0; i < compared; ++i) {
            for (std::size_t c = 0; c < wide; ++c)
                near = near && close(table.embedding(i)[c], means[i][c], 1e-4, 1e-6);
            double similarity = 0;
            for (std::size_t j = i + 1; j < compared; ++j) {
                double cosine = 0;
                for (std::size_t c = 0; c < wide; ++c) cosine += means[i][c] * means[j][c];
                if (cosine > 0.5) similarity = cosine;
            }
            near = near && close(table.sentences()[i].similarity, similarity, 1e-4, 1e-6);
            redundant += similarity > 0 ? 1 : 0;
        }
        CAPTURE(simd::name_of(isa), compared, redundant);
        CHECK(near);
        CHECK(redundant > 100);
    }
}

TEST_CASE("tokens that are taken back leave no sentence behind, and no likeness to one", "[property]") {
    SentenceTable table;
    feed(table, {10, 10, 2, 11, 11, 2, 10, 10, 2, 12});
    table.score(rules, simd::kernels());
    CHECK((peers(table) == Peers{2, -1, -1, -1}));
    SentenceTable cut = table;
    feed(cut, {14}, 4);  // inside the second sentence
    CHECK((spans(cut) == Positions{{0, 2}, {3, 4}}));
    CHECK_FALSE(cut.any_redundant());
    CHECK_FALSE(cut.sentences()[1].closed);
    feed(cut, {2, 10, 10, 2}, 5);
    cut.score(rules, simd::kernels());
    CHECK((peers(cut) == Peers{2, -1, -1}));
    CHECK_FALSE(cut.sentences()[1].embedded);  // what it held before is not known apart
    CHECK(cut.sentences()[2].embedded);
    SentenceTable whole = table;
    feed(whole, {10, 10, 2}, 0);  // all of it
    CHECK((spans(whole) == Positions{{0, 2}}));
    CHECK_FALSE(whole.any_redundant());
    SentenceTable last = table;
    feed(last, {13}, 8);  // the delimiter of the sentence that made the first one redundant
    CHECK((spans(last) == Positions{{0, 2}, {3, 5}, {6, 8}}));
    CHECK_FALSE(last.any_redundant());
}

TEST_CASE("sentences that no head holds a row of leave, and the others stay what they were", "[property]") {
    const std::vector<std::int32_t> text{10, 10, 2, 5, 11, 2, 10, 12, 2, 10, 10, 2, 13, 2, 14, 15};
    const SentenceTable whole = scored(text);
    REQUIRE((spans(whole) == Positions{{0, 2}, {3, 5}, {6, 8}, {9, 11}, {12, 13}, {14, 15}}));
    REQUIRE((peers(whole) == Peers{3, -1, -1, -1, -1, -1}));
    SentenceTable table = whole;
    prune(table, {});  // nothing is known of the rows
    CHECK((spans(table) == spans(whole)));
    prune(table, {{14, 7, 2}, {13, 15}});  // in any order
    CHECK((spans(table) == Positions{{0, 2}, {6, 8}, {12, 13}, {14, 15}}));
    CHECK(same_bits(table.similarity_at(1), whole.similarity_at(1)));
    CHECK(table.any_redundant());
    CHECK(same_bits(table.embedding(1), whole.embedding(2)));
    CHECK(same_bits(table.embedding(2), whole.embedding(4)));
    CHECK(table.non_execution_count() == 1);  // its sentence is gone
    // What is said later meets those that are left as it would have met all of them.
    SentenceTable all = whole;
    for (SentenceTable* each : {&table, &all}) {
        feed(*each, {2, 10, 12, 2, 11, 2}, 16);
        each->score(rules, simd::kernels());
    }
    CHECK(table.similarity_at(7) > 0.9F);
    for (const position_t left : {0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 21})
        CHECK(same_bits(table.similarity_at(left), all.similarity_at(left)));
    // The last one stays, and so does what was not compared yet.
    feed(table, {16, 2, 17}, 22);
    prune(table, {{}});
    CHECK((spans(table) == Positions{{22, 23}, {24, 24}}));
    CHECK_FALSE(table.any_redundant());
}

TEST_CASE("what is said in the place of a sentence that has left has no embedding", "[property]") {
    const SentenceTable whole = scored({10, 10, 2, 11, 11, 2, 12, 12, 2, 10, 2});
    const auto said_from = [&](position_t cut) {
        SentenceTable table = whole;
        prune(table, {{0, 9}});
        feed(table, {12, 2, 12, 12, 2}, static_cast<std::size_t>(cut));
        table.score(rules, simd::kernels());
        return table;
    };
    const SentenceTable inside = said_from(7);  // of the third sentence, which has left
    CHECK((spans(inside) == Positions{{0, 2}, {7, 8}, {9, 11}}));
    CHECK_FALSE(inside.sentences()[1].embedded);
    CHECK(inside.sentences()[2].embedded);
    CHECK_FALSE(inside.any_redundant());  // what was like the first one is taken back
    const SentenceTable after = said_from(9);
    CHECK((spans(after) == Positions{{0, 2}, {9, 10}, {11, 13}}));
}

TEST_CASE("tokens since the newest delimiter are counted", "[property]") {
    SentenceTable table;
    CHECK(table.tokens_since_end() == 0);
    std::vector<std::size_t> counts;
    std::size_t at = 0;
    for (const std::int32_t token : {10, 11, 2, 3, 12, 2}) {
        feed(table, {token}, at++);
        counts.push_back(table.tokens_since_end());
    }
    CHECK((counts == std::vector<std::size_t>{1, 2, 0, 0, 1, 0}));
}

TEST_CASE("a table comes back from its numbers, and nothing from numbers that contradict each other",
          "[contract]") {
    const SentenceTable table = scored({10, 5, 2, 11, 2, 10, 12, 2, 11});
    const SentenceNumbers numbers = table.numbers();
    const auto back = SentenceTable::from(numbers);
    REQUIRE(back.has_value());
    CHECK(spans(*back) == spans(table));
    CHECK(peers(*back) == peers(table));
    CHECK(back->non_execution_count() == 1);
    CHECK(back->any_redundant() == table.any_redundant());
    CHECK(back->tokens_since_end() == 1);
    const auto refused = [&](auto&& change) {
        SentenceNumbers wrong = numbers;
        change(wrong);
        return !SentenceTable::from(wrong).has_value();
    };
    CHECK(refused([](SentenceNumbers& n) { n.sentences.pop_back(); }));
    CHECK(refused([](SentenceNumbers& n) { n.vectors.pop_back(); }));
    CHECK(refused([](SentenceNumbers& n) { n.dim += 1; }));
    CHECK(refused([](SentenceNumbers& n) { n.sentences[0] = -1; }));
    CHECK(refused([](SentenceNumbers& n) { n.sentences[1] = -1; }));  // ends before it begins
    CHECK(refused([](SentenceNumbers& n) { n.sentences[5] = 2; }));   // begins within the one before
    CHECK(refused([](SentenceNumbers& n) { n.sentences[2] = 0; }));   // no tokens
    CHECK(refused([](SentenceNumbers& n) { n.similarity[1] = quiet_nan(); }));
    CHECK(SentenceTable::from(SentenceTable().numbers()).has_value());
}

TEST_CASE("hidden states of another size are refused, and so are rules that make no sense", "[contract]") {
    SentenceTable table;
    feed(table, {10});
    const std::vector<float> row(7);
    CHECK(failure<error::shape_error>([&] {
              table.check_hidden("X", {row.data(), 1, 7});
          }) == "X: inputs.hidden.cols is 7, want 6");
    table.check_hidden("X", {row.data(), 1, 6});
    table.check_hidden("X", {});
    const auto refused = [](const SentenceRules& wrong) {
        return failure<error::config_error>([&] { wrong.check("X"); });
    };
    CHECK(refused({.tau = -0.5F}) == "X: tau is -0.500000, want a finite number, not negative");
    CHECK(refused({.tau = quiet_nan()}).starts_with("X: tau is "));
    CHECK(refused({.min_sentence_tokens = 0}) == "X: min_sentence_tokens is 0, want at least 1");
    CHECK(refused({.delimiters = {2, 3}, .markers = {3}}) ==
          "X: markers is a delimiter too, want tokens that end no sentence");
    rules.check("X");
}
