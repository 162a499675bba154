#pragma once
/// Counts what the program takes from the heap, by replacing the global operator new. Those functions cannot
/// be inline: include this in one file of an executable.

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace kvcull::test {

inline std::atomic<std::size_t> allocations{0};

/// Allocations since construction, by any thread.
class CountAllocations {
  public:
    [[nodiscard]] std::size_t count() const { return allocations - before_; }

  private:
    std::size_t before_ = allocations;
};

inline void* counted(std::size_t bytes, std::size_t alignment) {
    allocations.fetch_add(1, std::memory_order_relaxed);
    // aligned_alloc wants a multiple of the alignment.
    void* memory = std::aligned_alloc(alignment, (bytes / alignment + 1) * alignment);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}

}  // namespace kvcull::test

// The thread sanitizer brings operators of its own, in one piece: nothing is counted under it.
#if defined(__has_feature)
#    if __has_feature(thread_sanitizer)
#        define KVCULL_TEST_TSAN 1
#    endif
#elif defined(__SANITIZE_THREAD__)
#    define KVCULL_TEST_TSAN 1
#endif
#if !defined(KVCULL_TEST_TSAN)

// All forms, or a sanitizer would serve the others. Out of line: GCC sees malloc's memory in an inlined pair
// of them and calls new and free a mismatch.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
    return kvcull::test::counted(bytes, alignof(std::max_align_t));
}
[[gnu::noinline]] void* operator new(std::size_t bytes, std::align_val_t alignment) {
    return kvcull::test::counted(bytes, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
    return kvcull::test::counted(bytes, alignof(std::max_align_t));  // as far as these tests go
}
[[gnu::noinline]] void* operator new[](std::size_t bytes) {
    return kvcull::test::counted(bytes, alignof(std::max_align_t));
}
[[gnu::noinline]] void* operator new[](std::size_t bytes, std::align_val_t alignment) {
    return kvcull::test::counted(bytes, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept {
    return kvcull::test::counted(bytes, alignof(std::max_align_t));
}
[[gnu::noinline]] void operator delete(void* memory) noexcept {
    std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept {
    std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t) noexcept {
    std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
    std::free(memory);
}
[[gnu::noinline]] void operator delete[](void* memory) noexcept {
    std::free(memory);
}
[[gnu::noinline]] void operator delete[](void* memory, std::size_t) noexcept {
    std::free(memory);
}
[[gnu::noinline]] void operator delete[](void* memory, std::align_val_t) noexcept {
    std::free(memory);
}
[[gnu::noinline]] void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept {
    std::free(memory);
}

#endif
