#pragma once
/// Groups of 32 channels that share a scale: the elements of int8 and int4 rows. The bytes are those of Q8_0
/// and Q4_0 in ggml, so a cache that llama.cpp quantised can be viewed as it is.
///
/// A channel is scale * integer, exactly: 11 bits of a float16 times at most 8 bits fit a float. So a row
/// means the same numbers everywhere, and a kernel over it gives what it gives over those numbers as floats.
/// In a row whose length is no multiple of 32 the rest of the last group is filled up with zeros.

#include <cstddef>
#include <cstdint>

#include "config.hpp"
#include "types.hpp"

namespace kvcull::inline KVCULL_ABI {

inline constexpr std::size_t group_channels = 32;

/// Channel c is scale * q[c].
struct int8_group {
    float16 scale;
    std::int8_t q[group_channels] = {};
};
/// Channel c < 16 is scale * (low half of q[c] - 8), channel c + 16 scale * (high half of q[c] - 8).
struct int4_group {
    float16 scale;
    std::uint8_t q[group_channels / 2] = {};
};
static_assert(sizeof(int8_group) == size_of(DType::int8) && sizeof(int4_group) == size_of(DType::int4));
static_assert(alignof(int8_group) == 2 && alignof(int4_group) == 2);

/// The integer of channel `c`.
[[nodiscard]] constexpr int integer_of(const int8_group& group, std::size_t c) noexcept {
    return group.q[c];
}
[[nodiscard]] constexpr int integer_of(const int4_group& group, std::size_t c) noexcept {
    constexpr std::size_t half = group_channels / 2;
    return (group.q[c % half] >> (c < half ? 0 : 4) & 15) - 8;
}

/// Widens the first `n` channels of a row.
template <class Group>
constexpr void widen_groups(const Group* row, float* out, std::size_t n) noexcept {
    for (std::size_t first = 0; first < n; first += group_channels, ++row) {
        const float scale = to_float(row->scale);
        const std::size_t count = n - first < group_channels ? n - first : group_channels;
        for (std::size_t c = 0; c < count; ++c)
            out[first + c] = scale * static_cast<float>(integer_of(*row, c));
    }
}

}  // namespace kvcull::inline KVCULL_ABI
