#include "trace.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <kvcull/base/error.hpp>
#include <limits>
#include <numeric>
#include <optional>
#include <span>
#include <sstream>
#include <system_error>

namespace replay {
namespace {

using kvcull::DType;
using kvcull::ElementType;
using kvcull::SafeTensors;
using kvcull::Tensor;
using Shape = std::vector<std::size_t>;

constexpr const char *version_key = "kvcull_trace", *prompt_key = "prompt_tokens", *scale_key = "scale";
constexpr const char* version = "1";

[[noreturn]] void fail(const std::string& path, const std::string& what, const std::string& got,
                       const std::string& want) {
    throw kvcull::error::format_error(path + ": " + what + " is " + got + ", want " + want);
}

std::string text_of(const Shape& shape) {
    std::string text;
    for (const std::size_t dim : shape) text += (text.empty() ? "[" : ", ") + std::to_string(dim);
    return text.empty() ? "[]" : text + "]";
}

struct RowType {
    ElementType file;
    DType rows;
};
constexpr std::array<RowType, 3> row_types{
    {{ElementType::f32, DType::f32}, {ElementType::f16, DType::f16}, {ElementType::bf16, DType::bf16}}};

class Reader {
  public:
    explicit Reader(const std::string& path) : path_(path), file_(SafeTensors::read(path)) {}

    [[nodiscard]] Trace read() {
        notes_ = file_.metadata();
        if (const std::string got = take(version_key).value_or("missing"); got != version)
            fail(path_, key(version_key), got, version);
        const Shape q = numbers("layers.0.q").shape, k = numbers("layers.0.k").shape;

        Trace trace;
        trace.shape = {.q_heads = q[0], .kv_heads = k[0], .head_dim = q[2]};
        trace.shape.value_dim = numbers("layers.0.v").shape[2];
        trace.shape.dtype = type_of("layers.0.k");
        read_settings(q[1], trace);
        read_positions(q[1], trace);
        read_layers(q[1], trace);
        trace.notes = std::move(notes_);
        return trace;
    }

  private:
    [[nodiscard]] static std::string key(const std::string& name) { return "metadata '" + name + "'"; }
    [[nodiscard]] static std::string named(const std::string& tensor) { return "tensor '" + tensor + "'"; }
    [[nodiscard]] static std::string number(std::size_t index, const std::string& tensor) {
        return "number " + std::to_string(index) + " of " + named(tensor);
    }

    /// A value of the metadata, which is then no note.
    [[nodiscard]] std::optional<std::string> take(const std::string& name) {
        const auto node = notes_.extract(name);
        return node ? std::optional(node.mapped()) : std::nullopt;
    }
    template <class T>
    [[nodiscard]] T parse(const std::string& name, const std::string& text, const std::string& want) const {
        T value{};
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        if (error != std::errc() || end != text.data() + text.size()) fail(path_, key(name), text, want);
        return value;
    }
    [[nodiscard]] DType type_of(const std::string& name) const {
        const ElementType type = file_.tensor(name).dtype;
        for (const RowType& known : row_types)
            if (known.file == type) return known.rows;
        fail(path_, "dtype of " + named(name), std::string(name_of(type)), "F32, F16 or BF16");
    }
    /// A tensor of three axes, none of them empty.
    [[nodiscard]] const Tensor& numbers(const std::string& name) const {
        const Tensor& tensor = file_.tensor(name);
        if (tensor.shape.size() != 3 || tensor.size() == 0)
            fail(path_, "shape of " + named(name), text_of(tensor.shape), "[heads, tokens, channels]");
        return tensor;
    }
    [[nodiscard]] std::vector<float> read_numbers(const std::string& name, const Shape& shape) const {
        const Tensor& tensor = numbers(name);
        if (tensor.shape != shape)
            fail(path_, "shape of " + named(name), text_of(tensor.shape), text_of(shape));
        std::vector<float> values;
        const auto widen = [&](const auto& from) {
            for (const auto x : from) values.push_back(kvcull::to_float(x));
        };
        const DType type = type_of(name);
        if (type == DType::f32) widen(tensor.to_vector<float>());
        if (type == DType::f16) widen(tensor.to_vector<kvcull::float16>());
        if (type == DType::bf16) widen(tensor.to_vector<kvcull::bfloat16>());
        for (std::size_t i = 0; i < values.size(); ++i)
            if (!kvcull::is_finite(values[i])) fail(path_, number(i, name), "NaN or infinite", "finite");
        return values;
    }
    /// One integer per token.
    /// @param accept  what is wanted of number i, or nothing if it will do
    template <class T, class Accept>
    [[nodiscard]] std::vector<T> read_integers(const std::string& name, std::size_t tokens,
                                               Accept&& accept) const {
        const Tensor& tensor = file_.tensor(name);
        if (tensor.shape != Shape{tokens})
            fail(path_, "shape of " + named(name), text_of(tensor.shape), text_of({tokens}));
        if (tensor.dtype != ElementType::i64 && tensor.dtype != ElementType::i32)
            fail(path_, "dtype of " + named(name), std::string(name_of(tensor.dtype)), "I64 or I32");
        std::vector<T> values;
        const auto take_all = [&](const auto& from) {
            for (const std::int64_t x : from) {
                if (const std::string want = accept(x); !want.empty())
                    fail(path_, number(values.size(), name), std::to_string(x), want);
                values.push_back(static_cast<T>(x));
            }
        };
        if (tensor.dtype == ElementType::i64)
            take_all(tensor.to_vector<std::int64_t>());
        else
            take_all(tensor.to_vector<std::int32_t>());
        return values;
    }

