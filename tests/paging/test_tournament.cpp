#include "kvcull/paging/tournament.hpp"

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kvcull/base/memory.hpp"
#include "support/catch.hpp"

namespace {

using namespace kvcull;

struct Key {
    std::uint64_t value = 0, time = 0;
};
bool goes_before(const Key& a, const Key& b) {
    return a.value != b.value ? a.value > b.value : a.time < b.time;
}

}  // namespace

TEST_CASE("a tournament is won by the largest value, and of equal ones by the earliest time", "[property]") {
    for (const std::size_t slots : {1U, 2U, 7U, 8U, 9U, 15U, 16U, 63U, 64U, 65U, 513U}) {
        INFO("slots " << slots);
        SplitMix64 random{slots};
        detail::Tournament tournament(slots);
        std::vector<Key> keys(slots);
        for (std::uint64_t now = 1; now < 3000; ++now) {
            const auto slot = static_cast<slot_t>(random() % slots);
            // Sometimes it leaves; few or many values; not always later than all before.
            keys[slot] = {random() % 5 == 0 ? 0 : 1 + random() % (now % 2 == 0 ? 3 : 1000),
                          1000 * now - random() % 100'000 * (random() % 2)};
            tournament.date(slot, keys[slot].time);
            tournament.set(slot, keys[slot].value);
            Key best = keys[0];
            for (const Key& key : keys)
                if (goes_before(key, best)) best = key;
            if (best.value == 0) continue;
            const Key& winner = keys[tournament.winner()];
            REQUIRE(winner.value == best.value);
            REQUIRE(winner.time == best.time);
        }
    }
}
