#pragma once
/// Ranking by attention received: H2O (all of it), TOVA (the last row's), VATP (weighted by the value).

#include <optional>
#include <tuple>

#include "../score/received.hpp"
#include "../score/similarity.hpp"

namespace kvcull::inline KVCULL_ABI {

/// H2O, heavy hitters (arXiv 2306.14048): attention mass received since the token entered, mean over the
/// group; the newest `recent` tokens stay. State: 4 bytes per token and KV head. Cost: O(G m n) per call,
/// O(n) per score.
struct H2O {
    static constexpr std::string_view name = "h2o";
    static constexpr bool nonnegative = true;
    using State = ReceivedAttention;

    std::optional<std::size_t> recent = {};  // default: half the budget
    std::size_t sinks = 0;
    std::size_t window = 0;   // prompt rows that count, the last of each call; 0: all
    bool by_queries = false;  // divide by the rows that could see the token, as told by gapless positions
    std::size_t kernel = 1;
    Pool pool = Pool::none;

    static constexpr auto fields() {
        return std::tuple{Field{"recent", &H2O::recent}, Field{"sinks", &H2O::sinks},
                          Field{"window", &H2O::window}, Field{"by_queries", &H2O::by_queries},
                          Field{"kernel", &H2O::kernel}, Field{"pool", &H2O::pool}};
    }
    void check(std::size_t /*budget*/) const { detail::check_kernel("H2O", kernel); }
    [[nodiscard]] constexpr Protected protect(std::size_t budget) const {
        return {sinks, recent.value_or(budget / 2)};
    }
    [[nodiscard]] constexpr bool ordered() const { return pool != Pool::none && kernel > 1; }
    static constexpr std::size_t workspace(std::size_t rows, std::size_t /*group*/, std::size_t /*dim*/) {
        return rows;
    }
    [[nodiscard]] constexpr Accumulation accumulation() const {
        return {window > 0 ? Accumulation::Mode::window : Accumulation::Mode::sum, window};
    }
    [[nodiscard]] constexpr Needs needs(Phase phase) const { return accumulation().needs(phase); }

    void observe(State& state, const HeadStep& step) const { state.observe(accumulation(), step); }
    void score(const State& state, const HeadStep& step, std::span<float> out) const {
        state.write(step, out);
        if (by_queries)
            for (std::size_t j = 0; j < out.size(); ++j)
                out[j] /= static_cast<float>(step.next_position - step.cached.position[j]);
        pool_candidates(pool, kernel, step, out);
    }
};
static_assert(Policy<H2O> && Protects<H2O> && Ordered<H2O>);

/// TOVA (arXiv 2401.06104): attention of the last row, averaged over all query heads of the layer, so that
/// every KV head keeps the same tokens. Nothing is protected: the newest token competes too.
struct Tova {
    static constexpr std::string_view name = "tova";
    static constexpr bool nonnegative = true;
    using State = ReceivedAttention;
    enum class Share : std::uint8_t { layer, kv_head };
    friend constexpr auto names_of(Share /*any*/) noexcept {
        return std::array<std::string_view, 2>{"layer", "kv_head"};
    }

    Share share = Share::layer;   // who decides together
    bool protect_newest = false;  // the newest token stays
    std::size_t sinks = 0, recent = 0;
    std::size_t kernel = 1;
    Pool pool = Pool::none;

    static constexpr auto fields() {
        return std::tuple{Field{"scope", &Tova::share},   Field{"protect_newest", &Tova::protect_newest},
                          Field{"sinks", &Tova::sinks},   Field{"recent", &Tova::recent},
                          Field{"kernel", &Tova::kernel}, Field{"pool", &Tova::pool}};
    }
    void check(std::size_t /*budget*/) const { detail::check_kernel("Tova", kernel); }
    [[nodiscard]] constexpr Protected protect(std::size_t /*budget*/) const {
        return {sinks, std::max<std::size_t>(recent, protect_newest ? 1 : 0)};
    }
    [[nodiscard]] constexpr Scope scope() const {
        return share == Share::layer ? Scope::layer_shared : Scope::head;
    }
    [[nodiscard]] constexpr bool ordered() const { return pool != Pool::none && kernel > 1; }
    static constexpr std::size_t workspace(std::size_t rows, std::size_t /*group*/, std::size_t /*dim*/) {
        return rows;
    }
    static constexpr Accumulation accumulation() { return {Accumulation::Mode::replace}; }
    static constexpr Needs needs(Phase phase) { return accumulation().needs(phase); }

    static void observe(State& state, const HeadStep& step) { state.observe(accumulation(), step); }
    /// One head's share of the decision; the layer's mean of it is pooled in `finish`.
    void score(const State& state, const HeadStep& step, std::span<float> out) const {
        state.write(step, out);
        if (share == Share::kv_head) finish(step, out);
    }
    void finish(const HeadStep& step, std::span<float> score) const {
        pool_candidates(pool, kernel, step, score);
    }
};
static_assert(Policy<Tova> && Protects<Tova> && Scoped<Tova> && Ordered<Tova> && Finishes<Tova>);

/// VATP (arXiv 2406.12335): H2O's mass times the value's L1 norm. The first 20 tokens stay.
/// State: 8 bytes per token and KV head. One pass over the values of new tokens.
struct Vatp {
    static constexpr std::string_view name = "vatp";
    static constexpr bool nonnegative = true;
    struct State {
        ReceivedAttention received;
        RowArray<float> value_norm;

        [[nodiscard]] auto arrays() noexcept {
            return std::tuple_cat(received.arrays(), std::tie(value_norm));
        }
    };

    std::optional<std::size_t> recent = {};  // default: half the budget
    std::size_t sinks = 20;
    std::size_t window = 0;  // as H2O
    std::size_t kernel = 1;
    Pool pool = Pool::none;

    static constexpr auto fields() {
        return std::tuple{Field{"recent", &Vatp::recent}, Field{"sinks", &Vatp::sinks},
                          Field{"window", &Vatp::window}, Field{"kernel", &Vatp::kernel},
                          Field{"pool", &Vatp::pool}};
    }
    [[nodiscard]] constexpr H2O received() const {
        return {.recent = recent, .sinks = sinks, .window = window, .kernel = kernel, .pool = pool};
    }
    void check(std::size_t /*budget*/) const { detail::check_kernel("Vatp", kernel); }
    [[nodiscard]] constexpr Protected protect(std::size_t budget) const { return received().protect(budget); }
    [[nodiscard]] constexpr bool ordered() const { return received().ordered(); }
    static constexpr std::size_t workspace(std::size_t rows, std::size_t /*group*/, std::size_t dim) {
        return std::max(rows, dim);
    }
    [[nodiscard]] constexpr Needs needs(Phase phase) const { return received().needs(phase); }

    void observe(State& state, const HeadStep& step) const {
        if (step.phase == Phase::probe) return;
        if (step.first_tile)
            for_each_row(
                step.cached.v, step.n() - step.added, *step.workspace,
                [&](std::size_t j, std::span<const float> row) { state.value_norm[j] = l1_norm(row); });
        received().observe(state.received, step);
    }
    void score(const State& state, const HeadStep& step, std::span<float> out) const {
        state.received.write(step, out);
        for (std::size_t j = 0; j < out.size(); ++j) out[j] *= state.value_norm[j];
        pool_candidates(pool, kernel, step, out);
    }
};
static_assert(Policy<Vatp> && Protects<Vatp>);

}  // namespace kvcull::inline KVCULL_ABI
