#pragma once
/// Memory of many caches: equal blocks with use counts, under one hard limit.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "../base/config.hpp"
#include "../base/error.hpp"
#include "../base/pages.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Gives blocks to any number of sequences. A freed block is used again before new memory is mapped, and goes
/// back to the system only in `trim()` (or when another block size needs its room under the limit).
/// Thread-safe: every member may be called from any thread. Destroy it after all caches that use it.
///
/// A block is a 64-byte header followed by the payload, whose address is what callers hold (64-byte aligned).
/// Blocks of one size lie side by side in slabs; the lists of free blocks live outside of them, so that the
/// pages of a free block are never touched.
class BlockPool {
  public:
    static constexpr std::size_t header_bytes = 64;
    static constexpr std::size_t max_block_rows = 4096;

    struct Options {
        /// Hard limit on the bytes of blocks in use, headers included.
        std::size_t bytes = SIZE_MAX;
        /// Rows per block of the caches on this pool, 1 .. 4096. Small blocks return memory in finer steps,
        /// large ones give longer runs to the kernels.
        std::size_t block_rows = 64;
    };

    BlockPool() : BlockPool(Options{}) {}
    /// @throws config_error if `block_rows` is out of range.
    explicit BlockPool(Options options) : limit_(options.bytes), block_rows_(options.block_rows) {
        detail::check<error::config_error>(block_rows_ >= 1 && block_rows_ <= max_block_rows, "BlockPool",
                                           "block_rows", block_rows_, "1 .. 4096");
    }
    BlockPool(const BlockPool&) = delete;
    BlockPool& operator=(const BlockPool&) = delete;
    ~BlockPool() { KVCULL_ASSERT(in_use_ == 0 && "a cache outlives its BlockPool"); }

    [[nodiscard]] std::size_t block_rows() const noexcept { return block_rows_; }
    [[nodiscard]] std::size_t limit() const {
        const std::scoped_lock lock(mutex_);
        return limit_;
    }
    /// May lie below what is in use: blocks in use stay, only new ones are refused.
    void set_limit(std::size_t bytes) {
        const std::scoped_lock lock(mutex_);
        limit_ = bytes;
    }
    /// Bytes of the blocks in use, headers included. A shared block counts once.
    [[nodiscard]] std::size_t bytes() const {
        const std::scoped_lock lock(mutex_);
        return in_use_;
    }
    /// Highest value of `bytes()` so far.
    [[nodiscard]] std::size_t peak_bytes() const {
        const std::scoped_lock lock(mutex_);
        return peak_;
    }
    /// Address space taken from the system. Pages that `trim()` discarded inside a slab still count, though
    /// they hold no physical memory.
    [[nodiscard]] std::size_t mapped_bytes() const {
        const std::scoped_lock lock(mutex_);
        return mapped_;
    }

    /// Gives the memory of free blocks back to the system: slabs without a block in use are unmapped, in all
    /// others the pages of free blocks are discarded. Cost: O(free blocks) and a system call per run of them.
    void trim() {
        const std::scoped_lock lock(mutex_);
        for (const auto& size_class : classes_) give_back(*size_class);
        std::erase_if(classes_, [](const auto& size_class) { return size_class->slabs.empty(); });
    }

    /// What one block of `payload_bytes` counts in `bytes()` and against the limit.
    [[nodiscard]] static constexpr std::size_t footprint(std::size_t payload_bytes) noexcept {
        return (payload_bytes + 63) / 64 * 64 + header_bytes;
    }

