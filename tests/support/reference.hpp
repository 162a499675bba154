#pragma once
/// Attention as naive double loops: what the kernels are compared with. Shares no code with the library.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvcull/views.hpp"

namespace kvcull::test {

/// The same number, bit for bit; comparing with == would fold NaN away under -ffast-math.
inline bool same_bits(const float& x, const float& y) {
    return std::bit_cast<std::uint32_t>(x) == std::bit_cast<std::uint32_t>(y);
}
inline bool same_bits(std::span<const float> x, std::span<const float> y) {
    return std::equal(x.begin(), x.end(), y.begin(), y.end(),
                      [](const float& a, const float& b) { return same_bits(a, b); });
}

/// |x - y| <= absolute + relative |y|; a NaN or infinity is close to nothing.
inline bool close(const float& x, double y, double relative, double absolute) {
    if ((std::bit_cast<std::uint32_t>(x) & 0x7F800000U) == 0x7F800000U) return false;
    return std::abs(static_cast<double>(x) - y) <= absolute + relative * std::abs(y);
}

inline bool is_visible(const Visible& visible, std::size_t j) {
    return j < visible.end && (j < visible.sinks || j >= visible.begin);
}

struct ReferenceAttention {
    std::vector<double> logits, attention;  // [R, n], 0 where invisible
    std::vector<double> output;             // [R, d_v]
    std::vector<double> lse;                // [R]; of a row that sees nothing: lowest double
};

/// q [R, d], k [n, d], v [n, d_v], rows without gaps; finite numbers only.
inline ReferenceAttention reference_attention(std::span<const float> q, std::span<const float> k,
                                              std::span<const float> v, std::span<const Visible> visible,
                                              std::size_t n, std::size_t dim, std::size_t value_dim,
                                              double scale) {
    const std::size_t rows = visible.size();
    ReferenceAttention result;
    result.logits.assign(rows * n, 0.0);
    result.attention.assign(rows * n, 0.0);
    result.output.assign(rows * value_dim, 0.0);
    result.lse.assign(rows, -1.7976931348623157e308);
    for (std::size_t i = 0; i < rows; ++i) {
        double* logits = result.logits.data() + i * n;
        double largest = -1.7976931348623157e308;
        for (std::size_t j = 0; j < n; ++j) {
            if (!is_visible(visible[i], j)) continue;
            double sum = 0;
            for (std::size_t c = 0; c < dim; ++c)
                sum += static_cast<double>(q[i * dim + c]) * static_cast<double>(k[j * dim + c]);
            logits[j] = sum * scale;
            largest = std::max(largest, logits[j]);
        }
        double total = 0;
        for (std::size_t j = 0; j < n; ++j)
            if (is_visible(visible[i], j)) total += std::exp(logits[j] - largest);
        if (total == 0) continue;
        result.lse[i] = largest + std::log(total);
        for (std::size_t j = 0; j < n; ++j) {
            if (!is_visible(visible[i], j)) continue;
            const double weight = std::exp(logits[j] - largest) / total;
            result.attention[i * n + j] = weight;
            for (std::size_t c = 0; c < value_dim; ++c)
                result.output[i * value_dim + c] += weight * static_cast<double>(v[j * value_dim + c]);
        }
    }
    return result;
}

}  // namespace kvcull::test
