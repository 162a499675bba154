#pragma once
/// KVCache: block storage and an evictor. Append, attend, end the step; the budget holds by itself.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "blocks.hpp"
#include "evictor.hpp"
#include "storage.hpp"

namespace kvcull::inline KVCULL_ABI {

namespace detail {
struct JointCalls;
/// A number that no other mark has, of whatever cache.
[[nodiscard]] inline std::size_t next_serial() noexcept {
    static std::atomic<std::size_t> serial{1};
    return serial.fetch_add(1, std::memory_order_relaxed);
}
}  // namespace detail

/// Names a state of one cache that `rollback` restores.
struct Mark {
    std::size_t serial = 0;
};

/// The cache of one sequence, all layers and KV heads. One thread at a time; caches on one pool run in
/// parallel.
///
///     BlockPool pool({.bytes = 1 << 30});
///     KVCache cache(shape, SnapKV{.window = 32}, Budget{.tokens = 1024}, pool);
///     cache.begin_prompt(total);
///     for (chunk ..) { for (layer ..) { cache.append(layer, k, v); cache.attend(layer, q, out); }
///     cache.end_step(); } cache.end_prompt(); for (token ..) { for (layer ..) { cache.append(layer, k, v);
///     cache.attend(layer, q, out); } cache.end_step(); }
///
/// Every call checks its arguments and reserves its memory before anything changes: when it throws, the cache
/// is as it was; but what a bias, a trace or a policy of the caller's throws in `attend` leaves it within the
/// step: roll it back to a mark or drop it. Keys come rotated and keep their rotation: positions are
/// absolute.
template <Policy P, BudgetRule Rule = Uniform>
class KVCache {
  public:
    /// @throws config_error if shape, policy, budget or their combination is not valid.
    KVCache(CacheShape shape, P policy, Budget budget, BlockPool& pool, Rule rule = {})
        : KVCache(nullptr, pool, shape, std::move(policy), budget, std::move(rule)) {}
    /// On a pool of its own, without a limit.
    explicit KVCache(CacheShape shape, P policy = {}, Budget budget = {}, Rule rule = {})
        : KVCache(std::make_shared<BlockPool>(), shape, std::move(policy), budget, std::move(rule)) {}

    KVCache(KVCache&&) noexcept = default;
    KVCache& operator=(KVCache&&) = delete;
    ~KVCache() = default;

    [[nodiscard]] const CacheShape& shape() const noexcept { return evictor_.shape(); }
    [[nodiscard]] const P& policy() const noexcept { return evictor_.policy(); }
    [[nodiscard]] const Evictor<P, Rule>& evictor() const noexcept { return evictor_; }
    [[nodiscard]] BlockPool& pool() const noexcept { return *pool_; }
    /// Tokens of the sequence so far, evicted ones included. If no `positions` are given, the next position.
    [[nodiscard]] std::size_t seen() const noexcept { return evictor_.seen(); }
    [[nodiscard]] std::size_t rows(std::size_t layer, std::size_t head) const {
        return storage_.rows(checked("KVCache::rows", layer, head));
    }
    /// Rows of one head in slot order, which need not be the order of positions. Valid until the next change.
    [[nodiscard]] HeadView view(std::size_t layer, std::size_t head) const {
        return storage_.view(checked("KVCache::view", layer, head));
    }
    /// Positions that one head holds, ascending.
    [[nodiscard]] std::vector<position_t> positions(std::size_t layer, std::size_t head) const {
        const PositionsView held = view(layer, head).position;
        std::vector<position_t> positions(held.size());
        for (std::size_t j = 0; j < held.size(); ++j) positions[j] = held[j];
        std::sort(positions.begin(), positions.end());
        return positions;
    }
    /// The policy's score of every row of one head, in slot order.
    [[nodiscard]] std::vector<float> scores(std::size_t layer, std::size_t head) {
        std::vector<float> scores(rows(layer, head));
        evictor_.scores(layer, head, view(layer, head), scores);
        return scores;
    }

