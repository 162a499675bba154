// Four engines of different memory follow the plans of an Evictor; a KVCache is fed the same tokens. All
// must hold the same rows at the same positions after every step.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <span>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kvcull/cache/evictor.hpp"
#include "kvcull/cache/kv_cache.hpp"
#include "kvcull/policies.hpp"
#include "kvcull/select/any_rule.hpp"
#include "kvcull/select/executors.hpp"
#include "kvcull/select/head_rules.hpp"
#include "kvcull/select/layer_rules.hpp"
#include "kvcull/select/reduce.hpp"
#include "support/catch.hpp"
#include "support/every_policy.hpp"
#include "support/failure.hpp"
#include "support/foreign.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

constexpr CacheShape shape{.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 8, .value_dim = 6};
constexpr float step = 1.0F / 32.0F;

using Rule = AnyRule<Uniform, Pyramid, BySensitivity, AdaKV<>, AdaKV<Pyramid>, HeadTable>;

/// q, k and v of a stream, rounded to what an int8 with a scale of `step` holds: quantised rows lose nothing.
class Rounded {
  public:
    Rounded(std::size_t tokens, std::uint64_t seed) {
        for (const auto& [values, dim, salt] :
             {std::tuple(&k_, shape.head_dim, 0U), std::tuple(&v_, shape.values(), 1U)}) {
            *values = random_floats(tokens * shape.heads() * dim, 2 * seed + salt);
            for (float& x : *values) x = std::round(std::clamp(x / step, -127.0F, 127.0F)) * step;
        }
    }
    [[nodiscard]] HeadsView<const float> k(std::size_t layer, std::size_t first, std::size_t count) const {
        return part(k_, shape.head_dim, layer, first, count);
    }
    [[nodiscard]] HeadsView<const float> v(std::size_t layer, std::size_t first, std::size_t count) const {
        return part(v_, shape.values(), layer, first, count);
    }

  private:
    static HeadsView<const float> part(const std::vector<float>& all, std::size_t dim, std::size_t layer,
                                       std::size_t first, std::size_t count) {
        const std::size_t stride = shape.heads() * dim;
        return {all.data() + first * stride + layer * shape.kv_heads * dim,
                shape.kv_heads,
                count,
                dim,
                dim,
                stride};
    }
    std::vector<float> k_, v_;
};

/// One KV head's memory in an engine.
struct Memory {
    virtual ~Memory() = default;
    virtual void append(const float* k, const float* v, position_t position) = 0;
    virtual void apply(const HeadPlan& plan) = 0;
    /// Valid until the next call of any member.
    virtual HeadView view() = 0;
};

/// Rows of f32 as they come, moved.
struct Plain : Memory {
    std::vector<float> k, v;
    std::vector<position_t> position;

    void append(const float* key, const float* value, position_t at) override {
        k.insert(k.end(), key, key + shape.head_dim);
        v.insert(v.end(), value, value + shape.values());
        position.push_back(at);
    }
    void apply(const HeadPlan& plan) override {
        move(plan, k, shape.head_dim);
        move(plan, v, shape.values());
        move(plan, position, 1);
    }
    HeadView view() override {
        const std::size_t n = position.size();
        return {{k.data(), n, shape.head_dim, shape.head_dim},
                {v.data(), n, shape.values(), shape.values()},
                {position}};
    }
    template <class T>
    static void move(const HeadPlan& plan, std::vector<T>& rows, std::size_t dim) {
        move_rows(plan.moves, rows.data(), dim * sizeof(T), dim * sizeof(T));
        rows.resize(plan.keep.size() * dim);
    }
};

/// Rows of int8, of which a plan knows only the size; unpacked to be seen.
struct Quantised : Plain {
    std::vector<std::int8_t> packed_k, packed_v;

