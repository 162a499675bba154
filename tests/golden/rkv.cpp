// Layouts of method `rkv`.

#include "rkv.hpp"

#include <vector>

#include "kinds.hpp"

namespace kvcull::test::rkv {

void check_eviction(GoldenFile& file) {
    const auto k = file.array<float>("in.k", 3);
    std::vector<position_t> positions;
    for (std::size_t h = 0; h < k.dim(0); ++h)
        for (std::size_t j = 0; j < k.dim(1); ++j) positions.push_back(static_cast<position_t>(j));
    const RKV policy = read_policy(file);
    compare_eviction(file, policy, positions,
                     [&](const RKV::State& state, const HeadStep& step, std::span<float> out) {
                         policy.score(state, step, out);
                     });
}

void check_trace(GoldenFile& file) {
    const Stream stream = read_layers(file);
    compare_trace(
        file, read_policy(file), stream,
        [&](auto& cache, std::size_t first, std::size_t count) { feed(cache, stream, first, count); },
        [](auto&) {});
}

}  // namespace kvcull::test::rkv