    /// Bytes allocated: blocks of this cache and of its marks, each once, spare blocks and policy state.
    /// Blocks that a fork shares count in both.
    [[nodiscard]] std::size_t bytes() const {
        std::vector<const std::byte*> blocks;
        return count_bytes(blocks);
    }
    /// What `prepare(tokens)` takes from the pool now: the most that a step of so many tokens needs beyond
    /// what the cache holds. For admission. O(blocks). @throws capacity_error if no pool can give that.
    [[nodiscard]] std::size_t step_bytes(std::size_t tokens) const {
        detail::check_room("KVCache::step_bytes", "tokens", tokens, evictor_.live().rows);
        const std::size_t blocks = step_blocks(tokens);
        return (blocks - std::min(blocks, storage_.spares())) * storage_.layout().block_bytes();
    }
    /// The most that `bytes()` has been, within steps too.
    [[nodiscard]] std::size_t peak_bytes() const noexcept { return peak_; }
    /// Bytes of rows that compaction has moved so far.
    [[nodiscard]] std::size_t bytes_moved() const noexcept { return storage_.bytes_moved(); }

    /// Takes the blocks and scratch for `rows` rows per head now: until then no step allocates or fails, but
    /// for memory of a fixed size that some states take when they see their first token.
    /// @throws capacity_error if the pool cannot give them.
    void reserve(std::size_t rows) {
        detail::check_room("KVCache::reserve", "rows", rows, {});
        const std::size_t blocks = shape().heads() * storage_.layout().blocks_for(rows);
        const std::size_t spares = storage_.spares();
        storage_.reserve_spares(blocks - std::min(blocks, table_blocks()));
        undo_spares_on_error(spares, [&] {
            storage_.reserve_rows(rows);
            evictor_.reserve(rows);
            positions_.reserve(1);
        });
        reserved_ = std::max(reserved_, blocks);
        reserved_rows_ = std::max(reserved_rows_, rows);
        note_peak();
    }
    /// Takes now what a step of `tokens` tokens can need, so that no other cache can take it before: the
    /// calls of that step, if it comes next, do not fail for memory. `prepare(0)` gives it back.
    /// @throws capacity_error; the cache is then as it was.
    void prepare(std::size_t tokens) {
        require_idle("KVCache::prepare");
        detail::check_room("KVCache::prepare", "tokens", tokens, evictor_.live().rows);
        if (tokens == 0) return release_spares();
        undo_spares_on_error(storage_.spares(), [&] { reserve_step(tokens); });
        note_peak();
    }
    /// Gives spare blocks back, scratch and unused state to the allocator, and the pool's free memory to the
    /// system. Undoes `reserve`.
    void trim() {
        require_idle("KVCache::trim");
        reserved_ = reserved_rows_ = 0;
        storage_.release_spares(0);
        evictor_.trim();
        pool_->trim();
    }
    /// Heads of a layer run on the caller's threads. Default: one after the other.
    void set_executor(Executor executor) { evictor_.set_executor(std::move(executor)); }
    /// For differential tests and measurements; default: the best of this machine.
    void set_kernels(const simd::Kernels& kernels) noexcept { evictor_.set_kernels(kernels); }

    /// See Evictor::set_bias.
    void set_bias(Bias bias) { evictor_.set_bias(std::move(bias)); }
    /// See Evictor::set_trace. Forks have none until they are given one.
    void set_trace(EvictionTrace trace) { evictor_.set_trace(std::move(trace)); }

    /// See Evictor::begin_prompt.
    void begin_prompt(std::optional<std::size_t> total = std::nullopt) { evictor_.begin_prompt(total); }

    /// New rows of one layer. The first append of a step reserves what the whole step can need.
    /// @param k [kv_heads, c, head_dim], rotated. @param v [kv_heads, c, value_dim]; {} if values are latent.
    /// @throws shape_error, state_error, capacity_error; the cache is then as it was.
    void append(std::size_t layer, HeadsView<const float> k, HeadsView<const float> v,
                const AppendInputs& inputs = {}) {
        check_append(layer, k, v, inputs);
        const std::size_t c = k.tokens, spares = storage_.spares();
        const bool first = evictor_.live().call_tokens == 0;
        if (first) set_positions(c, inputs.positions);
        undo_spares_on_error(spares, [&] {
            if (first) reserve_step(c);
            // Nothing to do unless earlier layers have not attended, and so have given nothing back yet.
            storage_.reserve_spares(demand(layer, c).takes + pending_copies());
            evictor_.admit(layer, c, inputs);
        });
        for (std::size_t h = 0; h < shape().kv_heads; ++h)
            storage_.append(flat(layer, h), c, k.row(h, 0), k.token_stride, v.empty() ? nullptr : v.row(h, 0),
                            v.token_stride, positions_.data());
        note_peak();
    }

