#pragma once
/// Columns made rows, by the vectors that every CPU has.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../base/config.hpp"

namespace kvcull::inline KVCULL_ABI::simd {

namespace turning {
using Words [[gnu::vector_size(16)]] = std::uint32_t;
using Halves [[gnu::vector_size(16)]] = std::uint16_t;

/// Row k gets word k of each of four vectors.
inline void store_turned(Words a, Words b, Words c, Words d, std::byte* out, std::size_t row_bytes) noexcept {
    const Words ab = __builtin_shufflevector(a, b, 0, 4, 1, 5),
                cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const Words ef = __builtin_shufflevector(a, b, 2, 6, 3, 7),
                gh = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    const auto store = [&](std::size_t row, Words words) {
        std::memcpy(out + row * row_bytes, &words, sizeof words);
    };
    store(0, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
    store(1, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
    store(2, __builtin_shufflevector(ef, gh, 0, 1, 4, 5));
    store(3, __builtin_shufflevector(ef, gh, 2, 3, 6, 7));
}
/// A square of as many elements as fit in a vector each way; `stride` counts elements between columns.
inline void turn_square(const std::uint32_t* columns, std::size_t stride, std::uint32_t* out,
                        std::size_t dim) noexcept {
    Words column[4];
    for (std::size_t c = 0; c < 4; ++c) std::memcpy(&column[c], columns + c * stride, sizeof(Words));
    store_turned(column[0], column[1], column[2], column[3], reinterpret_cast<std::byte*>(out),
                 dim * sizeof *out);
}
inline void turn_square(const float* columns, std::size_t stride, float* out, std::size_t dim) noexcept {
    turn_square(reinterpret_cast<const std::uint32_t*>(columns), stride,
                reinterpret_cast<std::uint32_t*>(out), dim);
}
inline void turn_square(const std::uint16_t* columns, std::size_t stride, std::uint16_t* out,
                        std::size_t dim) noexcept {
    Words low[4], high[4];  // rows 0 .. 3 and 4 .. 7 of two neighbours, an element of each to a word
    for (std::size_t c = 0; c < 4; ++c) {
        Halves a, b;
        std::memcpy(&a, columns + 2 * c * stride, sizeof a);
        std::memcpy(&b, columns + (2 * c + 1) * stride, sizeof b);
        low[c] = reinterpret_cast<Words>(__builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11));
        high[c] = reinterpret_cast<Words>(__builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15));
    }
    auto* const bytes = reinterpret_cast<std::byte*>(out);
    store_turned(low[0], low[1], low[2], low[3], bytes, dim * sizeof *out);
    store_turned(high[0], high[1], high[2], high[3], bytes + 4 * dim * sizeof *out, dim * sizeof *out);
}
}  // namespace turning

/// out[j * dim + c] = columns[c * stride + j] for j < rows, c < dim: elements of 16 or 32 bits, bit for bit.
template <class Element>
void transpose(const Element* columns, std::size_t stride, std::size_t rows, std::size_t dim,
               Element* out) noexcept {
    constexpr std::size_t side = 16 / sizeof(Element);
    const std::size_t whole = rows - rows % side;
    std::size_t c = 0;
    for (; c + side <= dim; c += side) {
        for (std::size_t channel = c; channel < c + side; ++channel)
            for (std::size_t byte = 0; byte < rows * sizeof(Element); byte += 64)
                __builtin_prefetch(reinterpret_cast<const std::byte*>(columns + channel * stride + rows) +
                                   byte);
        for (std::size_t j = 0; j < whole; j += side)
            turning::turn_square(columns + c * stride + j, stride, out + j * dim + c, dim);
    }
    for (std::size_t channel = 0; channel < dim; ++channel)
        for (std::size_t j = channel < c ? whole : 0; j < rows; ++j)
            out[j * dim + channel] = columns[channel * stride + j];
}

}  // namespace kvcull::inline KVCULL_ABI::simd
