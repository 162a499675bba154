#include "kvcull/cache/shape.hpp"

#include <limits>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using kvcull::test::close;
using kvcull::test::failure;

TEST_CASE("a shape counts heads, groups and value channels", "[property]") {
    CacheShape shape{.layers = 3, .q_heads = 12, .kv_heads = 4, .head_dim = 16};
    REQUIRE(shape.group() == 3);
    REQUIRE(shape.heads() == 12);
    REQUIRE(shape.values() == 16);
    REQUIRE(close(shape.logit_scale(), 0.25, 1e-6, 0.0));
    shape.value_dim = 5;
    shape.scale = 0.125F;
    REQUIRE(shape.values() == 5);
    REQUIRE(close(shape.logit_scale(), 0.125, 0.0, 0.0));
    const CacheShape same = detail::checked(shape);
    REQUIRE(same.layers == 3);
    REQUIRE(same.value_dim == 5);
}

TEST_CASE("a shape that cannot be is refused by the name of its field", "[contract]") {
    const auto refused = [](auto change) {
        CacheShape shape{.layers = 1, .q_heads = 4, .kv_heads = 2, .head_dim = 8};
        change(shape);
        return failure<error::config_error>([&] { (void)detail::checked(shape); });
    };
    REQUIRE(refused([](CacheShape&) {}) == "no error");
    REQUIRE(refused([](CacheShape& s) { s.dtype = DType::f16; }) == "no error");
    REQUIRE(refused([](CacheShape& s) { s.dtype = DType::bf16; }) == "no error");
    REQUIRE(refused([](CacheShape& s) { s.layers = 0; }) == "CacheShape: layers is 0, want at least 1");
    REQUIRE(refused([](CacheShape& s) { s.layers = static_cast<std::size_t>(-1) / 2; }) ==
            "CacheShape: layers is 9223372036854775807, want at most 1073741824, with kv_heads = 2");
    REQUIRE(refused([](CacheShape& s) { s.kv_heads = 0; }) == "CacheShape: kv_heads is 0, want at least 1");
    REQUIRE(refused([](CacheShape& s) { s.head_dim = 0; }) == "CacheShape: head_dim is 0, want at least 1");
    REQUIRE(refused([](CacheShape& s) { s.q_heads = 0; }) ==
            "CacheShape: q_heads is 0, want a multiple of kv_heads = 2");
    REQUIRE(refused([](CacheShape& s) { s.q_heads = 5; }) ==
            "CacheShape: q_heads is 5, want a multiple of kv_heads = 2");
    const auto window = [&](std::size_t most) {
        return refused([&](CacheShape& s) { s.traits = {{.window = most}}; });
    };
    REQUIRE(window(2147483647) == "no error");
    REQUIRE(window(2147483648) ==
            "CacheShape: traits[0].window is 2147483648, want at most 2147483647, or 0 for none");
    REQUIRE(window(std::numeric_limits<std::size_t>::max()) ==
            "CacheShape: traits[0].window is 18446744073709551615, want at most 2147483647, or 0 for none");
    REQUIRE(refused([](CacheShape& s) { s.scale = quiet_nan(); }) ==
            "CacheShape: scale is nan, want a finite number");
    REQUIRE(refused([](CacheShape& s) { s.scale = -negative_infinity(); }) ==
            "CacheShape: scale is inf, want a finite number");
}

TEST_CASE("heads of a call are checked by the name of what differs", "[contract]") {
    const std::vector<float> data(2 * 3 * 4);
    const auto refused = [&](const float* pointer, std::size_t heads, std::size_t tokens, std::size_t dim) {
        return failure<error::shape_error>(
            [&] { detail::check_heads("f", "q", head_major(pointer, heads, tokens, dim), 2, 3, 4); });
    };
    REQUIRE(refused(data.data(), 2, 3, 4) == "no error");
    REQUIRE(refused(data.data(), 1, 3, 4) == "f: q.heads is 1, want 2");
    REQUIRE(refused(data.data(), 2, 2, 4) == "f: q.tokens is 2, want 3");
    REQUIRE(refused(data.data(), 2, 3, 5) == "f: q.dim is 5, want 4");
    REQUIRE(refused(nullptr, 2, 3, 4) == "f: q.data is null, want a pointer");
}
