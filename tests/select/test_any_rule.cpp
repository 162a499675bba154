#include "kvcull/select/any_rule.hpp"

#include <cstddef>
#include <span>
#include <vector>

#include "kvcull/select/head_rules.hpp"
#include "kvcull/select/layer_rules.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

using Any = AnyRule<Uniform, Pyramid, AdaKV<>>;
static_assert(ReadsPrompt<Any> && !ReadsPrompt<AnyRule<Uniform, AdaKV<>>>);

template <class R>
std::vector<std::size_t> layers(const R& rule) {
    std::vector<std::size_t> sizes(4);
    rule.layer_sizes(20, 200, {.recent = 4}, sizes);
    return sizes;
}

}  // namespace

TEST_CASE("a rule chosen at run time divides as the rule itself", "[contract]") {
    REQUIRE(layers(Any()) == std::vector<std::size_t>{20, 20, 20, 20});
    REQUIRE(layers(Any(Pyramid{.beta = 4})) == layers(Pyramid{.beta = 4}));
    REQUIRE(layers(Any(Pyramid{.beta = 4})) != layers(Any()));

    const std::vector<float> even = random_floats(30, 1), odd = random_floats(30, 2, 4.0F);
    std::vector<position_t> positions(30);
    for (std::size_t j = 0; j < 30; ++j) positions[j] = static_cast<position_t>(j);
    const std::span<const position_t> at(positions);
    const std::vector<Candidates> heads{{even, at, 10, {}}, {odd, at, 10, {}}};
    std::vector<std::size_t> want(2), got(2);
    AdaKV<>{}.head_sizes(0, heads, 10, want);
    Any(AdaKV<>{}).head_sizes(0, heads, 10, got);
    REQUIRE(got == want);
    REQUIRE(got[0] != got[1]);
    Any(Pyramid{}).head_sizes(0, heads, 10, got);
    REQUIRE(got == std::vector<std::size_t>{10, 10});
}

TEST_CASE("whether heads are divided is the rule's at hand to say", "[contract]") {
    Any rule;
    REQUIRE_FALSE(divides_heads(rule));
    rule = AdaKV<>{};
    REQUIRE(divides_heads(rule));
    rule = Pyramid{};
    REQUIRE_FALSE(divides_heads(rule));
}
