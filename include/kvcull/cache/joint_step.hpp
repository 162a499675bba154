#pragma once
/// One step of many sequences: what a serving engine runs for all that it serves at the moment.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "kv_cache.hpp"

namespace kvcull::inline KVCULL_ABI {

namespace detail {

/// What a joint step does with a cache whose policy it need not know.
struct JointCalls {
    void (*check)(const void* cache, std::size_t layer, HeadsView<const float> k, HeadsView<const float> v,
                  const AppendInputs& inputs);
    LayerCall (*begin)(void* cache, std::size_t layer, HeadsView<const float> q, HeadsView<const float> k,
                       HeadsView<const float> v, HeadsView<float> out, const AppendInputs& inputs);
    std::size_t (*parts)(const void* cache, const LayerCall& call, std::size_t head);
    void (*prepare)(void* cache, const LayerCall& call, std::size_t head, TileScratch& scratch);
    void (*run)(void* cache, const LayerCall& call, std::size_t head, std::size_t part, TileScratch& scratch);
    void (*merge)(void* cache, const LayerCall& call, std::size_t head, TileScratch& scratch);
    void (*finish)(void* cache, const LayerCall& call);
    void (*end_step)(void* cache, const StepInputs& inputs);
    void (*give_back)(void* cache);

    template <class Cache>
    [[nodiscard]] static const JointCalls& of() {
        static constexpr auto at = [](void* cache) -> Cache& { return *static_cast<Cache*>(cache); };
        static constexpr JointCalls calls{
            [](const void* cache, std::size_t layer, HeadsView<const float> k, HeadsView<const float> v,
               const AppendInputs& inputs) {
                static_cast<const Cache*>(cache)->check_append(layer, k, v, inputs);
            },
            [](void* cache, std::size_t layer, HeadsView<const float> q, HeadsView<const float> k,
               HeadsView<const float> v, HeadsView<float> out, const AppendInputs& inputs) {
                at(cache).append(layer, k, v, inputs);
                return at(cache).evictor_.begin(layer, at(cache).layer_view(layer), q, out);
            },
            [](const void* cache, const LayerCall& call, std::size_t head) {
                return static_cast<const Cache*>(cache)->evictor_.parts(call, head);
            },
            [](void* cache, const LayerCall& call, std::size_t head, TileScratch& scratch) {
                at(cache).evictor_.prepare(call, head, scratch);
            },
            [](void* cache, const LayerCall& call, std::size_t head, std::size_t part, TileScratch& scratch) {
                at(cache).evictor_.run(call, head, part, scratch);
            },
            [](void* cache, const LayerCall& call, std::size_t head, TileScratch& scratch) {
                at(cache).evictor_.merge(call, head, scratch);
            },
            [](void* cache, const LayerCall& call) { at(cache).apply(at(cache).evictor_.finish(call)); },
            [](void* cache, const StepInputs& inputs) { at(cache).end_step(inputs); },
            [](void* cache) { at(cache).prepare(0); }};
        return calls;
    }
};

/// Scratch for whoever works at the moment: one per thread, and one per head that runs in parts.
class ScratchPool {
  public:
    [[nodiscard]] TileScratch& take() {
        const std::scoped_lock lock(mutex_);
        if (free_.empty()) {
            free_.reserve(all_.size() + 1);  // `give` cannot fail
            all_.push_back(std::make_unique<TileScratch>());
            return *all_.back();
        }
        TileScratch* const last = free_.back();
        free_.pop_back();
        return *last;
    }
    void give(TileScratch& scratch) noexcept {
        const std::scoped_lock lock(mutex_);
        free_.push_back(&scratch);
    }

  private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<TileScratch>> all_;
    std::vector<TileScratch*> free_;
};

}  // namespace detail

/// A step of any number of caches of one model's shape, with policies, budgets and lengths of their own: some
/// in the middle of a prompt, some decoding. Their tokens lie one after the other in the model's buffers, in
/// the order of `add`, and the heads of all of them share the caller's threads.
///
///     JointStep step(executor);
///     for (Request& request : requests)                          // the first has the first claim on memory
///         if (step.add(request.cache, request.tokens.size())) batch.append(request);  // else: next time
///     for (layer ..) step.attend(layer, q, k, v, out);           // [.., step.tokens(), ..]
///     step.end();
///
/// A full pool refuses a sequence in `add`, before the model has done anything for it, and never later.
/// Results are those of each cache alone, bit for bit. One thread at a time calls a JointStep; other steps on
/// the same pool may run meanwhile. Use one again and again: it keeps its scratch.
class JointStep {
  public:
    explicit JointStep(Executor executor = {}) : executor_(std::move(executor)) {}

