#pragma once
/// SnapKV: the last prompt tokens observe, and vote once on what stays.

#include <array>
#include <tuple>
#include <vector>

#include "../attention/attend.hpp"
#include "../score/concepts.hpp"
#include "../score/heard_window.hpp"
#include "../score/pool.hpp"

namespace kvcull::inline KVCULL_ABI {

/// How the query heads of a group become one vote.
enum class Group : std::uint8_t { mean, max, sum };
[[nodiscard]] constexpr auto names_of(Group /*any*/) noexcept {
    return std::array<std::string_view, 3>{"mean", "max", "sum"};
}

/// The last `capacity` query tokens of one KV head's group with their positions, oldest first.
class QueryRing {
  public:
    /// Tokens held whose position lies before `end`: tokens that were taken back do not count.
    [[nodiscard]] std::size_t size_before(position_t end) const noexcept {
        std::size_t count = size_;
        while (count > 0 && position(count - 1) >= end) --count;
        return count;
    }
    /// Of the i-th oldest token.
    [[nodiscard]] position_t position(std::size_t i) const noexcept { return positions_[slot(i)]; }
    /// Query of the i-th oldest token under head `g` of the group.
    [[nodiscard]] std::span<const float> row(std::size_t i, std::size_t g) const noexcept {
        return std::span(rows_).subspan((slot(i) * group_ + g) * dim_, dim_);
    }
    /// Head-major copy of `count` tokens from the `first` oldest on: out[group * count, dim].
    void copy_to(std::size_t first, std::size_t count, float* out) const noexcept {
        for (std::size_t g = 0; g < group_; ++g)
            for (std::size_t i = first; i < first + count; ++i, out += dim_) {
                const auto query = row(i, g);
                std::copy(query.begin(), query.end(), out);
            }
    }
    /// Takes the tokens of a tile. Allocates at the first call only.
    void push(std::size_t capacity, const HeadStep& step) {
        if (rows_.empty()) {
            capacity_ = capacity;
            group_ = step.group;
            dim_ = step.q.cols;
            rows_.resize(capacity_ * group_ * dim_);
            positions_.resize(capacity_);
        }
        const std::size_t first_row = step.n() - step.added + step.first;
        drop_from(step.cached.position[first_row]);
        for (std::size_t i = 0; i < step.tokens; ++i) {
            positions_[next_] = step.cached.position[first_row + i];
            for (std::size_t g = 0; g < group_; ++g) {
                const auto row = step.q[g * step.tokens + i];
                std::copy(row.begin(), row.end(), &rows_[(next_ * group_ + g) * dim_]);
            }
            next_ = (next_ + 1) % capacity_;
            size_ = std::min(size_ + 1, capacity_);
        }
    }

    [[nodiscard]] auto parts() noexcept { return std::tie(rows_, positions_, next_, size_); }
    [[nodiscard]] bool consistent() const noexcept {
        return size_ <= capacity_ && next_ < std::max<std::size_t>(capacity_, 1);
    }

  private:
    [[nodiscard]] std::size_t slot(std::size_t i) const noexcept {
        return (next_ + capacity_ - size_ + i) % capacity_;
    }
    void drop_from(position_t end) noexcept {
        const std::size_t count = size_before(end);
        next_ = (next_ + capacity_ - (size_ - count)) % capacity_;
        size_ = count;
    }

