// Frames for 64 of 1000 pages: Guard over a predictor, beside LRU.
#include <cstdio>
#include <kvcull/paging/guard.hpp>
#include <kvcull/paging/predictors.hpp>

int main() {
    kvcull::Guard<> cache(64, {.draws = {1}});
    kvcull::Popularity predictor;
    kvcull::Follow<kvcull::Lru> lru(64);
    kvcull::SplitMix64 random{2};

    int fetches = 0, guards = 0, lru_fetches = 0;
    for (std::uint64_t now = 0; now < 10000; ++now) {
        const double u = random.uniform();
        const auto page = static_cast<kvcull::page_t>(1000 * u * u * u);  // yours: any 64-bit ids
        const kvcull::Access access = cache.request(page, predictor.next(page, now));
        if (!access.hit) ++fetches;  // *access.victim, if any, leaves the frame access.slot; `page` enters it
        if (access.guard) ++guards;  // the predictor was wrong: a random old page went instead
        if (!lru.request(page, 0).hit) ++lru_fetches;  // LRU reads no prediction
    }
    std::printf("%d fetches under Guard (%d times it stepped in), %d under LRU\n", fetches, guards,
                lru_fetches);
}
