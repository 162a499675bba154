// The kernels of a program that is compiled with KVCULL_SEPARATE_KERNELS.
#define KVCULL_DEFINE_KERNELS
#include <kvcull/simd/kernels.hpp>