    void append(const float* key, const float* value, position_t at) override {
        for (std::size_t c = 0; c < shape.head_dim; ++c) packed_k.push_back(pack(key[c]));
        for (std::size_t c = 0; c < shape.values(); ++c) packed_v.push_back(pack(value[c]));
        position.push_back(at);
    }
    void apply(const HeadPlan& plan) override {
        move(plan, packed_k, shape.head_dim);
        move(plan, packed_v, shape.values());
        move(plan, position, 1);
    }
    HeadView view() override {
        unpack(packed_k, k);
        unpack(packed_v, v);
        return Plain::view();
    }
    static std::int8_t pack(float x) { return static_cast<std::int8_t>(std::lround(x / step)); }
    static void unpack(const std::vector<std::int8_t>& from, std::vector<float>& to) {
        to.clear();
        for (const std::int8_t x : from) to.push_back(static_cast<float>(x) * step);
    }
};

/// V^T [value_dim, capacity]: a token is a column. Nobody reads beyond the last one.
struct Transposed : Plain {
    static constexpr std::size_t capacity = 256;
    std::vector<float> columns = std::vector<float>(shape.values() * capacity, quiet_nan());

    void append(const float* key, const float* value, position_t at) override {
        k.insert(k.end(), key, key + shape.head_dim);
        for (std::size_t c = 0; c < shape.values(); ++c) columns[c * capacity + position.size()] = value[c];
        position.push_back(at);
    }
    void apply(const HeadPlan& plan) override {
        move_columns(plan, MatrixView<float>(columns.data(), shape.values(), plan.rows, capacity));
        for (std::size_t c = 0; c < shape.values(); ++c)
            std::fill_n(&columns[c * capacity + plan.keep.size()], plan.rows - plan.keep.size(), quiet_nan());
        move(plan, k, shape.head_dim);
        move(plan, position, 1);
    }
    HeadView view() override {
        const std::size_t n = position.size();
        return {{k.data(), n, shape.head_dim, shape.head_dim},
                RowsView::columns(columns.data(), DType::f32, n, shape.values(), capacity),
                {position}};
    }
};

/// Never moves a row: a list says which ones are alive, and a mask over all rows that ever were says so too.
struct Listed : Plain {
    std::vector<std::size_t> alive;
    std::vector<std::uint8_t> mask, kept;
    std::vector<const std::byte*> k_rows, v_rows, positions;
    std::vector<IndexRange> runs;

    void append(const float* key, const float* value, position_t at) override {
        alive.push_back(position.size());
        mask.push_back(1);
        Plain::append(key, value, at);
    }
    void apply(const HeadPlan& plan) override {
        kept.resize(plan.rows);
        keep_mask(plan, kept);
        for (std::size_t j = 0; j < alive.size(); ++j) mask[alive[j]] = kept[j];
        removed_runs(plan, RunOrder::descending, runs);
        for (const IndexRange run : runs) alive.erase(alive.begin() + run.begin, alive.begin() + run.end);
        std::vector<std::size_t> unmasked;
        for (std::size_t j = 0; j < mask.size(); ++j)
            if (mask[j] != 0) unmasked.push_back(j);
        REQUIRE(unmasked == alive);
    }
    HeadView view() override {
        k_rows.clear();
        v_rows.clear();
        positions.clear();
        for (const std::size_t row : alive) {
            k_rows.push_back(reinterpret_cast<const std::byte*>(&k[row * shape.head_dim]));
            v_rows.push_back(reinterpret_cast<const std::byte*>(&v[row * shape.values()]));
            positions.push_back(reinterpret_cast<const std::byte*>(&position[row]));
        }
        const std::size_t n = alive.size();
        return {{k_rows.data(), 0, DType::f32, 1, n, shape.head_dim, shape.head_dim},
                {v_rows.data(), 0, DType::f32, 1, n, shape.values(), shape.values()},
                {positions.data(), 0, 1, n}};
    }
};

