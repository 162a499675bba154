#include "evaluate.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <kvcull/cache/kv_cache.hpp>
#include <mutex>
#include <thread>

#include "../common/named_policies.hpp"
#include "../common/named_rules.hpp"
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

template <class Cache>
std::vector<float> kept(const Cache& cache, std::size_t tokens) {
    std::vector<float> share(tokens);
    const auto& shape = cache.shape();
    for (std::size_t layer = 0; layer < shape.layers; ++layer)
        for (std::size_t head = 0; head < shape.kv_heads; ++head)
            for (const auto position : cache.positions(layer, head))
                share[static_cast<std::size_t>(position)] += 1.0F / static_cast<float>(shape.heads());
    return share;
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
    outcome.kept = kept(cache, cache.seen());

    cache.hold(true);
    const auto before = cache.mark();
    const Hook hook = reader.hook;
    for (const Question& question : example.questions) {
        cache.rollback(before);
        reader.hook = hook;  // with what it remembers
        std::span<const int> next = question.ask;
        bool correct = true;
        for (const int& answer : question.answer) {
            reader.read(next, cache);
            correct = correct && argmax(reader.logits) == answer;
            next = {&answer,
                    1};  // the model's own token, as long as the answer is right; then nothing counts
        }
        outcome.correct += correct ? 1 : 0;
    }
    outcome.tokens = reader.tokens;
    return outcome;
}

/// Runs body(0) .. body(count - 1) on `threads` threads; the first exception is thrown when all are done.
template <class Body>
void parallel_for(std::size_t threads, std::size_t count, Body&& body) {
    std::atomic<std::size_t> next = 0;
    std::exception_ptr error;
    std::mutex mutex;
    const auto work = [&] {
        try {
            for (std::size_t i = next++; i < count; i = next++) body(i);
        } catch (...) {
            next = count;
            const std::scoped_lock lock(mutex);
            if (!error) error = std::current_exception();
        }
    };
    {
        std::vector<std::jthread> others;
        for (std::size_t i = 1; i < std::min(threads, count); ++i) others.emplace_back(work);
        work();
    }
    if (error) std::rethrow_exception(error);
}

}  // namespace

void check(const Llama& model, const Setting& setting, std::size_t prompt_tokens) {
    with_policy(setting.policy, [&](auto policy, const auto& steering) {
        kvcull::KVCache cache(shape_of(model), std::move(policy), setting.budget,
                              examples::NamedRule(setting.rule));
        cache.begin_prompt(prompt_tokens);
        if (steering) static_cast<void>(steer(model, *steering, prompt_tokens));
    });
}

Outcome run_case(const Llama& model, const Setting& setting, const Case& example, std::size_t chunk,
                 kvcull::BlockPool& pool, const Thinking& how) {
    Outcome outcome;
    with_policy(setting.policy, [&](auto policy, const auto& steering) {
        kvcull::KVCache cache(shape_of(model), std::move(policy), setting.budget, pool,
                              examples::NamedRule(setting.rule));
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
