#pragma once

#include <unistd.h>

#include <filesystem>
#include <string>

namespace page::test {

/// A folder that is gone when the test ends.
struct Folder {
    const std::filesystem::path path =
        std::filesystem::temp_directory_path() / ("kvcull_test_page_" + std::to_string(::getpid()));
    Folder() { std::filesystem::create_directories(path); }
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;
    ~Folder() { std::filesystem::remove_all(path); }
    [[nodiscard]] std::string file(const std::string& name) const { return (path / name).string(); }
};

}  // namespace page::test
