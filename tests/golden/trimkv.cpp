// Layouts of method `trimkv`.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "kinds.hpp"
#include "kvcull/attention/rope.hpp"
#include "kvcull/policies.hpp"
#include "kvcull/train/adamw.hpp"
#include "kvcull/train/capacity.hpp"
#include "kvcull/train/frozen.hpp"
#include "kvcull/train/gate.hpp"
#include "kvcull/train/gated_attention.hpp"
#include "kvcull/train/losses.hpp"
#include "streams.hpp"
#include "support/isas.hpp"

namespace kvcull::test::trimkv {
namespace {

using train::CapacityLoss;
using train::GateTensors;
using train::TokenRange;

Tolerance read_tolerance(const GoldenFile& file) {
    Tolerance tolerance;
    if (file.has("rtol")) tolerance.relative = file.real("rtol");
    if (file.has("atol")) tolerance.absolute = file.real("atol");
    return tolerance;
}

template <class T>
MatrixView<const T> matrix(const Array<T>& array) {
    return {array.values.data(), array.dim(0), array.dim(1)};
}
template <class T>
MatrixView<T> matrix(std::vector<T>& values, std::size_t rows, std::size_t cols) {
    values.resize(rows * cols);
    return {values.data(), rows, cols};
}
template <class T>
HeadsView<const T> heads(const Array<T>& array) {
    return head_major(array.values.data(), array.dim(0), array.dim(1), array.dim(2));
}
/// Memory for an array of that shape.
template <class T>
HeadsView<T> heads(std::vector<T>& values, const Array<T>& like) {
    values.resize(like.values.size());
    return head_major(values.data(), like.dim(0), like.dim(1), like.dim(2));
}

/// What the training arithmetic runs in: in double it must agree with the file to its tolerance; in float,
/// sums over many terms may differ by a millionth of the largest number.
template <class T>
struct Numbers {
    GoldenFile& file;

