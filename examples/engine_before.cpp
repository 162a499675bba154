// An engine of the kind of llama2.c with key and value buffers of its own; engine_after.cpp bounds them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
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

    Engine(const Llama& llama, std::size_t rows)
        : model(llama),
          layers(llama.config().layers),
          q_heads(llama.config().q_heads),
          kv_heads(llama.config().kv_heads),
          dim(llama.config().head_dim),
          capacity(rows + 1),
          keys(layers * capacity * kv_heads * dim),
          values(keys.size()) {}

    [[nodiscard]] std::size_t at(std::size_t layer, std::size_t row, std::size_t head = 0) const {
        return ((layer * capacity + row) * kv_heads + head) * dim;
    }
    /// How many rows a layer holds; the next one goes behind them.
    [[nodiscard]] std::size_t size(std::size_t /*layer*/) const { return position; }

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
            hidden += w.output * attended;

            const Vector both = w.gate_up * norm(hidden, w.mlp_norm);
            const auto gate = both.head(both.size() / 2).array(), up = both.tail(both.size() / 2).array();
            hidden += w.down * (gate / (1.0F + (-gate).exp()) * up).matrix();
        }
        ++position;
        return model.head() * norm(hidden, model.norm());
    }
};

}  // namespace

int main() {
    const std::filesystem::path folder = TINY_LLAMA_MODEL_DIR;
    const Llama model(folder);
    const auto words = tiny_llama::read_json(folder / "vocab.json").get<std::vector<std::string>>();
    const std::string task = "thoughts";
    const auto example = tiny_llama::read_tasks({&task, 1}, folder, words.size()).front().cases.front();

    std::vector<int> text = example.prompt;
    text.push_back(example.stream.front());  // <think>
    constexpr std::size_t written = 120;
    Engine engine(model, text.size() + written);
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