/// The heads of a sequence.
class Buffers {
  public:
    template <class M>
    static Buffers of() {
        Buffers buffers;
        for (std::size_t i = 0; i < shape.heads(); ++i) buffers.heads_.push_back(std::make_unique<M>());
        return buffers;
    }
    void append(std::size_t layer, const Rounded& rows, std::size_t first, std::size_t count) {
        const auto k = rows.k(layer, first, count), v = rows.v(layer, first, count);
        for (std::size_t h = 0; h < shape.kv_heads; ++h)
            for (std::size_t i = 0; i < count; ++i)
                heads_[layer * shape.kv_heads + h]->append(k.row(h, i), v.row(h, i),
                                                           static_cast<position_t>(first + i));
    }
    void apply(const Plan& plan) {
        for (std::size_t i = 0; i < plan.size(); ++i)
            heads_[plan[i].layer * shape.kv_heads + plan[i].head]->apply(plan[i]);
    }
    CacheView view() {
        views_.clear();
        for (const auto& head : heads_) views_.push_back(head->view());
        return {views_, shape.kv_heads};
    }

  private:
    std::vector<std::unique_ptr<Memory>> heads_;
    std::vector<HeadView> views_;
};

/// What a sequence holds: per head, rows [position, key, value], oldest first.
using Held = std::vector<std::vector<std::vector<float>>>;
Held held(const CacheView& view) {
    Held result;
    for (const HeadView& head : view.heads) {
        const std::vector<float> k = widened(head.k), v = widened(head.v);
        auto& rows = result.emplace_back();
        for (std::size_t j = 0; j < head.rows(); ++j) {
            auto& row = rows.emplace_back(1, static_cast<float>(head.position[j]));
            row.insert(row.end(), k.data() + j * shape.head_dim, k.data() + (j + 1) * shape.head_dim);
            row.insert(row.end(), v.data() + j * shape.values(), v.data() + (j + 1) * shape.values());
        }
        std::sort(rows.begin(), rows.end());
    }
    return result;
}

/// A prompt in chunks, decoding, a second prompt of unknown length, decoding: `check` after every call.
template <class Start, class End, class Feed>
void conversation(Start&& start, End&& end, Feed&& call) {
    std::size_t token = 0;
    const auto tokens = [&](std::size_t count, std::size_t chunk) {
        in_chunks(count, chunk, [&](std::size_t, std::size_t size) {
            call(token, size);
            token += size;
        });
    };
    start(true);
    tokens(37, 8);
    end();
    tokens(20, 1);
    start(false);
    tokens(19, 5);
    end();
    tokens(10, 1);
}

/// @returns what the cache holds at the end.
template <class P>
Held differ(P policy, Budget budget, Rule rule, bool evicts = true) {
    const Rounded rows(90, 5);
    const TokenStream stream(shape, 90, 6);  // for its queries
    std::vector<Held> cache_holds;
    {
        KVCache cache(shape, policy, budget, rule);
        const auto look = [&] {
            std::vector<HeadView> heads;
            for (std::size_t layer = 0; layer < shape.layers; ++layer)
                for (std::size_t head = 0; head < shape.kv_heads; ++head)
                    heads.push_back(cache.view(layer, head));
            cache_holds.push_back(held({heads, shape.kv_heads}));
        };
        conversation([&](bool known) { known ? cache.begin_prompt(37) : cache.begin_prompt(); },
                     [&] {
                         cache.end_prompt();
                         look();
                     },
                     [&](std::size_t first, std::size_t count) {
                         Outputs out(shape, count);
                         for (std::size_t layer = 0; layer < shape.layers; ++layer) {
                             cache.append(layer, rows.k(layer, first, count), rows.v(layer, first, count));
                             cache.attend(layer, stream.q(layer, first, count), out.layer(layer));
                         }
                         cache.end_step();
                         look();
                     });
    }
    for (const bool listed : {false, true}) {
        Evictor evictor(shape, policy, budget, rule);
        std::vector<Buffers> engines;
        if (listed) {  // closes gaps, so its rows stay ascending
            evictor.keep_ascending();
            engines.push_back(Buffers::of<Listed>());
        } else {
            engines.push_back(Buffers::of<Plain>());
            engines.push_back(Buffers::of<Quantised>());
            engines.push_back(Buffers::of<Transposed>());
        }
        std::size_t looks = 0, evictions = 0;
        const auto apply = [&](const Plan& plan) {
            evictions += plan.size();
            for (Buffers& engine : engines) engine.apply(plan);
        };
        const auto look = [&] {
            CAPTURE(P::name, listed, looks);
            for (Buffers& engine : engines) REQUIRE((held(engine.view()) == cache_holds.at(looks)));
            ++looks;
        };
        conversation([&](bool known) { known ? evictor.begin_prompt(37) : evictor.begin_prompt(); },
                     [&] {
                         apply(evictor.end_prompt(engines.back().view()));
                         look();
                     },
                     [&](std::size_t first, std::size_t count) {
                         for (std::size_t layer = 0; layer < shape.layers; ++layer) {
                             for (Buffers& engine : engines) engine.append(layer, rows, first, count);
                             apply(evictor.step(layer, engines.back().view().layer(layer),
                                                stream.q(layer, first, count)));
                         }
                         apply(evictor.end_step(engines.back().view()));
                         look();
                     });
        REQUIRE(looks == cache_holds.size());
        REQUIRE((evictions >= 3 * shape.heads() || !evicts));
    }
    return cache_holds.back();
}

}  // namespace

