#pragma once
/// Rules to compare Guard with: an order followed blindly, random slots, the marking family, and a mixture.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "../base/config.hpp"
#include "../base/error.hpp"
#include "page_cache.hpp"
#include "slot_set.hpp"
#include "victim_order.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Whoever the order names goes out.
template <VictimOrder Base>
class FollowRule {
  public:
    struct Options {};
    FollowRule(std::size_t slots, Options) : base_(slots) {}

    [[nodiscard]] Choice choose(std::uint64_t) { return {.slot = base_.victim()}; }
    void served(const Served& request) { detail::touch(base_, request); }
    void dropped(slot_t slot) { base_.drop(slot); }
    void pinned(slot_t slot) { base_.hide(slot); }
    void unpinned(slot_t slot) { base_.show(slot); }
    [[nodiscard]] bool remembers(std::uint64_t) const noexcept { return false; }

  private:
    Base base_;
};
template <VictimOrder Base>
using Follow = SlotCache<FollowRule<Base>>;
/// Belady's rule if the values are the true next times.
using BlindOracle = Follow<Furthest>;

/// Any slot, each with the same probability. One draw per eviction, and one more for each pinned slot hit.
template <DrawSource Draws>
class RandomRule {
  public:
    struct Options {
        Draws draws{};
    };
    RandomRule(std::size_t slots, Options options) : draws_(std::move(options.draws)), pinned_(slots) {}

    [[nodiscard]] const Draws& draws() const noexcept { return draws_; }
    [[nodiscard]] Choice choose(std::uint64_t) {
        std::size_t slot = 0;
        do {
            slot = scale_draw(draw_32(draws_), pinned_.size());
        } while (pinned_[slot] != 0);
        return {.slot = static_cast<slot_t>(slot)};
    }
    void served(const Served&) noexcept {}
    void dropped(slot_t) noexcept {}
    void pinned(slot_t slot) noexcept { pinned_[slot] = 1; }
    void unpinned(slot_t slot) noexcept { pinned_[slot] = 0; }
    [[nodiscard]] bool remembers(std::uint64_t) const noexcept { return false; }

  private:
    Draws draws_;
    std::vector<std::uint8_t> pinned_;
};
template <DrawSource Draws = SplitMix64>
using Rand = SlotCache<RandomRule<Draws>>;

/// How far a marking rule trusts `Furthest`.
enum class Trust : std::uint8_t {
    never,   ///< Marker: a random unmarked page (Fiat et al. 1991)
    once,    ///< LMarker: a random one only for a page that this phase evicted (Rohatgi 2020)
    chains,  ///< PredictiveMarker: a random one once a chain of such pages is longer than H(k) (Lykouris,
             ///< Vassilvitskii 2018)
};

/// Every request marks its slot; unmarked ones go out. When a victim is needed and none is left, a new phase
/// begins and all marks are lifted. Pinned slots count as marked.
/// A page that this phase evicted was here, unmarked, when the phase began: no list of those is needed.
template <Trust trust, DrawSource Draws>
class MarkingRule {
  public:
    struct Options {
        Draws draws{};
    };
    MarkingRule(std::size_t slots, Options options)
        : draws_(std::move(options.draws)), order_(slots), unmarked_(slots), pinned_(slots) {
        double harmonic = 0;
        for (std::size_t i = slots; i > 0; --i) harmonic += 1.0 / static_cast<double>(i);
        longest_ = static_cast<std::uint64_t>(harmonic);
    }

    [[nodiscard]] const Draws& draws() const noexcept { return draws_; }
    /// A note is a phase and the length of a chain, which is cut at a number that H(k) never reaches.
    [[nodiscard]] Choice choose(std::uint64_t note) {
        if (unmarked_.empty()) begin_phase();
        const bool stale = remembers(note);
        const std::uint64_t length = stale ? note % lengths : 0;
        const bool random = trust == Trust::never || (stale && (trust == Trust::once || length > longest_));
        return {random ? unmarked_.random(draws_) : order_.victim(),
                phase_ * lengths + std::min(length + 1, lengths - 1), false};
    }
    void served(const Served& request) {
        order_.touch(request.slot, request.now, request.value);
        mark(request.slot);
    }
    void dropped(slot_t slot) {
        mark(slot);
        order_.drop(slot);
    }
    void pinned(slot_t slot) {
        pinned_[slot] = 1;
        mark(slot);
    }
    void unpinned(slot_t slot) noexcept { pinned_[slot] = 0; }
    [[nodiscard]] bool remembers(std::uint64_t note) const noexcept {
        return note != 0 && note / lengths == phase_;
    }

