#include "episodes.hpp"

#include <algorithm>
#include <cmath>
#include <kvcull/cache/block_prefill.hpp>
#include <kvcull/cache/byte_store.hpp>
#include <kvcull/cache/saved.hpp>
#include <kvcull/integrations/registry.hpp>
#include <kvcull/policies/keydiff.hpp>
#include <kvcull/policies/streaming.hpp>
#include <kvcull/select/cluster.hpp>
#include <set>
#include <span>
#include <utility>

#include "../common/named_rules.hpp"
#include "later.hpp"
#include "parallel.hpp"
#include "reader.hpp"

namespace tiny_llama {
namespace {

/// What a large model is told in words. In the tiny world `<think>` begins a stretch that says facts again.
const std::vector<int> repeat{4}, summarise{4, 7};

/// A case as the library wants it.
struct Conversation {
    std::vector<int> history = {};
    std::vector<kvcull::EpisodeSegment> segments = {};
    std::vector<std::vector<float>> queries = {};  ///< of every question
};

/// Embeds by words in common. Any two words are unlike each other.
class WordEncoder {
  public:
    WordEncoder(std::size_t vocabulary, std::span<const std::vector<int>> texts) : weight_(vocabulary) {
        std::vector<std::size_t> found(vocabulary);
        for (const std::vector<int>& text : texts)
            for (const int word : std::set(text.begin(), text.end())) ++found[static_cast<std::size_t>(word)];
        for (std::size_t word = 0; word < vocabulary; ++word)
            weight_[word] =
                static_cast<float>(std::log(static_cast<double>(1 + texts.size()) /
                                            static_cast<double>(std::max<std::size_t>(1, found[word]))));
    }
    [[nodiscard]] std::vector<float> operator()(std::span<const int> text) const {
        std::vector<float> embedding(weight_.size());
        for (const int word : text)
            embedding[static_cast<std::size_t>(word)] += weight_[static_cast<std::size_t>(word)];
        return embedding;
    }

  private:
    std::vector<float> weight_;
};

std::vector<float> mean_of(const RowMajorMatrix& table, std::span<const int> text) {
    const auto rows = static_cast<std::size_t>(table.rows()), dim = static_cast<std::size_t>(table.cols());
    std::vector<float> mean(dim);
    kvcull::mean_token_embedding({table.data(), rows, dim, dim}, text, mean);
    return mean;
}

Conversation conversation_of(const Llama& model, const EpisodeMethod& method, const Case& example) {
    if (example.segments.empty())
        throw kvcull::error::config_error("epicache: segments is empty, want a case with segments");
    Conversation talk{.history = example.prompt};
    talk.history.insert(talk.history.end(), example.stream.begin(), example.stream.end());
    std::vector<std::vector<int>> texts;
    for (const TextSegment& one : example.segments) {
        const auto tokens = std::span(talk.history).subspan(one.begin, one.end - one.begin);
        texts.emplace_back(tokens.begin(), tokens.end());
    }
    const WordEncoder words(model.config().vocabulary, texts);
    const auto embed = [&](const std::vector<float>& given, const std::vector<int>& text) {
        if (!given.empty()) return given;
        return method.embedding == Embedding::words ? words(text) : mean_of(model.embedding(), text);
    };
    for (std::size_t i = 0; i < texts.size(); ++i)
        talk.segments.push_back({embed(example.segments[i].embedding, texts[i]), texts[i]});
    for (const Question& question : example.questions)
        talk.queries.push_back(embed(question.embedding, question.ask));
    return talk;
}

template <kvcull::Policy P>
auto make_cache(const Llama& model, const Setting& setting, const P& policy) {
    return kvcull::KVCache(shape_of(model), policy, setting.budget, examples::named_rule(setting.rule));
}

/// Asks a case's questions, and knows what each of them attends to where nothing is missing.
class Examiner {
  public:
    Examiner(const Llama& model, const Case& example, std::span<const int> history)
        : example_(example), reader_{model}, full_(shape_of(model)) {
        full_.begin_prompt(history.size());
        reader_.read(history, full_);
        full_.end_prompt();
        for (const Question& question : example.questions) {
            const auto mark = full_.mark();
            attention_.emplace_back(full_, history.size());
            topic_.push_back(topic_of(example, question));
            std::vector<int> text = question.ask;
            text.insert(text.end(), question.answer.begin(), question.answer.end() - 1);
            reader_.read(text, attention_.back());
            full_.rollback(mark);
            full_.release(mark);
        }
    }
    Examiner(const Examiner&) = delete;
    Examiner& operator=(const Examiner&) = delete;

