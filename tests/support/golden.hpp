#pragma once
/// One golden file: parameters, inputs, and expected outputs that tick themselves off as they are compared.

#include <algorithm>
#include <charconv>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <set>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvcull/base/safetensors.hpp"
#include "support/reference.hpp"

namespace kvcull::test {

/// |got - want| <= absolute + relative |want|. NaN agrees with NaN, an infinity with itself.
struct Tolerance {
    double relative = 1e-4, absolute = 1e-5;
};

/// A tensor's numbers and shape.
template <class T>
struct Array {
    std::vector<std::size_t> shape;
    std::vector<T> values;

    [[nodiscard]] std::size_t dim(std::size_t axis) const { return shape[axis]; }
};

/// Where an output differs from what a file expects, in words.
struct Difference : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// Everything that compares throws a `Difference` at the first number that does not agree.
class GoldenFile {
  public:
    /// @throws format_error if the file is not one, or `method` or `kind` is missing.
    explicit GoldenFile(const std::string& path)
        : file_(SafeTensors::read(path)), method_(text("method")), kind_(text("kind")) {}

    [[nodiscard]] const std::string& method() const noexcept { return method_; }
    [[nodiscard]] const std::string& kind() const noexcept { return kind_; }

    // --- parameters: the string map of the header

    [[nodiscard]] bool has(const std::string& key) const { return file_.metadata().contains(key); }
    [[nodiscard]] std::string text(const std::string& key) const {
        const auto found = file_.metadata().find(key);
        if (found == file_.metadata().end()) throw error::format_error("metadata '" + key + "' is missing");
        return found->second;
    }
    [[nodiscard]] std::size_t count(const std::string& key) const {
        return parse<std::size_t>(key, text(key));
    }
    [[nodiscard]] std::size_t count(const std::string& key, std::size_t otherwise) const {
        return has(key) ? count(key) : otherwise;
    }
    [[nodiscard]] double real(const std::string& key) const { return parse<double>(key, text(key)); }
    /// The value that a word stands for. @throws format_error that names an unknown word.
    template <class T>
    [[nodiscard]] T choice(const std::string& key,
                           std::initializer_list<std::pair<std::string_view, T>> words) const {
        for (const auto& [word, value] : words)
            if (word == text(key)) return value;
        std::string known;
        for (const auto& [word, value] : words) known += (known.empty() ? "" : ", ") + std::string(word);
        throw error::format_error("metadata '" + key + "' is '" + text(key) + "', want one of: " + known);
    }

    /// The same for a word without alternatives.
    void require(const std::string& key, std::string_view word) const { (void)choice<int>(key, {{word, 0}}); }

    // --- inputs

    [[nodiscard]] const SafeTensors& file() const noexcept { return file_; }
    [[nodiscard]] bool contains(std::string_view name) const { return file_.contains(name); }
    /// @throws format_error if the tensor is missing, of another type or has another number of axes.
    template <class T>
    [[nodiscard]] Array<T> array(std::string_view name, std::size_t axes) const {
        const Tensor& tensor = file_.tensor(name);
        if (tensor.shape.size() != axes)
            throw error::format_error("'" + tensor.name + "' has shape " + shape_text(tensor.shape) +
                                      ", want " + std::to_string(axes) + " axes");
        return {tensor.shape, tensor.to_vector<T>()};
    }

    // --- expected outputs

    /// Names the run that follows, for the words of a difference.
    void begin_run(std::string name) { run_ = std::move(name); }

