#include "trainer.hpp"

#include <array>
#include <charconv>
#include <cmath>
#include <kvcull/attention/rope.hpp>
#include <kvcull/base/safetensors.hpp>
#include <kvcull/train/frozen.hpp>
#include <kvcull/train/gated_attention.hpp>
#include <kvcull/train/losses.hpp>
#include <map>

#include "json.hpp"
#include "parallel.hpp"
#include "world.hpp"

namespace tiny_llama {
namespace {

namespace train = kvcull::train;

kvcull::MatrixView<float> view(RowMajorMatrix& m) {
    return {m.data(), static_cast<std::size_t>(m.rows()), static_cast<std::size_t>(m.cols())};
}
kvcull::MatrixView<const float> view(const RowMajorMatrix& m) {
    return {m.data(), static_cast<std::size_t>(m.rows()), static_cast<std::size_t>(m.cols())};
}
/// Columns `first .. first + count - 1`.
template <class T>
kvcull::MatrixView<T> columns(kvcull::MatrixView<T> m, std::size_t first, std::size_t count) {
    return {m.data + first, m.rows, count, m.stride};
}
/// Heads `first ..` of rows that hold all heads of a token one after the other.
template <class T>
kvcull::HeadsView<T> heads(kvcull::MatrixView<T> rows, std::size_t first, std::size_t count,
                           std::size_t dim) {
    return {rows.data + first * dim, count, rows.rows, dim, dim, rows.stride};
}
std::span<const float> span(const RowVector& v) {
    return {v.data(), static_cast<std::size_t>(v.size())};
}
RowMajorMatrix zeros(const RowMajorMatrix& like) {
    return RowMajorMatrix::Zero(like.rows(), like.cols());
}
/// Roughly normal: the sum of four uniform numbers.
float normal(kvcull::SplitMix64& random) {
    return static_cast<float>(
        (random.uniform() + random.uniform() + random.uniform() + random.uniform() - 2) * 1.7320508);
}

/// Attention over the rows of a layer's qkv.
template <class Layer>
train::GatedAttention<float> attention_of(const Config& c, const Layer& a,
                                          std::span<const train::TokenRange> documents) {
    const auto qkv = view(a.qkv);
    return {heads(qkv, 0, c.q_heads, c.head_dim),
            heads(qkv, c.q_heads, c.kv_heads, c.head_dim),
            heads(qkv, c.q_heads + c.kv_heads, c.kv_heads, c.head_dim),
            view(a.log_beta),
            documents,
            1.0F / std::sqrt(static_cast<float>(c.head_dim))};
}

std::string gate_name(std::size_t layer, std::string_view tensor) {
    static const std::map<std::string_view, std::string> names{
        {"w1", "linear1.weight"}, {"b1", "linear1.bias"}, {"w_out", "linear2.weight"}, {"bias", "bias"}};
    return "model.layers." + std::to_string(layer) + ".self_attn.retention_gate." + names.at(tensor);
}
/// The tensors of all layers, under names that begin with `prefix`.
void list_tensors(const std::vector<GateTrainer::Gate>& gates, const std::string& prefix,
                  std::vector<kvcull::Tensor>& tensors) {
    for (std::size_t i = 0; i < gates.size(); ++i)
        for (const auto& part : gates[i].parts()) {
            const std::size_t cols = part.name == "w1" ? gates[i].view().input() : gates[i].view().width();
            std::vector<std::size_t> shape{part.size};
            if (part.decays) shape = {part.size / cols, cols};
            tensors.push_back(kvcull::Tensor::of<float>(prefix + gate_name(i, part.name), shape,
                                                        gates[i].values().subspan(part.first, part.size)));
        }
}
void read_tensors(const kvcull::SafeTensors& file, const std::string& prefix,
                  std::vector<GateTrainer::Gate>& gates) {
    for (std::size_t i = 0; i < gates.size(); ++i)
        for (const auto& part : gates[i].parts()) {
            const auto numbers = file.tensor(prefix + gate_name(i, part.name)).to_vector<float>();
            if (numbers.size() != part.size)
                throw kvcull::error::format_error("'" + prefix + gate_name(i, part.name) + "' has " +
                                                  std::to_string(numbers.size()) + " numbers, want " +
                                                  std::to_string(part.size));
            std::copy(numbers.begin(), numbers.end(),
                      gates[i].values().begin() + static_cast<std::ptrdiff_t>(part.first));
        }
}
/// Under a name of its own until it is whole.
void replace_file(const std::filesystem::path& file, const kvcull::SafeTensors::Metadata& metadata,
                  const std::vector<kvcull::Tensor>& tensors) {
    const std::filesystem::path fresh = file.string() + ".part";
    kvcull::SafeTensors::write(fresh.string(), metadata, tensors);
    std::filesystem::rename(fresh, file);
}
std::string text_of(const TrainingOptions& o) {
    std::string text;
    for (const double number :
         {static_cast<double>(o.width), o.budget, o.capacity_weight, static_cast<double>(o.length),
          static_cast<double>(o.batch), static_cast<double>(o.steps), static_cast<double>(o.warmup), o.rate,
          o.least_rate, o.weight_decay, o.clip, static_cast<double>(o.seed), o.every_token ? 1.0 : 0.0}) {
        std::array<char, 32> digits{};
        const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), number).ptr;
        if (!text.empty()) text += ' ';
        text.append(digits.data(), end);
    }
    return text;
}

}  // namespace

