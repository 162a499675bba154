#pragma once
/// Catch2 under one name: Debian 12 ships version 2.13, later ones version 3.

#include <string>

#if __has_include(<catch2/catch_all.hpp>)
#    include <catch2/catch_all.hpp>
using Catch::Approx;
/// Matches a string that holds `text`.
inline auto contains_text(const std::string& text) {
    return Catch::Matchers::ContainsSubstring(text);
}
#else
#    include <catch2/catch.hpp>
inline auto contains_text(const std::string& text) {
    return Catch::Matchers::Contains(text);
}
#endif

/// SKIP exists from Catch2 3.3 on. Elsewhere the test ends here, says so, and counts as passed.
#if defined(SKIP)
#    define KVCULL_SKIP(message) SKIP(message)
#else
#    define KVCULL_SKIP(message)          \
        do {                              \
            WARN("skipped: " << message); \
            return;                       \
        } while (false)
#endif
