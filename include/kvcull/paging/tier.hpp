#pragma once
/// Pages of KV rows between frames in fast memory and a store: what a decode step needs is in the frames
/// until the step ends.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../base/config.hpp"
#include "../base/error.hpp"
#include "page_cache.hpp"
#include "predictors.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Moves pages. A frame is a slot of the tier's cache; the store knows where its bytes lie. Each may throw,
/// and has then done nothing that counts.
template <class S>
concept PageStore = requires(S store, page_t page, slot_t frame) {
    store.read(page, frame);   ///< fills the frame
    store.write(page, frame);  ///< keeps the frame's bytes
    store.erase(page);         ///< the page is not needed any more; it may never have been written
};

/// Says which pages it holds: those that were written and not erased.
template <class S>
concept HoldsPages = PageStore<S> && requires(const S store, page_t page) {
    { store.contains(page) } -> std::convertible_to<bool>;
    { store.pages() } -> std::convertible_to<std::vector<page_t>>;  ///< ascending
};
/// Shows the bytes of its frames.
template <class S>
concept ShowsFrames = PageStore<S> && requires(const S store, slot_t frame) {
    { store.frame(frame) } -> std::same_as<std::span<std::byte>>;
};

/// One page of a step: how it got its frame.
struct PageVisit {
    page_t page = 0;
    Access access{};
    bool write_back = false;  ///< the victim was written to the store
};

struct PageCounts {
    std::uint64_t fetches = 0, evictions = 0, write_backs = 0, guards = 0;

    friend bool operator==(const PageCounts&, const PageCounts&) = default;
};

/// `step`, attention over the frames, `end_step`. Times count requests, one per page of a step.
template <PageCache Cache, PageStore Store, NextUse Predictor>
class PageTier {
  public:
    /// @throws config_error unless the cache is empty.
    PageTier(Cache cache, Store store, Predictor predictor)
        : cache_(std::move(cache)),
          store_(std::move(store)),
          predictor_(std::move(predictor)),
          frames_(cache_.slots()) {
        detail::check<error::config_error>(cache_.size() == 0, "PageTier", "pages in the cache",
                                           cache_.size(), 0);
    }

    /// Brings `pages` into frames and pins them until `end_step`, those first that are there already: else
    /// the step's own misses would evict them. `created` is a page that starts now: it gets a frame, is not
    /// fetched, and is written back when it first goes out.
    /// @return the visits in the order of `pages`, then that of `created`; valid until the next step.
    /// @throws before anything changed: config_error if a page occurs twice; state_error if a page is
    /// unknown, `created` is known, or the last step has not ended; capacity_error if the pages and what is
    /// pinned do not fit into the frames (`PageAttention` splits a step into waves). What the store or the
    /// predictor throws passes through: nothing is pinned by the step then, `created` is not known, a victim
    /// that could not be written is back in its frame, and other pages may have moved.
    std::span<const PageVisit> step(std::span<const page_t> pages, std::optional<page_t> created = {}) {
        plan(pages, created);
        open_ = true;
        try {
            for (const Turn& turn : order_) visit(visits_[turn.visit], created);
        } catch (...) {
            end_step();
            if (created && known_.erase(*created) > 0) cache_.erase(*created);
            throw;
        }
        return visits_;
    }
    /// Unpins what the step pinned. @throws state_error if no step is open.
    void end_step() {
        detail::check<error::state_error>(open_, "PageTier::end_step", "step", "not open", "one to end");
        open_ = false;
        for (const page_t page : pinned_) cache_.unpin(page);
        pinned_.clear();
    }

    /// Writes every page in a frame that was changed, so that the store holds them all. O(known pages).
    /// @throws what the store throws: pages written until then need not be written again.
    void flush() {
        for (const page_t page : known_) {
            if (!cache_.contains(page)) continue;
            const slot_t slot = cache_.slot_of(page);
            if (!frames_[slot].dirty) continue;
            store_.write(page, slot);
            frames_[slot].dirty = false;
            ++counts_.write_backs;
        }
    }
    /// Takes a page that the store holds from before, as one that was opened on an old file does: known from
    /// now on, and fetched when a step needs it. What the store finds wrong with its bytes it says then.
    /// @throws state_error if the page is known already or the store does not have it; nothing has changed
    /// then.
    void adopt(page_t page) requires HoldsPages<Store> {
        constexpr auto where = "PageTier::adopt";
        detail::check<error::state_error>(!known_.contains(page), where, "page", page,
                                          "a page that is not known yet");
        detail::check<error::state_error>(store_.contains(page), where, "page", page,
                                          "a page that the store holds");
        known_.insert(page);
    }

