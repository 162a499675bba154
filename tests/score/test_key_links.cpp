#include "kvcull/score/key_links.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "support/catch.hpp"
#include "support/isas.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

/// The rows of one head with their links, as an evictor would move both.
struct Head {
    std::size_t dim = 16;
    std::vector<float> keys = {};
    std::vector<position_t> positions = {};
    KeyLinks links = {};
    position_t next = 0;
    std::vector<float> memory = {};

    [[nodiscard]] std::size_t rows() const { return positions.size(); }
    [[nodiscard]] RowsView view() const { return {keys.data(), rows(), dim, dim}; }

    void append(std::span<const float> more) {
        keys.insert(keys.end(), more.begin(), more.end());
        for (std::size_t i = 0; i < more.size() / dim; ++i) positions.push_back(next++);
        resize_state(links, rows());
    }
    void keep(std::span<const index_t> rows_kept) {
        std::vector<Move> moves;
        for (std::size_t to = 0; to < rows_kept.size(); ++to) {
            const auto from = static_cast<std::size_t>(rows_kept[to]);
            if (from == to) continue;
            moves.push_back({rows_kept[to], static_cast<index_t>(to)});
            std::copy_n(keys.begin() + static_cast<std::ptrdiff_t>(from * dim), dim,
                        keys.begin() + static_cast<std::ptrdiff_t>(to * dim));
            positions[to] = positions[from];
        }
        keys.resize(rows_kept.size() * dim);
        positions.resize(rows_kept.size());
        move_state(links, moves, rows_kept.size());
    }
    void truncate(std::size_t tokens) {
        next -= static_cast<position_t>(tokens);
        std::vector<index_t> rows_kept;
        for (std::size_t j = 0; j < rows() && positions[j] < next; ++j)
            rows_kept.push_back(static_cast<index_t>(j));
        keep(rows_kept);
    }
    bool find(const simd::Kernels& kernels, const LinkRule& rule) {
        memory.assign(link_scratch(rows(), dim) + 1, 7.5F);
        const bool known = find_links(kernels, view(), PositionsView(positions), rule, links, memory.data());
        CHECK(same_bits(memory.back(), 7.5F));
        return known;
    }
    /// The same rows, of which nothing is known.
    [[nodiscard]] Head anew() const {
        Head head{dim, keys, positions, {}, next};
        resize_state(head.links, rows());
        return head;
    }
};
bool same(const KeyLinks& a, const KeyLinks& b) {
    bool equal = a.link.rows() == b.link.rows();
    for (std::size_t j = 0; equal && j < a.link.rows(); ++j)
        equal = a.link[j] == b.link[j] && same_bits(a.inverse[j], b.inverse[j]) &&
                (a.link[j] == KeyLinks::none || same_bits(a.cosine[j], b.cosine[j]));
    return equal;
}
constexpr std::size_t dim = Head{}.dim;

/// Keys of which most are like some of the others, so that links are found and lost.
std::vector<float> keys_of_topics(std::size_t count, SplitMix64& random, std::span<const float> topics) {
    std::vector<float> keys = random_floats(count * dim, random(), 0.6F);
    for (std::size_t j = 0; j < count; ++j) {
        const std::size_t topic = random() % (topics.size() / dim);
        for (std::size_t c = 0; c < dim && random() % 8 != 0; ++c)
            keys[j * dim + c] += topics[topic * dim + c];
    }
    return keys;
}

}  // namespace

