#pragma once
/// Regions of code with their own compiler options. Every #include comes before a region is opened.
///
/// KVCULL_PRECISE_BEGIN .. KVCULL_PRECISE_END: floats mean what IEEE 754 says, also under -ffast-math in the
/// user's flags; a product and a sum are never contracted behind our back, so that one source line gives one
/// rounding wherever it is inlined. (Clang with -ffast-math and a target that has FMA contracts all the same;
/// it then does so everywhere alike.)
/// KVCULL_TARGET_BEGIN("avx2,fma") .. KVCULL_TARGET_END: the same, with an instruction set that the user's
/// flags need not have. Inside: no lambda, no std:: container, nothing shared with another region, and
/// vectors cross calls only between always_inline functions.

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#    define KVCULL_X86 1
#else
#    define KVCULL_X86 0
#endif
#if defined(__aarch64__) && defined(__ARM_NEON) && !defined(__AARCH64EB__)
#    define KVCULL_NEON 1
#else
#    define KVCULL_NEON 0
#endif

#define KVCULL_PRAGMA(text) _Pragma(#text)

#if defined(__clang__) && defined(__aarch64__) && __clang_major__ < 16
// These know no such pragma on ARM; without -ffast-math they only contract where they like to.
#    if defined(__FAST_MATH__)
#        error "kvcull: on ARM, -ffast-math needs Clang 16 or newer"
#    endif
#    define KVCULL_PRECISE_BEGIN
#    define KVCULL_PRECISE_END
#elif defined(__clang__)
#    define KVCULL_PRECISE_BEGIN                        \
        KVCULL_PRAGMA(float_control(precise, on, push)) \
        KVCULL_PRAGMA(clang fp contract(off))
#    define KVCULL_PRECISE_END KVCULL_PRAGMA(float_control(pop))
#    define KVCULL_TARGET_BEGIN(features) \
        KVCULL_PRECISE_BEGIN              \
        KVCULL_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#    define KVCULL_TARGET_END KVCULL_PRAGMA(clang attribute pop) KVCULL_PRECISE_END
#elif defined(__GNUC__)
#    define KVCULL_PRECISE_BEGIN        \
        KVCULL_PRAGMA(GCC push_options) \
        KVCULL_PRAGMA(GCC optimize("no-fast-math", "fp-contract=off"))
#    define KVCULL_PRECISE_END KVCULL_PRAGMA(GCC pop_options)
#    define KVCULL_TARGET_BEGIN(features) KVCULL_PRECISE_BEGIN KVCULL_PRAGMA(GCC target(features))
#    define KVCULL_TARGET_END KVCULL_PRECISE_END
#elif defined(_MSC_VER)
#    define KVCULL_PRECISE_BEGIN __pragma(float_control(precise, on, push)) __pragma(fp_contract(off))
#    define KVCULL_PRECISE_END __pragma(float_control(pop))
#else
#    define KVCULL_PRECISE_BEGIN
#    define KVCULL_PRECISE_END
#endif

/// GCC 12 warns that AVX-512 intrinsics read an uninitialised value: the one they pass where a mask leaves no
/// lane to be taken from it.
#if defined(__GNUC__) && !defined(__clang__)
#    define KVCULL_AVX512_WARNINGS_BEGIN                        \
        KVCULL_PRAGMA(GCC diagnostic push)                      \
        KVCULL_PRAGMA(GCC diagnostic ignored "-Wuninitialized") \
        KVCULL_PRAGMA(GCC diagnostic ignored "-Wmaybe-uninitialized")
#    define KVCULL_AVX512_WARNINGS_END KVCULL_PRAGMA(GCC diagnostic pop)
#else
#    define KVCULL_AVX512_WARNINGS_BEGIN
#    define KVCULL_AVX512_WARNINGS_END
#endif
