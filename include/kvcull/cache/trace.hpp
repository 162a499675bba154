#pragma once
/// What an observer is told of evictions: which row left, when, and why.

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string_view>

#include "../base/types.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Why a row left: others ranked above it; no later token can see it (a layer with a window); its token was
/// taken back.
enum class Reason : std::uint8_t { ranked_out, out_of_window, truncated };
[[nodiscard]] constexpr auto names_of(Reason /*any*/) noexcept {
    return std::array<std::string_view, 3>{"ranked_out", "out_of_window", "truncated"};
}

/// One row that leaves one KV head.
struct Eviction {
    std::size_t seen = 0;  // tokens of the sequence by then
    std::size_t layer = 0, head = 0;
    position_t position = 0;
    float score = 0.0F;  // what the decision saw of it; of ranked_out alone, else NaN
    Reason reason = Reason::ranked_out;
};

/// Called once per row, head after head, by ascending slot, on the thread that makes the call, when a plan is
/// made and before it is carried out; if the call throws, nothing of it has happened. Must not throw, and
/// must not call the cache.
using EvictionTrace = std::function<void(const Eviction& eviction)>;

}  // namespace kvcull::inline KVCULL_ABI
