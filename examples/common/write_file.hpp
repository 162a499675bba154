#pragma once
/// Files that are written whole, or not without a word.

#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string_view>

namespace examples {

/// @throws std::runtime_error if the file cannot be written, as on a full disk
inline void write_file(const std::filesystem::path& file, std::string_view text) {
    std::ofstream out(file);
    out << text;
    if (!out.flush()) throw std::runtime_error(file.string() + ": cannot be written");
}

}  // namespace examples
