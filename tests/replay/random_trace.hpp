#pragma once
/// Traces and folders for the tests of kvcull-replay.

#include <unistd.h>

#include <filesystem>
#include <numeric>
#include <string>

#include "replay/trace.hpp"
#include "support/random.hpp"

namespace replay::test {

/// 2 layers, 4 query heads on 2 KV heads, keys of 8 and values of 6 numbers, 40 tokens of which 25 are
/// prompt.
inline Trace random_trace(kvcull::DType dtype = kvcull::DType::f32) {
    Trace trace;
    trace.shape = {.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 8, .value_dim = 6, .dtype = dtype};
    trace.prompt = 25;
    trace.positions.resize(40);
    std::iota(trace.positions.begin(), trace.positions.end(), kvcull::position_t{0});
    for (std::uint64_t layer = 0; layer < 2; ++layer)
        trace.layers.push_back({kvcull::test::random_floats(4 * 40 * 8, 3 * layer + 1, 2.0F),
                                kvcull::test::random_floats(2 * 40 * 8, 3 * layer + 2),
                                kvcull::test::random_floats(2 * 40 * 6, 3 * layer + 3)});
    return trace;
}

/// A folder that is gone when the test ends.
struct Folder {
    const std::filesystem::path path =
        std::filesystem::temp_directory_path() / ("kvcull_test_replay_" + std::to_string(::getpid()));
    Folder() { std::filesystem::create_directories(path); }
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;
    ~Folder() { std::filesystem::remove_all(path); }
    [[nodiscard]] std::string file(const std::string& name) const { return (path / name).string(); }
};

}  // namespace replay::test
