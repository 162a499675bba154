// Layouts of method `skipkv`.

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "kinds.hpp"
#include "kvcull/cache/batches.hpp"
#include "kvcull/cache/steering.hpp"
#include "kvcull/policies/skipkv.hpp"
#include "rkv.hpp"

namespace kvcull::test::skipkv {
namespace {

/// "2,3,4" or "".
TokenSet read_ids(const GoldenFile& file, const std::string& key) {
    std::string text = file.has(key) ? file.text(key) : std::string();
    text.erase(std::remove(text.begin(), text.end(), ' '), text.end());
    std::replace(text.begin(), text.end(), ',', '+');
    const auto ids = TokenSet::parse(text);
    detail::check<error::format_error>(ids.has_value(), "golden", key, text, "ids");
    return *ids;
}
float read_real(const GoldenFile& file, const std::string& key, float otherwise) {
    return file.has(key) ? static_cast<float>(file.real(key)) : otherwise;
}
SkipKV<> read_policy(const GoldenFile& file) {
    SkipKV<> policy{rkv::read_policy(file),
                    {.delimiters = read_ids(file, "delimiters"),
                     .markers = read_ids(file, "markers"),
                     .tau = read_real(file, "tau", 0.95F),
                     .merge = file.count("merge", 1) != 0,
                     .min_sentence_tokens = file.count("min_sentence_tokens", 2)}};
    policy.prune = false;  // the whole table is compared
    return policy;
}
Steering read_steering(const GoldenFile& file) {
    Steering steering{.delimiters = read_ids(file, "delimiters"),
                      .markers = read_ids(file, "markers"),
                      .steer_at = read_ids(file, "steer_at"),
                      .interval = file.count("interval"),
                      .alpha0 = read_real(file, "alpha0", 1.25F),
                      .gamma = read_real(file, "gamma", 0.02F)};
    steering.alpha_max = read_real(file, "alpha_max", steering.alpha_max);
    const auto id = [&](const std::string& key) {
        return file.has(key) && !file.text(key).empty() && file.text(key) != "-1"
                   ? std::optional(static_cast<std::int32_t>(file.count(key)))
                   : std::nullopt;
    };
    steering.think_start = id("think_start");
    steering.think_end = id("think_end");
    return steering;
}
std::vector<std::int32_t> read_tokens(const GoldenFile& file) {
    const std::vector<std::int64_t> wide = file.array<std::int64_t>("in.token", 1).values;
    std::vector<std::int32_t> tokens;
    for (const std::int64_t id : wide) tokens.push_back(static_cast<std::int32_t>(id));
    return tokens;
}

/// What the table said after every comparison of sentences.
struct Log {
    std::vector<std::int64_t> seen, counts;
    std::vector<SentenceTable> tables;

