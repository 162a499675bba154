#pragma once
/// The look-ahead of LAQ as a state machine: prefilling -> looking ahead -> decoding. The caller runs the
/// model, this keeps the two caches and the queries, so that a pseudo token leaves nothing behind.

#include <cstddef>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "kv_cache.hpp"

namespace kvcull::inline KVCULL_ABI {

/// A cache that holds the whole prompt until queries of pseudo tokens decide what stays.
///
///     LookaheadCache cache(KVCache(shape, LaqPlus{}, Budget{.tokens = 256}, pool));
///     cache.begin_prompt();
///     for (chunk ..) { for (layer ..) { cache.append(layer, k, v); cache.attend(layer, q, out); }
///     cache.end_step(); }
///     if (cache.end_prefill()) {
///         token = argmax(logits of the prompt);
///         for (i < L ..) { model step of `token` on cache.ahead(); token = argmax(its logits); }
///         cache.end_lookahead();
///     }
///     token = sample(logits of the prompt);  // the real start: as if no pseudo token had been
///     for (token ..) { for (layer ..) { cache.append(layer, k, v); cache.attend(layer, q, out); }
///     cache.end_step(); }
///
/// While looking ahead the full cache is read only. Whatever throws then, here, in the engine or in the
/// user's code, `cancel_lookahead` leaves the cache, bit for bit, as it was after the prefill. Memory: rows
/// of the full prompt in every layer and those of the fork, on the same pool. Every turn's prompt may look
/// ahead.
template <Lookahead P, BudgetRule Rule = Uniform>
class LookaheadCache {
  public:
    using Cache = KVCache<P, Rule>;
    enum class Stage : std::uint8_t { prefilling, looking_ahead, decoding };
    class Ahead;

    explicit LookaheadCache(Cache cache) : cache_(std::move(cache)), queries_(cache_.shape().layers) {}

    [[nodiscard]] Stage stage() const noexcept {
        if (fork_) return Stage::looking_ahead;
        return cache_.evictor().live().phase == Phase::prompt ? Stage::prefilling : Stage::decoding;
    }
    [[nodiscard]] const Cache& cache() const noexcept { return cache_; }
    /// For all other calls of a cache: marks, hold, pins. @throws state_error while looking ahead.
    [[nodiscard]] Cache& writable() { return open("LookaheadCache::writable"); }
    [[nodiscard]] std::size_t seen() const noexcept { return cache_.seen(); }

    // Prefilling and decoding: those of KVCache. @throws state_error while looking ahead.
    void begin_prompt(std::optional<std::size_t> total = std::nullopt) {
        open("LookaheadCache::begin_prompt").begin_prompt(total);
    }
    void append(std::size_t layer, HeadsView<const float> k, HeadsView<const float> v,
                const AppendInputs& inputs = {}) {
        open("LookaheadCache::append").append(layer, k, v, inputs);
    }
    void attend(std::size_t layer, HeadsView<const float> q, HeadsView<float> out) {
        open("LookaheadCache::attend").attend(layer, q, out);
    }
    void end_step(const StepInputs& inputs = {}) { open("LookaheadCache::end_step").end_step(inputs); }

    /// After the last chunk of a prompt. If some head holds more than its budget and eviction is not on hold,
    /// makes the fork: the rows that the policy's first stage keeps, at their positions.
    /// @returns whether pseudo tokens are wanted: then `end_lookahead` or `cancel_lookahead` must follow.
    /// @throws capacity_error, config_error or state_error; nothing has changed then.
    [[nodiscard]] bool end_prefill() {
        Cache& cache = open("LookaheadCache::end_prefill");
        Cache ended = cache.fork();
        ended.end_prompt();
        const Live<P>& live = ended.evictor().live();
        bool over = false;
        std::size_t sum = 0, bounded = 0;  // of heads that have a size: not those that the policy spares
        for (std::size_t i = 0; i < live.rows.size(); ++i) {
            over = over || live.rows[i] > live.sizes[i];
            if (live.sizes[i] == unlimited) continue;
            sum += live.sizes[i];
            ++bounded;
        }
        if (!over || live.hold) {
            cache.end_prompt();
            return false;
        }
        std::size_t rows = sum / bounded;
        if constexpr (requires { cache.policy().lookahead_rows(rows); })
            rows = cache.policy().lookahead_rows(rows);
        Cache fork = rows == unlimited ? std::move(ended) : ended.fork(ended.propose(rows));
        cache.end_prompt();
        fork_.emplace(std::move(fork));
        return true;
    }

