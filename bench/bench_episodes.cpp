/// episodes/cluster/segments:<K>/dim:384: k-means of a history's segments into 4 episodes, all restarts.
///
/// episodes/prefill/heads:8x2/n:<history>: a history in blocks of 256 into a cache of 512 rows, asked by a
/// prompt of 128 tokens after each. Beside it, sample by sample, plain prefill: the same blocks into a cache
/// that keeps all. `ns_per_token` and `plain_ns_per_token` are of one layer, all heads; `over_plain` is the
/// ratio.
///
/// episodes/switch/<memory|file>/mb:<size>: another episode becomes resident, nothing is written back. Beside
/// it, the same file into memory by read calls; the system has it cached. `over_read` is the ratio of times.

#include <array>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <unistd.h>

#include "groups.hpp"
#include "kvcull/cache/episodes.hpp"
#include "kvcull/cache/file_bytes.hpp"
#include "kvcull/policies.hpp"
#include "support/cases.hpp"
#include "support/rows.hpp"

namespace kvcull::bench {
namespace {

void cluster(benchmark::State& state, std::size_t segments) {
    constexpr std::size_t dim = 384;
    Points points(segments, dim);
    for (std::size_t i = 0; i < segments; ++i) {  // four topics, far from clear cut
        const std::vector<float> topic = random_row(dim, i % 4), own = random_row(dim, 100 + i);
        for (std::size_t c = 0; c < dim; ++c)
            points[i][c] = static_cast<double>(topic[c]) + 2 * static_cast<double>(own[c]);
    }
    Series time;
    for (auto _ : state) {
        const Stopwatch watch;
        benchmark::DoNotOptimize(k_means(points, {}));
        time.add(watch.elapsed(), state);
    }
    state.counters["ms"] = time.best() * 1e3;
    state.counters["spread"] = time.spread();
}

/// A model whose rows are drawn beforehand: position by position in a history, and those of a prompt.
class Drawn {
  public:
    Drawn(CacheShape shape, std::size_t history, std::size_t prompt)
        : shape_(shape), history_(rows(history, 1)), prompt_(rows(prompt, 2)), out_(history_[0].size()) {}

    template <class Cache>
    void forward(Cache& cache, std::span<const std::int32_t> tokens) {
        const std::size_t first = cache.seen();
        for (std::size_t layer = 0; layer < shape_.layers; ++layer) {
            cache.append(layer, part(history_, 1, first, tokens.size()),
                         part(history_, 2, first, tokens.size()));
            cache.attend(layer, part(history_, 0, first, tokens.size()), out(tokens.size()));
        }
        cache.end_step();
    }
    template <class Cache>
    void probe(Cache& cache, std::span<const std::int32_t> tokens) {
        const std::size_t count = tokens.size();
        for (std::size_t layer = 0; layer < shape_.layers; ++layer)
            cache.probe(layer, part(prompt_, 0, 0, count), part(prompt_, 1, 0, count),
                        part(prompt_, 2, 0, count), out(count));
    }

  private:
    using Rows = std::array<std::vector<float>, 3>;  // q, k, v

    [[nodiscard]] Rows rows(std::size_t tokens, std::uint64_t seed) const {
        const std::size_t row = tokens * shape_.head_dim;
        return {random_row(row * shape_.q_heads, 3 * seed), random_row(row * shape_.kv_heads, 3 * seed + 1),
                random_row(row * shape_.kv_heads, 3 * seed + 2)};
    }
    [[nodiscard]] HeadsView<const float> part(const Rows& of, std::size_t which, std::size_t first,
                                              std::size_t count) const {
        const std::size_t heads = which == 0 ? shape_.q_heads : shape_.kv_heads;
        return token_major(of[which].data() + first * heads * shape_.head_dim, heads, count, shape_.head_dim);
    }
    [[nodiscard]] HeadsView<float> out(std::size_t count) {
        return token_major(out_.data(), shape_.q_heads, count, shape_.head_dim);
    }