    explicit Numbers(GoldenFile& of) : file(of) { file.begin_run(sizeof(T) == 4 ? "float" : "double"); }
    [[nodiscard]] Array<T> read(const std::string& name, std::size_t axes) const {
        const auto array = file.array<float>(name, axes);
        return {array.shape, {array.values.begin(), array.values.end()}};
    }
    void expect(const std::string& name, const std::vector<std::size_t>& shape,
                std::span<const T> values) const {
        Tolerance tolerance = read_tolerance(file);
        if (sizeof(T) == 4) tolerance.absolute = std::max(tolerance.absolute, 1e-6 * file.magnitude(name));
        file.expect(name, shape, std::vector<float>(values.begin(), values.end()), tolerance);
    }
    /// The gate tensors called `prefix` + name.
    [[nodiscard]] GateTensors<T> read_gate(const std::string& prefix) const {
        const auto w1 = read(prefix + "w1", 2), w_out = read(prefix + "w_out", 2);
        const bool deep = file.contains(prefix + "w2");
        if (file.has("variant")) file.require("variant", deep ? "rg10" : "rg");
        if (file.has("activation")) file.require("activation", "silu");
        GateTensors<T> gate(w1.dim(1), w1.dim(0), w_out.dim(0), deep);
        for (const auto& part : gate.parts()) {
            const std::string name = prefix + std::string(part.name);
            const auto array = read(name, part.decays ? 2 : 1);
            detail::check_size("golden", "'" + name + "'.size()", array.values.size(), part.size);
            std::copy(array.values.begin(), array.values.end(), gate.values().data() + part.first);
        }
        return gate;
    }
    /// Compares all tensors of a gate with outputs called `prefix` + name.
    void expect_gate(const std::string& prefix, const GateTensors<T>& gate) const {
        for (const auto& part : gate.parts()) {
            const std::size_t cols = part.name == "w1" ? gate.view().input() : gate.view().width();
            std::vector<std::size_t> shape{part.size};
            if (part.decays) shape = {part.size / cols, cols};
            expect(prefix + std::string(part.name), shape, gate.values().subspan(part.first, part.size));
        }
    }
};
/// Memory for the gradients of a gate.
template <class T>
GateTensors<T> zeros_like(const GateTensors<T>& gate) {
    const auto view = gate.view();
    return {view.input(), view.width(), view.kv_heads(), view.deep()};
}

std::vector<TokenRange> read_documents(const GoldenFile& file, std::size_t tokens) {
    if (!file.contains("in.doc")) return {{0, tokens}};
    return train::documents_of(file.array<std::int64_t>("in.doc", 1).values);
}

template <class T>
std::vector<double> soft_sizes(MatrixView<const T> log_beta, std::span<const TokenRange> documents) {
    std::vector<double> sizes(log_beta.rows * log_beta.cols);
    for (std::size_t stream = 0; stream < log_beta.rows; ++stream)
        CapacityLoss::soft_sizes<T>(log_beta[stream], documents,
                                    std::span(sizes).subspan(stream * log_beta.cols, log_beta.cols));
    return sizes;
}

TrimKV read_policy(const GoldenFile& file) {
    return {.buffer = file.count("buffer", 1),
            .newest_age = file.count("newest_age", 2),
            .window = file.count("window", 0),
            .lookahead = file.count("lookahead", 1)};
}

/// One forward pass over a model without keys and values worth the name.
template <class Cache>
void pass(Cache& cache, const Stream& stream, const Array<float>& log_beta, std::size_t first,
          std::size_t count) {
    const CacheShape& shape = stream.shape;
    std::vector<float> out(shape.q_heads * count);
    for (std::size_t layer = 0; layer < shape.layers; ++layer) {
        const float* const rate = log_beta.values.data() + layer * shape.kv_heads * stream.tokens + first;
        cache.append(layer, stream.keys(layer, first, count), stream.values(layer, first, count),
                     {.log_beta = {rate, shape.kv_heads, count, stream.tokens}});
        cache.attend(layer, stream.queries(layer, first, count),
                     head_major(out.data(), shape.q_heads, count, 1));
    }
    cache.end_step();
}
/// The passes of a prompt (`chunk` 0: one), then one token each. Calls `after(seen)`.
template <class Cache, class After>
void run_passes(const GoldenFile& file, Cache& cache, const Stream& stream, const Array<float>& log_beta,
                const After& after) {
    const std::size_t prompt = std::min(file.count("prompt"), stream.tokens), chunk = file.count("chunk", 0);
    std::size_t seen = 0;
    const auto one = [&](std::size_t count) {
        pass(cache, stream, log_beta, seen, count);
        after(seen += count);
    };
    cache.begin_prompt(prompt);
    while (seen < prompt) one(std::min(chunk == 0 ? prompt : chunk, prompt - seen));
    cache.end_prompt();
    while (seen < stream.tokens) one(1);
}
Stream blank_stream(std::size_t layers, std::size_t kv_heads, std::size_t tokens) {
    const std::vector<float> zeros(layers * kv_heads * tokens);
    return {{.layers = layers, .q_heads = kv_heads, .kv_heads = kv_heads, .head_dim = 1},
            tokens,
            zeros,
            zeros,
            zeros};
}

}  // namespace

namespace {
template <class T>
void check_gate_in(GoldenFile& file) {
    const Numbers<T> numbers(file);
    const auto x = numbers.read("in.x", 2), d = numbers.read("in.d_log_beta", 2);
    const GateTensors<T> gate = numbers.read_gate("in.");
    const std::size_t tokens = x.dim(0), input = x.dim(1), kv_heads = gate.view().kv_heads();
    std::vector<T> log_beta, d_x;
    train::GateTrace<T> trace;
    train::gate_forward<T>(gate.view(), matrix(x), trace, matrix(log_beta, kv_heads, tokens));
    numbers.expect("out.log_beta", {kv_heads, tokens}, log_beta);
    GateTensors<T> gradient = zeros_like(gate);
    train::gate_backward<T>(gate.view(), matrix(x), trace, matrix(d), gradient.view(),
                            matrix(d_x, tokens, input));
    numbers.expect("out.d_x", {tokens, input}, d_x);
    numbers.expect_gate("out.d_", gradient);
}
}  // namespace

void check_gate(GoldenFile& file) {
    check_gate_in<double>(file);
    check_gate_in<float>(file);
    const Numbers<float> numbers(file);
    const auto x = numbers.read("in.x", 2);
    const GateTensors<float> gate = numbers.read_gate("in.");
    const std::size_t tokens = x.dim(0), kv_heads = gate.view().kv_heads();
    for (const simd::Isa isa : available_isas()) {
        file.begin_run("inference on " + std::string(simd::name_of(isa)));
        Scratch<float> workspace;
        std::vector<float> log_beta;
        Gates({gate.view()})
            .log_beta(simd::kernels_for(isa), 0, matrix(x), matrix(log_beta, kv_heads, tokens), workspace);
        numbers.expect("out.log_beta", {kv_heads, tokens}, log_beta);
        for (float& l : log_beta) l = std::exp(l);
        numbers.expect("out.beta", {kv_heads, tokens}, log_beta);
    }
}

void check_checkpoint(GoldenFile& file) {
    const auto x = file.array<float>("in.x", 2);
    const Gates gates = Gates::load(file.file());
    file.require("variant", gates[0].deep() ? "rg10" : "rg");
    detail::check_size("golden", "layers", gates.layers(), file.count("layers"));
    detail::check_size("golden", "hidden_size", gates.input(), file.count("hidden_size"));
    const std::size_t kv_heads = gates.kv_heads(), tokens = x.dim(0);
    for (const simd::Isa isa : available_isas()) {
        file.begin_run(std::string(simd::name_of(isa)));
        Scratch<float> workspace;
        std::vector<float> all(gates.layers() * kv_heads * tokens);
        for (std::size_t layer = 0; layer < gates.layers(); ++layer)
            gates.log_beta(simd::kernels_for(isa), layer, matrix(x),
                           {all.data() + layer * kv_heads * tokens, kv_heads, tokens}, workspace);
        file.expect("out.log_beta", {gates.layers(), kv_heads, tokens}, all, read_tolerance(file));
    }
}

void check_decode(GoldenFile& file) {
    const auto log_beta = file.array<float>("in.log_beta", 2);
    const std::size_t kv_heads = log_beta.dim(0), budget = file.count("M");
    const Stream stream = blank_stream(1, kv_heads, log_beta.dim(1));
    for_each_driver(stream.shape, read_policy(file), {.tokens = budget},
                    [&](auto& cache, const std::string& driver) {
                        file.begin_run(driver);
                        std::vector<std::int64_t> seen_at, keep, length;
                        std::vector<std::vector<std::int64_t>> gone;
                        std::vector<std::vector<position_t>> held(kv_heads);
                        std::size_t rows = 0, last = 0, most = 0;
                        run_passes(file, cache, stream, log_beta, [&](std::size_t seen) {
                            rows += seen - last;
                            const bool cut = cache.rows(0, 0) < rows;
                            rows = cache.rows(0, 0);
                            length.push_back(static_cast<std::int64_t>(rows));
                            if (cut) seen_at.push_back(static_cast<std::int64_t>(seen));
                            for (std::size_t h = 0; h < kv_heads; ++h) {
                                std::vector<position_t> before = held[h];
                                for (std::size_t t = last; t < seen; ++t)
                                    before.push_back(static_cast<position_t>(t));
                                held[h] = positions_of(cache.view(0, h));
                                if (!cut) continue;
                                append(keep, held[h]);
                                gone.emplace_back();
                                std::set_difference(before.begin(), before.end(), held[h].begin(),
                                                    held[h].end(), std::back_inserter(gone.back()));
                                most = std::max(most, gone.back().size());
                            }
                            last = seen;
                        });
                        // Lists may be padded beyond the longest of them.
                        most = std::max(most, file.array<std::int64_t>("out.event_evicted", 3).dim(2));
                        std::vector<std::int64_t> evicted;
                        for (std::vector<std::int64_t>& one : gone) {
                            one.resize(most, -1);
                            append(evicted, one);
                        }
                        file.expect("out.event_seen", {seen_at.size()}, seen_at);
                        file.expect("out.event_evicted", {seen_at.size(), kv_heads, most}, evicted);
                        file.expect("out.event_keep", {seen_at.size(), kv_heads, budget}, keep);
                        file.expect("out.length", {length.size()}, length);
                    });
}

void check_global(GoldenFile& file) {
    const auto log_beta = file.array<float>("in.log_beta", 3);
    const std::size_t layers = log_beta.dim(0), kv_heads = log_beta.dim(1), tokens = log_beta.dim(2);
    const Stream stream = blank_stream(layers, kv_heads, tokens);
    TrimKV policy = read_policy(file);
    policy.mode = TrimKV::Mode::global;
    policy.floor = file.count("floor", 0);
    for_each_driver(stream.shape, policy, {.tokens = file.count("M")},
                    [&](auto& cache, const std::string& driver) {
                        file.begin_run(driver);
                        std::vector<std::int64_t> seen_at, length;
                        std::vector<std::uint8_t> mask;
                        std::size_t total = 0, last = 0, passes = 0;
                        run_passes(file, cache, stream, log_beta, [&](std::size_t seen) {
                            std::vector<std::uint8_t> held(layers * kv_heads * tokens);
                            std::size_t rows = 0;
                            for (std::size_t i = 0; i < stream.shape.heads(); ++i) {
                                const HeadView head = cache.view(i / kv_heads, i % kv_heads);
                                rows += head.rows();
                                length.push_back(static_cast<std::int64_t>(head.rows()));
                                for (const position_t position : positions_of(head))
                                    held[i * tokens + static_cast<std::size_t>(position)] = 1;
                            }
                            ++passes;
                            total += stream.shape.heads() * (seen - last);
                            last = seen;
                            if (rows < total) {
                                seen_at.push_back(static_cast<std::int64_t>(seen));
                                append(mask, held);
                            }
                            total = rows;
                        });
                        file.expect("out.event_seen", {seen_at.size()}, seen_at);
                        file.expect_exactly<std::uint8_t>("out.event_mask",
                                                          {seen_at.size(), layers, kv_heads, tokens}, mask);
                        file.expect("out.length", {passes, layers, kv_heads}, length);
                    });
}

namespace {
template <class T>
train::GatedAttention<T> attention_of(HeadsView<const T> q, HeadsView<const T> k, HeadsView<const T> v,
                                      MatrixView<const T> log_beta, std::span<const TokenRange> documents) {
    return {q, k, v, log_beta, documents, T{1} / std::sqrt(static_cast<T>(q.dim))};
}
template <class T>
void check_attention_in(GoldenFile& file) {
    const Numbers<T> numbers(file);
    const auto q = numbers.read("in.q", 3), k = numbers.read("in.k", 3), v = numbers.read("in.v", 3),
               log_beta = numbers.read("in.log_beta", 2), d_o = numbers.read("in.d_o", 3);
    const std::size_t tokens = q.dim(1);
    const std::vector<TokenRange> documents = read_documents(file, tokens);
    const auto attention = attention_of<T>(heads(q), heads(k), heads(v), matrix(log_beta), documents);
    std::vector<T> o, lse, d_q, d_k, d_v, d_log_beta;
    attention.forward(heads(o, d_o), matrix(lse, q.dim(0), tokens));
    attention.backward(heads(o, d_o), matrix(lse, q.dim(0), tokens), heads(d_o), heads(d_q, q), heads(d_k, k),
                       heads(d_v, v), matrix(d_log_beta, k.dim(0), tokens));
    numbers.expect("out.o", d_o.shape, o);
    numbers.expect("out.lse", {q.dim(0), tokens}, lse);
    numbers.expect("out.d_q", q.shape, d_q);
    numbers.expect("out.d_k", k.shape, d_k);
    numbers.expect("out.d_v", v.shape, d_v);
    numbers.expect("out.d_log_beta", log_beta.shape, d_log_beta);
}
}  // namespace

void check_attention(GoldenFile& file) {
    check_attention_in<double>(file);
    check_attention_in<float>(file);
}

void check_capacity(GoldenFile& file) {
    const auto log_beta = file.array<float>("in.log_beta", 3);
    const std::size_t streams = log_beta.dim(0) * log_beta.dim(1), tokens = log_beta.dim(2);
    const MatrixView<const float> rates(log_beta.values.data(), streams, tokens);
    const std::vector<TokenRange> documents = read_documents(file, tokens);
    const std::vector<double> sizes = soft_sizes(rates, documents);
    const Tolerance tolerance = read_tolerance(file);
    file.expect("out.sum", log_beta.shape, std::vector<float>(sizes.begin(), sizes.end()), tolerance);
    for (const auto mode :
         {CapacityLoss::Mode::active, CapacityLoss::Mode::paper, CapacityLoss::Mode::global}) {
        const std::string name(names_of(mode)[static_cast<std::size_t>(mode)]);
        std::vector<float> gradient(streams * tokens);
        const double loss =
            CapacityLoss{mode, file.real("M")}(rates, documents, sizes, matrix(gradient, streams, tokens));
        file.expect("out.loss_" + name, {1}, std::vector{static_cast<float>(loss)}, tolerance);
        file.expect("out.d_log_beta_" + name, log_beta.shape, gradient, tolerance);
    }
    if (!file.contains("out.position")) return;
    std::vector<std::int64_t> position(tokens);
    for (const TokenRange& document : documents)
        std::iota(position.begin() + static_cast<std::ptrdiff_t>(document.begin),
                  position.begin() + static_cast<std::ptrdiff_t>(document.end), std::int64_t{0});
    file.expect("out.position", {tokens}, position);
}

void check_losses(GoldenFile& file) {
    const auto student = file.array<float>("in.student", 2), teacher = file.array<float>("in.teacher", 2);
    const auto target = file.array<std::int64_t>("in.target", 1).values;
    const auto counts = file.array<std::uint8_t>("in.kl_mask", 1).values;
    const std::size_t rows = student.dim(0), vocabulary = student.dim(1);
    const Tolerance tolerance = read_tolerance(file);
    train::BaseLoss loss;
    for (const std::uint8_t one : counts) loss.distil_rows += one != 0 ? 1 : 0;
    for (const std::int64_t one : target) loss.predict_rows += one != train::BaseLoss::not_counted ? 1 : 0;
    for (const std::size_t block : {std::max<std::size_t>(rows, 1), std::size_t{5}})
        for (const bool mean : {true, false}) {
            file.begin_run("blocks of " + std::to_string(block));
            loss.mean = mean;
            train::BaseLoss::Terms terms;
            std::vector<float> gradient(rows * vocabulary);
            for (std::size_t first = 0; first < rows; first += block) {
                const std::size_t count = std::min(block, rows - first);
                terms += loss.block<float>({matrix(student)[first].data(), count, vocabulary},
                                           {matrix(teacher)[first].data(), count, vocabulary},
                                           std::span(target).subspan(first, count),
                                           std::span(counts).subspan(first, count),
                                           {gradient.data() + first * vocabulary, count, vocabulary});
            }
            const std::string how = mean ? "mean" : "sum";
            const auto scalar = [](double x) { return std::vector{static_cast<float>(x)}; };
            file.expect("out.kl", {1}, scalar(terms.kl), tolerance);
            file.expect("out.ntp", {1}, scalar(terms.ntp), tolerance);
            file.expect("out.base_" + how, {1}, scalar(loss.total(terms)), tolerance);
            file.expect("out.d_student_" + how, {rows, vocabulary}, gradient, tolerance);
        }
}

namespace {
/// The rows of head h of token t turned to that token's position, or back.
template <class T>
void rotate_all(const Rope& turn, std::vector<T>& rows, std::size_t count, std::size_t dim,
                double direction) {
    const std::size_t tokens = rows.size() / (count * dim), half = dim / 2;
    for (std::size_t t = 0; t < tokens; ++t)
        for (std::size_t h = 0; h < count; ++h)
            for (std::size_t a = 0; a < half; ++a) {
                const double angle = direction * static_cast<double>(t) * turn.frequencies[a];
                T &first = rows[(t * count + h) * dim + a], &second = rows[(t * count + h) * dim + a + half];
                const auto x = static_cast<double>(first), y = static_cast<double>(second);
                first = static_cast<T>(x * std::cos(angle) - y * std::sin(angle));
                second = static_cast<T>(y * std::cos(angle) + x * std::sin(angle));
            }
}
template <class T>
void check_block_in(GoldenFile& file) {
    const Numbers<T> numbers(file);
    const auto residual = numbers.read("in.residual", 2), d_y = numbers.read("in.d_y", 2),
               wq = numbers.read("in.wq", 2), wk = numbers.read("in.wk", 2), wv = numbers.read("in.wv", 2),
               wo = numbers.read("in.wo", 2);
    const auto norm = numbers.read("in.norm", 1).values;
    const GateTensors<T> gate = numbers.read_gate("in.gate.");
    const std::size_t tokens = residual.dim(0), input = residual.dim(1), dim = file.count("head_dim"),
                      q_heads = file.count("Hq"), kv_heads = file.count("Hkv");
    const double eps = file.real("norm_eps");
    const Rope turn = rope(dim, file.real("rope_theta"));
    const std::vector<TokenRange> documents{{0, tokens}};
    const auto by_token = [&](std::vector<T>& rows, std::size_t count) {
        rows.resize(tokens * count * dim);
        return token_major(rows.data(), count, tokens, dim);
    };

    std::vector<T> x, q, k, v, log_beta, o, lse, y = residual.values;
    train::rms_norm<T>(matrix(residual), norm, eps, matrix(x, tokens, input));
    const auto project = [&](const Array<T>& weight, std::vector<T>& out) {
        train::product_transposed<T>(matrix(x, tokens, input), matrix(weight),
                                     matrix(out, tokens, weight.dim(0)));
    };
    project(wq, q);
    project(wk, k);
    project(wv, v);
    rotate_all(turn, q, q_heads, dim, 1);
    rotate_all(turn, k, kv_heads, dim, 1);
    train::GateTrace<T> trace;
    train::gate_forward<T>(gate.view(), matrix(x, tokens, input), trace, matrix(log_beta, kv_heads, tokens));
    const auto attention = attention_of<T>(by_token(q, q_heads), by_token(k, kv_heads), by_token(v, kv_heads),
                                           MatrixView<const T>(log_beta.data(), kv_heads, tokens), documents);
    attention.forward(by_token(o, q_heads), matrix(lse, q_heads, tokens));
    std::vector<T> mixed;
    train::product_transposed<T>(matrix(o, tokens, q_heads * dim), matrix(wo), matrix(mixed, tokens, input));
    for (std::size_t i = 0; i < y.size(); ++i) y[i] += mixed[i];

    std::vector<T> d_o, d_q, d_k, d_v, d_log_beta, d_x, d_residual = d_y.values;
    train::add_product<T>(matrix(d_y), matrix(wo), matrix(d_o, tokens, q_heads * dim));
    attention.backward(by_token(o, q_heads), matrix(lse, q_heads, tokens), by_token(d_o, q_heads),
                       by_token(d_q, q_heads), by_token(d_k, kv_heads), by_token(d_v, kv_heads),
                       matrix(d_log_beta, kv_heads, tokens));
    numbers.expect("out.y", {tokens, input}, y);
    numbers.expect("out.log_beta", {kv_heads, tokens}, log_beta);
    numbers.expect("out.d_log_beta_attention", {kv_heads, tokens}, d_log_beta);
    const MatrixView<const T> rates(log_beta.data(), kv_heads, tokens);
    const auto capacity = static_cast<T>(CapacityLoss{CapacityLoss::Mode::active, file.real("M")}(
        rates, documents, soft_sizes(rates, documents), matrix(d_log_beta, kv_heads, tokens),
        file.real("lam")));
    numbers.expect("out.capacity", {1}, {&capacity, 1});
    rotate_all(turn, d_q, q_heads, dim, -1);
    rotate_all(turn, d_k, kv_heads, dim, -1);
    GateTensors<T> gradient = zeros_like(gate);
    train::gate_backward<T>(gate.view(), matrix(x, tokens, input), trace,
                            matrix(d_log_beta, kv_heads, tokens), gradient.view(),
                            matrix(d_x, tokens, input));
    const auto back = [&](std::vector<T>& d, const Array<T>& weight) {
        train::add_product<T>(matrix(d, tokens, weight.dim(0)), matrix(weight), matrix(d_x, tokens, input));
    };
    back(d_q, wq);
    back(d_k, wk);
    back(d_v, wv);
    train::rms_norm_backward<T>(matrix(residual), norm, eps, matrix(d_x, tokens, input),
                                matrix(d_residual, tokens, input));
    numbers.expect("out.d_residual", {tokens, input}, d_residual);
    numbers.expect_gate("out.gate.d_", gradient);
}

template <class T>
void check_train_in(GoldenFile& file) {
    const Numbers<T> numbers(file);
    const auto x = numbers.read("in.x", 2), q = numbers.read("in.q", 3), k = numbers.read("in.k", 3),
               v = numbers.read("in.v", 3), d_o = numbers.read("in.d_o", 3);
    GateTensors<T> gate = numbers.read_gate("in.");
    const std::size_t tokens = x.dim(0), kv_heads = k.dim(0), steps = file.count("steps");
    const std::vector<TokenRange> documents{{0, tokens}};
    const CapacityLoss capacity{CapacityLoss::Mode::active, file.real("M")};
    const train::Schedule schedule{file.real("lr"), file.real("min_lr"), file.count("warmup"), steps};
    const train::AdamW optimiser{file.real("beta1"), file.real("beta2"), file.real("eps"),
                                 file.real("weight_decay")};
    GateTensors<T> mean = zeros_like(gate), variance = zeros_like(gate);
    std::vector<T> rows;
    for (std::size_t step = 0; step < steps; ++step) {
        std::vector<T> log_beta, o, lse, d_q, d_k, d_v, d_log_beta;
        train::GateTrace<T> trace;
        train::gate_forward<T>(gate.view(), matrix(x), trace, matrix(log_beta, kv_heads, tokens));
        const MatrixView<const T> rates(log_beta.data(), kv_heads, tokens);
        const auto attention = attention_of<T>(heads(q), heads(k), heads(v), rates, documents);
        attention.forward(heads(o, d_o), matrix(lse, q.dim(0), tokens));
        attention.backward(heads(o, d_o), matrix(lse, q.dim(0), tokens), heads(d_o), heads(d_q, q),
                           heads(d_k, k), heads(d_v, v), matrix(d_log_beta, kv_heads, tokens));
        const double excess = capacity(rates, documents, soft_sizes(rates, documents),
                                       matrix(d_log_beta, kv_heads, tokens), file.real("lam"));
        GateTensors<T> gradient = zeros_like(gate);
        train::gate_backward<T>(gate.view(), matrix(x), trace, matrix(d_log_beta, kv_heads, tokens),
                                gradient.view(), {});
        const double norm = std::sqrt(train::squared_norm<T>(gradient.values()));
        const double dot = std::inner_product(o.begin(), o.end(), d_o.values.begin(), 0.0);
        for (const double number : {dot, excess, norm, schedule(step)})
            rows.push_back(static_cast<T>(number));
        for (const auto& part : gate.parts()) {
            const auto of = [&](GateTensors<T>& tensors) {
                return tensors.values().subspan(part.first, part.size);
            };
            optimiser.update<T>(of(gate), of(gradient), of(mean), of(variance), step + 1, schedule(step),
                                part.decays, train::clip_factor(norm, file.real("clip")));
        }
    }
    numbers.expect("out.trace", {steps, 4}, rows);
    numbers.expect_gate("out.", gate);
}
}  // namespace

void check_block(GoldenFile& file) {
    check_block_in<double>(file);
    check_block_in<float>(file);
}

void check_train(GoldenFile& file) {
    check_train_in<double>(file);
    check_train_in<float>(file);
}

}  // namespace kvcull::test::trimkv
