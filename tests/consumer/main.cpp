// A program of a user: it sees the library and the C++ standard that it asks for.
#include <cstdio>
#include <kvcull/kvcull.hpp>

static_assert(__cplusplus >= 202002L, "the target asks for C++20");

int main() {
    const float half = kvcull::to_float(kvcull::to_float16(0.5F));
    std::printf("kvcull %d.%d.%d: %.1f\n", KVCULL_VERSION_MAJOR, KVCULL_VERSION_MINOR, KVCULL_VERSION_PATCH,
                half);
}