    /// Attention of the rows just appended over all that the layer holds; then the layer may evict.
    /// @param q [q_heads, c, head_dim], rotated. @param out [q_heads, c, value_dim]
    void attend(std::size_t layer, HeadsView<const float> q, HeadsView<float> out) {
        constexpr std::string_view where = "KVCache::attend";
        detail::check_layer(where, shape(), layer);
        detail::check<error::state_error>(evictor_.live().admitted[layer] != 0, where,
                                          detail::text("layer ", layer), "without new rows", "append first");
        detail::check<error::shape_error>(!out.empty(), where, "out.data", "null", "a pointer");
        apply(evictor_.step(layer, layer_view(layer), q, out));
    }

    /// After the last layer. Policies that see the whole step decide here; they say which inputs they need.
    void end_step(const StepInputs& inputs = {}) {
        apply(evictor_.end_step(evictor_.decides_at_end() ? view() : CacheView{}, inputs));
        release_spares();
    }
    /// After the last chunk: policies that act at the prompt's end do so here at the latest.
    void end_prompt() {
        if constexpr (Lookahead<P>)
            (void)evictor_.end_prompt(view());  // evicts nothing yet
        else
            rewrite([&]() -> const Plan& { return evictor_.end_prompt(view()); });
    }

    /// Pauses eviction, for questions asked of a compressed prompt. A policy that acts once per prompt does
    /// not catch up on a prompt that ends meanwhile: call `make_room`.
    void hold(bool on) { evictor_.hold(on); }
    /// See Evictor::pin.
    void pin(position_t begin, position_t end) { evictor_.pin(begin, end); }
    /// Evicts now, so that the next `tokens` tokens exceed no budget.
    void make_room(std::size_t tokens) {
        rewrite([&]() -> const Plan& { return evictor_.make_room(view(), tokens); });
    }
    /// Drops the last `tokens` tokens. See Evictor::truncate.
    void truncate(std::size_t tokens) {
        const auto copies = [this](const Plan& plan) { reserve_copies(plan); };
        carry_out(undo_spares_on_error(
            storage_.spares(), [&]() -> const Plan& { return evictor_.truncate(view(), tokens, copies); }));
    }
    /// See Evictor::probe.
    void probe(std::size_t layer, HeadsView<const float> q, HeadsView<const float> k,
               HeadsView<const float> v, HeadsView<float> out) {
        detail::check_layer("KVCache::probe", shape(), layer);
        rewrite([&]() -> const Plan& { return evictor_.probe(layer, layer_view(layer), q, k, v, out); });
    }
    /// See Evictor::rescore: evicts all layers by look-ahead queries, or, if it throws, none.
    void rescore(std::span<const HeadsView<const float>> q) requires Lookahead<P> {
        rewrite([&]() -> const Plan& { return evictor_.rescore(view(), q); });
    }

    /// Remembers rows, positions, policy state and statistics. Shares blocks: costs tables and state, not
    /// rows.
    [[nodiscard]] Mark mark() {
        require_idle("KVCache::mark");
        marks_.push_back({detail::next_serial(), storage_, evictor_.live()});
        return {marks_.back().serial};
    }
    /// Back to the mark, bit for bit, from within a step too. The mark stays.
    void rollback(Mark mark) {
        const Saved& saved = *find("KVCache::rollback", mark);
        Live<P> live(saved.live);
        give_room(live);
        storage_.keep_freed(true);  // what was reserved stays here
        storage_.rewind(saved.storage);
        evictor_.restore(std::move(live));
        release_spares();
    }
    /// Forgets a mark and frees what only it held.
    void release(Mark mark) { marks_.erase(find("KVCache::release", mark)); }

    /// The same cache once more; blocks are shared until one of the two writes to them. Marks stay behind.
    [[nodiscard]] KVCache fork() const {
        require_idle("KVCache::fork");
        return KVCache(*this);
    }
    /// What a decision would keep now with `size` rows per head; nothing changes. Valid until the next call.
    [[nodiscard]] const Plan& propose(std::size_t size) { return evictor_.propose(view(), size); }
    /// A compacted copy: the fork holds what `plan` keeps, this cache stays as it is.
    /// @throws shape_error if the plan was made for other rows.
    [[nodiscard]] KVCache fork(const Plan& plan) const {
        detail::check_plan("KVCache::fork", shape(), plan, evictor_.live().rows);
        KVCache copy = fork();
        std::size_t blocks = 0;  // that the kept rows may be moved into
        for (std::size_t i = 0; i < plan.size(); ++i)
            blocks += storage_.layout().blocks_for(plan[i].keep.size());
        copy.storage_.reserve_spares(blocks);
        copy.note_peak();
        copy.evictor_.commit(plan);
        copy.apply(plan);
        copy.release_spares();
        return copy;
    }