    /// A sequence of `tokens` new tokens takes part; its cache lives until `end` and is left alone until
    /// then.
    /// @returns false if the pool cannot give what its step may need (`KVCache::step_bytes`): the sequence
    /// takes no part, and nothing has changed.
    /// @throws shape_error if it is no cache of the others' model, state_error if it takes part already or
    /// the step has begun.
    template <Policy P, BudgetRule Rule>
    [[nodiscard]] bool add(KVCache<P, Rule>& cache, std::size_t tokens) {
        constexpr std::string_view where = "JointStep::add";
        detail::check<error::state_error>(!begun_, where, "step", "begun", "not begun: end it first");
        detail::check<error::shape_error>(tokens > 0, where, "tokens", tokens, "at least 1");
        for (const Member& member : members_)
            detail::check<error::state_error>(member.cache != &cache, where, "cache", "given twice", "once");
        if (!members_.empty()) check_shape(where, cache.shape());
        members_.push_back({&cache, &detail::JointCalls::of<KVCache<P, Rule>>(), tokens_, tokens});
        try {
            cache.prepare(tokens);
        } catch (const error::capacity_error&) {
            members_.pop_back();
            return false;
        } catch (...) {
            members_.pop_back();
            throw;
        }
        if (members_.size() == 1) shape_ = cache.shape();
        tokens_ += tokens;
        return true;
    }
    /// Sequences that take part, and their tokens.
    [[nodiscard]] std::size_t size() const noexcept { return members_.size(); }
    [[nodiscard]] std::size_t tokens() const noexcept { return tokens_; }
    /// First token of the sequence that was added as number `index`, and whether an exception took it out.
    [[nodiscard]] std::size_t first(std::size_t index) const { return members_.at(index).first; }
    [[nodiscard]] bool failed(std::size_t index) const { return members_.at(index).failed; }

    /// `append` and `attend` of all sequences: views of all their tokens.
    /// @param q [q_heads, tokens(), head_dim] @param k, v [kv_heads, tokens(), dim] @param out [q_heads,
    /// tokens(), value_dim] @param inputs  of all tokens likewise
    /// @throws what `append` and `attend` throw, with all caches as they were. What comes out of a sequence's
    /// own callbacks (a bias, a trace) or of its policy, which may refuse side values, takes that sequence
    /// out of the step; all others finish the layer, then the first such exception is thrown.
    void attend(std::size_t layer, HeadsView<const float> q, HeadsView<const float> k,
                HeadsView<const float> v, HeadsView<float> out, const AppendInputs& inputs = {}) {
        if (members_.empty()) return;
        check(layer, q, k, v, out, inputs);
        begun_ = true;
        each([&](Member& member) {
            const auto part = [&](const auto& view) { return view.slice(member.first, member.tokens); };
            member.call = member.calls->begin(member.cache, layer, part(q), part(k), part(v), part(out),
                                              slice(inputs, member));
            member.heads_left = shape_.kv_heads;
        });
        schedule_.clear();
        heads_.clear();
        for (Member& member : members_)
            for (std::size_t h = 0; !member.failed && h < shape_.kv_heads; ++h) {
                const std::size_t parts = member.calls->parts(member.cache, member.call, h);
                schedule_.add(parts, member.call.cost(h) / parts);
                heads_.push_back({&member, h, nullptr});
            }
        schedule_.run(
            executor_, [&](std::size_t unit) { start(heads_[unit]); },
            [&](std::size_t unit, std::size_t part) { run(heads_[unit], part); },
            [&](std::size_t unit, std::size_t /*parts*/) { done(heads_[unit]); });
        ++layers_;
        if (const std::exception_ptr error = untold()) std::rethrow_exception(error);
    }

    /// `end_step` of all sequences, which are then free again. @param inputs  of all tokens
    /// @throws state_error before every layer has attended, shape_error; nothing has changed then.
    void end(const StepInputs& inputs = {}) {
        constexpr std::string_view where = "JointStep::end";
        if (!members_.empty())
            detail::check<error::state_error>(layers_ == shape_.layers, where, "layers attended", layers_,
                                              shape_.layers);
        if (!inputs.tokens.empty())
            detail::check_size(where, "inputs.tokens.size()", inputs.tokens.size(), tokens_);
        if (!inputs.hidden.empty())
            detail::check_size(where, "inputs.hidden.rows", inputs.hidden.rows, tokens_);
        each([&](Member& member) {
            StepInputs own = inputs;
            if (!own.tokens.empty()) own.tokens = own.tokens.subspan(member.first, member.tokens);
            own.hidden = rows(own.hidden, member);
            member.calls->end_step(member.cache, own);
        });
        const std::exception_ptr error = untold();
        forget();
        if (error) std::rethrow_exception(error);
    }
    /// Instead of `end`: nobody takes part any more. Before the first `attend` what was reserved goes back;
    /// after it the caches are in the middle of a step, from which `rollback` leads.
    void cancel() {
        for (const Member& member : members_)
            if (!begun_) member.calls->give_back(member.cache);
        forget();
    }

  private:
    struct Member {
        void* cache;
        const detail::JointCalls* calls;
        std::size_t first, tokens;
        LayerCall call = {};
        std::size_t heads_left = 0;
        bool failed = false, told = false;
        std::exception_ptr error = {};
    };
    struct Head {
        Member* member;
        std::size_t head;
        detail::TileScratch* scratch;  // of a head in parts
    };

