#include "kvcull/base/memory.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "support/catch.hpp"

using kvcull::Scratch;
using kvcull::SplitMix64;

TEST_CASE("SplitMix64 gives the published stream", "[golden]") {
    SplitMix64 zero;
    for (const std::uint64_t wanted : {0xE220A8397B1DCDAFU, 0x6E789E6AA1B965F4U, 0x06C45D188009454FU,
                                       0xF88BB8A8724C81ECU, 0x1B39896A51A8749BU}) {
        REQUIRE(zero() == wanted);
    }
    SplitMix64 other{1234567};
    for (const std::uint64_t wanted : {6457827717110365317U, 3203168211198807973U, 9817491932198370423U,
                                       4593380528125082431U, 16408922859458223821U}) {
        REQUIRE(other() == wanted);
    }
    static_assert(SplitMix64{0}() == 0xE220A8397B1DCDAFU);
}

TEST_CASE("a copied SplitMix64 continues the same stream by itself", "[property]") {
    SplitMix64 a{42};
    a();
    SplitMix64 b = a;
    const std::uint64_t next = a();
    a();
    REQUIRE(b() == next);
}

TEST_CASE("uniform numbers fill [0, 1) evenly", "[property]") {
    SplitMix64 random{7};
    std::size_t tenths[10] = {};
    double low = 1, high = 0;
    for (int i = 0; i < 100000; ++i) {
        const double x = random.uniform();
        low = std::min(low, x);
        high = std::max(high, x);
        if (x >= 0 && x < 1) ++tenths[static_cast<std::size_t>(x * 10)];
    }
    REQUIRE(low >= 0);
    REQUIRE(high < 1);
    REQUIRE(high > 0.9999);
    for (const std::size_t count : tenths) REQUIRE(std::max<std::size_t>(count, 10000) - 10000 < 500);
    for (const std::size_t count : tenths) REQUIRE(10000 - std::min<std::size_t>(count, 10000) < 500);
    static_assert(SplitMix64{0}.uniform() < 1);
}

TEST_CASE("scratch memory is 64-byte aligned for every type and size", "[contract]") {
    const std::size_t count = GENERATE(std::size_t{1}, 3, 16, 17, 1000);
    Scratch<float> floats;
    Scratch<std::uint8_t> bytes;
    Scratch<double> doubles;
    REQUIRE(reinterpret_cast<std::uintptr_t>(floats.get(count)) % 64 == 0);
    REQUIRE(reinterpret_cast<std::uintptr_t>(bytes.get(count)) % 64 == 0);
    REQUIRE(reinterpret_cast<std::uintptr_t>(doubles.get(count)) % 64 == 0);
    REQUIRE(doubles.bytes() == count * 8);
}

TEST_CASE("scratch allocates only when it must grow", "[contract]") {
    Scratch<int> scratch;
    REQUIRE(scratch.data() == nullptr);
    int* first = scratch.get(100);
    first[99] = 5;
    REQUIRE(scratch.get(10) == first);
    REQUIRE(scratch.get(100) == first);
    REQUIRE(scratch.data()[99] == 5);
    REQUIRE(scratch.bytes() == 400);
    scratch.get(101)[100] = 6;
    REQUIRE(scratch.bytes() == 404);
}

TEST_CASE("a copy of scratch starts empty, a move takes the memory, and both sides stay usable",
          "[contract]") {
    Scratch<int> scratch;
    int* data = scratch.get(8);
    Scratch<int> copy(scratch);
    REQUIRE(copy.bytes() == 0);
    copy.get(4);
    copy = scratch;
    REQUIRE(copy.bytes() == 16);
    Scratch<int> moved(std::move(scratch));
    REQUIRE(moved.data() == data);
    REQUIRE(scratch.bytes() == 0);
    REQUIRE(scratch.get(8) != nullptr);
    copy = std::move(moved);
    REQUIRE(copy.data() == data);
    REQUIRE(moved.get(1) != nullptr);
}
