// The engine of engine_before.cpp in bounded memory: `engine_after 64` holds 64 rows per layer and head.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <kvcull/kvcull.hpp>
#include <string>
#include <vector>

#include "json.hpp"
#include "llama.hpp"
#include "tasks.hpp"

namespace {

using tiny_llama::Llama;
using Vector = Eigen::VectorXf;

struct Engine {
    const Llama& model;
    std::size_t layers, q_heads, kv_heads, dim;
    std::size_t capacity;             // rows
    std::vector<float> keys, values;  // [layers, capacity, kv_heads, dim]
    std::size_t position = 0;
    kvcull::Evictor<kvcull::H2O> evictor;
    std::vector<std::vector<kvcull::position_t>> held;  // [layers * kv_heads]: the position of every row

    Engine(const Llama& llama, std::size_t rows)
        : model(llama),
          layers(llama.config().layers),
          q_heads(llama.config().q_heads),
          kv_heads(llama.config().kv_heads),
          dim(llama.config().head_dim),
          capacity(rows + 1),
          keys(layers * capacity * kv_heads * dim),
          values(keys.size()),
          evictor({layers, q_heads, kv_heads, dim}, {}, {.tokens = rows}),
          held(layers * kv_heads) {}

    [[nodiscard]] std::size_t at(std::size_t layer, std::size_t row, std::size_t head = 0) const {
        return ((layer * capacity + row) * kv_heads + head) * dim;
    }
    /// How many rows a layer holds; the next one goes behind them.
    [[nodiscard]] std::size_t size(std::size_t layer) const { return held[layer * kv_heads].size(); }

    /// q [q_heads, dim] -> out [q_heads, dim]
    void attend(std::size_t layer, const float* q, float* out) {
        const std::size_t rows = size(layer) + 1;
        std::vector<float> weights(rows);
        for (std::size_t h = 0; h < q_heads; ++h, q += dim, out += dim) {
            const std::size_t kv = h / (q_heads / kv_heads);
            float largest = -INFINITY, total = 0;
            for (std::size_t t = 0; t < rows; ++t) {
                float dot = 0;
                for (std::size_t c = 0; c < dim; ++c) dot += q[c] * keys[at(layer, t, kv) + c];
                weights[t] = dot / std::sqrt(static_cast<float>(dim));
                largest = std::max(largest, weights[t]);
            }
            for (float& weight : weights) total += weight = std::exp(weight - largest);
            std::fill_n(out, dim, 0.0F);
            for (std::size_t t = 0; t < rows; ++t)
                for (std::size_t c = 0; c < dim; ++c)
                    out[c] += weights[t] / total * values[at(layer, t, kv) + c];
        }
    }

    /// The evictor sees the rows and says which of them move where.
    void evict(std::size_t layer, const float* q) {
        const std::size_t stride = kv_heads * dim, bytes = sizeof(float);
        std::vector<kvcull::HeadView> views;
        for (std::size_t h = 0; h < kv_heads; ++h) {
            auto& positions = held[layer * kv_heads + h];
            positions.push_back(evictor.next_position());
            const float *k = &keys[at(layer, 0, h)], *v = &values[at(layer, 0, h)];
            const std::size_t n = positions.size();
            views.push_back({{k, n, dim, stride}, {v, n, dim, stride}, {positions}});
        }
        const kvcull::Plan& plan = evictor.step(layer, views, kvcull::token_major(q, q_heads, 1, dim));
        for (std::size_t i = 0; i < plan.size(); ++i) {
            const kvcull::HeadPlan head = plan[i];
            kvcull::move_rows(head.moves, &keys[at(layer, 0, head.head)], dim * bytes, stride * bytes);
            kvcull::move_rows(head.moves, &values[at(layer, 0, head.head)], dim * bytes, stride * bytes);
            auto& positions = held[layer * kv_heads + head.head];
            kvcull::move_rows(head.moves, positions.data(), sizeof positions[0], sizeof positions[0]);
            positions.resize(head.keep.size());
        }
    }

    [[nodiscard]] Vector norm(const Vector& x, const tiny_llama::RowVector& weight) const {
        const float mean = x.squaredNorm() / static_cast<float>(x.size());
        return x.cwiseProduct(weight.transpose()) / std::sqrt(mean + model.config().rms_norm_eps);
    }
    void rotate(float* rows, std::size_t heads) const {
        const std::vector<double>& frequencies = model.config().rope.frequencies;
        for (std::size_t h = 0; h < heads; ++h, rows += dim)
            for (std::size_t a = 0; a < dim / 2; ++a) {
                const double angle = static_cast<double>(position) * frequencies[a];
                const auto c = static_cast<float>(std::cos(angle)), s = static_cast<float>(std::sin(angle));
                const float x = rows[a], y = rows[a + dim / 2];
                rows[a] = x * c - y * s;
                rows[a + dim / 2] = x * s + y * c;
            }
    }

    /// One token. @returns logits
    Vector forward(int token) {
        Vector hidden = model.embedding().row(token).transpose();
        Vector attended(q_heads * dim);
        for (std::size_t layer = 0; layer < layers; ++layer) {
            const Llama::Layer& w = model.layers()[layer];
            Vector qkv = w.qkv * norm(hidden, w.attention_norm);
            rotate(qkv.data(), q_heads + kv_heads);
            std::copy_n(qkv.data() + q_heads * dim, kv_heads * dim, &keys[at(layer, size(layer))]);
            std::copy_n(qkv.data() + (q_heads + kv_heads) * dim, kv_heads * dim,
                        &values[at(layer, size(layer))]);
            attend(layer, qkv.data(), attended.data());
            evict(layer, qkv.data());
            hidden += w.output * attended;

            const Vector both = w.gate_up * norm(hidden, w.mlp_norm);
            const auto gate = both.head(both.size() / 2).array(), up = both.tail(both.size() / 2).array();
            hidden += w.down * (gate / (1.0F + (-gate).exp()) * up).matrix();
        }
        ++position;
        evictor.end_step();
        return model.head() * norm(hidden, model.norm());
    }
};

}  // namespace

int main(int count, char** arguments) {
    const std::filesystem::path folder = TINY_LLAMA_MODEL_DIR;
    const Llama model(folder);
    const auto words = tiny_llama::read_json(folder / "vocab.json").get<std::vector<std::string>>();
    const std::string task = "thoughts";
    const auto example = tiny_llama::read_tasks({&task, 1}, folder, words.size()).front().cases.front();

    std::vector<int> text = example.prompt;
    text.push_back(example.stream.front());  // <think>
    constexpr std::size_t written = 120;
    Engine engine(model, count > 1 ? std::stoul(arguments[1]) : text.size() + written);
    Vector logits;
    for (const int token : text) logits = engine.forward(token);
    for (std::size_t i = 0; i < written; ++i) {
        Eigen::Index next = 0;
        logits.maxCoeff(&next);
        std::printf("%s%s", words[static_cast<std::size_t>(next)].c_str(), next == 2 ? "\n" : " ");
        logits = engine.forward(static_cast<int>(next));
    }
    std::printf("\n");
}
