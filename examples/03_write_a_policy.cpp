// A policy of your own: the token that was looked at longest ago goes first (an LRU cache of tokens).
#include <cstdio>
#include <kvcull/kvcull.hpp>
#include <vector>

struct LeastRecentlyAttended {
    static constexpr std::string_view name = "lra";
    struct State {
        kvcull::RowArray<float> last_look;  // one number per cached row; it moves with the rows by itself
        auto arrays() { return std::tie(last_look); }
    };

    float share = 2.0F;  // a look is a weight of `share` times the uniform one

    static constexpr auto fields() {
        return std::tuple{kvcull::Field{"share", &LeastRecentlyAttended::share}};
    }
    static constexpr kvcull::Needs needs(kvcull::Phase) {
        return {.rows = kvcull::all_rows, .attention = true};
    }

    void observe(State& state, const kvcull::HeadStep& step) const {
        for (std::size_t row = 0; row < step.attention.rows; ++row)
            for (std::size_t j = 0; j < step.visible[row].end; ++j)
                if (step.attention[row][j] * static_cast<float>(step.visible[row].end) > share)
                    state.last_look[j] = static_cast<float>(step.next_position);
    }
    static void score(const State& state, const kvcull::HeadStep&, std::span<float> out) {
        for (std::size_t j = 0; j < out.size(); ++j) out[j] = state.last_look[j];  // higher = keep
    }
};
static_assert(kvcull::Policy<LeastRecentlyAttended>);

int main() {
    const kvcull::CacheShape shape{.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 4};
    kvcull::KVCache cache(shape, LeastRecentlyAttended{.share = 1.5F},
                          kvcull::Budget{.tokens = 8, .recent = 2});

    for (int t = 0; t < 40; ++t) {  // every query looks for the keys of its own kind: t % 4
        std::vector<float> q(4, 0.0F), k(4, 0.0F), v(4, 0.0F), out(4);
        k[static_cast<std::size_t>(t) % 4] = q[static_cast<std::size_t>(t < 20 ? t % 4 : t % 2)] = 4.0F;
        cache.append(0, kvcull::head_major(k.data(), 1, 1, 4), kvcull::head_major(v.data(), 1, 1, 4));
        cache.attend(0, kvcull::head_major(q.data(), 1, 1, 4), kvcull::head_major(out.data(), 1, 1, 4));
        cache.end_step();
    }
    std::printf("kept:");
    for (const auto position : cache.positions(0, 0))
        std::printf(" %d(%d)", static_cast<int>(position), static_cast<int>(position % 4));
    std::printf("\nkinds 2 and 3 were not asked for any more: all but the newest of them are gone\n");
}
