#pragma once
/// Batches of prompts for hosts that pad them to one length (SkipKV): alike lengths together, so that padding
/// takes less of the budget. Caches of this library are per sequence and need no padding.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <string_view>
#include <vector>

#include "../base/error.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Batch b holds the requests order[begin[b]] .. order[begin[b + 1] - 1].
struct Batches {
    std::vector<std::size_t> order, begin;

    [[nodiscard]] std::size_t size() const noexcept { return begin.empty() ? 0 : begin.size() - 1; }
    [[nodiscard]] std::span<const std::size_t> operator[](std::size_t batch) const noexcept {
        return std::span(order).subspan(begin[batch], begin[batch + 1] - begin[batch]);
    }
};

/// `count` requests as they come, `size` per batch; the last may be short. @throws config_error for size 0.
[[nodiscard]] inline Batches batches_in_order(std::size_t count, std::size_t size) {
    detail::check<error::config_error>(size > 0, "batches_in_order", "size", size, "at least 1");
    Batches batches;
    batches.order.resize(count);
    std::iota(batches.order.begin(), batches.order.end(), std::size_t{0});
    for (std::size_t first = 0; first < count; first += size) batches.begin.push_back(first);
    batches.begin.push_back(count);
    return batches;
}

/// The same by ascending prompt length; equal lengths keep their order.
/// @throws config_error for size 0, shape_error for a prompt of no tokens
[[nodiscard]] inline Batches group_batches(std::span<const std::size_t> lengths, std::size_t size) {
    for (const std::size_t length : lengths)
        detail::check<error::shape_error>(length > 0, "group_batches", "length", length, "at least 1");
    Batches batches = batches_in_order(lengths.size(), size);
    std::stable_sort(batches.order.begin(), batches.order.end(),
                     [&](std::size_t a, std::size_t b) { return lengths[a] < lengths[b]; });
    return batches;
}

/// What padding leaves of `budget` tokens to every request: budget - (longest of its batch - its length).
/// Negative if padding takes more than all. @throws shape_error if `batches` is of other requests
[[nodiscard]] inline std::vector<std::int64_t> effective_budget(std::span<const std::size_t> lengths,
                                                                const Batches& batches, std::size_t budget) {
    detail::check_size("effective_budget", "batches.order.size()", batches.order.size(), lengths.size());
    std::vector<std::int64_t> left(lengths.size());
    for (std::size_t b = 0; b < batches.size(); ++b) {
        std::size_t longest = 0;
        for (const std::size_t request : batches[b]) longest = std::max(longest, lengths[request]);
        for (const std::size_t request : batches[b])
            left[request] =
                static_cast<std::int64_t>(budget) - static_cast<std::int64_t>(longest - lengths[request]);
    }
    return left;
}

}  // namespace kvcull::inline KVCULL_ABI
