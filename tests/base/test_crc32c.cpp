#include "kvcull/base/crc32c.hpp"

#include <string_view>
#include <vector>

#include "support/catch.hpp"

using kvcull::detail::crc32c;

TEST_CASE("the checksum is the CRC-32C of RFC 3720") {
    const auto of = [](std::string_view text) { return crc32c(std::as_bytes(std::span(text))); };
    CHECK(of("") == 0);
    CHECK(of("123456789") == 0xE3069283U);
    std::vector<std::byte> bytes(32);
    CHECK(crc32c(bytes) == 0x8A9136AAU);
    for (auto& b : bytes) b = std::byte{0xFF};
    CHECK(crc32c(bytes) == 0x62A8AB43U);
    for (std::size_t i = 0; i < 32; ++i) bytes[i] = static_cast<std::byte>(i);
    CHECK(crc32c(bytes) == 0x46DD794EU);
}

TEST_CASE("the checksum by tables is the division bit by bit at every length", "[differential]") {
    std::vector<std::byte> bytes;
    for (unsigned n = 0; n < 40; ++n) {
        std::uint32_t crc = ~0U;
        for (const std::byte b : bytes) {
            crc ^= static_cast<std::uint32_t>(b);
            for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1U) ^ ((crc & 1U) * 0x82F63B78U);
        }
        REQUIRE(crc32c(bytes) == ~crc);
        bytes.push_back(static_cast<std::byte>(n * 37 + 11));
    }
}