    /// Replaces the sequence: `rows`, which are not those of this cache, in their order and bit for bit, and
    /// what `live` says of them. Blocks are used again; marks of what was here are released. For saved
    /// states.
    /// @throws shape_error, capacity_error; the cache is then as it was.
    void restore(Live<P> live, CacheView rows) {
        constexpr std::string_view where = "KVCache::restore";
        using detail::text;
        require_idle(where);
        detail::check_size(where, "rows.kv_heads", rows.kv_heads, shape().kv_heads);
        detail::check_size(where, "rows.heads.size()", rows.heads.size(), shape().heads());
        detail::check_size(where, "live.rows.size()", live.rows.size(), shape().heads());
        std::size_t takes = 0, gives = 0, longest = 0;
        for (std::size_t i = 0; i < rows.heads.size(); ++i) {
            const HeadView& head = rows.heads[i];
            detail::check_size(where, text("rows.heads[", i, "].k.rows()"), head.k.rows(), live.rows[i]);
            detail::check_size(where, text("rows.heads[", i, "].v.rows()"), head.v.rows(), live.rows[i]);
            detail::check_size(where, text("rows.heads[", i, "].position.size()"), head.position.size(),
                               live.rows[i]);
            detail::check_size(where, text("rows.heads[", i, "].k.dim()"), head.k.dim(), shape().head_dim);
            detail::check_size(where, text("rows.heads[", i, "].v.dim()"), head.v.dim(), shape().values());
            detail::check_size(where, text("rows.heads[", i, "].k.dtype()"), name_of(head.k.dtype()),
                               name_of(shape().dtype));
            detail::check_size(where, text("rows.heads[", i, "].v.dtype()"), name_of(head.v.dtype()),
                               name_of(shape().dtype));
            takes += storage_.layout().blocks_for(live.rows[i]);
            gives += storage_.blocks_freed(i, 0, 0);
            longest = std::max(longest, live.rows[i]);
        }
        undo_spares_on_error(storage_.spares(), [&] {
            storage_.reserve_spares(takes - std::min(takes, gives));
            storage_.reserve_rows(longest);
            give_room(live);
            note_peak();
        });
        marks_.clear();
        storage_.keep_freed(true);
        for (std::size_t i = 0; i < views_.size(); ++i) storage_.truncate(i, 0);
        for (std::size_t i = 0; i < views_.size(); ++i) storage_.append(i, rows.heads[i]);
        evictor_.restore(std::move(live));
        release_spares();
    }

  private:
    friend struct detail::JointCalls;

    struct Saved {
        std::size_t serial;
        Storage storage;
        Live<P> live;
    };

    KVCache(std::shared_ptr<BlockPool> own, BlockPool& pool, CacheShape shape, P policy, Budget budget,
            Rule rule)
        : own_(std::move(own)),
          pool_(&pool),
          evictor_(shape, std::move(policy), budget, std::move(rule)),
          storage_(shape.heads(),
                   {shape.head_dim, shape.values(), shape.dtype, pool.block_rows(), shape.latent}, pool),
          views_(shape.heads()) {
        evictor_.trust_views();
    }
    KVCache(std::shared_ptr<BlockPool> own, CacheShape shape, P policy, Budget budget, Rule rule)
        : KVCache(own, *own, shape, std::move(policy), budget, std::move(rule)) {}
    KVCache(const KVCache& other)
        : own_(other.own_),
          pool_(other.pool_),
          evictor_(other.evictor_),
          storage_(other.storage_),
          views_(other.views_.size()),
          peak_(bytes()) {
        evictor_.set_trace({});
    }