TEST_CASE("engines of every kind of memory hold what a cache holds after every step", "[differential]") {
    const std::vector<Rule> rules{Uniform{},
                                  Pyramid{.beta = 4},
                                  BySensitivity{.sensitivity = {1.0F, 3.0F}},
                                  AdaKV<>{},
                                  AdaKV<>{.mode = AdaMode::floor_fill, .alpha_permille = 500},
                                  AdaKV<Pyramid>{.layers = {.beta = 4}},
                                  HeadTable{.capacity = {3, 9, 0, 12}, .kv_heads = 2}};
    const std::size_t slack = GENERATE(std::size_t{0}, 3),
                      which = GENERATE(range(std::size_t{0}, std::size_t{7}));
    CAPTURE(slack, which);
    for_every_policy([&](auto policy) {
        CAPTURE(policy.name);
        const Protected own = protected_rows(policy, 12);
        if (own.sinks + own.recent >= 12 && which > 0) return;  // leaves a rule nothing to divide
        differ(policy, {.tokens = 12, .slack = slack}, rules[which], !std::is_same_v<decltype(policy), Full>);
    });
}

TEST_CASE("heads end ragged under a rule that divides them", "[differential]") {
    const Held left =
        differ(SnapKV{.window = 4, .kernel = 3, .decode_interval = 3}, {.tokens = 14}, AdaKV<>{});
    REQUIRE(left[0].size() != left[1].size());
}

TEST_CASE("wrappers and scores of every kind leave engines what they leave a cache", "[differential]") {
    SECTION("obcache") {
        differ(OBCache{.kind = OBCache::Score::joint, .recent = 3}, {.tokens = 12, .slack = 2}, Uniform{});
        differ(OBCache{.kind = OBCache::Score::value, .recent = 3, .norms = OBCache::Norms::recomputed},
               {.tokens = 12}, Uniform{});
    }
    SECTION("fast caote over a policy") {
        differ(FastCaote<H2O>{}, {.tokens = 12}, Uniform{});
    }
    SECTION("critical") {
        constexpr std::size_t width = 16, rows = shape.q_heads * shape.values();
        const std::vector<float> wo = random_floats(shape.layers * rows * width, 11);
        std::vector<MatrixView<const float>> layers;
        for (std::size_t layer = 0; layer < shape.layers; ++layer)
            layers.emplace_back(wo.data() + layer * rows * width, rows, width);
        Critical<SnapKV> policy{SnapKV{.window = 4, .kernel = 3, .decode_interval = 3}};
        policy.projection = layers;
        differ(policy, {.tokens = 14}, Uniform{});
        differ(policy, {.tokens = 14}, AdaKV<>{});
    }
}