    /// For sinks: stays until `unpin`. @throws state_error if it is not resident.
    void pin(page_t page) { cache_.pin(page); }
    /// @throws state_error if it is not resident or not pinned, but by the step that is open.
    void unpin(page_t page) {
        const bool by_step = std::find(pinned_.begin(), pinned_.end(), page) != pinned_.end();
        detail::check<error::state_error>(!by_step || cache_.pins(page) > 1, "PageTier::unpin", "page", page,
                                          "a page that `pin` has pinned");
        cache_.unpin(page);
    }
    /// The page's frame was changed: it has to be written back again. @throws state_error if it is not
    /// resident.
    void mark_dirty(page_t page) { frames_[cache_.slot_of(page)].dirty = true; }
    /// The page's tokens are gone: nothing is written. No-op if it is unknown.
    /// @throws state_error if it is pinned, or what the store throws; nothing has changed then.
    void erase(page_t page) {
        if (!known_.contains(page)) return;
        if (cache_.contains(page))
            detail::check<error::state_error>(cache_.pins(page) == 0, "PageTier::erase", "page", page,
                                              "a page that is not pinned");
        store_.erase(page);
        cache_.erase(page);
        known_.erase(page);
    }
    /// @throws state_error if it is not resident.
    [[nodiscard]] slot_t frame(page_t page) const { return cache_.slot_of(page); }
    [[nodiscard]] const PageCounts& counts() const noexcept { return counts_; }
    [[nodiscard]] const Cache& cache() const noexcept { return cache_; }
    [[nodiscard]] const Store& store() const noexcept { return store_; }

  private:
    struct Frame {
        double value = 0;
        bool dirty = false;
    };
    /// One visit's place in a step: those that are resident first, then the created page, then the missing
    /// ones, each ascending.
    struct Turn {
        enum class Kind : std::uint8_t { resident, created, missing } kind{};
        page_t page = 0;
        std::size_t visit = 0;
    };

    /// Checks the step and writes the visits and their turns.
    void plan(std::span<const page_t> pages, const std::optional<page_t>& created) {
        constexpr auto where = "PageTier::step";
        using Kind = typename Turn::Kind;
        detail::check<error::state_error>(!open_, where, "the last step", "open", "end_step before");
        if (created)
            detail::check<error::state_error>(!known_.contains(*created), where, "created", *created,
                                              "a page that is not known yet");
        visits_.clear();
        order_.clear();
        const auto add = [&](Kind kind, page_t page) {
            order_.push_back({kind, page, visits_.size()});
            visits_.push_back({.page = page});
        };
        std::size_t wanted = cache_.pinned_slots() + (created ? 1 : 0);
        for (const page_t page : pages) {
            detail::check<error::state_error>(known_.contains(page), where, "page", page, "a known page");
            const bool resident = cache_.contains(page);
            wanted += resident && cache_.pins(page) > 0 ? 0 : 1;
            add(resident ? Kind::resident : Kind::missing, page);
        }
        if (created) add(Kind::created, *created);
        std::sort(order_.begin(), order_.end(), [](const Turn& a, const Turn& b) {
            return std::pair(a.kind, a.page) < std::pair(b.kind, b.page);
        });
        // A page is of one kind, so that equal ones are neighbours.
        for (std::size_t i = 1; i < order_.size(); ++i)
            detail::check<error::config_error>(order_[i - 1].page != order_[i].page, where, "page",
                                               order_[i].page, "each page once");
        detail::check<error::capacity_error>(wanted <= cache_.slots(), where,
                                             "number of pages, pinned ones included", wanted,
                                             detail::text("at most ", cache_.slots()));
        pinned_.reserve(order_.size());
        if (created) known_.reserve(known_.size() + 1);
    }
    void visit(PageVisit& visit, const std::optional<page_t>& created) {
        const page_t page = visit.page;
        const double value = predictor_.next(page, requests_);
        visit.access = cache_.request(page, value);
        ++requests_;
        const slot_t frame = visit.access.slot;
        if (!visit.access.hit) {
            load(visit, page == created);
            frames_[frame].dirty = page == created;
        }
        frames_[frame].value = value;
        cache_.pin(page);
        pinned_.push_back(page);
    }
    void load(PageVisit& visit, bool created) {
        const slot_t frame = visit.access.slot;
        if (const auto victim = visit.access.victim) {
            if (frames_[frame].dirty) {
                try {
                    store_.write(*victim, frame);
                } catch (...) {
                    // Erasing frees the frame, and the next request gets it: the victim is back.
                    cache_.erase(visit.page);
                    cache_.request(*victim, frames_[frame].value);
                    ++requests_;
                    throw;
                }
                visit.write_back = true;
                ++counts_.write_backs;
            }
            ++counts_.evictions;
            counts_.guards += visit.access.guard ? 1 : 0;
        }
        if (created) {
            known_.insert(visit.page);
            return;
        }
        try {
            store_.read(visit.page, frame);
        } catch (...) {
            cache_.erase(visit.page);
            throw;
        }
        ++counts_.fetches;
    }

    Cache cache_;
    Store store_;
    Predictor predictor_;
    std::vector<Frame> frames_;
    std::unordered_set<page_t> known_;
    std::vector<PageVisit> visits_;
    std::vector<Turn> order_;
    std::vector<page_t> pinned_;  // by the open step, in order
    PageCounts counts_;
    std::uint64_t requests_ = 0;
    bool open_ = false;
};

}  // namespace kvcull::inline KVCULL_ABI
