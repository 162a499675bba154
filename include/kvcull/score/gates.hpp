#pragma once
/// The retention gates of a model, a gate per layer: views of the caller's weights, or a file with the tensor
/// names of the released checkpoints.

#include <charconv>
#include <cstddef>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../base/safetensors.hpp"
#include "gate.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Copies share the weights. Empty: there are no gates, and log beta comes from elsewhere.
class Gates {
  public:
    using View = RetentionGate<const float>;

    Gates() = default;
    /// Weights that outlive all copies of this object. @throws shape_error if they do not fit one another.
    explicit Gates(std::vector<View> layers) : Gates({}, std::move(layers), "Gates") {}

    /// Tensors `model.layers.<i>.self_attn.retention_gate.<name>` for layers 0, 1, .. in BF16, F16 or F32,
    /// `[out, in]`; the variant is rg10 if there is a `linear3.weight`. Other tensors are none of its
    /// business.
    ///     rg    linear1.weight [F, D]  linear1.bias [F]  linear2.weight [kv_heads, F]  bias [kv_heads]
    ///     rg10  linear1.weight, linear1.bias, linear2.weight [F, F]  linear2.bias [F]
    ///           linear3.weight [kv_heads, F]  bias [kv_heads]
    /// @throws format_error that names a missing or extra gate tensor, or one of another shape or type, or
    /// with a number that is not finite; or metadata `hidden_act` other than silu.
    [[nodiscard]] static Gates load(const SafeTensors& file, std::string_view source = "Gates::load") {
        return Loader{file, source, {}, {}, {}}.load();
    }
    [[nodiscard]] static Gates read(const std::string& path) { return load(SafeTensors::read(path), path); }
    /// A path, for parameters by name.
    [[nodiscard]] static Gates from_text(std::string_view path) { return read(std::string(path)); }

    [[nodiscard]] bool empty() const noexcept { return layers() == 0; }
    [[nodiscard]] std::size_t layers() const noexcept { return data_ ? data_->layers.size() : 0; }
    [[nodiscard]] const View& operator[](std::size_t layer) const { return data_->layers[layer]; }
    /// Of every layer. Not to be asked of empty gates.
    [[nodiscard]] std::size_t kv_heads() const noexcept { return data_->layers[0].kv_heads(); }
    [[nodiscard]] std::size_t input() const noexcept { return data_->layers[0].input(); }
    /// Floats of scratch that `log_beta` takes.
    [[nodiscard]] std::size_t scratch() const noexcept {
        std::size_t most = 0;
        for (std::size_t i = 0; i < layers(); ++i)
            most = std::max(most, gate_scratch(data_->layers[i].width(), data_->layers[i].kv_heads()));
        return most;
    }

    /// @param x [c, D], what enters the layer's q, k, v projections @param out [kv_heads, c]
    /// @throws shape_error, also for a number in `x` that is not finite and for a gate that overflows; it
    /// names layer, token and head.
    void log_beta(const simd::Kernels& kernels, std::size_t layer, MatrixView<const float> x,
                  MatrixView<float> out, Scratch<float>& workspace) const {
        using error::shape_error, detail::text;
        constexpr std::string_view where = "Gates::log_beta", finite = "a finite number";
        detail::check<shape_error>(layer < layers(), where, "layer", layer, text("below ", layers()));
        detail::check_size(where, text("attention_input.cols of layer ", layer), x.cols, input());
        for (std::size_t i = 0; i < x.rows; ++i)
            for (const float& number : x[i])
                detail::check<shape_error>(is_finite(number), where,
                                           text("attention_input of layer ", layer, ", token ", i), number,
                                           finite);
        gate_logits(kernels, data_->layers[layer], x, out, workspace);
        for (std::size_t h = 0; h < out.rows; ++h)
            for (std::size_t i = 0; i < out.cols; ++i) {
                float& z = out[h][i];
                detail::check<shape_error>(is_finite(z), where,
                                           text("gate of layer ", layer, ", head ", h, ", token ", i), z,
                                           finite);
                z = log_sigmoid(z);
            }
    }

  private:
    struct Data {
        std::vector<std::vector<float>> owned;
        std::vector<View> layers;
    };

    Gates(std::vector<std::vector<float>> owned, std::vector<View> layers, std::string_view where) {
        for (std::size_t i = 0; i < layers.size(); ++i) {
            detail::check_gate(where, layers[i]);
            detail::check_size(where, detail::text("w1.cols of layer ", i), layers[i].input(),
                               layers[0].input());
            detail::check_size(where, detail::text("kv_heads of layer ", i), layers[i].kv_heads(),
                               layers[0].kv_heads());
        }
        data_ = std::make_shared<const Data>(Data{std::move(owned), std::move(layers)});
    }

