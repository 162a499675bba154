#pragma once
/// One-dimensional pooling of scores over cache neighbours (SnapKV's idea: keep what lies around a hit).

#include <algorithm>
#include <array>
#include <cstddef>
#include <span>
#include <string_view>

#include "../base/error.hpp"
#include "../base/memory.hpp"
#include "../base/types.hpp"

namespace kvcull::inline KVCULL_ABI {

enum class Pool : std::uint8_t { none, max, avg };
[[nodiscard]] constexpr auto names_of(Pool /*any*/) noexcept {
    return std::array<std::string_view, 3>{"none", "max", "avg"};
}

/// Pools `score[c]` in place: stride 1, same length. `avg` pads with zeros and always divides by `kernel`;
/// `max` looks only at what exists. NaN spreads to neighbours under `avg` and is passed over by `max`. Cost:
/// O(c * kernel). @throws config_error if `kernel` is even; nothing changed.
inline void pool_scores(Pool pool, std::size_t kernel, std::span<float> score, Scratch<float>& workspace) {
    detail::check<error::config_error>(kernel % 2 == 1, "pool_scores", "kernel", kernel, "an odd number");
    if (pool == Pool::none || kernel == 1 || score.empty()) return;
    const std::size_t count = score.size(), reach = kernel / 2;
    const std::span<float> original(workspace.get(count), count);
    std::copy(score.begin(), score.end(), original.begin());
    for (std::size_t j = 0; j < count; ++j) {
        const auto near =
            original.subspan(j - std::min(j, reach), std::min(j, reach) + 1 + std::min(reach, count - 1 - j));
        if (pool == Pool::avg) {
            double sum = 0.0;
            for (const float x : near) sum += static_cast<double>(x);
            score[j] = static_cast<float>(sum / static_cast<double>(kernel));
        } else {
            float best = negative_infinity();
            for (const float x : near)
                if (!is_nan(x) && x > best) best = x;
            score[j] = best;
        }
    }
}

namespace detail {
inline void check_kernel(std::string_view policy, std::size_t kernel) {
    check<error::config_error>(kernel % 2 == 1, policy, "kernel", kernel, "an odd number");
}
}  // namespace detail

}  // namespace kvcull::inline KVCULL_ABI
