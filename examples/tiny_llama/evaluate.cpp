#include "evaluate.hpp"

#include <algorithm>
#include <chrono>
#include <kvcull/cache/kv_cache.hpp>

#include "../common/named_policies.hpp"
#include "../common/named_rules.hpp"
#include "episodes.hpp"
#include "parallel.hpp"
#include "reader.hpp"
#include "steering.hpp"

namespace tiny_llama {
namespace {

/// The policy of a command line and how it steers the model, if it does. One that asks what ends a sentence,
/// and was not told, learns the tiny world's full stop and second thought.
template <class Use>
void with_policy(const std::string& text, const Use& use) {
    examples::NamedPolicies::Each<Steered>::with(text, [&](const auto& named) {
        auto policy = named.plain();
        if constexpr (requires { policy.sentences.delimiters; })
            if (policy.sentences.delimiters.empty()) {
                policy.sentences.delimiters = {word::stop};
                policy.sentences.markers = {word::wait};
            }
        use(std::move(policy), named.steering());
    });
}

/// The stream or thoughts, and the questions, after the prompt.
template <class Cache>
Outcome answer(Reader& reader, const Case& example, const Thinking& how, Cache& cache) {
    Outcome outcome{.questions = example.questions.size()};
    if (how.most > 0) {
        const std::vector<int> said = think(reader, cache, how);
        outcome.thought_tokens = said.size();
        outcome.second_thoughts =
            static_cast<std::size_t>(std::count(said.begin(), said.end(), int{word::wait}));
    } else {
        for (const int& token : example.stream) reader.read({&token, 1}, cache);
    }
    outcome.kv_bytes = cache.bytes();
    outcome.peak_bytes = cache.peak_bytes();
    outcome.kept = kept_by(cache, cache.seen());

    cache.hold(true);
    const auto before = cache.mark();
    const Hook hook = reader.hook;
    for (const Question& question : example.questions) {
        cache.rollback(before);
        reader.hook = hook;  // with what it remembers
        outcome.correct += answers(reader, question, cache) ? 1 : 0;
    }
    outcome.tokens = reader.tokens;
    return outcome;
}

}  // namespace

void check(const Llama& model, const Setting& setting, std::size_t prompt_tokens) {
    if (const auto method = episode_method(setting.policy))
        return check_conversation(model, *method, setting, prompt_tokens);
    with_policy(setting.policy, [&](auto policy, const auto& steering) {
        if constexpr (kvcull::Gated<decltype(policy)>) {
            if (!policy.gated())
                throw kvcull::error::config_error(std::string(policy.name) + ": gates are missing, want " +
                                                  "gates=FILE of a model's retention gates");
            if (const auto hidden = static_cast<std::size_t>(model.embedding().cols());
                policy.gates.input() != hidden)
                throw kvcull::error::config_error(std::string(policy.name) + ": gates are for " +
                                                  std::to_string(policy.gates.input()) +
                                                  " hidden channels, want " + std::to_string(hidden));
        }
        kvcull::KVCache cache(shape_of(model), std::move(policy), setting.budget,
                              examples::named_rule(setting.rule));
        cache.begin_prompt(prompt_tokens);
        if (steering) static_cast<void>(steer(model, *steering, prompt_tokens));
    });
}

Outcome run_case(const Llama& model, const Setting& setting, const Case& example, std::size_t chunk,
                 kvcull::BlockPool& pool, const Thinking& how) {
    if (const auto method = episode_method(setting.policy))
        return run_conversation(model, *method, setting, example);
    Outcome outcome;
    with_policy(setting.policy, [&](auto policy, const auto& steering) {
        kvcull::KVCache cache(shape_of(model), std::move(policy), setting.budget, pool,
                              examples::named_rule(setting.rule));
        Reader reader{model};
        if (steering) reader.hook = steer(model, *steering, example.prompt.size());
        after_prompt(reader, example.prompt, chunk, std::move(cache), [&](auto& read, std::size_t bytes) {
            outcome = answer(reader, example, how, read);
            outcome.peak_bytes = std::max(outcome.peak_bytes, bytes);
        });
    });
    return outcome;
}

Row run_task(const Llama& model, const Setting& setting, const Task& task, std::size_t cases,
             std::size_t chunk, std::size_t threads, const Thinking& how) {
    const std::size_t count = std::min(cases, task.cases.size());
    kvcull::BlockPool pool({.block_rows = 16});
    std::vector<Outcome> outcomes(count);
    const auto begin = std::chrono::steady_clock::now();
    parallel_for(threads, count, [&](std::size_t i) {
        Thinking own = how;
        own.seed += i;
        outcomes[i] = run_case(model, setting, task.cases[i], chunk, pool, own);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;

    Row row{.task = task.name, .setting = setting};
    double correct = 0, tokens = 0;
    const auto share = [&](std::size_t value) {
        return static_cast<double>(value) / static_cast<double>(count);
    };
    for (const Outcome& outcome : outcomes) {
        correct += static_cast<double>(outcome.correct);
        tokens += static_cast<double>(outcome.tokens);
        row.questions += outcome.questions;
        row.kv_bytes += share(outcome.kv_bytes);
        row.thought_tokens += share(outcome.thought_tokens);
        row.second_thoughts += share(outcome.second_thoughts);
        row.peak_bytes = std::max(row.peak_bytes, outcome.peak_bytes);
    }
    row.accuracy = row.questions == 0 ? 0 : correct / static_cast<double>(row.questions);
    row.tokens_per_second = tokens / seconds.count();
    if (count > 0) row.kept = std::move(outcomes[0].kept);
    return row;
}

}  // namespace tiny_llama