TEST_CASE("an engine that drops the same tokens everywhere reduces scores and commits its own plan",
          "[contract]") {
    constexpr std::size_t budget = 16, block = 4, tokens = 70;
    const Rounded rows(tokens, 7);
    const TokenStream stream(shape, tokens, 8);
    Evictor evictor(shape, H2O{.recent = 2}, Budget{.tokens = budget});
    evictor.hold(true);
    evictor.keep_ascending();
    Buffers engine = Buffers::of<Plain>();
    Reducer reduce;
    std::vector<position_t> naive;
    for (std::size_t token = 0; token < tokens; ++token) {
        for (std::size_t layer = 0; layer < shape.layers; ++layer) {
            engine.append(layer, rows, token, 1);
            REQUIRE(evictor.step(layer, engine.view().layer(layer), stream.q(layer, token, 1)).empty());
        }
        evictor.end_step();
        naive.push_back(static_cast<position_t>(token));
        if (naive.size() < 2 * budget) continue;

        const CacheView view = engine.view();
        std::vector<std::vector<float>> scores(shape.heads(), std::vector<float>(naive.size()));
        std::vector<Candidates> heads;
        for (std::size_t i = 0; i < shape.heads(); ++i) {
            evictor.scores(i / shape.kv_heads, i % shape.kv_heads, view.heads[i], scores[i]);
            heads.push_back({scores[i], view.heads[i].position, budget, {0, 2}});
        }
        std::vector<std::vector<index_t>> keep(1);
        const double given_up =
            reduce({.all_layers = true, .block_rows = block}, shape.kv_heads, heads, {}, keep);
        REQUIRE(given_up > 0.0);
        REQUIRE(keep[0].size() == budget);
        Plan plan;
        for (std::size_t i = 0; i < shape.heads(); ++i)
            plan.add(i / shape.kv_heads, i % shape.kv_heads, naive.size(), keep[0],
                     evictor.compaction(i / shape.kv_heads));
        engine.apply(plan);
        evictor.commit(plan);

        std::vector<position_t> left;
        for (const index_t row : keep[0]) left.push_back(naive[static_cast<std::size_t>(row)]);
        naive = left;
        for (const HeadView& head : engine.view().heads) REQUIRE(to_vector(head.position) == naive);
        for (std::size_t layer = 0; layer < shape.layers; ++layer)
            REQUIRE(evictor.live().rows[layer * shape.kv_heads] == naive.size());
    }
    REQUIRE(naive.size() < 2 * budget);
    REQUIRE(naive.back() == static_cast<position_t>(tokens - 1));
}

