#pragma once
/// From dot products to what softmax sees: scale, softcap, bias.

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "../base/error.hpp"
#include "../base/types.hpp"
#include "../simd/kernels.hpp"
#include "../views.hpp"

namespace kvcull::inline KVCULL_ABI {

/// One query row and a run of the cached rows that it sees; `logits` are scaled and capped.
struct BiasRow {
    std::size_t layer = 0, q_head = 0;
    position_t query = 0;          // of the query token
    const PositionsView& keys;     // of all cached rows, in slot order
    std::size_t first = 0;         // the row of logits[0]
    std::span<float> logits = {};  // to be added to
};
/// An additive bias that depends on positions, as ALiBi and T5 have it. Called on the threads that attend.
using Bias = std::function<void(const BiasRow& row)>;

/// ALiBi (arXiv 2108.12409): minus the distance times a slope per query head. @param slopes [q_heads]
[[nodiscard]] inline Bias alibi(std::vector<float> slopes) {
    return [slopes = std::move(slopes)](const BiasRow& row) {
        detail::check<error::shape_error>(row.q_head < slopes.size(), "alibi", "slopes.size()", slopes.size(),
                                          detail::text("more than query head ", row.q_head));
        const float slope = slopes[row.q_head];
        for (std::size_t j = 0; j < row.logits.size(); ++j)
            row.logits[j] -= slope * static_cast<float>(row.query - row.keys[row.first + j]);
    };
}

/// Refers to a callable `add(row, first, logits)`: query row of the call, first cached row, their logits.
class RowBias {
  public:
    constexpr RowBias() noexcept = default;
    template <class Add>
    explicit RowBias(const Add& add) noexcept
        : object_(&add),
          call_([](const void* object, std::size_t row, std::size_t first, std::span<float> logits) {
              (*static_cast<const Add*>(object))(row, first, logits);
          }) {}

    [[nodiscard]] explicit operator bool() const noexcept { return call_ != nullptr; }
    void operator()(std::size_t row, std::size_t first, std::span<float> logits) const {
        call_(object_, row, first, logits);
    }

  private:
    const void* object_ = nullptr;
    void (*call_)(const void*, std::size_t, std::size_t, std::span<float>) = nullptr;
};

/// What one call does to its dot products, in this order. A plain number is a scale alone.
struct LogitRule {
    float scale = 1.0F;    // usually 1 / sqrt(d)
    float softcap = 0.0F;  // > 0: cap * tanh(logit / cap)
    RowBias bias = {};

    constexpr LogitRule(float factor, float cap = 0.0F, RowBias add = {}) noexcept
        : scale(factor), softcap(cap), bias(add) {}
};

namespace detail {

KVCULL_PRECISE_BEGIN

/// row = cap * tanh(row / cap); cap > 0. NaN stays NaN. Error below 3e-7 of the result.
inline void soft_cap(float* row, std::size_t n, float cap) noexcept {
    const auto choose = [](bool first, const float& a, const float& b) {
        return std::bit_cast<float>(first ? std::bit_cast<std::uint32_t>(a)
                                          : std::bit_cast<std::uint32_t>(b));
    };
    const float inverse = 1.0F / cap;
    for (std::size_t j = 0; j < n; ++j) {
        const float y = row[j] * inverse, magnitude = std::fabs(y), square = y * y;
        const float e = simd::exp_non_positive(-2.0F * magnitude);
        const float large = std::copysign((1.0F - e) / (1.0F + e), y);
        // Where 1 - e would cancel: the series of tanh.
        constexpr float c[] = {-1.0F / 3.0F, 2.0F / 15.0F, -17.0F / 315.0F, 62.0F / 2835.0F,
                               -1382.0F / 155925.0F};
        const float tail = (((c[4] * square + c[3]) * square + c[2]) * square + c[1]) * square + c[0];
        const float small = y + y * square * tail;
        const float capped = cap * choose(magnitude < 0.3F, small, large);
        row[j] = choose(is_nan(row[j]), row[j], capped);
    }
}

KVCULL_PRECISE_END

/// The rest of the rule after the scale, on logits of cached rows `first ..` of query row `row`.
inline void finish_logits(const LogitRule& rule, std::size_t row, std::size_t first,
                          std::span<float> logits) {
    if (logits.empty()) return;
    if (rule.softcap > 0.0F) soft_cap(logits.data(), logits.size(), rule.softcap);
    if (rule.bias) rule.bias(row, first, logits);
}

}  // namespace detail

}  // namespace kvcull::inline KVCULL_ABI