TEST_CASE("links that follow the rows are those of a search from nothing, bit for bit", "[property]") {
    const std::vector<float> topics = random_floats(9 * dim, 77);
    std::size_t lost = 0, linked = 0;
    for (const simd::Isa isa : simd::all_isas) {
        if (!simd::available(isa)) continue;
        const simd::Kernels& kernels = simd::kernels_for(isa);
        for (const Retain retain : {Retain::last, Retain::first})
            for (const float threshold : {-0.2F, 0.5F, 0.8F}) {
                const LinkRule rule{threshold, retain};
                SplitMix64 random{static_cast<std::uint64_t>(threshold * 100.0F + 50.0F)};
                Head head;
                head.append(keys_of_topics(300, random, topics));
                for (std::size_t round = 0; round < 8; ++round) {
                    CAPTURE(simd::name_of(isa), retain == Retain::last, threshold, round);
                    REQUIRE(head.find(kernels, rule));
                    Head other = head.anew();
                    REQUIRE(other.find(kernels, rule));
                    REQUIRE(same(head.links, other.links));
                    for (const position_t link : head.links.link.values()) linked += link < 0 ? 1U : 0U;

                    // Any rows go, now few, now most, and with them the likes of others.
                    std::vector<index_t> kept;
                    for (std::size_t j = 0; j < head.rows(); ++j)
                        if (random() % 8 < 3 + round % 5) kept.push_back(static_cast<index_t>(j));
                    head.keep(kept);
                    for (const position_t link : head.links.link.values())
                        if (link < 0 && detail::row_of(PositionsView(head.positions), ~link) == head.rows())
                            ++lost;
                    // Tokens are taken back, and others take their positions.
                    if (round % 3 == 1) head.truncate(40);
                    head.append(keys_of_topics(random() % 200, random, topics));
                }
            }
    }
    CHECK(linked > 1000);
    CHECK(lost > 100);
}

TEST_CASE("links by one rule say nothing of another", "[property]") {
    SplitMix64 random{3};
    Head head;
    head.append(keys_of_topics(200, random, random_floats(5 * dim, 8)));
    REQUIRE(head.find(simd::kernels(), {0.5F, Retain::last}));
    for (const LinkRule& rule : {LinkRule{0.7F, Retain::last}, LinkRule{0.7F, Retain::first}}) {
        REQUIRE(head.find(simd::kernels(), rule));
        Head other = head.anew();
        REQUIRE(other.find(simd::kernels(), rule));
        CHECK(same(head.links, other.links));
    }
}

TEST_CASE("a key that is not finite stays unseen, and the others are found once it has gone", "[property]") {
    SplitMix64 random{4};
    const LinkRule rule{};
    Head head;
    head.append(keys_of_topics(150, random, random_floats(5 * dim, 9)));
    REQUIRE(head.find(simd::kernels(), rule));
    std::vector<float> bad = keys_of_topics(20, random, random_floats(5 * dim, 9));
    bad[7 * dim + 3] = quiet_nan();
    head.append(bad);
    CHECK_FALSE(head.find(simd::kernels(), rule));
    CHECK(head.links.link[157] == KeyLinks::unseen);
    std::vector<index_t> kept(170);
    std::iota(kept.begin(), kept.end(), 0);
    kept.erase(kept.begin() + 157);
    head.keep(kept);
    REQUIRE(head.find(simd::kernels(), rule));
    Head other = head.anew();
    REQUIRE(other.find(simd::kernels(), rule));
    CHECK(same(head.links, other.links));
}