    /// Appends the payload addresses of `count` blocks with use count 1 to `out`. Contents are unspecified.
    /// @throws capacity_error if the limit or the system does not allow all of them; nothing has changed
    /// then.
    /// @throws config_error if a block of that size cannot exist.
    void acquire(std::size_t payload_bytes, std::size_t count, std::vector<std::byte*>& out) {
        detail::check<error::config_error>(payload_bytes >= 1 && payload_bytes <= SIZE_MAX / 32,
                                           "BlockPool::acquire", "payload_bytes", payload_bytes,
                                           "1 .. SIZE_MAX / 32");
        if (count == 0) return;
        const std::size_t stride = footprint(payload_bytes);
        const std::scoped_lock lock(mutex_);
        const std::size_t allowed = (limit_ > in_use_ ? limit_ - in_use_ : 0) / stride;
        if (count > allowed) [[unlikely]]
            refuse(count, stride, std::to_string(allowed) + " under");
        SizeClass* size_class = nullptr;
        try {
            if (out.capacity() - out.size() < count)
                out.reserve(std::max(out.size() + count, 2 * out.capacity()));
            size_class = &class_of(stride);
            map_until_free(*size_class, count);
        } catch (const std::bad_alloc&) {
            refuse(count, stride, "what the system can map, within");
        }
        for (std::size_t i = 0; i < count; ++i) out.push_back(take(*size_class));
        in_use_ += count * stride;
        peak_ = std::max(peak_, in_use_);
    }

