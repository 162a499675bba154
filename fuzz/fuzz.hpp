#pragma once
/// What the fuzz targets share. Of any bytes a loader either makes something whole or throws a format_error:
/// every other exception leaves the target, which libFuzzer reports as a crash.

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <ios>
#include <span>
#include <string>
#include <vector>

#include "kvcull/base/error.hpp"

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t most);
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most,
                                               unsigned seed);

namespace fuzz {

using Bytes = std::vector<std::uint8_t>;

[[nodiscard]] inline std::span<const std::byte> as_bytes(const std::uint8_t* data, std::size_t size) {
    return std::as_bytes(std::span(data, size));
}

/// Calls `load` and forgives what a loader may throw. @returns what libFuzzer wants of a target
template <class Load>
int offer(const Load& load) {
    try {
        load();
    } catch (const kvcull::error::format_error&) {
    }
    return 0;
}

/// For loaders that take a path: a file of this process, in memory where the system has a folder for that,
/// because a disk is several times slower than the loaders.
class TemporaryFile {
  public:
    explicit TemporaryFile(const std::string& name)
        : folder_(parent() / ("kvcull-fuzz-" + std::to_string(getpid()))), path_(folder_ / name) {
        std::filesystem::create_directories(folder_);
    }
    TemporaryFile(const TemporaryFile&) = delete;
    TemporaryFile& operator=(const TemporaryFile&) = delete;
    ~TemporaryFile() { std::filesystem::remove_all(folder_); }

    [[nodiscard]] const std::filesystem::path& folder() const noexcept { return folder_; }
    [[nodiscard]] std::string path() const { return path_.string(); }
    void write(std::span<const std::byte> bytes) const {
        std::ofstream file(path_, std::ios::binary | std::ios::trunc);
        file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    }

  private:
    [[nodiscard]] static std::filesystem::path parent() {
        std::filesystem::path memory = "/dev/shm";
        return std::filesystem::is_directory(memory) ? memory : std::filesystem::temp_directory_path();
    }

    std::filesystem::path folder_, path_;
};

/// A safetensors file whose header changes, its length following; or whose data does; or any of its bytes.
/// Plain mutation would seldom get beyond the length in front.
inline std::size_t mutate_safetensors(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed) {
    constexpr std::size_t front = sizeof(std::uint64_t);
    std::uint64_t length = 0;
    if (size >= front) std::memcpy(&length, data, front);
    const bool whole = size >= front && length <= size - front;
    if (!whole || seed % 8 == 0) return LLVMFuzzerMutate(data, size, most);
    const std::span<const std::uint8_t> text(data + front, static_cast<std::size_t>(length)),
        numbers(data + front + length, size - front - static_cast<std::size_t>(length));
    Bytes header(text.begin(), text.end()), rest(numbers.begin(), numbers.end());
    Bytes& changed = seed % 8 < 3 ? rest : header;
    const std::size_t held = changed.size();
    changed.resize(held + most - size);
    if (changed.empty()) return size;
    changed.resize(LLVMFuzzerMutate(changed.data(), held, changed.size()));
    length = header.size();
    std::memcpy(data, &length, front);
    std::copy(rest.begin(), rest.end(), std::copy(header.begin(), header.end(), data + front));
    return front + header.size() + rest.size();
}

}  // namespace fuzz
