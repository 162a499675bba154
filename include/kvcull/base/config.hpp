#pragma once
/// Version, the versioned inline namespace and the few macros of the library.

#include <cassert>

#define KVCULL_VERSION_MAJOR 0
#define KVCULL_VERSION_MINOR 1
#define KVCULL_VERSION_PATCH 0

/// Name of the inline namespace. Two objects that were compiled against different versions do not link.
#define KVCULL_ABI v0_1

/// Checks what the library itself promises inside kernels; user errors throw (base/error.hpp).
#define KVCULL_ASSERT(condition) assert(condition)

#if defined(__CUDACC__)
#    define KVCULL_HOST_DEVICE __host__ __device__
#else
#    define KVCULL_HOST_DEVICE
#endif
