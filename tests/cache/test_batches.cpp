#include "kvcull/cache/batches.hpp"

#include <algorithm>
#include <numeric>
#include <vector>

#include "kvcull/base/memory.hpp"
#include "support/catch.hpp"
#include "support/failure.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

std::size_t padding(const std::vector<std::size_t>& lengths, const Batches& batches) {
    std::size_t sum = 0;
    for (std::size_t b = 0; b < batches.size(); ++b) {
        std::size_t longest = 0;
        for (const std::size_t i : batches[b]) longest = std::max(longest, lengths[i]);
        for (const std::size_t i : batches[b]) sum += longest - lengths[i];
    }
    return sum;
}

}  // namespace

TEST_CASE("batches hold every request once, alike lengths together, equal ones in order", "[property]") {
    SplitMix64 random{3};
    for (const std::size_t count : {1U, 2U, 17U, 40U})
        for (const std::size_t size : {1U, 4U, 40U, 100U}) {
            std::vector<std::size_t> lengths(count);
            for (std::size_t& length : lengths) length = 1 + random() % 9;
            const Batches batches = group_batches(lengths, size);
            CAPTURE(count, size);
            CHECK(batches.size() == (count + size - 1) / size);
            CHECK(batches.begin.back() == count);
            for (std::size_t b = 0; b + 1 < batches.size(); ++b) CHECK(batches[b].size() == size);
            for (std::size_t i = 1; i < count; ++i) {
                const std::size_t a = batches.order[i - 1], b = batches.order[i];
                CHECK((lengths[a] < lengths[b] || (lengths[a] == lengths[b] && a < b)));
            }
            std::vector<std::size_t> all = batches.order;
            std::sort(all.begin(), all.end());
            CHECK((all == batches_in_order(count, size).order));
            CHECK(padding(lengths, batches) <= padding(lengths, batches_in_order(count, size)));
        }
}

TEST_CASE("padding takes from the budget of the shorter prompts of a batch", "[property]") {
    const std::vector<std::size_t> lengths{10, 3, 7, 4, 5};
    CHECK((effective_budget(lengths, batches_in_order(5, 2), 8) == std::vector<std::int64_t>{8, 1, 8, 5, 8}));
    CHECK((effective_budget(lengths, group_batches(lengths, 2), 8) ==
           std::vector<std::int64_t>{8, 7, 8, 8, 6}));
    CHECK((effective_budget(lengths, batches_in_order(5, 5), 2) ==
           std::vector<std::int64_t>{2, -5, -1, -4, -3}));
}

TEST_CASE("no requests make no batches", "[property]") {
    const Batches none = group_batches({}, 3);
    CHECK(none.size() == 0);
    CHECK(effective_budget({}, none, 5).empty());
}

TEST_CASE("empty prompts, empty batches and batches of other requests are refused", "[contract]") {
    const std::vector<std::size_t> lengths{3, 0};
    CHECK(failure<error::config_error>([&] { (void)group_batches({}, 0); }) ==
          "batches_in_order: size is 0, want at least 1");
    CHECK(failure<error::shape_error>([&] { (void)group_batches(lengths, 2); }) ==
          "group_batches: length is 0, want at least 1");
    CHECK(failure<error::shape_error>([&] { (void)effective_budget(lengths, batches_in_order(3, 2), 9); }) ==
          "effective_budget: batches.order.size() is 3, want 2");
}