    [[nodiscard]] kvcull::KVCache<kvcull::Full>& full() noexcept { return full_; }

    /// The cache is as before then.
    template <class Cache>
    [[nodiscard]] Answers ask(Cache& cache, std::size_t question) {
        const Later& attention = attention_[question];
        Answers one{.kept = attention.share(cache),
                    .topic_kept = attention.share(cache, topic_[question]),
                    .questions = 1};
        cache.hold(true);
        const auto mark = cache.mark();
        one.right = answers(reader_, example_.questions[question], cache) ? 1 : 0;
        cache.rollback(mark);
        cache.release(mark);
        return one;
    }
    template <class Cache>
    [[nodiscard]] Answers ask_all(Cache& cache) {
        Answers all;
        for (std::size_t q = 0; q < example_.questions.size(); ++q) all += ask(cache, q);
        return all;
    }

  private:
    /// Which tokens lie in segments that name the question's topic; empty if the file names none.
    static std::vector<bool> topic_of(const Case& example, const Question& question) {
        if (!question.topic) return {};
        std::vector<bool> about(example.size());
        const auto token = [&](std::size_t i) {
            return i < example.prompt.size() ? example.prompt[i] : example.stream[i - example.prompt.size()];
        };
        for (const TextSegment& one : example.segments) {
            std::size_t i = one.begin;
            while (i < one.end && token(i) != *question.topic) ++i;
            if (i < one.end)
                std::fill(about.begin() + static_cast<std::ptrdiff_t>(one.begin),
                          about.begin() + static_cast<std::ptrdiff_t>(one.end), true);
        }
        return about;
    }