    /// The compressed copy, which pseudo tokens enter like any cache. @throws state_error unless looking
    /// ahead.
    [[nodiscard]] Cache& fork() {
        require_looking("LookaheadCache::fork");
        return *fork_;
    }
    /// The query of a pseudo token, rotated, in one layer: once per layer and step of the fork.
    /// @param q [q_heads, 1, head_dim]
    void push_query(std::size_t layer, HeadsView<const float> q) {
        constexpr std::string_view where = "LookaheadCache::push_query";
        require_looking(where);
        const CacheShape& shape = cache_.shape();
        detail::check_layer(where, shape, layer);
        detail::check_heads(where, "q", q, shape.q_heads, 1, shape.head_dim);
        std::vector<float>& rows = queries_[layer];
        rows.reserve(rows.size() + shape.q_heads * shape.head_dim);
        for (std::size_t h = 0; h < shape.q_heads; ++h)
            rows.insert(rows.end(), q.row(h, 0), q.row(h, 0) + shape.head_dim);
    }
    /// The fork for an engine's forward pass: `attend` pushes the query too.
    [[nodiscard]] Ahead ahead() {
        require_looking("LookaheadCache::ahead");
        return Ahead(*this);
    }
    /// The queries pushed so far: [q_heads, steps, head_dim].
    [[nodiscard]] HeadsView<const float> queries(std::size_t layer) const {
        const CacheShape& shape = cache_.shape();
        detail::check_layer("LookaheadCache::queries", shape, layer);
        return token_major(queries_[layer].data(), shape.q_heads, steps(layer), shape.head_dim);
    }

    /// Lets the pushed queries decide, evicts all layers and drops the fork.
    /// @throws state_error unless every layer has one query per step of the fork, and at least one if the
    /// policy wants any; what scoring throws. The look-ahead then goes on as it was.
    void end_lookahead() {
        constexpr std::string_view where = "LookaheadCache::end_lookahead";
        require_looking(where);
        detail::check<error::state_error>(fork_->evictor().live().call_tokens == 0, where, "fork",
                                          "inside a step", "after end_step");
        const std::size_t taken = fork_->seen() - cache_.seen();
        std::vector<HeadsView<const float>> given;
        for (std::size_t layer = 0; layer < queries_.size(); ++layer) {
            detail::check<error::state_error>(steps(layer) == taken, where,
                                              detail::text("number of queries of layer ", layer),
                                              steps(layer), taken);
            given.push_back(queries(layer));
        }
        bool wanted = true;
        if constexpr (requires { cache_.policy().lookahead; }) wanted = cache_.policy().lookahead > 0;
        detail::check<error::state_error>(taken > 0 || !wanted, where, "number of pseudo tokens", taken,
                                          "at least 1");
        cache_.rescore(given);
        leave();
    }
    /// Drops the fork and its queries. The cache stays over its budget until something evicts:
    /// `writable().make_room(0)` does by the policy's first stage.
    void cancel_lookahead() {
        require_looking("LookaheadCache::cancel_lookahead");
        leave();
    }

  private:
    [[nodiscard]] Cache& open(std::string_view where) {
        detail::check<error::state_error>(!fork_, where, "stage", "looking ahead",
                                          "end_lookahead or cancel_lookahead first");
        return cache_;
    }
    void require_looking(std::string_view where) const {
        detail::check<error::state_error>(fork_.has_value(), where, "stage", "not looking ahead",
                                          "end_prefill first, and that it returns true");
    }
    [[nodiscard]] std::size_t steps(std::size_t layer) const noexcept {
        return queries_[layer].size() / (cache_.shape().q_heads * cache_.shape().head_dim);
    }
    void leave() noexcept {
        fork_.reset();
        for (std::vector<float>& rows : queries_) rows = {};
    }

    Cache cache_;
    std::optional<Cache> fork_;                // while looking ahead
    std::vector<std::vector<float>> queries_;  // [layers][steps, q_heads, head_dim]
};

/// See LookaheadCache::ahead. Ends with the look-ahead.
template <Lookahead P, BudgetRule Rule>
class LookaheadCache<P, Rule>::Ahead {
  public:
    [[nodiscard]] std::size_t seen() const { return cache_->fork().seen(); }
    void append(std::size_t layer, HeadsView<const float> k, HeadsView<const float> v,
                const AppendInputs& inputs = {}) {
        detail::check_size("LookaheadCache::Ahead::append", "k.tokens", k.tokens,
                           std::size_t{1});  // one at a time
        cache_->fork().append(layer, k, v, inputs);
    }
    void attend(std::size_t layer, HeadsView<const float> q, HeadsView<float> out) {
        cache_->fork().attend(layer, q, out);
        cache_->push_query(layer, q);
    }
    void end_step(const StepInputs& inputs = {}) { cache_->fork().end_step(inputs); }

  private:
    friend LookaheadCache;
    explicit Ahead(LookaheadCache& cache) : cache_(&cache) {}
    LookaheadCache* cache_;
};

}  // namespace kvcull::inline KVCULL_ABI