  private:
    static constexpr std::uint64_t lengths = 64;

    void mark(slot_t slot) {
        unmarked_.remove(slot);
        order_.hide(slot);
    }
    void begin_phase() {
        ++phase_;
        unmarked_.fill();
        for (slot_t slot = 0; slot < pinned_.size(); ++slot) {
            if (pinned_[slot] != 0)
                unmarked_.remove(slot);
            else
                order_.show(slot);
        }
    }

    Draws draws_;
    Furthest order_;
    SlotSet unmarked_;
    std::vector<std::uint8_t> pinned_;
    std::uint64_t phase_ = 0, longest_ = 0;
};
template <DrawSource Draws = SplitMix64>
using Marker = SlotCache<MarkingRule<Trust::never, Draws>>;
template <DrawSource Draws = SplitMix64>
using LMarker = SlotCache<MarkingRule<Trust::once, Draws>>;
template <DrawSource Draws = SplitMix64>
using PredictiveMarker = SlotCache<MarkingRule<Trust::chains, Draws>>;

/// Runs every part on all requests, with slots of its own, and evicts what the part that missed least does
/// not hold; of those pages the least recently requested. Cost: the parts', and O(slots) per eviction. With
/// pins there may be no such page; the least recently requested one goes then.
template <PageCache... Parts>
class CombineRule {
  public:
    struct Options {
        double bound =
            1;  ///< change over when the part followed has missed `bound` times as often as the best
        std::tuple<typename Parts::Options...> parts{};
    };
    /// @throws config_error if `bound` is not a finite number of at least 1, or what a part throws.
    CombineRule(std::size_t slots, Options options)
        : bound_(options.bound),
          parts_(std::apply([&](auto&... part) { return std::tuple(Parts(slots, std::move(part))...); },
                            options.parts)),
          ages_(slots),
          page_(slots) {
        const std::uint64_t bits = detail::ordered_bits(bound_);
        detail::check<error::config_error>(
            bits >= detail::ordered_bits(1.0) &&
                bits <= detail::ordered_bits(std::numeric_limits<double>::max()),
            "CombineDeterministic", "bound", bound_, "a number of at least 1");
    }

    /// Misses of each part so far.
    [[nodiscard]] const std::array<std::uint64_t, sizeof...(Parts)>& costs() const noexcept { return costs_; }
    void requested(page_t page, double value) {
        std::size_t i = 0;
        std::apply([&](auto&... part) { ((costs_[i++] += part.request(page, value).hit ? 0 : 1), ...); },
                   parts_);
    }
    void erased(page_t page) {
        std::apply([&](auto&... part) { (part.erase(page), ...); }, parts_);
    }
    [[nodiscard]] Choice choose(std::uint64_t) {
        const auto best =
            static_cast<std::size_t>(std::min_element(costs_.begin(), costs_.end()) - costs_.begin());
        if (static_cast<double>(costs_[followed_]) >= bound_ * static_cast<double>(costs_[best]))
            followed_ = best;
        for (slot_t slot = ages_.oldest(); slot != ages_.end(); slot = ages_.after(slot))
            if (!followed_holds(page_[slot])) return {.slot = slot};
        return {.slot = ages_.oldest()};
    }
    void served(const Served& request) {
        page_[request.slot] = request.page;
        ages_.push(request.slot, request.now);
    }
    void dropped(slot_t slot) noexcept { ages_.remove(slot); }
    void pinned(slot_t slot) noexcept { ages_.hide(slot); }
    void unpinned(slot_t slot) noexcept { ages_.show(slot); }
    [[nodiscard]] bool remembers(std::uint64_t) const noexcept { return false; }

  private:
    [[nodiscard]] bool followed_holds(page_t page) const noexcept {
        std::size_t i = 0;
        return std::apply(
            [&](const auto&... part) { return ((i++ == followed_ && part.contains(page)) || ...); }, parts_);
    }

    double bound_;
    std::tuple<Parts...> parts_;
    detail::AgeList ages_;
    std::vector<page_t> page_;
    std::array<std::uint64_t, sizeof...(Parts)> costs_{};
    std::size_t followed_ = 0;
};
template <PageCache... Parts>
using CombineDeterministic = SlotCache<CombineRule<Parts...>>;

}  // namespace kvcull::inline KVCULL_ABI