    struct Loader {
        const SafeTensors& file;
        std::string_view source;
        std::vector<std::vector<float>> owned;
        std::vector<View> layers;
        std::set<std::string, std::less<>> read;

        static std::string prefix(std::size_t layer) {
            return "model.layers." + std::to_string(layer) + ".self_attn.retention_gate.";
        }
        static bool is_gate(std::string_view name) {
            return name.starts_with("model.layers.") && name.find(".self_attn.retention_gate.") != name.npos;
        }
        [[noreturn]] void fail(const std::string& what) const {
            throw error::format_error(std::string(source) + ": " + what);
        }

        Gates load() {
            const auto activation = file.metadata().find("hidden_act");
            if (activation != file.metadata().end() && activation->second != "silu")
                fail("hidden_act is '" + activation->second + "', want 'silu'");
            std::size_t count = 0, last = 0;
            bool deep = false;
            for (const Tensor& tensor : file.tensors()) {
                if (!is_gate(tensor.name)) continue;
                const char* const begin = tensor.name.data() + std::string_view("model.layers.").size();
                std::size_t layer = 0;
                std::from_chars(begin, tensor.name.data() + tensor.name.size(), layer);
                last = std::max(last, layer);
                deep = deep || tensor.name.ends_with("linear3.weight");
                ++count;
            }
            if (count == 0) fail("no tensor '" + prefix(0) + "linear1.weight': there are no gates");
            for (std::size_t layer = 0; layer <= last; ++layer) load_layer(layer, deep);
            for (const Tensor& tensor : file.tensors())
                if (is_gate(tensor.name) && !read.contains(tensor.name))
                    fail("tensor '" + tensor.name + "' belongs to no gate of variant " +
                         (deep ? "rg10" : "rg"));
            return {std::move(owned), std::move(layers), source};
        }
        void load_layer(std::size_t layer, bool deep) {
            const std::string name = prefix(layer);
            View gate;
            // The first layer says how wide all of them are.
            std::size_t width = 0, input = 0, heads = 0;
            if (layer == 0) {
                const Tensor &first = file.tensor(name + "linear1.weight"),
                             &bias = file.tensor(name + "bias");
                width = first.shape.empty() ? 0 : first.shape[0];
                input = first.shape.size() < 2 ? 0 : first.shape[1];
                heads = bias.shape.empty() ? 0 : bias.shape[0];
            } else {
                width = layers[0].width();
                input = layers[0].input();
                heads = layers[0].kv_heads();
            }
            gate.w1 = {numbers(name + "linear1.weight", {width, input}), width, input};
            gate.b1 = {numbers(name + "linear1.bias", {width}), width};
            if (deep) {
                gate.w2 = {numbers(name + "linear2.weight", {width, width}), width, width};
                gate.b2 = {numbers(name + "linear2.bias", {width}), width};
            }
            gate.w_out = {numbers(name + (deep ? "linear3.weight" : "linear2.weight"), {heads, width}), heads,
                          width};
            gate.bias = {numbers(name + "bias", {heads}), heads};
            layers.push_back(gate);
        }
        /// The widened numbers of a tensor of that very shape.
        const float* numbers(const std::string& name, const std::vector<std::size_t>& shape) {
            const Tensor& tensor = file.tensor(name);
            const auto list = [](const std::vector<std::size_t>& dims) {
                std::string text;
                for (const std::size_t dim : dims) text += (text.empty() ? "" : ", ") + std::to_string(dim);
                return "[" + text + "]";
            };
            if (tensor.shape != shape || tensor.size() == 0)
                fail("'" + name + "' has shape " + list(tensor.shape) + ", want " +
                     (tensor.size() == 0 ? "numbers in it" : list(shape)));
            std::vector<float> wide;
            const auto widen = [&]<class T>(const std::vector<T>& all) {
                wide.reserve(all.size());
                for (const T x : all) wide.push_back(to_float(x));
            };
            switch (tensor.dtype) {
                case ElementType::f32:
                    widen(tensor.to_vector<float>());
                    break;
                case ElementType::f16:
                    widen(tensor.to_vector<float16>());
                    break;
                case ElementType::bf16:
                    widen(tensor.to_vector<bfloat16>());
                    break;
                default:
                    fail("'" + name + "' is " + std::string(name_of(tensor.dtype)) +
                         ", want BF16, F16 or F32");
            }
            for (const float& x : wide)
                if (!is_finite(x)) fail("'" + name + "' holds a number that is not finite");
            read.insert(name);
            owned.push_back(std::move(wide));
            return owned.back().data();
        }
    };

    std::shared_ptr<const Data> data_;
};

}  // namespace kvcull::inline KVCULL_ABI
