#pragma once
/// One KV head whose rows live in pages of a tier: a token policy says within a budget which pages stay at
/// all, and its scores tell the page cache which of them to keep in fast memory.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <exception>
#include <limits>
#include <memory>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../paging/guard.hpp"
#include "../paging/memory_store.hpp"
#include "../paging/quest.hpp"
#include "../score/state.hpp"
#include "../select/budget.hpp"
#include "../select/plan.hpp"
#include "../select/reduce.hpp"
#include "page_attention.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Ranks the rows of a head by what it saw of their attention, or by the rows themselves at the decision.
template <class P>
concept PagePolicy = Policy<P> && !SequenceState<P> && !SideInput<P> && !Selects<P> && !Cuts<P> &&
                     !Finishes<P> && !Forgets<P> && !Lookahead<P>;

/// Predicts by scores: the page with the lowest is needed last. What has none yet is needed first.
class PageScores {
  public:
    PageScores() : value_(std::make_shared<std::unordered_map<page_t, double>>()) {}
    [[nodiscard]] double next(page_t page, std::uint64_t /*now*/) const {
        const auto found = value_->find(page);
        return found != value_->end() ? found->second : std::numeric_limits<double>::lowest();
    }
    void set(page_t page, double score) { (*value_)[page] = -score; }
    void erase(page_t page) { value_->erase(page); }

  private:
    std::shared_ptr<std::unordered_map<page_t, double>> value_;  // shared: copies predict alike
};

struct PagedHeadOptions {
    std::size_t group = 1;  ///< query heads of the KV head
    /// Rows that may stay, in `tokens`: at least a page. They leave in whole pages, so that up to a page
    /// fewer than the budget do.
    Budget budget = {};
    /// Pages that a step reads; those with its own tokens are always among them. Default: all.
    PageChoice read{.count = unlimited};
    float scale = 0.0F;     ///< of the logits; 0: 1 / sqrt(head_dim)
    page_t first_page = 0;  ///< pages get ids from here on
};

/// Frames hold the pages in use, the store the others, and what the policy drops is nowhere: pages leave
/// whole, by the mean score of their rows; a page's summed score is the prediction that the cache follows.
///
/// A policy that asks for attention (H2O) is scored after every call, from weights alone:
/// pages that a step did not read gave it none. Any other (SnapKV) is scored when it is due, over all rows,
/// which are brought through the frames once and copied. While it observes, a policy sees queries, weights
/// and positions; keys and values read as NaN, and scores that are NaN are refused.
///
/// Memory beside frames and store: 2 head_dim floats per page, and 4 bytes per row and the policy's state.
template <PagePolicy P, PageCache Cache = Guard<>, ShowsFrames Store = MemoryStore>
class PagedHead {
  public:
    using Tier = PageTier<Cache, Store, PageScores>;
    /// A page in use; all but the last one are full.
    struct Page {
        page_t id = 0;
        std::size_t bound = 0;  ///< its number in `bounds()`
        std::size_t rows = 0;
    };

    /// @throws config_error if layout, frames, budget or policy do not fit, or the policy decides for heads
    /// together or asks for more than attention; shape_error if the store has fewer frames than the cache.
    PagedHead(PageLayout layout, P policy, PagedHeadOptions options, Cache cache, Store store)
        : layout_(layout),
          policy_(std::move(policy)),
          options_(std::move(options)),
          tier_(std::move(cache), std::move(store), scores_),
          bounds_(layout.head_dim),
          nan_row_(std::max(layout.head_dim, layout.values()), quiet_nan()),
          next_page_(options_.first_page) {
        using detail::check;
        constexpr auto where = "PagedHead";
        check<error::config_error>(options_.group >= 1, where, "group", options_.group, "at least 1");
        check<error::config_error>(layout_.page_tokens >= 1, where, "page_tokens", layout_.page_tokens,
                                   "at least 1");
        constexpr std::size_t most_bytes = std::numeric_limits<index_t>::max();
        check<error::config_error>(layout_.page_tokens <= most_bytes / layout_.token_bytes(), where,
                                   "page_tokens", layout_.page_tokens,
                                   detail::text("pages of at most ", most_bytes, " bytes"));
        const std::size_t last = tier_.cache().slots() - 1,
                          frame = tier_.store().frame(static_cast<slot_t>(last)).size();
        check<error::config_error>(frame >= layout_.bytes(), where, "bytes of a frame", frame,
                                   detail::text("at least the ", layout_.bytes(), " of a page"));
        detail::check_budget(options_.budget);
        check<error::config_error>(options_.budget.bytes == 0, where, "budget.bytes", options_.budget.bytes,
                                   "0: a number of tokens");
        check<error::config_error>(is_finite(options_.scale), where, "scale", options_.scale,
                                   "a finite number");
        check<error::config_error>(options_.budget.tokens >= layout_.page_tokens, where, "budget.tokens",
                                   options_.budget.tokens,
                                   detail::text("at least a page of ", layout_.page_tokens));
        check<error::config_error>(options_.read.count >= options_.read.sinks &&
                                       options_.read.count - options_.read.sinks >= options_.read.recent,
                                   where, "read.count", options_.read.count, "at least its sinks + recent");
        if constexpr (Scoped<P>)
            check<error::config_error>(policy_.scope() == Scope::head, where, "scope of the policy",
                                       "several heads", "one head");
        if constexpr (Checked<P>) policy_.check(options_.budget.tokens);
        for (const Phase phase : {Phase::prompt, Phase::decode}) {
            const Needs needs = policy_.needs(phase);
            check<error::config_error>(!needs.logits && !needs.output, where, "needs of the policy",
                                       "logits or outputs", "queries and attention");
        }
    }

