// A cache that holds at most 64 of 1000 tokens per head, and attends to what it holds.
#include <cstdio>
#include <kvcull/kvcull.hpp>
#include <vector>

int main() {
    const kvcull::CacheShape shape{.layers = 2, .q_heads = 8, .kv_heads = 2, .head_dim = 64};
    kvcull::KVCache cache(shape, kvcull::H2O{}, kvcull::Budget{.tokens = 64});

    std::vector<float> q(8 * 64, 0.1F), k(2 * 64, 0.2F), v(2 * 64, 0.3F), out(8 * 64);  // from your model
    for (int token = 0; token < 1000; ++token) {
        for (std::size_t layer = 0; layer < shape.layers; ++layer) {
            cache.append(layer, kvcull::token_major(k.data(), 2, 1, 64),
                         kvcull::token_major(v.data(), 2, 1, 64));
            cache.attend(layer, kvcull::token_major(q.data(), 8, 1, 64),
                         kvcull::token_major(out.data(), 8, 1, 64));
        }
        cache.end_step();
    }
    std::printf("%zu tokens seen, %zu held, output %.2f\n", cache.seen(), cache.rows(0, 0), out[0]);
}
