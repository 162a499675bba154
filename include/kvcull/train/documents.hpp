#pragma once
/// Packed sequences: several documents one after the other, none of which sees another.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "../base/error.hpp"

namespace kvcull::inline KVCULL_ABI::train {

/// Tokens `begin .. end - 1` of a sequence: a document. Its positions count from 0.
struct TokenRange {
    std::size_t begin = 0, end = 0;

    [[nodiscard]] constexpr std::size_t size() const noexcept { return end - begin; }
};

/// The documents of a sequence from a number per token: a run of equal numbers is one.
[[nodiscard]] inline std::vector<TokenRange> documents_of(std::span<const std::int64_t> number) {
    std::vector<TokenRange> all;
    for (std::size_t t = 0; t < number.size(); ++t) {
        if (t == 0 || number[t] != number[t - 1]) all.push_back({t, t});
        all.back().end = t + 1;
    }
    return all;
}

/// @throws shape_error unless the documents follow one another from token 0 to the last of `tokens`.
inline void check_documents(std::string_view where, std::span<const TokenRange> documents,
                            std::size_t tokens) {
    std::size_t end = 0;
    for (const TokenRange& document : documents) {
        detail::check_size(where, "begin of a document", document.begin, end);
        detail::check<error::shape_error>(document.end > document.begin, where, "end of a document",
                                          document.end, detail::text("beyond ", document.begin));
        end = document.end;
    }
    detail::check_size(where, "end of the last document", end, tokens);
}

}  // namespace kvcull::inline KVCULL_ABI::train
