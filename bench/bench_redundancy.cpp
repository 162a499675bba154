/// sentences/sentences:<all>/D:<hidden size>: a comparison of 8 new sentences with all before them.
/// redundancy/<isa>/keys:<random|alike>/n:<rows>: R-KV's redundancy of one head beside Eigen's K K^T of the
/// same size, compiled for the same instruction set, on one thread. `over_eigen`: ours over Eigen's time.
/// Random keys are unlike each other: nothing ends the search for links early. Of alike keys all have a link.

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "groups.hpp"
#include "kvcull/policies/rkv.hpp"
#include "kvcull/score/sentences.hpp"
#include "support/cases.hpp"
#include "support/rows.hpp"

namespace kvcull::bench {
namespace {

void add_sentences(std::size_t sentences, std::size_t width) {
    constexpr std::size_t fresh = 8, length = 16;
    const std::string name =
        "sentences/sentences:" + std::to_string(sentences) + "/D:" + std::to_string(width);
    add_case(name, 30, [=](benchmark::State& state) {
        const SentenceRules rules{.delimiters = {2}};
        const std::vector<float> hidden = random_row(length * width, 5);
        SentenceTable table;
        const auto say = [&](SentenceTable& to, std::size_t count) {
            const std::size_t first = to.sentences().size() * length;
            for (std::size_t i = 0; i < count * length; ++i)
                to.feed(rules, static_cast<position_t>(first + i), i % length + 1 == length ? 2 : 10,
                        std::span(hidden).subspan(i % length * width, width));
        };
        say(table, sentences - fresh);
        table.score(rules, simd::kernels());
        Series time;
        for (auto _ : state) {
            SentenceTable now = table;
            say(now, fresh);
            const Stopwatch watch;
            now.score(rules, simd::kernels());
            time.add(watch.elapsed(), state);
        }
        state.counters["us"] = time.best() * 1e6;
        state.counters["spread"] = time.spread();
    });
}

}  // namespace

#if KVCULL_X86
void eigen_product_avx2(const float* keys, std::size_t n, std::size_t dim, float* out);
void eigen_product_avx512(const float* keys, std::size_t n, std::size_t dim, float* out);

namespace {

constexpr std::size_t dim = 128;

void measure(benchmark::State& state, simd::Isa isa, bool alike, std::size_t n) {
    const auto product = isa == simd::Isa::avx2 ? eigen_product_avx2 : eigen_product_avx512;
    std::vector<float> keys = random_row(n * dim, 3);
    for (std::size_t i = 0; alike && i < keys.size(); i += dim) keys[i] += 10.0F;
    std::vector<float> square(n * n), out(n), scratch(RKV::redundancy_memory(n, dim));
    std::vector<position_t> positions(n);
    std::iota(positions.begin(), positions.end(), 0);
    const RowsView rows(keys.data(), n, dim, dim);
    const PositionsView position(positions);
    KeyLinks links;
    resize_state(links, n);
    bool known = true;
    const auto ours = [&] {
        std::fill(links.link.values().begin(), links.link.values().end(), KeyLinks::unseen);
        known = find_links(simd::kernels_for(isa), rows, position, {}, links, scratch.data()) &&
                redundancy(simd::kernels_for(isa), rows, position, links, out, scratch.data()) && known;
        benchmark::ClobberMemory();
    };
    const auto eigen = [&] {
        product(keys.data(), n, dim, square.data());
        benchmark::ClobberMemory();
    };
    ours();
    eigen();
    Series time, other;
    Ratios ratio;
    for (auto _ : state) {
        const Stopwatch first;
        eigen();
        const Time under = first.elapsed();
        const Stopwatch second;
        ours();
        const Time over = second.elapsed();
        other.add(under);
        time.add(over, state);
        ratio.add(over.busy, under.busy);
    }
    state.counters["us"] = time.best() * 1e6;
    state.counters["eigen_us"] = other.best() * 1e6;
    state.counters["over_eigen"] = ratio.middle();
    state.counters["scratch_bytes"] = static_cast<double>(scratch.size() * sizeof(float));
    state.counters["spread"] = time.spread();
    if (!known) state.SkipWithError("links of other keys");
}

}  // namespace

void add_redundancy() {
    add_sentences(512, 4096);
    for (const simd::Isa isa : {simd::Isa::avx2, simd::Isa::avx512}) {
        if (!simd::available(isa)) continue;
        for (const bool alike : {false, true})
            for (const std::size_t n : {std::size_t{640}, std::size_t{1664}, std::size_t{4224}})
                add_case("redundancy/" + std::string(simd::name_of(isa)) +
                             "/keys:" + (alike ? "alike" : "random") + "/n:" + std::to_string(n),
                         samples_for(1.0, 2e-9 * static_cast<double>(n * n), 5, 60),
                         [=](benchmark::State& state) { measure(state, isa, alike, n); });
    }
}
#else
void add_redundancy() {
    add_sentences(512, 4096);
}
#endif

}  // namespace kvcull::bench
