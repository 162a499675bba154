#pragma once
/// Caches of pages: the concepts, and the one class that serves requests by any eviction rule.

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "../base/config.hpp"
#include "../base/error.hpp"
#include "page_table.hpp"

namespace kvcull::inline KVCULL_ABI {

/// What a request came to.
struct Access {
    bool hit = false;
    bool guard = false;                           ///< the rule made up for a wrong eviction (see `Guard`)
    slot_t slot = 0;                              ///< where the page is now
    std::optional<page_t> victim = std::nullopt;  ///< the page that went out of that slot

    friend bool operator==(const Access&, const Access&) = default;
};

/// `k` slots; every requested page is loaded. `value` is a guess of when the page is needed next, in
/// requests from the start (or what else the rule reads); it holds until the page's next request.
template <class C>
concept PageCache = requires(C cache, const C& same, page_t page, double value) {
    { cache.request(page, value) } -> std::same_as<Access>;
    cache.erase(page);
    cache.pin(page);
    cache.unpin(page);
    { same.contains(page) } -> std::convertible_to<bool>;
    { same.slots() } -> std::convertible_to<std::size_t>;
};

/// One request as a rule sees it, after it was served.
struct Served {
    page_t page = 0;
    slot_t slot = 0;
    std::uint64_t now = 0;  ///< index of the request
    double value = 0;
    bool hit = false, guard = false;
};

/// What a rule decides when a page needs a slot and none is free.
struct Choice {
    slot_t slot = 0;         ///< occupied and not pinned
    std::uint64_t note = 0;  ///< left for the page that goes out, below 2^62; 0: forget it
    bool guard = false;
};

/// Who goes out. Made as `R(slots, options)`. The optional `requested(page, value)` hears of every request
/// before it is served, `erased(page)` of every page that is erased.
template <class R>
concept EvictionRule = requires(R rule, const R& same, std::uint64_t note, Served served, slot_t slot) {
    typename R::Options;
    /// `note`: what the rule left when it evicted the page that comes in now; 0 if nothing is known.
    { rule.choose(note) } -> std::same_as<Choice>;
    rule.served(served);
    rule.dropped(slot);  ///< the page in it was erased
    rule.pinned(slot);
    rule.unpinned(slot);
    /// May be false once a note means nothing any more: memory is then bounded by the notes that do.
    { same.remembers(note) } -> std::same_as<bool>;
};

/// Models `PageCache`: slots, pins and requests; what goes out is the rule's to say. Slots come out of the
/// free ones as 0, 1, 2, ...; an erased page's slot is used next.
/// Cost of a request: one or two hash look-ups and the rule; after `reserve` it does not allocate.
template <EvictionRule Rule>
class SlotCache {
  public:
    using Options = typename Rule::Options;
    static constexpr std::size_t max_slots = (std::size_t{1} << 31U) - 1;

    /// @throws config_error if `slots` is not in 1 .. 2^31 - 1, or what the rule throws.
    explicit SlotCache(std::size_t slots, Options options = {})
        : page_(checked(slots)), entry_(slots), pins_(slots), rule_(slots, std::move(options)) {
        free_.reserve(slots);
        for (std::size_t slot = slots; slot-- > 0;) free_.push_back(static_cast<slot_t>(slot));
        table_.reserve(slots + 1);
    }

