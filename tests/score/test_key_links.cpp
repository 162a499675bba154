#include "kvcull/score/key_links.hpp"

#include <algorithm>
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

constexpr std::size_t dim = 16;

/// The rows of one head with their links, as an evictor would move both.
struct Head {
    std::vector<float> keys;
    std::vector<position_t> positions;
    KeyLinks links;
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
        Head head{keys, positions, {}, next};
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
std::size_t products = 0;  // of channels
simd::Kernels real = {};
/// The kernels, with products counted.
simd::Kernels counting() {
    real = simd::kernels();
    simd::Kernels kernels = real;
    kernels.weighted_sum_f32.function = [](const float* w, std::size_t w_stride, std::size_t group,
                                           const float* v, std::size_t v_stride, std::size_t rows,
                                           std::size_t channels, float* out, std::size_t out_stride,
                                           const void* next) noexcept {
        products += group * rows * channels;
        real.weighted_sum_f32(w, w_stride, group, v, v_stride, rows, channels, out, out_stride, next);
    };
    return kernels;
}
}  // namespace

TEST_CASE("a later search multiplies new keys with all, and none if there are none", "[property]") {
    constexpr std::size_t held = 900, fresh = 30;
    const simd::Kernels kernels = counting();
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