    void read_settings(std::size_t tokens, Trace& trace) {
        const std::string range = "1 to " + std::to_string(tokens - 1) + " (the tensors have " +
                                  std::to_string(tokens) +
                                  " tokens, and one at least must come after the prompt)";
        const std::string prompt = take(prompt_key).value_or("missing");
        trace.prompt = parse<std::size_t>(prompt_key, prompt, range);
        if (trace.prompt < 1 || trace.prompt >= tokens) fail(path_, key(prompt_key), prompt, range);
        if (const auto scale = take(scale_key)) {
            trace.shape.scale = parse<float>(scale_key, *scale, "a number");
            if (!kvcull::is_finite(trace.shape.scale) || trace.shape.scale == 0)
                fail(path_, key(scale_key), *scale, "finite and not 0");
        }
        if (trace.shape.q_heads % trace.shape.kv_heads != 0)
            fail(path_, "heads of tensor 'layers.0.q'", std::to_string(trace.shape.q_heads),
                 "a multiple of the " + std::to_string(trace.shape.kv_heads) + " of 'layers.0.k'");
    }
    void read_positions(std::size_t tokens, Trace& trace) const {
        constexpr std::int64_t most_token = std::numeric_limits<std::int32_t>::max();
        constexpr std::int64_t most_position = std::int64_t{1} << 53U;
        if (file_.contains("tokens"))
            trace.tokens = read_integers<std::int32_t>("tokens", tokens, [](std::int64_t x) {
                return x >= 0 && x <= most_token ? "" : "0 to " + std::to_string(most_token);
            });
        trace.positions.resize(tokens);
        std::iota(trace.positions.begin(), trace.positions.end(), kvcull::position_t{0});
        if (!file_.contains("positions")) return;
        std::int64_t least = 0;
        trace.positions = read_integers<kvcull::position_t>("positions", tokens, [&](std::int64_t x) {
            if (x < least || x > most_position)
                return std::to_string(least) + " to " + std::to_string(most_position);
            least = x + 1;
            return std::string();
        });
    }
    void read_layers(std::size_t tokens, Trace& trace) const {
        const kvcull::CacheShape& shape = trace.shape;
        const auto names = file_.names();
        const auto of_layers = std::count_if(names.begin(), names.end(),
                                             [](const auto& name) { return name.starts_with("layers."); });
        for (std::size_t layer = 0; 3 * layer < static_cast<std::size_t>(of_layers); ++layer) {
            const std::string name = "layers." + std::to_string(layer) + ".";
            trace.layers.push_back({read_numbers(name + "q", {shape.q_heads, tokens, shape.head_dim}),
                                    read_numbers(name + "k", {shape.kv_heads, tokens, shape.head_dim}),
                                    read_numbers(name + "v", {shape.kv_heads, tokens, shape.value_dim})});
            for (const std::string& array : {name + "k", name + "v"})
                if (const DType type = type_of(array); type != shape.dtype)
                    fail(path_, "dtype of " + named(array), std::string(name_of(type)),
                         std::string(name_of(shape.dtype)) + " as 'layers.0.k'");
        }
        trace.shape.layers = trace.layers.size();
    }

