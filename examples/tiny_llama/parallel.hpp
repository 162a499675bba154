#pragma once
/// A loop on several threads.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace tiny_llama {

/// Runs body(0) .. body(count - 1) on `threads` threads; the first exception is thrown when all are done.
template <class Body>
void parallel_for(std::size_t threads, std::size_t count, Body&& body) {
    std::atomic<std::size_t> next = 0;
    std::exception_ptr error;
    std::mutex mutex;
    const auto work = [&] {
        try {
            for (std::size_t i = next++; i < count; i = next++) body(i);
        } catch (...) {
            next = count;
            const std::scoped_lock lock(mutex);
            if (!error) error = std::current_exception();
        }
    };
    {
        std::vector<std::jthread> others;
        for (std::size_t i = 1; i < std::min(threads, count); ++i) others.emplace_back(work);
        work();
    }
    if (error) std::rethrow_exception(error);
}

}  // namespace tiny_llama
