#pragma once
/// What an x86 CPU can do and what its operating system saves at a task switch. Asked of the processor
/// itself:
/// __builtin_cpu_supports does not know F16C in Clang 14 and needs a runtime library that not every linker
/// has.

#include "target.hpp"

#if KVCULL_X86

#    include <cpuid.h>

#    include <cstdint>

#    include "../base/config.hpp"

namespace kvcull::inline KVCULL_ABI::simd {

/// Feature bits of the processor; all zero for leaves that it does not have.
struct CpuId {
    std::uint32_t leaf1_ecx = 0, leaf7_ebx = 0, leaf7_ecx = 0;
    std::uint32_t saved_state = 0;  ///< register XCR0: bit 1 SSE, bit 2 AVX, bits 5 to 7 AVX-512

    CpuId() noexcept {
        unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
        if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0) leaf1_ecx = ecx;
        if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0) {
            leaf7_ebx = ebx;
            leaf7_ecx = ecx;
        }
        if ((leaf1_ecx & bit_OSXSAVE) == 0) return;
        std::uint32_t high = 0;
        __asm__("xgetbv" : "=a"(saved_state), "=d"(high) : "c"(0));
    }
};

}  // namespace kvcull::inline KVCULL_ABI::simd

#endif