    CacheShape shape_;
    Rows history_, prompt_;
    std::vector<float> out_;
};

void prefill(benchmark::State& state, std::size_t n) {
    constexpr CacheShape shape{.layers = 1, .q_heads = 8, .kv_heads = 2, .head_dim = 128};
    constexpr std::size_t block = 256, budget = 512, prompt = 128;
    Drawn model(shape, n, prompt);
    const std::vector<std::int32_t> history(n);
    const auto run = [&](auto policy, std::size_t asked) {
        KVCache cache(shape, std::move(policy), Budget{.tokens = budget});
        FixedPrompt question{std::vector<std::int32_t>(asked)};
        const Stopwatch watch;
        block_prefill(cache, model, std::span<const std::int32_t>(history), block, question);
        return watch.elapsed();
    };
    Series mine, plain;
    Ratios over;
    for (auto _ : state) {
        const Time blocks = run(EpiCache{}, prompt), all = run(Full{}, 0);
        mine.add(blocks, state);
        plain.add(all);
        over.add(blocks.busy, all.busy);
    }
    const auto tokens = static_cast<double>(n);
    state.counters["ns_per_token"] = mine.best() * 1e9 / tokens;
    state.counters["plain_ns_per_token"] = plain.best() * 1e9 / tokens;
    state.counters["over_plain"] = over.middle();
    state.counters["spread"] = mine.spread();
}

/// A folder among the temporary files, which goes with all that is in it.
struct TempFolder {
    std::filesystem::path path =
        std::filesystem::temp_directory_path() / ("kvcull-bench-" + std::to_string(::getpid()));

    TempFolder() { std::filesystem::create_directory(path); }
    TempFolder(const TempFolder&) = delete;
    TempFolder& operator=(const TempFolder&) = delete;
    ~TempFolder() { std::filesystem::remove_all(path); }
};

template <ByteStore Store>
void switch_episodes(benchmark::State& state, Store store, std::size_t rows, const std::string& file) {
    constexpr CacheShape shape{.layers = 4, .q_heads = 8, .kv_heads = 8, .head_dim = 128};
    Drawn model(shape, rows, 0);
    const auto make = [&] { return KVCache(shape, EpiCache{}, Budget{.tokens = rows}); };
    Episodes episodes(make, model, store, {.episodes = 2, .block = 64});
    const EpisodeSegment segments[]{{{1, 0}, {}}, {{0, 1}, {}}};
    episodes.build(std::vector<std::int32_t>(rows), segments);
    const std::vector<std::byte> bytes = store.get(0);
    {
        std::ofstream out(file, std::ios::binary);
        out.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    }
    Series mine, plain;
    Ratios over;
    std::size_t next = 0;
    for (auto _ : state) {
        const auto query = segments[next++ % 2].embedding;
        const Stopwatch watch;
        episodes.begin_turn(query);
        const Time taken = watch.elapsed();
        const Stopwatch read;
        std::vector<std::byte> again(bytes.size());
        detail::PosixFile<PosixIo>("bench", file, O_RDONLY, {}).read(again, 0, "");
        const Time beside = read.elapsed();
        benchmark::DoNotOptimize(again.data());
        mine.add(taken, state);
        plain.add(beside);
        over.add(taken.busy, beside.busy);
    }
    state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations() * bytes.size()));
    const auto size = static_cast<double>(bytes.size());
    state.counters["gb_per_s"] = size / mine.best() * 1e-9;
    state.counters["read_gb_per_s"] = size / plain.best() * 1e-9;
    state.counters["over_read"] = over.middle();
    state.counters["spread"] = mine.spread();
}

}  // namespace

void add_episodes() {
    for (const std::size_t segments : {std::size_t{64}, std::size_t{512}})
        add_case("episodes/cluster/segments:" + std::to_string(segments) + "/dim:384", 9,
                 [segments](benchmark::State& state) { cluster(state, segments); });
    for (const std::size_t n : {std::size_t{2048}, std::size_t{8192}})
        add_case("episodes/prefill/heads:8x2/n:" + std::to_string(n), 5,
                 [n](benchmark::State& state) { prefill(state, n); });
    for (const std::size_t rows : {std::size_t{256}, std::size_t{1024}}) {
        const std::string size = "/mb:" + std::to_string(rows / 32);  // 4 layers x 8 heads x 1 KiB a row
        add_case("episodes/switch/memory" + size, 15, [rows](benchmark::State& state) {
            const TempFolder folder;
            switch_episodes(state, MemoryBytes{}, rows, folder.path / "plain");
        });
        add_case("episodes/switch/file" + size, 15, [rows](benchmark::State& state) {
            const TempFolder folder;
            switch_episodes(state, FileBytes<>(folder.path), rows, folder.path / "plain");
        });
    }
}

}  // namespace kvcull::bench
