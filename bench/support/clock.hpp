#pragma once
/// Two clocks, and a team of threads that do one thing at once.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <ctime>
#include <functional>
#include <thread>
#include <vector>

namespace kvcull::bench {

/// Seconds by the wall, and those that the thread itself ran (of several threads: the busiest one's). The two
/// differ when other programs take the processor away; nothing that is measured here sleeps.
struct Time {
    double wall = 0, busy = 0;

    Time& operator+=(const Time& other) {
        wall += other.wall;
        busy += other.busy;
        return *this;
    }
};

/// Since it was made. Where the system has no clock per thread, the wall stands in.
class Stopwatch {
  public:
    [[nodiscard]] Time elapsed() const {
        const Time end = now();
        return {end.wall - begin_.wall, end.busy - begin_.busy};
    }

  private:
    static Time now() {
        const double wall =
            std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
#if defined(CLOCK_THREAD_CPUTIME_ID)
        timespec busy{};
        if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &busy) == 0)
            return {wall, static_cast<double>(busy.tv_sec) + 1e-9 * static_cast<double>(busy.tv_nsec)};
#endif
        return {wall, wall};
    }

    Time begin_ = now();
};

/// The caller and `threads - 1` helpers, which sleep between two calls.
class Team {
  public:
    explicit Team(std::size_t threads) : busy_(threads) {
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

    /// `body(part)` for every thread's part. @returns the time from the call until all are done; by the wall,
    /// waking the helpers is included.
    Time run(const std::function<void(std::size_t)>& body) {
        const Stopwatch watch;
        if (helpers_.empty()) {
            body(0);
            return watch.elapsed();
        }
        body_ = &body;
        running_.store(helpers_.size());
        start_.fetch_add(1);
        start_.notify_all();
        work(0);
        for (std::size_t left = running_.load(); left != 0; left = running_.load()) running_.wait(left);
        return {watch.elapsed().wall, *std::max_element(busy_.begin(), busy_.end())};
    }

  private:
    void work(std::size_t part) {
        const Stopwatch watch;
        (*body_)(part);
        busy_[part] = watch.elapsed().busy;
    }
    void help(std::size_t part, const std::stop_token& stop) {
        for (unsigned seen = 0;; ++seen) {
            start_.wait(seen);
            if (stop.stop_requested()) return;
            work(part);
            if (running_.fetch_sub(1) == 1) running_.notify_all();
        }
    }

    std::atomic<unsigned> start_ = 0;
    std::atomic<std::size_t> running_ = 0;
    const std::function<void(std::size_t)>* body_ = nullptr;
    std::vector<double> busy_;
    std::vector<std::jthread> helpers_;
};

}  // namespace kvcull::bench