    /// c tokens enter, attend to the pages that are read, their own rows causally, and the policy decides.
    /// @param q    [group * c, head_dim]: row g * c + i is token i under query head g
    /// @param k, v [c, head_dim], [c, value_dim] @param out  [group * c, value_dim], overwritten
    /// @param phase, prompt_end  as the policy is told: the last call of a prompt says so
    /// @throws shape_error before anything changed; what the tier and its store throw: rows that entered stay
    /// then, `out` is unspecified, and pages that could not be erased are left for the next decision;
    /// state_error if the policy's scores are NaN.
    void step(MatrixView<const float> q, MatrixView<const float> k, MatrixView<const float> v,
              MatrixView<float> out, Phase phase = Phase::decode, bool prompt_end = false) {
        check_step(q, k, v, out);
        append(k, v);
        attend(q, k.rows, out, policy_.needs(phase).attention);
        observe(q, k.rows, phase);
        const bool attention_fed = policy_.needs(Phase::decode).attention;
        since_ = phase == Phase::decode ? since_ + k.rows : 0;
        const bool evicts = due(phase, prompt_end, k.rows);
        if (attention_fed || evicts) score(!attention_fed);
        if (evicts) evict();
    }

    [[nodiscard]] std::size_t rows() const noexcept { return positions_.size(); }
    /// Of the rows, ascending.
    [[nodiscard]] std::span<const position_t> positions() const noexcept { return positions_; }
    [[nodiscard]] std::span<const Page> pages() const noexcept { return pages_; }
    [[nodiscard]] const PageBounds& bounds() const noexcept { return bounds_; }
    [[nodiscard]] const PageScores& page_scores() const noexcept { return scores_; }
    [[nodiscard]] const typename P::State& state() const noexcept { return state_; }
    [[nodiscard]] const Tier& tier() const noexcept { return tier_; }
    /// Waves of the last step.
    [[nodiscard]] std::size_t waves() const noexcept { return waves_; }

  private:
    void check_step(const MatrixView<const float>& q, const MatrixView<const float>& k,
                    const MatrixView<const float>& v, const MatrixView<float>& out) const {
        using detail::check_size;
        constexpr auto where = "PagedHead::step";
        detail::check<error::shape_error>(k.rows >= 1, where, "k.rows", k.rows, "at least 1");
        check_size(where, "k.cols", k.cols, layout_.head_dim);
        check_size(where, "v.rows", v.rows, k.rows);
        check_size(where, "v.cols", v.cols, layout_.values());
        check_size(where, "q.rows", q.rows, options_.group * k.rows);
        check_size(where, "q.cols", q.cols, layout_.head_dim);
        check_size(where, "out.rows", out.rows, q.rows);
        check_size(where, "out.cols", out.cols, layout_.values());
    }

    void append(const MatrixView<const float>& k, const MatrixView<const float>& v) {
        for (std::size_t i = 0; i < k.rows;) {
            if (pages_.empty() || pages_.back().rows == layout_.page_tokens) {
                tier_.step({}, next_page_);
                const std::size_t bound = free_bounds_.empty() ? bounds_.pages() : free_bounds_.back();
                if (!free_bounds_.empty()) free_bounds_.pop_back();
                pages_.push_back({next_page_++, bound, 0});
            } else {
                tier_.step(std::span(&pages_.back().id, 1));
            }
            const detail::OpenStep open(tier_);
            Page& page = pages_.back();
            const std::span<std::byte> frame = tier_.store().frame(tier_.frame(page.id));
            const std::size_t count = std::min(layout_.page_tokens - page.rows, k.rows - i);
            for (std::size_t j = 0; j < count; ++j, ++i) {
                layout_.put(frame, page.rows + j, k[i].data(), v[i].data(), simd::kernels());
                positions_.push_back(next_position_++);
            }
            tier_.mark_dirty(page.id);
            // As they are stored: what rounding did to a key counts.
            const std::size_t row_bytes = kvcull::row_bytes(layout_.dtype, layout_.head_dim);
            bounds_.add(page.bound, RowsView(frame.data() + page.rows * row_bytes, layout_.dtype, count,
                                             layout_.head_dim, elements(layout_.dtype, layout_.head_dim)));
            page.rows += count;
            resize_state(state_, positions_.size());
        }
    }