    std::vector<float> rows_;
    std::vector<position_t> positions_;
    std::size_t capacity_ = 0, group_ = 0, dim_ = 0, next_ = 0, size_ = 0;
};

/// Cached rows up to `position`, which are those that its token sees: rows are ascending.
[[nodiscard]] inline std::size_t rows_up_to(const PositionsView& cached, position_t position) noexcept {
    std::size_t low = 0, high = cached.size();
    while (low < high) {
        const std::size_t middle = low + (high - low) / 2;
        if (cached[middle] <= position)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/// Query tokens whose attention is held at a time while votes are counted.
inline constexpr std::size_t vote_tile = 16;

/// Floats of scratch that `window_votes` needs over n rows.
[[nodiscard]] constexpr std::size_t vote_scratch(std::size_t n) noexcept {
    return (vote_tile + 1) * (n + 1);
}

/// What one head of the group adds to the votes. @param sums [n]: its attention, summed over `tokens` tokens
inline void add_votes(std::span<const float> sums, std::size_t tokens, std::size_t group, Group reduce,
                      std::span<float> raw) noexcept {
    const float share = 1.0F / static_cast<float>(reduce == Group::mean ? tokens * group : tokens);
    for (std::size_t j = 0; j < raw.size(); ++j)
        raw[j] = reduce == Group::max ? std::max(raw[j], sums[j] * share) : raw[j] + sums[j] * share;
}

/// Votes of R query tokens of a group on the cached rows: raw[n] = reduce over the group of the mean
/// attention. `q[group * R, d]`, row g * R + i is the token at `position_of(i)` and sees the first
/// `end_of(i)` cached rows; a row with a non-finite log-sum-exp votes 0 and still counts in the mean. Cost: 2
/// G R n d flops, a pass over the keys per `vote_tile` query tokens and head.
template <class PositionOf, class EndOf>
void window_votes(const HeadStep& step, MatrixView<const float> q, const PositionOf& position_of,
                  const EndOf& end_of, Group reduce, std::span<float> raw, std::span<float> scratch) {
    const std::size_t n = step.n(), rows = q.rows / step.group;
    const std::span<float> sums = scratch.first(n);
    const std::span<float> lse = scratch.subspan(n, vote_tile);
    float* const attention = scratch.data() + n + vote_tile;
    std::array<Visible, vote_tile> visible;
    std::fill(raw.begin(), raw.end(), 0.0F);
    if (rows == 0) return;
    for (std::size_t g = 0; g < step.group; ++g) {
        std::fill(sums.begin(), sums.end(), 0.0F);
        for (std::size_t first = 0; first < rows; first += vote_tile) {
            const std::size_t count = std::min(vote_tile, rows - first);
            for (std::size_t i = 0; i < count; ++i) visible[i] = {0, 0, end_of(first + i)};
            with_logit_rule(
                step, [g](std::size_t /*row*/) { return g; },
                [&](std::size_t row) { return position_of(first + row); },
                [&](const LogitRule& rule) {
                    attend(*step.kernels, {q[g * rows + first].data(), count, q.cols, q.stride},
                           step.cached.k, step.cached.v, std::span(visible).first(count), rule,
                           {.attention = {attention, count, n}, .lse = lse.first(count), .column_sum = sums});
                });
        }
        add_votes(sums, rows, step.group, reduce, raw);
    }
}

/// SnapKV (arXiv 2404.14469): after the prompt, the attention that its last `window` tokens paid to each
/// earlier token, smoothed over neighbours, is the score; the window stays. Nothing is evicted while decoding
/// unless `decode_interval` is set: then again every so many tokens, so a head never exceeds budget +
/// interval. State: the last `window` query rows of the group; with an interval of a window or more 4 bytes
/// per token and query head. Cost: O(G w n d) at an eviction, nothing else; while decoding O(G w n), as long
/// as attention is computed here, see `HeardWindow`.
struct SnapKV {
    static constexpr std::string_view name = "snapkv";
    static constexpr bool nonnegative = true, follows_logits = true;
    struct State {
        QueryRing queries;
        HeardWindow heard;

        [[nodiscard]] auto arrays() noexcept { return heard.arrays(); }
        [[nodiscard]] auto rest() noexcept { return std::tie(queries, heard); }
    };

    std::size_t window = 32;
    std::size_t kernel = 7;
    Pool pool = Pool::max;
    Group gqa = Group::mean;
    std::size_t sinks = 0;
    std::size_t decode_interval = 0;

    static constexpr auto fields() {
        return std::tuple{
            Field{"window", &SnapKV::window}, Field{"kernel", &SnapKV::kernel},
            Field{"pool", &SnapKV::pool},     Field{"gqa", &SnapKV::gqa},
            Field{"sinks", &SnapKV::sinks},   Field{"decode_interval", &SnapKV::decode_interval}};
    }
    void check(std::size_t budget) const {
        using error::config_error;
        detail::check_kernel("SnapKV", kernel);
        detail::check<config_error>(window >= 1, "SnapKV", "window", window, "at least 1");
        detail::check<config_error>(budget > protect(budget).rows(), "SnapKV", "budget", budget,
                                    detail::text("more than window + sinks = ", protect(budget).rows()));
    }
    [[nodiscard]] constexpr Protected protect(std::size_t /*budget*/) const { return {sinks, window}; }
    static constexpr bool ordered() { return true; }
    [[nodiscard]] constexpr std::size_t workspace(std::size_t rows, std::size_t group,
                                                  std::size_t dim) const {
        return vote_scratch(rows) + group * window * dim;
    }
    [[nodiscard]] constexpr bool due(const Moment& moment) const {
        if (moment.rows <= moment.budget) return false;
        if (moment.phase == Phase::prompt) return moment.prompt_end;
        return moment.phase == Phase::decode && decode_interval > 0 && moment.since >= decode_interval;
    }
    /// Decoded tokens are listened to as well: `make_room`, a later prompt shorter than the window and
    /// `decode_interval` all ask the newest tokens.
    [[nodiscard]] constexpr Needs needs(Phase phase) const {
        return {.rows = phase == Phase::probe ? 0 : window, .attention_if_made = decode_interval >= window};
    }

    void observe(State& state, const HeadStep& step) const {
        if (step.tokens == 0) return;
        state.queries.push(window, step);
        const bool audible = !step.attention.empty();
        const std::size_t before = state.heard.follow(step, audible ? step.group : 0);
        if (step.phase != Phase::decode) return;
        const auto add = [&step](RowPlanes<float>& sums, std::size_t first, std::size_t count) {
            for (std::size_t g = 0; g < step.group; ++g)
                step.kernels->add_rows(sums[g].data(), step.attention[g * step.tokens + first].data(),
                                       step.attention.stride, count, step.n());
            return true;
        };
        state.heard.hear(window, decode_interval, before, audible, step, add);
    }
    void score(const State& state, const HeadStep& step, std::span<float> out) const {
        votes(state, step, out);
        const std::size_t candidates = out.size() - std::min(window, out.size());
        pool_scores(pool, kernel, out.first(candidates), *step.workspace);
    }
    /// The votes before pooling; out[n].
    void votes(const State& state, const HeadStep& step, std::span<float> out) const {
        const std::size_t held = state.queries.size_before(step.next_position), rows = std::min(held, window),
                          first = held - rows, dim = step.cached.k.dim();
        if (state.heard.knows(rows, step.n())) {
            const RowPlanes<float>& sums = state.heard.sums();
            std::fill(out.begin(), out.end(), 0.0F);
            for (std::size_t g = 0; g < sums.planes(); ++g) add_votes(sums[g], rows, sums.planes(), gqa, out);
            return;
        }
        const std::size_t scratch = vote_scratch(step.n());
        float* const memory = step.workspace->get(scratch + step.group * rows * dim);
        state.queries.copy_to(first, rows, memory + scratch);
        const auto end_of = [&](std::size_t i) {
            return rows_up_to(step.cached.position, state.queries.position(first + i));
        };
        window_votes(step, {memory + scratch, step.group * rows, dim},
                     [&](std::size_t i) { return state.queries.position(first + i); }, end_of, gqa, out,
                     {memory, scratch});
    }
};
static_assert(Policy<SnapKV> && Protects<SnapKV> && Triggered<SnapKV> && Ordered<SnapKV> && Checked<SnapKV>);

}  // namespace kvcull::inline KVCULL_ABI