    std::string path_;
    SafeTensors file_;
    SafeTensors::Metadata notes_;
};

/// `array` as the bytes of a file's `dtype`.
std::vector<std::byte> packed(const std::string& name, const std::vector<float>& array, DType dtype) {
    const auto pack = [&](auto&& convert) {
        std::vector<decltype(convert(0.0F))> numbers(array.size());
        for (std::size_t i = 0; i < array.size(); ++i) {
            numbers[i] = convert(array[i]);
            if (!kvcull::is_finite(kvcull::to_float(numbers[i])))
                throw kvcull::error::format_error("write_trace: number " + std::to_string(i) + " of '" +
                                                  name + "' is " + std::to_string(array[i]) +
                                                  ", want finite as " + std::string(name_of(dtype)));
        }
        const auto bytes = std::as_bytes(std::span(numbers));
        return std::vector<std::byte>(bytes.begin(), bytes.end());
    };
    if (dtype == DType::f16) return pack([](float x) { return kvcull::to_float16(x); });
    if (dtype == DType::bf16) return pack([](float x) { return kvcull::to_bfloat16(x); });
    return pack([](float x) { return x; });
}

/// The shortest text that reads back as the same number.
std::string text_of(float number) {
    std::array<char, 32> text{};
    return {text.data(), std::to_chars(text.data(), text.data() + text.size(), number).ptr};
}

}  // namespace

Trace read_trace(const std::string& path) {
    return Reader(path).read();
}

void write_trace(const std::string& path, const Trace& trace) {
    const kvcull::CacheShape& shape = trace.shape;
    const ElementType dtype = std::find_if(row_types.begin(), row_types.end(), [&](const RowType& type) {
                                  return type.rows == shape.dtype;
                              })->file;
    std::vector<std::vector<std::byte>> bytes;
    bytes.reserve(3 * trace.layers.size());
    std::vector<Tensor> tensors{Tensor::of<kvcull::position_t>("positions", {trace.size()}, trace.positions)};
    if (!trace.tokens.empty())
        tensors.push_back(Tensor::of<std::int32_t>("tokens", {trace.size()}, trace.tokens));
    for (std::size_t i = 0; i < trace.layers.size(); ++i) {
        const auto add = [&](const char* array, const std::vector<float>& values, std::size_t heads,
                             std::size_t dim) {
            const std::string name = "layers." + std::to_string(i) + "." + array;
            bytes.push_back(packed(name, values, shape.dtype));
            tensors.push_back({name, dtype, {heads, trace.size(), dim}, bytes.back()});
        };
        add("q", trace.layers[i].q, shape.q_heads, shape.head_dim);
        add("k", trace.layers[i].k, shape.kv_heads, shape.head_dim);
        add("v", trace.layers[i].v, shape.kv_heads, shape.values());
    }
    SafeTensors::Metadata metadata = trace.notes;
    metadata[version_key] = version;
    metadata[prompt_key] = std::to_string(trace.prompt);
    if (shape.scale != 0) metadata[scale_key] = text_of(shape.scale);
    SafeTensors::write(path, metadata, tensors);
}

std::string describe(const Trace& trace) {
    const kvcull::CacheShape& shape = trace.shape;
    std::ostringstream out;
    out << trace.prompt << " + " << trace.size() - trace.prompt << " tokens, " << shape.layers
        << (shape.layers == 1 ? " layer, " : " layers, ") << shape.q_heads << " query heads on "
        << shape.kv_heads << " KV heads of " << shape.head_dim << ", " << name_of(shape.dtype);
    return out.str();
}

}  // namespace replay