    /// Reads the pages that the choice names; `read_` are their indices.
    void choose(const MatrixView<const float>& q, std::size_t tokens) {
        const std::size_t first = positions_.size() - tokens;  // the first page with new rows
        PageChoice choice = options_.read;
        choice.recent = std::max(choice.recent, pages_.size() - first / layout_.page_tokens);
        choice.sinks = std::min(choice.sinks, pages_.size());
        choice.count = std::max(choice.count, choice.sinks + choice.recent);
        page_score_.assign(pages_.size(), 0.0F);
        if (choice.count < pages_.size())
            for (std::size_t i = 0; i < pages_.size(); ++i)
                page_score_[i] = bounds_.score(pages_[i].bound, q);
        read_ = choose_pages(page_score_, choice);
    }
    void attend(const MatrixView<const float>& q, std::size_t tokens, const MatrixView<float>& out,
                bool weights) {
        choose(q, tokens);
        wanted_.clear();
        std::size_t n = 0;
        for (const std::size_t i : read_) {
            wanted_.push_back({pages_[i].id, pages_[i].rows});
            n += pages_[i].rows;
        }
        ends_.resize(q.rows);
        for (std::size_t row = 0; row < q.rows; ++row) ends_[row] = n - tokens + row % tokens + 1;
        lse_.resize(q.rows);
        PagedOutput want{out, lse_};
        read_weights_ = {};
        if (weights) want.attention = read_weights_ = {weights_.get(q.rows * n), q.rows, n};
        waves_ = attention_(tier_, layout_, wanted_, q, ends_, rule(), want);
    }

    /// The policy sees the last tokens of the call that it asks for.
    void observe(const MatrixView<const float>& q, std::size_t added, Phase phase) {
        const std::size_t n = positions_.size(), tokens = std::min(policy_.needs(phase).rows, added);
        const std::size_t rows = options_.group * tokens, dim = layout_.head_dim;
        const MatrixView<float> tile_q(tile_q_.get(rows * dim), rows, dim);
        MatrixView<float> attention;
        if (!read_weights_.empty()) attention = {tile_weights_.get(rows * n), rows, n};
        tile_lse_.resize(rows);
        visible_.resize(rows);
        for (std::size_t row = 0; row < rows; ++row) {
            const std::size_t token = added - tokens + row % tokens, from = row / tokens * added + token;
            std::copy_n(q[from].data(), dim, tile_q[row].data());
            tile_lse_[row] = lse_[from];
            visible_[row] = {0, 0, n - added + token + 1};
            if (attention.empty()) continue;
            std::fill(attention[row].begin(), attention[row].end(), 0.0F);
            const float* weight = read_weights_[from].data();
            for (const std::size_t i : read_) {
                std::copy_n(weight, pages_[i].rows, attention[row].data() + i * layout_.page_tokens);
                weight += pages_[i].rows;
            }
        }
        HeadStep step = head_step(phase);
        step.added = added;
        step.first = added - tokens;
        step.tokens = tokens;
        step.q = tile_q;
        step.attention = attention;
        step.lse = tile_lse_;
        step.visible = visible_;
        policy_.observe(state_, step);
    }
    /// Without rows: keys and values read as NaN.
    [[nodiscard]] HeadStep head_step(Phase phase) {
        const std::size_t n = positions_.size();
        return {.phase = phase,
                .group = options_.group,
                .next_position = next_position_,
                .cached = {RowsView(nan_row_.data(), n, layout_.head_dim, 0),
                           RowsView(nan_row_.data(), n, layout_.values(), 0), PositionsView(positions_)},
                .scale = rule().scale,
                .kernels = &simd::kernels(),
                .workspace = &workspace_,
                .wrapper_workspace = &wrapper_workspace_};
    }

    [[nodiscard]] bool due(Phase phase, bool prompt_end, std::size_t tokens) const {
        const std::size_t n = positions_.size();
        const Budget& budget = options_.budget;
        if constexpr (Triggered<P>)
            return policy_.due(Moment{.phase = phase,
                                      .prompt_end = prompt_end,
                                      .seen = static_cast<std::size_t>(next_position_),
                                      .tokens = tokens,
                                      .since = since_,
                                      .rows = n,
                                      .budget = budget.tokens,
                                      .slack = budget.slack});
        else
            return n > budget.tokens && n - budget.tokens > budget.slack;
    }
    [[nodiscard]] Protected protection() const {
        const Protected rows = protected_rows(policy_, options_.budget.tokens);
        return {std::max(rows.sinks, options_.budget.sinks), std::max(rows.recent, options_.budget.recent)};
    }