    void look(std::size_t tokens, std::size_t interval, const SentenceTable& table) {
        if (tokens % interval != 0) return;
        seen.push_back(static_cast<std::int64_t>(tokens));
        counts.push_back(static_cast<std::int64_t>(table.non_execution_count()));
        tables.push_back(table);
    }
};

void compare_sentences(GoldenFile& file, const Log& log, const SentenceTable& last, std::size_t dim) {
    const std::size_t looks = log.seen.size();
    std::size_t closed = 0;
    std::vector<std::int64_t> spans, peers;
    std::vector<std::uint8_t> marked;
    std::vector<float> embeddings, similarities, alphas;
    const auto index_of = [&](position_t end) -> std::int64_t {
        const auto all = last.sentences();
        const auto found =
            std::find_if(all.begin(), all.end(), [end](const Sentence& one) { return one.end == end; });
        return found == all.end() ? -1 : found - all.begin();
    };
    for (std::size_t j = 0; j < last.sentences().size() && last.sentences()[j].closed; ++j, ++closed) {
        const Sentence& one = last.sentences()[j];
        spans.insert(spans.end(), {one.begin, one.end});
        marked.push_back(one.non_execution ? 1 : 0);
        const auto vector = last.embedding(j);
        for (std::size_t c = 0; c < dim; ++c) embeddings.push_back(one.embedded ? vector[c] : 0.0F);
    }
    for (const SentenceTable& table : log.tables)
        for (std::size_t j = 0; j < closed; ++j) {
            const Sentence one = j < table.sentences().size() ? table.sentences()[j] : Sentence{};
            similarities.push_back(one.similarity);
            peers.push_back(index_of(one.peer));
        }
    const Steering steering{.alpha0 = read_real(file, "alpha0", 1.25F),
                            .gamma = read_real(file, "gamma", 0.02F)};
    for (const std::int64_t count : log.counts)
        alphas.push_back(steering.strength(static_cast<std::size_t>(count)));
    file.expect("out.sentence", {closed, 2}, spans);
    file.expect_exactly<std::uint8_t>("out.non_execution", {closed}, marked);
    file.expect("out.embedding", {closed, dim}, embeddings);
    file.expect("out.score_seen", {looks}, log.seen);
    file.expect("out.similarity", {looks, closed}, similarities);
    file.expect("out.peer", {looks, closed}, peers);
    file.expect("out.non_execution_count", {looks}, log.counts);
    file.expect("out.alpha", {looks}, alphas);
}

}  // namespace

void check_eviction(GoldenFile& file) {
    const SkipKV<> policy = read_policy(file);
    const auto spans = file.array<std::int64_t>("in.sentence", 2);
    const auto similarity = file.array<float>("in.similarity", 1).values;
    detail::check_size("golden", "in.similarity.shape[0]", similarity.size(), spans.dim(0));
    detail::check_size("golden", "in.sentence.shape[1]", spans.dim(1), std::size_t{2});
    std::vector<Sentence> sentences;
    for (std::size_t i = 0; i < similarity.size(); ++i)
        sentences.push_back({.begin = spans.values[2 * i],
                             .end = spans.values[2 * i + 1],
                             .similarity = similarity[i],
                             .closed = true,
                             .scored = true});
    const SentenceTable table(std::move(sentences));
    rkv::compare_eviction(file, policy, file.array<std::int64_t>("in.position", 2).values,
                          [&](const RKV::State& state, const HeadStep& step, std::span<float> out) {
                              policy.score(state, table, step, out);
                          });
}

void check_trace(GoldenFile& file) {
    const Stream stream = rkv::read_layers(file);
    const SkipKV<> policy = read_policy(file);
    const std::vector<std::int32_t> tokens = read_tokens(file);
    const auto hidden = file.array<float>("in.hidden", 2);
    const std::size_t dim = hidden.dim(1), prompt = file.count("prompt");
    detail::check_size("golden", "in.token.shape[0]", tokens.size(), stream.tokens);
    detail::check_size("golden", "in.hidden.shape[0]", hidden.dim(0), stream.tokens);
    Log log;
    std::size_t seen = 0;
    rkv::compare_trace(
        file, policy, stream,
        [&](auto& cache, std::size_t first, std::size_t count) {
            const SentenceTable& table = cache.evictor().live().sequence;
            if (first == 0) log = {};
            if (first == prompt && prompt > 0) log.look(prompt, policy.interval, table);
            feed(cache, stream, first, count,
                 {std::span(tokens).subspan(first, count), {hidden.values.data() + first * dim, count, dim}});
            seen = first + count;
            if (seen > prompt) log.look(seen, policy.interval, table);
        },
        [&](const auto& cache) {
            if (seen == prompt) log.look(prompt, policy.interval, cache.evictor().live().sequence);
            compare_sentences(file, log, cache.evictor().live().sequence, dim);
        });
}

void check_steering(GoldenFile& file) {
    Steering steering = read_steering(file);
    const std::vector<std::int32_t> tokens = read_tokens(file);
    const auto hidden = file.array<float>("in.hidden", 2),
               thoughts = file.array<float>("in.thought_hidden", 2);
    const std::size_t dim = hidden.dim(1), prompt = file.count("prompt");
    detail::check_size("golden", "in.hidden.shape[0]", hidden.dim(0), tokens.size());
    detail::check<error::format_error>(prompt <= tokens.size(), "golden", "prompt", prompt,
                                       "at most all tokens");
    std::vector<Thought> labels;
    for (const std::int64_t label : file.array<std::int64_t>("in.thought_label", 1).values) {
        detail::check<error::format_error>(label >= 0 && label <= 2, "golden", "in.thought_label", label,
                                           "0 to 2");
        labels.push_back(static_cast<Thought>(label));
    }
    steering.vector = steering_vector({thoughts.values.data(), thoughts.dim(0), thoughts.dim(1)}, labels);
    file.expect("out.vector", {dim}, steering.vector);

    for (const std::size_t chunk : {std::max<std::size_t>(prompt, 1), std::size_t{4}}) {
        file.begin_run("prompt in calls of " + std::to_string(chunk));
        std::vector<float> rows = hidden.values, alphas;
        std::vector<std::uint8_t> steered;
        Steering::State state = steering.start();
        for (std::size_t at = 0; at < tokens.size();) {
            const std::size_t count = at < prompt ? std::min(chunk, prompt - at) : 1;
            const auto ids = std::span(tokens).subspan(at, count);
            alphas.insert(alphas.end(), count, state.alpha);
            steered.insert(steered.end(), count, std::uint8_t{0});
            if (at + count < prompt)
                steering.pass(state, ids);
            else
                steered.back() = steering.step(state, ids, {rows.data() + at * dim, count, dim}) ? 1 : 0;
            at += count;
        }
        file.expect("out.hidden", {tokens.size(), dim}, rows);
        file.expect("out.alpha", {tokens.size()}, alphas);
        file.expect_exactly<std::uint8_t>("out.steered", {tokens.size()}, steered);
    }
}

void check_batch(GoldenFile& file) {
    std::vector<std::size_t> lengths;
    for (const std::int64_t length : file.array<std::int64_t>("in.length", 1).values)
        lengths.push_back(static_cast<std::size_t>(length));
    const std::size_t size = file.count("batch_size"), budget = file.count("budget"), n = lengths.size();
    const Batches batches = group_batches(lengths, size);
    const auto wide = [](const std::vector<std::size_t>& list) {
        return std::vector<std::int64_t>(list.begin(), list.end());
    };
    file.expect("out.order", {n}, wide(batches.order));
    file.expect("out.batch_begin", {batches.begin.size()}, wide(batches.begin));
    file.expect("out.effective_budget", {n}, effective_budget(lengths, batches, budget));
    file.expect("out.effective_budget_input_order", {n},
                effective_budget(lengths, batches_in_order(n, size), budget));
}

}  // namespace kvcull::test::skipkv
