// A long head's token in parts: what comes out of it and what the policy sees, against naive double loops.

#include <cstddef>
#include <string_view>
#include <tuple>
#include <vector>

#include "kvcull/cache/evictor.hpp"
#include "support/catch.hpp"
#include "support/foreign.hpp"
#include "support/reference.hpp"
#include "support/stubs.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

/// Keeps all that it is shown.
struct Watch {
    static constexpr std::string_view name = "watch";
    using State = NoState;
    Record* record = nullptr;
    bool looks = true, if_made = false;

    static constexpr auto fields() { return std::tuple{}; }
    [[nodiscard]] constexpr Needs needs(Phase /*phase*/) const {
        if (!looks) return {};
        if (if_made) return {.rows = 1, .attention_if_made = true};
        return {.rows = 1, .attention = true, .logits = true, .output = true};
    }
    static constexpr bool due(const Moment& /*moment*/) { return false; }
    void observe(State& /*state*/, const HeadStep& step) const { record->tile(step); }
    static void score(const State& /*state*/, const HeadStep& /*step*/, std::span<float> /*out*/) {}
};

constexpr std::size_t rows = 9000;

/// One decode step after `rows - 1` tokens, observed or not, against the reference. `first`: the row that the
/// window begins at.
void check(const CacheShape& shape, std::size_t first, bool looks, bool if_made = false) {
    const TokenStream stream(shape, rows, 3);
    Record record;
    Evictor evictor(shape, Watch{.record = &record, .looks = looks, .if_made = if_made});
    Foreign held(shape);
    held.append(0, stream.k(0, 0, rows - 1), stream.v(0, 0, rows - 1), 0);
    held.apply(evictor.step(0, held.layer(0), stream.q(0, 0, rows - 1)));
    evictor.end_step();
    const std::size_t gone = rows - 1 - held.positions(0, 0).size(), n = rows - gone;
    record.tiles.clear();
    const std::vector<float> out = feed(evictor, held, stream, rows - 1, 1);
    for (std::size_t h = 0; h < shape.kv_heads; ++h) {
        std::vector<float> q, k, v;
        const auto add = [](std::vector<float>& to, const float* row, std::size_t dim) {
            to.insert(to.end(), row, row + dim);
        };
        for (std::size_t g = 0; g < shape.group(); ++g)
            add(q, stream.q(0, rows - 1, 1).row(h * shape.group() + g, 0), shape.head_dim);
        for (std::size_t j = gone; j < rows; ++j) {
            add(k, stream.k(0, j, 1).row(h, 0), shape.head_dim);
            add(v, stream.v(0, j, 1).row(h, 0), shape.values());
        }
        const std::vector<Visible> visible(shape.group(), Visible{0, first - gone, n});
        const ReferenceAttention want = reference_attention(
            q, k, v, visible, n, shape.head_dim, shape.values(), static_cast<double>(shape.logit_scale()));
        const std::size_t size = shape.group() * shape.values();
        for (std::size_t i = 0; i < size; ++i) REQUIRE(close(out[h * size + i], want.output[i], 1e-4, 1e-5));
        if (shape.layer(0).window > 0) continue;  // the policy has no say there
        REQUIRE(record.tiles.size() == shape.kv_heads);
        const Record::Tile& tile = record.tiles[h];
        REQUIRE(tile.step.first_tile);
        REQUIRE(tile.step.last_tile);
        REQUIRE(tile.step.added == 1);
        REQUIRE(tile.step.next_position == static_cast<position_t>(rows));
        REQUIRE(tile.step.tokens == (looks ? 1 : 0));
        if (!looks) continue;
        REQUIRE(same_bits(tile.q, q));
        bool good = tile.visible.size() == shape.group() && tile.visible[1].end == n;
        for (std::size_t i = 0; i < want.attention.size(); ++i)
            good = good && close(tile.attention[i], want.attention[i], 1e-4, 1e-9) &&
                   (if_made || close(tile.logits[i], want.logits[i], 1e-4, 1e-5));
        for (std::size_t i = 0; i < size; ++i) good = good && same_bits(tile.output[i], out[h * size + i]);
        for (std::size_t g = 0; g < shape.group(); ++g)
            good = good && close(tile.lse[g], want.lse[g], 1e-5, 1e-5);
        REQUIRE(good);
    }
}

}  // namespace

TEST_CASE("a token over a long head in parts is attention over all its rows, and the policy sees it whole",
          "[differential]") {
    CacheShape shape{.layers = 1, .q_heads = 4, .kv_heads = 2, .head_dim = 8, .value_dim = 6};
    check(shape, 0, true);
    check(shape, 0, false);
    check(shape, 0, true, true);
    shape.traits = {{.window = 8100}};
    check(shape, rows - 8100, true);
}

TEST_CASE("which heads are cut depends on their rows alone", "[property]") {
    const CacheShape shape{.layers = 1, .q_heads = 2, .kv_heads = 2, .head_dim = 4};
    const auto parts = [&](std::size_t n, std::size_t tokens, const Executor& executor, bool output) {
        const TokenStream stream(shape, n, 4);
        Record record;
        Evictor evictor(shape, Watch{.record = &record, .looks = false});
        if (executor) evictor.set_executor(executor);
        Foreign held(shape);
        if (n > tokens) {
            held.append(0, stream.k(0, 0, n - tokens), stream.v(0, 0, n - tokens), 0);
            held.apply(evictor.step(0, held.layer(0), stream.q(0, 0, n - tokens)));
            evictor.end_step();
        }
        held.append(0, stream.k(0, n - tokens, tokens), stream.v(0, n - tokens, tokens),
                    evictor.next_position());
        Outputs out(shape, tokens);
        const LayerCall call = evictor.begin(0, held.layer(0), stream.q(0, n - tokens, tokens),
                                             output ? out.layer(0) : HeadsView<float>{});
        return evictor.parts(call, 1);
    };
    const Executor some = [](std::size_t, const std::function<void(std::size_t)>&) {};
    REQUIRE(parts(6143, 1, {}, true) == 1);
    REQUIRE(parts(6144, 1, {}, true) == 2);
    REQUIRE(parts(6144, 1, some, true) == 2);
    REQUIRE(parts(6144, 2, {}, true) == 1);
    REQUIRE(parts(6144, 1, {}, false) == 1);
}
