#pragma once
/// CRC-32C, the checksum of what is kept in files.

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "config.hpp"

namespace kvcull::inline KVCULL_ABI::detail {

/// `tables[j][b]`: what byte `b` does to the checksum when `j` more bytes follow it.
using Crc32cTables = std::array<std::array<std::uint32_t, 256>, 8>;
[[nodiscard]] constexpr Crc32cTables make_crc32c_tables() noexcept {
    constexpr std::uint32_t polynomial = 0x82F63B78U;  // Castagnoli's, bits reversed
    Crc32cTables tables{};
    for (std::uint32_t b = 0; b < 256; ++b) {
        std::uint32_t crc = b;
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1U) ^ ((crc & 1U) != 0 ? polynomial : 0U);
        tables[0][b] = crc;
    }
    for (std::size_t j = 1; j < 8; ++j)
        for (std::size_t b = 0; b < 256; ++b)
            tables[j][b] = (tables[j - 1][b] >> 8U) ^ tables[0][tables[j - 1][b] & 0xFFU];
    return tables;
}
inline constexpr Crc32cTables crc32c_tables = make_crc32c_tables();

/// CRC-32C (Castagnoli, RFC 3720): finds every run of flipped bits up to 32 bits long, and any 3 bits in
/// pages below 2^31 bits. Eight bytes at a time by tables: no instruction of one CPU is needed.
[[nodiscard]] constexpr std::uint32_t crc32c(std::span<const std::byte> bytes) noexcept {
    const auto& t = crc32c_tables;
    const auto at = [&](std::size_t i) { return static_cast<std::uint32_t>(bytes[i]); };
    std::uint32_t crc = 0xFFFFFFFFU;
    std::size_t i = 0;
    for (; i + 8 <= bytes.size(); i += 8) {
        crc ^= at(i) | at(i + 1) << 8U | at(i + 2) << 16U | at(i + 3) << 24U;
        crc = t[7][crc & 0xFFU] ^ t[6][(crc >> 8U) & 0xFFU] ^ t[5][(crc >> 16U) & 0xFFU] ^ t[4][crc >> 24U] ^
              t[3][at(i + 4)] ^ t[2][at(i + 5)] ^ t[1][at(i + 6)] ^ t[0][at(i + 7)];
    }
    for (; i < bytes.size(); ++i) crc = (crc >> 8U) ^ t[0][(crc ^ at(i)) & 0xFFU];
    return ~crc;
}

}  // namespace kvcull::inline KVCULL_ABI::detail
