// Every order against a model that scans all slots.

#include "kvcull/paging/victim_order.hpp"

#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <tuple>

#include "kvcull/base/memory.hpp"
#include "kvcull/base/types.hpp"
#include "support/catch.hpp"

namespace {

using namespace kvcull;

struct Slot {
    double value = 0;
    std::uint64_t last = 0, loaded = 0;
    bool hidden = false;
};
/// Smaller goes first.
using Rank = std::tuple<double, std::uint64_t>;
template <class Order>
Rank rank(const Slot& slot) {
    if constexpr (std::is_same_v<Order, Lru>) return {0, slot.last};
    if constexpr (std::is_same_v<Order, Fifo>) return {0, slot.loaded};
    if constexpr (std::is_same_v<Order, Labels>) return {slot.value > 0.5 ? 0 : 1, slot.last};
    return {-slot.value, slot.last};
}

}  // namespace

TEMPLATE_TEST_CASE("an order names the victim that a scan of all slots names", "[property]", Lru, Fifo,
                   Labels, Furthest) {
    for (const slot_t slots : {1U, 2U, 5U, 33U, 200U, 600U}) {
        SplitMix64 random{slots};
        TestType order(slots);
        std::map<slot_t, Slot> model;
        std::map<slot_t, bool> hidden;
        for (std::uint64_t now = 0; now < 4000; ++now) {
            const auto slot = static_cast<slot_t>(random() % slots);
            switch (random() % 8) {
                case 0:
                    order.drop(slot);
                    model.erase(slot);
                    break;
                case 1:
                case 2:
                    order.hide(slot);
                    hidden[slot] = true;
                    break;
                case 3:
                case 4:
                    order.show(slot);
                    hidden[slot] = false;
                    break;
                default: {
                    const double value = static_cast<double>(random() % 4) / 3;  // many are equal
                    const bool load = !model.contains(slot) || random() % 4 == 0;
                    detail::touch(order, Served{.slot = slot, .now = now, .value = value, .hit = !load});
                    Slot& at = model[slot];
                    at.value = value;
                    at.last = now;
                    if (load) at.loaded = now;
                }
            }
            std::optional<slot_t> want;
            for (const auto& [candidate, state] : model)
                if (!hidden[candidate] && (!want || rank<TestType>(state) < rank<TestType>(model.at(*want))))
                    want = candidate;
            if (want) REQUIRE(order.victim() == *want);
        }
    }
}

TEST_CASE("values are ordered by bits: NaN as +infinity, -0 as 0") {
    using detail::ordered_bits;
    const double infinity = std::bit_cast<double>(std::uint64_t{0x7FF0000000000000U}),
                 nan = std::bit_cast<double>(std::uint64_t{0x7FF8000000000000U}),
                 negative_nan = std::bit_cast<double>(std::uint64_t{0xFFF8000000000001U}),
                 negative_infinity = std::bit_cast<double>(std::uint64_t{0xFFF0000000000000U});
    REQUIRE(ordered_bits(nan) == ordered_bits(infinity));
    REQUIRE(ordered_bits(negative_nan) == ordered_bits(infinity));
    REQUIRE(ordered_bits(-0.0) == ordered_bits(0.0));
    const double ascending[] = {negative_infinity, -1e300,  -2, -1, -1e-300, 0, 1e-300, 0.5, 1,
                                0x1.0p62,          infinity};
    for (std::size_t i = 1; i < std::size(ascending); ++i)
        REQUIRE(ordered_bits(ascending[i - 1]) < ordered_bits(ascending[i]));
    Furthest order(3);
    order.touch(0, 0, infinity);
    order.touch(1, 1, nan);
    order.touch(2, 2, 0x1.0p62);
    REQUIRE(order.victim() == 0);  // equal to slot 1, and older
    order.drop(0);
    REQUIRE(order.victim() == 1);
}