/// What the forward pass leaves for the backward pass.
struct GateTrainer::Tape {
    struct Layer {
        RowMajorMatrix residual, x, qkv, log_beta, attended, lse, middle, mlp_x, gate_up, product, d_log_beta;
        train::GateTrace<float> gate;
    };
    std::vector<Layer> layers;
    RowMajorMatrix hidden, normed, logits, d_logits;
    std::vector<train::TokenRange> documents;
};

GateTrainer::GateTrainer(const Llama& model, const TrainingOptions& options)
    : model_(model), options_(options), gates_(blank()), mean_(blank()), variance_(blank()) {
    using kvcull::detail::check, kvcull::error::config_error;
    constexpr std::string_view where = "GateTrainer";
    check<config_error>(model.config().vocabulary >= world_vocabulary, where, "vocabulary of the model",
                        model.config().vocabulary,
                        kvcull::detail::text("at least the ", world_vocabulary, " words of the documents"));
    check<config_error>(options.budget > 0, where, "budget", options.budget, "above 0");
    kvcull::SplitMix64 random{options.seed};
    const auto keep = static_cast<float>(std::log(50.0 * static_cast<double>(options.length)));
    for (Gate& gate : gates_) {
        for (const auto& part : gate.parts())
            for (float& x : gate.values().subspan(part.first, part.size))
                x = part.decays ? 0.1F * normal(random) : 0.0F;
        for (float& x : gate.view().bias) x = keep;  // at first every token stays for good
    }
}

std::vector<GateTrainer::Gate> GateTrainer::blank() const {
    const Config& c = model_.config();
    return std::vector<Gate>(c.layers, Gate(c.hidden, options_.width, c.kv_heads));
}

void GateTrainer::forward(std::span<const int> tokens, bool gated, Tape& tape) const {
    const Config& c = model_.config();
    const auto n = static_cast<Eigen::Index>(tokens.size());
    tape.documents = {{0, tokens.size()}};
    tape.layers.resize(c.layers);
    tape.hidden.resize(n, static_cast<Eigen::Index>(c.hidden));
    for (Eigen::Index t = 0; t < n; ++t)
        tape.hidden.row(t) = model_.embedding().row(tokens[static_cast<std::size_t>(t)]);
    for (std::size_t i = 0; i < c.layers; ++i) {
        const Llama::Layer& w = model_.layers()[i];
        Tape::Layer& a = tape.layers[i];
        a.residual = tape.hidden;
        a.x.resizeLike(a.residual);
        train::rms_norm<float>(view(a.residual), span(w.attention_norm), c.rms_norm_eps, view(a.x));
        a.qkv.noalias() = a.x * w.qkv.transpose();
        for (Eigen::Index t = 0; t < n; ++t)
            kvcull::rotate(
                c.rope, t,
                kvcull::MatrixView<float>(a.qkv.row(t).data(), c.q_heads + c.kv_heads, c.head_dim));
        a.log_beta = RowMajorMatrix::Zero(static_cast<Eigen::Index>(c.kv_heads), n);
        if (gated) train::gate_forward<float>(gates_[i].view(), view(a.x), a.gate, view(a.log_beta));
        a.attended.resize(n, static_cast<Eigen::Index>(c.q_heads * c.head_dim));
        a.lse.resize(static_cast<Eigen::Index>(c.q_heads), n);
        attention_of(c, a, tape.documents)
            .forward(heads(view(a.attended), 0, c.q_heads, c.head_dim), view(a.lse));
        a.middle = a.residual;
        a.middle.noalias() += a.attended * w.output.transpose();
        a.mlp_x.resizeLike(a.middle);
        train::rms_norm<float>(view(a.middle), span(w.mlp_norm), c.rms_norm_eps, view(a.mlp_x));
        a.gate_up.noalias() = a.mlp_x * w.gate_up.transpose();
        a.product.resize(n, static_cast<Eigen::Index>(c.intermediate));
        train::swiglu<float>(columns(view(a.gate_up), 0, c.intermediate),
                             columns(view(a.gate_up), c.intermediate, c.intermediate), view(a.product));
        tape.hidden = a.middle;
        tape.hidden.noalias() += a.product * w.down.transpose();
    }
    tape.normed.resizeLike(tape.hidden);
    train::rms_norm<float>(view(tape.hidden), span(model_.norm()), c.rms_norm_eps, view(tape.normed));
    tape.logits.noalias() = tape.normed * model_.head().transpose();
}