    /// One more owner of `block`.
    static void retain(std::byte* block) noexcept {
        header(block).uses.fetch_add(1, std::memory_order_relaxed);
    }
    /// One owner less; the last one makes the block free. `block` must come from this pool.
    void release(std::byte* block) noexcept {
        Header& head = header(block);
        // Acquire and release: what the other owners did with the block comes before its next use.
        if (head.uses.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
        const std::scoped_lock lock(mutex_);
        Slab& slab = *head.slab;
        SizeClass& size_class = *slab.owner;
        slab.free.push_back(head.index);  // within the capacity reserved when the slab was mapped
        slab.dirty = true;
        size_class.free += 1;
        size_class.first = std::min(size_class.first, slab.position);
        in_use_ -= size_class.stride;
    }
    /// Number of owners. 1 means that the caller alone sees the block and may write to it.
    [[nodiscard]] static std::size_t use_count(const std::byte* block) noexcept {
        return header(const_cast<std::byte*>(block)).uses.load(std::memory_order_acquire);
    }

  private:
    /// A slab is that large, or this many blocks if they need more.
    static constexpr std::size_t slab_bytes = std::size_t{2} << 20U;
    static constexpr std::size_t slab_min_blocks = 8;

    struct SizeClass;
    struct Slab {
        Pages pages;
        SizeClass* owner;
        std::size_t position;             // in owner->slabs
        std::size_t blocks;               // blocks of this slab
        std::vector<std::uint32_t> free;  // stack: what was freed last is still in the processor's cache
        bool dirty = false;               // a block was freed since the free ones were discarded
    };
    struct SizeClass {
        std::size_t stride;
        std::size_t free = 0;  // free blocks of all slabs
        std::size_t first =
            0;  // no slab before this one has a free block; filling from the front empties the rest
        std::vector<std::unique_ptr<Slab>> slabs;
    };
    struct alignas(header_bytes) Header {
        std::atomic<std::uint32_t> uses;
        std::uint32_t index;
        Slab* slab;
    };
    static_assert(sizeof(Header) == header_bytes);

    [[nodiscard]] static Header& header(std::byte* block) noexcept {
        return *std::launder(reinterpret_cast<Header*>(block - header_bytes));
    }

    [[noreturn, gnu::cold, gnu::noinline]] void refuse(std::size_t count, std::size_t stride,
                                                       const std::string& wanted) const {
        detail::fail<error::capacity_error>(
            "BlockPool::acquire", "count",
            std::to_string(count) + " blocks of " + std::to_string(stride) + " bytes with " +
                std::to_string(in_use_) + " bytes in use",
            "at most " + wanted + " the limit of " + std::to_string(limit_) + " bytes");
    }

    [[nodiscard]] SizeClass& class_of(std::size_t stride) {
        for (const auto& size_class : classes_) {
            if (size_class->stride == stride) return *size_class;
        }
        classes_.push_back(std::make_unique<SizeClass>());
        classes_.back()->stride = stride;
        return *classes_.back();
    }

    [[nodiscard]] std::byte* take(SizeClass& size_class) noexcept {
        while (size_class.slabs[size_class.first]->free.empty()) ++size_class.first;
        Slab& slab = *size_class.slabs[size_class.first];
        const std::uint32_t index = slab.free.back();
        slab.free.pop_back();
        size_class.free -= 1;
        std::byte* raw = slab.pages.data() + index * size_class.stride;
        // A header does not survive a discard, so every use of a block writes it anew.
        ::new (static_cast<void*>(raw)) Header{1, index, &slab};
        return raw + header_bytes;
    }

    /// Maps slabs until `count` blocks are free. On std::bad_alloc the new slabs are unmapped again.
    void map_until_free(SizeClass& size_class, std::size_t count) {
        const std::size_t before = size_class.slabs.size();
        try {
            while (size_class.free < count) map_slab(size_class);
        } catch (...) {
            while (size_class.slabs.size() > before) drop(size_class, size_class.slabs.size() - 1);
            throw;
        }
    }

    void map_slab(SizeClass& size_class) {
        const std::size_t stride = size_class.stride;
        const std::size_t usual = std::max(slab_min_blocks, slab_bytes / stride);
        const auto allowed = [&] { return (limit_ > mapped_ ? limit_ - mapped_ : 0) / stride; };
        if (allowed() < usual) {  // idle memory of other block sizes would push the process over the limit
            for (const auto& other : classes_) {
                if (other.get() != &size_class) give_back(*other);
            }
        }
        const std::size_t wanted = std::clamp(allowed(), slab_min_blocks, usual);
        auto slab =
            std::make_unique<Slab>(Slab{Pages(wanted * stride), &size_class, size_class.slabs.size(), 0, {}});
        slab->blocks = slab->pages.bytes() / stride;
        slab->free.resize(slab->blocks);
        for (std::size_t i = 0; i < slab->blocks; ++i) {
            slab->free[i] = static_cast<std::uint32_t>(slab->blocks - 1 - i);
        }
        size_class.slabs.push_back(std::move(slab));
        size_class.free += size_class.slabs.back()->blocks;
        mapped_ += size_class.slabs.back()->pages.bytes();
    }

    /// Unmaps a slab without blocks in use.
    void drop(SizeClass& size_class, std::size_t position) noexcept {
        mapped_ -= size_class.slabs[position]->pages.bytes();
        size_class.free -= size_class.slabs[position]->blocks;
        size_class.slabs.erase(size_class.slabs.begin() + static_cast<std::ptrdiff_t>(position));
        for (std::size_t i = position; i < size_class.slabs.size(); ++i) size_class.slabs[i]->position = i;
        size_class.first = std::min(size_class.first, position);
    }

    void give_back(SizeClass& size_class) noexcept {
        for (std::size_t i = size_class.slabs.size(); i-- > 0;) {
            Slab& slab = *size_class.slabs[i];
            if (slab.free.size() == slab.blocks) {
                drop(size_class, i);
            } else if (slab.dirty) {
                discard_free(slab);
            }
        }
    }
    /// Neighbouring free blocks go back together: pages on their borders too.
    static void discard_free(Slab& slab) noexcept {
        std::sort(slab.free.begin(), slab.free.end(), std::greater<>());
        const std::size_t stride = slab.owner->stride;
        for (std::size_t i = 0; i < slab.free.size();) {
            const std::size_t end = slab.free[i] + std::size_t{1};
            std::size_t begin = end;
            while (i < slab.free.size() && slab.free[i] + std::size_t{1} == begin) {
                --begin;
                ++i;
            }
            slab.pages.discard(begin * stride, (end - begin) * stride);
        }
        slab.dirty = false;
    }

    mutable std::mutex mutex_;
    std::size_t limit_, block_rows_;
    std::size_t in_use_ = 0, peak_ = 0, mapped_ = 0;
    std::vector<std::unique_ptr<SizeClass>> classes_;
};

}  // namespace kvcull::inline KVCULL_ABI