    /// Scores every row; every page's sum is what is predicted of it from now on.
    void score(bool with_rows) {
        HeadStep step = head_step(Phase::decode);
        step.protect = protection();
        if (with_rows) gather(step.cached);
        score_.resize(positions_.size());
        policy_.score(state_, step, score_);
        const float* score = score_.data();
        for (const Page& page : pages_) {
            double sum = 0;
            for (std::size_t row = 0; row < page.rows; ++row, ++score) {
                detail::check<error::state_error>(!is_nan(*score), "PagedHead", "score of a row", "NaN",
                                                  "a policy that does not read rows while it observes");
                sum += static_cast<double>(*score);
            }
            scores_.set(page.id, sum);
        }
    }
    /// Copies of all pages, for a policy that reads keys and values when it scores.
    void gather(HeadView& cached) {
        std::byte* copy = copies_.get(pages_.size() * layout_.bytes());
        copied_.clear();
        for (const Page& page : pages_) {
            tier_.step(std::span(&page.id, 1));
            const detail::OpenStep open(tier_);
            std::copy_n(tier_.store().frame(tier_.frame(page.id)).data(), layout_.bytes(), copy);
            copied_.push_back(copy);
            copy += layout_.bytes();
        }
        cached.k = layout_.keys(copied_, positions_.size());
        cached.v = layout_.values(copied_, positions_.size());
    }

    void evict() {
        const Candidates head{score_, PositionsView(positions_), options_.budget.tokens, protection()};
        reducer_({.block_rows = layout_.page_tokens}, 1, {&head, 1}, {}, {&keep_, 1});
        rows_.clear();
        std::exception_ptr failed;
        std::size_t count = 0, first = 0;
        for (auto kept = keep_.begin(); const Page page : pages_) {
            const std::size_t end = first + page.rows;
            bool stays = kept != keep_.end() && static_cast<std::size_t>(*kept) < end;
            if (!stays) {
                try {
                    erase(page);
                } catch (...) {
                    failed = std::current_exception();
                    stays = true;
                }
            }
            if (stays) pages_[count++] = page;
            for (; first < end; ++first) {
                if (stays) rows_.push_back(static_cast<index_t>(first));
                if (kept != keep_.end() && static_cast<std::size_t>(*kept) == first) ++kept;
            }
        }
        pages_.resize(count);
        moves_.clear();
        detail::append_moves(Compaction::ascending, rows_, moves_);
        move_state(state_, moves_, rows_.size());
        for (const Move& move : moves_)
            positions_[static_cast<std::size_t>(move.to)] = positions_[static_cast<std::size_t>(move.from)];
        positions_.resize(rows_.size());
        since_ = 0;
        if (failed) std::rethrow_exception(failed);
    }

    void erase(const Page& page) {
        free_bounds_.reserve(free_bounds_.size() + 1);
        tier_.erase(page.id);
        bounds_.reset(page.bound);
        free_bounds_.push_back(page.bound);
        scores_.erase(page.id);
    }

    [[nodiscard]] LogitRule rule() const noexcept {
        return options_.scale != 0.0F ? options_.scale
                                      : 1.0F / std::sqrt(static_cast<float>(layout_.head_dim));
    }

    PageLayout layout_;
    P policy_;
    PagedHeadOptions options_;
    PageScores scores_;
    Tier tier_;
    typename P::State state_{};
    std::vector<position_t> positions_;  // [n]
    std::vector<Page> pages_;            // in order of position
    PageBounds bounds_;
    std::vector<std::size_t> free_bounds_;
    std::vector<float> nan_row_;
    page_t next_page_ = 0;
    position_t next_position_ = 0;
    std::size_t since_ = 0, waves_ = 0;

    // Of one call.
    PageAttention attention_;
    Reducer reducer_;
    std::vector<std::size_t> read_, ends_;
    std::vector<PageRows> wanted_;
    std::vector<float> page_score_, lse_, tile_lse_, score_;
    MatrixView<float> read_weights_;
    std::vector<Visible> visible_;
    std::vector<const std::byte*> copied_;
    std::vector<index_t> keep_, rows_;
    std::vector<Move> moves_;
    Scratch<float> weights_, tile_q_, tile_weights_, workspace_, wrapper_workspace_;
    Scratch<std::byte> copies_;
};

}  // namespace kvcull::inline KVCULL_ABI