    const Case& example_;
    Reader reader_;
    kvcull::KVCache<kvcull::Full> full_;
    std::vector<Later> attention_;          ///< of every question
    std::vector<std::vector<bool>> topic_;  ///< of every question
};

/// The episode whose prompt has the question's topic word most often; `otherwise` if the file names no topic.
template <class Episodes>
std::size_t matched_episode(const Episodes& episodes, const Question& question, std::size_t otherwise) {
    if (!question.topic) return otherwise;
    std::vector<std::ptrdiff_t> named;
    for (std::size_t e = 0; e < episodes.size(); ++e) {
        const auto prompt = episodes.prompt(e);
        named.push_back(std::count(prompt.begin(), prompt.end(), *question.topic));
    }
    return static_cast<std::size_t>(std::max_element(named.begin(), named.end()) - named.begin());
}

EpisodeComparison compare_case(const Llama& model, const EpisodeMethod& method, const Setting& setting,
                               const Case& example) {
    const Conversation talk = conversation_of(model, method, example);
    const std::span<const int> history = talk.history;
    Examiner examiner(model, example, history);
    Reader reader{model};
    EpisodeComparison all;

    const auto prefilled = [&](const auto& policy, auto prompt, const Setting& own) {
        auto cache = make_cache(model, own, policy);
        kvcull::block_prefill(cache, reader, history, method.block, prompt);
        return cache;
    };
    const auto compare = [&](Asked asked, auto cache) { all[asked] += examiner.ask_all(cache); };
    compare(Asked::infinipot, prefilled(method.policy, kvcull::FixedPrompt{summarise}, setting));
    compare(Asked::kvzip, prefilled(method.policy, kvcull::RepeatBlock{repeat}, setting));
    compare(Asked::snapkv, prefilled(method.policy, kvcull::EndOfBlock{}, setting));
    compare(Asked::keydiff, prefilled(kvcull::KeyDiff{}, kvcull::NoPrompt{}, setting));
    // The paper's 128 sinks are a sixteenth of its smallest budget. What protects every row divides evenly.
    const std::size_t rows = kvcull::budget_tokens(setting.budget, history.size());
    compare(Asked::streaming, prefilled(kvcull::Streaming{.sinks = std::min<std::size_t>(128, rows / 16)},
                                        kvcull::NoPrompt{}, {setting.policy, setting.budget}));
    for (std::size_t q = 0; q < example.questions.size(); ++q) {
        auto cache = prefilled(method.policy, kvcull::FixedPrompt{example.questions[q].ask}, setting);
        all[Asked::oracle] += examiner.ask(cache, q);
    }
    all[Asked::full] += examiner.ask_all(examiner.full());

    const auto make = [&] { return make_cache(model, setting, method.policy); };
    const auto built = [&](const kvcull::EpisodeSettings& settings, kvcull::MemoryBytes& store) {
        kvcull::Episodes episodes(make, reader, store, settings);
        episodes.build(history, talk.segments);
        return episodes;
    };
    const auto load = [&](const kvcull::MemoryBytes& store, std::size_t episode) {
        auto cache = make();
        kvcull::load(cache, store.get(episode));
        return cache;
    };
    kvcull::MemoryBytes store, one_store;
    auto episodes = built(method.settings(), store);
    std::vector<std::size_t> routed, matched;
    for (std::size_t q = 0; q < example.questions.size(); ++q) {
        routed.push_back(episodes.begin_turn(talk.queries[q]).episode);
        matched.push_back(matched_episode(episodes, example.questions[q], routed[q]));
        all.found += routed[q] == matched[q] ? 1 : 0;
    }
    for (std::size_t e = 0; e < episodes.size(); ++e) {
        auto cache = load(store, e);
        for (std::size_t q = 0; q < example.questions.size(); ++q) {
            const Answers one = examiner.ask(cache, q);
            if (e == routed[q]) all[Asked::routed] += one;
            all[e == matched[q] ? Asked::matched : Asked::wrong] += one;
        }
    }
    kvcull::EpisodeSettings single = method.settings();
    single.episodes = 1;
    (void)built(single, one_store);
    compare(Asked::single, load(one_store, 0));
    return all;
}

}  // namespace

std::optional<EpisodeMethod> episode_method(const std::string& policy) {
    const std::string name(EpisodeMethod::name);
    if (policy == name) return EpisodeMethod{};
    if (!policy.starts_with(name + ":")) return std::nullopt;
    return kvcull::parse_named<EpisodeMethod>(std::string_view(policy).substr(name.size() + 1));
}

void check_conversation(const Llama& model, const EpisodeMethod& method, const Setting& setting,
                        std::size_t prompt_tokens) {
    method.settings().check();
    const auto needed = static_cast<std::size_t>(*std::max_element(summarise.begin(), summarise.end()));
    if (model.config().vocabulary <= needed)
        throw kvcull::error::config_error(
            "epicache: the vocabulary is " + std::to_string(model.config().vocabulary) +
            ", want the tiny world's words, ids up to " + std::to_string(needed));
    make_cache(model, setting, method.policy).begin_prompt(prompt_tokens);
}

Outcome run_conversation(const Llama& model, const EpisodeMethod& method, const Setting& setting,
                         const Case& example) {
    const Conversation talk = conversation_of(model, method, example);
    kvcull::BlockPool pool({.block_rows = 16});
    kvcull::MemoryBytes store;
    Reader reader{model};
    const auto make = [&] {
        return kvcull::KVCache(shape_of(model), method.policy, setting.budget, pool,
                               examples::named_rule(setting.rule));
    };
    kvcull::Episodes episodes(make, reader, store, method.settings());
    episodes.build(talk.history, talk.segments);

    const std::size_t questions = example.questions.size();
    Outcome outcome{.questions = questions, .kept = std::vector<float>(example.size())};
    for (std::size_t q = 0; q < questions; ++q) {
        episodes.begin_turn(talk.queries[q]);
        auto& cache = episodes.cache();
        outcome.kv_bytes = std::max(outcome.kv_bytes, cache.bytes());
        const std::vector<float> kept = kept_by(cache, example.size());
        for (std::size_t i = 0; i < kept.size(); ++i)
            outcome.kept[i] += kept[i] / static_cast<float>(questions);
        const auto mark = cache.mark();
        outcome.correct += answers(reader, example.questions[q], cache) ? 1 : 0;
        cache.rollback(mark);
        cache.release(mark);
    }
    outcome.peak_bytes = pool.peak_bytes();
    outcome.tokens = reader.tokens;
    return outcome;
}

EpisodeComparison& EpisodeComparison::operator+=(const EpisodeComparison& other) {
    for (std::size_t i = 0; i < answers.size(); ++i) answers[i] += other.answers[i];
    found += other.found;
    return *this;
}

EpisodeComparison compare_episodes(const Llama& model, const EpisodeMethod& method, const Setting& setting,
                                   const Task& task, std::size_t cases, std::size_t threads) {
    std::vector<EpisodeComparison> each(std::min(cases, task.cases.size()));
    parallel_for(threads, each.size(),
                 [&](std::size_t i) { each[i] = compare_case(model, method, setting, task.cases[i]); });
    EpisodeComparison all;
    for (const EpisodeComparison& one : each) all += one;
    return all;
}

}  // namespace tiny_llama