namespace {

/// The kernels of an instruction set, with or without the screen by products of integers.
simd::Kernels screening(simd::Isa isa, bool screens) {
    simd::Kernels kernels = simd::kernels_for(isa);
    kernels.fast_integers = screens;
    return kernels;
}
/// A unit key in the plane of two, whose cosine with the first is `cosine`.
std::vector<float> at_angle(std::span<const float> first, std::span<const float> other, double cosine) {
    const auto dot = [](std::span<const float> a, std::span<const float> b) {
        return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
    };
    const double share = dot(first, other) / dot(first, first);
    std::vector<float> across(other.begin(), other.end());
    for (std::size_t c = 0; c < across.size(); ++c) across[c] -= static_cast<float>(share) * first[c];
    const double length = std::sqrt(dot(first, first)), across_length = std::sqrt(dot(across, across));
    for (std::size_t c = 0; c < across.size(); ++c)
        across[c] = static_cast<float>(cosine * static_cast<double>(first[c]) / length +
                                       std::sqrt(1.0 - cosine * cosine) * static_cast<double>(across[c]) /
                                           (across_length + 1e-20));
    return across;
}
enum class Likeness : std::uint8_t { random, alike, at_threshold, odd };
/// Keys that are like few or all others, by a hair like some of them or not, or of odd sizes.
std::vector<float> keys_with(Likeness likeness, std::size_t width, std::size_t count, float threshold,
                             SplitMix64& random) {
    std::vector<float> keys = random_floats(count * width, random());
    const std::vector<float> hubs = random_floats(3 * width, 12);
    for (std::size_t j = 0; j < count; ++j) {
        const std::span<float> key = std::span(keys).subspan(j * width, width);
        if (likeness == Likeness::alike) key[0] += 10.0F;
        if (likeness == Likeness::at_threshold) {
            const std::size_t hub = random() % 3;
            const double cosine = static_cast<double>(threshold) + (random.uniform() - 0.5) * 2e-3;
            const std::vector<float> near =
                at_angle(std::span(hubs).subspan(hub * width, width), key, cosine);
            std::copy(near.begin(), near.end(), key.begin());
            if (j % 16 == 0)
                std::copy_n(hubs.begin() + static_cast<std::ptrdiff_t>(hub * width), width, key.begin());
        }
        if (likeness == Likeness::odd) {
            const float scale = std::array{0.0F, 1e-30F, 1e-9F, 1.0F, 1e18F, 1e38F}[random() % 6];
            for (float& x : key) x = random() % 4 == 0 ? x * scale : 0.01F * x * scale;
        }
    }
    return keys;
}
/// The links by every pair of keys, one product at a time; with itself a key has cosine 0.
bool are_links(const simd::Kernels& kernels, const Head& head, const LinkRule& rule) {
    const std::size_t n = head.rows();
    std::vector<float> unit(n * head.dim, 0.0F);
    for (std::size_t j = 0; j < n; ++j)
        kernels.weighted_sum_f32(&head.links.inverse[j], 1, 1, head.keys.data() + j * head.dim, head.dim, 1,
                                 head.dim, unit.data() + j * head.dim, head.dim);
    for (std::size_t j = 0; j < n; ++j) {
        position_t link = KeyLinks::none;
        float linked = 0.0F;
        for (std::size_t rank = 0; rank < n && link == KeyLinks::none; ++rank) {
            const std::size_t i = rule.retain == Retain::last ? n - 1 - rank : rank;
            float cosine = 0.0F;
            if (i != j)
                kernels.weighted_sum_f32(unit.data() + i * head.dim, head.dim, 1, unit.data() + j * head.dim,
                                         1, head.dim, 1, &cosine, 1);
            if (!(cosine > rule.threshold)) continue;
            link = ~head.positions[i];
            linked = cosine;
        }
        if (head.links.link[j] != link) return false;
        if (link < 0 && !same_bits(head.links.cosine[j], linked)) return false;
    }
    return true;
}

}  // namespace

TEST_CASE("the screen changes no bit of any link, and links are those of all pairs", "[property]") {
    for (const simd::Isa isa : available_isas())
        for (const std::size_t width : {1U, 80U, 128U, 257U})
            for (const Likeness likeness :
                 {Likeness::random, Likeness::alike, Likeness::at_threshold, Likeness::odd})
                for (const LinkRule& rule : {LinkRule{-0.3F, Retain::last}, LinkRule{0.5F, Retain::last},
                                             LinkRule{0.5F, Retain::first}}) {
                    SplitMix64 random{width + static_cast<std::uint64_t>(likeness)};
                    Head screened{width}, plain{width};
                    for (std::size_t round = 0; round < 3; ++round) {
                        const std::vector<float> fresh = keys_with(
                            likeness, width, round == 0 ? 150 : 60 + random() % 90, rule.threshold, random);
                        screened.append(fresh);
                        plain.append(fresh);
                        CAPTURE(simd::name_of(isa), width, static_cast<int>(likeness), rule.threshold,
                                rule.retain == Retain::last, round);
                        REQUIRE(screened.find(screening(isa, true), rule));
                        REQUIRE(plain.find(screening(isa, false), rule));
                        REQUIRE(same(screened.links, plain.links));
                        REQUIRE((round > 0 || are_links(simd::kernels_for(isa), screened, rule)));
                        std::vector<index_t> kept;
                        for (std::size_t j = 0; j < screened.rows(); ++j)
                            if (random() % 4 != 0) kept.push_back(static_cast<index_t>(j));
                        screened.keep(kept);
                        plain.keep(kept);
                    }
                }
}