    [[nodiscard]] std::size_t flat(std::size_t layer, std::size_t head) const noexcept {
        return layer * shape().kv_heads + head;
    }
    [[nodiscard]] std::size_t checked(std::string_view where, std::size_t layer, std::size_t head) const {
        detail::check_head(where, shape(), layer, head);
        return flat(layer, head);
    }
    void require_idle(std::string_view where) const {
        detail::check<error::state_error>(evictor_.live().call_tokens == 0, where, "call", "inside a step",
                                          "after end_step");
    }
    [[nodiscard]] LayerView layer_view(std::size_t layer) {
        for (std::size_t h = 0; h < shape().kv_heads; ++h)
            views_[flat(layer, h)] = storage_.view(flat(layer, h));
        return std::span(views_).subspan(flat(layer, 0), shape().kv_heads);
    }
    [[nodiscard]] CacheView view() {
        for (std::size_t i = 0; i < views_.size(); ++i) views_[i] = storage_.view(i);
        return {views_, shape().kv_heads};
    }
    [[nodiscard]] std::size_t table_blocks() const noexcept {
        return storage_.bytes() / storage_.layout().block_bytes() - storage_.spares();
    }

    void check_append(std::size_t layer, HeadsView<const float> k, HeadsView<const float> v,
                      const AppendInputs& inputs) const {
        constexpr std::string_view where = "KVCache::append";
        const std::size_t c = k.tokens;
        evictor_.check_admit(where, layer, c, inputs);
        detail::check_keys_values(where, shape(), k, v, c);
        const std::span<const position_t> given = inputs.positions;
        const position_t next = evictor_.next_position(),
                         behind = std::numeric_limits<position_t>::max() - next;
        if (given.empty())
            return detail::check<error::shape_error>(static_cast<position_t>(c) <= behind, where, "tokens", c,
                                                     detail::text("at most the ", behind, " positions left"));
        detail::check_size(where, "inputs.positions.size()", given.size(), c);
        if (evictor_.live().call_tokens != 0)
            detail::check<error::shape_error>(std::equal(given.begin(), given.end(), positions_.begin()),
                                              where, "inputs.positions", "another list",
                                              "that of the step's first layer");
        position_t previous = next - 1;
        for (const position_t position : given) {
            detail::check<error::shape_error>(position > previous, where, "inputs.positions", position,
                                              detail::text("beyond ", previous));
            previous = position;
        }
        detail::check_newest(where, "inputs.positions", previous);
    }
    void set_positions(std::size_t c, std::span<const position_t> given) {
        positions_.resize(c);
        if (given.empty())
            std::iota(positions_.begin(), positions_.end(), evictor_.next_position());
        else
            std::copy(given.begin(), given.end(), positions_.begin());
    }
    /// Blocks that one layer takes for `c` rows and the eviction that may follow, and those it gives back.
    struct Demand {
        std::size_t takes = 0, gives = 0;
    };
    [[nodiscard]] Demand demand(std::size_t layer, std::size_t c) const {
        Demand sum;
        for (std::size_t i = flat(layer, 0); i < flat(layer + 1, 0); ++i) {
            sum.takes += storage_.blocks_needed(i, c, evictor_.may_evict(i, c));
            sum.gives += storage_.blocks_freed(i, c, evictor_.rows_after(i, c));
        }
        return sum;
    }
    /// Blocks for the whole step, whatever the order of layers: what each keeps in the end, and what one of
    /// them needs on top until it has evicted. So one layer is uncompressed at a time.
    [[nodiscard]] std::size_t step_blocks(std::size_t c) const {
        std::size_t kept = 0, passing = 0;
        for (std::size_t layer = 0; layer < shape().layers; ++layer) {
            const Demand one = demand(layer, c);
            kept += one.takes - std::min(one.takes, one.gives);
            passing = std::max(passing, std::min(one.takes, one.gives));
        }
        return kept + passing;
    }
    void reserve_step(std::size_t c) {
        std::size_t rows = 0;
        for (std::size_t i = 0; i < views_.size(); ++i) rows = std::max(rows, storage_.rows(i) + c);
        storage_.reserve_spares(step_blocks(c));  // first: the pool says no before the allocator may
        storage_.reserve_rows(rows);
        storage_.keep_freed(true);
    }
    /// Blocks that evictions of layers may copy which have new rows and have not attended to them yet.
    [[nodiscard]] std::size_t pending_copies() const {
        std::size_t blocks = 0;
        for (std::size_t layer = 0; layer < shape().layers; ++layer) {
            if (evictor_.live().admitted[layer] == 0 || evictor_.live().stepped[layer] != 0) continue;
            for (std::size_t i = flat(layer, 0); i < flat(layer + 1, 0); ++i)
                blocks += storage_.blocks_needed(i, 0, evictor_.may_evict(i, 0));
        }
        return blocks;
    }
    void release_spares() noexcept {
        storage_.keep_freed(false);
        storage_.release_spares(reserved_ - std::min(reserved_, table_blocks()));
    }
    /// The room that is reserved, for a copy of what is remembered.
    void give_room(Live<P>& live) const {
        for (auto& state : live.states) reserve_state(state, reserved_rows_);
    }
    /// Runs `call`; if it throws, only `spares` spare blocks stay.
    template <class Call>
    decltype(auto) undo_spares_on_error(std::size_t spares, Call&& call) {
        try {
            return call();
        } catch (...) {
            storage_.release_spares(spares);
            throw;
        }
    }
    /// Carries out the plan that `call` returns. Only the plan tells which shared blocks are to be copied: if
    /// the pool has none to copy them to, what was remembered before the call comes back.
    template <class Call>
    void rewrite(Call&& call) {
        storage_.reserve_spares(0);
        note_peak();
        carry_out(storage_.shares() ? copying(call) : call());
    }
    template <class Call>
    const Plan& copying(Call&& call) {
        Live<P> own(evictor_.live());
        give_room(own);
        Live<P> before = evictor_.restore(std::move(own));
        try {
            return undo_spares_on_error(storage_.spares(), [&]() -> const Plan& {
                const Plan& plan = call();
                reserve_copies(plan);
                return plan;
            });
        } catch (...) {
            evictor_.restore(std::move(before));
            throw;
        }
    }
    /// Blocks for what a plan copies of shared ones.
    void reserve_copies(const Plan& plan) {
        std::size_t blocks = 0;
        for (std::size_t i = 0; i < plan.size(); ++i)
            blocks += storage_.blocks_copied(flat(plan[i].layer, plan[i].head), plan[i].moves);
        storage_.reserve_spares(blocks);
        note_peak();
    }
    void carry_out(const Plan& plan) noexcept {
        storage_.keep_freed(true);  // what was reserved stays here
        apply(plan);
        release_spares();
    }
    /// `bytes()`. @param blocks  memory to count in
    [[nodiscard]] std::size_t count_bytes(std::vector<const std::byte*>& blocks) const {
        if (marks_.empty()) return storage_.bytes() + evictor_.bytes();
        blocks.clear();
        storage_.collect_blocks(blocks);
        for (const Saved& mark : marks_) mark.storage.collect_blocks(blocks);
        std::sort(blocks.begin(), blocks.end());
        const auto end = std::unique(blocks.begin(), blocks.end());
        return static_cast<std::size_t>(end - blocks.begin()) * storage_.layout().block_bytes() +
               evictor_.bytes();
    }
    void note_peak() { peak_ = std::max(peak_, count_bytes(blocks_)); }
    void apply(const Plan& plan) noexcept {
        for (std::size_t i = 0; i < plan.size(); ++i)
            storage_.apply(flat(plan[i].layer, plan[i].head), plan[i].moves, plan[i].keep.size());
    }
    [[nodiscard]] typename std::vector<Saved>::iterator find(std::string_view where, Mark mark) {
        const auto found = std::find_if(marks_.begin(), marks_.end(),
                                        [&](const Saved& saved) { return saved.serial == mark.serial; });
        detail::check<error::state_error>(found != marks_.end(), where, "mark", mark.serial,
                                          "a mark of this cache that was not released");
        return found;
    }

    std::shared_ptr<BlockPool> own_;
    BlockPool* pool_;
    Evictor<P, Rule> evictor_;
    Storage storage_;
    std::vector<Saved> marks_;
    std::vector<HeadView> views_;
    std::vector<position_t> positions_;     // of the call that runs now
    std::vector<const std::byte*> blocks_;  // scratch of `note_peak`
    std::size_t reserved_ = 0, reserved_rows_ = 0, peak_ = 0;
};

template <Policy P>
KVCache(CacheShape, P, Budget, BlockPool&) -> KVCache<P>;
template <Policy P>
KVCache(CacheShape, P, Budget) -> KVCache<P>;
template <Policy P>
KVCache(CacheShape, P) -> KVCache<P>;

}  // namespace kvcull::inline KVCULL_ABI