void GateTrainer::backward(Tape& tape, std::span<Gate> gradient) const {
    const Config& c = model_.config();
    RowMajorMatrix d_normed = tape.d_logits * model_.head(), d_hidden = zeros(tape.hidden);
    train::rms_norm_backward<float>(view(tape.hidden), span(model_.norm()), c.rms_norm_eps, view(d_normed),
                                    view(d_hidden));
    for (std::size_t i = c.layers; i-- > 0;) {
        const Llama::Layer& w = model_.layers()[i];
        Tape::Layer& a = tape.layers[i];
        const RowMajorMatrix d_product = d_hidden * w.down;
        const auto gate = columns(view(a.gate_up), 0, c.intermediate),
                   up = columns(view(a.gate_up), c.intermediate, c.intermediate);
        train::swiglu_backward<float>(gate, up, view(d_product), gate, up);
        const RowMajorMatrix d_mlp_x = a.gate_up * w.gate_up;
        train::rms_norm_backward<float>(view(a.middle), span(w.mlp_norm), c.rms_norm_eps, view(d_mlp_x),
                                        view(d_hidden));

        const RowMajorMatrix d_attended = d_hidden * w.output;
        RowMajorMatrix d_qkv = zeros(a.qkv);
        const auto part = [&](std::size_t first, std::size_t count) {
            return heads(view(d_qkv), first, count, c.head_dim);
        };
        attention_of(c, a, tape.documents)
            .backward(heads(view(a.attended), 0, c.q_heads, c.head_dim), view(a.lse),
                      heads(view(d_attended), 0, c.q_heads, c.head_dim), part(0, c.q_heads),
                      part(c.q_heads, c.kv_heads), part(c.q_heads + c.kv_heads, c.kv_heads),
                      view(a.d_log_beta));
        for (Eigen::Index t = 0; t < d_qkv.rows(); ++t)
            kvcull::rotate(
                c.rope, -t,
                kvcull::MatrixView<float>(d_qkv.row(t).data(), c.q_heads + c.kv_heads, c.head_dim));
        RowMajorMatrix d_x = d_qkv * w.qkv;
        train::gate_backward<float>(gates_[i].view(), view(a.x), a.gate, view(a.d_log_beta),
                                    gradient[i].view(), view(d_x));
        train::rms_norm_backward<float>(view(a.residual), span(w.attention_norm), c.rms_norm_eps, view(d_x),
                                        view(d_hidden));
    }
}

StepReport GateTrainer::learn(std::span<const int> tokens, std::span<Gate> gradient) const {
    Tape teacher, student;
    forward(tokens, false, teacher);
    forward(tokens, true, student);
    const std::size_t n = tokens.size(), layers = student.layers.size(), kv_heads = model_.config().kv_heads;

    const auto counts = options_.every_token ? std::vector<std::uint8_t>(n, 1) : recalls(tokens);
    std::vector<std::int64_t> target(n, train::BaseLoss::not_counted);
    train::BaseLoss base;
    for (std::size_t t = 0; t < n; ++t) {
        if (counts[t] == 0) continue;
        ++base.distil_rows;
        if (t + 1 == n) continue;
        ++base.predict_rows;
        target[t] = tokens[t + 1];
    }
    student.d_logits.resizeLike(student.logits);
    const auto terms =
        base.block<float>(view(std::as_const(student.logits)), view(std::as_const(teacher.logits)), target,
                          counts, view(student.d_logits));

    std::vector<float> rates, d_rates(layers * kv_heads * n);
    for (const Tape::Layer& layer : student.layers)
        rates.insert(rates.end(), layer.log_beta.data(), layer.log_beta.data() + layer.log_beta.size());
    std::vector<double> sizes(rates.size());
    StepReport report{.kl = terms.kl, .ntp = terms.ntp};
    for (std::size_t stream = 0; stream < layers * kv_heads; ++stream) {
        train::CapacityLoss::soft_sizes<float>(std::span(rates).subspan(stream * n, n), student.documents,
                                               std::span(sizes).subspan(stream * n, n));
        report.soft_size += sizes[stream * n + n - 1] / static_cast<double>(layers * kv_heads);
    }
    report.capacity = train::CapacityLoss{.budget = options_.budget}(
        kvcull::MatrixView<const float>(rates.data(), layers * kv_heads, n), student.documents, sizes,
        kvcull::MatrixView<float>(d_rates.data(), layers * kv_heads, n), options_.capacity_weight);
    if (gradient.empty()) return report;
    for (std::size_t i = 0; i < layers; ++i)
        student.layers[i].d_log_beta =
            Eigen::Map<RowMajorMatrix>(d_rates.data() + i * kv_heads * n, static_cast<Eigen::Index>(kv_heads),
                                       static_cast<Eigen::Index>(n));
    backward(student, gradient);
    return report;
}

