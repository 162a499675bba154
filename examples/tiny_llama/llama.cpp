#include "llama.hpp"

#include <stdexcept>
#include <string>

#include "json.hpp"

namespace tiny_llama {

Llama::Llama(const std::filesystem::path& folder) : config_(read_config(folder / "config.json")) {
    Checkpoint file(folder);
    const Config& c = config_;
    const std::size_t q = c.q_heads * c.head_dim, kv = c.kv_heads * c.head_dim;
    embedding_ = file.matrix("model.embed_tokens.weight", c.vocabulary, c.hidden);
    for (std::size_t i = 0; i < c.layers; ++i) {
        const std::string layer = "model.layers." + std::to_string(i) + ".", attention = layer + "self_attn.",
                          mlp = layer + "mlp.";
        layers_.push_back({
            .attention_norm = file.vector(layer + "input_layernorm.weight", c.hidden),
            .mlp_norm = file.vector(layer + "post_attention_layernorm.weight", c.hidden),
            .qkv = file.stack({{attention + "q_proj.weight", q},
                               {attention + "k_proj.weight", kv},
                               {attention + "v_proj.weight", kv}},
                              c.hidden),
            .output = file.matrix(attention + "o_proj.weight", c.hidden, q),
            .gate_up = file.stack(
                {{mlp + "gate_proj.weight", c.intermediate}, {mlp + "up_proj.weight", c.intermediate}},
                c.hidden),
            .down = file.matrix(mlp + "down_proj.weight", c.hidden, c.intermediate),
        });
    }
    norm_ = file.vector("model.norm.weight", c.hidden);
    if (!c.tied_head) head_ = file.matrix("lm_head.weight", c.vocabulary, c.hidden);

    for (const std::string& name : file.unread()) {
        const bool derived =
            name.ends_with(".rotary_emb.inv_freq") || (c.tied_head && name == "lm_head.weight");
        if (!derived)
            fail(folder.string(), "tensor '" + name + "' belongs to no part of the model of config.json");
    }
}

Llama::Activations Llama::embed(std::span<const int> tokens) const {
    if (tokens.empty()) throw std::invalid_argument("Llama::forward: there are no tokens");
    const auto n = static_cast<Eigen::Index>(tokens.size());
    Activations a;
    a.hidden.resize(n, embedding_.cols());
    a.attended.resize(n, static_cast<Eigen::Index>(config_.q_heads * config_.head_dim));
    for (Eigen::Index t = 0; t < n; ++t) {
        const int token = tokens[static_cast<std::size_t>(t)];
        if (token < 0 || token >= embedding_.rows())
            throw std::out_of_range("Llama::forward: token is " + std::to_string(token) + ", want 0 to " +
                                    std::to_string(embedding_.rows() - 1));
        a.hidden.row(t) = embedding_.row(token);
    }
    return a;
}

void Llama::project(std::size_t layer, kvcull::position_t position, Activations& a) const {
    normalise(a.hidden, layers_[layer].attention_norm, a.normed);
    a.qkv.noalias() = a.normed * layers_[layer].qkv.transpose();
    for (Eigen::Index t = 0; t < a.qkv.rows(); ++t)
        kvcull::rotate(config_.rope, position + t,
                       kvcull::MatrixView<float>(a.qkv.row(t).data(), config_.q_heads + config_.kv_heads,
                                                 config_.head_dim));
}

void Llama::finish(std::size_t layer, Activations& a) const {
    const Layer& w = layers_[layer];
    a.hidden.noalias() += a.attended * w.output.transpose();
    normalise(a.hidden, w.mlp_norm, a.normed);
    a.gate_up.noalias() = a.normed * w.gate_up.transpose();
    const auto half = static_cast<Eigen::Index>(config_.intermediate);
    const auto gate = a.gate_up.leftCols(half).array(), up = a.gate_up.rightCols(half).array();
    a.product = gate / (1.0F + (-gate).exp()) * up;
    a.hidden.noalias() += a.product * w.down.transpose();
}

void Llama::head(std::size_t rows, const Activations& a, RowMajorMatrix& logits) const {
    logits.noalias() = a.normed.bottomRows(static_cast<Eigen::Index>(rows)) * head().transpose();
    if (!logits.allFinite())
        throw kvcull::error::state_error(
            "Llama::forward: logits hold a NaN or infinity, want numbers: a weight is none, or activations "
            "leave the range of floats");
}

void Llama::normalise(const RowMajorMatrix& x, const RowVector& weight, RowMajorMatrix& out) const {
    const auto scale = (x.array().square().rowwise().mean() + config_.rms_norm_eps).rsqrt().eval();
    out = (x.array().colwise() * scale).rowwise() * weight.array();
}

}  // namespace tiny_llama
