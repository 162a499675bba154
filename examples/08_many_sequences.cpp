// A toy server: requests of different lengths on one pool. Whatever fits runs in one step, on two threads;
// whoever does not fit waits unharmed, and a finished request's blocks are free at once.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <functional>
#include <iterator>
#include <kvcull/kvcull.hpp>
#include <list>
#include <thread>
#include <vector>

namespace {

const kvcull::CacheShape shape{.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 16};
constexpr std::size_t chunk = 32;  // prompt tokens per step, so that a long prompt stalls nobody

struct Request {
    const char* name;
    std::size_t prompt, answer;
    kvcull::KVCache<kvcull::SnapKV> cache;
    bool answering = false;

    Request(const char* name_, std::size_t prompt_, std::size_t answer_, kvcull::BlockPool& pool)
        : name(name_),
          prompt(prompt_),
          answer(answer_),
          cache(shape, kvcull::SnapKV{.window = 8}, kvcull::Budget{.tokens = 32}, pool) {
        cache.begin_prompt(prompt);
    }
    [[nodiscard]] std::size_t next_tokens() const {
        return answering ? 1 : std::min(chunk, prompt - cache.seen());
    }
    void after_step() {
        if (answering || cache.seen() < prompt) return;
        cache.end_prompt();
        answering = true;
    }
    [[nodiscard]] bool done() const { return cache.seen() == prompt + answer; }
};

/// An engine hands over its own threads. Each takes the next index when it is free.
void on_two_threads(std::size_t count, const std::function<void(std::size_t)>& body) {
    std::atomic<std::size_t> next = 0;
    const auto work = [&] {
        for (std::size_t index = next++; index < count; index = next++) body(index);
    };
    std::jthread other(work);
    work();
}

}  // namespace

int main() {
    kvcull::BlockPool pool({.bytes = 112 << 10U, .block_rows = 16});
    std::list<Request> requests;  // the first one has the first claim on memory
    requests.emplace_back("summary", 96, 6, pool);
    requests.emplace_back("chat", 20, 12, pool);
    requests.emplace_back("search", 64, 4, pool);
    requests.emplace_back("title", 40, 3, pool);

    kvcull::JointStep step(on_two_threads);
    for (int number = 1; !requests.empty(); ++number) {
        std::printf("step %2d:", number);
        for (Request& request : requests) {
            if (step.add(request.cache, request.next_tokens()))
                std::printf(" %s +%zu", request.name, request.next_tokens());
            else
                std::printf(" (%s waits for %zu KiB)", request.name,
                            request.cache.step_bytes(request.next_tokens()) >> 10U);
        }
        if (step.size() == 0) {  // nobody fits: the newest gives its memory back and begins again
            const Request& last = requests.back();
            requests.emplace_back(last.name, last.prompt, last.answer, pool);
            requests.erase(std::prev(requests.end(), 2));
            std::printf("\n");
            continue;
        }

        // Your model: all tokens of the step, one request after the other.
        const std::size_t tokens = step.tokens();
        std::vector<float> q(tokens * 4 * 16, 0.1F), k(tokens * 2 * 16, 0.2F), v(k), out(q);
        for (std::size_t layer = 0; layer < shape.layers; ++layer)
            step.attend(layer, kvcull::token_major(q.data(), 4, tokens, 16),
                        kvcull::token_major(k.data(), 2, tokens, 16),
                        kvcull::token_major(v.data(), 2, tokens, 16),
                        kvcull::token_major(out.data(), 4, tokens, 16));
        step.end();

        for (Request& request : requests) request.after_step();
        std::printf("; %zu of %zu KiB", pool.bytes() >> 10U, pool.limit() >> 10U);
        for (const Request& request : requests)
            if (request.done()) std::printf("; %s is done", request.name);
        std::erase_if(requests, [](const Request& request) { return request.done(); });
        std::printf("\n");
    }
    std::printf("all done, %zu bytes in use, %zu KiB at most\n", pool.bytes(), pool.peak_bytes() >> 10U);
}