StepReport GateTrainer::step(std::size_t threads) {
    std::vector<std::vector<Gate>> gradients(options_.batch, blank());
    std::vector<StepReport> reports(options_.batch);
    parallel_for(threads, options_.batch, [&](std::size_t i) {
        const kvcull::SplitMix64 of_run{options_.seed};
        const std::uint64_t seed =
            kvcull::SplitMix64{kvcull::SplitMix64(of_run)() ^ (done_ * options_.batch + i)}();
        reports[i] = learn(world_document(seed, options_.length), gradients[i]);
    });

    const auto share = static_cast<float>(1.0 / static_cast<double>(options_.batch));
    StepReport report;
    double squares = 0;
    for (std::size_t layer = 0; layer < gates_.size(); ++layer) {
        const auto sum = gradients[0][layer].values();
        for (std::size_t i = 1; i < options_.batch; ++i)
            for (std::size_t j = 0; j < sum.size(); ++j) sum[j] += gradients[i][layer].values()[j];
        for (float& x : sum) x *= share;
        squares += train::squared_norm<float>(sum);
    }
    for (const StepReport& one : reports) {
        report.kl += share * one.kl;
        report.ntp += share * one.ntp;
        report.capacity += share * one.capacity;
        report.soft_size += share * one.soft_size;
    }
    report.norm = std::sqrt(squares);
    report.rate = train::Schedule{options_.rate, options_.least_rate, options_.warmup, options_.steps}(done_);
    const train::AdamW optimiser{.weight_decay = options_.weight_decay};
    const double scale = train::clip_factor(report.norm, options_.clip);
    ++done_;
    for (std::size_t layer = 0; layer < gates_.size(); ++layer)
        for (const auto& part : gates_[layer].parts()) {
            const auto of = [&](Gate& gate) { return gate.values().subspan(part.first, part.size); };
            optimiser.update<float>(of(gates_[layer]), of(gradients[0][layer]), of(mean_[layer]),
                                    of(variance_[layer]), done_, report.rate, part.decays, scale);
        }
    return report;
}

void GateTrainer::write_gates(const std::filesystem::path& file) const {
    std::vector<kvcull::Tensor> tensors;
    list_tensors(gates_, "", tensors);
    replace_file(file, {{"hidden_act", "silu"}, {"retention_gate", "rg"}}, tensors);
}

void GateTrainer::save(const std::filesystem::path& file) const {
    std::vector<kvcull::Tensor> tensors;
    list_tensors(gates_, "", tensors);
    list_tensors(mean_, "mean.", tensors);
    list_tensors(variance_, "variance.", tensors);
    replace_file(file, {{"step", std::to_string(done_)}, {"options", text_of(options_)}}, tensors);
}

void GateTrainer::resume(const std::filesystem::path& path) {
    const auto file = kvcull::SafeTensors::read(path.string());
    const auto at = [&](const char* key) {
        const auto found = file.metadata().find(key);
        return found == file.metadata().end() ? std::string() : found->second;
    };
    if (at("options") != text_of(options_))
        fail(path.string(), "was saved with options " + at("options") + ", want " + text_of(options_));
    std::vector<Gate> gates = gates_, mean = mean_, variance = variance_;
    read_tensors(file, "", gates);
    read_tensors(file, "mean.", mean);
    read_tensors(file, "variance.", variance);
    const std::string step = at("step");
    std::size_t done = 0;
    if (std::from_chars(step.data(), step.data() + step.size(), done).ec != std::errc())
        fail(path.string(), "'step' is '" + step + "', want a number");
    done_ = done;
    gates_ = std::move(gates);
    mean_ = std::move(mean);
    variance_ = std::move(variance);
}

}  // namespace tiny_llama
