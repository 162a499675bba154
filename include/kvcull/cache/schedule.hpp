#pragma once
/// Work of many heads on the caller's threads.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <functional>
#include <vector>

#include "shape.hpp"

namespace kvcull::inline KVCULL_ABI::detail {

/// Units of work, each in one part or more. What takes longest is handed out first, so that no thread sits
/// waiting for one that began a long head last; whoever ends a unit's last part finishes the unit.
class Schedule {
  public:
    void clear() noexcept {
        items_.clear();
        units_.clear();
    }
    /// The next unit. @param cost  of one of its parts, in any measure
    void add(std::size_t parts, std::size_t cost) {
        for (std::size_t part = 0; part < parts; ++part) items_.push_back({units_.size(), part, cost});
        units_.push_back({parts, parts});
    }

    /// `start(unit)` before the parts of a unit that has several: for all units on this thread first, or,
    /// without an executor, unit by unit. `run(unit, part)` for all parts. `done(unit, parts)` after the last
    /// of them. All units are used up then.
    template <class Start, class Run, class Done>
    void run(const Executor& executor, Start&& start, Run&& run, Done&& done) {
        if (!executor) {
            for (std::size_t unit = 0; unit < units_.size(); ++unit) {
                const std::size_t parts = units_[unit].parts;
                if (parts > 1) start(unit);
                for (std::size_t part = 0; part < parts; ++part) run(unit, part);
                done(unit, parts);
            }
            return;
        }
        for (std::size_t unit = 0; unit < units_.size(); ++unit)
            if (units_[unit].parts > 1) start(unit);
        std::sort(items_.begin(), items_.end(), [](const Item& a, const Item& b) {
            if (a.cost != b.cost) return a.cost > b.cost;
            return a.unit != b.unit ? a.unit < b.unit : a.part < b.part;
        });
        const auto body = [&](std::size_t index) {
            const Item item = items_[index];
            run(item.unit, item.part);
            Unit& unit = units_[item.unit];
            if (std::atomic_ref(unit.left).fetch_sub(1, std::memory_order_acq_rel) == 1)
                done(item.unit, unit.parts);
        };
        executor(items_.size(), std::ref(body));  // by reference: std::function would copy it to the heap
    }
    void reserve(std::size_t units, std::size_t parts) {
        items_.reserve(units * parts);
        units_.reserve(units);
    }

  private:
    struct Item {
        std::size_t unit, part, cost;
    };
    struct Unit {
        std::size_t parts, left;  // left: not ended yet
    };
    std::vector<Item> items_;
    std::vector<Unit> units_;
};

}  // namespace kvcull::inline KVCULL_ABI::detail
