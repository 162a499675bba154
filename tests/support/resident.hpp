#pragma once
/// Physical memory of this process, for tests that memory really goes back.

#include <cstddef>
#include <fstream>
#include <optional>

#include "kvcull/base/pages.hpp"

/// Resident bytes as the kernel counts them; nothing where /proc is not there.
inline std::optional<std::size_t> resident_bytes() {
    std::ifstream statm("/proc/self/statm");
    std::size_t size = 0, resident = 0;
    if (!(statm >> size >> resident)) return std::nullopt;
    return resident * kvcull::Pages::page_bytes();
}