TEST_CASE("keys are found alike to those of a tile whose own keys have their links", "[property]") {
    // Four tiles in one plane, each like its neighbours only.
    constexpr std::size_t tile = 128;
    for (const bool screens : {true, false}) {
        Head head{2};
        for (std::size_t j = 0; j < 4 * tile; ++j) {
            const double angle = static_cast<double>(j / tile) * 0.9;
            head.append(std::array{static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle))});
        }
        const simd::Kernels kernels = screening(simd::kernels().isa, screens);
        REQUIRE(head.find(kernels, {}));
        CHECK(are_links(kernels, head, {}));
        CHECK(head.links.link[0] == ~static_cast<position_t>(2 * tile - 1));
    }
}

namespace {
std::size_t products = 0;  // of channels
std::size_t screened = 0;  // keys
simd::Kernels real = {};
/// The kernels, with products counted.
simd::Kernels counting(bool screens) {
    real = screening(simd::kernels().isa, screens);
    simd::Kernels kernels = real;
    kernels.weighted_sum_f32.function = [](const float* w, std::size_t w_stride, std::size_t group,
                                           const float* v, std::size_t v_stride, std::size_t rows,
                                           std::size_t channels, float* out, std::size_t out_stride,
                                           const void* next) noexcept {
        products += group * rows * channels;
        real.weighted_sum_f32(w, w_stride, group, v, v_stride, rows, channels, out, out_stride, next);
    };
    kernels.largest_products = [](const std::uint8_t* x, std::size_t x_stride, std::size_t rows,
                                  const std::int8_t* y, const std::int32_t* start, std::size_t count,
                                  std::size_t channels, std::int32_t* out) noexcept {
        screened += rows;
        real.largest_products(x, x_stride, rows, y, start, count, channels, out);
    };
    return kernels;
}
}  // namespace

TEST_CASE("a later search multiplies new keys with all, and none if there are none", "[property]") {
    constexpr std::size_t held = 900, fresh = 30;
    const simd::Kernels kernels = counting(false);
    for (const Retain retain : {Retain::last, Retain::first}) {
        const LinkRule rule{0.95F, retain};  // hardly any is like another
        Head head;
        head.append(random_floats(held * dim, 5));
        products = 0;
        REQUIRE(head.find(kernels, rule));
        CHECK(products > held * held / 2 * dim);
        products = 0;
        REQUIRE(head.find(kernels, rule));
        CHECK(products == 0);
        head.append(random_floats(fresh * dim, 6));
        REQUIRE(head.find(kernels, rule));
        // Each pair once; keys also become unit keys by these kernels.
        CHECK(products <= (fresh + 3) * (held + 2 * fresh) * dim);
    }
}

TEST_CASE("the screen spares nearly all products of keys that are unlike, and leaves alike ones alone",
          "[property]") {
    constexpr std::size_t width = 128, held = 1024, tile = 128;
    const simd::Kernels kernels = counting(true);
    Head unlike{width};
    unlike.append(random_floats(held * width, 5));
    products = screened = 0;
    REQUIRE(unlike.find(kernels, {}));
    // A tile meets itself unscreened, and every key becomes a unit key for every tile.
    CHECK(products < (held * tile + held * (held / tile + 2)) * width);
    CHECK(screened == held * (held / tile - 1) / 2);

    SplitMix64 random{8};
    Head alike{width};
    alike.append(keys_with(Likeness::alike, width, held, 0.5F, random));
    screened = 0;
    REQUIRE(alike.find(kernels, {0.3F, Retain::last}));
    CHECK(screened <= held / 8);
}
