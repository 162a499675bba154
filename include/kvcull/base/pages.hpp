#pragma once
/// Page-granular memory straight from the system. A general allocator keeps what is freed for later; these
/// pages really go back, whole or in parts.

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#include "config.hpp"

#if __has_include(<sys/mman.h>) && __has_include(<unistd.h>)
#    include <sys/mman.h>
#    include <unistd.h>
#    define KVCULL_HAS_MMAP 1
#else
#    define KVCULL_HAS_MMAP 0
#endif

namespace kvcull::inline KVCULL_ABI {

/// Owns a range of whole pages. The contents of fresh pages are unspecified, and they take physical memory
/// only once they are written. Without `mmap` it is aligned `operator new`, and nothing can be given back in
/// parts.
class Pages {
  public:
    /// Bytes of one page of this system.
    [[nodiscard]] static std::size_t page_bytes() noexcept {
#if KVCULL_HAS_MMAP
        static const std::size_t size = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
        return size;
#else
        return 4096;
#endif
    }

    Pages() = default;
    /// Maps at least `bytes` bytes, rounded up to whole pages.
    /// @throws std::bad_alloc when the system refuses.
    explicit Pages(std::size_t bytes) {
        const std::size_t page = page_bytes();
        if (bytes > SIZE_MAX - page) throw std::bad_alloc();
        bytes = (bytes + page - 1) / page * page;
        if (bytes == 0) return;
#if KVCULL_HAS_MMAP
        void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (data == MAP_FAILED) throw std::bad_alloc();
#else
        void* data = ::operator new (bytes, std::align_val_t{page});
#endif
        data_ = static_cast<std::byte*>(data);
        bytes_ = bytes;
    }
    Pages(const Pages&) = delete;
    Pages(Pages&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
    Pages& operator=(const Pages&) = delete;
    Pages& operator=(Pages&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        other.unmap();
        return *this;
    }
    ~Pages() {
        unmap();
    }

    [[nodiscard]] std::byte* data() const noexcept {
        return data_;
    }
    [[nodiscard]] std::size_t bytes() const noexcept {
        return bytes_;
    }

    /// Gives everything back to the system; `data()` is null afterwards.
    void unmap() noexcept {
        if (data_ == nullptr) return;
#if KVCULL_HAS_MMAP
        ::munmap(data_, bytes_);
#else
        ::operator delete (data_, std::align_val_t{page_bytes()});
#endif
        data_ = nullptr;
        bytes_ = 0;
    }

    /// Gives the physical memory of all pages that lie wholly in `[offset, offset + bytes)` back. The
    /// addresses stay valid; the contents of those pages are lost, the bytes around them are not.
    /// @return whether any page was given back (never without `mmap`).
    bool discard([[maybe_unused]] std::size_t offset, [[maybe_unused]] std::size_t bytes) noexcept {
        KVCULL_ASSERT(offset <= bytes_ && bytes <= bytes_ - offset);
#if KVCULL_HAS_MMAP
        const std::size_t page = page_bytes();
        const std::size_t begin = (offset + page - 1) / page * page;
        const std::size_t end = (offset + bytes) / page * page;
        if (begin >= end) return false;
#    if defined(__APPLE__)
        return ::madvise(data_ + begin, end - begin, MADV_FREE) == 0;  // MADV_DONTNEED frees nothing there
#    else
        return ::madvise(data_ + begin, end - begin, MADV_DONTNEED) == 0;
#    endif
#else
        return false;
#endif
    }

  private:
    std::byte* data_ = nullptr;
    std::size_t bytes_ = 0;
};

}  // namespace kvcull::inline KVCULL_ABI
