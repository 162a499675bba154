#pragma once
/// Guard: follows any order of victims and bounds the damage when the order is wrong.

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "../base/config.hpp"
#include "../base/error.hpp"
#include "page_cache.hpp"
#include "slot_set.hpp"
#include "victim_order.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Time goes in phases; a phase ends when every page that was here at its beginning was requested or evicted
/// since, and the next miss starts a new one. A page that returns within the phase that evicted it shows that
/// the order was wrong: it may then stay until the phase ends, and instead of the order's choice a random one
/// of the old pages, not requested in this phase, goes out.
///
/// With an order that follows right predictions (`Furthest` with true next times, `Labels` with true labels)
/// Guard evicts as the order does, which is optimal. Whatever the predictions, the expected number of misses
/// is at most (2 H(k-1) + 2) times the optimum plus a constant, H(n) = 1 + 1/2 + ... + 1/n, for draws that
/// the requests do not depend on and no pins. Source: "Robustifying Learning-Augmented Caching Efficiently
/// without Compromising 1-Consistency", arXiv 2507.16242. Cost: the order's, and amortised O(1).
template <VictimOrder Base, DrawSource Draws>
class GuardRule {
  public:
    struct Options {
        /// Wrong evictions that a phase tolerates before it guards. Above 1 the bound does not hold.
        std::size_t guard_after = 1;
        Draws draws{};
    };

    /// @throws config_error if `guard_after` is 0.
    GuardRule(std::size_t slots, Options options)
        : options_(std::move(options)), base_(slots), old_(slots), flags_(slots) {
        detail::check<error::config_error>(options_.guard_after >= 1, "Guard", "guard_after",
                                           options_.guard_after, "at least 1");
        guards_.reserve(slots);
    }

    [[nodiscard]] std::uint64_t phase() const noexcept { return phase_; }
    /// Wrong evictions seen in this phase.
    [[nodiscard]] std::uint64_t errors() const noexcept { return errors_; }
    /// Slots of pages that were here when the phase began and were neither requested nor evicted since.
    [[nodiscard]] const SlotSet& old() const noexcept { return old_; }
    [[nodiscard]] bool guarded(slot_t slot) const noexcept { return (flags_[slot] & guarded_flag) != 0; }
    [[nodiscard]] const Draws& draws() const noexcept { return options_.draws; }

    [[nodiscard]] Choice choose(std::uint64_t evicted_in) {
        if (old_.empty()) begin_phase();
        const bool wrong = evicted_in == phase_;
        errors_ += wrong ? 1 : 0;
        const bool guard = wrong && errors_ >= options_.guard_after;
        return {guard ? old_.random(options_.draws) : base_.victim(), phase_, guard};
    }
    void served(const Served& request) {
        if (request.guard) {
            guards_.push_back(request.slot);
            set_flag(request.slot, guarded_flag);
        }
        detail::touch(base_, request);  // hidden before, where it is guarded: the order need not rank it
        old_.remove(request.slot);
    }
    void dropped(slot_t slot) {
        old_.remove(slot);
        clear_flag(slot, guarded_flag);
        base_.drop(slot);
    }
    void pinned(slot_t slot) {
        ++pinned_;
        old_.remove(slot);
        set_flag(slot, pinned_flag);
    }
    void unpinned(slot_t slot) {
        --pinned_;
        clear_flag(slot, pinned_flag);
    }
    [[nodiscard]] bool remembers(std::uint64_t evicted_in) const noexcept { return evicted_in == phase_; }

  private:
    static constexpr std::uint8_t guarded_flag = 1, pinned_flag = 2;

    [[gnu::noinline]] void begin_phase() {
        ++phase_;
        errors_ = 0;
        for (const slot_t slot : guards_) clear_flag(slot, guarded_flag);
        guards_.clear();
        old_.fill();
        if (pinned_ == 0) return;
        // No more work than the requests of a phase: those go at least once to each slot without a pin.
        for (slot_t slot = 0; slot < flags_.size(); ++slot)
            if ((flags_[slot] & pinned_flag) != 0) old_.remove(slot);
    }
    [[gnu::noinline]] void set_flag(slot_t slot, std::uint8_t flag) {
        if (flags_[slot] == 0) base_.hide(slot);
        flags_[slot] = static_cast<std::uint8_t>(flags_[slot] | flag);
    }
    void clear_flag(slot_t slot, std::uint8_t flag) {
        if (flags_[slot] == flag) base_.show(slot);
        flags_[slot] = static_cast<std::uint8_t>(flags_[slot] & ~flag);
    }

    Options options_;
    Base base_;
    SlotSet old_;
    std::vector<std::uint8_t> flags_;
    std::vector<slot_t> guards_;  // guarded in this phase, each at most once
    std::size_t pinned_ = 0;
    std::uint64_t phase_ = 0, errors_ = 0;
};

/// A page cache that follows `Base` under guard: `Guard<> cache(256, {.draws = {seed}})`.
template <VictimOrder Base = Furthest, DrawSource Draws = SplitMix64>
using Guard = SlotCache<GuardRule<Base, Draws>>;

}  // namespace kvcull::inline KVCULL_ABI
