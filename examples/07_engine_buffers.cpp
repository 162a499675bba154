// An engine with buffers of its own: the evictor looks at them and answers with plans, the engine carries
// them out.
#include <cstdio>
#include <kvcull/kvcull.hpp>
#include <vector>

namespace {

constexpr kvcull::CacheShape shape{.layers = 1, .q_heads = 2, .kv_heads = 2, .head_dim = 4};
constexpr std::size_t capacity = 32, dim = shape.head_dim, heads = shape.kv_heads;

/// Token-major rows, as a projection writes them: row j of head h is at [j][h].
struct Engine {
    std::vector<float> k = std::vector<float>(capacity * heads * dim), v = k;
    std::vector<std::vector<kvcull::position_t>> positions{heads};
    std::vector<kvcull::HeadView> views{heads};

    kvcull::LayerView append(int token) {
        for (std::size_t h = 0; h < heads; ++h) {
            float* key = &k[(positions[h].size() * heads + h) * dim];
            key[0] = token == (h == 0 ? 3 : 17) ? 8.0F : 0.0F;  // each head has a token that all look at
            positions[h].push_back(token);
            const std::size_t rows = positions[h].size();
            views[h] = {
                {&k[h * dim], rows, dim, heads * dim}, {&v[h * dim], rows, dim, heads * dim}, {positions[h]}};
        }
        return views;
    }

    void apply(const kvcull::Plan& plan) {
        for (std::size_t i = 0; i < plan.size(); ++i) {
            const kvcull::HeadPlan head = plan[i];
            for (std::vector<float>* rows : {&k, &v})
                kvcull::move_rows(head.moves, &(*rows)[head.head * dim], dim * sizeof(float),
                                  heads * dim * sizeof(float));
            std::vector<kvcull::position_t>& held = positions[head.head];
            kvcull::move_rows(head.moves, held.data(), sizeof held[0], sizeof held[0]);
            held.resize(head.keep.size());
        }
    }
};

/// The same plan for engines that move nothing.
void print(const kvcull::HeadPlan& head, const kvcull::PositionsView& positions) {
    std::vector<kvcull::PositionRange> runs;
    kvcull::removed_runs(head, positions, kvcull::RunOrder::ascending, runs);
    std::printf("head %zu: remove positions", head.head);
    for (const kvcull::PositionRange run : runs)
        std::printf(" %d..%d", static_cast<int>(run.begin), static_cast<int>(run.end - 1));
    const kvcull::IndexRange freed = kvcull::trailing_blocks(head, 4);
    std::printf("; once compacted, blocks %d..%d of 4 rows are free\n", freed.begin, freed.end - 1);
}

}  // namespace

int main() {
    kvcull::Evictor evictor(shape, kvcull::H2O{.recent = 4}, kvcull::Budget{.tokens = 8, .slack = 16});
    evictor.buffer_queries();  // an engine attends by itself: the policy's pass over the keys can wait
    Engine engine;
    const std::vector<float> q{1.0F, 0.0F, 0.0F, 0.0F, 1.0F, 0.0F, 0.0F, 0.0F};

    for (int token = 0; token < 60; ++token) {
        const kvcull::LayerView cached = engine.append(token);
        const kvcull::Plan& plan = evictor.step(0, cached, kvcull::token_major(q.data(), heads, 1, dim));
        if (!plan.empty()) std::printf("after token %d\n", token);
        for (std::size_t i = 0; i < plan.size(); ++i) print(plan[i], cached[plan[i].head].position);
        engine.apply(plan);
        evictor.end_step();
    }
}
