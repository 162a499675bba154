#pragma once
/// The instruction sets that tests go over.

#include <vector>

#include "kvcull/simd/kernels.hpp"

namespace kvcull::test {

inline std::vector<simd::Isa> available_isas() {
    std::vector<simd::Isa> result;
    for (const simd::Isa isa : simd::all_isas)
        if (simd::available(isa)) result.push_back(isa);
    return result;
}

}  // namespace kvcull::test
