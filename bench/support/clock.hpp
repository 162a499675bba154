#pragma once
/// Wall time, and a team of threads that do one thing at once.

#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <thread>
#include <vector>

namespace kvcull::bench {

[[nodiscard]] inline double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// The caller and `threads - 1` helpers, which sleep between two calls.
class Team {
  public:
    explicit Team(std::size_t threads) {
        for (std::size_t part = 1; part < threads; ++part)
            helpers_.emplace_back([this, part](const std::stop_token& stop) { help(part, stop); });
    }
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;
    ~Team() {
        for (std::jthread& helper : helpers_) helper.request_stop();
        start_.fetch_add(1);
        start_.notify_all();
    }

    [[nodiscard]] std::size_t threads() const { return helpers_.size() + 1; }

    /// `body(part)` for every thread's part. @returns wall seconds from the call until all are done, waking
    /// the helpers included.
    double run(const std::function<void(std::size_t)>& body) {
        const double begin = seconds();
        if (helpers_.empty()) {
            body(0);
            return seconds() - begin;
        }
        body_ = &body;
        running_.store(helpers_.size());
        start_.fetch_add(1);
        start_.notify_all();
        body(0);
        for (std::size_t left = running_.load(); left != 0; left = running_.load()) running_.wait(left);
        return seconds() - begin;
    }

  private:
    void help(std::size_t part, const std::stop_token& stop) {
        for (unsigned seen = 0;; ++seen) {
            start_.wait(seen);
            if (stop.stop_requested()) return;
            (*body_)(part);
            if (running_.fetch_sub(1) == 1) running_.notify_all();
        }
    }

    std::atomic<unsigned> start_ = 0;
    std::atomic<std::size_t> running_ = 0;
    const std::function<void(std::size_t)>* body_ = nullptr;
    std::vector<std::jthread> helpers_;
};

}  // namespace kvcull::bench