    void check_shape(std::string_view where, const CacheShape& shape) const {
        detail::check_size(where, "shape.layers", shape.layers, shape_.layers);
        detail::check_size(where, "shape.q_heads", shape.q_heads, shape_.q_heads);
        detail::check_size(where, "shape.kv_heads", shape.kv_heads, shape_.kv_heads);
        detail::check_size(where, "shape.head_dim", shape.head_dim, shape_.head_dim);
        detail::check_size(where, "shape.values()", shape.values(), shape_.values());
        detail::check_size(where, "shape.latent", shape.latent, shape_.latent);
    }
    /// All that a caller can get wrong, before any cache changes.
    void check(std::size_t layer, HeadsView<const float> q, HeadsView<const float> k,
               HeadsView<const float> v, HeadsView<float> out, const AppendInputs& inputs) const {
        constexpr std::string_view where = "JointStep::attend";
        detail::check_layer(where, shape_, layer);
        detail::check_heads(where, "q", q, shape_.q_heads, tokens_, shape_.head_dim);
        detail::check_keys_values(where, shape_, k, v, tokens_);
        detail::check_heads(where, "out", out, shape_.q_heads, tokens_, shape_.values());
        if (!inputs.positions.empty())
            detail::check_size(where, "inputs.positions.size()", inputs.positions.size(), tokens_);
        if (!inputs.log_beta.empty())
            detail::check_size(where, "inputs.log_beta.cols", inputs.log_beta.cols, tokens_);
        if (!inputs.attention_input.empty())
            detail::check_size(where, "inputs.attention_input.rows", inputs.attention_input.rows, tokens_);
        for (const Member& member : members_)
            if (!member.failed)
                member.calls->check(member.cache, layer, k.slice(member.first, member.tokens),
                                    v.slice(member.first, member.tokens), slice(inputs, member));
    }
    [[nodiscard]] static MatrixView<const float> rows(MatrixView<const float> all, const Member& member) {
        if (all.empty()) return {};
        return {all[member.first].data(), member.tokens, all.cols, all.stride};
    }
    [[nodiscard]] static AppendInputs slice(const AppendInputs& all, const Member& member) {
        AppendInputs own{.attention_input = rows(all.attention_input, member)};
        if (!all.positions.empty()) own.positions = all.positions.subspan(member.first, member.tokens);
        if (!all.log_beta.empty())
            own.log_beta = {all.log_beta.data + member.first, all.log_beta.rows, member.tokens,
                            all.log_beta.stride};
        return own;
    }

    /// `body(member)` for all that still take part, side by side.
    template <class Body>
    void each(Body&& body) {
        const auto one = [&](std::size_t index) {
            Member& member = members_[index];
            if (!member.failed) guarded(member, [&] { body(member); });
        };
        if (executor_)
            executor_(members_.size(), std::ref(one));
        else
            for (std::size_t index = 0; index < members_.size(); ++index) one(index);
    }
    /// What `work` throws belongs to its sequence, not to the thread that ran it.
    template <class Work>
    static void guarded(Member& member, Work&& work) noexcept {
        try {
            work();
        } catch (...) {
            if (!std::atomic_ref(member.failed).exchange(true)) member.error = std::current_exception();
        }
    }
    void start(Head& head) {
        guarded(*head.member, [&] {
            head.scratch = &scratch_.take();
            head.member->calls->prepare(head.member->cache, head.member->call, head.head, *head.scratch);
        });
    }
    void run(Head& head, std::size_t part) {
        Member& member = *head.member;
        guarded(member, [&] {
            if (std::atomic_ref(member.failed).load()) return;
            detail::TileScratch& scratch = head.scratch != nullptr ? *head.scratch : scratch_.take();
            const auto work = [&] { member.calls->run(member.cache, member.call, head.head, part, scratch); };
            if (head.scratch != nullptr) return work();
            guarded(member, work);
            scratch_.give(scratch);
        });
    }
    void done(Head& head) {
        Member& member = *head.member;
        if (head.scratch != nullptr) {
            guarded(member, [&] {
                if (!std::atomic_ref(member.failed).load())
                    member.calls->merge(member.cache, member.call, head.head, *head.scratch);
            });
            scratch_.give(*head.scratch);
        }
        if (std::atomic_ref(member.heads_left).fetch_sub(1, std::memory_order_acq_rel) != 1) return;
        guarded(member, [&] {
            if (!std::atomic_ref(member.failed).load()) member.calls->finish(member.cache, member.call);
        });
    }
    /// The first exception that no call has thrown yet; from then on all are told.
    [[nodiscard]] std::exception_ptr untold() noexcept {
        std::exception_ptr first;
        for (Member& member : members_)
            if (member.failed && !std::exchange(member.told, true) && !first) first = member.error;
        return first;
    }
    void forget() noexcept {
        members_.clear();
        tokens_ = layers_ = 0;
        begun_ = false;
    }

    Executor executor_;
    CacheShape shape_;
    std::vector<Member> members_;
    std::size_t tokens_ = 0, layers_ = 0;  // layers that have attended
    bool begun_ = false;
    detail::Schedule schedule_;
    std::vector<Head> heads_;
    detail::ScratchPool scratch_;
};

}  // namespace kvcull::inline KVCULL_ABI
