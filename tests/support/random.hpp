#pragma once
/// Numbers for tests that are the same on every platform and standard library.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kvcull/base/memory.hpp"
#include "kvcull/base/types.hpp"

namespace kvcull::test {

/// Roughly normal numbers with mean 0 and deviation `scale`: the sum of four uniform ones.
inline std::vector<float> random_floats(std::size_t count, std::uint64_t seed, float scale = 1.0F) {
    SplitMix64 random{seed};
    std::vector<float> result(count);
    for (float& x : result) {
        const double sum = random.uniform() + random.uniform() + random.uniform() + random.uniform();
        x = static_cast<float>((sum - 2.0) * 1.7320508) * scale;
    }
    return result;
}

inline std::vector<float16> to_float16s(const std::vector<float>& values) {
    std::vector<float16> result;
    for (const float x : values) result.push_back(to_float16(x));
    return result;
}

inline std::vector<float> to_floats(const std::vector<float16>& values) {
    std::vector<float> result;
    for (const float16 x : values) result.push_back(to_float(x));
    return result;
}

}  // namespace kvcull::test
