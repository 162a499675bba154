#include "kvcull/paging/memory_store.hpp"

#include <cstdint>
#include <limits>
#include <vector>

#include "kvcull/paging/guard.hpp"
#include "kvcull/paging/predictors.hpp"
#include "support/catch.hpp"
#include "support/failure.hpp"

namespace {

using kvcull::Frames;
using kvcull::MemoryStore;
using kvcull::page_t;
using kvcull::slot_t;
using kvcull::test::failure;
namespace error = kvcull::error;

void fill(const MemoryStore& store, slot_t frame, int value) {
    std::ranges::fill(store.frame(frame), static_cast<std::byte>(value));
}
bool holds(const MemoryStore& store, slot_t frame, int value) {
    return std::ranges::all_of(store.frame(frame),
                               [&](std::byte b) { return b == static_cast<std::byte>(value); });
}

}  // namespace

TEST_CASE("owned frames are apart, zeroed and aligned whatever the page's size", "[property]") {
    const std::size_t page_bytes = GENERATE(1U, 63U, 64U, 100U, 4096U);
    const Frames frames(5, page_bytes);
    REQUIRE(frames.size() == 5);
    for (slot_t f = 0; f < 5; ++f) {
        REQUIRE(frames[f].size() == page_bytes);
        REQUIRE(reinterpret_cast<std::uintptr_t>(frames[f].data()) % 64 == 0);
        REQUIRE(std::ranges::all_of(frames[f], [](std::byte b) { return b == std::byte{}; }));
        std::ranges::fill(frames[f], static_cast<std::byte>(f + 1));
    }
    for (slot_t f = 0; f < 5; ++f) REQUIRE(frames[f].back() == static_cast<std::byte>(f + 1));
}

TEST_CASE("the caller's frames are the caller's bytes, also after a move", "[contract]") {
    std::vector<std::byte> bytes(3 * 48);
    Frames frames(bytes, 48);
    const MemoryStore store(std::move(frames));
    fill(store, 2, 7);
    REQUIRE(bytes[2 * 48] == std::byte{7});
    REQUIRE(bytes[2 * 48 - 1] == std::byte{0});
    REQUIRE(store.frame(1).data() == bytes.data() + 48);
}

TEST_CASE("frames refuse sizes that make no frame", "[contract]") {
    std::vector<std::byte> bytes(100);
    CHECK(failure<error::config_error>([] { Frames(0, 8); }) == "Frames: count is 0, want at least 1");
    CHECK(failure<error::config_error>([] { Frames(1, 0); }) == "Frames: page_bytes is 0, want at least 1");
    CHECK(failure<error::config_error>([] { Frames(std::size_t{1} << 58U, 64); }) ==
          "Frames: count is 288230376151711744, want fewer, with page_bytes = 64");
    CHECK(failure<error::config_error>([] { Frames(3, std::numeric_limits<std::size_t>::max() - 8); }) ==
          "Frames: count is 3, want fewer, with page_bytes = 18446744073709551607");
    CHECK(failure<error::config_error>([&] { Frames(bytes, 0); }) ==
          "Frames: page_bytes is 0, want at least 1");
    CHECK(failure<error::shape_error>([&] { Frames(bytes, 48); }) ==
          "Frames: number of bytes is 100, want one or more times 48");
    CHECK(failure<error::shape_error>([&] { Frames(std::span(bytes).first(0), 48); }) ==
          "Frames: number of bytes is 0, want one or more times 48");
    const Frames frames(bytes, 50);
    CHECK(failure<error::shape_error>([&] { (void)frames[2]; }) == "Frames: frame is 2, want less than 2");
}

TEST_CASE("a memory store gives back the bytes that were written last", "[property]") {
    MemoryStore store{Frames(2, 100)};
    const page_t last = ~page_t{0};
    fill(store, 0, 1);
    store.write(0, 0);
    store.write(last, 0);
    fill(store, 0, 2);
    store.write(last, 0);
    store.read(0, 1);
    REQUIRE(holds(store, 1, 1));
    store.read(last, 1);
    REQUIRE(holds(store, 1, 2));
    REQUIRE(store.size() == 2);

    store.erase(last);
    store.erase(last);
    REQUIRE_FALSE(store.contains(last));
    REQUIRE(failure<error::state_error>([&] { store.read(last, 0); }) ==
            "MemoryStore::read: page is 18446744073709551615, want a page that was written");
    REQUIRE(failure<error::shape_error>([&] { store.write(5, 2); }) ==
            "Frames: frame is 2, want less than 2");
    REQUIRE(store.size() == 1);
}

TEST_CASE("a tier over a memory store has every page's bytes in its frame", "[property]") {
    kvcull::PageTier tier(kvcull::Guard<>(3), MemoryStore{Frames(3, 64)}, kvcull::Popularity{});
    for (page_t page = 0; page < 9; ++page) {
        tier.step({}, page);
        fill(tier.store(), tier.frame(page), static_cast<int>(page));
        tier.end_step();
    }
    for (page_t page = 0; page < 9; ++page) {
        const std::vector<page_t> pages{page, (page + 4) % 9};
        tier.step(pages);
        for (const page_t p : pages) REQUIRE(holds(tier.store(), tier.frame(p), static_cast<int>(p)));
        tier.end_step();
    }
    REQUIRE(tier.counts().fetches > 9);
}