    void expect(const std::string& name, std::vector<std::size_t> shape, std::span<const float> got,
                Tolerance tolerance = {}) {
        compare<float>(name, shape, got, [&](float x, float y) {
            if (same_bits(x, y) || (is_nan(x) && is_nan(y))) return true;
            return is_finite(y) && close(x, static_cast<double>(y), tolerance.relative, tolerance.absolute);
        });
    }
    void expect(const std::string& name, std::vector<std::size_t> shape, std::span<const double> got,
                double relative) {
        compare<double>(name, shape, got,
                        [&](double x, double y) { return std::abs(x - y) <= relative * std::abs(y); });
    }
    void expect(const std::string& name, std::vector<std::size_t> shape, std::span<const std::int64_t> got) {
        expect_exactly<std::int64_t>(name, shape, got);
    }
    /// Whole numbers of the type that the file has.
    template <std::integral T>
    void expect_exactly(const std::string& name, std::vector<std::size_t> shape, std::span<const T> got) {
        compare<T>(name, shape, got, [](T x, T y) { return x == y; });
    }
    /// Copies: the same bits.
    void expect_bits(const std::string& name, std::vector<std::size_t> shape, std::span<const float> got) {
        compare<float>(name, shape, got, [](float x, float y) { return same_bits(x, y); });
    }
    /// Largest finite magnitude of an expected output: tolerances may be relative to it.
    [[nodiscard]] double magnitude(std::string_view name) const {
        double largest = 0;
        for (const float x : file_.tensor(name).to_vector<float>())
            if (is_finite(x)) largest = std::max(largest, std::abs(static_cast<double>(x)));
        return largest;
    }
    /// Every expected output must have been compared.
    void finish() const {
        for (const Tensor& tensor : file_.tensors())
            if (tensor.name.starts_with("out.") && !compared_.contains(tensor.name))
                throw Difference("'" + tensor.name + "' was not compared: nothing computes it");
    }
    /// Comparisons of a tensor so far, the one that threw included.
    [[nodiscard]] std::size_t checks() const noexcept { return checks_; }

  private:
    template <class T>
    [[nodiscard]] static T parse(const std::string& key, const std::string& text) {
        T value{};
        const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), value);
        if (code != std::errc{} || end != text.data() + text.size())
            throw error::format_error("metadata '" + key + "' is '" + text + "', want a number");
        return value;
    }
    template <class List>
    [[nodiscard]] static std::string shape_text(const List& list) {
        std::string text;
        for (const std::size_t number : list) text += (text.empty() ? "" : ", ") + std::to_string(number);
        return "[" + text + "]";
    }
    /// "[1, 0, 7]" for a flat index.
    [[nodiscard]] static std::string index_text(std::size_t flat, std::span<const std::size_t> shape) {
        std::vector<std::size_t> index(shape.size());
        for (std::size_t axis = shape.size(); axis-- > 0; flat /= shape[axis])
            index[axis] = flat % shape[axis];
        return shape_text(index);
    }
    template <class T>
    [[nodiscard]] static std::string number_text(T number) {
        std::ostringstream text;
        text.precision(9);
        text << +number;
        return text.str();
    }
    template <class T, class Agrees>
    void compare(const std::string& name, const std::vector<std::size_t>& shape, std::span<const T> got,
                 const Agrees& agrees) {
        const auto differs = [&](const std::string& how) {
            throw Difference(name + how + (run_.empty() ? "" : " (" + run_ + ")"));
        };
        ++checks_;
        const Tensor& tensor = file_.tensor(name);
        compared_.insert(name);
        if (tensor.dtype != element_type_of<T>())
            differs(" is of type " + std::string(name_of(tensor.dtype)));
        if (tensor.shape != shape)
            differs(": got shape " + shape_text(shape) + ", want " + shape_text(tensor.shape));
        if (got.size() != tensor.size())
            differs(": got " + std::to_string(got.size()) + " numbers, want " +
                    std::to_string(tensor.size()));
        const std::vector<T> want = tensor.to_vector<T>();
        for (std::size_t i = 0; i < want.size(); ++i)
            if (!agrees(got[i], want[i]))
                differs(index_text(i, shape) + ": got " + number_text(got[i]) + ", want " +
                        number_text(want[i]));
    }

    SafeTensors file_;
    std::string method_, kind_;
    std::set<std::string> compared_;
    std::string run_;
    std::size_t checks_ = 0;
};

}  // namespace kvcull::test
