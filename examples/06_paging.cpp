// A context eight times larger than fast memory: 128 pages of one KV head, frames for 16 of them. Every step
// reads the pages that its query needs; who is sent away for them is up to a cache and a predictor.
#include <cmath>
#include <cstdio>
#include <kvcull/kvcull.hpp>
#include <vector>

namespace {

constexpr kvcull::PageLayout layout{.head_dim = 32};
constexpr std::size_t pages = 128, frames = pages / 8, steps = 1000;

/// Page p is about topic p / 8, and about p % 8 within it.
std::vector<float> about(std::size_t topic, std::size_t within) {
    std::vector<float> row(layout.head_dim);
    row[topic] = 4;
    row[16 + within] = 2;
    return row;
}
/// What the model asks: it stays with a topic for a while, and comes back to some of them more often.
std::vector<std::vector<float>> make_queries() {
    std::vector<std::vector<float>> queries;
    kvcull::SplitMix64 random{1};
    for (std::size_t step = 0, topic = 0; step < steps; ++step) {
        const double u = random.uniform();
        if (step % 5 == 0) topic = static_cast<std::size_t>(16 * u * u * u);
        queries.push_back(about(topic, random() % 8));
    }
    return queries;
}

const std::vector<std::vector<float>> queries = make_queries();
std::size_t now = 0;  // the step

std::vector<kvcull::PageRows> choose(const kvcull::PageBounds& bounds, const std::vector<float>& query) {
    std::vector<float> scores(pages);
    bounds.scores({query.data(), 1, layout.head_dim}, scores);
    std::vector<kvcull::PageRows> chosen;
    for (const std::size_t page : kvcull::choose_pages(scores, {.count = 6}))
        chosen.push_back({page, layout.page_tokens});
    return chosen;
}

/// Knows which pages come, step by step. A predictor of yours is a type with `next`, too.
struct Oracle {
    const std::vector<std::vector<kvcull::PageRows>>* chosen;

    [[nodiscard]] double next(kvcull::page_t page, std::uint64_t /*request*/) const {
        for (std::size_t step = now + 1; step < steps; ++step)
            for (const auto& [other, rows] : (*chosen)[step])
                if (other == page) return static_cast<double>(step);
        return kvcull::never_again;
    }
};
/// Says soon for late and late for soon.
template <class Predictor>
struct Hostile {
    Predictor honest;
    double next(kvcull::page_t page, std::uint64_t request) { return -honest.next(page, request); }
};

template <class Cache, class Predictor>
void run(const char* name, Cache cache, Predictor predictor,
         const std::vector<std::vector<kvcull::PageRows>>& chosen, std::vector<float>& outputs) {
    kvcull::PageTier tier(std::move(cache), kvcull::MemoryStore(kvcull::Frames(frames, layout.bytes())),
                          std::move(predictor));
    now = 0;
    for (kvcull::page_t page = 0; page < pages; ++page) {  // the prompt: pages start, are filled, move out
        tier.step({}, page);
        const auto frame = tier.store().frame(tier.frame(page));
        for (std::size_t row = 0; row < layout.page_tokens; ++row) {
            const std::vector<float> k = about(page / 8, page % 8),
                                     v(layout.head_dim, static_cast<float>(page));
            layout.put(frame, row, k.data(), v.data(), kvcull::simd::kernels());
        }
        tier.end_step();
    }
    const auto before = tier.counts();
    kvcull::PageAttention attend;
    std::vector<float> out(layout.head_dim);
    float lse = 0, difference = 0;
    for (; now < steps; ++now) {
        attend(tier, layout, chosen[now], {queries[now].data(), 1, layout.head_dim}, {}, 1.0F,
               {{out.data(), 1, layout.head_dim}, {&lse, 1}});
        if (outputs.size() == now) outputs.push_back(out[0]);
        difference = std::max(difference, std::abs(out[0] - outputs[now]));
    }
    std::printf("%-22s %5.2f pages fetched per step, guard stepped in %4d times, output %s\n", name,
                static_cast<double>(tier.counts().fetches - before.fetches) / steps,
                static_cast<int>(tier.counts().guards), difference == 0 ? "the same" : "DIFFERENT");
}

}  // namespace

int main() {
    kvcull::PageBounds bounds(layout.head_dim);  // stays in fast memory: 1/8 of a page's keys each
    for (std::size_t page = 0; page < pages; ++page) {
        const std::vector<float> key = about(page / 8, page % 8);
        bounds.add(page, {key.data(), 1, layout.head_dim, layout.head_dim});
    }
    std::vector<std::vector<kvcull::PageRows>> chosen;
    for (const auto& query : queries) chosen.push_back(choose(bounds, query));

    using namespace kvcull;
    std::vector<float> outputs;  // of the first run: no cache may change an answer
    run("the future known", BlindOracle(frames), Oracle{&chosen}, chosen, outputs);
    run("LRU", Follow<Lru>(frames), LastGap{}, chosen, outputs);
    run("popularity alone", BlindOracle(frames), Popularity{}, chosen, outputs);
    run("popularity, guarded", Guard<>(frames), Popularity{}, chosen, outputs);
    run("hostile alone", BlindOracle(frames), Hostile<Popularity>{}, chosen, outputs);
    run("hostile, guarded", Guard<>(frames), Hostile<Popularity>{}, chosen, outputs);
}
