// Three policies over the same stream: how far is the attention output from that of the full cache?
//
// The stream has a topic: one token in sixteen carries a key that later queries look for, among noise.
// Policies that rank by attention find those tokens; a sliding window forgets them.
#include <cmath>
#include <cstdio>
#include <kvcull/kvcull.hpp>
#include <string>
#include <vector>

constexpr std::size_t stream_dim = 32, stream_length = 512, room = 96;

struct Token {
    std::vector<float> q, k, v;
};

std::vector<Token> make_stream() {
    kvcull::SplitMix64 random{7};
    const auto noise = [&](float size) {
        std::vector<float> row(stream_dim);
        for (float& x : row) x = size * static_cast<float>(2.0 * random.uniform() - 1.0);
        return row;
    };
    std::vector<Token> stream;
    for (std::size_t t = 0; t < stream_length; ++t) {
        Token token{noise(1.0F), noise(1.0F), noise(1.0F)};
        token.q[0] = 4.0F;                        // every query asks for channel 0 ..
        token.k[0] = t % 16 == 5 ? 6.0F : -1.0F;  // .. and a few keys answer
        stream.push_back(token);
    }
    return stream;
}

// Outputs of all steps, one row per token.
template <class Cache>
std::vector<std::vector<float>> run(Cache cache, const std::vector<Token>& stream) {
    const auto one_head = [](const std::vector<float>& row) {
        return kvcull::head_major(row.data(), 1, 1, stream_dim);
    };
    std::vector<std::vector<float>> outputs;
    for (const Token& token : stream) {
        std::vector<float> out(stream_dim);
        cache.append(0, one_head(token.k), one_head(token.v));
        cache.attend(0, one_head(token.q), kvcull::head_major(out.data(), 1, 1, stream_dim));
        cache.end_step();
        outputs.push_back(out);
    }
    return outputs;
}

int main() {
    const kvcull::CacheShape shape{.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = stream_dim};
    const std::vector<Token> stream = make_stream();
    const auto full = run(kvcull::KVCache(shape, kvcull::Full{}), stream);

    std::printf("%zu tokens, budget %zu\n", stream_length, room);
    for (const std::string name : {"streaming:sinks=4", "h2o", "tova"})
        kvcull::with_policy<kvcull::Streaming, kvcull::H2O, kvcull::Tova>(name, [&](auto policy) {
            const auto outputs = run(kvcull::KVCache(shape, policy, kvcull::Budget{.tokens = room}), stream);
            double error = 0.0, norm = 0.0;
            for (std::size_t t = 0; t < stream_length; ++t)
                for (std::size_t c = 0; c < stream_dim; ++c) {
                    error += std::pow(outputs[t][c] - full[t][c], 2);
                    norm += std::pow(full[t][c], 2);
                }
            std::printf("%-18s relative error of the output %.2f\n", name.c_str(), std::sqrt(error / norm));
        });
}
