#include "kvcull/base/pages.hpp"

#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#include "support/catch.hpp"
#include "support/resident.hpp"

using kvcull::Pages;

namespace {
constexpr std::size_t mib = std::size_t{1} << 20U;
}

TEST_CASE("pages are whole, aligned and writable", "[contract]") {
    const std::size_t page = Pages::page_bytes();
    const std::size_t bytes = GENERATE_COPY(std::size_t{1}, page - 1, page, page + 1, 5 * page);
    Pages pages(bytes);
    REQUIRE(pages.bytes() == (bytes + page - 1) / page * page);
    REQUIRE(reinterpret_cast<std::uintptr_t>(pages.data()) % page == 0);
    std::memset(pages.data(), 7, pages.bytes());
    REQUIRE(pages.data()[pages.bytes() - 1] == std::byte{7});
}

TEST_CASE("no pages and impossible sizes are legal or std::bad_alloc", "[contract]") {
    REQUIRE(Pages(0).data() == nullptr);
    REQUIRE(Pages().bytes() == 0);
    REQUIRE_THROWS_AS(Pages(SIZE_MAX), std::bad_alloc);
    REQUIRE_THROWS_AS(Pages(SIZE_MAX / 4), std::bad_alloc);
}

TEST_CASE("moved pages have one owner", "[contract]") {
    Pages a(1);
    std::byte* data = a.data();
    Pages b(std::move(a));
    REQUIRE(a.data() == nullptr);
    REQUIRE(b.data() == data);
    Pages c(3 * Pages::page_bytes());
    c = std::move(b);
    REQUIRE(b.data() == nullptr);
    REQUIRE(b.bytes() == 0);
    REQUIRE(c.data() == data);
    REQUIRE(c.bytes() == Pages::page_bytes());
}

TEST_CASE("discard loses the whole pages of a range and not a byte around them", "[contract]") {
    const std::size_t page = Pages::page_bytes();
    Pages pages(4 * page);
    std::memset(pages.data(), 1, pages.bytes());
    REQUIRE_FALSE(pages.discard(1, page - 1));         // ends with the page it cannot have
    REQUIRE_FALSE(pages.discard(page + 1, page - 1));  // likewise, further on
    REQUIRE_FALSE(pages.discard(page, 0));
    if (!pages.discard(page - 1, 2 * page + 2)) KVCULL_SKIP("this system gives no pages back in parts");
    for (const std::size_t kept : {std::size_t{0}, page - 1, 3 * page, 4 * page - 1}) {
        CAPTURE(kept);
        REQUIRE(pages.data()[kept] == std::byte{1});
    }
    std::memset(pages.data() + page, 2, 2 * page);  // the addresses are still good
    REQUIRE(pages.data()[2 * page] == std::byte{2});
}

TEST_CASE("discarded and unmapped pages leave the process", "[contract]") {
    if (!resident_bytes()) KVCULL_SKIP("no /proc/self/statm");
    Pages pages(64 * mib);
    std::memset(pages.data(), 1, pages.bytes());
    const std::size_t full = *resident_bytes();
    if (!pages.discard(0, 32 * mib)) KVCULL_SKIP("this system gives no pages back in parts");
    const std::size_t half = *resident_bytes();
    pages.unmap();
    const std::size_t none = *resident_bytes();
    REQUIRE(half + 31 * mib < full);
    REQUIRE(none + 31 * mib < half);
    REQUIRE(pages.bytes() == 0);
}