    /// @throws state_error if the page is not here, no slot is free and all are pinned, or std::bad_alloc;
    /// nothing has changed then.
    [[gnu::always_inline]] Access request(page_t page, double value) {
        auto place = table_.find(page);
        Access access{.hit = place.has_slot(), .slot = place.slot()};
        if (!access.hit) {
            detail::check<error::state_error>(!free_.empty() || pinned_ < page_.size(), "request",
                                              "number of pinned slots", pinned_, "a slot that is not pinned");
            if (table_.make_room([&](std::uint64_t note) { return rule_.remembers(note); })) {
                find_entries();
                place = table_.find(page);
            }
        }
        if constexpr (requires { rule_.requested(page, value); }) rule_.requested(page, value);
        if (!access.hit) load(page, place, access);
        rule_.served({page, access.slot, now_++, value, access.hit, access.guard});
        return access;
    }
    /// Hint: the page is requested soon, some requests from now. Where requests are known ahead, as those of
    /// a decode step are, this hides the memory that a look-up in a large table waits for.
    void prefetch(page_t page) const noexcept { table_.prefetch(page); }
    /// Its sequence ended: the page leaves without a trace. No-op if it is not here.
    /// @throws state_error if it is pinned; nothing has changed then.
    void erase(page_t page) {
        const auto place = table_.find(page);
        if (place.has_slot()) {
            const slot_t slot = place.slot();
            detail::check<error::state_error>(pins_[slot] == 0, "erase", "page", page,
                                              "a page that is not pinned");
            rule_.dropped(slot);
            free_.push_back(slot);
        }
        if constexpr (requires { rule_.erased(page); }) rule_.erased(page);
        if (place.state != 0) table_.change(place.index, detail::PageTable::forgotten);
    }
    /// The page stays until as many `unpin` came. @throws state_error if it is not resident.
    void pin(page_t page) {
        const slot_t slot = slot_of(page);
        if (pins_[slot]++ == 0) {
            ++pinned_;
            rule_.pinned(slot);
        }
    }
    /// @throws state_error if it is not resident or not pinned.
    void unpin(page_t page) {
        const slot_t slot = slot_of(page);
        detail::check<error::state_error>(pins_[slot] > 0, "unpin", "page", page, "a page that is pinned");
        if (--pins_[slot] == 0) {
            --pinned_;
            rule_.unpinned(slot);
        }
    }

    [[nodiscard]] bool contains(page_t page) const noexcept { return table_.find(page).has_slot(); }
    /// @throws state_error if the page is not resident.
    [[nodiscard]] slot_t slot_of(page_t page) const {
        const auto place = table_.find(page);
        detail::check<error::state_error>(place.has_slot(), "slot_of", "page", page, "a resident page");
        return place.slot();
    }
    [[nodiscard]] std::size_t pins(page_t page) const { return pins_[slot_of(page)]; }
    [[nodiscard]] std::size_t slots() const noexcept { return page_.size(); }
    /// Pages that are resident.
    [[nodiscard]] std::size_t size() const noexcept { return page_.size() - free_.size(); }
    [[nodiscard]] std::size_t pinned_slots() const noexcept { return pinned_; }
    /// What the table holds, 64 bytes or more each: resident pages, and gone ones until it is swept.
    [[nodiscard]] std::size_t known_pages() const noexcept { return table_.size(); }
    [[nodiscard]] const Rule& rule() const noexcept { return rule_; }
    /// Room for `pages` different pages: no request allocates until more were seen.
    void reserve(std::size_t pages) {
        const std::size_t own = page_.size() + 1;
        table_.reserve(pages > SIZE_MAX - own ? SIZE_MAX : pages + own);
        find_entries();
    }

  private:
    [[nodiscard]] static std::size_t checked(std::size_t slots) {
        detail::check<error::config_error>(slots >= 1 && slots <= max_slots, "SlotCache", "slots", slots,
                                           "1 to 2^31 - 1");
        return slots;
    }
    [[gnu::noinline]] void find_entries() noexcept {
        for (slot_t slot = 0; slot < page_.size(); ++slot)
            if (const auto place = table_.find(page_[slot]); place.has_slot() && place.slot() == slot)
                entry_[slot] = place.index;
    }
    void load(page_t page, detail::PageTable::Place place, Access& access) {
        Choice choice{};
        if (free_.empty()) {
            choice = rule_.choose(place.note());
            access.victim = page_[choice.slot];
        } else {
            choice.slot = free_.back();
            free_.pop_back();
        }
        access.slot = choice.slot;
        access.guard = choice.guard;
        if (access.victim)
            table_.change(entry_[access.slot], choice.note != 0 ? choice.note : detail::PageTable::forgotten);
        table_.put(place, page, detail::PageTable::resident | access.slot);
        page_[access.slot] = page;
        entry_[access.slot] = place.index;
    }

    detail::PageTable table_;
    std::vector<page_t> page_;
    std::vector<std::size_t> entry_;  // of the page in a slot, in the table
    std::vector<std::uint32_t> pins_;
    std::vector<slot_t> free_;
    std::size_t pinned_ = 0;
    std::uint64_t now_ = 0;
    Rule rule_;
};

}  // namespace kvcull::inline KVCULL_ABI
