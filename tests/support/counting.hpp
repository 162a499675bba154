#pragma once
/// Counts what the program takes from the heap. CMake links counting.cpp, which replaces the global operator
/// new, into the executables whose tests include this.

#include <atomic>
#include <cstddef>

namespace kvcull::test {

inline std::atomic<std::size_t> allocations{0};

/// Allocations since construction, by any thread.
class CountAllocations {
  public:
    [[nodiscard]] std::size_t count() const { return allocations - before_; }

  private:
    std::size_t before_ = allocations;
};

}  // namespace kvcull::test

// The thread sanitizer brings operators of its own, in one piece: nothing is counted under it.
#if defined(__has_feature)
#    if __has_feature(thread_sanitizer)
#        define KVCULL_TEST_TSAN 1
#    endif
#elif defined(__SANITIZE_THREAD__)
#    define KVCULL_TEST_TSAN 1
#endif
