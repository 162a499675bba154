/// gate/forward/hidden:2560/width:512/layer:<dtype>: a gate of Qwen3-4B for one token, beside the products of
/// its layer with the same vector: q, k, v and output projections (32x8 heads of 128) and the SwiGLU block
/// (9728 wide), each matrix read from memory once, by the library's own kernels. Layer and gate take turns,
/// so that neither finds its weights in a cache. Weights of the gate are f32, as `Gates` holds them.
/// `of_layer` is the gate's share of the layer's time, attention not counted.

#include <array>
#include <string>
#include <vector>

#include "groups.hpp"
#include "kvcull/score/gates.hpp"
#include "support/cases.hpp"
#include "support/rows.hpp"

namespace kvcull::bench {
namespace {

constexpr std::size_t hidden = 2560, width = 512, kv_heads = 8, heads = 32, head_dim = 128,
                      intermediate = 9728;
/// [out, in] of the layer's matrices: q, k and v, output, gate and up, down.
struct Matrix {
    std::size_t rows, cols;
};
constexpr std::array<Matrix, 4> matrices{{{(heads + 2 * kv_heads) * head_dim, hidden},
                                          {hidden, heads* head_dim},
                                          {2 * intermediate, hidden},
                                          {hidden, intermediate}}};

template <class T>
void run(benchmark::State& state, DType dtype, const simd::Dots<T>& dots) {
    std::size_t rows = 0;  // of `hidden` numbers
    for (const Matrix& matrix : matrices) rows += matrix.rows * matrix.cols / hidden;
    const Rows weights(dtype, 1, (rows + 1) / 2, hidden);
    const std::vector<float> x = random_row(intermediate, 1);
    std::vector<float> out(2 * intermediate);

    const std::vector<float> w1 = random_row(width * hidden, 2), w_out = random_row(kv_heads * width, 3),
                             b1(width), bias(kv_heads, 8.0F);
    const Gates gates(std::vector<Gates::View>{
        {{w1.data(), width, hidden}, b1, {}, {}, {w_out.data(), kv_heads, width}, bias}});
    std::vector<float> log_beta(kv_heads);
    Scratch<float> workspace;
    const simd::Kernels& kernels = simd::kernels();

    Series gate_times, layer_times;
    Ratios share;
    for (auto _ : state) {
        const Stopwatch layer;
        const T* next = reinterpret_cast<const T*>(weights.memory().data());
        for (const Matrix& matrix : matrices) {
            dots(x.data(), matrix.cols, 1, next, matrix.cols, matrix.rows, matrix.cols, 1.0F, out.data(),
                 matrix.rows);
            next += matrix.rows * matrix.cols;
        }
        benchmark::DoNotOptimize(out.data());
        const Time layer_time = layer.elapsed();
        const Stopwatch gate;
        gates.log_beta(kernels, 0, {x.data(), 1, hidden}, {log_beta.data(), kv_heads, 1}, workspace);
        benchmark::DoNotOptimize(log_beta.data());
        const Time gate_time = gate.elapsed();
        gate_times.add(gate_time, state);
        layer_times.add(layer_time);
        share.add(gate_time.busy, layer_time.busy);
    }
    state.counters["of_layer"] = share.middle();
    state.counters["us"] = gate_times.best() * 1e6;
    state.counters["layer_us"] = layer_times.best() * 1e6;
    state.counters["spread"] = gate_times.spread();
}

}  // namespace

void add_gates() {
    const std::string name =
        "gate/forward/hidden:" + std::to_string(hidden) + "/width:" + std::to_string(width) + "/layer:";
    add_case(name + "bf16", 25,
             [](benchmark::State& state) { run<bfloat16>(state, DType::bf16, simd::kernels().dots_bf16); });
    add_case(name + "f32", 25,
             [](benchmark::State& state) { run<float>(state, DType::f32, simd::kernels().dots_f32); });
}

}  // namespace kvcull::bench
