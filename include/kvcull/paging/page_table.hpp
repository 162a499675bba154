#pragma once
/// Where pages are: a hash table from a page's id to its slot, or to the note that was left when it went out.

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../base/config.hpp"
#include "../base/error.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Id of a page: any 64-bit number.
using page_t = std::uint64_t;
/// A place in the fast tier, 0 .. slots - 1.
using slot_t = std::uint32_t;

namespace detail {

/// Open addressing with linear probing, at most a quarter full: nearly every look-up ends where it begins,
/// and nothing is allocated per page. A page is *resident* (it has a slot), *gone* (it has a note, a number
/// in 1 .. 2^62 - 1), or unknown. Entries stay where they are until the table is rebuilt, those of forgotten
/// pages too. 16 bytes per entry.
class PageTable {
  public:
    static constexpr std::uint64_t resident = std::uint64_t{1} << 63U, forgotten = std::uint64_t{1} << 62U;

    /// What is known of a page, and where; valid until the next change of the table.
    struct Place {
        std::size_t index = 0;
        std::uint64_t state = 0;  // 0: no entry

        [[nodiscard]] bool has_slot() const noexcept { return (state & resident) != 0; }
        [[nodiscard]] slot_t slot() const noexcept { return static_cast<slot_t>(state); }
        /// 0 if there is none.
        [[nodiscard]] std::uint64_t note() const noexcept { return state < forgotten ? state : 0; }
    };

    /// Makes room for `pages` entries. @throws config_error, std::bad_alloc; nothing has changed then.
    void reserve(std::size_t pages) {
        check<error::config_error>(pages <= max_pages, "PageTable::reserve", "pages", pages, "at most 2^57");
        if (const std::size_t wanted = std::bit_ceil(room * (pages + 1)); wanted > entries_.size())
            rebuild(wanted, [](std::uint64_t) { return true; });
    }
    /// Makes room for one more entry. Where the table would have to grow, notes for which `keep(note)` is
    /// false are forgotten first, so that it holds what is in use and not all that ever was. Amortised O(1).
    /// @return true if places from before are not valid any more. @throws std::bad_alloc as `reserve`.
    template <class Keep>
    bool make_room(const Keep& keep) {
        if (count_ < most_) return false;
        sweep(keep);
        return true;
    }
    template <class Keep>
    [[gnu::noinline]] void sweep(const Keep& keep) {
        std::size_t used = 1;
        for (const Entry& entry : entries_) used += in_use(entry.state, keep) ? 1 : 0;
        rebuild(std::max(std::bit_ceil(2 * room * used), entries_.size()), keep);
    }

    /// Entries, those of forgotten pages included.
    [[nodiscard]] std::size_t size() const noexcept { return count_; }
    [[nodiscard]] Place find(page_t page) const noexcept {
        std::size_t i = home(page);
        while (entries_[i].state != 0 && entries_[i].page != page) i = next(i);
        return {i, entries_[i].state};
    }
    /// A look-up soon will find the page's part of the table in near memory.
    void prefetch(page_t page) const noexcept { __builtin_prefetch(entries_.data() + home(page)); }
    /// `place` comes from `find(page)`; a new entry needs room.
    void put(Place place, page_t page, std::uint64_t state) noexcept {
        KVCULL_ASSERT(count_ < most_ || place.state != 0);
        count_ += place.state == 0 ? 1 : 0;
        entries_[place.index] = {page, state};
    }
    /// For an entry that is known to be at `index`: no look-up.
    void change(std::size_t index, std::uint64_t state) noexcept { entries_[index].state = state; }

  private:
    struct Entry {
        page_t page = 0;
        std::uint64_t state = 0;
    };
    static constexpr std::size_t max_pages = std::size_t{1} << 57U;
    static constexpr std::size_t room = 4;  // entries per page: most look-ups end at the first one

    [[nodiscard]] std::size_t next(std::size_t i) const noexcept { return (i + 1) & mask_; }
    /// Fibonacci hashing: runs and strides of ids, as packed ids have them, spread evenly.
    [[nodiscard]] std::size_t home(page_t page) const noexcept {
        return static_cast<std::size_t>((page * 0x9E3779B97F4A7C15U) >> shift_);
    }
    template <class Keep>
    [[nodiscard]] static bool in_use(std::uint64_t state, const Keep& keep) {
        return (state & resident) != 0 || (state != 0 && state != forgotten && keep(state));
    }
    template <class Keep>
    [[gnu::noinline]] void rebuild(std::size_t size, const Keep& keep) {
        std::vector<Entry> old(size);
        old.swap(entries_);
        shift_ = 64U - static_cast<unsigned>(std::countr_zero(size));
        mask_ = size - 1;
        most_ = size / room;
        count_ = 0;
        for (const Entry& entry : old)
            if (in_use(entry.state, keep)) put(find(entry.page), entry.page, entry.state);
    }

    std::vector<Entry> entries_ = std::vector<Entry>(room);  // a power of two of them
    std::size_t count_ = 0, most_ = 1, mask_ = room - 1;
    unsigned shift_ = 62;
};

}  // namespace detail
}  // namespace kvcull::inline KVCULL_ABI
