#pragma once
/// The frames of a fast tier, and the store that keeps pages in host memory.

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../base/config.hpp"
#include "../base/error.hpp"
#include "../base/memory.hpp"
#include "page_table.hpp"
#include "tier.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Fast memory: `count` frames of `page_bytes` each, owned or the caller's. Moving it leaves the bytes where
/// they are.
class Frames {
  public:
    /// Owned: zeroed, each frame 64-byte aligned. @throws config_error if `count` or `page_bytes` is 0, or
    /// frames end beyond all memory.
    Frames(std::size_t count, std::size_t page_bytes)
        : page_bytes_(checked(page_bytes)), stride_(round_up(page_bytes)), count_(count) {
        detail::check<error::config_error>(count >= 1, "Frames", "count", count, "at least 1");
        detail::check<error::config_error>(stride_ >= page_bytes && count <= most_bytes / stride_, "Frames",
                                           "count", count,
                                           detail::text("fewer, with page_bytes = ", page_bytes));
        data_ = owned_.get(count * stride_);
        std::memset(data_, 0, count * stride_);
    }
    /// The caller's, one frame after another; it must outlive this.
    /// @throws config_error if `page_bytes` is 0; shape_error if the bytes are not one or more whole frames.
    Frames(std::span<std::byte> bytes, std::size_t page_bytes)
        : page_bytes_(checked(page_bytes)),
          stride_(page_bytes),
          count_(bytes.size() / page_bytes),
          data_(bytes.data()) {
        detail::check<error::shape_error>(!bytes.empty() && bytes.size() % page_bytes == 0, "Frames",
                                          "number of bytes", bytes.size(),
                                          detail::text("one or more times ", page_bytes));
    }
    Frames(const Frames&) = delete;
    Frames(Frames&&) noexcept = default;
    Frames& operator=(const Frames&) = delete;
    Frames& operator=(Frames&&) noexcept = default;
    ~Frames() = default;

    /// Its `page_bytes` bytes. @throws shape_error if there is no such frame.
    [[nodiscard]] std::span<std::byte> operator[](slot_t frame) const {
        detail::check<error::shape_error>(frame < count_, "Frames", "frame", frame,
                                          detail::text("less than ", count_));
        return {data_ + frame * stride_, page_bytes_};
    }
    [[nodiscard]] std::size_t size() const noexcept { return count_; }
    [[nodiscard]] std::size_t page_bytes() const noexcept { return page_bytes_; }

  private:
    using Memory = Scratch<std::byte>;
    static constexpr std::size_t most_bytes = std::numeric_limits<std::ptrdiff_t>::max();

    [[nodiscard]] static std::size_t checked(std::size_t page_bytes) {
        detail::check<error::config_error>(page_bytes >= 1, "Frames", "page_bytes", page_bytes, "at least 1");
        return page_bytes;
    }
    [[nodiscard]] static std::size_t round_up(std::size_t bytes) noexcept {
        return (bytes + Memory::alignment - 1) / Memory::alignment * Memory::alignment;
    }

    std::size_t page_bytes_, stride_, count_;
    Memory owned_;
    std::byte* data_ = nullptr;
};

namespace detail {

template <class Map>
[[nodiscard]] std::vector<page_t> ascending_keys(const Map& pages) {
    std::vector<page_t> keys;
    keys.reserve(pages.size());
    for (const auto& entry : pages) keys.push_back(entry.first);
    std::sort(keys.begin(), keys.end());
    return keys;
}

}  // namespace detail

/// Pages in host memory: a copy each way. Models `PageStore`.
class MemoryStore {
  public:
    explicit MemoryStore(Frames frames) : frames_(std::move(frames)) {}

    /// @throws state_error if the page was not written; shape_error if there is no such frame.
    void read(page_t page, slot_t frame) const {
        const auto found = pages_.find(page);
        detail::check<error::state_error>(found != pages_.end(), "MemoryStore::read", "page", page,
                                          "a page that was written");
        const auto to = frames_[frame];
        std::copy_n(found->second.get(), to.size(), to.data());
    }
    /// @throws shape_error if there is no such frame, or std::bad_alloc; nothing has changed then.
    void write(page_t page, slot_t frame) {
        const auto from = frames_[frame];
        auto found = pages_.find(page);
        if (found == pages_.end())
            found = pages_.emplace(page, std::make_unique<std::byte[]>(from.size())).first;
        std::copy_n(from.data(), from.size(), found->second.get());
    }
    void erase(page_t page) noexcept { pages_.erase(page); }

    [[nodiscard]] std::span<std::byte> frame(slot_t frame) const { return frames_[frame]; }
    [[nodiscard]] bool contains(page_t page) const { return pages_.contains(page); }
    /// Those that are kept, ascending.
    [[nodiscard]] std::vector<page_t> pages() const { return detail::ascending_keys(pages_); }
    /// Number of pages kept.
    [[nodiscard]] std::size_t size() const noexcept { return pages_.size(); }

  private:
    Frames frames_;
    std::unordered_map<page_t, std::unique_ptr<std::byte[]>> pages_;
};
static_assert(HoldsPages<MemoryStore> && ShowsFrames<MemoryStore>);

}  // namespace kvcull::inline KVCULL_ABI