TEST_CASE("an evictor with a rule and a reduction plans what scores, reducer and commit plan by hand",
          "[differential]") {
    constexpr std::size_t budget = 16, tokens = 70;
    const auto same = [&](const auto& policy, const auto& rule, const Reduction& how,
                          std::span<const std::size_t> sizes) {
        CAPTURE(how.all_layers, how.equal_counts, how.block_rows, static_cast<int>(how.by));
        const Rounded rows(tokens, 7);
        const TokenStream stream(shape, tokens, 8);
        const Budget limits{.tokens = budget, .slack = 3};
        Evictor whole(shape, policy, limits, rule, how);
        Evictor parts(shape, policy, limits, rule);
        parts.hold(true);
        if (how.block_rows > 1) parts.keep_ascending();
        Buffers one = Buffers::of<Transposed>(), other = Buffers::of<Transposed>();
        Reducer reduce;
        double given_up = 0.0;
        std::size_t decisions = 0;
        for (std::size_t token = 0; token < tokens; ++token) {
            for (std::size_t layer = 0; layer < shape.layers; ++layer) {
                one.append(layer, rows, token, 1);
                other.append(layer, rows, token, 1);
                one.apply(whole.step(layer, one.view().layer(layer), stream.q(layer, token, 1)));
                parts.step(layer, other.view().layer(layer), stream.q(layer, token, 1));
            }
            one.apply(whole.end_step(one.view()));
            parts.end_step(other.view());

            // By hand: lists for the layers that hold more than they may.
            const bool together = how.all_layers || how.equal_counts;
            for (std::size_t first = 0; first < shape.layers; first += together ? shape.layers : 1) {
                const std::size_t layers = together ? shape.layers : 1, from = first * shape.kv_heads;
                const std::size_t held = parts.live().rows[from];
                if (held <= sizes[first] + limits.slack) continue;
                ++decisions;
                const CacheView view = other.view();
                std::vector<std::vector<float>> scores(layers * shape.kv_heads, std::vector<float>(held));
                std::vector<Candidates> heads;
                for (std::size_t i = 0; i < scores.size(); ++i) {
                    const std::size_t layer = first + i / shape.kv_heads;
                    parts.scores(layer, i % shape.kv_heads, view.heads[from + i], scores[i]);
                    heads.push_back({scores[i], view.heads[from + i].position, sizes[layer],
                                     policy.protect(sizes[layer])});
                }
                std::vector<std::vector<index_t>> keep(how.all_layers ? 1 : layers);
                given_up += reduce(how, shape.kv_heads, heads, {}, keep);
                Plan plan;
                for (std::size_t i = 0; i < scores.size(); ++i)
                    plan.add(first + i / shape.kv_heads, i % shape.kv_heads, held,
                             keep[how.all_layers ? 0 : i / shape.kv_heads], parts.compaction(0));
                other.apply(plan);
                parts.commit(plan);
            }
            REQUIRE((held(one.view()) == held(other.view())));
        }
        REQUIRE(decisions > 5);
        REQUIRE(whole.given_up() == given_up);
        return given_up;
    };
    const H2O h2o{.recent = 2};
    const std::size_t uniform[] = {budget, budget};
    for (const Consensus by : {Consensus::max, Consensus::mean, Consensus::vote}) {
        REQUIRE(same(h2o, Uniform{}, {.by = by}, uniform) > 0.0);
        REQUIRE(same(h2o, Uniform{}, {.by = by, .all_layers = true}, uniform) > 0.0);
    }
    REQUIRE(same(h2o, Uniform{}, {.block_rows = 4}, uniform) > 0.0);
    REQUIRE(same(h2o, Uniform{}, {.all_layers = true, .block_rows = 4}, uniform) > 0.0);
    same(OBCache{.kind = OBCache::Score::value, .recent = 3}, Uniform{}, {}, uniform);

    const Pyramid pyramid{.beta = 4};
    const Evictor asked(shape, h2o, Budget{.tokens = budget}, pyramid);
    const std::size_t layers[] = {asked.size(0, 0), asked.size(1, 0)};
    REQUIRE(layers[0] > layers[1]);
    const std::size_t mean[] = {budget, budget}, least[] = {layers[1], layers[1]};
    same(h2o, pyramid, {}, layers);
    same(h2o, pyramid, {.all_layers = true}, mean);
    same(h2o, pyramid, {.equal_counts = true}, least);
}

TEST_CASE("a reduction of what cannot share a list is refused by name", "[contract]") {
    using error::config_error;
    const Budget budget{.tokens = 16};
    const auto says = [&](const auto& policy, const auto& rule, const Reduction& how,
                          const CacheShape& asked = shape) {
        return failure<config_error>([&] { (void)Evictor(asked, policy, budget, rule, how); });
    };
    CHECK(says(H2O{}, Uniform{}, {.block_rows = 0}) == "Reduction: block_rows is 0, want at least 1");
    CHECK(says(Tova{}, Uniform{}, {}) ==
          "Reduction: policy is tova, want one that ranks every head by itself");
    CHECK(says(Laq{}, Uniform{}, {}) == "Reduction: policy is laq, want one without a look-ahead");
    CHECK(says(H2O{}, AdaKV{}, {}) ==
          "Reduction: rule is one that divides a layer over its heads, want none: they share one list");
    CacheShape spared = shape;
    spared.traits = {{}, {.evicts = false}};
    CHECK(says(H2O{}, Uniform{}, {.all_layers = true}, spared) ==
          "Reduction: layer 1 is spared from eviction, want one like the others, as layers agree on their "
          "rows");
    CHECK(says(H2O{}, Uniform{}, {}, spared) == "no error");

    Evictor blocks(shape, H2O{}, budget, Uniform{}, Reduction{.block_rows = 4});
    REQUIRE(blocks.compaction(1) == Compaction::ascending);
    CHECK(failure<config_error>([&] { blocks.pin(0, 2); }) ==
          "pin: range is given, want none: rows go in whole blocks");
    Evictor rows(shape, H2O{}, budget, Uniform{}, Reduction{});
    rows.pin(0, 2);
    REQUIRE(rows.live().pinned.size() == 1);
}
