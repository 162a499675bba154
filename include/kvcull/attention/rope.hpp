#pragma once
/// Rotary position embedding (RoPE): rotations of channel pairs by angles proportional to a position.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../base/error.hpp"
#include "../base/types.hpp"
#include "../views.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Which two channels turn together, of the first `dims`: (a, a + dims / 2) as in Hugging Face's Llama and
/// GPT-NeoX, or (2 a, 2 a + 1) as in Meta's Llama and GPT-J.
enum class Pairing : std::uint8_t { half_split, interleaved };

/// Pair `a` turns by `position * frequencies[a]` radians. The first 2 * frequencies.size() channels of a row
/// turn, the others stay (partial rotary embedding).
struct Rope {
    Pairing pairing = Pairing::half_split;
    std::vector<double> frequencies;

    [[nodiscard]] std::size_t dims() const noexcept { return 2 * frequencies.size(); }
};

/// frequencies[a] = base^(-2 a / dims).
/// @throws config_error if dims is odd or base is not a positive number.
[[nodiscard]] inline Rope rope(std::size_t dims, double base = 10000.0,
                               Pairing pairing = Pairing::half_split) {
    detail::check<error::config_error>(dims % 2 == 0, "rope", "dims", dims, "an even number");
    detail::check<error::config_error>(base > 0, "rope", "base", base, "a positive number");
    Rope result{pairing, std::vector<double>(dims / 2)};
    for (std::size_t a = 0; a < dims / 2; ++a)
        result.frequencies[a] = std::pow(base, -2.0 * static_cast<double>(a) / static_cast<double>(dims));
    return result;
}

/// Linear scaling (position interpolation): positions count 1 / factor.
/// @throws config_error if factor is not positive.
[[nodiscard]] inline Rope scale_linear(Rope rope, double factor) {
    detail::check<error::config_error>(factor > 0, "scale_linear", "factor", factor, "a positive number");
    for (double& frequency : rope.frequencies) frequency /= factor;
    return rope;
}

/// Llama 3.1's scaling, as `rope_type: llama3` of Hugging Face transformers: wavelengths above
/// original_max_position / low_freq_factor are stretched by `factor`, those below original_max_position /
/// high_freq_factor stay, and between the two a linear blend in original_max_position / wavelength.
/// @throws config_error if a factor is not positive or low_freq_factor >= high_freq_factor.
[[nodiscard]] inline Rope scale_llama3(Rope rope, double factor, double low_freq_factor,
                                       double high_freq_factor, double original_max_position) {
    constexpr std::string_view where = "scale_llama3";
    detail::check<error::config_error>(factor > 0, where, "factor", factor, "a positive number");
    detail::check<error::config_error>(low_freq_factor > 0, where, "low_freq_factor", low_freq_factor,
                                       "a positive number");
    detail::check<error::config_error>(high_freq_factor > low_freq_factor, where, "high_freq_factor",
                                       high_freq_factor, "above low_freq_factor");
    detail::check<error::config_error>(original_max_position > 0, where, "original_max_position",
                                       original_max_position, "a positive number");
    for (double& frequency : rope.frequencies) {
        const double wavelength = 2.0 * std::numbers::pi / frequency;
        if (wavelength < original_max_position / high_freq_factor) continue;
        if (wavelength > original_max_position / low_freq_factor) {
            frequency /= factor;
            continue;
        }
        const double smooth =
            (original_max_position / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
        frequency = (1.0 - smooth) * frequency / factor + smooth * frequency;
    }
    return rope;
}

/// Rotates every row of rows[R, d] to `position`; a negative one turns back, and rotations add: a key cached
/// at position p comes to position i by rotate(rope, i - p, ..). The heads of one token are rows of one such
/// matrix. Angles, sines and products are double and rounded once, so far positions lose nothing (exact up to
/// 2^53). Cost: dims / 2 sines and cosines in all, 2 dims multiply-adds per row.
/// @throws shape_error if d < rope.dims().
inline void rotate(const Rope& rope, position_t position, MatrixView<float> rows) {
    const std::size_t dims = rope.dims(), half = dims / 2;
    detail::check<error::shape_error>(rows.rows == 0 || rows.cols >= dims, "rotate", "rows.cols", rows.cols,
                                      "at least " + std::to_string(dims));
    const bool split = rope.pairing == Pairing::half_split;
    for (std::size_t a = 0; a < half; ++a) {
        const double angle = static_cast<double>(position) * rope.frequencies[a];
        const double cosine = std::cos(angle), sine = std::sin(angle);
        float* first = rows.data + (split ? a : 2 * a);
        float* second = rows.data + (split ? a + half : 2 * a + 1);
        for (std::size_t row = 0; row < rows.rows; ++row, first += rows.stride, second += rows.stride) {
            const double x = static_cast<double>(*first), y = static_cast<double>(*second);
            *first = static_cast<float>(x * cosine - y * sine);
            *second = static_cast<float>(y * cosine + x * sine);
        }
    }
}

/// One row.
inline void rotate(const Rope& rope, position_t position, std::span<float> row) {
    rotate(rope, position, MatrixView<float>(row.data(), 1, row.size()));
}

}  // namespace kvcull::inline KVCULL_ABI
